"""What all pictures share: colours, markers, axes, labels at the ends of lines, and the rows that a picture is made of.

Colours are Okabe and Ito's, told apart by colour-blind readers; markers and dashes differ too, for print in grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from jaxtyping import Float

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
INK, FAINT = "#333333", "#8a8a8a"
BACK = "#e4e4e4"
LABELS = {
    "accuracy": "accuracy, %",
    "macro_accuracy": "accuracy, mean over users, %",
    "worst_decile_accuracy": "accuracy, worst tenth of users, %",
    "nll": "NLL, nats per comparison",
    "macro_nll": "NLL, mean over users, nats",
    "brier": "Brier score",
    "ece": "calibration error (ECE), %",
    "worst_community_accuracy": "accuracy, worst community, %",
    "wrong_user_gain": "accuracy gained by the user's own state, points",
}


def named(name: str, longest: int = 40) -> str:
    """Return a name from the data as matplotlib must be given it: no formula, no line break, never hidden, not endless.

    >>> named("_wit at $5"), named("x" * 50, 3)
    (' _wit at \\\\$5', 'xx…')
    """
    text = " ".join(name.split())
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """Return `ax`, or the Axes of a new figure of this size in inches, with the frame and colours of all pictures."""
    if ax is None:
        from matplotlib.figure import Figure  # no pyplot: no window, no global state

        ax = Figure(figsize=size, layout="constrained", dpi=150).add_subplot()
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(FAINT)
    ax.tick_params(colors=INK, labelsize=9)
    return ax


def chosen(rows: pl.DataFrame, metric: str, models: Sequence[str] | None) -> pl.DataFrame:
    """Return the rows of a metric without controls and communities, of `models` in their order."""
    shown = rows.filter(pl.col("metric") == metric, pl.col("control").is_null(), pl.col("community").is_null())
    if models is not None:
        order = {name: place for place, name in enumerate(models)}
        shown = shown.filter(pl.col("model").is_in(list(models)))
        shown = shown.sort(pl.col("model").replace_strict(order, return_dtype=pl.Int64), maintain_order=True)
    if shown.is_empty():
        raise ValueError(
            f"no rows of metric {metric!r} to draw; the table has {', '.join(rows['metric'].unique().sort())}"
        )
    return shown


def one_row_each(shown: pl.DataFrame, keys: list[str], plot: str) -> None:
    """Raise ValueError where a point of the plot would have several rows."""
    twice = shown.filter(pl.struct(keys).is_duplicated())
    if not twice.is_empty():
        raise ValueError(f"{plot}: {twice['model'][0]} has several rows for one point; summarise(..., pool_seeds=True)")


def value_and_interval(part: pl.DataFrame, factor: float) -> Float[np.ndarray, "3 rows"]:
    """Values and bounds in the units of the axis; a missing interval has no width."""
    table = part.select("value", pl.col("ci_low", "ci_high").fill_null(pl.col("value")))
    return factor * table.to_numpy().T


def axis_factor(metric: str) -> float:
    """Return what turns a metric into the units of its axis: 100 for shares."""
    return 100.0 if "accuracy" in metric or metric in ("ece", "flip_rate", "wrong_user_gain") else 1.0


def sizes(part: pl.DataFrame) -> str:
    """Say of how many users and judgements the rows are."""
    return f"{part['users'].max():,} users, {part['count'].max():,} judgements"


def shot_position(shots: Any) -> Float[np.ndarray, "*n"]:
    """Place numbers of shots on the axis: log2(1 + n), so that 0 has a place and doublings are nearly even."""
    return np.asarray(np.log2(1.0 + np.asarray(shots, dtype=float)))


def shot_axis(ax: Axes, shown: pl.DataFrame, end: float) -> None:
    """Put the numbers of shots on the x axis, up to the position `end`."""
    ticks = shown["shots"].drop_nulls().unique().sort().to_list()
    ax.set_xticks(shot_position(ticks), [str(tick) for tick in ticks])
    ax.set_xlim(float(shot_position(ticks[0])) - 0.15, end)
    ax.set_xlabel("comparisons given by the new user (log scale)")
    ax.grid(axis="y", color=BACK, linewidth=0.8)
    ax.set_axisbelow(True)


def label_ends(ax: Axes, labels: list[tuple[float, str, str]], apart: float = 0.055) -> None:
    """Write the lines' names at their right ends, moved up or down just enough not to overlap."""
    low, high = ax.get_ylim()
    wanted = sorted(labels)
    heights = [(value - low) / (high - low) for value, _, _ in wanted]
    for _ in range(50):  # push neighbours apart until all have room
        for index in range(len(heights) - 1):
            short = apart - (heights[index + 1] - heights[index])
            if short > 1e-6:
                heights[index] -= short / 2
                heights[index + 1] += short / 2
    for (value, name, colour), height in zip(wanted, heights, strict=True):
        ax.annotate(
            named(name),
            xy=(1.0, (value - low) / (high - low)),
            xytext=(1.035, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=colour,
            fontsize=9,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 0},
        )
