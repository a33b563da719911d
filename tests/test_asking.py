"""What is asked: gains against exact answers, questions that differ, and what was judged is not asked again."""

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from families import FAMILIES, items, pick, rows
from handmade import handmade
from tables import write

from pluralprefs.adapt import Joint, predict, predict_jointly
from pluralprefs.asking import RULES, suggest, variances
from pluralprefs.asking import pick as pick_rows
from pluralprefs.data import comparisons
from pluralprefs.data.files import DataError
from pluralprefs.models.low_rank import LowRank
from pluralprefs.types import Covariance, UserPosterior
from pluralprefs.users import Users, neutral, ravel

NONE = np.zeros((6, 0))


def independent(mean, deviation):
    """Rows that have nothing to do with each other."""
    return Joint(np.asarray(mean, float), np.diag(np.asarray(deviation, float)), np.zeros((len(mean), 0)))


def gains(joint, rule, **settings):
    """What the rule gives for each row alone."""
    level = settings.pop("level", np.zeros(len(joint.mean)))
    one = lambda i: Joint(*(x[i : i + 1] for x in joint))  # noqa: E731
    return np.array([
        pick_rows(one(i), 1, rule, level=level[i : i + 1], **settings)[1][0] for i in range(len(joint.mean))
    ])  # fmt: skip


def dense(mean, deviation, function):
    """Mean of a function of a Gaussian by the trapezoid rule on a fine grid."""
    x = np.linspace(-12, 12, 40_001)
    density = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    return np.trapezoid(function(mean + deviation * x) * density, x)


CASES = ([0.0, 0.0, 1.0, -3.0, 2.0], [0.5, 3.0, 1.0, 2.0, 0.01])


def test_information_gain_is_the_mutual_information_of_answer_and_log_odds():
    s = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    entropy = lambda p: -p * np.log(p) - (1 - p) * np.log1p(-p)  # noqa: E731
    expected = [entropy(dense(m, d, s)) - dense(m, d, lambda x: entropy(s(x))) for m, d in zip(*CASES, strict=True)]
    np.testing.assert_allclose(gains(independent(*CASES), "bald"), expected, atol=1e-4)


def test_volume_and_best_option_are_what_the_formulas_say():
    slope = lambda x: np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x))) ** 2  # noqa: E731
    expected = [0.5 * np.log1p(0.5 * d**2 * dense(m, d, slope)) for m, d in zip(*CASES, strict=True)]
    np.testing.assert_allclose(gains(independent(*CASES), "d_optimal", weight=0.5), expected, atol=1e-4)
    level = np.arange(5.0)  # of (first + second) / 2
    half = 0.5 * np.random.default_rng(0).normal(*map(np.array, CASES), (200_000, 5))
    best = np.maximum(level[None, :] + half, level[None, :] - half).mean(0)
    np.testing.assert_allclose(gains(independent(*CASES), "eubo", level=level), best, atol=0.02)


@pytest.mark.parametrize("rule", ["bald", "d_optimal"])
def test_questions_of_one_batch_do_not_ask_the_same_again(rule):
    plus = np.array([[2.0, 0.0], [2.0, 0.0], [1.9, 0.0], [0.0, 1.8], [0.0, 1.7], [0.1, 0.1]])  # the second is the first
    chosen, worth = pick_rows(Joint(np.zeros(6), plus, NONE), 4, rule, level=np.zeros(6))
    assert chosen[:2].tolist() == [0, 3]
    assert len(set(chosen.tolist())) == 4
    assert (np.diff(worth) < 0).all()


def test_greedy_volume_is_that_of_the_whole_design():
    """Gains add up to the log volume that the chosen rows take together, by a dense determinant."""
    plus = np.random.default_rng(1).normal(size=(6, 3))
    chosen, worth = pick_rows(Joint(np.zeros(6), plus, NONE), 4, "d_optimal", level=np.zeros(6))
    spread, information = np.eye(3), []
    for row in plus[chosen]:
        information.append(dense(0.0, np.sqrt(row @ spread @ row), lambda x: 0.25 / np.cosh(x / 2) ** 2))
        spread = np.linalg.inv(np.linalg.inv(spread) + information[-1] * np.outer(row, row))
    np.testing.assert_allclose(worth.sum(), -0.5 * np.linalg.slogdet(spread)[1], atol=1e-4)
    more = np.random.default_rng(2).normal(size=(6, 2))  # what `minus` takes away again
    again = pick_rows(Joint(np.zeros(6), np.hstack([plus, more]), more), 4, "d_optimal", level=np.zeros(6))
    np.testing.assert_array_equal(again[0], chosen)
    np.testing.assert_allclose(again[1], worth)


def test_what_no_level_explains_makes_a_question_worth_less():
    joint = independent(*CASES)
    for rule in ("bald", "d_optimal"):
        assert (gains(joint, rule, residual=4.0) < gains(joint, rule)).all()


@pytest.mark.parametrize(("name", "square"), [("bradley_terry", False), ("bradley_terry", True), ("pal_a", False)])
def test_joint_log_odds_agree_with_those_of_each_row(name, square):
    """Each row's mean and variance as `predict` says; rows that add up to nothing vary by nothing."""
    model, x, draw = FAMILIES[name](), items(1), np.random.default_rng(0)
    table = Users.init(model, users=0, communities=0).replace(scale=jnp.float32(20.0))
    vector, unravel = ravel(neutral(model))
    size = len(vector)
    root = 0.5 * (draw.normal(size=(size, size)) if square else np.abs(draw.normal(size=size)))
    factors = Covariance(jnp.asarray(root, jnp.float32), jnp.asarray(0.1 * draw.normal(size=(2, size)), jnp.float32))
    found = UserPosterior(unravel(jnp.asarray(draw.normal(size=size), jnp.float32)), factors)
    asked = rows(pick(x, np.array([0, 1, 0])), pick(x, np.array([1, 2, 2])), [1.0, 1.0, 1.0])
    joint = jax.jit(predict_jointly)(model, table, found, asked)
    mean, spread = jax.jit(jax.vmap(lambda row: predict(model, table, found, row)))(asked)
    assert np.min(spread) > 0.01
    np.testing.assert_allclose(joint.mean, mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(variances(joint), spread, rtol=2e-3)
    total = np.array([1.0, 1.0, -1.0])
    plus, minus = total @ joint.plus, total @ joint.minus
    np.testing.assert_allclose([total @ joint.mean, plus @ plus - minus @ minus], 0.0, atol=1e-3 * np.max(spread))


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return comparisons.read(write(tmp_path_factory.mktemp("pool") / "pool.jsonl", users=1, per_user=16, seed=3))


@pytest.mark.parametrize("rule", RULES)
def test_what_was_judged_or_turned_round_is_not_asked_again(pool, rule):
    run = handmade(pool)
    user = run.adapt(pool[:4], prior="population")
    turned = pool[:4].with_columns(
        first="second", second="first", first_id="second_id", second_id="first_id",
        example_id="turned " + pl.col("example_id"),
        **{f"attr:{name}:{side}": f"attr:{name}:{other}" for name in "xy" for side, other in
           (("first", "second"), ("second", "first"))},
    )  # fmt: skip
    found = suggest(user, pl.concat([turned, pool]), 100, rule=rule)
    asked = [frozenset(pair) for pair in found.select("first_id", "second_id").rows()]
    judged = {frozenset(pair) for pair in pool[:4].select("first_id", "second_id").rows()}
    every = {frozenset(pair) for pair in pool.select("first_id", "second_id").rows()}
    assert len(asked) == len(set(asked))
    assert set(asked) == every - judged
    np.testing.assert_allclose(found["probability"], run.score(found, user=user)["probability"], atol=1e-5)
    assert suggest(user.update(pool[4:]), pool, 1, rule=rule).height == 0


def test_an_answer_to_the_best_question_tells_more_than_one_to_the_worst(pool):
    """What is left open of the state after an answer, by the log volume of all log-odds."""
    run = handmade(pool)
    user = run.adapt(pool[:2], prior="population")
    order = suggest(user, pool, 100, rule="d_optimal")
    gain = np.sort(order["gain"])

    def left(example):
        answered = user.update(pool.filter(example_id=example))
        root = np.asarray(answered.posterior.covariance.root)
        return np.linalg.slogdet((root @ root.T)[1:, 1:])[1]

    alone = suggest(user, pool, 1, rule="d_optimal")["example_id"][0]
    last = order["example_id"][-1]
    assert gain[0] < gain[-1]
    assert left(alone) < left(last)


def test_mistakes_are_said(pool):
    run = handmade(pool)
    user = run.adapt(prior="population", method="map")
    for arguments, message in (
        ({"rule": "guess"}, "write bald, d_optimal, eubo, random"), ({"rule": "bald"}, "needs the uncertainty"),
        ({"n": 0, "rule": "random"}, "one pair at least"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            suggest(user, pool, **arguments)


def test_utilities_are_those_of_the_responses_against_the_average_of_their_prompt(pool):
    """All pairs of three responses: E max(r_first, r_second) from what `score` says of each response, by sampling."""
    texts = {row["first"]: row for row in pool.iter_rows(named=True)}
    names = list(texts)[:3]
    pairs = []
    for a, b in ((0, 1), (1, 2), (2, 0)):
        first, second = texts[names[a]], texts[names[b]]
        sides = {f"attr:{k}:{side}": row[f"attr:{k}:first"] for k in "xy" for side, row in
                 (("first", first), ("second", second))}  # fmt: skip
        pairs.append({"prompt": "Which?", "first": names[a], "second": names[b], "target": 1.0} | sides)
    table = comparisons.from_trl(pl.DataFrame(pairs))
    run = handmade(pool, model=LowRank.init(key=jax.random.key(1), dim=2, rank=2))
    user = run.adapt(prior="population")
    given = pl.DataFrame(
        {"response": names, **{f"attr:{k}": [texts[n][f"attr:{k}:first"] for n in names] for k in "xy"}}
    )
    rewards = run.score("Which?", given, user=user)["log_odds"].to_numpy()
    found = suggest(user, table, 1, rule="eubo")
    a, b = (names.index(found[side][0]) for side in ("first", "second"))
    half = 0.5 * np.random.default_rng(0).normal(found["log_odds"][0], found["log_odds_std"][0], 400_000)
    assert found["log_odds"][0] == pytest.approx(rewards[a] - rewards[b], abs=1e-4)
    assert found["gain"][0] == pytest.approx((rewards[a] + rewards[b]) / 2 + np.abs(half).mean(), abs=0.01)
