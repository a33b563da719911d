"""What does each community like? Attribute weights as a heat map, as dots with intervals, and as a radar.

`rows` are the attribute weights of a run, one row for each community and attribute: of one seed, or averaged over seeds
by `profiles.over_seeds`. The community "" is the population.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Bool, Float

from pluralprefs.plots.style import BACK, COLOURS, FAINT, INK, MARKERS, axes, named

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = {
    "preference": "preference, log-odds per unit of the score",
    "attention": "attention, share",
    "ablation": "loss without the attribute, nats per comparison",
    "shapley": "Shapley value, nats per comparison",
}
COUNTED = {"preference": "comparisons", "attention": "responses", "ablation": "test rows", "shapley": "test rows"}
POPULATION = "population"
NEGATIVE, MIDDLE, POSITIVE, UNSURE = "#B8480A", "#FFFFFF", "#00568A", "#dedede"
NUMBERED = 160  # cells, at most, that have their number written in


class Grid(NamedTuple):
    """Means and their bounds, [communities, attributes], NaN where unknown, and the number behind each community."""

    communities: list[str]
    attributes: list[str]
    mean: Float[np.ndarray, "communities attributes"]
    low: Float[np.ndarray, "communities attributes"]
    high: Float[np.ndarray, "communities attributes"]
    n: list[int]


def heat_map(
    rows: pl.DataFrame,
    kind: str = "preference",
    ax: Axes | None = None,
    against: str = "population",
    like: pl.DataFrame | None = None,
) -> Axes:
    """Draw how far each community departs from all, attribute by attribute; alike ones stand side by side.

    `against` is "population", or "communities" for the mean of the communities in `rows`. Communities (down) and
    attributes (across) are in the order of average-linkage clustering. A cell whose 95 % interval crosses zero, or has
    none, is grey; the errors of a community and of what it is compared with are taken as independent, and an unknown
    interval of the population adds nothing. Seeds may disagree widely about the population and agree about what
    tells communities apart: then choose "communities". `like` are rows of a second map whose order and colours this one
    takes, so that the two can stand side by side. Raises ValueError where `rows` lack the kind, the population, or what
    `like` has.
    """
    grid = deviations(grid_of(rows, kind, "heat_map"), against)
    model = grid if like is None else deviations(grid_of(like, kind, "heat_map"), against)
    model = _clustered(model)
    grid = pick(grid, model.communities, model.attributes, "heat_map")
    count, wide = grid.mean.shape
    ax = axes(ax, (2.6 + 0.5 * wide, 1.9 + 0.34 * count))
    sure, limit = _sure(grid), _limit(model)
    image = ax.imshow(np.where(sure, grid.mean, np.nan), cmap=_colours(), vmin=-limit, vmax=limit, aspect="auto")
    ax.set_xticks(
        range(wide), [named(name) for name in grid.attributes], rotation=40, ha="right", rotation_mode="anchor"
    )
    ax.set_yticks(range(count), [_counted(name, n) for name, n in zip(grid.communities, grid.n, strict=True)])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xticks(np.arange(wide - 1) + 0.5, minor=True)
    ax.set_yticks(np.arange(count - 1) + 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=1.5)
    ax.tick_params(which="minor", length=0)
    _write_cells(ax, grid.mean, sure, limit, numbers=grid.mean.size <= NUMBERED)
    if ax.figure is not None:
        bar = ax.figure.colorbar(image, ax=ax, shrink=0.9, pad=0.02, aspect=max(8, 4 * count))
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.set_label(f"{_unit(kind)}\nminus the {_reference(against)}'s", fontsize=8, color=INK)
        bar.ax.tick_params(labelsize=8, colors=INK, length=2)
    title = f"grey: the 95 % interval crosses zero, or is unknown; n: {COUNTED.get(kind, 'rows')}"
    ax.set_title(title, loc="left", fontsize=9, color=INK)
    return ax


def profile_dots(
    rows: pl.DataFrame,
    kind: str = "preference",
    ax: Axes | None = None,
    communities: Sequence[str] | None = None,
    attributes: Sequence[str] | None = None,
    truth: pl.DataFrame | None = None,
) -> Axes:
    """Draw the weights of a few communities as dots with 95 % intervals, attributes down, the population in black.

    `communities` (six at most beside the population) and `attributes` choose and order; without the latter, what is
    liked most on average comes first. `truth` are rows of the true weights, where they are known: upright bars. Raises
    ValueError where more communities are asked for than can be told apart, or where `truth` lacks one that is drawn.
    """
    grid = grid_of(rows, kind, "profile_dots")
    names = [name for name in grid.communities if name != POPULATION] if communities is None else list(communities)
    names += [POPULATION] if POPULATION in grid.communities else []
    grid = pick(grid, names, attributes, "profile_dots")
    if len(names) > len(COLOURS):
        raise ValueError(f"profile_dots: {len(names)} communities cannot be told apart; choose up to six, or heat_map")
    if attributes is None:
        grid = _reordered(grid, np.arange(len(names)), np.argsort(-np.nanmean(grid.mean, axis=0), kind="stable"))
    known = None
    if truth is not None:
        known = pick(grid_of(truth, kind, "profile_dots"), names, grid.attributes, "profile_dots")
    count, many = len(grid.attributes), len(names)
    ax = axes(ax, (5.6, 1.1 + 0.2 * count * (many * 0.42 + 0.8)))
    offsets = np.linspace(-0.32, 0.32, many) if many > 1 else np.zeros(1)
    ax.axvline(0, color=FAINT, linewidth=1)
    for place, name in enumerate(names):
        colour = INK if name == POPULATION else COLOURS[place]
        heights = np.arange(count) + offsets[place]
        ax.hlines(heights, grid.low[place], grid.high[place], color=colour, linewidth=1.5)
        label = _counted(name, grid.n[place])
        ax.plot(grid.mean[place], heights, MARKERS[place], color=colour, markersize=4.5, label=label)
        if known is not None:
            last = "truth" if place == many - 1 else None
            ax.plot(known.mean[place], heights, "|", color=INK, markersize=9, markeredgewidth=1.4, label=last, zorder=4)
    attribute_axis(ax, grid.attributes)
    ax.set_xlabel(f"{_unit(kind)} (95 % intervals)")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=8, borderaxespad=0.2)
    return ax


def radar(
    rows: pl.DataFrame,
    kind: str = "preference",
    ax: Axes | None = None,
    communities: Sequence[str] | None = None,
    attributes: Sequence[str] | None = None,
) -> Axes:
    """Draw up to four communities on 3 to 12 attributes as closed lines with bands; the dashed circle is zero.

    Areas of a radar mislead: `profile_dots` shows the same and reads better. `ax` must be polar.
    """
    grid = grid_of(rows, kind, "radar")
    names = [name for name in grid.communities if name != POPULATION] if communities is None else list(communities)
    grid = pick(grid, names, attributes, "radar")
    if len(names) > 4 or not 3 <= len(grid.attributes) <= 12:
        raise ValueError(f"radar: draws up to 4 communities on 3 to 12 attributes, not {len(names)} on "
                         f"{len(grid.attributes)}; choose some, or use profile_dots")  # fmt: skip
    if ax is None:
        from matplotlib.figure import Figure

        ax = Figure(figsize=(4.4, 4.4), layout="constrained", dpi=150).add_subplot(projection="polar")
    if ax.name != "polar":
        raise ValueError('radar: needs polar Axes: figure.add_subplot(projection="polar")')
    closed = [*range(len(grid.attributes)), 0]
    angle = 2 * np.pi * np.arange(len(closed)) / len(grid.attributes)
    circle = np.linspace(0, 2 * np.pi, 181)
    ax.plot(circle, np.zeros_like(circle), color=FAINT, linewidth=1, linestyle=(0, (4, 2)))
    for place, name in enumerate(names):
        mean, low, high = (part[place][closed] for part in (grid.mean, grid.low, grid.high))
        ax.fill_between(angle, low, high, color=COLOURS[place], alpha=0.14, linewidth=0)
        label = _counted(name, grid.n[place])
        ax.plot(angle, mean, marker=MARKERS[place], color=COLOURS[place], linewidth=1.5, markersize=4, label=label)
    ax.set_xticks(angle[:-1], [named(name) for name in grid.attributes])
    ax.tick_params(labelsize=8, colors=INK)
    ax.spines["polar"].set_visible(False)
    ax.grid(color=BACK, linewidth=0.8)
    ends = np.concatenate([grid.mean, grid.low, grid.high])
    reach = float(np.nanmax(np.abs(ends), initial=0.0)) or 1.0
    ax.set_ylim(-1.4 * reach, 1.05 * reach)
    ax.set_yticks([-round(reach, 1), 0, round(reach, 1)])
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, frameon=False, fontsize=8)
    ax.set_title(f"{_unit(kind)}; bands: 95 % intervals", fontsize=8, color=INK, pad=14)
    return ax


# Rows as a grid -------------------------------------------------------------------------------------------------------


def grid_of(rows: pl.DataFrame, kind: str, plot: str) -> Grid:
    """Lay the rows of a kind out by community and attribute; users' rows are left out.

    Raises ValueError where there are none, or several for one cell.
    """
    shown = rows.filter(pl.col("kind") == kind, pl.col("user").is_null())
    if shown.is_empty():
        raise ValueError(f"{plot}: no rows of kind {kind!r}; the table has {', '.join(rows['kind'].unique().sort())}")
    if shown.select("community", "attribute").is_duplicated().any():
        raise ValueError(f"{plot}: several rows for one community and attribute (seeds or runs); average the seeds "
                         "with profiles.over_seeds, or filter to one")  # fmt: skip
    names, attributes = (list(dict.fromkeys(shown[column])) for column in ("community", "attribute"))
    place = {name: position for position, name in enumerate(names)}
    at = {name: position for position, name in enumerate(attributes)}
    value = np.full((3, len(names), len(attributes)), np.nan)
    n = [0] * len(names)
    for row in shown.iter_rows(named=True):
        here = place[row["community"]], at[row["attribute"]]
        for layer, column in enumerate(("mean", "ci_low", "ci_high")):
            value[(layer, *here)] = np.nan if row[column] is None else row[column]
        n[here[0]] = max(n[here[0]], row["n"] or 0)
    return Grid([name or POPULATION for name in names], attributes, value[0], value[1], value[2], n)


def deviations(grid: Grid, against: str = "population") -> Grid:
    """Subtract the population, or the mean of the communities, from each community; intervals as in `heat_map`."""
    own = np.array([name != POPULATION for name in grid.communities])
    half = (grid.high - grid.low) / 2
    if not own.any():
        raise ValueError("heat_map: the table has no communities; fit with levels of users that hold community")
    count = int(own.sum())
    if against == "population":
        if own.all():
            raise ValueError('heat_map: the table has no rows of the population (community ""); against="communities"')
        base, others, share = grid.mean[~own][0], np.nan_to_num(half[~own][0]) ** 2, 1.0
    elif against == "communities":
        base = np.nanmean(grid.mean[own], axis=0)
        others = np.nansum(half[own] ** 2, axis=0) / count**2 - np.nan_to_num(half[own]) ** 2 / count**2
        share = (1 - 1 / count) ** 2
    else:
        raise ValueError(f'heat_map: against={against!r}: "population" or "communities"')
    wide = np.sqrt(share * half[own] ** 2 + others)
    mean = grid.mean[own] - base
    names = [name for name, kept in zip(grid.communities, own, strict=True) if kept]
    return Grid(
        names, grid.attributes, mean, mean - wide, mean + wide, [n for n, k in zip(grid.n, own, strict=True) if k]
    )


def pick(grid: Grid, communities: Sequence[str], attributes: Sequence[str] | None, plot: str) -> Grid:
    """Choose and order communities and attributes; ValueError names the first that the table lacks."""
    asked = list(grid.attributes if attributes is None else attributes)
    for wanted, known, word in ((communities, grid.communities, "community"), (asked, grid.attributes, "attribute")):
        for name in wanted:
            if name not in known:
                raise ValueError(f"{plot}: no {word} {name!r}; the table has {', '.join(known)}")
    if not communities:
        raise ValueError(f"{plot}: no community to draw; the table has {', '.join(grid.communities)}")
    down = np.array([grid.communities.index(name) for name in communities])
    return _reordered(grid, down, np.array([grid.attributes.index(name) for name in asked]))


def attribute_axis(ax: Axes, attributes: Sequence[str]) -> None:
    """Name attributes down the y axis, the first on top, with lines between them."""
    ax.set_yticks(range(len(attributes)), [named(name) for name in attributes])
    ax.set_ylim(len(attributes) - 0.45, -0.55)
    for height in np.arange(len(attributes) - 1) + 0.5:
        ax.axhline(float(height), color=BACK, linewidth=0.8, zorder=0)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color=BACK, linewidth=0.8)
    ax.set_axisbelow(True)


def _reordered(grid: Grid, down: np.ndarray, across: np.ndarray) -> Grid:
    mean, low, high = (part[np.ix_(down, across)] for part in (grid.mean, grid.low, grid.high))
    names, attributes = [grid.communities[i] for i in down], [grid.attributes[i] for i in across]
    return Grid(names, attributes, mean, low, high, [grid.n[i] for i in down])


def _clustered(grid: Grid) -> Grid:
    """Order both axes so that alike rows and columns are neighbours."""
    filled = np.nan_to_num(grid.mean)
    return _reordered(grid, _leaves(filled), _leaves(filled.T))


def _sure(grid: Grid) -> Bool[np.ndarray, "communities attributes"]:
    """Say which cells have an interval that leaves zero out."""
    return (grid.low > 0) | (grid.high < 0)


def _limit(grid: Grid) -> float:
    """The largest mean that a map colours: of the cells that are sure, else of all."""
    return float(np.max(np.abs(grid.mean[_sure(grid)]), initial=0.0)) or float(np.nanmax(np.abs(grid.mean))) or 1.0


def _leaves(table: Float[np.ndarray, "rows columns"]) -> np.ndarray:
    from scipy.cluster.hierarchy import leaves_list, linkage

    if len(table) < 3:
        return np.arange(len(table))
    return leaves_list(linkage(table, "average", optimal_ordering=True))


def _colours() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("deviation", [NEGATIVE, MIDDLE, POSITIVE]).with_extremes(bad=UNSURE)


def _write_cells(
    ax: Axes,
    mean: Float[np.ndarray, "rows columns"],
    sure: Bool[np.ndarray, "rows columns"],
    limit: float,
    numbers: bool,
) -> None:
    """Write the number, or where there are many the sign, into every cell that is sure of it: print may be grey."""
    digits = max(0, 1 - int(np.floor(np.log10(limit))))
    for (row, column), value in np.ndenumerate(mean):
        if numbers and np.isfinite(value):
            text = f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "−")
            text = text if float(text.replace("−", "-")) else text[1:]  # no sign on a zero
        elif sure[row, column]:
            text = "+" if value > 0 else "−"
        else:
            continue
        dark = sure[row, column] and abs(value) > 0.55 * limit
        colour = "white" if dark else INK if sure[row, column] else FAINT
        ax.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)


def _counted(name: str, n: int) -> str:
    """A community with the number behind its weights; the truth has none."""
    return f"{named(name)} (n = {n:,})" if n else named(name)


def _unit(kind: str) -> str:
    return KINDS.get(kind, kind)


def _reference(against: str) -> str:
    return "population" if against == "population" else "mean community"
