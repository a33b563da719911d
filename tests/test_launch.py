"""A run that is stopped anywhere and resumed is the run that was never stopped."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
import pytest
from tables import write

from pluralprefs import encoders, seeds, training
from pluralprefs.data import comparisons
from pluralprefs.data.files import DataError
from pluralprefs.experiment import Experiment, prepare
from pluralprefs.launch import resume, run
from pluralprefs.likelihoods import Logistic, pooled_mean
from pluralprefs.models.bradley_terry import BradleyTerry
from pluralprefs.models.low_rank import LowRank
from pluralprefs.pytrees import pytree
from pluralprefs.registry.files import RegistryError
from pluralprefs.run import load
from pluralprefs.seeds import fit_seed
from pluralprefs.train import leaf_name
from pluralprefs.types import Comparisons, Item
from pluralprefs.users import Pooled


def experiment(data: Path, **parts) -> Experiment:
    settings = {
        "model": partial(LowRank.init, rank=1), "epochs": 4, "batch_size": 64, "seeds": (0, 1),
        "users": Pooled(gain=False, rounds=1, folds=2, strength=1.0), "shots": (0, 2), "draws": 1, "controls": False,
        "save_users": True,
    } | parts  # fmt: skip
    return Experiment(
        data=partial(comparisons.read, str(data)), encoder=partial(encoders.load, "attributes"), **settings
    )


def arrays(run):
    leaves = jax.tree_util.tree_leaves_with_path((run.model, run.users))
    return {leaf_name(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The data, and a run on them that nothing stopped."""
    folder = tmp_path_factory.mktemp("launch")
    data = write(folder / "data.jsonl", users=10)
    return data, run(experiment(data), root=folder / "runs", progress=False)


def test_an_exponent_that_is_the_only_one_is_used(whole):
    """It was 1 in the second fit, to training and validation rows, of families that are trained."""
    asked = experiment(whole[0], epochs=1, users=Pooled(gain=False, rounds=1, cross_fit=None, temper=(0.25,)))
    fitted = fit_seed(asked, prepare(asked, progress=False), 0)
    assert fitted.notes["temper"] == 0.25
    np.testing.assert_array_equal(fitted.rows.weight, 0.25)


def test_the_exponent_of_the_population_is_used_by_families_that_are_trained(whole, monkeypatch):
    """They trained on, and left to the communities, a likelihood of power 1 whatever was asked."""
    weights, original = [], seeds.gradient_bases
    monkeypatch.setattr(
        seeds, "gradient_bases", lambda models, items, rows, *rest, **options: weights.append(rows.weight)
        or original(models, items, rows, *rest, **options)
    )  # fmt: skip
    pooled = Pooled(gain=False, rounds=1, cross_fit=None, temper=(0.5,), population_temper=(0.25,))
    asked = experiment(whole[0], epochs=1, users=pooled)
    prepared = prepare(asked, progress=False)
    fitted = fit_seed(asked, prepared, 0)
    assert fitted.notes["population_temper"] == 0.25
    for weight in weights:
        np.testing.assert_array_equal(weight, 0.25)
    np.testing.assert_array_equal(fitted.rows.weight, 0.5)
    several = replace(asked, users=replace(pooled, population_temper=(1.0, 0.25)))
    with pytest.raises(ValueError, match=r"population_temper \(1.0, 0.25\): LowRank is trained by gradient"):
        fit_seed(several, prepared, 0)
    with pytest.raises(ValueError, match=r"users.temper \(0.0,\): give one exponent or more, each above 0"):
        Pooled(temper=(0.0,))


def test_a_fit_knows_its_seed_and_refuses_the_users_of_another(whole, tmp_path):
    one, other = (load(whole[1].folder.path, seed=seed) for seed in (0, 1))
    assert (one.seed, other.seed) == (0, 1)
    one.save_users(tmp_path / "u.safetensors", {"ana": one.prior()})
    with pytest.raises(DataError, match=r"another fit of .*: give the same --seed and --communities"):
        other.load_users(tmp_path / "u.safetensors")


@pytest.mark.parametrize("epochs_before", [pytest.param(5, marks=pytest.mark.slow), 12])
def test_a_resumed_run_is_equal_to_one_never_stopped(whole, tmp_path, monkeypatch, epochs_before):
    data, expected = whole
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    count = [0]
    original = training.Training._epoch

    def stop_after(self, *arguments):
        count[0] += 1
        if count[0] > epochs_before:
            raise KeyboardInterrupt
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "_epoch", stop_after)
        with pytest.raises(KeyboardInterrupt):
            run(experiment(data), root=tmp_path, progress=False)
    [folder] = tmp_path.iterdir()
    with monkeypatch.context() as patch:
        count[0] = -(10**9)
        patch.setattr(training.Training, "_epoch", stop_after)
        found = resume(folder, progress=False)
        trained_again = count[0] + 10**9
    for seed in (0, 1):
        ours, theirs = arrays(load(found.folder.path, seed=seed)), arrays(load(expected.folder.path, seed=seed))
        assert set(ours) == set(theirs)
        for name, value in ours.items():
            np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    assert found.folder.table("predictions").equals(expected.folder.table("predictions"))
    same = pl.exclude("time")
    assert found.folder.table("metrics").select(same).equals(expected.folder.table("metrics").select(same))
    assert found.folder.status == "done"
    assert not (Path(folder) / "checkpoints").exists()
    assert trained_again + epochs_before == whole_epochs(expected), "finished epochs were trained again"


def ramped(batch, key, step, *, steps):
    return batch.replace(target=batch.target * (step + 1) / steps)


@pytest.mark.slow
def test_bases_of_seeds_under_one_vmap_are_those_of_each():
    """Of different lengths, initial values and orders; the transform of each knows its own number of steps."""
    rng = np.random.default_rng(0)
    items = Item(embedding=jnp.asarray(rng.normal(size=(8, 3)), jnp.float32))
    target, nobody, none = rng.integers(0, 2, 40).astype(np.float32), np.full(40, -1), np.zeros(40, np.float32)
    columns: dict[str, Any] = {
        "first": rng.integers(0, 8, 40), "second": rng.integers(0, 8, 40), "target": target,
        "tie": np.zeros(40, bool), "user": nobody, "community": nobody, "rater": nobody, "source": nobody,
        "offset": none, "weight": none + 1,
    }  # fmt: skip
    rows = Comparisons(**columns)
    models = [LowRank.init(dim=3, rank=2, key=jax.random.key(seed)) for seed in (0, 1)]
    fit = partial(
        training.gradient_bases, items=items, rows=rows, pooled=Pooled(), users=0, likelihood=Logistic(),
        reduction=pooled_mean, optimizer=optax.adam(0.05), batch_size=16, transform=ramped,
    )  # fmt: skip
    half = np.arange(40) < 20
    notes = [{}, {}]
    together = fit(models, seeds=(0, 1), epochs=(2, 3), validation=rows, notes=notes)
    for place, epochs in ((1, 3), (0, 2)):
        own: list[Any] = [{}]
        [alone] = fit(models[place : place + 1], seeds=(place,), epochs=(epochs,), validation=rows, notes=own)
        for mask in (half, None):
            ours, theirs = (jax.tree.leaves(base(mask)) for base in (together[place], alone))
            for x, y in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
        assert notes[place]["epochs"] == own[0]["epochs"]


@pytest.mark.slow
def test_seeds_of_one_program_are_those_of_their_own(whole, tmp_path, monkeypatch):
    data, apart = whole
    whole_run = run(experiment(data), root=tmp_path / "whole", progress=False, vmap=True)
    assert whole_run.folder.read()["vmap"] is True
    assert apart.folder.read()["vmap"] is False
    steps = apart.folder.table("training").join(
        whole_run.folder.table("training"), on=["seed", "training", "epoch"], how="full"
    )
    np.testing.assert_allclose(steps["loss"], steps["loss_right"], rtol=1e-3)
    for seed in (0, 1):
        ours, theirs = load(whole_run.folder.path, seed=seed), load(apart.folder.path, seed=seed)
        assert ours.notes["epochs"] == theirs.notes["epochs"]
        ours, theirs = arrays(ours), arrays(theirs)
        for name, value in ours.items():
            np.testing.assert_allclose(value, theirs[name], rtol=0.02, atol=2e-3, err_msg=name)
    # Stopped in the first training on all rows, and resumed: bit for bit the run that was not.
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    count, original = [0], training.Training._epoch

    def stop_after(self, *arguments):
        count[0] += 1
        if count[0] > 5:
            raise KeyboardInterrupt
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "_epoch", stop_after)
        with pytest.raises(KeyboardInterrupt):
            run(experiment(data), root=tmp_path / "stopped", progress=False, vmap=True)
    [folder] = (tmp_path / "stopped").iterdir()
    found = resume(folder, progress=False)
    assert found.folder.table("predictions").equals(whole_run.folder.table("predictions"))


def test_a_seed_that_has_had_its_epochs_stays_as_it_is():
    """Seeds of one program may stop at different epochs; without validation rows the last parameters are the best."""
    step = lambda state, _: (state.replace(params=state.params + 1.0), {"loss": np.ones((2, 3))})  # noqa: E731
    told = {0: [], 1: []}
    reports = tuple(lambda done, epochs, loss, seed=seed: told[seed].append((done, epochs)) for seed in told)
    nothing: Any = None
    states: Any = [Counted(np.float32(0)), Counted(np.float32(10))]

    def trained(nats) -> list[Any]:
        return training.Training(step, nothing, lambda number, rows: None, nats, (2, 5), reports)(states, nothing, None)

    assert [float(best.params) for best in trained(None)] == [2.0, 15.0]
    assert told == {0: [(1, 2), (2, 2)], 1: [(done, 5) for done in (1, 2, 3, 4, 5)]}
    chosen = trained(lambda params: min(abs(float(params) - 3), abs(float(params) - 13)))
    assert [(float(best.params), best.epochs) for best in chosen] == [(2.0, 2), (13.0, 3)]


@pytree
class Counted:
    """Stands for a training state: parameters that are the number of epochs."""

    params: Any


def whole_epochs(run):
    """Epochs of a run of `experiment` from its notes: per seed a training on training rows that chooses how many, then
    those on all rows, on two folds and on two halves of the users."""
    return sum(4 + 5 * load(run.folder.path, seed=seed).notes["epochs"] for seed in (0, 1))


def test_the_loss_of_every_epoch_is_kept(whole):
    _, expected = whole
    losses = expected.folder.table("training")
    assert losses.height == whole_epochs(expected)
    assert losses["loss"].is_finite().all()
    assert losses["training"].unique().sort().to_list() == [1, 2, 3, 4, 5, 6], (
        "one to choose, all, two folds, two halves"
    )
    epochs = losses.group_by("seed", "training", maintain_order=True).agg("epoch")["epoch"].to_list()
    assert all(part == list(range(1, len(part) + 1)) for part in epochs)


def test_a_run_that_is_done_is_returned_as_it_is(whole):
    _, expected = whole
    before = (Path(expected.folder.path) / "run.json").read_bytes()
    told = []
    assert resume(expected.folder.path, progress=False, tell=told.append).fingerprint == expected.fingerprint
    assert (Path(expected.folder.path) / "run.json").read_bytes() == before
    assert "nothing to resume" in told[0]


@pytest.mark.slow
def test_pairs_across_a_split_by_item_belong_to_no_cell(tmp_path):
    data = write(tmp_path / "data.jsonl", users=10)
    found = run(experiment(data, split={"by": "item"}, epochs=1, seeds=(0,)), root=tmp_path / "runs", progress=False)
    rows = found.folder.table("predictions")
    assert rows["cell"].null_count() == 0
    kept = rows.filter(pl.col("model") == "length only", pl.col("cell") == "seen/testpair")
    assert 0 < kept.height < rows.height


def test_changed_data_are_not_mixed_with_what_was_fitted(tmp_path, monkeypatch):
    data = write(tmp_path / "data.jsonl")
    linear = {"model": partial(BradleyTerry.init, item_effects=False), "seeds": (0,)}
    with monkeypatch.context() as patch:
        patch.setattr("pluralprefs.launch.fit_seed", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(experiment(data, **linear), root=tmp_path / "runs", progress=False)
    [folder] = (tmp_path / "runs").iterdir()
    with pytest.raises(RegistryError, match="--resume"):
        load(folder)
    write(data, seed=1)
    with pytest.raises(DataError, match="have changed"):
        resume(folder, progress=False)
    write(data)
    assert resume(folder, progress=False).folder.status == "done"
