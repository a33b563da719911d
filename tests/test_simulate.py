"""Simulated worlds obey the law that they state, and the Bayes reference agrees with integration by hand."""

import itertools

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from pluralprefs.data.comparisons import validate
from pluralprefs.data.simulate import (
    Noise,
    bayes_accuracy,
    bayes_predictions,
    cyclic,
    hierarchical,
    ideal_point,
    low_rank,
    noisy,
    oracle_predictions,
    posterior_predictive,
    summarise,
)
from pluralprefs.data.simulate.states import Dirichlet
from pluralprefs.data.splits import CELLS, support_draws

WORLDS = {
    "hierarchical": hierarchical,
    "free": low_rank,
    "simplex": lambda **sizes: low_rank(weights="simplex", **sizes),
    "dirichlet": ideal_point,
    "one_hot": lambda **sizes: ideal_point(mixture="one_hot", **sizes),
    "cyclic": cyclic,
    "noisy": lambda **sizes: noisy(hierarchical(**sizes), careless_share=0.3, ties="davidson"),
}
each_world = pytest.mark.parametrize("make", WORLDS.values(), ids=list(WORLDS))


def s(log_odds):
    return 1 / (1 + np.exp(-log_odds))


def only(table, cell, user=None):
    rows = table.filter(pl.col("cell") == cell)
    return rows if user is None else rows.filter(pl.col("user_id") == user)


def logistic_fit(design, target, ridge=1e-6):
    weights = np.zeros(design.shape[1])
    for _ in range(30):
        p = s(design @ weights)
        hessian = (design.T * (p * (1 - p))) @ design + ridge * np.eye(len(weights))
        weights -= np.linalg.solve(hessian, design.T @ (p - target) + ridge * weights)
    return weights, np.linalg.inv(hessian)


@each_world
def test_a_world_is_a_valid_table_that_validation_leaves_alone(make):
    table = make(users=10).table
    checked = validate(table)
    assert_frame_equal(checked.select(table.columns), table)
    assert set(table["cell"]) <= set(CELLS)
    assert table["example_id"].n_unique() == len(table)


@each_world
def test_a_seed_gives_the_same_world_twice_and_another_seed_another(make):
    assert_frame_equal(make(users=8, seed=3).table, make(users=8, seed=3).table)
    assert not make(users=8, seed=3).table["target"].equals(make(users=8, seed=4).table["target"])


@each_world
def test_cells_hold_out_users_prompts_and_pairs(make):
    table = make(users=20).table.with_columns(pair=pl.concat_list("first_id", "second_id").list.sort())
    seen = table.filter(~pl.col("cell").str.starts_with("unseen"))
    train = table.filter(pl.col("cell").is_in(["train", "validation"]))
    assert table["user_id"].n_unique() - seen["user_id"].n_unique() == 4
    assert not set(train["prompt_id"]) & set(table.filter(pl.col("cell").str.ends_with("newprompt"))["prompt_id"])
    held_out = table.filter(pl.col("cell").str.ends_with("testpair"))
    learned = table.filter(pl.col("cell").is_in(["train", "validation", "unseen/support"]))
    assert len(held_out)
    assert held_out.join(learned, on="pair", how="semi").is_empty()


def test_more_comparisons_leave_items_and_users_as_they_were():
    small, large = hierarchical(comparisons_per_user=10), hierarchical(comparisons_per_user=50)
    np.testing.assert_array_equal(small.items, large.items)
    np.testing.assert_array_equal(small.truth["user"], large.truth["user"])


def test_logistic_regression_recovers_the_weights_of_a_hierarchical_user():
    world = hierarchical(
        users=1, communities=1, communities_per_user=1, items=120, prompts=1, comparisons_per_user=6000, dim=3
    )
    pairs, truth = world.pairs(world.table), world.truth
    design = world.items[pairs.first] - world.items[pairs.second]
    weights, covariance = logistic_fit(design, world.table["target"].to_numpy())
    expected = truth["population"] + truth["community"][0] + truth["user"][0]
    assert (np.abs(weights - expected) < 4 * np.sqrt(np.diag(covariance))).all()


def test_user_deviations_have_the_stated_spread_and_users_cross_communities():
    world = hierarchical(users=2000, comparisons_per_user=8, dim=5, user_std=0.7, communities_per_user=2)
    np.testing.assert_allclose(world.truth["user"].std(0), 0.7, rtol=0.06)
    per_user = world.table.group_by("user_id").agg(pl.col("community_id").n_unique())["community_id"]
    assert per_user.max() == 2
    assert per_user.mean() > 1.9


def test_log_odds_of_a_community_row_add_up_by_hand():
    world = hierarchical(users=6)
    row = world.table.row(17, named=True)
    a, b = (world.items[world.item_ids.index(row[side])] for side in ("first_id", "second_id"))
    community, user = world.community_ids.index(row["community_id"]), world.user_ids.index(row["user_id"])
    weights = world.truth["population"] + world.truth["community"][community] + world.truth["user"][user]
    assert row["true_log_odds"] == pytest.approx(weights @ (a - b))


def test_low_rank_weights_lie_on_the_simplex_or_are_free():
    simplex = low_rank(weights="simplex", users=500, comparisons_per_user=2, rank=4).truth["user"]
    np.testing.assert_allclose(simplex.sum(1), 1.0)
    np.testing.assert_allclose(simplex.mean(0), 0.25, atol=0.05)
    free = low_rank(users=500, comparisons_per_user=2, rank=4).truth["user"]
    np.testing.assert_allclose(np.cov(free.T), np.eye(4), atol=0.2)


def test_prototypes_keep_their_distance_and_the_nearer_item_is_preferred():
    world = ideal_point(prototypes=6, point=2, delta=1.5, scale=3.0, users=5)
    centres = world.truth["prototypes"]
    assert min(np.linalg.norm(p - q) for p, q in itertools.combinations(centres, 2)) >= 1.5
    row = world.table.row(5, named=True)
    point = world.truth["user"][world.user_ids.index(row["user_id"])] @ centres
    a, b = (
        world.items[world.item_ids.index(row[side])] @ world.truth["projection"] for side in ("first_id", "second_id")
    )
    expected = 3.0 * (np.linalg.norm(b - point) - np.linalg.norm(a - point))
    assert row["true_log_odds"] == pytest.approx(expected)


def test_sign_labels_have_no_noise():
    table = ideal_point(scale=None, users=10).table
    np.testing.assert_array_equal(table["target"].to_numpy(), (table["true_log_odds"] > 0).cast(float).to_numpy())


def test_a_cyclic_world_has_equal_pair_types_and_both_sides_in_every_cell():
    world = cyclic(users=20)
    pairs, types = world.pairs(world.table), world.truth["type"]
    table = world.table.with_columns(a=types[pairs.first], b=types[pairs.second])
    for (cell,), part in table.partition_by("cell", as_dict=True).items():
        counts = part.group_by(pl.concat_list("a", "b").list.sort()).len()["len"]
        assert counts.n_unique() == 1, cell
        assert len(counts) == 3, cell
        assert abs(2 * part["target"].sum() - len(part)) <= 3, cell


def test_no_scalar_score_passes_two_thirds_of_a_cyclic_world():
    world = cyclic(users=20)
    pairs, target = world.pairs(world.table), world.table["target"].to_numpy()
    types = world.truth["type"]
    for order in itertools.permutations((0.0, 1.0, 2.0)):
        score = np.array(order)[types]
        assert np.mean((score[pairs.first] > score[pairs.second]) == (target == 1)) <= 2 / 3 + 1e-9
    one_hot = np.eye(len(world.items))[pairs.first] - np.eye(len(world.items))[pairs.second]
    scores, _ = logistic_fit(one_hot, target, ridge=1e-3)
    agrees = (one_hot @ scores > 0) == (target == 1)
    for cell in world.table["cell"].unique():
        assert agrees[(world.table["cell"] == cell).to_numpy()].mean() <= 2 / 3 + 1e-9
    assert bayes_accuracy(world, world.table) == pytest.approx(1.0)


def test_reversed_users_of_a_cyclic_world_are_found_from_one_shot():
    world = cyclic(users=20, reversed_share=0.5)
    curve = bayes_predictions(world, support_draws(world.table, draws=1), shots=(0, 1))
    accuracy = summarise(curve)["accuracy"].to_list()
    assert accuracy == [0.5, 1.0, 0.5, 1.0]  # newprompt, then testpair


@pytest.mark.parametrize("ties", ["davidson", "rao_kupper"])
def test_ties_are_as_frequent_as_the_formula_says(ties):
    world = noisy(low_rank(users=100), ties=ties, tie_strength=0.8)
    odds = np.exp(world.table["true_log_odds"].to_numpy())
    if ties == "davidson":
        expected = 0.8 * np.sqrt(odds) / (odds + 1 + 0.8 * np.sqrt(odds))
    else:
        theta = np.exp(0.8)
        expected = (theta**2 - 1) * odds / ((odds + theta) * (1 + theta * odds))
    tied = world.table["tie"].to_numpy()
    assert abs(tied.mean() - expected.mean()) < 4 * np.sqrt((expected * (1 - expected)).sum()) / len(tied)
    assert (world.table["target"].to_numpy()[tied] == 0.5).all()


@pytest.mark.parametrize("ties", [None, "davidson", "rao_kupper"])
def test_the_three_answers_sum_to_one_and_swap_with_the_sides(ties):
    log_odds = np.linspace(-40, 40, 101)
    first, tie, second = Noise(ties=ties, flip_rate=0.2).outcomes(log_odds, 0.2)
    np.testing.assert_allclose(first + tie + second, 1.0)
    np.testing.assert_allclose(first[::-1], second, atol=1e-12)
    np.testing.assert_allclose(tie[::-1], tie, atol=1e-12)


def test_careless_users_flip_and_position_bias_shifts():
    world = noisy(ideal_point(users=200, scale=None), careless_share=0.4, flip_rate=0.25)
    wrong = (world.table["target"] == 1.0) != (world.table["true_log_odds"] > 0)
    by_user = world.table.with_columns(wrong=wrong).group_by("user_id", maintain_order=True).agg(pl.mean("wrong"))
    careless = world.truth["careless"].astype(bool)
    assert careless.mean() == pytest.approx(0.4, abs=0.1)
    rates = by_user.sort("user_id")["wrong"].to_numpy()
    assert rates[~careless].max() == 0.0
    assert rates[careless].mean() == pytest.approx(0.25, abs=0.03)
    biased = noisy(hierarchical(users=100), position_bias=1.0).table
    gap = (biased["target"] - s(biased["true_log_odds"].to_numpy() + 1.0)).mean()
    assert abs(gap) < 4 * 0.5 / np.sqrt(len(biased))


def test_the_dirichlet_density_in_free_coordinates_integrates_to_one():
    prior = Dirichlet(np.array([0.7, 1.5]))
    grid = np.linspace(-60, 40, 20001)
    density = np.exp(prior.log_density(grid[:, None]))
    assert density.sum() * (grid[1] - grid[0]) == pytest.approx(1.0, abs=1e-6)
    mean = (prior.states(grid[:, None])[:, 0] * density).sum() * (grid[1] - grid[0])
    assert mean == pytest.approx(0.7 / 2.2, abs=1e-6)
    drawn = prior.states(prior.sample(np.random.default_rng(0), 20000))
    assert drawn[:, 0].mean() == pytest.approx(mean, abs=0.01)


def grid_of_states(world):
    """States on a grid with their prior weights, without the code under test."""
    axis = np.linspace(-6, 6, 161)
    if world.name.startswith("low_rank/free"):
        states = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
        return states, np.exp(-0.5 * (states**2).sum(1))
    free = np.stack(np.meshgrid(4 * axis, 4 * axis, indexing="ij"), -1).reshape(-1, 2)
    states = np.exp(np.concatenate([free, np.zeros((len(free), 1))], 1))
    states /= states.sum(1, keepdims=True)
    return states, np.prod(states**0.5, axis=1)  # concentration 0.5


def by_grid(world, support, query):
    """P(first, decided) by summation over a grid, with the two kinds of user spelt out."""
    states, weights = grid_of_states(world)
    noise, total, decided = world.noise, 0.0, 0.0
    asked, recorded = world.log_odds(states, world.pairs(query)), world.log_odds(states, world.pairs(support))
    target = support["target"].to_numpy()
    for share, flip in ((1 - noise.careless_share, 0.0), (noise.careless_share, noise.flip_rate)):
        first, tie, second = noise.outcomes(recorded, flip)
        likelihood = np.where(target == 1, first, np.where(target == 0, second, tie)).prod(1) * weights * share
        first, tie, second = noise.outcomes(asked, flip)
        total, decided = total + likelihood @ first, decided + likelihood @ (first + second)
    return total / decided


@pytest.mark.parametrize(
    "world",
    [
        low_rank(rank=2, users=10),
        noisy(low_rank(rank=2, users=10), careless_share=0.4, position_bias=0.5, ties="davidson"),
        low_rank(rank=3, users=10, weights="simplex"),
        ideal_point(users=10),
        noisy(ideal_point(users=10), careless_share=0.4, ties="rao_kupper"),
        ideal_point(users=10, scale=None),
    ],
    ids=lambda world: world.name,
)
def test_importance_sampling_agrees_with_integration_on_a_grid(world):
    user = only(world.table, "unseen/support")["user_id"][0]
    support, query = only(world.table, "unseen/support", user), only(world.table, "unseen/testpair", user)
    for shots in (0, 1, 6, 20):
        predicted = posterior_predictive(world, support.head(shots), query, samples=8192)
        expected = by_grid(world, support.head(shots), query)
        assert predicted["ess"].min() > 300
        tolerance = 4 * 0.5 / np.sqrt(predicted["ess"].min()) + 0.01
        np.testing.assert_allclose(predicted["probability"], expected, atol=tolerance)


def test_one_hot_users_are_summed_exactly():
    world = ideal_point(mixture="one_hot", users=10, prototypes=4)
    user = only(world.table, "unseen/support")["user_id"][0]
    support, query = only(world.table, "unseen/support", user).head(5), only(world.table, "unseen/testpair", user)
    predicted = posterior_predictive(world, support, query)
    weights, answers = np.ones(4), []
    for prototype in range(4):
        state = np.eye(4)[prototype : prototype + 1]
        recorded = world.log_odds(state, world.pairs(support))[0]
        weights[prototype] = np.prod(np.where(support["target"] == 1, s(recorded), s(-recorded)))
        answers.append(s(world.log_odds(state, world.pairs(query))[0]))
    np.testing.assert_allclose(predicted["probability"], weights @ np.array(answers) / weights.sum(), rtol=1e-9)
    assert predicted["ess"].null_count() == len(query)


def test_without_shots_the_prediction_is_the_prior_predictive():
    world = hierarchical(users=10, dim=4)
    query = only(world.table, "unseen/testpair")
    predicted = posterior_predictive(world, query.clear(), query, samples=20000)
    pairs = world.pairs(query)
    difference = world.items[pairs.first] - world.items[pairs.second]
    shared = world.truth["population"] + world.truth["community"][pairs.community]
    mean, std = (difference * shared).sum(1), 0.5 * np.linalg.norm(difference, axis=1)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    expected = s(mean[:, None] + std[:, None] * nodes) @ weights / weights.sum()
    np.testing.assert_allclose(predicted["probability"], expected, atol=0.01)
    np.testing.assert_allclose(predicted["log_odds_std"], std, rtol=0.03)


def test_with_many_shots_the_prediction_approaches_the_true_parameters():
    world = hierarchical(users=5, prompts=1, dim=3, comparisons_per_user=3000)
    user = only(world.table, "unseen/support")["user_id"][0]
    query = only(world.table, "unseen/testpair", user)
    predicted = posterior_predictive(world, only(world.table, "unseen/support", user), query, samples=1024)
    np.testing.assert_allclose(predicted["probability"], oracle_predictions(world, query)["probability"], atol=0.06)
    assert predicted["ess"].min() > 300


def test_more_shots_lower_the_nats_and_end_above_the_oracle():
    world = ideal_point(users=60, prototypes=3)
    curve = bayes_predictions(world, support_draws(world.table, draws=1), shots=(0, 4, 32), samples=2048)
    testpair = summarise(curve).filter(pl.col("cell") == "unseen/testpair")
    nll = testpair["nll"].to_list()
    oracle = summarise(oracle_predictions(world, only(world.table, "unseen/testpair")), by=["cell"])["nll"][0]
    assert nll[0] > nll[1] > nll[2] > oracle
    assert {"example_id", "model", "seed", "cell", "shots", "draw", "control", "log_odds"} <= set(curve.columns)


def test_posterior_predictions_are_calibrated_over_users_drawn_from_the_prior():
    world = noisy(hierarchical(users=150, dim=4), careless_share=0.3, flip_rate=0.4)
    draws = support_draws(world.table, draws=1)
    curve = bayes_predictions(world, draws, shots=(8,), samples=1024)
    p, target = curve["probability"].to_numpy(), curve["target"].to_numpy()
    for low, high in ((0.0, 0.3), (0.3, 0.5), (0.5, 0.7), (0.7, 1.0)):
        inside = (p >= low) & (p < high)
        assert abs((target - p)[inside].mean()) < 5 * 0.5 / np.sqrt(inside.sum())


def test_seen_users_can_be_asked_about_given_their_training_rows():
    world = low_rank(users=10)
    query = only(world.table, "seen/testpair").sample(fraction=1.0, shuffle=True, seed=1)
    given = posterior_predictive(world, only(world.table, "train"), query, samples=1024)
    assert given["example_id"].equals(query["example_id"])
    blank = posterior_predictive(world, query.clear(), query, samples=1024)
    assert summarise(given, by=["cell"])["nll"][0] < summarise(blank, by=["cell"])["nll"][0] - 0.2


def test_ties_and_coin_tosses_count_one_half_in_a_summary():
    rows = pl.DataFrame(
        {"cell": ["c"] * 4, "user_id": ["u"] * 4, "probability": [0.8, 0.8, 0.5, 0.2], "target": [1.0, 0.5, 1.0, 1.0]}
    ).with_columns(log_odds=(pl.col("probability") / (1 - pl.col("probability"))).log())
    summary = summarise(rows, by=["cell"])
    assert summary["accuracy"][0] == pytest.approx((1 + 0.5 + 0.5 + 0) / 4)
    expected = -(np.log(0.8) + 0.5 * np.log(0.8 * 0.2) + np.log(0.5) + np.log(0.2)) / 4
    assert summary["nll"][0] == pytest.approx(expected)


def test_attribute_columns_hold_the_features():
    world = low_rank(users=4, dim=3)
    table = validate(world.attribute_table())
    sides = table.select("attr:x0:second", "attr:x1:second", "attr:x2:second").to_numpy()
    np.testing.assert_array_equal(sides, world.features(table["second_id"]))


def test_impossible_requests_say_what_to_change():
    with pytest.raises(ValueError, match="only 660 pairs exist"):
        hierarchical(comparisons_per_user=10_000)
    with pytest.raises(ValueError, match="multiple of"):
        cyclic(items=91)
    with pytest.raises(ValueError, match="'free', 'simplex' or 'softmax'"):
        low_rank(weights="cube")
    with pytest.raises(ValueError, match="'dirichlet', 'softmax' or 'one_hot'"):
        ideal_point(mixture="cube")
    with pytest.raises(ValueError, match="'davidson'"):
        noisy(cyclic(), ties="often")
    stranger = hierarchical().table.head(1).with_columns(first_id=pl.lit("nobody"))
    with pytest.raises(ValueError, match="'nobody' does not belong to this world"):
        hierarchical().pairs(stranger)
