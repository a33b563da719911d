"""How often do the intervals of predictions hold the true log-odds of a simulated world?"""

from __future__ import annotations

import numpy as np
import polars as pl

from pluralprefs.data.simulate.worlds import World

NINETY = 1.645  # standard deviations of a 90 % interval


def covered(predictions: pl.DataFrame, world: World) -> pl.DataFrame:
    """Share of rows whose true log-odds lie in the 90 % interval, as `inside` beside `rows`, by cell and shots.

    `predictions` are rows of `pluralprefs.evaluate`: log-odds moderated by their variance, which is undone here.
    `inside` is None where no interval has a width: the model says nothing of its own uncertainty.
    """
    std = pl.col("log_odds_std")
    mean = pl.col("log_odds") * (1 + np.pi * std**2 / 8).sqrt()
    inside = ((mean - pl.col("true_log_odds")).abs() < NINETY * std).mean()
    truth = world.table.select("example_id", "true_log_odds")
    found = predictions.join(truth, on="example_id").group_by("cell", "shots")
    return found.agg(inside=pl.when(std.max() > 0).then(inside), rows=pl.len()).sort("cell", "shots")
