"""Generation: the tokens of transformers, step by step what the whole sequence gives, and the law of drawn tokens."""

from __future__ import annotations

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from record_decoders import FIXTURES, example_tokens, greedy, save_tokenizer, tiny_decoder

from pluralprefs.encoders.attention import Places, locate
from pluralprefs.encoders.causal import CausalEncoder
from pluralprefs.encoders.decoder_weights import read_decoder
from pluralprefs.encoders.generate import choose, generate, nucleus
from pluralprefs.types import Tokens

END = (2,)


def prompts(side: str = "left") -> Tokens:
    arrays = example_tokens(side)
    ids, mask = jnp.asarray(arrays["ids"]), jnp.asarray(arrays["mask"])
    return Tokens(ids, mask, jnp.zeros_like(ids), jnp.zeros(len(ids), jnp.int32))


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_greedy_continuations_are_those_of_transformers_on_either_side_of_padding(kind):
    expected = np.load(FIXTURES / f"{kind}.npz")["greedy"]
    loaded = read_decoder(FIXTURES / kind, head=True)
    for side in ("left", "right"):
        found = generate(loaded, prompts(side), new=expected.shape[1], end=END)
        np.testing.assert_array_equal(found.ids, expected)
        np.testing.assert_array_equal(found.mask, np.cumsum(expected == 2, 1) - (expected == 2) == 0)
    tokens = prompts()
    alone = tokens.replace(mask=tokens.mask.at[1].set(False))
    for end in ((2,), (int(expected[1, 0]),)):  # a row of padding only: as if it were not there
        found, whole = (generate(loaded, given, new=expected.shape[1], end=end) for given in (alone, tokens))
        assert not found.mask[1].any()
        for name in ("ids", "mask"):
            one, other = (np.delete(getattr(each, name), 1, axis=0) for each in (found, whole))
            np.testing.assert_array_equal(one, other)
    last = int(expected[0, 2])
    ended = generate(loaded, prompts(), new=expected.shape[1], end=(last,))
    stops = [list(row).index(last) + 1 if last in row else len(row) for row in expected]
    assert min(stops) <= 3
    assert np.asarray(ended.mask).sum(1).tolist() == stops
    np.testing.assert_array_equal(ended.ids, np.where(ended.mask, expected, 0))


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(os.environ.get("TORCH") != "1", reason="needs PyTorch: make test TORCH=1")
@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3", "gemma2", "opt"])
def test_greedy_continuations_equal_transformers_now(kind, tmp_path):
    model = tiny_decoder(kind, seed=9)
    model.save_pretrained(tmp_path)
    found = generate(read_decoder(tmp_path, head=True), prompts(), new=10, end=END)
    np.testing.assert_array_equal(found.ids, greedy(model, example_tokens("left")))


def test_token_by_token_equals_the_whole_sequence():
    loaded, tokens = read_decoder(FIXTURES / "gemma3_text", head=True), prompts("right")
    expected = np.load(FIXTURES / "gemma3_text.npz")["hidden"]

    @jax.jit
    def states(params):
        model = nnx.merge(loaded.graphdef, params)
        columns = (tokens.ids, *locate(tokens.mask, tokens.segment), tokens.mask)

        def step(memory, column):
            ids, *places, mask = (each[:, None] for each in column)
            hidden, memory = model.extend(ids, Places(*places), mask, memory)
            return memory, hidden[:, 0]

        memory = model.remember(len(tokens.ids), 15)
        return jax.lax.scan(step, memory, [each.T for each in columns])[1].swapaxes(0, 1)

    real = np.asarray(tokens.mask)[:, :, None]
    np.testing.assert_allclose(states(loaded.params) * real, expected, atol=1e-4)


def test_a_nucleus_holds_the_fewest_tokens_that_reach_its_mass():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3], [0.97, 0.01, 0.01, 0.01]]))
    for top_p, kept in [(0.3, [[1], [0]]), (0.65, [[1, 3], [0]]), (0.75, [[1, 2, 3], [0]]), (1.0, [[0, 1, 2, 3]] * 2)]:
        found = np.isfinite(nucleus(logits, jnp.float32(top_p)))
        assert [np.flatnonzero(row).tolist() for row in found] == kept


def test_drawn_tokens_follow_the_tempered_softmax_within_the_nucleus():
    logits = jnp.array([0.0, 1.0, 3.0, 2.0, -1.0])
    drawn = jax.jit(choose)(jnp.tile(logits, (4000, 1)), (jnp.float32(1.5), jnp.float32(0.8)), jax.random.key(3))
    expected = np.asarray(jax.nn.softmax(nucleus(logits / 1.5, jnp.float32(0.8))))
    share = np.bincount(drawn, minlength=5) / 4000
    assert (share[expected == 0] == 0).all()
    assert (expected == 0).sum() == 2
    assert np.abs(share - expected).max() < 4 * np.sqrt(0.25 / 4000)


def test_an_encoder_draws_by_its_key_and_a_nucleus_of_one_token_is_greedy(tmp_path):
    shutil.copytree(FIXTURES / "llama", tmp_path / "llama")
    save_tokenizer(tmp_path / "llama")
    loaded = CausalEncoder.load(tmp_path / "llama", max_length=32, head=True)
    expected = np.load(FIXTURES / "llama.npz")["greedy"]
    options = {"new": 10, "end": END, "key": jax.random.key(0)}
    np.testing.assert_array_equal(generate(loaded, prompts(), temperature=2.0, top_p=1e-6, **options).ids, expected)
    drawn = [
        generate(loaded, prompts(), temperature=2.0, **options | {"key": jax.random.key(k)}).ids for k in (0, 0, 1)
    ]
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] != drawn[2]).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"new": 0}, "need new >= 1"),
        ({"new": 2, "top_p": 0.0}, "0 < top_p"),
        ({"new": 2, "temperature": 1.0}, "needs a key"),
    ],
)
def test_settings_out_of_range_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        generate(read_decoder(FIXTURES / "llama", head=True), prompts(), **settings)


def test_a_decoder_without_its_head_generates_nothing():
    with pytest.raises(ValueError, match="load it with head=True"):
        generate(read_decoder(FIXTURES / "llama"), prompts(), new=1)


def test_no_token_is_made_beyond_the_learned_positions():
    with pytest.raises(ValueError, match="new=53 exceed the model's 64 learned positions"):
        generate(read_decoder(FIXTURES / "opt", head=True), prompts(), new=53)
