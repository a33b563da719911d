"""Fit the levels of a pooled user table by alternating empirical Bayes, outermost level first.

    population -> communities -> users

Each level is a deviation from the one before it, solved by `adapt` (a Laplace posterior per unit), and its prior
covariance is re-estimated from the posteriors of its units until it settles. A level is fitted on log-odds of the
levels before it that were predicted OUT OF FOLD: a population scored on its own training rows looks surer than it is,
and the users would learn that it is right. The out-of-fold correction travels in `Comparisons.offset`, so the in-fold
and the out-of-fold models share all code.

Variances use MacKay's fixed point, var = sum m^2 / sum(1 - C / var), which has the fixed points of the EM update
mean(m^2 + C) and reaches them in a few rounds; whole matrices D^-1/2 M D^-1/2 with M = sum m m', D = sum (I - C), its
like. Means and covariances are those of `adapt` after its rounds of moments: modes would give too small a strength.

`fit_scale` then says how sharp the base is for one user. Log-odds that were fitted to a crowd of differing users are
flatter than any user's (an average of logistic curves is flatter than each), so their scale is learned with the users.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pluralprefs.adapt import reduced, solve_items, solve_many, solve_rows
from pluralprefs.blas import one_blas_thread
from pluralprefs.newton import ROUNDS, Judgements, Solution
from pluralprefs.types import Comparisons, Item, LinearInUser, RewardModel
from pluralprefs.users import Deviation, Users, apply_root, log_odds, neutral, part_names, ravel

ROWS_AT_ONCE = 4096
MANY_ITEMS = 2048  # distinct items of one unit beyond which its system is one of coordinates, never of items
LARGE = 512  # comparisons of one unit beyond which it is solved through its distinct items
FLOATS_AT_ONCE = 2**24
FLOOR = 1e-6  # a variance of zero could not grow again
CERTAIN = 30.0  # log-odds that a prior's standard deviation moves, at most: users of pure types would make it infinite
Rows = Comparisons[Any]


@dataclass
class Fitted:
    """A fitted family: parameters, users, and what was decided on the way (`notes`, plain numbers).

    `rows` are the training rows with their offsets and tempering weights: the support of the seen users.
    """

    model: Any
    users: Users
    rows: Rows
    notes: dict[str, Any] = field(default_factory=dict)


def strangers(rows: Rows) -> Rows:
    """The same rows with users unknown, so that they are scored for their community alone."""
    return rows.replace(user=np.full_like(rows.user, -1))


def take(tree: Any, index: Any) -> Any:
    """Take rows of every array of a pytree of NumPy arrays."""
    return jax.tree.map(lambda x: x[index], tree)


@jax.jit
def _log_odds(model: RewardModel, users: Users, items: Item, rows: Rows) -> Float[Array, " rows"]:
    def one(row: Rows) -> Float[Array, ""]:
        pick = lambda index: jax.tree.map(lambda x: x[index], items)  # noqa: E731
        return log_odds(model, users, row.replace(first=pick(row.first), second=pick(row.second)))

    return jax.lax.map(one, rows, batch_size=ROWS_AT_ONCE)


def row_log_odds(model: RewardModel, users: Users, items: Item, rows: Rows) -> np.ndarray:
    """Log-odds of index rows for the users of the table: [rows], float64 on the host."""
    count = len(rows.target)
    if count == 0:
        return np.zeros(0)
    index = np.concatenate([np.arange(count), np.full(step_up(count) - count, -1)])  # few shapes to compile
    return np.asarray(_log_odds(model, users, items, padded(rows, index)), np.float64)[:count]


def buckets(unit: np.ndarray, floats_per_row: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Group row numbers by unit into rectangles: yields (units [u], rows [>= u, n]) with -1 as padding.

    Units of similar size share a rectangle, cut so that it holds a bounded number of floats; lines beyond the units are
    padding. Each unit appears once; rows keep their order.
    """
    order = np.argsort(unit, kind="stable")
    values, start, count = np.unique(unit[order], return_index=True, return_counts=True)
    width = np.array([step_up(c) for c in count], int)
    for n in np.unique(width):
        group = np.flatnonzero(width == n)
        most = max(1, FLOATS_AT_ONCE // (int(n) * (floats_per_row + 4 * int(n))))  # 4: square matrices of latent values
        for cut in range(0, len(group), most):
            part = group[cut : cut + most]
            rows = np.full((min(step_up(len(part), 4), max(most, len(part))), int(n)), -1)
            for i, g in enumerate(part):
                rows[i, : count[g]] = order[start[g] : start[g] + count[g]]
            yield values[part], rows


def step_up(n: int, least: int = 16) -> int:
    """Round a size up to one of few (least, 4 least, 8 least, 16 least, ...), so that few shapes are ever compiled.

    >>> [step_up(n) for n in (1, 16, 17, 65, 300)]
    [16, 16, 64, 128, 512]
    """
    factor = 4
    while least < n:
        least, factor = least * factor, 2
    return least


def padded(rows: Rows, index: np.ndarray) -> Rows:
    """Rows at `index`, where -1 gives a row of weight 0."""
    if not len(rows.target):  # nothing to take even as padding
        rows = jax.tree.map(lambda x: np.zeros((1, *x.shape[1:]), x.dtype), rows)
    picked = take(rows, np.maximum(index, 0))
    return picked.replace(weight=np.where(index >= 0, picked.weight, 0.0).astype(np.float32))


class Moments(NamedTuple):
    """Whitened posteriors of a level's units: means, marginal variances, sum of covariances (full only), evidence."""

    mean: np.ndarray
    variance: np.ndarray
    covariance: np.ndarray | None
    evidence: float


@partial(jax.jit, static_argnames=("full", "rounds"))
def _solve_bucket(
    model: RewardModel, users: Users, items: Item, root: Array, rows: Rows, full: bool, rounds: int = ROUNDS
) -> tuple[Array, Array, Array, Array]:
    def one(support: Rows) -> tuple[Array, Array, Array, Array]:
        return _moments(solve_rows(model, gathered(items, support), users, root, rounds=rounds), full)

    mean, variance, covariance, evidence = jax.vmap(one)(rows)
    return mean, variance, covariance.sum(0), evidence.sum()


class Latents(NamedTuple):
    """Items whose rewards are a rectangle's latent values [u, m], and rows in terms of them; see `adapt.solve_items`.

    `minus` is None where a latent value is one item's reward.
    """

    items: np.ndarray
    minus: np.ndarray | None
    first: np.ndarray
    second: np.ndarray


def latents(first: np.ndarray, second: np.ndarray) -> Latents:
    """Choose the fewer latent values for rows [u, n]: a unit's distinct items, or its rows."""
    both = np.concatenate([first, second], axis=1)
    distinct = [np.unique(row, return_inverse=True) for row in both]
    width = step_up(max(len(values) for values, _ in distinct))
    if width > first.shape[1]:
        place = np.broadcast_to(np.arange(first.shape[1]), first.shape)
        return Latents(first, second, place, np.full_like(place, -1))
    items = np.stack([np.pad(values, (0, width - len(values)), mode="edge") for values, _ in distinct])
    local = np.stack([inverse.reshape(-1) for _, inverse in distinct])
    return Latents(items, None, local[:, : first.shape[1]], local[:, first.shape[1] :])


@partial(jax.jit, static_argnames=("full", "rounds"))
def _solve_item_bucket(
    model: LinearInUser, items: Item, local: Array, minus: Array | None, rows: Judgements, root: Array, scale: Array,
    full: bool, rounds: int = ROUNDS,
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    def one(index: Array, less: Array | None, unit: Judgements) -> tuple[Array, Array, Array, Array]:
        found = solve_items(model, at(items, index), unit, root, scale, minus=at(items, less), rounds=rounds)
        return _moments(found, full)

    mean, variance, covariance, evidence = jax.vmap(one)(local, minus, rows)
    return mean, variance, covariance.sum(0), evidence.sum()


def at(items: Item, index: Any) -> Any:
    """Items at an index array; None at None."""
    return None if index is None else jax.tree.map(lambda x: x[index], items)


def gathered(items: Item, rows: Rows) -> Comparisons[Item]:
    pick = lambda index: jax.tree.map(lambda x: x[index], items)  # noqa: E731
    return rows.replace(first=pick(rows.first), second=pick(rows.second))


def _moments(solution: Solution, full: bool) -> tuple[Array, Array, Array, Array]:
    """Mean, marginal variance, covariance (full only) and evidence."""
    a, m = solution.jacobian, solution.precision
    if not full:
        variance = jnp.maximum(1.0 - jnp.sum(a * (m @ a), axis=0), 0.0)
        return solution.mean, variance, jnp.zeros((0, 0)), solution.evidence
    covariance = jnp.eye(a.shape[1]) - a.T @ m @ a
    return solution.mean, jnp.diagonal(covariance), covariance, solution.evidence


@partial(jax.jit, static_argnames="rounds")
def _solve_large(
    model: LinearInUser, items: Item, rows: Judgements, root: Array, scale: Array, rounds: int
) -> Solution:
    return solve_items(model, items, rows, root, scale, rounds=rounds)


@partial(jax.jit, static_argnames="rounds")
def _solve_many(model: LinearInUser, items: Item, rows: Judgements, root: Array, scale: Array, rounds: int) -> Solution:
    return solve_many(model, items, rows, root, scale, rounds=rounds)


def large_unit(
    model: Any, users: Users, items: Item, rows: Rows, root: np.ndarray, *, care: bool = False, rounds: int = ROUNDS
) -> Solution:
    """Solve one unit through its distinct items, or its coordinates where those are fewer.

    `rows` are its index rows, on the table's base.
    """
    distinct, local = np.unique(np.stack([rows.first, rows.second]), return_inverse=True)
    local = local.reshape(2, -1)
    many = len(distinct) > MANY_ITEMS and len(distinct) > root.shape[0]
    nowhere = 0 if many else -1  # where rows of padding point
    fixed = row_log_odds(model, users, items, rows.replace(user=np.full_like(rows.user, -1))).astype(np.float32)
    # Pad the two lengths to coarse steps, so that folds share one compilation.
    n, m = _step(len(fixed)), _step(len(distinct), 64)
    pad = lambda x, value=0: np.pad(x, (0, n - len(x)), constant_values=value)  # noqa: E731
    judgements = Judgements(
        first=pad(local[0], nowhere), second=pad(local[1], nowhere), fixed=pad(fixed),
        care=pad(fixed if care else 0 * fixed), target=pad(rows.target), weight=pad(rows.weight),
    )  # fmt: skip
    index = np.pad(distinct, (0, m - len(distinct)))
    solve = _solve_many if many else _solve_large
    return solve(model, take(items, index), judgements, jnp.asarray(root), users.scale, rounds)


def _step(n: int, unit: int = 1024) -> int:
    unit = max(unit, 1 << max(n.bit_length() - 4, 0))
    return -(-max(n, 1) // unit) * unit


@one_blas_thread()
def solve_level(
    model: RewardModel, users: Users, items: Item, rows: Rows, unit: Int[np.ndarray, " rows"], count: int,
    root: np.ndarray, *, care: bool = False,
) -> Moments:  # fmt: skip
    """Solve every unit of a level against the table's base; rows with `unit` -1 are left out.

    Units without rows keep the prior: mean 0, variance 1. A level of one unit, like the population, keeps to its mode:
    the plug-in score of the levels after it.
    """
    rounds = ROUNDS if count > 1 else 0
    size, full = root.shape[0], root.ndim == 2
    mean, variance = np.zeros((count, size), np.float32), np.ones((count, size), np.float32)
    covariance, evidence = np.zeros((size, size)), 0.0
    sizes = np.bincount(unit[unit >= 0], minlength=count)
    model, items = reduced(model, items)
    linear = isinstance(model, LinearInUser)
    large = (sizes > LARGE) if linear else np.zeros(count, bool)
    fixed = row_log_odds(model, users, items, rows.replace(user=np.full_like(rows.user, -1))) if linear else np.zeros(0)
    for u in np.flatnonzero(large):
        solution = large_unit(model, users, items, take(rows, np.flatnonzero(unit == u)), root, care=care,
                              rounds=rounds)  # fmt: skip
        m, v, s, e = _moments(solution, full)
        mean[u], variance[u] = m, v
        covariance, evidence = covariance + (np.asarray(s) if full else 0), evidence + float(e)
    small = np.flatnonzero((unit >= 0) & ~large[np.maximum(unit, 0)])
    for units, index in buckets(unit[small], 2 * size):
        index = np.where(index >= 0, small[index], -1)
        support = padded(rows, index)
        if linear:
            local = latents(np.asarray(support.first), np.asarray(support.second))
            at_base = np.where(index >= 0, fixed[np.maximum(index, 0)], 0.0).astype(np.float32)
            judged = Judgements(local.first, local.second, at_base, at_base * care, support.target, support.weight)
            m, v, s, e = _solve_item_bucket(
                model, items, local.items, local.minus, judged, jnp.asarray(root), users.scale, full, rounds
            )
        else:
            m, v, s, e = _solve_bucket(model, users, items, jnp.asarray(root), support, full, rounds)
        mean[units], variance[units] = m[: len(units)], v[: len(units)]
        covariance, evidence = covariance + (np.asarray(s) if full else 0), evidence + float(e)
        if full:  # lines of padding are at the prior
            covariance = covariance - (len(index) - len(units)) * np.eye(size)
    if full:
        covariance = covariance + (sizes == 0).sum() * np.eye(size)
    return Moments(mean, variance, covariance if full else None, evidence)


def initial_root(model: RewardModel, users: Users, items: Item, rows: Rows, strength: float) -> np.ndarray:
    """Prior root such that each part of the state moves log-odds by about `strength` (one standard deviation)."""
    names = np.array(part_names(neutral(model)))
    sample = take(rows, np.linspace(0, len(rows.target) - 1, min(len(rows.target), 256)).astype(int))
    gradient = np.asarray(_gradients(model, users, items, sample))
    root = np.zeros(len(names), np.float32)
    for name in dict.fromkeys(names):
        part = names == name
        norm = np.sqrt((gradient[:, part] ** 2).sum(1).mean())
        root[part] = strength / norm if norm > 0 else 0.0
    return root


@jax.jit
def _gradients(model: RewardModel, users: Users, items: Item, rows: Rows) -> Float[Array, "rows size"]:
    """Derivative of each row's log-odds with respect to a user's deviation, at the base."""
    vector, unravel = ravel(neutral(model))

    def one(row: Comparisons[Item]) -> Array:
        def value(v: Array) -> Array:
            base = users.replace(user=jax.tree.map(lambda x: x[None], unravel(v)))
            return log_odds(model, base, row.replace(user=jnp.asarray(0)))

        return jax.grad(value)(vector)

    return jax.lax.map(one, gathered(items, rows), batch_size=64)


def updated_root(root: np.ndarray, moments: Moments, names: tuple[str, ...]) -> np.ndarray:
    """One empirical-Bayes update of a level's prior root from the posteriors of its units."""
    if moments.covariance is not None:
        count, eye = len(moments.mean), np.eye(root.shape[0])
        square = root if root.ndim == 2 else np.diag(root)
        means = moments.mean.astype(float).T @ moments.mean
        values, vectors = np.linalg.eigh(count * eye - moments.covariance)
        whiten = (vectors / np.sqrt(np.maximum(values, 1e-3))) @ vectors.T
        covariance = square @ whiten @ means @ whiten @ square.T
        used = np.abs(square).max(axis=1) > 0  # coordinates that may not deviate stay where they are
        found = np.linalg.cholesky(covariance + FLOOR * eye)
        return np.where(used[:, None] & used[None, :], found, 0.0).astype(np.float32)
    new = root.copy()
    labels = np.array(names)
    for name in dict.fromkeys(names):
        part = (labels == name) & (root > 0)
        if part.any():
            square = ((moments.mean[:, part] * root[part]) ** 2).sum(dtype=float)
            determined = (1.0 - moments.variance[:, part]).sum(dtype=float)
            new[part] = np.sqrt(max(square / max(determined, 1e-3), FLOOR))
    return new


def _at_most(root: np.ndarray, most: np.ndarray) -> np.ndarray:
    """The root with each coordinate's standard deviation at most that of `most`, where that is not zero."""
    deviation = np.abs(root) if root.ndim == 1 else np.sqrt((root**2).sum(1))
    shrink = np.divide(most, deviation, out=np.ones_like(deviation), where=(most > 0) & (deviation > most))
    shrink = shrink.astype(np.float32)
    return root * (shrink if root.ndim == 1 else shrink[:, None])


def fit_strength(
    model: RewardModel, users: Users, items: Item, rows: Rows, unit: np.ndarray, count: int, root: np.ndarray,
    *, rounds: int, care: bool = False,
) -> tuple[np.ndarray, Moments]:  # fmt: skip
    """Learn a level's prior root and return it with its units' posteriors.

    The units' posteriors and the prior alternate until the root moves by less than 2 %, at most `rounds` times.
    """
    names = part_names(neutral(model))
    most = initial_root(model, users, items, rows, CERTAIN)
    solve = partial(solve_level, model, users, items, rows, unit, count, care=care)
    moments = solve(root)
    for _ in range(rounds):
        new = _at_most(updated_root(root, moments, names), most)
        moved = np.abs(new - root).max() / max(np.abs(root).max(), 1e-9)
        root = new
        moments = solve(root)
        if moved < 0.02:
            break
    return root, moments


def fit_scale(
    model: RewardModel, users: Users, items: Item, rows: Rows, unit: np.ndarray, count: int, root: np.ndarray,
    moments: Moments, *, care: bool = False, step: float = 0.2,
) -> tuple[Users, np.ndarray, Moments]:  # fmt: skip
    """Move the scale of the base to the maximum of the evidence, by parabolas in its logarithm.

    The units' deviations keep their strength in log-odds: the root of their states is divided by what the scale gains.
    """
    state = np.array(part_names(neutral(model))) != "gain"

    def scaled(x: float) -> tuple[Users, np.ndarray]:
        new = root.copy()
        new[state] /= np.exp(x)
        return users.replace(scale=users.scale * np.float32(np.exp(x))), new

    def solve(x: float) -> Moments:
        table, new = scaled(x)
        return solve_level(model, table, items, rows, unit, count, new, care=care)

    seen, best = {0: moments}, 0  # by steps from the start
    for _ in range(4):
        best = max(seen, key=lambda at: seen[at].evidence)
        for place in (best - 1, best + 1):
            if place not in seen:
                seen[place] = solve(place * step)
        if all(seen[best].evidence >= seen[place].evidence for place in (best - 1, best + 1)):
            break
    low, middle, high = (seen[place].evidence for place in (best - 1, best, best + 1))
    found, bend = [(seen[at].evidence, at * step, seen[at]) for at in seen], low + high - 2 * middle
    if bend < 0:
        vertex = (best + float(np.clip(0.5 * (low - high) / bend, -1.0, 1.0))) * step
        at_vertex = solve(vertex)
        found.append((at_vertex.evidence, vertex, at_vertex))
    _, x, moments = max(found, key=lambda entry: entry[0])
    return *scaled(x), moments


def deviations(model: RewardModel, root: np.ndarray, mean: np.ndarray) -> Deviation:
    """The table of deviations of whitened means [units, size]."""
    unravel = ravel(neutral(model))[1]
    return jax.vmap(unravel)(apply_root(jnp.asarray(root), jnp.asarray(mean)))
