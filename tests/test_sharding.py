"""Placement by name, and that placement never changes a result."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from record_decoders import FIXTURES
from test_train import assert_same_bits

from pluralprefs.backbone import RULES as BACKBONE_RULES
from pluralprefs.encoders.decoder_weights import read_decoder
from pluralprefs.likelihoods import Logistic
from pluralprefs.pytrees import pytree
from pluralprefs.sharding import batch_sharding, make_mesh, replicated, shard_rules, sharded_init
from pluralprefs.train import CheckpointStore, comparison_loss, init_state, make_train_step
from pluralprefs.types import Comparisons, Item, Params

needs_eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices; tests/conftest.py asks for them")
RULES = ((r"model/weight$", P("tensor")), (r"(^|/)users/user$", P(("data", "fsdp"))))


@pytree
class Linear:
    weight: jax.Array

    def log_odds(self, user, first, second):
        return jnp.dot(self.weight + user, first.embedding - second.embedding)


def gather_user(users, community, user):
    return jnp.where(user < 0, 0.0, users["user"][jnp.maximum(user, 0)])


def make_params(key, users=16, dim=4) -> Params:
    weight, table = jax.random.normal(key, (dim,)), jax.random.normal(jax.random.fold_in(key, 1), (users, dim))
    return Params(model=Linear(weight), users={"user": table}, likelihood=Logistic.init(temperature=True))


def make_batch(rows=16, dim=4) -> Comparisons[Item]:
    rng = np.random.default_rng(0)
    item = lambda: Item(embedding=rng.normal(size=(rows, dim)).astype(np.float32))  # noqa: E731
    ids = np.zeros(rows, np.int32)
    return Comparisons(
        first=item(),
        second=item(),
        target=rng.integers(0, 2, rows).astype(np.float32),
        tie=np.zeros(rows, bool),
        user=rng.integers(-1, 16, rows).astype(np.int32),
        community=ids,
        rater=ids,
        source=ids,
        offset=np.zeros(rows, np.float32),
        weight=np.ones(rows, np.float32),
    )


@needs_eight
def test_a_sharded_train_step_equals_the_step_of_one_device():
    optimizer = optax.adam(0.1)
    make = lambda key: init_state(make_params(key), optimizer, key)  # noqa: E731
    step = jax.jit(make_train_step(comparison_loss(gather_user), optimizer))
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    alone, sharded = make(jax.random.key(0)), sharded_init(make, mesh, RULES, jax.random.key(0))
    batch = jax.device_put(make_batch(), batch_sharding(mesh))
    for _ in range(3):
        alone, metrics = step(alone, make_batch())
        sharded, metrics_sharded = step(sharded, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), metrics, metrics_sharded)
    for a, b in zip(jax.tree.leaves(alone.params), jax.tree.leaves(sharded.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@needs_eight
def test_every_leaf_is_born_in_its_place_with_its_optimiser_moments():
    optimizer = optax.adam(0.1)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    state = sharded_init(lambda key: init_state(make_params(key), optimizer, key), mesh, RULES, jax.random.key(0))
    assert state.params.users["user"].sharding.spec == P(("data", "fsdp"))
    assert state.opt_state[0].mu.users["user"].sharding.spec == P(("data", "fsdp"))
    assert state.params.model.weight.sharding.spec == P("tensor")
    assert state.params.likelihood.log_temperature.sharding.is_fully_replicated
    assert {shard.data.shape for shard in state.params.users["user"].addressable_shards} == {(4, 4)}


def filled(shapes, seed, mesh):
    """A state with numbers of its own in every leaf, placed by the rules of an encoder that is trained."""
    draw = np.random.default_rng(seed)

    def fill(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(seed)
        return draw.uniform(1, 1000, leaf.shape).astype(leaf.dtype)

    return jax.device_put(jax.tree.map(fill, shapes), shard_rules(shapes, mesh, BACKBONE_RULES))


@needs_eight
def test_a_state_saved_on_one_mesh_is_read_into_its_places_on_another(tmp_path):
    params = make_params(jax.random.key(0)).replace(encoder=read_decoder(FIXTURES / "llama", head=True).params)
    params.users["community"] = jnp.zeros((0, 4))
    shapes = jax.eval_shape(lambda key: init_state(params, optax.adam(0.1), key), jax.random.key(0))
    saved, like = filled(shapes, 1, make_mesh(data=2, fsdp=4)), filled(shapes, 2, make_mesh(data=1, fsdp=2, tensor=2))
    store = CheckpointStore(tmp_path)
    store.save(1, saved)
    found = store.restore(like)
    store.close()
    assert_same_bits(found, saved)
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == jax.tree.map(lambda leaf: leaf.sharding, like)
    kernel = lambda params: params.encoder["layers"][1]["query"]["kernel"]  # noqa: E731
    for state, parts, rows in ((saved, (4, 32), 2), (found, (8, 16), 8)):
        for params in (state.params, state.opt_state[0].mu):
            assert {shard.data.shape for shard in kernel(params).addressable_shards} == {parts}
            assert {shard.data.shape for shard in params.users["user"].addressable_shards} == {(rows, 4)}


@needs_eight
def test_a_user_table_that_the_mesh_does_not_divide_is_copied():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    places = shard_rules({"users": {"user": jnp.zeros((15, 4)), "community": jnp.zeros((8, 4))}}, mesh)
    assert places["users"]["user"].is_fully_replicated
    assert places["users"]["community"].spec == P(("data", "fsdp"))


@needs_eight
def test_the_first_rule_found_counts_and_the_rest_is_replicated():
    mesh = make_mesh(data=4, fsdp=2)
    rules = ((r"head/weight", P("data")), (r"weight", P(None, "fsdp")))
    tree = {"head": {"weight": jnp.zeros((8, 8)), "bias": jnp.zeros(8)}, "body": {"weight": jnp.zeros((3, 8))}}
    places = shard_rules(tree, mesh, rules)
    assert places["head"]["weight"].spec == P("data", None) or places["head"]["weight"].spec == P("data")
    assert places["body"]["weight"].spec == P(None, "fsdp")
    assert places["head"]["bias"].spec == P()
    assert shard_rules({"weight": jnp.zeros(8)}, mesh, rules)["weight"] == replicated(mesh)


@needs_eight
def test_a_mesh_takes_the_devices_that_are_left():
    assert dict(make_mesh(fsdp=2).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert make_mesh(data=1, devices=jax.devices()[:3]).size == 1


def test_a_mesh_that_does_not_fit_and_an_unknown_axis_are_errors():
    with pytest.raises(ValueError, match="does not fit"):
        make_mesh(data=jax.device_count() + 1)
    with pytest.raises(ValueError, match="'model'; the mesh has data, fsdp, tensor"):
        shard_rules({"a": jnp.zeros(2)}, make_mesh(data=1), ((r"a", P("model")),))
