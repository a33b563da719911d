"""Comparisons that lie in many files, as one table of which every process reads its own files.

Of n processes, process p reads files p, p + n, and so on. Ids, targets, attributes and all else but texts go to every
process: all hold the same rows in the same order, and what follows from ids (splits, vocabularies, batches) is the same
everywhere. The texts stay where they were read, and are null elsewhere: whatever is made of them is made by a process
that has them (`hosts.divided`). One process reads all files and lacks nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from glob import glob
from io import BytesIO
from pathlib import Path
from typing import Any

import jax
import polars as pl

from pluralprefs.data.comparisons import read
from pluralprefs.data.files import DataError, shown
from pluralprefs.data.ids import MESSAGES, content_ids, example_id, example_keys
from pluralprefs.data.validation import SCHEMA, TEXTS
from pluralprefs.hosts import all_or_none, exchanged

FILE, ROW = "\x00file", "\x00row"
HASHES = [f"\x00{text}" for text in TEXTS]
HERE = (FILE, ROW, *HASHES)


def read_parts(files: str | Path | Sequence[str | Path], **options: Any) -> pl.DataFrame:
    """Read files of comparisons as one table, each process of a run its own part of them.

    `files` is a pattern ("data/part-*.parquet", whose files are taken in the order of their names) or the files
    themselves; all processes have to be given the same, and each opens its own alone. `options` are those of
    `comparisons.read`. The table is checked as the table of one file is: example ids and the texts behind ids may not
    contradict each other across files. A judgement that several files hold, without an id, is there as often. A file
    without rows is none. Raises DataError, on every process, for what is wrong in any file, and where no file has rows.
    """
    paths = _paths(files)
    own: list[pl.DataFrame] = []
    with all_or_none(DataError):
        for number in range(jax.process_index(), len(paths), jax.process_count()):
            table = read(paths[number], **options | {"allow_empty": True})
            if table.height:
                own.append(_marked(table, number))
        sent = _packed([table.drop(TEXTS) for table in own])
    light = sorted((table for part in exchanged(sent) for table in _unpacked(part)), key=lambda table: table[FILE][0])
    if not light:
        raise DataError(f"{files}: no file holds comparisons of two different responses; give files that do")
    dtypes = _dtypes(own, paths)
    found = _checked(_joined(light, paths), paths)
    texts = [table.select(FILE, ROW, *TEXTS) for table in own]
    nobody = pl.DataFrame(schema={FILE: pl.Int32, ROW: pl.Int64} | dtypes)
    found = found.join(pl.concat([nobody, *texts]), on=[FILE, ROW], how="left", maintain_order="left")
    attributes = sorted(name for name in found.columns if name.startswith("attr:"))
    return found.select(*SCHEMA, *attributes, pl.exclude(*SCHEMA, *attributes, *HERE)).rechunk()


def _marked(table: pl.DataFrame, number: int) -> pl.DataFrame:
    """A file's table with its number, the rows', and hashes of texts."""
    contents = [content_ids(table[text]).alias(name) for text, name in zip(TEXTS, HASHES, strict=True)]
    row = pl.int_range(pl.len(), dtype=pl.Int64).alias(ROW)
    return table.with_columns(pl.lit(number, pl.Int32).alias(FILE), row, *contents)


def _paths(files: str | Path | Sequence[str | Path]) -> list[Path]:
    paths: list[Path] = []
    with all_or_none(DataError):
        if isinstance(files, (str, Path)):
            paths = [Path(files)] if Path(files).is_file() else [Path(name) for name in sorted(glob(str(files)))]
            if not paths:
                raise DataError(f"{files}: no such files; check the pattern")
        else:
            paths = [Path(name) for name in files]
            if not paths:
                raise DataError("no files of comparisons are given; name at least one")
        twice = [path for path, count in Counter(paths).items() if count > 1]
        if twice:
            raise DataError(f"{twice[0]}: is given twice; name each file once")
    names = exchanged(json.dumps([path.name for path in paths]).encode())
    if len(set(names)) > 1:
        counts = ", ".join(str(len(json.loads(each))) for each in names)
        raise DataError(f"{files}: the processes find different files ({counts} of them): give all the same")
    return paths


def _dtypes(own: list[pl.DataFrame], paths: list[Path]) -> dict[str, pl.DataType]:
    """The types of the three texts, which all files must share: strings or message lists."""
    known = [(int(table[FILE][0]), [table.schema[text] == pl.Utf8 for text in TEXTS]) for table in own]
    told = sorted(each for sent in exchanged(json.dumps(known).encode()) for each in json.loads(sent))
    first, plain = told[0]
    for number, others in told:
        for text, here, there in zip(TEXTS, plain, others, strict=True):
            if here != there:
                kinds = ("texts", "message lists") if there else ("message lists", "texts")
                raise DataError(f"{paths[number]}: column {text!r} holds {kinds[0]}, and {paths[first]} has {kinds[1]} "
                                "there; give all files one kind")  # fmt: skip
    return {text: pl.Utf8() if here else MESSAGES for text, here in zip(TEXTS, plain, strict=True)}


def _packed(tables: list[pl.DataFrame]) -> bytes:
    """Tables as bytes, each behind its length."""
    parts = []
    for table in tables:
        out = BytesIO()
        table.write_ipc(out)
        parts += [len(out.getvalue()).to_bytes(8, "big"), out.getvalue()]
    return b"".join(parts)


def _unpacked(sent: bytes) -> Iterator[pl.DataFrame]:
    at = 0
    while at < len(sent):
        end = at + 8 + int.from_bytes(sent[at : at + 8], "big")
        yield pl.read_ipc(BytesIO(sent[at + 8 : end]))
        at = end


def _joined(tables: list[pl.DataFrame], paths: list[Path]) -> pl.DataFrame:
    try:
        return pl.concat(tables, how="diagonal_relaxed")
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{paths[0]} and other files: a column has one type here and another there ({error}); give it "
                        "one") from error  # fmt: skip


def _checked(table: pl.DataFrame, paths: list[Path]) -> pl.DataFrame:
    """The table with an id of its own for every judgement. Raises DataError where files contradict each other."""
    sides = [
        table.select(
            FILE, "prompt_id", pl.col(f"{side}_id").alias("item"), pl.col(HASHES[0]), pl.col(name).alias("text")
        )
        for side, name in zip(TEXTS[1:], HASHES[1:], strict=True)
    ]
    said = pl.concat(sides).unique(["prompt_id", "item", HASHES[0], "text"], keep="first", maintain_order=True)
    clash = said.filter(~pl.struct("prompt_id", "item").is_first_distinct())
    if clash.height:
        item = clash.row(0, named=True)
        before = said.filter(pl.col("prompt_id") == item["prompt_id"], pl.col("item") == item["item"])[FILE][0]
        raise DataError(f"{paths[item[FILE]]}: response {shown(item['item'])} of prompt {shown(item['prompt_id'])} is "
                        f"another text than in {paths[before]}; give each its own id, or leave the columns of ids "
                        "out")  # fmt: skip
    ids = table["example_id"].to_list()
    again = (~table["example_id"].is_first_distinct()).arg_true().to_list()
    if not again:
        return table
    contents = table.select(pl.col(name).alias(text) for text, name in zip(TEXTS, HASHES, strict=True))
    taken, keys = set(ids), example_keys(table, contents)
    counts = Counter(keys)
    for row in again:
        mine = [example_id(keys[row], number) for number in range(counts[keys[row]])]
        if ids[row] not in mine:  # it was given, and not taken from content
            before = table[FILE][ids.index(ids[row])]
            raise DataError(f"{paths[table[FILE][row]]}: example_id {shown(ids[row])} stands in {paths[before]} too; "
                            "number the rows of all files together, or leave the column out")  # fmt: skip
        ids[row] = next(name for name in mine if name not in taken)
        taken.add(ids[row])
    return table.with_columns(pl.Series("example_id", ids, dtype=pl.Utf8))
