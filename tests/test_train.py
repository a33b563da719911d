"""The step, the loop and checkpoints, on a linear family small enough to recompute by hand."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pluralprefs.data import batches
from pluralprefs.likelihoods import Logistic, per_user_mean
from pluralprefs.pytrees import pytree
from pluralprefs.train import (
    CheckpointStore,
    comparison_loss,
    grouped,
    init_state,
    label_by_path,
    make_epoch_step,
    make_train_step,
    train,
)
from pluralprefs.types import Comparisons, Item, Params

ROOT = Path(__file__).parents[1]


@pytree
class Linear:
    weight: jax.Array

    def log_odds(self, user, first, second):
        return jnp.dot(self.weight + user, first.embedding - second.embedding)


@pytree
class Shrunk(Linear):
    def penalty(self, users, batch, key):
        return 0.1 * jnp.sum(self.weight**2) + 0.0 * jnp.sum(users) + 0.01 * jax.random.normal(key)


def gather_user(users, community, user):
    return jnp.where(user < 0, 0.0, users["user"][jnp.maximum(user, 0)])


def penalty(users):
    return 0.5 * jnp.sum(users["user"] ** 2)


def make_params(family=Linear) -> Params:
    return Params(model=family(jnp.zeros(3)), users={"user": jnp.zeros((4, 3))}, likelihood=Logistic())


def make_data(rows=10) -> tuple[Item, Comparisons]:
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 8, (2, rows)).astype(np.int32)
    ids = np.zeros(rows, np.int32)
    comparisons = Comparisons(
        first=pairs[0],
        second=pairs[1],
        target=rng.integers(0, 2, rows).astype(np.float32),
        tie=np.zeros(rows, bool),
        user=rng.integers(-1, 4, rows).astype(np.int32),
        community=ids,
        rater=ids,
        source=ids,
        offset=np.full(rows, 0.1, np.float32),
        weight=np.ones(rows, np.float32),
    )
    return Item(embedding=rng.normal(size=(8, 3)).astype(np.float32)), comparisons


def make_run(family=Shrunk, start=0):
    """A loss with randomness, penalties and a stateful optimiser: (state, jitted step, batches from `start`)."""
    items, rows = make_data()
    optimizer = optax.adam(0.05)
    loss = comparison_loss(gather_user, user_penalty=penalty, rows=10)
    state = init_state(make_params(family), optimizer, jax.random.key(1))
    step = jax.jit(make_train_step(loss, optimizer))
    return state, step, batches.resident(items, rows, seed=3, batch_size=4, start=start)


def assert_same_bits(a, b):
    raw = lambda tree: jax.tree.map(  # noqa: E731
        lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf, tree
    )
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, raw(a), raw(b))


def advance(state, stream, step, steps: int):
    *_, (_, newest, _) = islice(train(state, stream, step), steps)
    return newest


def run_steps(steps: int):
    state, step, stream = make_run()
    return advance(state, stream, step, steps)


def test_a_step_is_compiled_once_even_where_parameters_begin_weakly_typed():
    items, rows = make_data()
    optimizer, loss = optax.adam(0.05), comparison_loss(gather_user)
    params = make_params(Shrunk).replace(model=Shrunk(jnp.full(3, 0.5)))
    assert params.model.weight.weak_type
    step = jax.jit(make_train_step(loss, optimizer))
    advance(
        init_state(params, optimizer, jax.random.key(1)), batches.resident(items, rows, seed=3, batch_size=4), step, 3
    )
    assert step._cache_size() == 1


def test_the_loss_is_the_mean_of_hand_made_nats():
    items, rows = make_data()
    params = make_params()
    params = replace(params, model=Linear(jnp.array([1.0, -0.5, 0.2])), users={"user": jnp.ones((4, 3))})
    loss, metrics = comparison_loss(gather_user)(params, batches.gather(items, rows), jax.random.key(0))
    costs = []
    for first, second, target, user in zip(rows.first, rows.second, rows.target, rows.user, strict=True):
        weight = np.array([1.0, -0.5, 0.2]) + (user >= 0)
        odds = weight @ (items.embedding[first] - items.embedding[second]) + 0.1
        costs.append(np.log1p(np.exp(-odds if target else odds)))
    np.testing.assert_allclose(loss, np.mean(costs), rtol=1e-5)
    assert set(metrics) == {"nats"}


def test_penalties_are_added_per_row():
    items, rows = make_data()
    params = replace(make_params(Shrunk), model=Shrunk(jnp.ones(3)), users={"user": jnp.ones((4, 3))})
    loss_fn = comparison_loss(gather_user, reduction=per_user_mean, user_penalty=penalty, rows=10)
    loss, metrics = loss_fn(params, batches.gather(items, rows), jax.random.key(0))
    np.testing.assert_allclose(metrics["user_penalty"], 0.6, rtol=1e-6)
    np.testing.assert_allclose(metrics["model_penalty"], 0.3 + 0.01 * jax.random.normal(jax.random.key(0)), rtol=1e-5)
    np.testing.assert_allclose(loss, sum(metrics.values()), rtol=1e-6)
    with pytest.raises(ValueError, match="user_penalty needs rows"):
        comparison_loss(gather_user, user_penalty=penalty)


def test_padding_changes_neither_loss_nor_gradient():
    items, rows = make_data()
    loss_fn = jax.value_and_grad(comparison_loss(gather_user), has_aux=True)
    params = replace(make_params(), model=Linear(jnp.ones(3)))
    (loss, _), grads = loss_fn(params, batches.gather(items, rows), jax.random.key(0))
    (padded, _), grads_padded = loss_fn(params, batches.gather(items, batches.pad_to(rows, 17)), jax.random.key(0))
    np.testing.assert_allclose(padded, loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), grads_padded, grads)


def test_training_lowers_the_loss_and_counts_steps():
    state, step, stream = make_run(Linear)
    seen = [(done, float(metrics["nats"])) for done, _, metrics in islice(train(state, stream, step), 60)]
    assert [done for done, _ in seen] == list(range(1, 61))
    assert np.mean([nats for _, nats in seen[-6:]]) < 0.8 * np.mean([nats for _, nats in seen[:6]])


def test_the_randomness_of_a_step_is_its_key_folded_with_its_number():
    state, step, stream = make_run(Shrunk)
    for batch in islice(stream, 3):
        key = jax.random.fold_in(jax.random.key(1), int(state.step))
        wanted = 0.1 * jnp.sum(state.params.model.weight**2) + 0.01 * jax.random.normal(key)
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["model_penalty"], wanted, rtol=1e-5)


def test_an_epoch_scan_equals_the_loop_over_its_batches():
    state, step, stream = make_run()
    items, rows = make_data()
    scanned, losses = state, []
    for number in range(2):
        epoch = (items, batches.epoch(3, number, rows, 4))
        scanned, metrics = jax.jit(make_epoch_step(step))(scanned, epoch)
        losses.extend(metrics["loss"].tolist())
    reports = list(islice(train(state, stream, step), 6))
    looped, ended = [float(metrics["loss"]) for _, _, metrics in reports], reports[-1][1]
    np.testing.assert_allclose(losses, looped, rtol=1e-5)
    np.testing.assert_allclose(scanned.params.users["user"], ended.params.users["user"], rtol=1e-5, atol=1e-7)
    assert int(scanned.step) == int(ended.step) == 6


def test_seeds_may_be_an_axis_of_vmap():
    _, step, _ = make_run()
    items, rows = make_data()
    optimizer = optax.adam(0.05)
    start = jax.vmap(lambda key: init_state(make_params(Shrunk), optimizer, key))
    states = start(jax.random.split(jax.random.key(1), 2))
    ends, metrics = jax.vmap(make_epoch_step(step), in_axes=(0, None))(states, (items, batches.epoch(3, 0, rows, 4)))
    assert metrics["loss"].shape == (2, 3)
    assert ends.params.model.weight.shape == (2, 3)


def test_a_loss_that_is_not_finite_stops_the_loop_and_names_the_step():
    state, step, stream = make_run(Linear)
    good = list(islice(stream, 5))
    broken = replace(good[3], target=good[3].target.at[0].set(jnp.nan))
    seen = []
    with pytest.raises(FloatingPointError, match="the loss of step 3 is nan"):
        seen.extend(done for done, _, _ in train(state, [*good[:3], broken, good[4]], step))
    assert seen == [1, 2, 3]
    rows = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[*good[:3], broken])
    scan = lambda state, epoch: jax.lax.scan(step, state, epoch)  # noqa: E731
    with pytest.raises(FloatingPointError, match="the loss of step 3 is nan"):
        list(train(state, [rows], scan))


def test_groups_of_parameters_learn_at_their_own_rate_or_not_at_all():
    params = replace(make_params(), likelihood=Logistic.init(temperature=True))
    rules = [("^users/", "fast"), ("^model/weight$", "slow"), ("^likelihood/", "frozen")]
    optimizer = grouped({"fast": optax.sgd(1.0), "slow": optax.sgd(0.1)}, rules)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(ones, optimizer.init(params), params)
    np.testing.assert_allclose(updates.users["user"], -1.0)
    np.testing.assert_allclose(updates.model.weight, -0.1)
    np.testing.assert_allclose(updates.likelihood.log_temperature, 0.0)


def test_a_parameter_without_label_and_a_rule_without_parameter_are_errors():
    with pytest.raises(ValueError, match="'users/user' has no label"):
        label_by_path([("^model/", "slow")])(make_params())
    with pytest.raises(ValueError, match="no parameter fits '\\^modell/'; there are: model/weight, users/user"):
        label_by_path([("^modell/", "slow")], default="fast")(make_params())


def test_a_run_resumed_from_a_checkpoint_repeats_the_bits_of_one_never_stopped(tmp_path):
    state, step, stream = make_run()
    store = CheckpointStore(tmp_path / "params", keep=2)
    assert store.latest() is None
    assert store.notes() == {}
    for done, newest, _ in islice(train(state, stream, step), 5):
        if done > 1:
            store.save(done, newest, {"done": done})
    store.close()
    fresh = CheckpointStore(tmp_path / "params", keep=2)
    like = jax.eval_shape(lambda: make_run()[0])
    assert fresh.notes() == {"done": 5}
    resumed = fresh.restore(like)
    assert_same_bits(resumed, newest)
    _, step, stream = make_run(start=int(resumed.step))
    assert_same_bits(advance(resumed, stream, step, 4), run_steps(9))
    assert int(fresh.restore(like, step=4).step) == 4
    with pytest.raises(FileNotFoundError, match="no complete checkpoint 3"):
        fresh.restore(like, step=3)  # keep=2 has removed it
    with pytest.raises(ValueError, match="already holds step 5"):
        fresh.save(5, resumed)
    fresh.close()


def test_a_state_of_another_shape_is_refused_by_name(tmp_path):
    store = CheckpointStore(tmp_path)
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        store.restore(make_params())
    store.save(1, make_params())
    with pytest.raises(ValueError, match=r"leaf 'users/user' is .*4, 3.* the state has .*5, 3"):
        store.restore(replace(make_params(), users={"user": jnp.zeros((5, 3))}))
    with pytest.raises(ValueError, match="leaf 'likelihood/log_temperature' is absent"):
        store.restore(replace(make_params(), likelihood=Logistic.init(temperature=True)))
    store.close()


def test_empty_tables_and_low_precision_survive_a_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path)
    state = {"community": jnp.zeros((0, 3)), "half": jnp.arange(3, dtype=jnp.bfloat16), "none": None, "unit": ()}
    store.save(0, state)
    assert_same_bits(store.restore(jax.eval_shape(lambda: state)), state)
    store.close()


CHILD = """
import os, signal, sys, threading
from itertools import islice
from test_train import CheckpointStore, make_run, train

folder = sys.argv[1]
state, step, stream = make_run()
store = CheckpointStore(folder)

def kill_in_mid_save():
    while not any("tmp" in name for name in os.listdir(folder)):
        pass
    os.kill(os.getpid(), signal.SIGKILL)

for done, state, _ in islice(train(state, stream, step), 6):
    if done == 4:
        threading.Thread(target=kill_in_mid_save, daemon=True).start()
    if done % 2 == 0:
        store.save(done, state)
"""


def test_a_process_killed_in_mid_save_resumes_from_the_step_before(tmp_path):
    folder = tmp_path / "params"
    folder.mkdir()
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    child = subprocess.run([sys.executable, "-c", CHILD, str(folder)], env=environment, timeout=120, check=False)
    assert child.returncode == -signal.SIGKILL
    assert any("tmp" in path.name for path in folder.iterdir())
    store = CheckpointStore(folder)
    assert store.latest() == 2
    resumed = store.restore(make_run()[0])
    _, step, stream = make_run(start=2)
    newest = advance(resumed, stream, step, 2)
    store.save(4, newest)
    assert store.latest() == 4
    assert_same_bits(newest, run_steps(4))
    store.close()
