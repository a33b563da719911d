"""Question: which route to a new user is best from 0 to 32 comparisons, and is any of them worse than its own prior?

Command: PLURALPREFS_DATA=... python experiments/new_users.py [--sets persona_mix,food] [--routes fast_weights]

Every route on every set, one run each, launched as `pluralprefs sweep` does: what the root holds is taken as it is, and
what was stopped goes on. `--show` only lays out what is there. Simulated worlds have 200 users with 60 comparisons each
and the posterior predictive under the true prior beside the routes; the others are those of their own experiment files.

Four tables a set. The shot curve of users unseen in training, five draws: accuracy in % with its 95 % interval over
users, then nats; `bradley_terry` at 0 shots is the population. What shots are worth: nats minus those of the same route
at 0 shots, paired, and the largest rise from one number of shots to the next (none may be above zero by its interval).
The controls at 32 shots: accuracy with the user's own shots minus another user's; predictions that reverse with the
labels; of variational users the coordinates of z that tell users apart. And calibration: the expected calibration
error by shots and, on simulated worlds, how often 90 % intervals of the log-odds hold the truth (empty where a route
says nothing of its own uncertainty).
Result: see LOG.md.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console

from pluralprefs import encoders
from pluralprefs.contrasts import paired_difference
from pluralprefs.data import splits
from pluralprefs.data.simulate import (
    World,
    attribute_table,
    bayes_predictions,
    covered,
    hierarchical,
    ideal_point,
    low_rank,
)
from pluralprefs.describe import describe
from pluralprefs.experiment import Experiment, every_family
from pluralprefs.metrics import summarise
from pluralprefs.registry import RunFolder, list_runs, open_run
from pluralprefs.registry.environment import redact
from pluralprefs.registry.files import plain
from pluralprefs.results import results_table
from pluralprefs.sweep import sweep

SHOTS = (0, 2, 4, 8, 16, 32)
SIZES = {"users": 200, "comparisons_per_user": 60, "items": 300, "seed": 0}
WORLDS = {"hierarchical": hierarchical, "low_rank": low_rank, "ideal_point": ideal_point}
REAL = {"persona_mix": "persona", "persona_cross": "persona", "polis": "polis", "ukpconvarg1": "ukpconvarg1",
        "food": "food"}  # fmt: skip
ROUTES = ("bradley_terry", "individual", "low_rank", "lore", "ideal_point", "fast_weights", "variational",
          "swap_symmetric", "neural_process", "meta_reward", "set_pooled")  # fmt: skip
WITH_PEERS = ("low_rank", "lore")
NEW = ("unseen/testpair", "unseen/newprompt")
console = Console(width=170, soft_wrap=True)


def experiments(name: str, seeds: tuple[int, ...]) -> dict[str, Experiment]:
    """The experiment of every route on a set."""
    if name in WORLDS:
        found = every_family(
            seeds=seeds, data=partial(attribute_table, name, **SIZES), encoder=partial(encoders.load, "attributes"),
            features={}, data_name=f"new_users_{name}", shots=SHOTS,
        )  # fmt: skip
        peers = {route: replace(found[route], users=replace(found[route].users, peers=128)) for route in WITH_PEERS}
        return {route: (found | peers)[route] for route in ROUTES}
    module = import_module(REAL[name])
    prefix = f"{name.partition('_')[2]}_" if name.startswith("persona") else ""
    own = {route: module.experiments[prefix + route] for route in ROUTES}
    return {route: replace(one, seeds=one.seeds[: len(seeds)]) for route, one in own.items()}


def curves(world: World) -> pl.DataFrame:
    """Predictions of the posterior predictive under the true prior."""
    table = world.attribute_table()
    draws = splits.support_draws(table, shots=SHOTS, draws=5)
    return bayes_predictions(world, draws, table=table, shots=SHOTS, samples=2048)


def against_fewer(rows: pl.DataFrame, cell: str, few: int, many: int) -> Any:
    """Nats at `many` shots minus nats at `few`, paired by comparison and draw; of 0 shots there is one draw."""
    side = rows.filter(pl.col("control").is_null(), pl.col("cell") == cell)
    after, before = (side.filter(pl.col("shots") == count) for count in (many, few))
    if before["draw"].n_unique() < after["draw"].n_unique():
        before = before.drop("draw").join(after.select("draw").unique(), how="cross").select(after.columns)
    same = pl.lit(many, rows["shots"].dtype)
    return paired_difference(after, before.with_columns(shots=same), "nll")


def written(found: Any, scale: float = 1.0, digits: int = 3) -> str:
    """A difference with its interval."""
    low, high = (float("nan") if end is None else scale * end for end in (found.ci_low, found.ci_high))
    return f"{scale * found.value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def worth(rows: dict[str, pl.DataFrame], cell: str) -> list[list[str]]:
    """A line a route: nats against its own 0 shots, and the largest rise between neighbours."""
    lines = [["route", *(f"{n} against 0" for n in SHOTS[1:]), "largest rise"]]
    for route, part in rows.items():
        steps = {many: against_fewer(part, cell, few, many) for few, many in pairwise(SHOTS)}
        most = max(steps, key=lambda n: steps[n].value)
        worse = " WORSE" if steps[most].ci_low is not None and steps[most].ci_low > 0 else ""
        gains = [written(against_fewer(part, cell, 0, many)) for many in SHOTS[1:]]
        lines.append([route, *gains, f"to {most}: {written(steps[most])}{worse}"])
    return lines


def controls(runs: dict[str, RunFolder], cell: str) -> list[list[str]]:
    """A line a route: wrong-user gain in points and flip rate in per cent, at the most shots; active units of z."""
    lines = [["route", "own minus another's shots, points", "flip rate, %", "active units"]]
    for route, run in runs.items():
        table, notes = run.table("metrics"), run.read()["notes"]
        own = table.filter(pl.col("model") == route, pl.col("cell") == cell, pl.col("community").is_null())
        fields = []
        for metric in ("wrong_user_gain", "flip_rate"):
            found = [
                f"{100 * row['value']:.1f} [{100 * row['ci_low']:.1f}, {100 * row['ci_high']:.1f}]"
                for row in own.filter(pl.col("metric") == metric).sort("shots").iter_rows(named=True)
            ]
            fields.append(found[-1] if found else "")
        active = {seed["active_units"] for seed in notes.values() if "active_units" in seed}
        lines.append([route, *fields, " to ".join(str(most(active)) for most in (min, max)[: len(active)])])
    return lines


def calibration(
    rows: dict[str, pl.DataFrame], metrics: pl.DataFrame, cell: str, world: World | None
) -> list[list[str]]:
    """A line a route and a measure: expected calibration error, and coverage of 90 % intervals where truth is known."""
    at = (pl.col("cell") == cell) & pl.col("control").is_null()
    lines = [["route", "%", *(f"{n} shots" for n in SHOTS)]]
    for route, part in rows.items():
        error = metrics.filter(at, pl.col("model") == route, pl.col("community").is_null(), metric="ece")
        lines.append([route, "calibration error", *by_shots(error, "value")])
        if world is not None:
            lines.append([route, "coverage", *by_shots(covered(part.filter(at), world), "inside")])
    return lines


def by_shots(table: pl.DataFrame, column: str) -> list[str]:
    """A column in per cent for each of `SHOTS`, empty where there is none."""
    found = dict(table.select("shots", column).iter_rows())
    return ["" if found.get(n) is None else f"{100 * found[n]:.1f}" for n in SHOTS]


def markdown(lines: list[list[str]]) -> str:
    """Aligned lines of a markdown table."""
    width = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    drawn = ["| " + " | ".join(field.ljust(n) for field, n in zip(line, width, strict=True)) + " |" for line in lines]
    return "\n".join([drawn[0], "|" + "|".join("-" * (n + 2) for n in width) + "|", *drawn[1:]])


def show(name: str, root: Path, asked: dict[str, Experiment]) -> None:
    """Print the tables of a set, from the runs that are done."""
    done = list_runs(root).filter(pl.col("status") == "done").sort("run", descending=True)
    runs = {}
    for route in asked:
        named = done.filter(pl.col("run").str.contains(f"-{route}-{asked[route].data_name}-", literal=True))
        described = redact(plain(describe(asked[route])))  # not a sweep's, or one with other seeds
        same = (run for run in map(open_run, named["path"]) if run.read().get("experiment") == described)
        found = next(same, None)
        if found is not None:
            runs[route] = found
    if not runs:
        console.print(f"\n{name}: no run is done")
        return
    rows = {route: run.table("predictions").filter(pl.col("model") == route) for route, run in runs.items()}
    first = next(iter(runs.values())).table("predictions")
    baselines = first.filter(~pl.col("model").is_in(list(runs)))
    together = [*rows.values(), baselines]
    world = WORLDS[name](**SIZES) if name in WORLDS else None
    if world is not None:
        together.append(curves(world))
    metrics = summarise(pl.concat([part.filter(pl.col("control").is_null()) for part in together], how="diagonal"),
                        pool_seeds=True)  # fmt: skip
    for cell in NEW:
        if not metrics.filter(pl.col("cell") == cell).height:
            continue
        console.print(f"\n{name}, {cell}: accuracy in % [95 % over users]; nats\n", highlight=False)
        console.print(results_table(metrics.filter(pl.col("cell") == cell)), highlight=False, markup=False)
        console.print("\nNats against the same route with fewer shots\n", highlight=False)
        console.print(markdown(worth(rows, cell)), highlight=False, markup=False)
        console.print("\nControls\n", highlight=False)
        console.print(markdown(controls(runs, cell)), highlight=False, markup=False)
        console.print("\nCalibration\n", highlight=False)
        console.print(markdown(calibration(rows, metrics, cell, world)), highlight=False, markup=False)


def main(sets: list[str], routes: list[str], seeds: tuple[int, ...], root: Path, only_show: bool) -> None:
    """Run what is missing and print the tables."""
    for name in sets:
        asked = {route: one for route, one in experiments(name, seeds).items() if route in routes}
        for route, one in asked.items():
            if not only_show:
                console.print(f"{name}: {route}")
                _, failed = sweep(one, [], root=root, tell=lambda line: console.print(line, markup=False))
                if failed:
                    console.print(f"{name}, {route} failed: {failed}", markup=False)
        show(name, root, asked)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", default=",".join([*WORLDS, *REAL]), help="comma-separated")
    parser.add_argument("--routes", default=",".join(ROUTES), help="comma-separated")
    parser.add_argument("--seeds", default="0", help="comma-separated; one for routes without a random part")
    parser.add_argument("--root", type=Path, default=Path("runs"), help="of run folders")
    parser.add_argument("--show", action="store_true", help="run nothing")
    given = parser.parse_args()
    chosen, wanted = given.sets.split(","), given.routes.split(",")
    for asked, known in ((chosen, (*WORLDS, *REAL)), (wanted, ROUTES)):
        unknown = [name for name in asked if name not in known]
        if unknown:
            parser.error(f"{unknown[0]!r} is none of {', '.join(known)}")
    main(chosen, wanted, tuple(int(seed) for seed in given.seeds.split(",")), given.root, given.show)
