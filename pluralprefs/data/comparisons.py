"""The table of comparisons: one row is one judgement, by one user, of two responses to one prompt.

Columns are those of `SCHEMA`, then attribute columns `attr:<name>:first` and `attr:<name>:second`, then whatever
else the file held. Texts are strings or message lists. `target` is P(first preferred); `tie` says that the judge
called the two equal, which is not the same as a graded 0.5. An unknown user, annotator or community is null. Ids that
a file lacks are taken from content (`data.ids`), so that equal files give equal ids in every order.

A table that passed `check` needs no further checks; `check` of its own result changes nothing.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from pluralprefs.data.files import DataError, read_frame, shown, write_frame
from pluralprefs.data.ids import canonical, map_unique, pseudonym, stable_hash
from pluralprefs.data.layouts import rename_columns, to_first_second, to_trl
from pluralprefs.data.validation import IDS, SCHEMA, TEXTS, Checked, as_column, as_text, check, validate

__all__ = [
    "SCHEMA",
    "Checked",
    "DataError",
    "check",
    "from_trl",
    "pseudonym",
    "read",
    "read_checked",
    "stable_hash",
    "summary",
    "to_trl",
    "validate",
    "write",
]


def read(path: str | Path, **options) -> pl.DataFrame:
    """Read and check a file of comparisons; see `read_checked` for the options."""
    return read_checked(path, **options).table


def read_checked(
    path: str | Path,
    *,
    prompt: str = "prompt",
    user: str = "user_id",
    community: str = "community_id",
    pseudonymise: bool = True,
    salt: str = "",
    extract_prompt: bool = False,
    labelled: bool = True,
    allow_empty: bool = False,
) -> Checked:
    """Read a .jsonl, .jsonl.gz, .json, .parquet or .csv file of either layout (`data.layouts`).

    `prompt`, `user` and `community` name the file's own columns. Users and annotators become pseudonyms under `salt`
    unless told otherwise. `extract_prompt` takes the common start of `chosen` and `rejected` texts as the prompt.
    Without `labelled`, targets may be missing. An empty file is an error unless `allow_empty`. Raises DataError.
    """
    raw = read_frame(path, ids=(*IDS, user, community))
    named = {"prompt": prompt, "user": user, "community": community}
    if allow_empty and not raw.height:
        return check(pl.DataFrame(schema=SCHEMA), name=str(path), allow_empty=True)
    return _import(raw, str(path), named, pseudonymise, salt, extract_prompt, labelled, allow_empty)


def from_trl(
    rows: pl.DataFrame,
    *,
    name: str = "table",
    prompt: str = "prompt",
    user: str = "user_id",
    community: str = "community_id",
    pseudonymise: bool = True,
    salt: str = "",
    extract_prompt: bool = False,
) -> pl.DataFrame:
    """Bring rows in TRL's preference layout into the table; `to_trl` is the inverse."""
    named = {"prompt": prompt, "user": user, "community": community}
    return _import(rows, name, named, pseudonymise, salt, extract_prompt, True).table


def _import(
    raw: pl.DataFrame,
    name: str,
    named: dict[str, str],
    pseudonymise: bool,
    salt: str,
    extract_prompt: bool,
    labelled: bool,
    allow_empty: bool = False,
) -> Checked:
    if not raw.height:
        raise DataError(f"{name}: holds no comparisons; write one row a judgement")
    raw = rename_columns(raw, name, **named)
    for column in (c for c in raw.columns if c in (*TEXTS, "chosen", "rejected")):
        raw = raw.with_columns(as_text(raw[column], name))
    for column in (c for c in raw.columns if pseudonymise and c in ("user_id", "annotator_id")):
        ids = as_column(raw[column], pl.Utf8, name).replace("", None)
        raw = raw.with_columns(map_unique(ids, lambda user: pseudonym(user, salt), pl.Utf8))
    table = to_first_second(raw, name, extract_prompt=extract_prompt, labelled=labelled)
    return check(table, name=name, allow_empty=allow_empty)


def write(table: pl.DataFrame, path: str | Path) -> None:
    """Write a table to .jsonl, .parquet or .csv, whole or not at all; CSV cannot hold message lists (DataError)."""
    write_frame(table, path)


def summary(table: pl.DataFrame, dropped: pl.DataFrame | None = None) -> str:
    """Describe a checked table in a few lines: who judged what, how often, and what is missing."""
    users, communities = table["user_id"].drop_nulls(), table["community_id"].drop_nulls()
    low, high = pl.min_horizontal("first_id", "second_id"), pl.max_horizontal("first_id", "second_id")
    judged = table.select("user_id", "prompt_id", low.alias("low"), high.alias("high"))
    lengths = pl.concat([canonical(table[side]).alias("text") for side in ("first", "second")]).unique().str.len_chars()
    graded = ~table["target"].is_in([0.0, 1.0]) & ~table["tie"]
    lines = {
        "comparisons": f"{table.height}",
        "users": f"{users.n_unique()}; comparisons each: {_five(users.value_counts()['count'])}",
        "no user": f"{table['user_id'].null_count()} rows",
        "communities": f"{communities.n_unique()}; no community: {table['community_id'].null_count()} rows",
        "prompts": f"{table['prompt_id'].n_unique()}; responses {len(lengths)}; pairs {judged[:, 1:].n_unique()}",
        "ties": f"{table['tie'].sum()}; graded targets {graded.sum()}",
        "repeated": f"{table.height - judged.n_unique()} judgements of a pair by the same user",
        "dropped": _dropped(dropped),
        "characters": f"of a response: {_five(lengths)}",
        "folds": ", ".join(f"{fold} {n}" for fold, n in table["fold"].drop_nulls().value_counts().sort("fold").rows()),
    }
    return "\n".join(f"{word:<13}{text}" for word, text in lines.items() if text)


def _five(values: pl.Series) -> str:
    least, low, middle, high, most = (int(values.quantile(q, "nearest") or 0) for q in (0, 0.25, 0.5, 0.75, 1))
    return f"min {least}, quartiles {low} / {middle} / {high}, max {most}"


def _dropped(dropped: pl.DataFrame | None) -> str:
    if dropped is None:
        return ""
    where = [f"{n} in {'no community' if c is None else shown(c)}" for c, n in dropped.rows()]
    return f"{dropped['dropped'].sum()} rows with identical responses" + (f" ({', '.join(where)})" if where else "")
