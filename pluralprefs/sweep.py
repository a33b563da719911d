"""Run an experiment at every combination of some settings, one run each, and lay the results side by side.

What a root holds already is not run again: a run that is done, with the same described experiment on the same data, is
taken as it is, and one that was stopped goes on. So a sweep that was interrupted is started again by the same command.
One that is running, here or on another host, is left alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import polars as pl

from pluralprefs import launch
from pluralprefs.data import splits
from pluralprefs.describe import describe, override
from pluralprefs.experiment import Experiment, Tell, fingerprint, unlabelled
from pluralprefs.registry import RunFolder, StillRunning, list_runs, open_run
from pluralprefs.registry.environment import redact
from pluralprefs.registry.files import plain
from pluralprefs.results import results_table


def combinations(over: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the assignments of each combination of "PATH=VALUE,VALUE,..." in order, the last varying fastest.

    Each value is JSON, or text where it is not. Raises ValueError for a path without values, or twice the same.

    >>> combinations(["model.rank=1,2", "users.levels=[],[\\"user\\"]"])[1:3]
    [('model.rank=1', 'users.levels=["user"]'), ('model.rank=2', 'users.levels=[]')]
    >>> combinations(["model.rank=1,auto"])
    [('model.rank=1',), ('model.rank="auto"',)]
    """
    axes = []
    for text in over:
        path, equals, values = (part.strip() for part in text.partition("="))
        found = _values(values)
        written = [json.dumps(value) for value in found]
        if not (path and equals and values) or "" in found or len(set(written)) < len(written):
            raise ValueError(f"--over {text!r}: write PATH=VALUE,VALUE with different values: model.prototypes=1,2,4")
        axes.append([f"{path}={value}" for value in written])
    paths = [axis[0].partition("=")[0] for axis in axes]
    if len(set(paths)) < len(paths):
        raise ValueError(f"--over: {max(paths, key=paths.count)} is given twice; put all its values into one")
    return list(product(*axes))


def _values(text: str) -> list[Any]:
    """The values between the commas of a text; a comma inside of JSON divides nothing.

    >>> _values('1, auto, [1, 2], "a,b", 2x')
    [1, 'auto', [1, 2], 'a,b', '2x']
    """
    found, comma = [], ","
    while comma:
        text = text.lstrip()
        try:
            value, end = json.JSONDecoder().raw_decode(text)
        except json.JSONDecodeError:
            value, end = None, -1
        if end < 0 or text[end:].lstrip()[:1] not in ("", ","):
            value, end = text.partition(",")[0].rstrip(), len(text.partition(",")[0])
        found.append(value)
        _, comma, text = text[end:].partition(",")
    return found


def sweep(
    experiment: Experiment,
    over: Sequence[str],
    *,
    root: Path | str = "runs",
    tell: Tell,
    progress: bool = True,
    vmap: bool | None = None,
    ended: Callable[[RunFolder], None] | None = None,
) -> tuple[dict[str, RunFolder], dict[str, str]]:
    """Run every combination, and return the finished runs and the errors of the others, both by their settings.

    An unknown setting is an error before anything is run; a run that fails does not stop the others. One that is
    running, or was running on another host, is in neither: `tell` hears where it is.
    Seeds are trained in one program where `vmap` says so (`launch.run`), combinations one after the other: most change
    a shape. `ended` gets each run that was made or continued here, as soon as it is done.
    """
    planned = {}
    for assignments in combinations(over):
        changed = experiment
        for assignment in assignments:
            changed = override(changed, assignment)
        planned[", ".join(assignments) or experiment.name] = changed
    done, failed = {}, {}
    for number, (label, changed) in enumerate(planned.items(), start=1):
        tell(f"{number} of {len(planned)}: {label}")
        try:
            done[label], new = _one(changed, Path(root), tell, progress, vmap)
        except StillRunning as error:
            tell(f"left alone: {error}")
        except (ValueError, TypeError, OSError, FloatingPointError) as error:
            failed[label] = " ".join(f"{type(error).__name__}: {error}".split())
            tell(f"failed: {failed[label]}")
        else:
            if new and ended is not None:
                ended(done[label])
    return done, failed


def sweep_table(done: dict[str, RunFolder]) -> str:
    """Lay the runs of a sweep side by side: accuracy with interval and NLL in every cell."""
    parts = []
    for label, folder in done.items():
        model = folder.read()["model"]
        parts.append(folder.table("metrics").filter(pl.col("model") == model).with_columns(model=pl.lit(label)))
    rows = pl.concat(parts, how="diagonal_relaxed") if parts else pl.DataFrame()
    return results_table(rows) if rows.height else "no run has results"


def _one(experiment: Experiment, root: Path, tell: Tell, progress: bool, vmap: bool | None) -> tuple[RunFolder, bool]:
    """The run of an experiment: the one that is done, the one that was stopped, continued, or a new one.

    With it, whether anything was done here. Raises StillRunning where it is being made elsewhere.
    """
    table = experiment.data()
    earlier = _earlier(experiment, root, table)
    if earlier is None:
        return launch.run(experiment, root=root, tell=tell, progress=progress, table=table, vmap=vmap).folder, True
    if earlier.status == "done":
        tell(f"{earlier.path}: done before")
        return earlier, False
    earlier.refuse_running()
    return launch.resume(earlier.path, tell=tell, progress=progress, table=table).folder, True


def _earlier(experiment: Experiment, root: Path, table: pl.DataFrame) -> RunFolder | None:
    """The latest run of the very same experiment on the very same data: done, else running, else stopped."""
    whole = table if "cell" in table.columns else splits.assign(table, **experiment.split).table
    data, described = fingerprint(whole, unlabelled(experiment)), redact(plain(describe(experiment)))
    runs = list_runs(root).filter(pl.col("data_fingerprint") == data, pl.col("status") != "unreadable")
    order = runs.sort(pl.col("status") == "done", pl.col("status") == "running", "run", descending=True)
    found = (open_run(path) for path in order["path"])
    return next((run for run in found if run.read().get("experiment") == described), None)
