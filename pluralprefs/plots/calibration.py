"""Does a probability mean what it says? Predictions as a reliability curve."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from pluralprefs.intervals import bootstrap, number_clusters, percentile_interval, ratio
from pluralprefs.metrics import BINS, calibration_bin, check_predictions, sigmoid
from pluralprefs.plots.style import BACK, COLOURS, DASHES, FAINT, INK, MARKERS, axes, named

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def calibration(predictions: pl.DataFrame, ax: Axes | None = None, draws: int = 500, seed: int = 0) -> Axes:
    """Draw how often the predicted winner won against how sure the model was, in 15 bins of sigmoid(|log_odds|).

    One line per model, 95 % intervals over users; the area of a dot is its share of the judgements. On the diagonal a
    probability means what it says, below it the model is over-confident. Bins of fewer than 10 rows are left out.
    """
    rows = check_predictions(predictions).filter(pl.col("control").is_null()).sort("example_id")
    if rows.is_empty():
        raise ValueError("calibration: no predictions to draw")
    ax = axes(ax, (5.6, 4.2))
    ax.plot(
        [50, 100], [50, 100], color=FAINT, linewidth=1, linestyle=(0, (4, 2)), zorder=1, label="as often as it says"
    )
    for position, ((model,), part) in enumerate(rows.group_by(["model"], maintain_order=True)):
        _draw_calibration(ax, part, str(model), position, draws, seed)
    judgements, users = rows["example_id"].n_unique(), rows["user_id"].drop_nulls().n_unique()
    ax.set_title(
        f"{judgements:,} judgements, {users:,} users; 95 % intervals over users", loc="left", fontsize=10, color=INK
    )
    ax.set_xlabel("probability of the predicted winner, %")
    ax.set_ylabel("predicted winner preferred, %")
    ax.set_xlim(49, 101)
    ax.set_ylim(top=101)
    ax.grid(color=BACK, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.legend(loc="lower right", frameon=False, fontsize=8)
    return ax


def _draw_calibration(ax: Axes, part: pl.DataFrame, model: str, position: int, draws: int, seed: int) -> None:
    log_odds, weight = part["log_odds"].to_numpy(), part["weight"].to_numpy()
    won = 0.5 + np.sign(log_odds) * (part["target"].to_numpy() - 0.5)
    where = calibration_bin(log_odds)
    filled = np.flatnonzero(np.bincount(where, minlength=BINS) >= 10)
    cluster, known = number_clusters(part["user_id"])
    sums = np.zeros((3, len(known), BINS))
    for slot, value in enumerate((weight, weight * won, weight * sigmoid(np.abs(log_odds)))):
        np.add.at(sums[slot], (cluster, where), value)
    mass, wins, sure = sums[:, :, filled]
    share = bootstrap(lambda counts: ratio(counts @ wins, counts @ mass), len(known), draws, seed)
    bounds = [percentile_interval(share[:, column]) for column in range(len(filled))]
    x, y = 100 * sure.sum(0) / mass.sum(0), 100 * wins.sum(0) / mass.sum(0)
    low, high = (
        np.array([[np.nan if bound is None else 100 * bound for bound in pair] for pair in bounds]).reshape(-1, 2).T
    )
    colour = COLOURS[position % len(COLOURS)]
    ax.vlines(x, low, high, color=colour, linewidth=1, alpha=0.7)
    marker, dashes = MARKERS[position % len(MARKERS)], DASHES[position % len(DASHES)]
    ax.plot(x, y, marker, color=colour, linewidth=1.2, linestyle=dashes, markersize=4, label=named(model))
    ax.scatter(x, y, s=200 * mass.sum(0) / weight.sum(), color=colour, marker=marker, zorder=3)
