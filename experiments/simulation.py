"""Question: on worlds that obey a family's own assumptions, how near does the family come to the best possible?

Command: python experiments/simulation.py [bayes|prototypes|coverage|cyclic ...]         (or: make test-slow)

bayes       each family on its own world, against the posterior predictive under the true prior and the true shared
            parameters given the same comparisons: no method can beat it except by luck
prototypes  ideal points with 1 to 2 K* prototypes on a world with K* of them
coverage    how often 90 % intervals hold the true log-odds of held-out comparisons, averaged over new users drawn from
            the prior (80 users in each of three worlds), from 0 to 10 K comparisons each
cyclic      a balanced rock-paper-scissors world, where a scalar reward orders at most two of three pairs

Result (2026-11-21, 2 CPU cores under other load). bayes, 400 users and 40,000 comparisons a world: bradley_terry,
individual and low_rank lie within 0.6 points of the posterior predictive wherever that is above chance (low_rank at 4
shots -0.6 and -1.0); lore -0.2 to -1.4, -2.1 [-3.6, -0.6] at 4 shots on known prompts; ideal_point +0.2 to -1.2 and
ideal_direction +0.7 to -1.6, no interval wholly below -1. coverage of 90 % intervals at 0, K and 10 K comparisons,
three worlds each: 86 to 94 % for all six families, which `make test-slow` asserts. Before the variance of shared
parameters was added (`pooling.shared_variance`) ideal_point fell to 82 % and ideal_direction to 81 % at 10 K, since the
prototypes were taken as known; a residual variance learned on validation came out as 0 and did not mend it.
prototypes: accuracy rises up to K = K* = 3 and then stays (same target). cyclic: all three families at 41 to 53 %.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console

from pluralprefs.data import splits
from pluralprefs.data.simulate import (
    World,
    bayes_predictions,
    covered,
    cyclic,
    hierarchical,
    ideal_direction,
    ideal_point,
    low_rank,
    posterior_predictive,
)
from pluralprefs.evaluate import evaluate
from pluralprefs.experiment import Experiment, prepare
from pluralprefs.models.bradley_terry import BradleyTerry
from pluralprefs.models.ideal_point import IdealDirection, IdealPoint
from pluralprefs.models.low_rank import LowRank
from pluralprefs.seeds import fit_seed
from pluralprefs.users import Pooled

SHOTS = (0, 4, 16, 32)
MAP = {"gain": False, "cross_fit": None}
console = Console(width=140, soft_wrap=True)


@dataclass(frozen=True)
class Case:
    """A family on its own world: `world` draws it, `experiment` holds the parts of the family."""

    world: Callable[..., World]
    experiment: dict[str, Any] = field(default_factory=dict)


CASES = {
    "bradley_terry": Case(
        partial(hierarchical, users=400, items=200, comparisons_per_user=100),
        {"model": partial(BradleyTerry.init, item_effects=False),
         "users": Pooled(levels=("community", "user"), **MAP)},
    ),
    "individual": Case(
        partial(hierarchical, users=400, items=200, comparisons_per_user=100, population_std=0.0, community_std=0.0),
        {"model": partial(BradleyTerry.init, item_effects=False), "users": Pooled(population=False, **MAP)},
    ),
    "low_rank": Case(
        partial(low_rank, users=400, items=1000, comparisons_per_user=100),
        {"model": partial(LowRank.init, rank=3), "users": Pooled(covariance="full", **MAP)},
    ),
    "lore": Case(
        partial(low_rank, users=400, items=1000, comparisons_per_user=100, weights="softmax", scale=4.0),
        {"model": partial(LowRank.init, rank=3, weights="simplex"), "users": Pooled(strength=1.0, **MAP)},
    ),
    "ideal_point": Case(
        partial(ideal_point, users=400, items=2000, comparisons_per_user=100, mixture="softmax"),
        {"model": partial(IdealPoint.init, prototypes=3, hidden=()), "users": Pooled(strength=1.0, **MAP)},
    ),
    "ideal_direction": Case(
        partial(ideal_direction, users=400, items=2000, comparisons_per_user=100, mixture="softmax"),
        {"model": partial(IdealDirection.init, prototypes=3, hidden=()), "users": Pooled(strength=1.0, **MAP)},
    ),
}  # fmt: skip


def predictions(world: World, parts: dict[str, Any], shots: tuple[int, ...] = SHOTS, seed: int = 0) -> pl.DataFrame:
    """Fit a family to a world, as any data would be, and predict its test cells."""
    table = world.attribute_table()
    experiment = Experiment(data=lambda: table, shots=shots, draws=1, controls=False, **parts)
    prepared = prepare(experiment, table, progress=False)
    fitted = fit_seed(experiment, prepared, seed)
    draws = splits.support_draws(table, shots=shots, draws=1)
    return evaluate(fitted, prepared.features, table, prepared.rows, draws, model="family", shots=shots, controls=False)


def bayes(world: World, shots: tuple[int, ...] = SHOTS) -> pl.DataFrame:
    """Predict the same rows under the true prior and the true shared parameters."""
    draws = splits.support_draws(world.table, shots=shots, draws=1)
    curve = bayes_predictions(world, draws, shots=shots, samples=2048)
    known = world.table.filter(pl.col("cell").is_in(["train", "validation", "train_only_final"]))
    asked = world.table.filter(pl.col("cell").is_in(["seen/testpair", "seen/newprompt"]))
    seen = posterior_predictive(world, known, asked, samples=2048)
    names = ["example_id", "cell", "shots", "log_odds", "target"]
    curve = curve.select(names)
    seen = seen.with_columns(shots=pl.lit(None, curve["shots"].dtype)).select(names)
    return pl.concat([curve, seen])


def compare(world: World, parts: dict[str, Any], shots: tuple[int, ...] = SHOTS) -> pl.DataFrame:
    """Accuracy (in points) and NLL of the family and of Bayes, and their difference with a 95 % interval over users."""
    own = predictions(world, parts, shots).select("example_id", "cell", "shots", "log_odds", "user_id")
    both = own.join(bayes(world, shots), on=["example_id", "cell", "shots"], nulls_equal=True, suffix="_bayes")
    right = lambda name: ((pl.col(name) > 0) == (pl.col("target") > 0.5)).cast(pl.Float64) * 100  # noqa: E731
    signed = lambda name: pl.col(name) * (1 - 2 * pl.col("target"))  # noqa: E731
    nats = lambda name: signed(name).exp().log1p()  # noqa: E731
    rows = both.with_columns(accuracy=right("log_odds"), bayes=right("log_odds_bayes"), nll=nats("log_odds"),
                             bayes_nll=nats("log_odds_bayes"))  # fmt: skip
    found = []
    for (cell, count), part in rows.partition_by("cell", "shots", as_dict=True).items():
        low, high = interval(part["accuracy"] - part["bayes"], part["user_id"])
        found.append({"cell": cell, "shots": count, "rows": part.height, "low": low, "high": high}
                     | {name: part[name].mean() for name in ("accuracy", "bayes", "nll", "bayes_nll")})  # fmt: skip
    return pl.DataFrame(found).sort("cell", "shots")


def interval(values: pl.Series, users: pl.Series, draws: int = 1000) -> tuple[float, float]:
    """95 % interval of a mean under a bootstrap of users."""
    totals = pl.DataFrame({"value": values, "user": users}).group_by("user").agg(pl.col("value").sum(), n=pl.len())
    pick = np.random.default_rng(0).integers(totals.height, size=(draws, totals.height))
    means = totals["value"].to_numpy()[pick].sum(1) / totals["n"].to_numpy()[pick].sum(1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def coverage(world: World, parts: dict[str, Any], shots: tuple[int, ...]) -> pl.DataFrame:
    """Share of held-out comparisons of new users whose true log-odds lie in the 90 % interval, by shots."""
    return covered(predictions(world, parts, shots).filter(pl.col("shots").is_not_null()), world)


def show_bayes() -> None:
    """Print the gap of every family on its own world."""
    for name, case in CASES.items():
        world = case.world()
        console.print(f"\n{name} on {world.name}: {len(world.user_ids)} users, {world.table.height} comparisons, "
                      f"{len(world.item_ids)} items")  # fmt: skip
        for row in compare(world, case.experiment).iter_rows(named=True):
            at = "" if row["shots"] is None else f"@{row['shots']}"
            console.print(f"  {row['cell'] + at:22s} {row['accuracy']:5.1f} against {row['bayes']:5.1f}: "
                          f"{row['accuracy'] - row['bayes']:+.1f} [{row['low']:+.1f}, {row['high']:+.1f}] points; "
                          f"NLL {row['nll']:.3f} against {row['bayes_nll']:.3f}", highlight=False)  # fmt: skip


def prototypes(true: int, counts: tuple[int, ...], seeds: tuple[int, ...], mixture: str) -> pl.DataFrame:
    """Accuracy in points against the number of prototypes, one row a count: seen users, new users after 16 shots."""
    rows = []
    for count in counts:
        model = partial(IdealPoint.init, prototypes=count, hidden=())
        parts = CASES["ideal_point"].experiment | {"model": model}
        found = []
        for seed in seeds:
            world = ideal_point(
                users=200, items=300, comparisons_per_user=80, prototypes=true, mixture=mixture, seed=seed
            )
            asked = correct(predictions(world, parts, (0, 16), seed))
            new = asked.filter(pl.col("cell") == "unseen/testpair", shots=16)
            found.append([asked.filter(pl.col("cell") == "seen/testpair")["right"].mean(), new["right"].mean()])
        mean, spread = np.mean(found, axis=0), np.std(found, axis=0)
        rows.append({"prototypes": count, "seen": mean[0], "seen_sd": spread[0], "new": mean[1], "new_sd": spread[1]})
    return pl.DataFrame(rows)


def correct(rows: pl.DataFrame) -> pl.DataFrame:
    """Add `right`: 100 where the prediction has the label's sign."""
    return rows.with_columns(right=((pl.col("log_odds") > 0) == (pl.col("target") > 0.5)).cast(pl.Float64) * 100)


def show_prototypes(true: int = 3, seeds: tuple[int, ...] = (0, 1, 2)) -> None:
    """Print accuracy against the number of prototypes."""
    for mixture in ("one_hot", "dirichlet"):
        for row in prototypes(true, tuple(range(1, 2 * true + 1)), seeds, mixture).iter_rows(named=True):
            console.print(f"{mixture}, K* = {true}, K = {row['prototypes']}: seen/testpair {row['seen']:.1f} "
                          f"(sd {row['seen_sd']:.1f}), unseen/testpair@16 {row['new']:.1f} (sd {row['new_sd']:.1f})",
                          highlight=False)  # fmt: skip


def show_coverage(seeds: tuple[int, ...] = (0, 1, 2)) -> None:
    """Print coverage of 90 % intervals by family and shots, over several worlds; K is the size of the user state."""
    for name, case in CASES.items():
        size = 8 if name in ("bradley_terry", "individual") else 3
        shots = (0, size // 2, size, 2 * size, 5 * size, 10 * size)
        found = pl.concat([coverage(case.world(seed=seed), case.experiment, shots) for seed in seeds])
        mean = (pl.col("inside") * pl.col("rows")).sum() / pl.col("rows").sum()
        for row in found.group_by("cell", "shots").agg(mean, pl.col("rows").sum()).sort("cell", "shots").to_dicts():
            console.print(f"{name}: {row['cell']}@{row['shots']}: {100 * row['inside']:.1f} % of {row['rows']}",
                          highlight=False)  # fmt: skip


def cycles(name: str) -> pl.DataFrame:
    """Accuracy in points of a scalar family on a balanced cyclic world, by cell and shots."""
    parts = dict(CASES[name].experiment)
    if name == "bradley_terry":
        parts["users"] = Pooled(**MAP)
    rows = correct(predictions(cyclic(users=100), parts, (0, 16)))
    return rows.group_by("cell", "shots").agg(pl.col("right").mean(), rows=pl.len()).sort("cell", "shots")


def show_cyclic() -> None:
    """Print accuracy of scalar families on a world without a scalar order."""
    for name in ("bradley_terry", "low_rank", "ideal_point"):
        for row in cycles(name).iter_rows(named=True):
            console.print(
                f"{name}: {row['cell']}@{row['shots']}: {row['right']:.1f} % of {row['rows']}", highlight=False
            )


SECTIONS = {"bayes": show_bayes, "prototypes": show_prototypes, "coverage": show_coverage, "cyclic": show_cyclic}

if __name__ == "__main__":
    unknown = set(sys.argv[1:]) - set(SECTIONS)
    if unknown:
        sys.exit(f"{', '.join(sorted(unknown))}: none of {', '.join(SECTIONS)}")
    for section in sys.argv[1:] or SECTIONS:
        console.print(f"\n[bold]{section}[/bold]")
        SECTIONS[section]()
