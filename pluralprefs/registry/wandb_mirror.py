"""Weights & Biases as a mirror: a finished run is replayed from its folder, every row once. Nothing is ever read back.

What is sent: the described experiment, every row of the metrics (a step each, with shots on the x axis), the loss of
each epoch, the summary, the tables `metrics`, `attribute_weights` and `calibration`, and the parameters as an artefact.
What is not: predictions, ids or states of users, source code, the console, the machine, folders of data, the words of
an error. The parameters of a run that kept its users hold their states: they are left out unless asked for.

A run's id is the name of its folder, and its rows come in a fixed order, so that a replay goes on where an earlier one
ended. wandb is imported here and nowhere else, when a run is mirrored; a wandb run that the caller has open goes on.
"""

from __future__ import annotations

import hashlib
import json
import netrc
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import urlparse

import polars as pl

from pluralprefs.metrics import calibration_bin, sigmoid
from pluralprefs.registry.environment import redact
from pluralprefs.registry.files import RegistryError
from pluralprefs.registry.folder import RunFolder
from pluralprefs.registry.labels import read_labels

MODES = ("online", "offline", "off")
VARIABLES = {"WANDB_CACHE_DIR": "cache", "WANDB_DATA_DIR": "data", "WANDB_CONFIG_DIR": "config"}
SENT = ("model", "data", "seeds", "devices", "data_fingerprint", "rows", "packages", "python", "git", "experiment")
ENDS = ("ci_low", "ci_high", "count", "users")


def logged_in() -> bool:
    """Say whether wandb would find a key: in WANDB_API_KEY, or in the netrc file for its server."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    file = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def mirror(
    folder: RunFolder, mode: str = "offline", *, project: str = "pluralprefs", with_users: bool = False
) -> Path | str:
    """Replay a run that has ended, and return where it is: the offline run's folder, or the address of the page.

    "offline" writes inside the run folder, in place of an earlier offline mirror; `wandb sync` sends it later. "online"
    goes on after the rows that the server has, and takes a done run alone: the rows of others may still change.
    Raises RegistryError for those, and while the run is running.
    """
    if mode not in MODES[:2]:
        raise RegistryError(f"wandb mode {mode!r}: online or offline")
    status = folder.status
    if status == "running":
        raise RegistryError(f"{folder.path}: is running; it is mirrored when it has ended")
    if mode == "online" and status != "done":
        raise RegistryError(f"{folder.path}: is {status}, and what is sent cannot be taken back; end it "
                            "(`pluralprefs train RUN --resume`), or give --mode offline")  # fmt: skip
    content = folder.read()
    if mode == "offline":
        for earlier in (folder.path / "wandb").glob(f"offline-run-*-{folder.name}"):
            shutil.rmtree(earlier)
    with _directories(folder.path.parent, mode):
        import wandb

        # wandb.run is silent about runs made with create_new, as ours is.
        alone = wandb.run is None and getattr(wandb.setup(), "most_recent_active_run", None) is None
        settings = wandb.Settings(
            silent=True, console="off", save_code=False, disable_git=True, disable_job_creation=True,
            x_disable_meta=True, x_disable_stats=True, x_disable_machine_info=True, x_save_requirements=False,
            reinit="create_new", host="hidden",
        )  # fmt: skip
        run = wandb.init(
            project=project, id=folder.name, name=folder.name, group=group(content), dir=str(folder.path), mode=mode,
            resume="allow" if mode == "online" else None, tags=read_labels(folder.path)["tags"] or None,
            notes=read_labels(folder.path)["note"], config=config(content), settings=settings,
        )  # fmt: skip
        try:
            _replay(run, folder, content, status)
            _send_parameters(run, folder, content, with_users)
            where = run.url if mode == "online" else Path(run.dir).parent
        finally:
            run.finish(exit_code=0 if status == "done" else 1)
            if mode == "offline" and alone:
                wandb.teardown()  # finish() returns before its file is written; the caller's own runs go on
    return where or folder.name


def config(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a reader needs to repeat the run, without secrets, host and command line; paths as file names."""
    return without_folders(redact({name: content[name] for name in SENT if content.get(name) is not None}))


def without_folders(value: Any) -> Any:
    """Replace every absolute path by the name of its file: the folders say who works where.

    >>> without_folders({"path": "/home/ana/mine.jsonl", "levels": ["user", "runs/a.csv"]})
    {'path': 'mine.jsonl', 'levels': ['user', 'runs/a.csv']}
    """
    if isinstance(value, dict):
        return {key: without_folders(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_folders(part) for part in value]
    if not isinstance(value, str):
        return value
    kinds = (PurePosixPath(value), PureWindowsPath(value))
    return next((path.name for path in kinds if path.is_absolute() or value.startswith("~")), value)


def group(content: Mapping[str, Any]) -> str:
    """Name what runs share that differ in nothing but their seeds."""
    experiment = content.get("experiment")
    shared = {k: v for k, v in experiment.items() if k != "seeds"} if isinstance(experiment, dict) else experiment
    code = hashlib.blake2b(json.dumps(shared, sort_keys=True).encode(), digest_size=4).hexdigest()
    return "-".join(str(part) for part in (content.get("model"), content.get("data"), code) if part)


def history(folder: RunFolder, model: str | None) -> Iterator[dict[str, Any]]:
    """Yield what is logged at each step, in order: a loss of an epoch, or one metric row with its interval.

    A metric's name is split/cell/metric for the run's own model, whatever it is called, so that runs share a chart;
    controls and communities stand between, and other models are under baselines/.
    """
    tables = folder.tables()
    if "training" in tables:
        for row in folder.table("training").sort("seed", "training", "epoch").iter_rows(named=True):
            yield {f"training/seed-{row['seed']}/{row['training']:02d}": row["loss"], "epoch": row["epoch"]}
    if "metrics" in tables:
        for row in folder.table("metrics").iter_rows(named=True):
            name = metric_name(row, model)
            ends = {f"{name}/{end}": row[end] for end in ENDS if row.get(end) is not None}
            shots = {} if row.get("shots") is None else {"shots": row["shots"]}
            yield {name: row["value"], **ends, **shots}


def metric_name(row: Mapping[str, Any], model: str | None) -> str:
    """Return the name under which a metric row is logged; rows that differ only in their shots share it.

    >>> row = {"model": "m", "split": "test", "cell": "unseen/testpair", "metric": "nll", "community": "nurses"}
    >>> metric_name(row, "m"), metric_name(row | {"community": None}, "other")
    ('test/unseen/testpair/community/nurses/nll', 'baselines/m/test/unseen/testpair/nll')
    """
    own = [] if row.get("model") == model else ["baselines", str(row.get("model"))]
    parts = [*own, row.get("split"), row.get("cell")]
    for label in ("seed", "control", "community"):
        parts += [] if row.get(label) is None else [label, str(row[label])]
    return "/".join(str(part) for part in [*parts, row.get("metric")] if part is not None)


def calibration_rows(predictions: pl.DataFrame, model: str | None) -> pl.DataFrame:
    """Return by cell, shots and bin how sure the run's own model was of the winner, and how often it won."""
    rows = predictions.filter(pl.col("model") == model, pl.col("control").is_null(), pl.col("weight") > 0)
    log_odds = rows["log_odds"].to_numpy()
    won = 0.5 + pl.col("log_odds").sign() * (pl.col("target") - 0.5)
    mean = {"sure": pl.col("sure"), "won": won}
    return (
        rows.with_columns(bin=pl.Series(calibration_bin(log_odds)), sure=pl.Series(sigmoid(abs(log_odds))))
        .group_by("cell", "shots", "bin")
        .agg(
            **{name: (pl.col("weight") * value).sum() / pl.col("weight").sum() for name, value in mean.items()},
            rows=pl.len(),
        )
        .sort("cell", "shots", "bin")
    )


def _replay(run: Any, folder: RunFolder, content: Mapping[str, Any], status: str) -> None:
    """Log every step that the run lacks."""
    import wandb

    model = content.get("model")
    run.define_metric("epoch", hidden=True)
    run.define_metric("shots", hidden=True)
    # step_sync would give a row without shots those of the row before it.
    for names, axis in (("training/*", "epoch"), ("test/*", "shots"), ("baselines/*", "shots")):
        run.define_metric(names, step_metric=axis, step_sync=False)
    step, start = 0, int(run.step or 0)  # of a run that the server knows: the step after its last
    for step, values in enumerate(history(folder, model), start=1):
        if step >= start:
            run.log(values, step=step)
    tables = {name: folder.table(name) for name in ("metrics", "attribute_weights") if name in folder.tables()}
    if "predictions" in folder.tables():
        tables["calibration"] = calibration_rows(folder.table("predictions"), model)
    filled = {name: table for name, table in tables.items() if table.height and step + 1 >= start}
    if filled:
        logged: dict[str, Any] = {f"tables/{name}": _table(table) for name, table in filled.items()}
        if "attribute_weights" in filled:
            bars = filled["attribute_weights"].filter(kind="preference").with_columns(
                label=pl.concat_str(pl.col("community").replace("", "population"), pl.lit(": "), "attribute")
            ).group_by("label", maintain_order=True).agg(pl.col("mean").mean())  # fmt: skip
            chart = wandb.plot.bar(_table(bars), "label", "mean", title="preference, log-odds per unit of the score")
            logged["charts/preference"] = chart
        run.log(logged, step=step + 1)
    numbers = {"wall_seconds": content.get("wall_seconds"), "peak_memory_bytes": content.get("peak_memory_bytes")}
    kind = str(content.get("error") or "").partition(":")[0] or None  # its words may name files and users
    run.summary.update({**(content.get("summary") or {}), **numbers, "status": status, "error": kind})


def _table(table: pl.DataFrame) -> Any:
    import wandb

    columns = {name: kind for name, kind in table.schema.items() if kind != pl.Null}  # wandb wants a type
    rows = [list(row) for row in table.select(list(columns)).iter_rows()]
    return wandb.Table(columns=list(columns), data=rows, allow_mixed_types=True)


def _send_parameters(run: Any, folder: RunFolder, content: Mapping[str, Any], with_users: bool) -> None:
    import wandb

    if not (folder.path / "params").is_dir() or (holds_users(folder) and not with_users):
        return
    artefact = wandb.Artifact(f"params-{folder.name}", type="model", metadata={"model": content.get("model")})
    for file in sorted(path for path in (folder.path / "params").rglob("*") if path.is_file()):
        artefact.add_file(str(file), name=file.relative_to(folder.path).as_posix(), policy="immutable")
    run.log_artifact(artefact)


def holds_users(folder: RunFolder) -> bool:
    """Say whether the run kept its users, whose states are then in its parameters; yes, unless everything says no."""
    experiment = folder.read().get("experiment")
    try:
        names = json.loads((folder.path / "vocabulary.json").read_text("utf8"))["users"]
    except (OSError, ValueError, KeyError, TypeError):
        return True
    asked = not isinstance(experiment, dict) or experiment.get("save_users") is not False
    return asked or names != [] or any(folder.path.glob("support-*.safetensors"))


@contextmanager
def _directories(root: Path, mode: str) -> Iterator[None]:
    """Keep what wandb writes beside the runs: offline it would write to the home directory too."""
    before = dict(os.environ)
    if mode == "offline":
        for variable, name in VARIABLES.items():
            os.environ.setdefault(variable, str(root.resolve() / ".wandb" / name))
    try:
        yield
    finally:
        for variable in VARIABLES:
            if variable not in before:
                os.environ.pop(variable, None)
