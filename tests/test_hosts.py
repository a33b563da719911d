"""Several processes that compute one run: who they are, and that two of them compute what one does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from tables import write

from pluralprefs import hosts

EXPERIMENT = """
from functools import partial
import os
from pluralprefs import encoders
from pluralprefs.data import comparisons
from pluralprefs.experiment import Experiment
from pluralprefs.models.ideal_point import IdealPoint
from pluralprefs.users import Pooled

experiment = Experiment(
    data=partial(comparisons.read, os.environ["DATA"]), encoder=partial(encoders.load, "attributes"),
    model=partial(IdealPoint.init, prototypes=2, hidden=()), epochs=3, batch_size=63, shots=(0, 2), draws=1,
    users=Pooled(gain=False, rounds=1, folds=2, strength=1.0), name="points",
)
"""
ROOT = Path(__file__).parents[1]
# A device each, so that batches of 63 rows are uneven on two.
ENVIRONMENT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def together(commands: list[list[str]], **environment: str) -> list[str]:
    """What several processes at once print; each has to end well."""
    env = os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [subprocess.Popen(command, env=env, cwd=ROOT, **pipes) for command in commands]
    try:
        said = [process.communicate(timeout=900)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * len(running), "\n".join(said)
    return said


@pytest.mark.slow
def test_two_processes_train_and_evaluate_what_one_does_and_one_of_them_writes(tmp_path):
    write(tmp_path / "data.jsonl", users=11)
    (tmp_path / "points.py").write_text(EXPERIMENT)
    main = "from pluralprefs.cli import main; main()"
    train = [sys.executable, "-c", main, "train", str(tmp_path / "points.py"), "--root"]
    both = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process"]
    data = {"DATA": str(tmp_path / "data.jsonl")}
    together([[*train, str(tmp_path / "one")]], **data)
    said = together([[*train, str(tmp_path / "two"), *both, str(number)] for number in range(2)], **data)
    assert said[0].splitlines()[-1].startswith(str(tmp_path / "two"))
    assert not [line for line in said[1].splitlines() if not line.startswith("[Gloo]")]
    [one], [two] = (list((tmp_path / name).iterdir()) for name in ("one", "two"))
    losses = [pl.read_parquet(run / "training.parquet") for run in (one, two)]
    assert losses[0].height > 3
    np.testing.assert_allclose(losses[1]["loss"], losses[0]["loss"], rtol=1e-4)
    keys = ["model", "cell", "control", "shots", "draw", "example_id"]
    found = [pl.read_parquet(run / "predictions.parquet").sort(keys) for run in (one, two)]
    assert found[0].drop("log_odds", "log_odds_std").equals(found[1].drop("log_odds", "log_odds_std"))
    for name in ("log_odds", "log_odds_std"):
        # Sums over halves of a batch round otherwise, and training and Newton pass that on (largest seen: 0.0026).
        np.testing.assert_allclose(found[1][name], found[0][name], rtol=5e-3, atol=5e-3)


@pytest.mark.slow
def test_rows_that_processes_computed_are_gathered_to_the_bit_however_uneven(tmp_path):
    program = """
        import sys
        from pathlib import Path
        import numpy as np
        from pluralprefs import hosts
        from pluralprefs.data.batches import pad_to
        from pluralprefs.types import Comparisons

        hosts.connect(sys.argv[1], 2, int(sys.argv[2]))
        import jax

        whole = np.random.default_rng(0).normal(size=(7, 3))
        for unit in ([0, 0, 1, 2, 4, 6, 8], [1] * 7, np.arange(7)):
            own = hosts.own_units(unit)
            assert (hosts.gathered(whole[own], own, 7) == whole).all()
        ids = np.zeros((2, 7), np.int32)
        rows = Comparisons(ids, ids, ids * 0.5, ids > 0, ids, ids, ids, ids, ids * 0.0, ids + 1.0)
        found = hosts.split_rows(rows)
        assert found.weight.shape == (2, 8)
        assert found.weight.addressable_shards[0].data.shape == (2, 4)
        total = jax.jit(lambda rows: rows.weight.sum(), out_shardings=hosts.all_devices())(found)
        assert float(total) == 14.0
        key = hosts.everywhere(jax.random.key(3))
        draw = jax.jit(jax.random.uniform, out_shardings=hosts.all_devices())(key)
        assert float(draw) == float(jax.random.uniform(jax.random.key(3)))
        own = Path(sys.argv[3]) / sys.argv[2]
        own.mkdir()
        assert hosts.shared(own) == Path(sys.argv[3]) / "0"  # of process 0, on each
        assert hosts.shared(own / "of no process") is None
    """
    command = [sys.executable, "-c", textwrap.dedent(program), f"127.0.0.1:{free_port()}"]
    together([[*command, str(number), str(tmp_path)] for number in range(2)])


def test_one_process_changes_nothing():
    values = np.random.default_rng(0).normal(size=(4, 2))
    assert hosts.writes()
    assert hosts.all_devices() is None
    assert hosts.shared(Path("absent")) == Path("absent")
    assert hosts.gathered(values, hosts.own_units(np.arange(4)), 4) is values
    assert hosts.split_rows(values) is hosts.everywhere(values) is hosts.here(values) is values


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("10.0.0.1:8476", 2, None), "process is missing"),
        ((None, 2, 0), "coordinator is missing"),
        (("10.0.0.1:8476", 2, 2), "process 2 of 2: count processes from 0 to 1"),
        (("10.0.0.1", 2, 0), "give address:port of process 0"),
    ],
)
def test_processes_that_do_not_fit_are_an_error(given, message):
    with pytest.raises(ValueError, match=message):
        hosts.connect(*given)


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, False),  # the batch script itself
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
        ({"MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_a_cluster_is_recognised_by_what_its_scheduler_says(environment, found, monkeypatch):
    asked = []
    monkeypatch.setattr(hosts.jax.distributed, "initialize", lambda *given: asked.append(given))
    for name in ("SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS", "TPU_WORKER_HOSTNAMES", "MEGASCALE_NUM_SLICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    hosts.connect()
    hosts.connect(processes=1)
    assert asked == [()] * found
