"""What run.json says of every run of a root, from one file where possible: `.index.parquet`, which anybody may delete.

The folders are the truth. A row of the index counts only while run.json and labels.json have the inode, size and times
(modified, changed) that they had when they were read; any other run is read again, and so is everything where the index
is missing or broken. A run whose files are younger than two seconds is not kept: a clock that ticks slowly could hide a
second change.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import polars as pl

from pluralprefs.registry.files import RegistryError, write_parquet
from pluralprefs.registry.folder import read_run
from pluralprefs.registry.labels import FILE as LABELS
from pluralprefs.registry.labels import read_labels

FILE = ".index.parquet"
SETTLED = 2_000_000_000  # ns
RUNS: dict[str, Any] = {
    "run": pl.String,
    "status": pl.String,
    "model": pl.String,
    "data": pl.String,
    "created": pl.String,
    "wall_seconds": pl.Float64,
    "peak_memory_bytes": pl.Int64,
    "seeds": pl.List(pl.Int64),
    "devices": pl.List(pl.String),
    "data_fingerprint": pl.String,
    "git_commit": pl.String,
    "git_dirty": pl.Boolean,
    "host": pl.String,
    "tags": pl.List(pl.String),
    "note": pl.String,
    "error": pl.String,
}
STAMPS = tuple(f"{file}_{what}" for file in ("run", "labels") for what in ("inode", "size", "modified", "changed"))
READ: dict[str, Any] = {**RUNS, "process": pl.String, "summary": pl.String}  # the last two as JSON
INDEX: dict[str, Any] = {**READ, **dict.fromkeys(STAMPS, pl.Int64)}
NO_FILE = (None, None, None, None)


def read_runs(root: Path | str) -> pl.DataFrame:
    """Return one row (`READ`) for each run under `root`, by name: what run.json and labels.json say, word for word.

    A run that cannot be read has status None and the reason in `error`. The index is brought up to date where `root`
    can be written.
    """
    latest = time.time_ns() - SETTLED
    found = _stamped(root)
    index = _load(root)
    known = index.join(found, on=["run", *STAMPS], how="semi", nulls_equal=True)
    changed = found.join(known.select("run"), on="run", how="anti")
    labelled = changed.select("run", pl.col("labels_inode").is_not_null())
    rows = [_row(name, os.path.join(root, name), labels) for name, labels in labelled.iter_rows()]
    fresh = pl.DataFrame(rows, schema=READ, strict=False, orient="row").hstack(changed.select(STAMPS))
    table = pl.concat([known, fresh]).sort("run")
    times = [name for name in STAMPS if name.endswith(("modified", "changed"))]
    kept = table.filter(pl.col("status").is_not_null(), pl.max_horizontal(times) < latest)
    if not kept.equals(index):
        with suppress(OSError, pl.exceptions.PolarsError):  # a root that cannot be written is listed all the same
            write_parquet(Path(root) / FILE, kept)
    return table.select(list(READ))


def reindex(root: Path | str) -> int:
    """Build the index of a root from nothing and return the number of runs."""
    (Path(root) / FILE).unlink(missing_ok=True)
    return len(read_runs(root))


def _stamped(root: Path | str) -> pl.DataFrame:
    """The run folders of a root with the stamps of their two files, by name."""
    names, stamps = [], []
    if os.path.exists(root):
        with os.scandir(root) as entries:
            names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    for name in names:
        stamp = _stamp(f"{root}/{name}/run.json")
        stamps.append(stamp if stamp is None else (name, *stamp, *(_stamp(f"{root}/{name}/{LABELS}") or NO_FILE)))
    rows = [stamp for stamp in stamps if stamp is not None]
    return pl.DataFrame(rows, schema={name: INDEX[name] for name in ("run", *STAMPS)}, orient="row")


def _stamp(file: str) -> tuple[int | None, int | None, int | None, int | None] | None:
    """What tells one content of a file from another: nothing where it may not be looked at; None where it is not."""
    try:
        found = os.stat(file)
    except FileNotFoundError:
        return None
    except PermissionError:
        return NO_FILE
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _load(root: Path | str) -> pl.DataFrame:
    """The index of a root; an empty one where it is missing, broken or of another version."""
    try:
        index = pl.read_parquet(Path(root) / FILE)
    except (OSError, pl.exceptions.PolarsError):
        index = pl.DataFrame()
    return index if dict(index.schema) == INDEX else pl.DataFrame(schema=INDEX)


def _row(name: str, path: str, labelled: bool) -> dict[str, Any]:
    try:
        content = read_run(path) | (read_labels(path) if labelled else {"tags": [], "note": None})
    except RegistryError as error:
        return {"run": name, "error": str(error), "summary": "{}"}
    git, process, summary = (_object(content.get(part)) for part in ("git", "process", "summary"))
    numbers = {str(key): float(value) for key, value in summary.items() if isinstance(value, int | float)}
    row = {column: content.get(column) for column in RUNS} | {"run": name, "host": process.get("host")}
    row |= {"status": str(content.get("status")), "git_commit": git.get("commit"), "git_dirty": git.get("dirty")}
    return row | {"process": json.dumps(process), "summary": json.dumps(numbers)}


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
