"""Question: how many well chosen questions are worth sixteen random ones?

Command: python experiments/asking.py low_rank [ideal_point ...]       (worlds of experiments/simulation.py)
         PLURALPREFS_DATA=... python experiments/asking.py RUN persona_cross        (a run of experiments/persona.py)

Three rules pick one question at a time from a pool, the user answers, the state is solved again; the table is accuracy
on other pairs in points by number of questions, with 95 % intervals over users (and seeds: each is a world, a fit and
users of its own), and the difference from 16 random questions, paired by user; random is the mean of five draws.

Simulated: 150 users with 60 comparisons fit the family; 100 new users a seed, drawn from the world's prior, have pools
of 200 pairs and 200 others to be right on (expected accuracy under the true log-odds; the best possible is printed).
Persona: users of the fixed protocol's `unseen` cells, their support rows as pool, their test rows to be right on.

Result (2026-11-21, 2 CPU cores under heavy load, 2 to 5 minutes a line). Points against 16 random questions:

    low_rank, 300 users        16 random 80.7 [79.9, 81.5]; bald 4: -2.8, 6: +0.5 [+0.1, +0.8], 8: +1.6 [+1.3, +1.9];
                               d_optimal 8: +1.7 [+1.3, +2.0]; random 8: -3.4 [-3.7, -3.1]
    ideal_point, 300 users     16 random 84.8 [84.5, 85.1]; bald 4: +0.7 [+0.4, +0.9], 8: +1.6 [+1.4, +1.8];
                               d_optimal the same; random 8: -1.5 [-1.7, -1.3]
    persona_mix, 21 users      16 random 75.8 [73.2, 78.2]; bald 6: -0.5 [-3.6, +2.5], 8: +0.7 [-1.5, +3.1], 16: +2.5
                               [+0.6, +4.4]; d_optimal 8: +1.4 [-0.8, +3.7]; random 8: -3.6 [-4.8, -2.4]
    persona_cross, 18 users    99.7 to 100.0 after one question by every rule: nothing to tell apart

persona_mix is low_rank with peers (experiments/persona.py mix_low_rank, three fits, the same users; 2026-11-23): eight
chosen questions reach what 16 random ones do, with few users to show it by. One fit without peers: bald 8:
-1.6 [-6.2, +2.9], 16: +1.2 [-1.9, +4.6]. persona_cross is of one fit. Bald and d_optimal differ by no more than noise.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
import polars as pl
from rich.console import Console
from scipy.special import expit
from simulation import CASES, interval

from pluralprefs.adapt import Joint, laplace_user, predict_jointly
from pluralprefs.adapting import route
from pluralprefs.asking import pick
from pluralprefs.data.simulate.states import Pairs
from pluralprefs.data.sources import protocol
from pluralprefs.experiment import Experiment, prepare
from pluralprefs.fitting import Rows, gathered
from pluralprefs.registry import find_run, open_run
from pluralprefs.run import load
from pluralprefs.seeds import fit_seed
from pluralprefs.types import Comparisons, Item

SEEDS, QUESTIONS, SHOWN = (0, 1, 2), 16, (0, 1, 2, 4, 6, 8, 12, 16)
SIMULATED_USERS, PAIRS, DRAWS = 100, 200, 5
DATA = os.environ.get("PLURALPREFS_DATA", "../shared/data")
console = Console(width=140, soft_wrap=True)


class Task(NamedTuple):
    """Users with pools and tests, rows [users, pairs], weight 0 where a user has fewer; `right` is P(first)."""

    model: Any
    users: Any
    items: Item
    pool: Rows
    test: Rows
    right: np.ndarray
    temper: float


def index_rows(first: Any, second: Any, target: Any, weight: Any = 1.0) -> Rows:
    """Rows of unknown users and communities."""
    none: Any = np.full(first.shape, -1, np.int32)
    zero: Any = np.zeros(first.shape, np.float32)
    return Comparisons(
        first=first, second=second, target=zero + target, tie=zero > 0, user=none, community=none, rater=none,
        source=none, offset=zero, weight=zero + weight,
    )  # fmt: skip


def simulated(name: str, seed: int) -> Task:
    """Fit a family to its own world and draw new users, pools and tests."""
    world = CASES[name].world(users=150, comparisons_per_user=60, seed=seed)
    table = world.attribute_table()
    experiment = Experiment(data=lambda: table, shots=(0,), draws=1, controls=False, **CASES[name].experiment)
    prepared = prepare(experiment, table, progress=False)
    fitted = fit_seed(experiment, prepared, seed)
    place = {item: i for i, item in enumerate(prepared.items["item_id"])}
    rows = np.array([place.get(item, -1) for item in world.item_ids])  # of the world's items in the item table
    draw = np.random.default_rng(1000 + seed)
    states = world.prior.states(world.prior.sample(draw, SIMULATED_USERS))  # type: ignore[union-attr]
    judged = np.flatnonzero(rows >= 0)  # an item that nobody judged has no features here
    pairs = np.array([draw.choice(judged, 2, replace=False) for _ in range(2 * PAIRS)])
    asked = Pairs(pairs[:, 0], pairs[:, 1], np.zeros(len(pairs), np.int64))
    truth = expit(world.log_odds(states, asked))
    answers = (draw.random(truth.shape) < truth).astype(float)
    first, second = (np.broadcast_to(rows[side], truth.shape) for side in pairs.T)
    pool, test = (index_rows(first[:, part], second[:, part], answers[:, part]) for part in
                  (slice(PAIRS), slice(PAIRS, None)))  # fmt: skip
    return Task(fitted.model, fitted.users, prepared.features, pool, test, truth[:, PAIRS:],
                fitted.notes.get("temper", 1.0))  # fmt: skip


def persona(name: str, world: str, seed: int) -> Task:
    """The unseen users of the fixed protocol under a run that was fitted to the others."""
    run, table = load(find_run(name, "runs").path, seed=seed), protocol.load(DATA, world)
    table = table.filter(
        pl.col("cell").is_in(["unseen/support", "unseen/testpair"]) & (pl.col("first") != pl.col("second"))
    )
    items, rows = run.arrays(table)
    unit, cell = table["user_id"].rank("dense").to_numpy() - 1, table["cell"].to_numpy()

    def part(which: str) -> Rows:
        mine = [np.flatnonzero((unit == u) & (cell == which)) for u in range(unit.max() + 1)]
        width = max(map(len, mine))
        index = np.array([np.pad(rows, (0, width - len(rows))) for rows in mine])
        known = np.arange(width) < np.array([len(rows) for rows in mine])[:, None]
        return index_rows(*(np.asarray(x)[index] for x in (rows.first, rows.second, rows.target)),
                          weight=known)  # fmt: skip

    test = part("unseen/testpair")
    return Task(run.model, run.users, items, part("unseen/support"), test, np.asarray(test.target),
                run.notes.get("temper", 1.0))  # fmt: skip


@jax.jit
def state(model: Any, users: Any, items: Item, support: Rows, pool: Rows, test: Rows) -> tuple[Joint, jax.Array]:
    """What every user's posterior says of the pool, jointly, and the mean log-odds of the test rows."""

    def one(support: Rows, pool: Rows, test: Rows) -> tuple[Joint, jax.Array]:
        posterior = route(model, laplace_user)(model, gathered(items, support), users)
        joint = predict_jointly(model, users, posterior, gathered(items, pool))
        return joint, predict_jointly(model, users, posterior, gathered(items, test)).mean

    return jax.vmap(one)(support, pool, test)


def curve(task: Task, rule: str, seed: int) -> np.ndarray:
    """Accuracy in points after 0, 1, ... questions: [questions + 1, users]."""
    count = len(task.pool.target)
    draw = np.random.default_rng([seed, 7])
    asked = np.zeros((count, 0), int)
    found = []
    known = np.asarray(task.test.weight)
    for question in range(QUESTIONS + 1):
        place = np.pad(asked, ((0, 0), (0, QUESTIONS - question)))
        support = jax.tree.map(lambda x: np.take_along_axis(x, place, axis=1), task.pool)  # noqa: B023
        told = (np.arange(QUESTIONS) < question) * np.float32(task.temper)
        support = support.replace(weight=np.broadcast_to(told, place.shape).astype(np.float32))
        joint, mean = jax.device_get(state(task.model, task.users, task.items, support, task.pool, task.test))
        sure = np.where(mean > 0, task.right, 1 - task.right)
        found.append(100 * (np.where(mean == 0, 0.5, sure) * known).sum(1) / known.sum(1))
        if question == QUESTIONS:
            break
        chosen = []
        for u in range(count):
            left = np.setdiff1d(np.flatnonzero(np.asarray(task.pool.weight)[u] > 0), asked[u])
            own: Any = jax.tree.map(lambda x: np.asarray(x[u], np.float64)[left], joint)  # noqa: B023
            best, _ = pick(own, 1, rule, level=np.zeros(len(left)), residual=float(task.users.residual),
                           weight=task.temper, seed=int(draw.integers(2**31)))  # fmt: skip
            chosen.append(left[best[0]])
        asked = np.concatenate([asked, np.array(chosen)[:, None]], axis=1)
    return np.array(found)


def show(tasks: list[Task], same: bool) -> None:
    """Print the table of several tasks of one kind, a seed each; of the `same` users or of others."""
    rules = ("bald", "d_optimal", "random")  # eubo looks for the best option, not for the user
    curves = {}
    for rule in rules:
        draws = DRAWS if rule == "random" else 1
        each = [
            np.mean([curve(task, rule, seed + 10 * draw) for draw in range(draws)], axis=0)
            for seed, task in enumerate(tasks)
        ]
        curves[rule] = np.concatenate(each, axis=1)
    user = pl.Series([f"{0 if same else seed}/{u}" for seed, task in enumerate(tasks) for u in range(len(task.right))])
    best = np.concatenate([(100 * np.maximum(task.right, 1 - task.right)).mean(1) for task in tasks])
    console.print(f"{user.n_unique()} users; the best possible is {best.mean():.1f}", highlight=False)
    goal = curves["random"][QUESTIONS]
    for rule, values in curves.items():
        for n in SHOWN:
            low, high = interval(pl.Series(values[n]), user)
            gap = values[n] - goal
            less, more = interval(pl.Series(gap), user)
            console.print(f"  {rule:10s} {n:3d} questions: {values[n].mean():5.1f} [{low:.1f}, {high:.1f}]; against 16 "
                          f"random {gap.mean():+.1f} [{less:+.1f}, {more:+.1f}]", highlight=False)  # fmt: skip


if __name__ == "__main__":
    names = sys.argv[1:] or ["low_rank"]
    if len(names) == 2 and names[1] in protocol.NAMES:
        console.print(f"\n[bold]{names[1]}[/bold], {names[0]}")
        fitted, world = names
        seeds = open_run(find_run(fitted, "runs").path).read()["seeds"]
        show([persona(fitted, world, seed) for seed in seeds], same=True)
    else:
        for name in names:
            console.print(f"\n[bold]{name}[/bold]")
            show([simulated(name, seed) for seed in SEEDS], same=False)
