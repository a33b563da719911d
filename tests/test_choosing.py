"""Choosing among responses: standings against dense sums, bounds that prefer the sure, directions that vote."""

import jax
import numpy as np
import polars as pl
import pytest
from handmade import handmade
from tables import write

from pluralprefs.choosing import against_average, choose, neighbours, responses_table, votes
from pluralprefs.data import comparisons
from pluralprefs.data.files import DataError
from pluralprefs.models.low_rank import LowRank
from pluralprefs.users import ravel


class NoReward:
    """The same log-odds without a reward: what a family of general preferences offers."""

    def __init__(self, model):
        self.init_user, self.log_odds = model.init_user, model.log_odds


jax.tree_util.register_static(NoReward)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return comparisons.read(write(tmp_path_factory.mktemp("choice") / "said.jsonl", users=1, per_user=12, seed=2))


@pytest.fixture(scope="module")
def given():
    draw = np.random.default_rng(0).normal(size=(5, 2))
    return pl.DataFrame({"response": [f"r{i}" for i in range(5)], "attr:x": draw[:, 0], "attr:y": draw[:, 1]})


def test_standings_of_a_linear_family_are_those_of_the_dense_covariance(table, given):
    run = handmade(table, residual=0.3)
    user = run.adapt(table[:3], prior="community:b")
    features = np.asarray(run.encode(responses_table("Which?", given)).embedding, float)[:5]
    centred = features - features.mean(0)
    state = np.asarray(run.users.population["linear"]) + np.asarray(run.users.community.state["linear"])[1]
    mean, root = user.posterior.mean, np.asarray(user.posterior.covariance.root, float)
    down = np.asarray(user.posterior.covariance.downdate, float)
    root = np.diag(root) if root.ndim == 1 else root
    one_hot = ravel(mean.replace(gain=np.float32(1), state={"linear": np.zeros(2, np.float32)}))[0]
    slopes = np.zeros((5, 3))
    slopes[:, np.asarray(one_hot) == 0] = centred
    slopes[:, np.asarray(one_hot) == 1] = (centred @ state)[:, None]
    covariance = slopes @ (root @ root.T - down.T @ down) @ slopes.T + 0.15 * (np.eye(5) - 0.2)
    found = run.score("Which?", given, user=user)
    expected = centred @ (state * (1 + float(mean.gain)) + np.asarray(mean.state["linear"]))
    np.testing.assert_allclose(found["log_odds"], expected, atol=1e-4)
    np.testing.assert_allclose(found["log_odds_std"], np.sqrt(np.diag(covariance)), rtol=1e-3)
    assert found["response"].to_list() == given["response"].to_list()


def test_a_family_without_rewards_stands_as_one_with_them(table, given):
    model = LowRank.init(key=jax.random.key(1), dim=2, rank=2)
    run = handmade(table, model=model, residual=0.2)
    user = run.adapt(table[:6], prior="population")
    items = run.encode(responses_table("Which?", given))
    with_reward = against_average(run, items, 5, user)
    without = handmade(table, model=NoReward(model), residual=0.2)
    found = against_average(without, items, 5, user)
    np.testing.assert_allclose(found.mean, with_reward.mean, atol=1e-4)
    np.testing.assert_allclose(found.covariance, with_reward.covariance, atol=1e-3)
    assert abs(found.mean.sum()) < 1e-4


def test_the_lower_bound_prefers_what_is_known(table):
    """Of two rewards nearly alike the one that nothing was said about loses; without caution it may win."""
    run = handmade(table, population=0.0)
    rows = pl.concat([table[:1]] * 12).with_columns(
        **{"attr:x:first": 1.0, "attr:x:second": 0.0, "attr:y:first": 0.0, "attr:y:second": 0.0},
        target=pl.lit(0.75), example_id=pl.int_range(12).cast(pl.Utf8), first_id=pl.lit("f"), second_id=pl.lit("s"),
    )  # fmt: skip
    user = run.adapt(rows, prior="population")
    sizes = {"known": (1.0, 0.0), "far": (1.0, 6.0), "worst": (-4.0, 0.0)}
    given = pl.DataFrame({"response": list(sizes), "attr:x": [s[0] for s in sizes.values()],
                          "attr:y": [s[1] for s in sizes.values()]})  # fmt: skip
    cautious, bold = (choose(user, "Which?", given, z=z) for z in (3.0, -3.0))
    assert cautious["response"][0] == "known"
    assert bold["response"][0] == "far"
    assert cautious["response"][2] == choose(user, "Which?", given, rule="mean")["response"][2] == "worst"
    np.testing.assert_allclose(cautious["score"], cautious["log_odds"] - 3 * cautious["log_odds_std"])


def test_directions_lie_within_the_angle_and_vote_as_a_count_says(table, given):
    run = handmade(table)
    user = run.adapt(table, prior="population")
    states = neighbours(user, 2000, angle=40.0, seed=1)
    drawn = np.asarray(states["linear"], float)
    own = np.asarray(run.users.population["linear"] + user.posterior.mean.state["linear"], float)
    cosine = drawn @ own / np.linalg.norm(own) / np.linalg.norm(drawn, axis=1)
    turned = np.rad2deg(np.arccos(np.minimum(cosine, 1)))
    assert turned.max() <= 40.01
    assert abs(turned.mean() - 20) < 1  # uniform
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), np.linalg.norm(own), rtol=1e-4)
    items = run.encode(responses_table("Which?", given))
    features = np.asarray(items.embedding, float)[:5]
    base = np.asarray(run.users.population["linear"], float)
    best = (features @ (drawn + float(user.posterior.mean.gain) * base).T).argmax(0)
    found = votes(user, jax.tree.map(lambda x: x[:5], items), states)
    np.testing.assert_allclose(found, np.bincount(best, minlength=5) / 2000, atol=2e-3)
    ranked = choose(user, "Which?", given, rule="consensus", angle=40.0, directions=2000, seed=1)
    assert ranked["score"].to_list() == sorted(found, reverse=True)
    narrow = choose(user, "Which?", given, rule="consensus", angle=1e-3)
    assert narrow["response"][0] == choose(user, "Which?", given, rule="mean")["response"][0]


def test_what_cannot_be_chosen_is_said(table, given):
    run = handmade(table, population=0.0)
    user = run.adapt(prior="population")
    for arguments, message in (
        ((["a"], {"rule": "best"}), "write mean, lower_bound, consensus"), (([], {}), "one response at least"),
        ((given, {"rule": "consensus"}), "nothing is known of this user yet"), ((["a", 2], {}), "give texts"),
        ((given.with_columns(response=pl.lit(None, pl.Utf8)), {}), "one of them is null"),
        ((given.with_columns(response=pl.lit(3)), {}), "write them as text"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            choose(user, "Which?", arguments[0], **arguments[1])
    with pytest.raises(DataError, match="needs user="):
        run.score("Which?", given)
