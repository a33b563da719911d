"""Did training converge? The loss of each epoch, from the table `training` of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from pluralprefs.plots.style import BACK, COLOURS, DASHES, INK, MARKERS, axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NORMAL = 1.959964


def training_curves(rows: pl.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the loss against the epoch: thin, every training of a seed (folds and halves too); thick, their mean.

    The mean is over the epochs that all trainings of the seed reach, with its 95 % interval over trainings. `rows` are
    the table `training` of one run. Raises ValueError where they are not.
    """
    lacking = {"seed", "training", "epoch", "loss"} - set(rows.columns)
    if lacking or rows.is_empty():
        raise ValueError(f"training_curves: no rows to draw, or no column {', '.join(sorted(lacking)) or 'with rows'}; "
                         "the table `training` of a run that was trained by gradient has them")  # fmt: skip
    if rows.select("seed", "training", "epoch").is_duplicated().any():
        raise ValueError("training_curves: an epoch has several rows (several runs); filter to one run")
    ax = axes(ax, (6.0, 3.8))
    for place, ((seed,), part) in enumerate(rows.sort("seed").group_by(["seed"], maintain_order=True)):
        colour, dashes = COLOURS[place % len(COLOURS)], DASHES[place % len(DASHES)]
        lines = [one.sort("epoch") for _, one in part.group_by(["training"], maintain_order=True)]
        for one in lines:
            ax.plot(one["epoch"], one["loss"], color=colour, linewidth=0.7, alpha=0.4, zorder=1)
        mean = _mean(part, len(lines))
        label = f"seed {seed}: mean of {len(lines)} training{'s' if len(lines) > 1 else ''}"
        ax.plot(
            mean["epoch"], mean["loss"], color=colour, linewidth=2, linestyle=dashes, zorder=3, label=label,
            marker=MARKERS[place % len(MARKERS)], markersize=4, markevery=max(1, len(mean) // 8),
        )  # fmt: skip
        if len(lines) > 1:
            low, high = (mean["loss"] + sign * mean["half"] for sign in (-1, 1))
            ax.fill_between(mean["epoch"], low, high, color=colour, alpha=0.15, linewidth=0)
    ax.locator_params(axis="x", integer=True)
    ax.set_xlabel("epoch")
    ax.set_ylabel("loss, nats per comparison and penalties")
    ax.grid(axis="y", color=BACK, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.set_title("thin: each training; bands: 95 % intervals of the mean", loc="left", fontsize=9, color=INK)
    ax.legend(loc="upper right", frameon=False, fontsize=8)
    return ax


def _mean(part: pl.DataFrame, trainings: int) -> pl.DataFrame:
    """Mean loss of the epochs that all trainings reach, with half its 95 % interval."""
    by_epoch = part.group_by("epoch").agg(pl.col("loss").mean(), sd=pl.col("loss").std(), n=pl.len()).sort("epoch")
    shared = by_epoch.filter(pl.col("n") == trainings)
    return shared.with_columns(half=NORMAL * pl.col("sd").fill_null(0.0) / np.sqrt(trainings))
