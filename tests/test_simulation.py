"""What the README claims of simulated worlds; minutes each, hence `make test-slow`."""

import runpy
from pathlib import Path

import numpy as np
import polars as pl
import pytest

EXPERIMENT = runpy.run_path(str(Path(__file__).parents[1] / "experiments" / "simulation.py"))
CASES = EXPERIMENT["CASES"]
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", CASES)
def test_a_family_is_within_a_point_of_the_posterior_predictive_on_its_own_world(name):
    """On the mean over cells; no cell is significantly worse than a point."""
    found = EXPERIMENT["compare"](CASES[name].world(), CASES[name].experiment)
    assert (found["high"] > -1.0).all(), found
    weight = found["rows"].to_numpy()
    assert np.average((found["accuracy"] - found["bayes"]).to_numpy(), weights=weight) > -1.0, found


@pytest.mark.parametrize("name", CASES)
def test_intervals_cover_new_users_drawn_from_the_prior(name):
    """90 % intervals, from no comparison to ten per coordinate of the user state: 86 to 94 %."""
    size = 8 if name in ("bradley_terry", "individual") else 3
    shots = (0, size, 10 * size)
    worlds = [CASES[name].world(seed=seed) for seed in (0, 1, 2)]
    found = pl.concat([EXPERIMENT["coverage"](world, CASES[name].experiment, shots) for world in worlds])
    share = found.group_by("shots").agg((pl.col("inside") * pl.col("rows")).sum() / pl.col("rows").sum())
    assert share["inside"].is_between(0.86, 0.94).all(), share.sort("shots")


def test_ideal_points_saturate_at_the_true_number_of_prototypes():
    """Fewer prototypes than the world has cost points, more gain none."""
    found = EXPERIMENT["prototypes"](true=3, counts=(1, 2, 3, 5), seeds=(0, 1), mixture="one_hot")
    accuracy = dict(zip(found["prototypes"], found["seen"], strict=True))
    assert accuracy[1] < accuracy[2] < accuracy[3]
    assert accuracy[3] - accuracy[2] > 2.0
    assert abs(accuracy[5] - accuracy[3]) < 2.0


@pytest.mark.parametrize("name", ["bradley_terry", "low_rank", "ideal_point"])
def test_no_scalar_reward_orders_more_than_two_thirds_of_a_cycle(name):
    found = EXPERIMENT["cycles"](name)
    assert (found["right"] < 100 * 2 / 3 + 3).all(), found  # 3: the noise of a cell
