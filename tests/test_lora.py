"""LoRA: nothing changes at first, merged weights compute the same, adapters stack, and what is refused."""

from __future__ import annotations

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from record_decoders import FIXTURES, example_tokens, save_tokenizer

from pluralprefs import encoders
from pluralprefs.backbone import RULES
from pluralprefs.encoders.lora import FACTORS, Lora, attach, join, merge, split
from pluralprefs.encoders.text import TextEncoder
from pluralprefs.encoders.weights import EncoderError
from pluralprefs.sharding import batch_sharding, leaf_name, make_mesh, shard_rules
from pluralprefs.types import Tokens

embed = jax.jit(lambda encoder, tokens: encoder(tokens).embedding)
LORA = Lora(rank=3, alpha=6.0)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> TextEncoder:
    """A tiny Llama."""
    path = tmp_path_factory.mktemp("lora") / "llama"
    shutil.copytree(FIXTURES / "llama", path)
    save_tokenizer(path)
    return encoders.load(path, max_length=16)


def tokens() -> Tokens:
    found = example_tokens()
    ids, mask = jnp.asarray(found["ids"]), jnp.asarray(found["mask"])
    return Tokens(ids, mask, jnp.zeros_like(ids), jnp.zeros(len(ids), jnp.int32))


def parts(adapted: TextEncoder):
    """Adapters, and what they stand on."""
    return split(adapted.params, lambda name: name.endswith(("dot_general/down", "dot_general/up")))


def learned(adapted: TextEncoder, seed: int = 1):
    """Adapters as training might leave them: no factor is zero."""
    leaves, structure = jax.tree.flatten(parts(adapted)[0])
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return structure.unflatten([x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def test_fresh_adapters_change_nothing_and_learned_ones_do(encoder):
    adapted = attach(encoder, LORA, jax.random.key(0))
    adapters, rest = parts(adapted)
    shapes = {leaf_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(adapters)}
    assert len(shapes) == 8
    assert all(re.search(FACTORS, name) for name in shapes)
    assert shapes["layers/1/value/dot_general/down"] == (16, 3)
    assert shapes["layers/1/value/dot_general/up"] == (3, 16)
    np.testing.assert_array_equal(embed(adapted, tokens()), embed(encoder, tokens()))
    moved = adapted.replace(params=join(learned(adapted), rest))
    assert np.abs(embed(moved, tokens()) - embed(encoder, tokens())).max() > 0.1
    again = attach(encoder, LORA, jax.random.key(0))
    assert again.graphdef == adapted.graphdef  # a second load compiles nothing anew
    np.testing.assert_array_equal(again.params["layers"][0]["query"]["dot_general"]["down"],
                                  adapted.params["layers"][0]["query"]["dot_general"]["down"])  # fmt: skip


def test_merged_weights_are_those_of_the_formula_and_give_equal_outputs(encoder):
    adapted = attach(encoder, LORA, jax.random.key(0))
    adapters, rest = learned(adapted), parts(adapted)[1]
    moved = adapted.replace(params=join(adapters, rest))
    merged = merge(moved)
    assert merged.graphdef == encoder.graphdef
    assert jax.tree.structure(merged.params) == jax.tree.structure(encoder.params)
    own = adapters["layers"][1]["query"]["dot_general"]
    plain = encoder.params["layers"][1]["query"]["kernel"]
    wanted = np.asarray(plain, np.float64) + 6.0 / 3 * np.asarray(own["down"], np.float64) @ np.asarray(own["up"])
    np.testing.assert_allclose(merged.params["layers"][1]["query"]["kernel"], wanted, atol=1e-5)
    np.testing.assert_array_equal(
        merged.params["layers"][1]["up"]["kernel"], encoder.params["layers"][1]["up"]["kernel"]
    )
    np.testing.assert_allclose(embed(merged, tokens()), embed(moved, tokens()), atol=1e-5)


def test_adapters_of_several_users_stack_and_map(encoder):
    adapted = attach(encoder, LORA, jax.random.key(0))
    rest = parts(adapted)[1]
    users = [learned(adapted, seed) for seed in (1, 2, 3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *users)
    together = jax.jit(jax.vmap(lambda one: adapted.replace(params=join(one, rest))(tokens()).embedding))(stacked)
    alone = [embed(adapted.replace(params=join(one, rest)), tokens()) for one in users]
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 0.1


def test_adapters_stay_float32_on_bfloat16_weights_and_so_do_gradients(encoder):
    adapted = attach(encoder, LORA, jax.random.key(0))
    adapters, rest = learned(adapted), parts(adapted)[1]
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), rest)

    def loss(adapters):
        return jnp.sum(adapted.replace(params=join(adapters, half))(tokens()).embedding ** 2)

    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(jax.grad(loss), adapters))} == {jnp.dtype("float32")}
    exact = embed(adapted.replace(params=join(adapters, rest)), tokens())
    rounded = embed(adapted.replace(params=join(adapters, half)), tokens())
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, exact, atol=0.1 * np.abs(exact).max())


needs_eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices; tests/conftest.py asks for them")


@needs_eight
def test_factors_and_their_moments_lie_as_their_kernels_do(encoder):
    adapted = attach(encoder, Lora(rank=4, targets="/kernel$"), jax.random.key(0))
    adapters, _ = parts(adapted)
    tree = {"params": {"encoder": adapted.params}, "opt_state": optax.adam(0.1).init({"encoder": adapters})}
    places = shard_rules(tree, make_mesh(data=2, fsdp=2, tensor=2), RULES)
    found = {leaf_name(path): place.spec for path, place in jax.tree_util.tree_leaves_with_path(places)}
    kernels = [name for name in found if name.endswith("/kernel") and name.startswith("params")]
    assert len(kernels) == 14
    assert {tuple(found[name]) for name in kernels} == {("fsdp", "tensor"), ("tensor", "fsdp")}
    for kernel in kernels:
        stem = kernel.removesuffix("/kernel") + "/dot_general"
        inputs, outputs = found[kernel]
        for of in (stem, *(stem.replace("params", f"opt_state/0/{moment}") for moment in ("mu", "nu"))):
            assert found[f"{of}/down"] == PartitionSpec(inputs)
            assert found[f"{of}/up"] == PartitionSpec(None, outputs)


@needs_eight
@pytest.mark.slow
def test_sharded_adapters_have_the_gradients_of_those_on_one_device(encoder):
    adapted = attach(encoder, Lora(rank=4, targets="/kernel$"), jax.random.key(0))
    adapters, rest = learned(adapted), parts(adapted)[1]
    batch = jax.tree.map(lambda leaf: jnp.concatenate([leaf[:4]] * 2), tokens())

    def loss(adapters, rest, batch):
        return jnp.sum(adapted.replace(params=join(adapters, rest))(batch).embedding ** 2)

    step = jax.jit(jax.value_and_grad(loss))
    wanted, gradient = step(adapters, rest, batch)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    sharded = jax.device_put((adapters, rest), shard_rules((adapters, rest), mesh, RULES))
    found, other = step(*sharded, jax.device_put(batch, batch_sharding(mesh)))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    for own, leaf in zip(jax.tree.leaves(other), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(own, leaf, atol=1e-5 * np.abs(leaf).max())


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (Lora(targets="quary"), "'quary' fit no parameter; there are: layers/0/attention_norm/scale"),
        (Lora(targets="norm"), "'norm' fit layers/0/attention_norm/scale, which is no kernel of a linear layer"),
        (Lora(targets="query"), "'query' fit layers/0/query/bias, which is no kernel"),
        (Lora(targets="words/embedding"), "fit words/embedding, which is no kernel"),
    ],
)
def test_what_is_no_target_is_refused(lora, message, encoder):
    with pytest.raises(EncoderError, match=message) as error:
        attach(encoder, lora, jax.random.key(0))
    assert "\n" not in str(error.value)


def test_a_rank_of_zero_is_refused():
    with pytest.raises(EncoderError, match="LoRA of rank 0: give a rank of at least 1"):
        Lora(rank=0)
