"""What does one person like, how does that change with what they say, and where do all people stand?

`rows` are profiles of users as `pluralprefs profile RUN --user ... --out rows.parquet` or `Run.profile` give them, with
the columns of attribute weights and the name of the user in `user`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from jaxtyping import Float

from pluralprefs.plots.profiles import KINDS, attribute_axis
from pluralprefs.plots.style import (
    COLOURS,
    DASHES,
    FAINT,
    INK,
    MARKERS,
    axes,
    label_ends,
    named,
    shot_axis,
    shot_position,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NORMAL = 1.959964


def user_profile(rows: pl.DataFrame, user: str, kind: str = "preference", ax: Axes | None = None) -> Axes:
    """Draw a user's weights beside those of the user's community, attributes down, with 95 % intervals.

    `rows` hold both: the user's profile, and the attribute weights of the run (`pl.concat` of the two). What sets the
    user apart most comes first. Raises ValueError where either is missing.
    """
    shown = rows.filter(pl.col("kind") == kind)
    own = shown.filter(pl.col("user") == user)
    if own.is_empty():
        known = rows["user"].drop_nulls().n_unique()
        raise ValueError(f"user_profile: no rows of user {user!r} and kind {kind!r}; the table has {known} users")
    community = own["community"][0]
    around = shown.filter(pl.col("user").is_null(), pl.col("community") == community)
    if around.is_empty():
        raise ValueError(
            f"user_profile: the rows lack community {community!r}; add the run's attribute_weights to them"
        )
    for part in (own, around):
        if part["attribute"].is_duplicated().any():
            raise ValueError("user_profile: an attribute has several rows; average the seeds with profiles.over_seeds")
    around = own.select("attribute").join(around, on="attribute", how="left", maintain_order="left")
    order = np.argsort(-np.abs(own["mean"].to_numpy() - around["mean"].fill_null(0.0).to_numpy()), kind="stable")
    ax = axes(ax, (5.6, 1.1 + 0.3 * len(order)))
    ax.axvline(0, color=FAINT, linewidth=1)
    parts = ((around, community or "population", INK, "D", 0.14), (own, user, COLOURS[0], "o", -0.14))
    for part, name, colour, marker, offset in parts:
        sorted_ = part[order.tolist()]
        value, low, high = _value_and_interval(sorted_)
        heights = np.arange(len(order)) + offset
        ax.hlines(heights, low, high, color=colour, linewidth=1.6)
        count = sorted_["n"].max()
        name = named(name)
        label = (
            name if count is None else f"{name} ({count:,} {'comparisons' if kind == 'preference' else 'responses'})"
        )
        ax.plot(value, heights, marker, color=colour, markersize=5, label=label)
    attribute_axis(ax, own["attribute"][order.tolist()].to_list())
    ax.set_xlabel(f"{KINDS.get(kind, kind)} (95 % intervals)")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=8, borderaxespad=0.2)
    return ax


def profile_by_shots(
    rows: pl.DataFrame, kind: str = "preference", ax: Axes | None = None, attributes: Sequence[str] | None = None
) -> Axes:
    """Draw how one user's weights move as comparisons arrive, a line with 95 % intervals for each attribute.

    `rows` are the user's profiles with a column `shots`: those of `run.profile(run.adapt(table.head(n)))` for each n,
    and of `run.profile({user: run.prior()})` for 0. Without `attributes`, the four are drawn that move most.
    """
    shown = rows.filter(pl.col("kind") == kind)
    if shown.is_empty() or "shots" not in shown.columns:
        raise ValueError(f"profile_by_shots: needs rows of kind {kind!r} with a column shots")
    if shown.select("attribute", "shots").is_duplicated().any():
        raise ValueError("profile_by_shots: a point has several rows (users or seeds); filter to one")
    moved = shown.sort("shots").group_by("attribute", maintain_order=True).agg(
        (pl.col("mean").last() - pl.col("mean").first()).abs()
    )  # fmt: skip
    names = moved.sort("mean", descending=True)["attribute"][:4].to_list() if attributes is None else list(attributes)
    if len(names) > len(COLOURS) or set(names) - set(shown["attribute"]):
        raise ValueError(f"profile_by_shots: choose up to {len(COLOURS)} of {', '.join(moved['attribute'])}")
    ax, labels = axes(ax, (6.4, 4.0)), []
    ax.axhline(0, color=FAINT, linewidth=1)
    aside = np.linspace(-0.12, 0.12, len(names)) if len(names) > 1 else np.zeros(1)  # bands would pile up
    for place, name in enumerate(names):
        part = shown.filter(pl.col("attribute") == name).sort("shots")
        x, (value, low, high) = shot_position(part["shots"].to_numpy()) + aside[place], _value_and_interval(part)
        ax.vlines(x, low, high, color=COLOURS[place], linewidth=1.4)
        style = {"marker": MARKERS[place], "linestyle": DASHES[place % len(DASHES)]}
        ax.plot(x, value, color=COLOURS[place], markersize=5, linewidth=1.8, zorder=3, **style)
        labels.append((float(value[-1]), name, COLOURS[place]))
    shot_axis(ax, shown, float(shot_position(shown["shots"].max() or 0)) + 0.3)
    ax.set_xlim(left=float(shot_position(shown["shots"].min() or 0)) - 0.3)
    ax.set_ylabel(KINDS.get(kind, kind))
    ax.set_title("one user; bars: 95 % intervals", loc="left", fontsize=9, color=INK)
    label_ends(ax, labels)
    return ax


def user_map(rows: pl.DataFrame, kind: str = "preference", ax: Axes | None = None) -> Axes:
    """Draw users in the plane that holds most of their variation (principal components), coloured by community.

    `rows` are profiles of users: a user's position is their weights on all attributes. States of another family can be
    drawn as such rows, one for each coordinate. The large marker is a community's mean with its 95 % interval along
    both axes. Users are not named: ids are personal data. Raises ValueError for fewer than three users.
    """
    shown = rows.filter(pl.col("kind") == kind, pl.col("user").is_not_null())
    if shown["user"].n_unique() < 3:
        raise ValueError(f"user_map: {shown['user'].n_unique()} users of kind {kind!r}; a map needs three")
    if shown.select("user", "attribute").is_duplicated().any():
        raise ValueError("user_map: a user has several rows for one attribute (seeds or runs); filter to one")
    table = shown.pivot(on="attribute", index=["user", "community"], values="mean").fill_null(0.0)
    place, share = principal_plane(table.select(pl.exclude("user", "community")).to_numpy())
    ax = axes(ax, (5.8, 4.6))
    names = table["community"].unique().sort().to_list()
    for number, name in enumerate(names):
        own = place[(table["community"] == name).to_numpy()]
        colour = COLOURS[number % len(COLOURS)]
        marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
        ax.scatter(*own.T, s=16, color=colour, marker=marker, alpha=0.55, linewidth=0)
        mean, half = own.mean(0), NORMAL * own.std(0, ddof=min(1, len(own) - 1)) / np.sqrt(len(own))
        label = f"{named(name or 'no community')} ({len(own):,} user{'s' if len(own) > 1 else ''})"
        ax.errorbar(
            *mean[:, None], xerr=half[:1], yerr=half[1:], color=colour, marker=marker, markersize=9, linestyle="",
            markeredgecolor="white", elinewidth=1.6, zorder=4, label=label,
        )  # fmt: skip
    for axis, part in zip((ax.xaxis, ax.yaxis), share, strict=True):
        axis.set_label_text(f"component {1 if axis is ax.xaxis else 2} ({100 * part:.0f} % of the variance)")
    ax.set_aspect("equal", "datalim")
    ax.locator_params(nbins=6)
    ax.set_title("large: mean of a community, 95 % interval", loc="left", fontsize=9, color=INK)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    return ax


def principal_plane(
    states: Float[np.ndarray, "users size"],
) -> tuple[Float[np.ndarray, "users 2"], Float[np.ndarray, " 2"]]:
    """Project onto the first two principal components; also say which share of the variance each holds.

    >>> principal_plane(np.array([[0.0, 0.0], [3.0, 0.0], [6.0, 0.0]]))[1].tolist()
    [1.0, 0.0]
    """
    centred = states - states.mean(0)
    left, size, right = np.linalg.svd(centred, full_matrices=False)
    sign = np.where(right[np.arange(len(right)), np.abs(right).argmax(1)] < 0, -1.0, 1.0)  # the same on every machine
    plane = np.zeros((len(states), 2))
    plane[:, : min(2, len(size))] = (left * size * sign)[:, :2]
    share = np.zeros(2)
    share[: min(2, len(size))] = (size**2 / max((size**2).sum(), 1e-300))[:2]
    return plane, share


def _value_and_interval(part: pl.DataFrame) -> Float[np.ndarray, "3 rows"]:
    columns = part.select("mean", pl.col("ci_low", "ci_high").fill_null(pl.col("mean")))
    return columns.cast(pl.Float64).to_numpy().T
