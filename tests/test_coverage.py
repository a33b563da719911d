"""Coverage: how often intervals of predictions hold the true log-odds, against NumPy."""

import numpy as np
import polars as pl
import pytest

from pluralprefs.data.simulate import covered, low_rank


@pytest.fixture(scope="module")
def world():
    return low_rank(users=20, items=30, comparisons_per_user=20, seed=0)


def moderated(world, mean, std, shots):
    """Prediction rows as they are recorded: log-odds already moderated by their variance."""
    odds = np.asarray(mean) / np.sqrt(1 + np.pi * np.square(std) / 8)
    columns = {"cell": "unseen/testpair", "shots": pl.Series(shots), "log_odds": odds, "log_odds_std": std}
    return world.table.select("example_id").with_columns(
        pl.lit(value).alias(name) if isinstance(value, str) else pl.Series(name, value)
        for name, value in columns.items()
    )


def test_the_share_that_holds_the_truth_is_that_of_the_means_before_moderation(world):
    draw = np.random.default_rng(0)
    truth = world.table["true_log_odds"].to_numpy()
    std = draw.uniform(0.3, 2.0, len(truth))
    shots = draw.integers(0, 2, len(truth))
    mean = truth + std * draw.normal(size=len(truth))
    found = covered(moderated(world, mean, std, shots), world)
    assert found["shots"].to_list() == [0, 1]
    for row in found.iter_rows(named=True):
        at = shots == row["shots"]
        assert row["rows"] == at.sum()
        assert row["inside"] == pytest.approx((np.abs(mean - truth)[at] < 1.645 * std[at]).mean())
        assert row["inside"] == pytest.approx(0.9, abs=0.07)


def test_intervals_without_a_width_have_no_coverage(world):
    truth = world.table["true_log_odds"].to_numpy()
    for nothing in (np.zeros(len(truth)), np.full(len(truth), np.nan)):
        rows = moderated(world, truth, np.zeros(len(truth)), np.zeros(len(truth), int))
        found = covered(rows.with_columns(log_odds_std=pl.Series(nothing, nan_to_null=True)), world)
        assert found["inside"].to_list() == [None]
