"""One user: any order is all at once, what is forgotten is gone, a file is whole or refused."""

from dataclasses import replace

import jax
import numpy as np
import polars as pl
import pytest
from handmade import handmade
from safetensors import safe_open
from tables import write

from pluralprefs.adapted import is_one_user
from pluralprefs.adapting import probability_std
from pluralprefs.data import comparisons
from pluralprefs.data.files import DataError
from pluralprefs.registry.files import load_arrays, save_arrays
from pluralprefs.users import ravel

PAIRS = ["prompt", "first", "second", "target"]


def state(user):
    """Mean and covariance factors of a user as one vector."""
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(user.posterior)])


def mean(user):
    return np.asarray(ravel(user.posterior.mean)[0])


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """Eight comparisons of one new user."""
    path = write(tmp_path_factory.mktemp("said") / "new.jsonl", users=1, per_user=8, seed=9)
    return comparisons.read(path)


@pytest.fixture(scope="module")
def small_run(said):
    return handmade(said)


def test_updates_in_any_order_are_all_at_once(small_run, said):
    at_once = small_run.adapt(said, prior="population")
    assert np.abs(mean(at_once)).max() > 1e-2
    user = small_run.adapt(prior="population")
    for row in (3, 0, 7, 1):
        user = user.update(said[row])
    user = user.update(said[[6, 5, 4, 2]])
    np.testing.assert_array_equal(state(user), state(at_once))
    many = small_run.adapt(said)[said["user_id"][0]]
    np.testing.assert_allclose(ravel(many.mean)[0], mean(at_once), atol=2e-5)


def test_no_comparisons_are_the_prior_and_more_comparisons_narrow_it(small_run, said):
    """The prior's log-odds are w.(e_first - e_second), their variance |e_first - e_second|^2 and that of the gain."""
    prior = small_run.adapt(prior="population")
    np.testing.assert_array_equal(mean(prior), 0.0)
    items, rows = small_run.arrays(said)
    difference = np.asarray(items.embedding)[rows.first] - np.asarray(items.embedding)[rows.second]
    log_odds = difference @ np.asarray(small_run.users.population["linear"])
    found = small_run.score(said, user=prior)
    assert set(found["user_source"]) == {"adapted"}
    np.testing.assert_allclose(found["log_odds"], log_odds, atol=1e-5)
    np.testing.assert_allclose(found["log_odds_std"], np.sqrt((difference**2).sum(1) + log_odds**2), atol=1e-4)
    assert (small_run.score(said, user=prior.update(said))["log_odds_std"] < found["log_odds_std"]).all()


def test_contradictions_and_ties_are_data(small_run, said):
    opposite = said.with_columns(target=1 - pl.col("target"), example_id=pl.concat_str(pl.lit("not "), "example_id"))
    torn = small_run.adapt(said, prior="population").update(opposite)
    tied = said.with_columns(target=pl.lit(0.5), tie=pl.lit(True), weight=pl.lit(2.0))
    np.testing.assert_allclose(mean(torn), mean(small_run.adapt(tied, prior="population")), atol=2e-4)
    log_odds = [small_run.score(said, user=user)["log_odds"].abs().mean() for user in
                (torn, small_run.adapt(prior="population"))]  # fmt: skip
    assert log_odds[0] < 0.7 * log_odds[1]  # who cannot say or says both is nearer to indifference than others


def test_what_is_forgotten_leaves_no_trace(small_run, said):
    user = small_run.adapt(said, prior="population", method="laplace")
    ids = said["example_id"].to_list()
    left = user.forget(ids[2:5])
    never = small_run.adapt(said[[0, 1, 5, 6, 7]], prior="population", method="laplace")
    np.testing.assert_array_equal(state(left), state(never))
    assert not set(ids[2:5]) & set(left.ids)
    assert len(left.rows.target) == len(left.pairs) == 5
    nothing = user.forget()
    assert nothing.rows is None
    assert (nothing.ids, nothing.pairs) == ((), ())
    np.testing.assert_array_equal(mean(nothing), 0.0)
    np.testing.assert_array_equal(state(user.undo()), state(user.forget(ids[-1:])))
    with pytest.raises(DataError, match=r"'c9': no such comparison.*there are 8"):
        user.forget(["c9"])


@pytest.mark.parametrize("method", ["laplace", "map"])
def test_a_file_gives_the_user_back_and_can_be_updated(small_run, said, tmp_path, method):
    path = tmp_path / "u.safetensors"
    small_run.adapt(said[:5], prior="community:a", method=method).save(path)
    user = small_run.load_user(path)
    assert (user.prior, user.method, len(user.ids)) == ("community:a", method, 5)
    whole = small_run.adapt(said, prior="community:a", method=method)
    np.testing.assert_array_equal(state(user.update(said[5:])), state(whole))
    assert (user.posterior.covariance is None) == (method == "map")
    states = small_run.load_users(path)
    np.testing.assert_array_equal(ravel(states[user.name].mean)[0], mean(user))
    raw = path.read_bytes()
    assert not [text for text in said["first"] if text.encode() in raw]


def test_files_of_another_model_or_without_comparisons_are_refused(small_run, said, tmp_path):
    path = tmp_path / "u.safetensors"
    user = small_run.adapt(said, prior="population")
    user.save(path)
    assert is_one_user(path)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    arrays, _ = load_arrays(path)
    for change, message in (
        ({"base": "other"}, "another fit of 'handmade'"),
        ({"base": "other", "run": "second"}, "belong to run 'second'"),
        ({"user": "{}"}, "is not a whole user"),
        ({"user": metadata["user"].replace('"ids": [', '"ids": ["x", ')}, "differ in number"),
    ):  # fmt: skip
        save_arrays(path, arrays, metadata | change)
        with pytest.raises(DataError, match=message):
            small_run.load_user(path)
    small_run.save_users(path, {user.name: user.posterior})
    assert not is_one_user(path)
    with pytest.raises(DataError, match="without the comparisons behind them"):
        small_run.load_user(path)


def test_a_user_departs_from_the_community_of_the_row_and_else_from_its_own(small_run, said):
    user = small_run.adapt(prior="community:a")
    rows = pl.concat([said[:1]] * 3).with_columns(
        community_id=pl.Series(["a", "b", None]), example_id=pl.Series(["x", "y", "z"])
    )
    a, b, mine = small_run.score(rows, user=user)["log_odds"]
    assert mine == a != b
    assert small_run.score(rows, user=small_run.adapt(prior="population"))["log_odds"][2] not in (a, b)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prior": "community:c"}, "the run's communities are: a, b"),
        ({"prior": "nobody"}, 'write "population" or "community:NAME"'),
        ({"prior": "population", "method": "guess"}, "'laplace' or 'map'"),
    ],
)
def test_a_prior_or_a_method_that_is_not_there_is_said(small_run, arguments, message):
    with pytest.raises(DataError, match=message):
        small_run.adapt(**arguments)


def test_rewards_differ_by_the_log_odds_for_careful_users_too(small_run, said):
    user = small_run.adapt(said, prior="community:a")
    assert abs(float(user.posterior.mean.gain)) > 1e-3
    found = small_run.score(said, user=user)
    np.testing.assert_allclose(found["reward_first"] - found["reward_second"], found["log_odds"], atol=1e-5)


def test_communities_that_were_not_fitted_are_no_prior(small_run):
    table = small_run.users.replace(community_root=0 * small_run.users.community_root)
    with pytest.raises(DataError, match="fitted no communities"):
        replace(small_run, users=table).adapt(prior="community:a")


def test_comparisons_of_several_users_are_not_one_user(small_run, said):
    two = pl.concat([said, said.with_columns(user_id=pl.lit("other"), example_id="other " + pl.col("example_id"))])
    with pytest.raises(DataError, match="of 2 users"):
        small_run.adapt(two, prior="population")
    with pytest.raises(DataError, match="of 2 users"):
        small_run.adapt(prior="population").update(two)
    assert small_run.adapt(prior="population").update(said).name == said["user_id"][0]
    with pytest.raises(DataError, match="'other', not of"):
        small_run.adapt(said, prior="population").update(two)


def test_the_spread_of_a_probability_is_that_of_samples(small_run, said):
    draws = 1 / (1 + np.exp(-np.random.default_rng(0).normal(0.7, 1.5, 400_000)))
    np.testing.assert_allclose(probability_std(np.array([0.7]), np.array([1.5])), draws.std(), rtol=5e-3)
    user = small_run.adapt(said, prior="population")
    probability, std = small_run.predict_proba(said, user=user, return_std=True)
    np.testing.assert_array_equal(probability, small_run.predict_proba(said, {user.name: user.posterior}))
    assert ((std > 0) & (std < 0.5)).all()
