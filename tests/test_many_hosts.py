"""A run of two processes through the command line is what one computes, and may be killed and resumed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load_file
from tables import letters, tiny_llama, write
from test_hosts import ENVIRONMENT, ROOT, free_port, together

from pluralprefs.backbone import BACKBONE
from pluralprefs.run import load

FAMILY = """
experiment = Experiment(
    data=partial(comparisons.read, os.environ["FOLDER"] + "/data.jsonl"), encoder=partial(encoders.load, "attributes"),
    model=partial(LowRank.init, rank=2), epochs=2, batch_size=63, shots=(0, 2), draws=1,
    users=Pooled(levels=("user",), gain=False, rounds=1, cross_fit=None, strength=1.0), seeds=(0, 1), name="low_rank",
    save_users=True, controls=False,
)
"""
ENCODER = """
RATES = {{name: partial(optax.sgd, learning_rate=0.2) for name in ("backbone", "head")}}
experiment = Experiment(
    data={data}, name="low", shots=(0,), draws=1, refit=False,
    encoder=partial(encoders.load, os.environ["FOLDER"] + "/llama", max_length=16{read}), controls=False,
    backbone=Backbone(optimizers=RATES, epochs=6, batch_tokens=128, packed=True, warmup=0.0, {options}),
    **FAMILIES["individual"] | {{"users": Pooled(levels=(), gain=False, cross_fit=None)}},
)
"""
# Every epoch, or step, is saved, and the second process may be killed in the middle of a save.
BEGINNING = """
import os, signal
from functools import partial
import jax, optax
import orbax.checkpoint as ocp
from pluralprefs import backbone, encoders, training
from pluralprefs.backbone import Backbone
from pluralprefs.data import comparisons
from pluralprefs.data.parts import read_parts
from pluralprefs.encoders.lora import Lora
from pluralprefs.experiment import FAMILIES, Experiment
from pluralprefs.models.low_rank import LowRank
from pluralprefs.users import Pooled

if "KILL" in os.environ:
    backbone.SAVE_SECONDS = training.CHECKPOINT_SECONDS = 0.0
    plain, left = ocp.StandardCheckpointHandler.async_save, [int(os.environ["KILL"])]

    def save(self, *given, **named):
        left[0] -= 1
        if left[0] == 0 and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, *given, **named)

    ocp.StandardCheckpointHandler.async_save = save
"""
ONE_FILE = 'partial(comparisons.read, os.environ["FOLDER"] + "/rows.jsonl")'
PARTS = 'partial(read_parts, os.environ["FOLDER"] + "/part-*.jsonl")'
MAIN = "from pluralprefs.cli import main; main()"
TELLING = """
import jax
from pluralprefs.data import comparisons
from pluralprefs.train import CheckpointStore

def read_frame(path, plain=comparisons.read_frame, **options):
    print("reads", path, flush=True)
    return plain(path, **options)

comparisons.read_frame = read_frame

def restore(self, *given, plain=CheckpointStore.restore, **named):
    step = self.latest()
    if jax.process_index() == 0:
        print("goes on from", self.folder, step)
    return plain(self, *given, **named)

CheckpointStore.restore = restore

from pluralprefs import training

def tables_divided(tree, plain=training.tables_divided):
    found = plain(tree)
    parts = [leaf for leaf in jax.tree.leaves(found) if isinstance(leaf, jax.Array) and not leaf.is_fully_replicated]
    if jax.process_count() > 1 and jax.process_index() == 0:
        print("divides", len(parts), "tables", flush=True)
    return found

training.tables_divided = tables_divided
"""
KINDS = {
    "family": FAMILY,
    "full": ENCODER.format(options='lora=None, mesh={"fsdp": 2}', data=ONE_FILE, read=""),
    # Weights that no process reads whole.
    "spread": ENCODER.format(options='lora=None, mesh={"fsdp": 2}', data=PARTS, read=', mesh={"fsdp": 2}'),
    "lora": ENCODER.format(options="lora=Lora(rank=2), accumulate=2", data=PARTS, read=""),  # each its own files
}
KILLED_AT = {"family": 11, "full": 7, "spread": 7, "lora": 7}  # saves


def train(*arguments: object, processes: int = 1) -> list[list[str]]:
    """The command line of each process."""
    command = [sys.executable, "-c", TELLING + MAIN, "train", *map(str, arguments)]
    who = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", str(processes), "--process"]
    return [[*command, *who, str(number)] for number in range(processes)] if processes > 1 else [command]


def killed(commands: list[list[str]], **environment: str) -> None:
    """Start both processes, of which the second kills itself in a save, and end the first, which waits for it."""
    env = os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)} | environment
    first, second = (
        subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for command in commands
    )
    try:
        assert second.wait(timeout=900) == -signal.SIGKILL
        time.sleep(2)  # what the first writes meanwhile is half a checkpoint
    finally:
        for process in (first, second):
            process.kill()
            process.wait()


def arrays(path: Path, seed: int) -> dict[str, np.ndarray]:
    found = load(path, seed=seed)
    leaves = jax.tree_util.tree_leaves_with_path((found.model, found.users))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def differences(ours: Path, theirs: Path) -> dict[str, float]:
    """The largest difference of two runs in parameters, predictions and a trained encoder."""
    seeds = pl.read_parquet(ours / "predictions.parquet").filter(~pl.col("model").str.contains(" "))["seed"].unique()
    pairs = [(arrays(ours, seed), arrays(theirs, seed)) for seed in seeds]
    if (ours / BACKBONE).exists():
        pairs.append((load_file(ours / BACKBONE), load_file(theirs / BACKBONE)))
    assert all(set(a) == set(b) for a, b in pairs)
    found = {"parameters": max(float(np.abs(a[k] - b[k]).max(initial=0.0)) for a, b in pairs for k in a)}
    keys = ["model", "seed", "cell", "control", "shots", "draw", "example_id"]
    a, b = (pl.read_parquet(run / "predictions.parquet").sort(keys) for run in (ours, theirs))
    numbers = ["log_odds", "log_odds_std"]
    assert a.drop(numbers).equals(b.drop(numbers))
    assert a.select(pl.col(numbers).is_null()).equals(b.select(pl.col(numbers).is_null()))
    return found | {name: float((a[name] - b[name]).abs().max()) for name in numbers}


def files(said: str) -> list[str]:
    """The names of the data files that a process has read."""
    return [Path(line.removeprefix("reads ")).name for line in said.splitlines() if line.startswith("reads ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hosts")
    write(path / "data.jsonl", users=11)
    letters(path / "rows.jsonl")
    rows = (path / "rows.jsonl").read_text("utf8").splitlines()
    for number, part in enumerate((rows[:25], rows[25:32], rows[32:])):
        (path / f"part-{number}.jsonl").write_text("\n".join(part), "utf8")
    tiny_llama(path / "llama")
    for name, text in KINDS.items():
        (path / f"{name}.py").write_text(BEGINNING + text)
    return path


def only(root: Path) -> Path:
    [found] = root.iterdir()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_killed_in_a_save_and_resumed_end_as_if_nothing_had_happened(kind, folder, tmp_path, monkeypatch):
    where = {"FOLDER": str(folder), "PLURALPREFS_CACHE": str(tmp_path / "cache")}
    for name, value in where.items():
        monkeypatch.setenv(name, value)
    file = folder / f"{kind}.py"
    said = together(train(file, "--root", tmp_path / "whole", processes=2), **where)
    if kind == "family":  # the state, and Adam's two moments of it
        divides = [int(line.split()[1]) for line in said[0].splitlines() if line.startswith("divides")]
        assert divides
        assert min(divides) >= 3
    if kind in ("lora", "spread"):
        assert [files(text) for text in said] == [["part-0.jsonl", "part-2.jsonl"], ["part-1.jsonl"]]
    whole = only(tmp_path / "whole")
    assert not (whole / "checkpoints").exists()

    killed(train(file, "--root", tmp_path / "killed", processes=2), KILL=str(KILLED_AT[kind]), **where)
    broken = only(tmp_path / "killed")
    assert list(broken.glob("checkpoints/**/*orbax-checkpoint-tmp*")), "nothing was half written"
    alone = shutil.copytree(broken, tmp_path / "alone" / broken.name)

    said = together(train(broken, "--resume", processes=2), **where)
    assert said[0].splitlines()[-1] == str(broken)
    assert not [line for line in said[1].splitlines() if not line.startswith(("[Gloo]", "reads"))]
    assert f"goes on from {broken}/checkpoints" in said[0]
    assert set(differences(broken, whole).values()) == {0.0}
    mesh = ["--set", "backbone.mesh={}"] if kind in ("full", "spread") else []
    mesh += ["--set", "encoder.mesh={}"] if kind == "spread" else []
    said = together(train(alone, "--resume", *mesh), **where)
    assert f"goes on from {alone}/checkpoints" in said[0]
    together(train(file, "--root", tmp_path / "one", *mesh), **where)
    for other in (alone, only(tmp_path / "one")):
        found = differences(other, whole)
        print(kind, other.parent.name, found)
        assert max(found.values()) < 5e-3
