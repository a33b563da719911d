"""Windows of one user, the two stages, and predictions for users who are read from prompts."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
import pytest
from record_decoders import FIXTURES, save_tokenizer
from test_in_context import SHORT, TEMPLATE

from pluralprefs.contrasts import controls
from pluralprefs.data import comparisons, splits
from pluralprefs.data.support import support_draws
from pluralprefs.encoders.decoder_weights import read_decoder
from pluralprefs.encoders.in_context import Prompter, decoder_log_probability
from pluralprefs.encoders.tokens import Renderer
from pluralprefs.fspo import Stage, fit_fspo, preference_loss, require_masters, supervised_loss
from pluralprefs.likelihoods import IPO, Logistic
from pluralprefs.metrics import PREDICTIONS
from pluralprefs.models.implicit import ImplicitReward
from pluralprefs.prompted import Policy, best_answers, predictions, writer
from pluralprefs.train import init_state, make_train_step
from pluralprefs.types import Params
from pluralprefs.windows import Asked, Corpus, Drawn

USERS, EACH, TOPICS = 14, 9, 12
LETTERS = "abcdefgh"
WORDS = ["<unk>", "<s>", "</s>", "\n", *LETTERS, "user", "assistant", ":", "?", *(f"t{n}" for n in range(TOPICS)),
         *(f"u{n}" for n in range(USERS))]  # fmt: skip
DRAWN = Drawn(epochs=1, batch_size=8, shots=2, queries=1)


def table(**columns) -> pl.DataFrame:
    """Users who judge "g" or "h" of topics; even users prefer "g". Their name is in the question."""
    draw = np.random.default_rng(3)
    made = []
    for user in range(USERS):
        for topic in draw.choice(TOPICS, EACH, replace=False):
            sides = ["g", "h"] if draw.random() < 0.5 else ["h", "g"]
            wanted = float((sides[0] == "g") == (user % 2 == 0))
            made.append({"prompt": f"u{user}", "first": f"{sides[0]} t{topic}", "second": f"{sides[1]} t{topic}",
                         "target": wanted, "user_id": f"u{user}"} | columns)  # fmt: skip
    return splits.split(comparisons.check(pl.DataFrame(made)).table, unseen_prompts=0.0, unseen_users=30)


@pytest.fixture(scope="module")
def prompter(tmp_path_factory) -> Prompter:
    """Two shots fit 32 tokens."""
    folder = tmp_path_factory.mktemp("words")
    save_tokenizer(folder, WORDS, chat_template=TEMPLATE)
    return Prompter(Renderer.load(folder, max_length=32, segments=1, joined=True), SHORT)


@pytest.fixture(scope="module")
def corpus(prompter) -> Corpus:
    return Corpus(table(), prompter)


@pytest.fixture(scope="module")
def decoder():
    loaded = read_decoder(FIXTURES / "llama", head=True)  # it knows 48 tokens, more than WORDS
    return loaded


def said(prompter: Prompter, tokens, row: int) -> str:
    ids, mask = np.asarray(tokens.ids)[row], np.asarray(tokens.mask)[row]
    return " ".join(prompter.renderer.tokenizer.convert_ids_to_tokens(ids[mask].tolist()))


def test_a_window_is_one_users_never_shows_what_it_asks_and_shows_any_number_of_shots(prompter, corpus):
    training = {name for name, cell in corpus.table.select("user_id", "cell").rows() if cell == "train"}
    unseen = {name for name, cell in corpus.table.select("user_id", "cell").rows() if (cell or "").startswith("unseen")}
    assert training
    assert not training & unseen
    numbers = []
    for batch in corpus.stream(corpus.training(), 0, DRAWN):
        for row in np.flatnonzero(np.asarray(batch.rows.weight) > 0).tolist():
            first, second = said(prompter, batch.rows.first, row), said(prompter, batch.rows.second, row)
            assert first.rpartition("assistant")[0] == second.rpartition("assistant")[0]
            *before, letter, topic, _ = first.split()
            assert {letter, second.split()[-3]} == {"g", "h"}
            topics, users = ([word for word in before if word[0] == kind and word[1:].isdigit()] for kind in "tu")
            assert len(set(users)) == 1
            assert users[0] in training
            assert topic not in topics
            numbers.append(len(users) - 1)
            liked = "g" if int(users[0][1:]) % 2 == 0 else "h"
            assert first.count(f"a {liked} t") == numbers[-1]  # every shot shows the preferred response first
            assert float(batch.rows.target[row]) == (letter == liked)
    assert set(numbers) == {0, 1, 2}


def test_windows_are_a_function_of_the_seed(corpus):
    one, same, other = (list(corpus.stream(corpus.training(), seed, DRAWN)) for seed in (1, 1, 2))
    assert all(jax.tree.all(jax.tree.map(np.array_equal, a, b)) for a, b in zip(one, same, strict=True))
    assert not np.array_equal(one[0].rows.first.ids, other[0].rows.first.ids)


def params_of(decoder, beta: float = 0.5) -> Params:
    return Params({"backbone": decoder.params, "family": ImplicitReward(beta)}, (), IPO(beta))


def test_stage_one_reads_preferred_responses_alone(corpus, decoder):
    batch = next(corpus.stream(corpus.training(), 0, DRAWN))
    loss = jax.jit(supervised_loss(decoder_log_probability(decoder.graphdef)))
    preferred = np.asarray(batch.rows.target) > 0.5
    assert 0 < preferred.sum() < 8

    def other_side(side, mine):
        """The side with tokens of the rows in which it was preferred (not) exchanged."""
        ids = np.where((preferred == mine)[:, None] & np.asarray(side.mask), (side.ids + 5) % len(WORDS), side.ids)
        return side.replace(ids=ids)

    rows, key = batch.rows, jax.random.key(0)
    value = float(loss(params_of(decoder), batch, key)[0])
    spoilt = rows.replace(first=other_side(rows.first, False), second=other_side(rows.second, True))
    assert float(loss(params_of(decoder), batch.replace(rows=spoilt), key)[0]) == value
    touched = rows.replace(first=other_side(rows.first, True))
    assert float(loss(params_of(decoder), batch.replace(rows=touched), key)[0]) != value
    ties = rows.replace(tie=np.ones(8, bool))
    assert float(loss(params_of(decoder), batch.replace(rows=ties), key)[0]) == 0.0


def test_small_updates_reach_float32_masters_and_narrower_ones_are_refused(corpus, decoder):
    batch = next(corpus.stream(corpus.training(), 0, DRAWN)).replace(reference=jnp.zeros((2, 8)))
    optimizer = optax.adamw(1e-6)
    step = jax.jit(make_train_step(preference_loss(decoder_log_probability(decoder.graphdef)), optimizer))
    before = params_of(decoder)
    after, _ = step(init_state(before, optimizer, jax.random.key(0)), batch)
    for name, old in jax.tree_util.tree_leaves_with_path(before):
        new = after.params
        for part in name:
            new = getattr(new, part.name) if hasattr(part, "name") else new[part.key]
        if "words" not in str(name) and not str(name).endswith("['key']['bias']"):  # a key's bias moves no attention
            assert (np.asarray(new) != np.asarray(old)).mean() > 0.5, name
            assert (np.asarray(new, jnp.bfloat16) == np.asarray(old, jnp.bfloat16)).mean() > 0.9, name
    require_masters(decoder.params)
    with pytest.raises(ValueError, match="is bfloat16: small updates would round to zero"):
        require_masters(jax.tree.map(lambda x: x.astype(jnp.bfloat16), decoder.params))


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", [IPO(0.5), Logistic.init(label_smoothing=0.1)], ids=["ipo", "dpo"])
def test_both_stages_train_and_the_second_starts_at_its_reference(likelihood, prompter, decoder):
    corpus = Corpus(table(), prompter, {f"u{n}": LETTERS[n % 2] for n in range(USERS)})
    log_probability, steps = decoder_log_probability(decoder.graphdef), []
    stage = Stage(optax.adamw(1e-2), DRAWN)
    policy = fit_fspo(
        log_probability, decoder.params, corpus, supervised=stage, preference=stage, family=ImplicitReward(0.5),
        likelihood=likelihood, report=lambda name, done, metrics: steps.append((name, done, dict(metrics))),
    )  # fmt: skip
    supervised, preference = ([m for name, _, m in steps if name == stage] for stage in ("supervised", "preference"))
    assert supervised[-1]["nats"] < supervised[0]["nats"]
    assert supervised[-1]["description"] < 0.7 * supervised[0]["description"]
    start = 1.0 if isinstance(likelihood, IPO) else np.log(2)
    assert preference[0]["nats"] == pytest.approx(start, abs=1e-4)  # (1 / (2 beta))^2; log 2
    assert preference[-1]["nats"] != pytest.approx(start, abs=1e-3)
    assert all(metrics["loss"] == pytest.approx(metrics["nats"] + metrics["description"]) for metrics in preference)
    assert (policy.temperatures == ((0, 1.0),)) == isinstance(likelihood, Logistic)
    apart = [np.abs(np.asarray(a) - np.asarray(b)).max() for one, other in
             ((decoder.params, policy.reference), (policy.reference, policy.params))
             for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)]  # fmt: skip
    assert min(apart) > 0
    trained = type(decoder)(decoder.config, decoder.graphdef, policy.params)
    shots = corpus.shots(jax.tree.map(lambda x: x[:2], corpus.training()))
    answers = best_answers(policy, trained, shots[:1], "t1", count=3, new=3, key=jax.random.key(1))
    rewards = [reward for _, reward in answers]
    assert rewards == sorted(rewards, reverse=True)
    assert sum(rewards) == pytest.approx(0.0, abs=1e-4)
    written = writer(trained, prompter, new=3, temperature=1.0, key=jax.random.key(1))([shots[:1], [], shots])
    assert len(written) == 3


def test_what_cannot_be_trained_is_an_error(prompter, corpus, decoder):
    stage = Stage(optax.adamw(1e-2), DRAWN)
    options = {"supervised": stage, "preference": stage, "family": ImplicitReward(0.5)}
    log_probability = decoder_log_probability(decoder.graphdef)
    with pytest.raises(ValueError, match=r"IPO has beta 0\.1, the family 0\.5"):
        fit_fspo(log_probability, decoder.params, corpus, likelihood=IPO(0.1), **options)
    alone = Corpus(table(user_id="one"), prompter)
    with pytest.raises(ValueError, match="too few training users"):
        fit_fspo(log_probability, decoder.params, alone, likelihood=IPO(0.5), **options)
    with pytest.raises(ValueError, match="no description of user 'u"):
        Corpus(table(), prompter, {})
    batch = next(corpus.stream(corpus.training(), 0, DRAWN))
    with pytest.raises(ValueError, match="1 <= queries <= batch_size"):
        replace(DRAWN, queries=9)
    with pytest.raises(ValueError, match="no reference log-probabilities"):
        preference_loss(log_probability)(params_of(decoder), batch, jax.random.key(0))


def counting(params, tokens):
    """A language model that is sure of what it has seen preferred: params x (times after "a" - times after "b")."""
    ids, mask = jnp.asarray(tokens.ids), jnp.asarray(tokens.mask)
    word = jnp.take_along_axis(ids, jnp.asarray(tokens.prompt_end)[:, None] + 1, axis=1)
    after = [((ids[:, :-1] == WORDS.index(sign)) & (ids[:, 1:] == word) & mask[:, :-1]).sum(1) for sign in "ab"]
    return params * (after[0] - after[1]).astype(jnp.float32)


def test_predictions_follow_the_shots_and_their_controls_reverse_or_exchange_them(prompter):
    prompter = replace(prompter, renderer=replace(prompter.renderer, max_length=64))
    corpus = Corpus(table(), prompter)
    policy = Policy(counting, jnp.float32(1.0), jnp.float32(0.0), prompter, ImplicitReward(0.5), ((0, 1.0), (4, 3.0)))
    draws = support_draws(corpus.table, shots=(0, 1, 4), draws=3)
    found = predictions(policy, corpus, draws, model="m", shots=(0, 1, 4), batch_size=16)
    assert found.columns == list(PREDICTIONS)
    plain = found.filter(pl.col("control").is_null())
    asked = corpus.table.filter(pl.col("cell") == "unseen/testpair")
    assert plain.group_by("shots").len().sort("shots")["len"].to_list() == [len(asked) * n for n in (1, 3, 3)]
    sign = np.where(plain["target"] > 0.5, 1.0, -1.0)
    # l = scale beta h with a scale of 1, 1.5 and 3; a shot adds 1 to the log-probability of the letter it prefers and
    # takes 1 from the other.
    shown = plain["shots"].to_numpy()
    np.testing.assert_allclose(plain["log_odds"], sign * (1 + 0.5 * shown) * shown, atol=1e-5)
    np.testing.assert_array_equal(controls(found).filter(pl.col("metric") == "flip_rate")["value"], 1.0)
    wrong = found.filter(pl.col("control") == "wrong_user")
    kinds = {user: int(user[1:]) % 2 for user in wrong["user_id"].unique()}
    order = sorted(kinds)
    other = {user: order[(at + 1) % len(order)] for at, user in enumerate(order)}
    same = np.array([kinds[user] == kinds[other[user]] for user in wrong["user_id"]])
    assert same.any()
    assert (~same).any()
    right = np.sign(wrong["log_odds"]) == np.where(wrong["target"] > 0.5, 1, -1)
    np.testing.assert_array_equal(right, same)


def test_a_stranger_may_be_described_from_the_same_shots(prompter, corpus):
    seen = []

    def describe(shots):
        seen.extend(shots)
        return ["g" if each and each[0].preferred[0] == "g" else "h" for each in shots]

    def told(params, tokens):
        ids = jnp.asarray(tokens.ids)
        word = jnp.take_along_axis(ids, jnp.asarray(tokens.prompt_end)[:, None] + 1, axis=1)
        return params * ((ids[:, :-1] == WORDS.index("d")) & (ids[:, 1:] == word)).sum(1).astype(jnp.float32)

    policy = Policy(told, jnp.float32(1.0), jnp.float32(0.0), prompter, ImplicitReward(0.5))
    draws = support_draws(corpus.table, shots=(2,), draws=1)
    found = predictions(policy, corpus, draws, model="m", shots=(2,), controls=False, describe=describe)
    assert {len(each) for each in seen} == {2}
    np.testing.assert_array_equal(found["log_odds"] > 0, found["target"] > 0.5)


def test_log_odds_are_alike_in_any_batch(prompter, corpus, decoder):
    policy = Policy(
        decoder_log_probability(decoder.graphdef), jax.tree.map(lambda x: 1.1 * x, decoder.params), decoder.params,
        prompter, ImplicitReward(0.5),
    )  # fmt: skip
    shots = corpus.shots(jax.tree.map(lambda x: x[:3], corpus.training()))
    asked = [Asked(shots[:n], f"t{n}", "g", "h h") for n in (0, 1, 2, 2, 1)]
    many, few = policy.log_odds(asked, batch_size=8), policy.log_odds(asked, batch_size=3)
    assert np.abs(many).min() > 1e-3
    np.testing.assert_allclose(many, few, atol=1e-4)


@pytest.mark.slow
def test_a_tiny_decoder_learns_to_read_users_from_nothing():
    experiment = runpy.run_path(str(Path(__file__).parents[1] / "experiments" / "fspo.py"))
    found, _ = experiment["simulated"](0, 400, 24)
    right = found.with_columns(right=(pl.col("log_odds") > 0) == (pl.col("target") > 0.5))
    plain = right.filter(pl.col("control").is_null(), pl.col("model") == "fspo")
    accuracy = dict(plain.group_by("shots").agg(pl.col("right").mean()).rows())
    assert accuracy[8] > 0.85
    assert 0.65 < accuracy[2] < accuracy[8]
    assert abs(accuracy[0] - 0.5) < 0.1
    rate = controls(found.filter(pl.col("model") == "fspo")).filter(pl.col("metric") == "flip_rate")["value"][0]
    assert rate > 0.8
