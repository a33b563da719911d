"""Prompts with shots, and what a language model says of a response behind one."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import rows
from record_decoders import FIXTURES, example_tokens, save_tokenizer

from pluralprefs.encoders.cache import Shards
from pluralprefs.encoders.decoder_weights import read_decoder
from pluralprefs.encoders.in_context import (
    Prompter,
    Shot,
    Wording,
    completions,
    decoder_log_probability,
    encode_pairs,
    padded,
    reference_log_probabilities,
)
from pluralprefs.encoders.tokens import Renderer
from pluralprefs.encoders.weights import EncoderError
from pluralprefs.likelihoods import IPO, Logistic
from pluralprefs.models.implicit import ImplicitReward
from pluralprefs.types import Item, Tokens

SHORT = Wording(
    opening="", shot="{question} a {preferred} b {dispreferred} \n ", tie="{question} c {preferred} {dispreferred} \n ",
    description="d {description} ", task="e ", question="{question} ?", describe="f",
)  # fmt: skip
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} {{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %} assistant :{% endif %}"
)
SHOTS = [Shot("tea", "a", "b"), Shot("coffee", "c", "d"), Shot("tea", "e", "f")]


def prompter(folder, *, max_length=64, chat=True) -> Prompter:
    save_tokenizer(folder, **({"chat_template": TEMPLATE} if chat else {}))
    return Prompter(Renderer.load(folder, max_length=max_length, segments=1, joined=True), SHORT)


def words(writes: Prompter, rendered) -> str:
    return " ".join(writes.renderer.tokenizer.convert_ids_to_tokens(rendered.ids)).replace("\n", "|")


def test_a_prompt_shows_the_preferred_response_first_then_the_task_and_the_question(tmp_path):
    writes = prompter(tmp_path)
    found = writes.responses([*SHOTS[:1], SHOTS[1]._replace(tie=True)], "coffee", ["good", "g"], "h")
    prompt = "<s> user : tea a a b b | coffee c c d | d h e coffee ? </s> assistant :"
    assert [words(writes, each) for each in found] == [f"{prompt} good </s>", f"{prompt} g </s>"]
    assert {each.prompt_end for each in found} == {len(prompt.split()) - 1}
    assert words(writes, writes.description(SHOTS[:1], "h")) == "<s> user : tea a a b b | f </s> assistant : h </s>"
    assert words(writes, writes.responses([], "tea", [])[0]) == "<s> user : e tea ? </s> assistant :"
    assert SHOTS[0].reversed == Shot("tea", "b", "a")
    english = Prompter(writes.renderer).answer(SHOTS, [{"role": "user", "content": "Tea {or}?"}], "brief")
    assert english.index("Preferred: a") < english.index("Dispreferred: b") < english.index("likes: brief")
    assert english.index("likes: brief") < english.index("Answer the following") < english.index("Tea {or}?")


@pytest.mark.parametrize("room", [12, 17, 18, 23, 24, 29, 30, 33])
def test_over_budget_the_oldest_shots_go_and_the_question_stays(room, tmp_path):
    """A pair is read with as many shots as its longer response leaves room for; a shot is six tokens."""
    writes = prompter(tmp_path, max_length=room)
    found = [words(writes, each) for each in writes.responses(SHOTS, "coffee", ["good", "good good"])]
    kept = min(3, (room - 12) // 6)
    shown = "".join(f"{shot.question} a {shot.preferred} b {shot.dispreferred} | " for shot in SHOTS[3 - kept :])
    assert found[0] == f"<s> user : {shown}e coffee ? </s> assistant : good </s>"
    assert found[1] == f"<s> user : {shown}e coffee ? </s> assistant : good good </s>"


def test_a_question_that_does_not_fit_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(EncoderError, match="takes 11 tokens, max_length is 10: raise it, or leave the row out"):
        prompter(tmp_path, max_length=10).responses(SHOTS, "coffee", ["good", "g"])


def test_without_a_template_the_line_break_is_the_prompts(tmp_path):
    writes = prompter(tmp_path, chat=False)
    [found] = writes.responses(SHOTS[:1], "coffee", ["good tea"])
    assert words(writes, found) == "<s> tea a a b b | e coffee ? | good tea"
    tokens = padded([found], max_length=64)
    assert np.asarray(tokens.ids)[np.asarray(completions(tokens))].tolist() == found.ids[-2:]


@pytest.fixture(scope="module")
def decoder():
    loaded = read_decoder(FIXTURES / "llama", head=True)
    return loaded.graphdef, loaded.params


def example(side: str, end: list[int]) -> Tokens:
    """The recorded rows, whose prompts end at their n-th token."""
    arrays = example_tokens(side)
    start = np.argmax(arrays["mask"], axis=1)
    ids, mask = arrays["ids"], arrays["mask"]
    return Tokens(ids, mask, np.zeros_like(ids), (start + end).astype(np.int32))


@pytest.mark.parametrize("columns", [4, 64])
def test_a_log_probability_is_the_sum_over_completion_tokens_by_transformers(columns, decoder):
    graphdef, params = decoder
    logits = np.load(FIXTURES / "llama.npz")["logits"].astype(float)
    arrays, end = example_tokens("right"), [3, 0, 2, 0, 8]
    nats = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    expected = [
        sum(nats[row, at - 1, arrays["ids"][row, at]] for at in range(end[row] + 1, arrays["mask"][row].sum()))
        for row in range(5)
    ]
    assert expected[4] == 0  # a row whose last token is the prompt's
    log_probability = jax.jit(decoder_log_probability(graphdef, columns=columns))
    for side in ("left", "right"):
        np.testing.assert_allclose(log_probability(params, example(side, end)), expected, atol=2e-4)


def test_prompt_tokens_and_padding_contribute_nothing_but_their_context(decoder):
    graphdef, params = decoder
    log_probability = decoder_log_probability(graphdef, columns=4)
    end = [11, 2, 6, 1, 8]  # every prompt ends with its row
    value, slope = jax.jit(jax.value_and_grad(lambda p: log_probability(p, example("left", end)).sum()))(params)
    assert float(value) == 0.0
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(slope)) == 0.0


def pairs(count: int = 4):
    """Rows of tokens: the recorded rows against each other, behind prompts of two tokens."""
    tokens = jax.tree.map(jnp.asarray, example("left", [1] * 5))
    first, second = (jax.tree.map(lambda x: x[np.array(index)], tokens) for index in ([0, 1, 2, 4], [4, 2, 0, 0]))  # noqa: B023
    return rows(first, second, np.array([1.0, 0.0, 1.0, 0.0])[:count])


def test_a_policy_that_is_its_reference_is_indifferent_and_swapping_flips_h(decoder):
    graphdef, params = decoder
    log_probability = decoder_log_probability(graphdef)
    batch = pairs()
    [reference] = reference_log_probabilities(log_probability, params, [batch])
    encode = jax.jit(lambda p, rows, known: encode_pairs(log_probability, p, rows, known))
    family, ipo = ImplicitReward(beta=0.25), IPO(beta=0.25)
    score = jax.vmap(lambda row: family.log_odds((), row.first, row.second))
    same = encode(params, batch, reference)
    np.testing.assert_array_equal(score(same), 0.0)
    np.testing.assert_array_equal(jax.vmap(ipo)(score(same), same), (1 / (2 * 0.25)) ** 2)
    moved = jax.tree.map(lambda x: 1.1 * x, params)
    found = encode(moved, batch, reference)
    h = np.asarray(found.first.log_ratio - found.second.log_ratio)
    assert np.abs(h).min() > 0.01
    np.testing.assert_allclose(score(found), 0.25 * h, rtol=1e-6)
    swapped = batch.replace(first=batch.second, second=batch.first)
    np.testing.assert_array_equal(score(encode(moved, swapped, reference[::-1])), -score(found))
    toward = np.where(np.asarray(batch.target) > 0.5, h, -h)  # the published form, from the preferred response's side
    np.testing.assert_allclose(jax.vmap(ipo)(score(found), found), (toward - 1 / (2 * 0.25)) ** 2, rtol=1e-4)
    smooth = jax.vmap(Logistic.init(label_smoothing=0.2))(score(found), found)
    expected = 0.9 * np.logaddexp(0, -0.25 * toward) + 0.1 * np.logaddexp(0, 0.25 * toward)
    np.testing.assert_allclose(smooth, expected, rtol=1e-5)


def test_references_are_kept_by_model_and_window_and_read_again(decoder, tmp_path):
    graphdef, params = decoder
    log_probability = decoder_log_probability(graphdef)
    asked = partial(reference_log_probabilities, log_probability, folder=tmp_path)
    plain = reference_log_probabilities(log_probability, params, [pairs(), pairs()])
    kept = asked(params, [pairs(), pairs()])
    np.testing.assert_array_equal(kept, plain)
    [own] = tmp_path.iterdir()
    [file] = own.glob("*.safetensors")
    shards = Shards(own, 2)
    [(keys, said)] = shards.read()
    assert len(keys) == 4  # windows, each once
    file.unlink()
    shards.write(keys[1:], said[1:] - 100)  # what is read can be told from what is computed, and one is missing
    again = asked(params, [pairs().replace(first=padded_by(pairs().first, 3), second=padded_by(pairs().second, 3))])
    np.testing.assert_allclose(again[0], plain[0], atol=1e-4)  # a batch with something new is computed whole
    read = asked(params, [pairs()])
    assert (np.sort(read[0].T - plain[0].T, axis=0)[:, 0] < -99).sum() == 3
    other = asked(jax.tree.map(lambda x: 1.1 * x, params), [pairs()])
    assert np.abs(other[0] - plain[0]).max() > 0.01
    half = decoder_log_probability(graphdef, columns=4)  # another program with the same parameters
    reference_log_probabilities(half, params, [pairs()], folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    file.parent.joinpath("broken.safetensors").write_bytes(b"cut")
    with pytest.warns(UserWarning, match="damaged"):
        asked(params, [pairs()])


def test_windows_are_told_apart_by_both_responses_and_where_their_prompts_end(decoder, tmp_path):
    graphdef, params = decoder
    asked = partial(reference_log_probabilities, decoder_log_probability(graphdef), params, folder=tmp_path)
    one = pairs()
    swapped = one.replace(second=jax.tree.map(lambda x: x[::-1], one.second))
    later = one.replace(first=one.first.replace(prompt_end=one.first.prompt_end + 1))
    for batch in (one, swapped, later):
        plain = reference_log_probabilities(decoder_log_probability(graphdef), params, [batch])
        np.testing.assert_array_equal(asked([batch]), plain)


def padded_by(tokens, more: int):
    """The same windows with more padding on the left."""
    wide = {name: np.pad(np.asarray(getattr(tokens, name)), ((0, 0), (more, 0))) for name in ("ids", "mask", "segment")}
    return tokens.replace(**wide, prompt_end=np.asarray(tokens.prompt_end) + more)


def test_an_implicit_reward_needs_a_ratio_and_a_positive_beta():
    with pytest.raises(ValueError, match="reads Item"):
        ImplicitReward.init(beta=0.1).reward((), Item(jnp.zeros(0)))
    with pytest.raises(ValueError, match="beta > 0"):
        ImplicitReward(beta=0.0)
