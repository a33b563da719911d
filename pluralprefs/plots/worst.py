"""Who is served worst, and does a user's own state matter? Metric rows of the worst group and of the controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from jaxtyping import Bool, Float

from pluralprefs.plots.accuracy import cells
from pluralprefs.plots.style import (
    COLOURS,
    FAINT,
    INK,
    LABELS,
    MARKERS,
    axes,
    axis_factor,
    named,
    one_row_each,
    sizes,
    value_and_interval,
)
from pluralprefs.results import column_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WORST = ("worst_community_accuracy", "worst_decile_accuracy")


def worst_group_frontier(
    rows: pl.DataFrame, cell: str, group: str = "worst_decile_accuracy", ax: Axes | None = None,
    models: Sequence[str] | None = None,
) -> Axes:  # fmt: skip
    """Draw accuracy for the worst group against accuracy for all, a point with 95 % intervals for each model.

    `cell` may name shots, "unseen/testpair@8"; `group` is the worst community or the worst tenth of users. The stepped
    line joins the models that none is better than in both. Raises ValueError where a model lacks either number.
    """
    if group not in WORST:
        raise ValueError(f"worst_group_frontier: group={group!r}: {' or '.join(WORST)}")
    shown = rows.filter(pl.col("control").is_null()).with_columns(column_name()).filter(pl.col("column") == cell)
    everyone = shown.filter(pl.col("metric") == "accuracy", pl.col("community").is_null())
    worst = shown.filter(pl.col("metric") == group)
    names = [name for name in everyone["model"].unique(maintain_order=True) if name in set(worst["model"])]
    names = names if models is None else list(models)
    if not names or set(names) - set(everyone["model"]) or set(names) - set(worst["model"]):
        raise ValueError(f"worst_group_frontier: no model of cell {cell!r} has both accuracy and {group}, or not all "
                         f"of {', '.join(names) or 'them'}; cells are {', '.join(_columns(rows))}")  # fmt: skip
    for part in (everyone, worst):
        one_row_each(part.filter(pl.col("model").is_in(names)), ["model"], "worst_group_frontier")
    ax = axes(ax, (5.8, 4.4))
    factor = axis_factor("accuracy")
    points = np.zeros((len(names), 2))
    for place, name in enumerate(names):
        x, y = (value_and_interval(part.filter(pl.col("model") == name), factor)[:, 0] for part in (everyone, worst))
        points[place] = x[0], y[0]
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[(place + place // len(COLOURS)) % len(MARKERS)]
        label = f"{named(name)} ({sizes(everyone.filter(pl.col('model') == name))})"
        ax.errorbar(
            x[:1], y[:1], xerr=np.abs(x[1:, None] - x[0]), yerr=np.abs(y[1:, None] - y[0]), color=colour, marker=marker,
            markersize=6, linestyle="", elinewidth=1.2, label=label,
        )  # fmt: skip
    best = points[undominated(points)]
    best = best[np.argsort(best[:, 0])]
    ax.step(best[:, 0], best[:, 1], where="pre", color=FAINT, linewidth=1.1, linestyle=(0, (4, 2)), zorder=1)
    ax.set_xlabel(f"{LABELS['accuracy']} (95 % intervals over users)")
    ax.set_ylabel(LABELS[group])
    title = f"{named(cell)}; dashed: no other model is better in both" if len(best) > 1 else named(cell)
    ax.set_title(title, loc="left", fontsize=9, color=INK)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False, fontsize=8)
    return ax


def undominated(points: Float[np.ndarray, "models 2"]) -> Bool[np.ndarray, " models"]:
    """Say which points no other point beats in one number without losing in the other.

    >>> undominated(np.array([[1.0, 3.0], [2.0, 2.0], [1.0, 1.0]])).tolist()
    [True, True, False]
    """
    beaten = [((points >= own).all(-1) & (points > own).any(-1)).any() for own in points]
    return ~np.array(beaten, dtype=bool)


def wrong_user_gap(rows: pl.DataFrame, ax: Axes | None = None, models: Sequence[str] | None = None) -> Axes:
    """Draw how much accuracy the user's own state gains over another user's, by model and cell, with 95 % intervals.

    Zero: the model predicts as well with a stranger's state, so it has learned nothing about the user.
    """
    ax = cells(rows, "wrong_user_gain", ax, models)
    ax.axvline(0, color=FAINT, linewidth=1.2, zorder=1)
    return ax


def _columns(rows: pl.DataFrame) -> list[str]:
    return rows.select(column_name())["column"].unique().sort().to_list()
