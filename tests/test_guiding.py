"""Reward-guided decoding: what whole sequences say of every candidate, two users of one prompt, rows by themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_run import copied
from flax import nnx
from record_decoders import FIXTURES
from test_choosing import NoReward
from test_generate import END, prompts

from pluralprefs.encoders.causal import CausalEncoder
from pluralprefs.encoders.generate import _generate, generate
from pluralprefs.encoders.guiding import reward_guide
from pluralprefs.models.low_rank import LowRank
from pluralprefs.types import Tokens

NEW, KEPT = 4, 5
ANA = jnp.array([1.0, 2.0])
FAMILY = LowRank.init(key=jax.random.key(3), dim=16, rank=2)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = copied("llama", tmp_path_factory.mktemp("decoder") / "llama")
    return CausalEncoder.load(folder, max_length=32, head=True, joint=True)


def texts(answers=()):
    """The example's prompts without their padding, each with its answer behind it, padded on the right."""
    tokens = prompts()
    rows = [np.asarray(ids)[np.asarray(mask)] for ids, mask in zip(tokens.ids, tokens.mask, strict=True)]
    ids, mask = np.zeros((5, 16), np.int32), np.zeros((5, 16), bool)
    for row, (asked, answer) in enumerate(zip(rows, answers or [[]] * 5, strict=True)):
        ids[row, : len(asked) + len(answer)] = [*asked, *answer]
        mask[row, : len(asked) + len(answer)] = True
    return Tokens(ids, mask, np.zeros_like(ids), np.zeros(5, np.int32))


@jax.jit
def read(encoder, tokens):
    """Hidden states of last tokens and the logits behind them, without any memory of keys and values."""
    hidden = encoder(tokens).embedding
    return hidden, nnx.merge(encoder.graphdef, encoder.params).logits(hidden)


def by_hand(encoder, reward, weight, end=END):
    """Guided answers, every candidate of every row read as a whole; `reward(embedding, prompt)` is of NumPy arrays."""
    prompt = np.asarray(read(encoder, texts())[0])
    answers, done = [[] for _ in range(5)], np.zeros(5, bool)
    for _ in range(NEW):
        logits = np.asarray(read(encoder, texts(answers))[1])
        logits = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        likeliest = np.argsort(-logits, axis=1, kind="stable")[:, :KEPT]
        tried = [
            np.asarray(read(encoder, texts([[*a, ids[k]] for a, ids in zip(answers, likeliest, strict=True)]))[0])
            for k in range(KEPT)
        ]
        for row in np.flatnonzero(~done):
            scores = [logits[row, likeliest[row, k]] + weight * reward(tried[k][row], prompt[row]) for k in range(KEPT)]
            answers[row].append(int(likeliest[row, np.argmax(scores)]))
            done[row] = answers[row][-1] in end
    return answers


def given(found):
    return [list(map(int, ids[mask])) for ids, mask in zip(np.asarray(found.ids), np.asarray(found.mask), strict=True)]


def linear(user):
    [layer] = jax.tree.map(np.asarray, FAMILY.basis)
    return lambda embedding, _: (embedding @ layer["kernel"] + layer["bias"]) @ np.asarray(user)


@pytest.mark.parametrize("weight", [0.0, 0.7, 1e5])
def test_every_token_has_the_best_score_of_whole_sequences_on_either_side_of_padding(encoder, weight):
    guide = reward_guide(encoder, FAMILY, ANA, weight=weight, candidates=KEPT)
    expected = by_hand(encoder, linear(ANA), weight)
    for side in ("left", "right"):
        found = generate(encoder, prompts(side), new=NEW, end=END, guide=guide)
        assert given(found) == expected
        greedy = np.load(FIXTURES / "llama.npz")["greedy"][:, :NEW]
        assert np.array_equal(found.ids, greedy) == (weight == 0)
    ended = expected[0][1]
    found = generate(encoder, prompts(), new=NEW, end=(ended,), guide=guide)
    assert given(found) == by_hand(encoder, linear(ANA), weight, (ended,))
    assert len(given(found)[0]) <= 2


class Likeness:
    """A reward that reads the prompt too."""

    def reward(self, user, item):
        return jnp.sum(user * item.embedding * item.prompt)


jax.tree_util.register_static(Likeness)


def test_a_reward_reads_the_prompt_and_length_one_where_the_encoder_does(encoder):
    user = np.arange(16, dtype=np.float32) - 8
    guide = reward_guide(encoder.replace(prompt=True, normalise=True), Likeness(), user, weight=9.0, candidates=KEPT)

    def reward(embedding, prompt):
        return user @ (embedding * prompt) / np.linalg.norm(embedding) / np.linalg.norm(prompt)

    expected = by_hand(encoder, reward, 9.0)
    assert expected != by_hand(encoder, reward, 0.0)
    assert given(generate(encoder, prompts(), new=NEW, end=END, guide=guide)) == expected


def test_one_prompt_goes_on_as_each_of_two_users_likes(encoder):
    answers = {}
    for sign in (1, -1):
        guide = reward_guide(encoder, FAMILY, sign * ANA, weight=20.0, candidates=KEPT)
        answers[sign] = given(generate(encoder, prompts(), new=NEW, end=END, guide=guide))
    assert all(one != other for one, other in zip(answers[1], answers[-1], strict=True))
    ours, theirs = (linear(ANA)(np.asarray(read(encoder, texts(answers[sign]))[0]), None) for sign in (1, -1))
    assert (ours > theirs).all()  # and so the other user, whose rewards are the opposite, has more of their own


def test_rows_do_not_see_each_other_and_another_user_costs_no_compilation(encoder):
    guide = reward_guide(encoder, FAMILY, ANA, weight=2.0, candidates=KEPT)
    tokens, options = prompts(), {"new": NEW, "end": END, "guide": guide}
    together = given(generate(encoder, tokens, **options))
    alone = [given(generate(encoder, jax.tree.map(lambda x, r=r: x[r : r + 1], tokens), **options)) for r in range(5)]
    assert [row for [row] in alone] == together
    nothing = given(generate(encoder, tokens.replace(mask=tokens.mask.at[1].set(False)), **options))
    assert nothing == [[] if row == 1 else answer for row, answer in enumerate(together)]
    compiled = _generate._cache_size()
    generate(encoder, tokens, new=NEW, end=END, guide=reward_guide(encoder, FAMILY, -ANA, weight=1, candidates=KEPT))
    assert _generate._cache_size() == compiled


def test_drawn_tokens_follow_the_softmax_of_scores_over_the_candidates(encoder):
    tokens = jax.tree.map(lambda x: jnp.repeat(x[:1], 4000, axis=0), prompts())
    guide = reward_guide(encoder, FAMILY, ANA, weight=0.7, candidates=KEPT)
    found = generate(encoder, tokens, new=1, temperature=2.0, key=jax.random.key(1), guide=guide)
    share = np.bincount(np.asarray(found.ids)[:, 0], minlength=48) / 4000
    logits = np.asarray(read(encoder, texts())[1])[0]
    kept = np.argsort(-logits)[:KEPT]
    states = [np.asarray(read(encoder, texts([[k], [], [], [], []]))[0])[0] for k in kept]
    reward = [linear(ANA)(state, None) for state in states]
    expected = np.zeros(48)
    expected[kept] = np.asarray(jax.nn.softmax((logits[kept] + 0.7 * np.array(reward)) / 2.0))
    assert (share[expected == 0] == 0).all()
    assert np.abs(share - expected).max() < 4 * np.sqrt(0.25 / 4000)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        (FAMILY, {"candidates": 0}, "need candidates >= 1"),
        (FAMILY, {"weight": float("nan")}, "a finite weight"),
        (FAMILY, {"weight": float("inf")}, "a finite weight"),
        (NoReward(FAMILY), {}, "NoReward has log-odds of pairs and no reward of a text: .* take the best"),
    ],
)
def test_what_cannot_guide_is_an_error(encoder, family, settings, message):
    with pytest.raises(ValueError, match=message):
        reward_guide(encoder, family, ANA, **{"weight": 1.0, **settings})


@pytest.mark.parametrize("changes", [{"joint": False}, {"pooling": "mean"}])
def test_an_encoder_of_something_else_is_an_error(encoder, changes):
    with pytest.raises(ValueError, match="load it with pooling='last', joint=True"):
        reward_guide(encoder.replace(**changes), FAMILY, ANA, weight=1.0)
