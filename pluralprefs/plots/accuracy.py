"""How well does each model predict? Metric rows as curves over shots, and as dots by model and cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from pluralprefs.plots.style import (
    BACK,
    COLOURS,
    DASHES,
    FAINT,
    INK,
    LABELS,
    MARKERS,
    axes,
    axis_factor,
    chosen,
    label_ends,
    named,
    one_row_each,
    shot_axis,
    shot_position,
    sizes,
    value_and_interval,
)
from pluralprefs.results import column_name, column_order

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def shot_curve(
    rows: pl.DataFrame,
    metric: str = "accuracy",
    ax: Axes | None = None,
    cell: str | None = None,
    models: Sequence[str] | None = None,
    bayes: float | None = None,
) -> Axes:
    """Draw a metric against the number of comparisons a new user has given, one line and band per model.

    `rows` are metric rows of one seed or pooled seeds. A model that does not look at the shots (`shots` null, or the
    same value throughout) is a grey horizontal line. `bayes` is the best reachable value. `cell` must be
    named where `rows` hold several cells with shots. Raises ValueError where nothing is left to draw.
    """
    shown = chosen(rows, metric, models)
    cells = [cell] if cell else shown.filter(pl.col("shots").is_not_null())["cell"].unique().sort().to_list()
    if len(cells) != 1:
        raise ValueError(f"shot_curve: name one cell with shots; the rows have {', '.join(cells) or 'none'}")
    shown = shown.filter(pl.col("cell") == cells[0])
    one_row_each(shown, ["model", "shots"], "shot_curve")
    ax, factor = axes(ax, (6.4, 4.0)), axis_factor(metric)
    curves = [name for name in dict.fromkeys(shown["model"]) if _has_curve(shown, name)]
    labels = [_draw_curve(ax, shown, name, position, factor) for position, name in enumerate(curves)]
    flat = [name for name in dict.fromkeys(shown["model"]) if name not in curves]
    end = float(shot_position(shown["shots"].max() or 0))
    labels += [_draw_level(ax, shown, name, end + 0.18 + 0.12 * place, factor) for place, name in enumerate(flat)]
    if bayes is not None:
        ax.axhline(bayes * factor, color=INK, linewidth=1, linestyle=(0, (1, 2)))
        labels.append((bayes * factor, "Bayes bound", INK))
    shot_axis(ax, shown, end + 0.15 + 0.12 * len(flat))
    ax.set_ylabel(LABELS.get(metric, metric))
    ax.set_title(f"{named(cells[0])}: {sizes(shown)}; 95 % intervals over users", loc="left", fontsize=9, color=INK)
    label_ends(ax, labels)
    return ax


def cells(
    rows: pl.DataFrame,
    metric: str = "accuracy",
    ax: Axes | None = None,
    models: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
) -> Axes:
    """Draw a dot with its interval for every model (down) and cell (colour and marker), best model on top.

    `columns` chooses cells, with shots as "unseen/testpair@8"; at most seven can be told apart.
    """
    shown = chosen(rows, metric, models).with_columns(column_name())
    names = column_order(shown) if columns is None else list(columns)
    if len(names) > len(COLOURS):
        raise ValueError(f"cells: {len(names)} cells cannot be told apart; choose up to {len(COLOURS)} with columns=")
    shown = shown.filter(pl.col("column").is_in(names))
    one_row_each(shown, ["model", "column"], "cells")
    order = _best_last(shown, metric)
    ax, factor = axes(ax, (6.4, 0.9 + 0.16 * len(order) * (len(names) + 1.2))), axis_factor(metric)
    offsets = np.linspace(0.3, -0.3, len(names)) if len(names) > 1 else np.zeros(1)
    for position, (name, offset) in enumerate(zip(names, offsets, strict=True)):
        part = shown.filter(pl.col("column") == name)
        heights = np.array([order.index(model) + offset for model in part["model"]])
        value, low, high = value_and_interval(part, factor)
        ax.hlines(heights, low, high, color=COLOURS[position], linewidth=1.6)
        label = f"{named(name)} ({sizes(part)})"
        ax.plot(value, heights, MARKERS[position], color=COLOURS[position], markersize=5, label=label)
    ax.set_yticks(range(len(order)), [named(name) for name in order])
    ax.set_ylim(-0.6, len(order) - 0.4)
    for height in np.arange(len(order) - 1) + 0.5:
        ax.axhline(height, color=BACK, linewidth=0.8, zorder=0)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color=BACK, linewidth=0.8)
    ax.set_xlabel(f"{LABELS.get(metric, metric)} (95 % intervals over users)")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=1, frameon=False, fontsize=8, borderaxespad=0.2)
    return ax


def _draw_curve(ax: Axes, shown: pl.DataFrame, model: str, position: int, factor: float) -> tuple[float, str, str]:
    part = shown.filter(pl.col("model") == model, pl.col("shots").is_not_null()).sort("shots")
    x = shot_position(part["shots"].to_numpy())
    value, low, high = value_and_interval(part, factor)
    colour = COLOURS[position % len(COLOURS)]
    ax.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
    marker, dashes = MARKERS[position % len(MARKERS)], DASHES[position % len(DASHES)]
    ax.plot(x, value, color=colour, marker=marker, markersize=5, linewidth=1.8, linestyle=dashes, zorder=3)
    return float(value[-1]), model, colour


def _draw_level(ax: Axes, shown: pl.DataFrame, model: str, x: float, factor: float) -> tuple[float, str, str]:
    """A grey line across, with its interval as an upright bar at `x` in the right margin: bands would pile up."""
    value, low, high = value_and_interval(shown.filter(pl.col("model") == model).head(1), factor)
    ax.axhline(value[0], color=FAINT, linewidth=1.1, linestyle=DASHES[1], zorder=2)
    ax.vlines(x, low[0], high[0], color=FAINT, linewidth=2.2)
    ax.plot([x], value[:1], "_", color=FAINT, markersize=5)
    return float(value[0]), model, "#6a6a6a"


def _has_curve(shown: pl.DataFrame, model: str) -> bool:
    part = shown.filter(pl.col("model") == model, pl.col("shots").is_not_null())
    return part["shots"].n_unique() > 1 and part["value"].n_unique() > 1


def _best_last(shown: pl.DataFrame, metric: str) -> list[str]:
    means = shown.group_by("model", maintain_order=True).agg(pl.col("value").mean())
    return means.sort("value", descending=axis_factor(metric) == 1.0, maintain_order=True)["model"].to_list()
