"""One run on disk: a folder of plain files that is readable at any moment, also after a kill.

    runs/2026-11-21T10-32-05-ideal_point-ukp-7f3a/
      run.json               described experiment, environment, seeds, data fingerprint, status, summary
      metrics.jsonl          long rows, appended while the run goes on
      predictions.parquet    per-comparison log-odds
      <table>.parquet        attribute_weights and other tables
      users.safetensors      user states, only where asked for: they are personal data

The files are the truth; whatever index is built over them can be rebuilt. Nothing here knows a model.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import numpy as np
import polars as pl

from pluralprefs.registry.environment import (
    describe_environment,
    peak_memory_bytes,
    process_is_gone,
    redact,
    redact_arguments,
    this_process,
)
from pluralprefs.registry.files import (
    TABLE_NAME,
    RegistryError,
    StillRunning,
    append_lines,
    checked_table_name,
    load_arrays,
    plain,
    read_lines,
    save_arrays,
    slug,
    write_json,
    write_parquet,
)

FORMAT = 1
STATUSES = ("running", "done", "failed", "interrupted", "unreadable")


class RunFolder:
    """A run folder, open for reading and writing. As a context manager it sets the status when the block ends.

    Leaving the block plainly gives "done"; Ctrl-C or SIGTERM "interrupted"; any other exception "failed" with the
    error in one line. The exception goes on its way. A process that was killed outright cannot write: its run is
    shown as "interrupted" by `status` and `list_runs`, because its process is gone. Entering a run that has ended
    resumes it: "running" again, wall time adds up.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._started = time.monotonic()
        self._seconds_before = 0.0
        self._terminated = False
        self._previous_handler: Any = None

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @property
    def name(self) -> str:
        """The folder's name, unique within its root."""
        return self.path.name

    # run.json

    def read(self) -> dict[str, Any]:
        """Read run.json; RegistryError where it is missing or broken."""
        return read_run(self.path)

    def update(self, **fields: Any) -> None:
        """Set top-level fields of run.json, such as `summary` or `tags`; the file is replaced whole."""
        write_json(self.path / "run.json", {**self.read(), **redact(plain(fields))})

    def summarise(self, values: Mapping[str, float | None]) -> None:
        """Add named numbers to the run's summary: columns of `list_runs`, and what `where` can ask for."""
        self.update(summary={**self.read().get("summary", {}), **values})

    @property
    def status(self) -> str:
        """The status as of now: "interrupted" where run.json says "running" but the process is gone."""
        return status_now(self.read())

    def refuse_running(self) -> None:
        """Raise StillRunning where another process writes the run, or may: of one on another host nobody here can tell.

        For those who were not asked to go on with this very run, as a sweep. Entering the run is what takes it over.
        """
        content = self.read()
        if status_now(content) == "running":
            host = (content.get("process") or {}).get("host")
            raise StillRunning(
                f"{self.path}: running on {host}; if it is dead, `pluralprefs train {self.path} --resume`"
            )

    def finish(self, status: str, error: str | None = None) -> None:
        """Record the end of the run: status, error, wall time and peak memory."""
        if status not in STATUSES[1:4]:
            raise RegistryError(f"{self.path}: status {status!r} is not one of {', '.join(STATUSES[1:4])}")
        self.update(
            status=status,
            error=error,
            finished=_now(),
            wall_seconds=round(self._seconds_before + time.monotonic() - self._started, 3),
            peak_memory_bytes=peak_memory_bytes(),
        )

    def __enter__(self) -> Self:
        self._take_over()
        self._started = time.monotonic()
        if threading.current_thread() is threading.main_thread():  # signals can be caught nowhere else
            self._previous_handler = signal.signal(signal.SIGTERM, self._on_terminate)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._previous_handler or signal.SIG_DFL)
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self.finish("done")
        elif self._terminated or isinstance(error, KeyboardInterrupt):
            self.finish("interrupted", "SIGTERM" if self._terminated else "KeyboardInterrupt")
        else:
            self.finish("failed", one_line(error))

    def _take_over(self) -> None:
        """Make this process the one that writes the run; refuse while another living process does."""
        content, mine = self.read(), this_process()
        owner = content.get("process") or {}
        if content.get("status") == "running" and owner == mine:
            return
        if content.get("status") == "running" and owner.get("host") == mine["host"] and not process_is_gone(owner):
            raise StillRunning(f"{self.path}: process {owner.get('pid')} is still writing this run; end it first")
        self._seconds_before = content.get("wall_seconds") or 0.0
        self.update(status="running", error=None, finished=None, process=mine)

    def _on_terminate(self, number: int, frame: FrameType | None) -> None:
        self._terminated = True
        raise SystemExit(128 + number)

    # tables

    def append_metrics(self, rows: pl.DataFrame | Iterable[Mapping[str, Any]]) -> None:
        """Append metric rows to metrics.jsonl; whole lines, flushed to disk, so that a kill loses at most one call."""
        append_lines(self.path / "metrics.jsonl", rows.to_dicts() if isinstance(rows, pl.DataFrame) else rows)

    def write_predictions(self, predictions: pl.DataFrame) -> None:
        """Write predictions.parquet whole, replacing an earlier one."""
        self.write_table("predictions", predictions)

    def write_table(self, name: str, table: pl.DataFrame) -> None:
        """Write <name>.parquet whole; `name` is a plain word, `metrics` is kept for metrics.jsonl."""
        if checked_table_name(name) == "metrics":
            raise RegistryError(f"{self.path}: metrics are appended; use append_metrics")
        write_parquet(self.path / f"{name}.parquet", table)

    def write_users(self, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
        """Write users.safetensors. Opt-in: user states are personal data."""
        save_arrays(self.path / "users.safetensors", arrays, metadata)

    def read_users(self) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Read users.safetensors as arrays and metadata."""
        return load_arrays(self.path / "users.safetensors")

    def table(self, name: str) -> pl.DataFrame:
        """Read a table of this run, `metrics` and `predictions` included; RegistryError where it has none."""
        return read_table(self.path, name)

    def tables(self) -> list[str]:
        """Return the names of the tables that this run has."""
        found = {path.stem for path in self.path.glob("*.parquet") if TABLE_NAME.fullmatch(path.stem)}
        return sorted(found | ({"metrics"} if (self.path / "metrics.jsonl").exists() else set()))


def create(
    root: Path | str,
    name: str | tuple[str, str],
    described: Mapping[str, Any],
    *,
    seeds: Sequence[int] = (),
    devices: Sequence[str] = (),
    data_fingerprint: str | None = None,
    argv: Sequence[str] | None = None,
    **fields: Any,
) -> RunFolder:
    """Make a new run folder with status "running".

    `name` is the model's name or (model, data); only its slug enters the folder's name. `described` is the experiment
    as plain JSON. `argv` defaults to this process's command line. Further `fields` go to run.json as they are. Secrets
    are redacted everywhere. Raises RegistryError where `root` cannot be written.
    """
    model, data = (name, None) if isinstance(name, str) else name
    content = {
        "format": FORMAT,
        "model": model,
        "data": data,
        "status": "running",
        "error": None,
        "created": _now(),
        "finished": None,
        "wall_seconds": None,
        "peak_memory_bytes": None,
        "seeds": list(seeds),
        "devices": list(devices),
        "data_fingerprint": data_fingerprint,
        "argv": redact_arguments(sys.argv if argv is None else argv),
        **describe_environment(),
        "summary": {},
        "experiment": described,
        **fields,
    }
    path = _new_folder(Path(root), [part for part in (model, data) if part])
    write_json(path / "run.json", redact(plain(content)))
    return RunFolder(path)


def open_run(path: Path | str) -> RunFolder:
    """Open an existing run folder; RegistryError where it is none."""
    read_run(Path(path))
    return RunFolder(path)


def read_run(path: Path | str) -> dict[str, Any]:
    """Read the run.json of a folder; RegistryError, one line, where it is missing or broken."""
    file = os.path.join(path, "run.json")  # not pathlib: a listing comes here ten thousand times
    try:
        with open(file, "rb") as opened:
            content = json.loads(opened.read())
    except FileNotFoundError:
        raise RegistryError(f"{path}: not a run folder (no run.json); `pluralprefs runs` lists them") from None
    except (OSError, ValueError) as error:
        raise RegistryError(f"{file}: unreadable ({one_line(error)}); restore it or delete the folder") from error
    if not isinstance(content, dict):
        raise RegistryError(f"{file}: holds {type(content).__name__}, not an object; restore it or delete the folder")
    return content


def table_file(name: str) -> str:
    """Return the file name of a table; RegistryError where `name` is not a plain word.

    >>> table_file("metrics"), table_file("attribute_weights")
    ('metrics.jsonl', 'attribute_weights.parquet')
    """
    return "metrics.jsonl" if checked_table_name(name) == "metrics" else f"{name}.parquet"


def read_table(path: Path, name: str) -> pl.DataFrame:
    """Read one table of a run folder as polars; RegistryError where it is missing or broken."""
    file = path / table_file(name)
    if not file.exists():
        raise RegistryError(f"{path}: has no table {name!r}; it has {', '.join(RunFolder(path).tables()) or 'none'}")
    if name == "metrics":
        return pl.DataFrame(read_lines(file), infer_schema_length=None)
    try:
        return pl.read_parquet(file)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise RegistryError(f"{file}: unreadable ({one_line(error)}); copy it again or delete it") from error


def status_now(content: Mapping[str, Any]) -> str:
    """Return a run's status, "interrupted" where its process has ended without saying so."""
    status, process = content.get("status"), content.get("process")
    if status not in STATUSES:
        return "unreadable"
    if status == "running" and isinstance(process, dict) and process_is_gone(process):
        return "interrupted"
    return str(status)


def one_line(error: BaseException, longest: int = 500) -> str:
    """Return an exception as one line without secrets.

    >>> one_line(ValueError("bad\\nrow"))
    'ValueError: bad row'
    """
    text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    return redact(text if len(text) <= longest else text[: longest - 1] + "…")


def _new_folder(root: Path, names: list[str]) -> Path:
    stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S")
    try:
        root.mkdir(parents=True, exist_ok=True)
        while True:
            path = root / "-".join([stamp, *map(slug, names), secrets.token_hex(2)])
            try:
                path.mkdir()
            except FileExistsError:
                continue  # another run took the same four digits in the same second
            return path
    except OSError as error:
        raise RegistryError(
            f"{root}: cannot make a run folder here ({error.strerror}); choose another --root"
        ) from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
