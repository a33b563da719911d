"""Launch an experiment: take its data to a recorded run folder, in order; bad data is refused before a folder
exists."""

from __future__ import annotations

import atexit
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl

from pluralprefs.attributes.source import Predicted, predicted
from pluralprefs.attributes.source import restore as restore_source
from pluralprefs.contrasts import controls
from pluralprefs.data import comparisons
from pluralprefs.describe import DescriptionError, describe, override, resolve
from pluralprefs.encoders import load as load_encoder
from pluralprefs.evaluate import SEEN, evaluate
from pluralprefs.experiment import (
    FAMILIES,
    Experiment,
    Indexed,
    Prepared,
    Tell,
    baseline_predictions,
    featured,
    fingerprint,
    indexed,
    require_same_rows,
    summary_line,
    support,
)
from pluralprefs.fitting import Fitted, take
from pluralprefs.hosts import all_or_none, require_same, shared, writes
from pluralprefs.metrics import summarise
from pluralprefs.profiles import SCHEMA, attribute_weights
from pluralprefs.registry import RegistryError, RunFolder, create, open_run
from pluralprefs.registry.folder import table_file
from pluralprefs.run import Run, load
from pluralprefs.saving import save_seed, save_shared
from pluralprefs.seeds import fit_seed
from pluralprefs.training import Report, Together

CHECKPOINTS = "checkpoints"  # in a run folder that is not done
MESHES = ("backbone.mesh", "encoder.mesh")  # what a resumed run may have otherwise
NOT_COPIED = (CHECKPOINTS, "params", "vocabulary.json", "items.safetensors", "support-*", "users.safetensors", ".*")
LOSSES = {"seed": pl.Int64, "training": pl.Int64, "epoch": pl.Int64, "loss": pl.Float64}


def run(
    experiment: Experiment,
    *,
    root: str | Path = "runs",
    progress: bool = True,
    tell: Tell | None = None,
    table: pl.DataFrame | None = None,
    vmap: bool | None = None,
) -> Run:
    """Run an experiment and return it, loaded. Bad data is refused before a run folder exists.

    The arguments are those of `record`, which several processes call instead: only the first can load what it wrote.
    """
    return load(record(experiment, root=root, progress=progress, tell=tell, table=table, vmap=vmap).path)


def record(
    experiment: Experiment,
    *,
    root: str | Path = "runs",
    progress: bool = True,
    tell: Tell | None = None,
    table: pl.DataFrame | None = None,
    vmap: bool | None = None,
) -> RunFolder:
    """Run an experiment and return its folder, which of several processes the first alone has written to `root`.

    `table` is what `experiment.data()` would return, where the caller has it already. `tell` gets the lines worth
    reading on the way: split notes, the leak report, one line a seed. `vmap` trains all seeds in one program: None on
    an accelerator only, since a CPU gains nothing by it. Families that infer users train a seed at a time all the same.
    """
    tell = tell or (lambda _: None)
    if not writes():  # its folder is thrown away, and may outlive a process that is killed: no people in it
        experiment = replace(experiment, save_users=False)
    with all_or_none(comparisons.DataError):
        found = indexed(experiment, table)
    require_same_rows(found.table)  # before they compute anything together
    require_same(str(describe(replace(experiment, save_users=False))))
    # An encoder that is trained needs the folder for its checkpoints; a frozen one is refused before there is one.
    prepared = None if experiment.backbone else featured(experiment, found, progress=progress)
    data = fingerprint(found.table, found.unlabelled)
    require_same(data)
    for note in found.notes:
        tell(note)
    folder = create(
        _root(root), (experiment.name, experiment.data_name), describe(experiment), seeds=experiment.seeds,
        devices=[str(device) for device in jax.devices()], data_fingerprint=data,
    )  # fmt: skip
    folder.update(vmap=len(experiment.seeds) > 1 and (jax.default_backend() != "cpu" if vmap is None else vmap))
    return _fill(folder, experiment, found, prepared, progress, tell)


def resume(
    path: str | Path, *, progress: bool = True, tell: Tell | None = None, table: pl.DataFrame | None = None,
    vmap: bool | None = None, overrides: Sequence[str] = (),
) -> Run:  # fmt: skip
    """Continue an interrupted or failed run in its own folder, and return it, loaded.

    The arguments are those of `go_on`, which several processes call instead: only the first can load what it wrote.
    """
    return load(go_on(path, progress=progress, tell=tell, table=table, vmap=vmap, overrides=overrides).path)


def go_on(
    path: str | Path, *, progress: bool = True, tell: Tell | None = None, table: pl.DataFrame | None = None,
    vmap: bool | None = None, overrides: Sequence[str] = (),
) -> RunFolder:  # fmt: skip
    """Continue an interrupted or failed run, and return its folder, which of several processes the first alone writes.

    Seeds that were fitted are kept; a seed that was being trained by gradient goes on from its last checkpoint and ends
    as if nothing had happened: to the same bits on as many processes and devices, up to rounding on others. A run that
    is done is returned as it is. `vmap=False` goes on with a seed at a time where a run in one program failed: one
    seed's loss that is not finite stops all. `overrides` may give other meshes, "backbone.mesh={...}" and
    "encoder.mesh={...}", and nothing else. Raises DataError where the data have changed, RegistryError where several
    processes do not all see the folder.
    """
    tell = tell or (lambda _: None)
    for assignment in overrides:
        name = assignment.split("=")[0].strip()
        if not any(name == mesh or name.startswith(f"{mesh}.") for mesh in MESHES):
            raise DescriptionError(f"{assignment!r}: a run is resumed as it was recorded, only {' and '.join(MESHES)} "
                                   "may be another")  # fmt: skip
    seen = shared(Path(path))
    if seen is None:
        raise RegistryError(f"{path}: several processes resume a run whose folder all of them see: name the same one "
                            "in each, on a file system that they share, or resume it with one process")  # fmt: skip
    folder = open_run(seen)
    if folder.status == "done":
        tell(f"{folder.path}: this run is done, there is nothing to resume")
        return folder
    content = folder.read()
    experiment = resolve(content["experiment"])
    for assignment in overrides:
        experiment = override(experiment, assignment)
    if not writes():
        folder, experiment = _copied(folder), replace(experiment, save_users=False)
    require_same(f"{content} {describe(replace(experiment, save_users=False))} {vmap}")  # and wait until all have read
    if vmap is not None:
        folder.update(vmap=vmap)
    kept = restore_source(folder.path)
    if isinstance(kept, Predicted):  # not those that the folder of predictors may hold by now
        experiment = replace(experiment, attributes=lambda: kept)
    with all_or_none(comparisons.DataError):
        found = indexed(experiment, table)
    require_same_rows(found.table)  # or one would stop alone, and the others wait for it
    data = fingerprint(found.table, found.unlabelled)
    require_same(data)
    if data != content["data_fingerprint"]:
        raise comparisons.DataError(f"{folder.path}: the data of {experiment.data_name!r} have changed since this run "
                                    "began: bring them back, or train again without --resume")  # fmt: skip
    return _fill(folder, experiment, found, None, progress, tell)


def _copied(folder: RunFolder) -> RunFolder:
    """What a process other than 0 reads of a run that goes on, and no people, in a folder that goes when it ends."""
    own = Path(_root(folder.path.parent)) / folder.name
    shutil.copytree(folder.path, own, ignore=shutil.ignore_patterns(*NOT_COPIED))
    return RunFolder(own)


def _root(root: str | Path) -> str | Path:
    """Where this process keeps the run: processes other than 0 in a folder that goes when they end."""
    if writes():
        return root
    other = tempfile.mkdtemp(prefix="pluralprefs-")
    atexit.register(shutil.rmtree, other, ignore_errors=True)
    return other


def _fill(
    folder: RunFolder, experiment: Experiment, data: Indexed, prepared: Prepared | None, progress: bool, tell: Tell
) -> RunFolder:
    """Fit the seeds that the folder lacks, each kept as soon as it ends, and record the run."""
    seen = shared(folder.path)
    checkpoints = seen and seen / CHECKPOINTS
    if checkpoints is None:
        tell(f"{folder.path}: not every process sees this folder, so no checkpoints are kept: choose a --root that "
             "they share, under one path")  # fmt: skip
    with folder:
        folder.update(leaks=list(data.notes), rows=data.table.height)
        prepared = prepared or _featured(folder, experiment, data, checkpoints, progress, tell)
        save_shared(folder, experiment, prepared)
        draws = support(experiment, prepared.table)
        predictions = _predictions_so_far(folder, experiment, prepared)
        profiles, losses = _profiles_so_far(folder), _losses_so_far(folder)
        curves = {seed: _Losses(seed) for seed in experiment.seeds}
        together = Together(curves, checkpoints and checkpoints / "together") if folder.read().get("vmap") else None
        for seed in experiment.seeds:
            if str(seed) in folder.read().get("notes", {}):
                tell(f"seed {seed}: fitted before")
                continue
            curve = curves[seed]
            with _epoch_bar(f"seed {seed}", shown=progress) as curve.report:
                fitted = fit_seed(experiment, prepared, seed, checkpoints=checkpoints and checkpoints / f"seed-{seed}",
                                  report=curve, together=together)  # fmt: skip
            tell(f"seed {seed}: {summary_line(fitted)}")
            found = evaluate(fitted, prepared.features, prepared.table, prepared.rows, draws, model=experiment.name,
                             seed=seed, shots=experiment.shots, adapter=experiment.adapter,
                             controls=experiment.controls)  # fmt: skip
            predictions = pl.concat([predictions, found])
            folder.write_predictions(predictions)
            if prepared.attributes is not None:
                profiles = pl.concat([profiles, _profile(fitted, prepared, seed)])
                folder.write_table("attribute_weights", profiles)
            losses = pl.concat([losses, pl.DataFrame(curve.rows, schema=LOSSES, orient="row")])
            if losses.height:
                folder.write_table("training", losses)
            save_seed(folder, experiment, seed, fitted)
            shutil.rmtree(folder.path / CHECKPOINTS / f"seed-{seed}", ignore_errors=True)
        shutil.rmtree(folder.path / CHECKPOINTS, ignore_errors=True)
        metric_rows = pl.concat([summarise(predictions, pool_seeds=True), controls(predictions, pool_seeds=True)])
        (folder.path / "metrics.jsonl").unlink(missing_ok=True)  # of a run that was stopped right here
        folder.append_metrics(metric_rows)
        folder.summarise(_headline(metric_rows, experiment.name))
    return folder


def _featured(
    folder: RunFolder, experiment: Experiment, data: Indexed, checkpoints: Path | None, progress: bool, tell: Tell
) -> Prepared:
    """Train the encoder where that is asked for, kept in the folder, and encode the items."""
    with _epoch_bar("encoder", shown=progress and experiment.backbone is not None) as report:
        prepared = featured(experiment, data, progress=progress, keep=folder.path, checkpoints=checkpoints,
                            report=report)  # fmt: skip
    if prepared.backbone:
        folder.update(backbone=dict(prepared.backbone))
        tell(f"encoder: trained {prepared.backbone['trained_parameters']:,} of its parameters, best after epoch "
             f"{prepared.backbone['epochs']}")  # fmt: skip
    return prepared


def _predictions_so_far(folder: RunFolder, experiment: Experiment, prepared: Prepared) -> pl.DataFrame:
    """The predictions of the baselines and of the seeds that were fitted before."""
    baselines = baseline_predictions(prepared.table, experiment.seeds[0])
    done = [int(seed) for seed in folder.read().get("notes", {})]
    if not done:
        return baselines
    own = (pl.col("model") == experiment.name) & pl.col("seed").is_in(done)
    return pl.concat([baselines, folder.table("predictions").filter(own)])


def _profiles_so_far(folder: RunFolder) -> pl.DataFrame:
    """The attribute weights of the seeds that were fitted before."""
    done = [int(seed) for seed in folder.read().get("notes", {})]
    if not done or not (folder.path / table_file("attribute_weights")).exists():
        return pl.DataFrame(schema=SCHEMA)
    return folder.table("attribute_weights").filter(pl.col("seed").is_in(done))


def _losses_so_far(folder: RunFolder) -> pl.DataFrame:
    """The losses of the seeds that were fitted before."""
    done = [int(seed) for seed in folder.read().get("notes", {})]
    if not done or not (folder.path / table_file("training")).exists():
        return pl.DataFrame(schema=LOSSES)
    return folder.table("training").filter(pl.col("seed").is_in(done))


class _Losses:
    """Hear of every epoch of a seed, keep its loss, and pass it on.

    A seed makes several trainings (to choose the epochs, on all rows, on folds and on halves of the users), numbered in
    order: an epoch that does not follow the last one begins another. A seed that is resumed has its later epochs only.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.report: Report | None = None
        self.rows: list[tuple[int, int, int, float]] = []

    def __call__(self, done: int, epochs: int, loss: float) -> None:
        _, training, last, _ = self.rows[-1] if self.rows else (self.seed, 0, 0, 0.0)
        self.rows.append((self.seed, training + (not self.rows or done <= last), done, loss))
        if self.report is not None:
            self.report(done, epochs, loss)


def _profile(fitted: Fitted, prepared: Prepared, seed: int) -> pl.DataFrame:
    """Profile the communities on the test rows of seen users."""
    test = take(prepared.rows, np.flatnonzero(prepared.table["cell"].is_in(SEEN).to_numpy()))
    names = prepared.vocabulary.communities
    return attribute_weights(fitted, prepared.features, test, names, prepared.attributes.names, seed=seed)


@contextmanager
def _epoch_bar(title: str, *, shown: bool) -> Iterator[Report]:
    """Show that a seed is being fitted on standard error, where that is a terminal; give a function for epochs done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    trainings, last = 0, 0
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console, hidden = Console(stderr=True), not (shown and sys.stderr.isatty())
    with Progress(*columns, console=console, disable=hidden, transient=True) as bar:
        task = bar.add_task(f"{title}: compiling, then fitting", total=None)

        def report(done: int, epochs: int, loss: float) -> None:
            nonlocal trainings, last
            trainings, last = trainings + (not last or done <= last), done
            text = f"{title}, training {trainings}: epoch {done}/{epochs}, loss {loss:.4f}"
            bar.update(task, description=text, completed=done, total=epochs)

        yield report


def _headline(rows: pl.DataFrame, model: str) -> dict[str, float | None]:
    own = rows.filter(pl.col("model") == model, pl.col("control").is_null(), pl.col("community").is_null())
    own = own.filter(pl.col("metric").is_in(["accuracy", "nll"]))
    order = own.with_columns(pl.col("shots").fill_null(-1)).sort("shots", descending=True)
    found: dict[str, float | None] = {}
    for row in order.iter_rows(named=True):
        found.setdefault(row["metric"], row["value"]) if row["cell"] == "seen/testpair" else None
    for row in order.iter_rows(named=True):
        found.setdefault(row["metric"], row["value"])
    return found


def fit(
    data: str | Path | pl.DataFrame,
    *,
    model: str = "low_rank",
    encoder: str = "minilm",
    root: str | Path = "runs",
    seeds: Sequence[int] = (0,),
    attributes: str | Path | None = None,
    community_column: str = "community_id",
    save_users: bool = True,
    overrides: Sequence[str] = (),
    progress: bool = True,
    tell: Tell | None = None,
    **reading: Any,
) -> Run:
    """Fit a family to your own comparisons with sensible defaults and return the run.

    `data` is a file or a table, read as `comparisons.read` does (`reading` are its keywords, pseudonyms included);
    `model` a name in `FAMILIES`;
    `community_column` names the column of communities;
    `encoder` "minilm", "attributes", a folder or a Hugging Face id;
    `attributes` a folder of predictors that `pluralprefs attributes train` made, in place of `attr:` columns.
    """
    if model not in FAMILIES:
        raise ValueError(f"model {model!r} is none of {', '.join(FAMILIES)}")
    if isinstance(data, pl.DataFrame):
        table = comparisons.from_trl(data, community=community_column, **reading)
        name, loader = "table", partial(table_in_memory)
    else:
        name, loader = Path(data).stem, partial(comparisons.read, str(data), community=community_column, **reading)
        table = loader()
    _check_teaches(table, "table" if isinstance(data, pl.DataFrame) else str(data))
    parts = dict(FAMILIES[model])
    if encoder == "attributes":
        parts["features"] = {}
    if attributes is not None:
        if "attributes" not in parts:
            raise ValueError(f"attributes={str(attributes)!r}: {model} reads none; attribute_attention does")
        parts["attributes"] = partial(predicted, str(attributes))
    experiment = Experiment(
        data=loader, encoder=partial(load_encoder, encoder), seeds=tuple(seeds),
        save_users=save_users, name=model, data_name=name, **parts,
    )  # fmt: skip
    for assignment in overrides:
        experiment = override(experiment, assignment)
    return run(experiment, root=root, progress=progress, tell=tell, table=table)


def _check_teaches(table: pl.DataFrame, name: str) -> None:
    """Raise DataError where nothing can be learned from a table, before anything is encoded."""
    if not (table["weight"] > 0).any():
        raise comparisons.DataError(
            f"{name}: column 'weight': all are 0; give what is to be learned from a weight above 0"
        )
    if table["fold"].count() and not (table["fold"] == "train").any():
        raise comparisons.DataError(f"{name}: column 'fold': no row says train; name training rows train, or leave the "
                                    "column out")  # fmt: skip


def table_in_memory() -> pl.DataFrame:
    """Stand for a table that was passed as an object; a run on it cannot be repeated from its description."""
    raise comparisons.DataError("this run was fitted to a table in memory: pass that table again")
