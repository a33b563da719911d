"""Names that depend on content alone: the same on every machine, in every file order, in every session.

Splits, sides, missing ids and pseudonyms are all taken from blake2b, so nothing about a row depends on where in the
file it stands or on a random state. A text stands for itself; a list of messages stands as its canonical JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from hashlib import blake2b

import polars as pl

MESSAGES = pl.List(pl.Struct({"role": pl.Utf8, "content": pl.Utf8}))
CONTENT = ("target", "tie", "strength", "strength_scale", "weight", "user_id", "annotator_id", "community_id", "source")
_PSEUDONYM = re.compile(r"u_[0-9a-f]{16}")


def stable_hash(text: str) -> int:
    """Return the 64-bit blake2b hash of a text as an integer, big endian.

    >>> stable_hash("user|w1140") % 100
    49
    """
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def content_id(text: str) -> str:
    """Return 16 hexadecimal digits that stand for a text.

    >>> content_id("")
    'e4a6a0577479b2b4'
    """
    return blake2b(text.encode(), digest_size=8).hexdigest()


def pseudonym(user_id: str, salt: str = "") -> str:
    """Return the pseudonym of a raw user id: `u_` and 16 hexadecimal digits of a blake2b keyed by `salt`.

    Without a secret salt the raw id can be guessed by trying: it hides names from a reader, not from an attacker. A
    pseudonym is its own pseudonym, so that a table we wrote can be read again unchanged.

    >>> pseudonym(pseudonym("Ana")) == pseudonym("Ana") != pseudonym("Ana", salt="secret")
    True
    """
    if _PSEUDONYM.fullmatch(user_id):
        return user_id
    key = blake2b(salt.encode(), digest_size=32).digest() if salt else b""
    return "u_" + blake2b(user_id.encode(), digest_size=8, key=key).hexdigest()


def map_unique(values: pl.Series, function: Callable[[str], object], dtype: type[pl.DataType]) -> pl.Series:
    """Apply a function of a text once to each distinct value; nulls stay null."""
    distinct = values.drop_nulls().unique().to_list()
    lookup = {value: function(value) for value in distinct}
    return pl.Series(values.name, [None if v is None else lookup[v] for v in values.to_list()], dtype=dtype)


def canonical(values: pl.Series) -> pl.Series:
    """Return texts as they are and message lists as canonical JSON, one text a row."""
    if not isinstance(values.dtype, pl.List):
        return values
    texts = [json.dumps(m, ensure_ascii=False, sort_keys=True, separators=(",", ":")) for m in values.to_list()]
    return pl.Series(values.name, texts, dtype=pl.Utf8)


def content_ids(values: pl.Series) -> pl.Series:
    """Return the content id of every text or message list."""
    return map_unique(canonical(values), content_id, pl.Utf8)


def example_ids(table: pl.DataFrame, contents: pl.DataFrame) -> pl.Series:
    """Return an id a row from its content and, among rows of equal content, its occurrence.

    `contents` holds the content ids of prompt, first and second. The fold is not content: splitting renames nothing.
    """
    key = example_keys(table, contents)
    occurrence = key.to_frame().select(pl.int_range(pl.len()).over("key").alias("occurrence"))["occurrence"]
    ids = [example_id(k, n) for k, n in zip(key, occurrence, strict=True)]
    return pl.Series("example_id", ids, dtype=pl.Utf8)


def example_keys(table: pl.DataFrame, contents: pl.DataFrame) -> pl.Series:
    """Return the content of every row as one text."""
    parts = contents.with_columns(table[name].cast(pl.Utf8) for name in CONTENT)
    return parts.select(pl.concat_str(pl.all().fill_null("\x00"), separator="\x1f").alias("key"))["key"]


def example_id(key: str, occurrence: int) -> str:
    """Return the id of a row by its content, and by how many rows of equal content stand before it."""
    return content_id(f"{key}\x1f{occurrence}")
