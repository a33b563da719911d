"""Many runs as tables: the list of runs, and any table of every run in one frame.

Listing reads an index, or one small file per run where the index is out of date (see `index`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import polars as pl

from pluralprefs.registry.files import RegistryError
from pluralprefs.registry.folder import STATUSES, RunFolder, open_run, read_table, status_now, table_file
from pluralprefs.registry.index import RUNS, read_runs
from pluralprefs.registry.where import parse_where


def list_runs(root: Path | str = "runs", where: str | None = None) -> pl.DataFrame:
    """List the runs under `root`, oldest first, one row each; the numbers of a run's summary are further columns.

    `where` filters: "model=ideal_point and status=done and accuracy>0.7" (see `parse_where`). A run whose run.json is
    broken is listed with status "unreadable" and the reason in `error`. A missing root is a list without rows.
    """
    table = read_runs(root)
    summaries = json.loads(f"[{','.join(table['summary'])}]")
    names = sorted({name for summary in summaries for name in summary} - RUNS.keys() - {"path"})
    columns = {name: [summary.get(name) for summary in summaries] for name in names}
    ended = [_status(*row) for row in table.select("status", "process", "error").iter_rows()]
    table = table.select(list(RUNS)).with_columns(
        pl.Series("status", [status for status, _ in ended], pl.String),
        pl.Series("error", [error for _, error in ended], pl.String),
        pl.Series("path", [os.path.join(root, name) for name in table["run"]], pl.String),
        *(pl.Series(name, values, dtype=pl.Float64) for name, values in columns.items()),
    )
    return table if where is None else table.filter(parse_where(where, table.schema))


def load_table(root: Path | str, name: str, where: str | None = None) -> pl.DataFrame:
    """Load the table `name` ("metrics", "predictions", "attribute_weights", ...) of every run that has it.

    The first column is `run`. Columns that some runs lack are null there. RegistryError where no run has the table.
    """
    file = table_file(name)
    parts = []
    for run, path in list_runs(root, where).select("run", "path").iter_rows():
        if os.path.exists(os.path.join(path, file)):
            part = read_table(Path(path), name).select(pl.exclude("run"))
            parts.append(pl.DataFrame({"run": [run] * len(part)}, schema={"run": pl.String}).hstack(part))
    if not parts:
        raise RegistryError(f"{root}: no run has a table {name!r}" + (f" where {where}" if where else ""))
    return pl.concat(parts, how="diagonal_relaxed")


def _status(status: str | None, process: str | None, error: str | None) -> tuple[str, str | None]:
    """The status as of now and the error, from what run.json says of them."""
    if status is None:
        return "unreadable", error
    if status != "running" and status in STATUSES:
        return status, error
    now = status_now({"status": status, "process": json.loads(process or "null")})
    if now == "interrupted" and error is None:
        return now, "the process ended without a word"
    return now, f"run.json: status {status!r} is unknown" if now == "unreadable" else error


def find_run(text: str, root: Path | str = "runs") -> RunFolder:
    """Open the run that `text` means: a run folder's path, a name under `root`, or a part that one name alone has.

    Raises RegistryError where there is none or several, with their names.
    """
    if os.path.exists(os.path.join(text, "run.json")):
        return open_run(os.path.abspath(text) if Path(text).name in ("", "..") else text)  # "." is no name
    names = read_runs(root)["run"].to_list()
    found = [name for name in names if name == text] or [name for name in names if text in name]
    if len(found) == 1:
        return open_run(os.path.join(root, found[0]))
    if not found:
        raise RegistryError(f"{text}: no run folder, and no run in {root} has this in its name")
    raise RegistryError(f"{text}: {len(found)} runs in {root} have this in their names, first {', '.join(found[:3])}")
