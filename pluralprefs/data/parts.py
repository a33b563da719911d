"""Comparisons that lie in many files, as one table of which every process reads its own files.

Of n processes, process p reads files p, p + n, and so on. Ids, targets, attributes and all else but texts go to every
process: all hold the same rows in the same order, and what follows from ids (splits, vocabularies, batches) is the same
everywhere. The texts stay where they were read, and are null elsewhere: whatever is made of them is made by a process
that has them (`hosts.divided`). One process reads all files and lacks nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import glob
from io import BytesIO
from pathlib import Path
from typing import Any

import jax
import polars as pl

from pluralprefs.data.comparisons import read
from pluralprefs.data.files import DataError, shown
from pluralprefs.data.ids import MESSAGES, content_ids, example_ids
from pluralprefs.data.validation import SCHEMA, TEXTS
from pluralprefs.hosts import exchanged

FILE, ROW, OWN_ID = "\x00file", "\x00row", "\x00own id"
HASHES = [f"\x00{text}" for text in TEXTS]
HERE = (FILE, ROW, OWN_ID, *HASHES)


def read_parts(files: str | Path | Sequence[str | Path], **options: Any) -> pl.DataFrame:
    """Read files of comparisons as one table, each process of a run its own part of them.

    `files` is a pattern ("data/part-*.parquet", whose files are taken in the order of their names) or the files
    themselves; all processes have to be given the same, and each opens its own alone. `options` are those of
    `comparisons.read`. The table is checked as the table of one file is: example ids and the texts behind ids may not
    contradict each other across files. A judgement that several files hold, without an id, is there as often. Raises
    DataError, on every process, for what is wrong in any file.
    """
    paths = _paths(files)
    own: list[pl.DataFrame] = []
    with _together():
        for number in range(jax.process_index(), len(paths), jax.process_count()):
            own.append(_marked(read(paths[number], **options), number))
        sent = _packed(own, paths)
    dtypes = _dtypes(own, paths)
    light = _joined([pl.read_ipc(BytesIO(table)) for table in exchanged(sent) if table], paths)
    found = _checked(light.sort(FILE, ROW), paths)
    texts = [table.select(FILE, ROW, *TEXTS) for table in own]
    nobody = pl.DataFrame(schema={FILE: pl.Int32, ROW: pl.Int64} | dtypes)
    found = found.join(pl.concat([nobody, *texts]), on=[FILE, ROW], how="left", maintain_order="left")
    attributes = sorted(name for name in found.columns if name.startswith("attr:"))
    return found.select(*SCHEMA, *attributes, pl.exclude(*SCHEMA, *attributes, *HERE)).rechunk()


def _marked(table: pl.DataFrame, number: int) -> pl.DataFrame:
    """A file's table with its number, the rows', whether ids of rows are those of contents, and hashes of texts."""
    contents = pl.DataFrame([content_ids(table[text]) for text in TEXTS])
    return table.with_columns(
        pl.lit(number, pl.Int32).alias(FILE),
        pl.int_range(pl.len(), dtype=pl.Int64).alias(ROW),
        (table["example_id"] != example_ids(table, contents)).alias(OWN_ID),
        *(contents[text].alias(name) for text, name in zip(TEXTS, HASHES, strict=True)),
    )


@contextmanager
def _together() -> Iterator[None]:
    """Raise the first DataError of any process on all, which would wait for ever for the one that stopped."""
    problem = ""
    try:
        yield
    except DataError as error:
        problem = str(error)
    for told in exchanged(problem.encode()):
        if told:
            raise DataError(told.decode())


def _paths(files: str | Path | Sequence[str | Path]) -> list[Path]:
    paths: list[Path] = []
    with _together():
        if isinstance(files, (str, Path)):
            paths = [Path(name) for name in sorted(glob(str(files)))]
            if not paths:
                raise DataError(f"{files}: no such files; check the pattern")
        else:
            paths = [Path(name) for name in files]
            if not paths:
                raise DataError("no files of comparisons are given; name at least one")
        twice = next((path for at, path in enumerate(paths) if path in paths[:at]), None)
        if twice is not None:
            raise DataError(f"{twice}: is given twice; name each file once")
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


def _packed(own: list[pl.DataFrame], paths: list[Path]) -> bytes:
    """All but the texts of these tables; of no tables nothing."""
    out = BytesIO()
    if own:
        _joined([table.drop(TEXTS) for table in own], paths).write_ipc(out)
    return out.getvalue()


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
    contents = table.select(pl.col(name).alias(text) for text, name in zip(TEXTS, HASHES, strict=True))
    own = pl.when(OWN_ID).then("example_id").otherwise(example_ids(table, contents))
    table = table.with_columns(own.alias("example_id"))
    twice = (~table["example_id"].is_first_distinct()).arg_true()
    if len(twice):
        name, file = table["example_id"][twice[0]], table[FILE][twice[0]]
        before = table.filter(pl.col("example_id") == name)[FILE][0]
        raise DataError(f"{paths[file]}: example_id {shown(name)} stands in {paths[before]} too; number the rows of "
                        "all files together, or leave the column out")  # fmt: skip
    return table
