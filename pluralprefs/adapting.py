"""Adapt many users in a few jitted calls, and predict their comparisons with uncertainty.

Units (a user, or a user with one draw of shots) are packed into rectangles of similar size; each rectangle is one
call of the adapter under `vmap`. Memory is bounded by the rectangle, not by the number of users.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from scipy.special import expit

from pluralprefs.adapt import (
    Joint,
    infer_user,
    laplace_user,
    latent_features,
    neutral_size,
    predict,
    predict_jointly,
    reduced,
    solve_items,
)
from pluralprefs.blas import one_blas_thread
from pluralprefs.fitting import (
    ROWS_AT_ONCE,
    Fitted,
    Rows,
    at,
    buckets,
    gathered,
    latents,
    padded,
    row_log_odds,
    step_up,
    strangers,
    take,
)
from pluralprefs.newton import Judgements
from pluralprefs.types import Comparisons, Covariance, InfersUser, Item, LeavesOpen, LinearInUser, UserPosterior
from pluralprefs.users import Deviation, Users, gather, neutral, ravel

USERS_AT_ONCE = 16  # where each has many systems to solve
UNITS_AT_ONCE = 256  # of a family that reads many rewards a row
_NODES, _MASSES = np.polynomial.hermite_e.hermegauss(32)
_MASSES = _MASSES / _MASSES.sum()  # quadrature of a standard normal


def route(model: Any, adapter: Callable[..., UserPosterior]) -> Callable[..., UserPosterior]:
    """The adapter that a model is adapted by: a family that infers its users has no other."""
    return infer_user if isinstance(model, InfersUser) else adapter


@partial(jax.jit, static_argnames="adapter")
def _adapt(
    model: Any, users: Users, items: Item, support: Rows, adapter: Callable[..., UserPosterior]
) -> UserPosterior:
    def one(rows: Rows) -> UserPosterior:
        return adapter(model, gathered(items, rows), users)

    def moments(rows: Rows) -> tuple[Any, Array]:  # without arrays of no size, which `lax.map` cannot divide
        found = one(rows)
        assert found.covariance is not None
        return found.mean, found.covariance.root

    if users.peers is not None and adapter is laplace_user:  # many systems a user: not all users at once
        mean, root = jax.lax.map(moments, support, batch_size=USERS_AT_ONCE)
        return UserPosterior(mean, Covariance(root, jnp.zeros((len(root), 0, root.shape[-1]))))
    return jax.vmap(one)(support)


@jax.jit
def _predict(model: Any, users: Users, items: Item, posterior: UserPosterior, query: Rows) -> tuple[Array, Array]:
    def unit(p: UserPosterior, rows: Rows) -> tuple[Array, Array]:
        return jax.vmap(lambda row: predict(model, users, p, row))(gathered(items, rows))

    if isinstance(model, LeavesOpen):  # many rewards a row: not all units at once
        return jax.lax.map(lambda one: unit(*one), (posterior, query), batch_size=UNITS_AT_ONCE)
    return jax.vmap(unit)(posterior, query)


@one_blas_thread()
def adapt_and_predict(
    model: Any,
    users: Users,
    items: Item,
    support: Rows,
    support_unit: np.ndarray,
    query: Rows,
    query_unit: np.ndarray,
    *,
    adapter: Callable[..., UserPosterior] = laplace_user,
) -> tuple[np.ndarray, np.ndarray]:
    """Adapt every unit to its support rows and return mean and variance of its query rows' log-odds, [rows].

    Units are integers >= 0 that link the two; a query unit without support is scored at its prior.
    """
    mean, variance = np.zeros(len(query_unit)), np.zeros(len(query_unit))
    query, support = strangers(query), strangers(support)
    adapter = route(model, adapter)
    model, items = reduced(model, items)
    linear = isinstance(model, LinearInUser) and adapter is laplace_user
    solve = _LinearRoute(model, users, items, support, query) if linear else _AnyRoute(model, users, items, adapter)
    for index, rows in _rectangles(support_unit, query_unit, 2 * neutral_size(model)):
        m, v = solve(support, index, query, rows)
        mean[rows[rows >= 0]] = m[rows >= 0]
        variance[rows[rows >= 0]] = v[rows >= 0]
    return mean, variance + float(users.residual)


class _AnyRoute:
    """Adapt and predict through the family's log-odds: one latent value per row."""

    def __init__(self, model: Any, users: Users, items: Item, adapter: Callable[..., UserPosterior]) -> None:
        self.model, self.users, self.items, self.adapter = model, users, items, adapter

    def __call__(
        self, support: Rows, index: np.ndarray, query: Rows, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        posterior = _adapt(self.model, self.users, self.items, padded(support, index), self.adapter)
        m, v = _predict(self.model, self.users, self.items, posterior, padded(query, rows))
        return np.asarray(m), np.asarray(v)


class _LinearRoute:
    """Adapt and predict through the distinct items of each unit: the same Laplace posterior, for linear families."""

    def __init__(self, model: LinearInUser, users: Users, items: Item, support: Rows, query: Rows) -> None:
        self.model, self.users, self.items = model, users, items
        self.at_support = row_log_odds(model, users, items, support).astype(np.float32)
        self.at_query = row_log_odds(model, users, items, query).astype(np.float32)

    def __call__(
        self, support: Rows, index: np.ndarray, query: Rows, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        given, asked = padded(support, index), padded(query, rows)
        fixed = np.where(index >= 0, self.at_support[np.maximum(index, 0)] if len(self.at_support) else 0.0, 0.0)
        fixed = fixed.astype(np.float32)
        local = latents(np.asarray(given.first), np.asarray(given.second))
        judged = Judgements(local.first, local.second, fixed, fixed, given.target, given.weight)
        base = np.where(rows >= 0, self.at_query[np.maximum(rows, 0)], 0.0).astype(np.float32)
        root, scale = self.users.user_root, self.users.scale
        m, v = _linear(self.model, self.items, local.items, local.minus, judged, root, scale, asked.first,
                       asked.second, base)  # fmt: skip
        return np.asarray(m), np.asarray(v)


@jax.jit
def _linear(
    model: LinearInUser, items: Item, local: Array, minus: Array | None, rows: Judgements, root: Array, scale: Array,
    first: Array, second: Array, base: Array,
) -> tuple[Array, Array]:  # fmt: skip
    def unit(
        local: Array, minus: Array | None, rows: Judgements, first: Array, second: Array, base: Array
    ) -> tuple[Array, Array]:
        solution = solve_items(model, at(items, local), rows, root, scale, minus=at(items, minus))
        state = scale * (latent_features(model, at(items, first)) - latent_features(model, at(items, second)))
        care = ravel(Deviation(jax.tree.map(jnp.zeros_like, model.init_user()), jnp.ones(())))[0]
        direction = state + base[:, None] * care[None, :]
        whitened = direction * root[None, :] if root.ndim == 1 else direction @ root
        seen = whitened @ solution.jacobian.T
        spread = jnp.sum(whitened**2, axis=1) - jnp.sum((seen @ solution.precision) * seen, axis=1)
        return base + whitened @ solution.mean, jnp.maximum(spread, 0.0)

    return jax.vmap(unit)(local, minus, rows, first, second, base)


def _rectangles(
    support_unit: np.ndarray, query_unit: np.ndarray, floats: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield rectangles of support rows and of query rows of the units that are asked about, -1 as padding."""
    order = np.argsort(query_unit, kind="stable")
    begin = np.searchsorted(query_unit[order], np.arange(query_unit.max(initial=-1) + 2))
    for units, index in _with_empty(support_unit, query_unit, floats):
        counts = begin[units + 1] - begin[units]
        rows = np.full((len(index), step_up(int(counts.max()))), -1)
        for i, u in enumerate(units):
            rows[i, : counts[i]] = order[begin[u] : begin[u + 1]]
        yield index, rows


def _with_empty(support_unit: np.ndarray, query_unit: np.ndarray, floats: int) -> Any:
    """Rectangles of support rows for every unit that is asked about, those without support included."""
    asked = np.unique(query_unit)
    known = np.isin(support_unit, asked)
    place = np.flatnonzero(known)
    for units, index in buckets(support_unit[known], floats):
        yield units, np.where(index >= 0, place[np.maximum(index, 0)], -1)
    empty = np.setdiff1d(asked, support_unit)
    for cut in range(0, len(empty), 256):
        units = empty[cut : cut + 256]
        yield units, np.full((step_up(len(units), 4), 16), -1)


def predict_own(
    model: Any, users: Users, items: Item, support: Rows, owner: np.ndarray, query: Rows, unit: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`adapt_and_predict` where whoever has support is a user of the table, who is one of its `peers`: the Gaussian is
    the prior of these, and the mixture of all who have none."""
    if users.peers is None:
        return adapt_and_predict(model, users, items, support, owner, query, unit)
    found, own = np.zeros((2, len(unit))), np.isin(unit, owner)
    for part, table in ((own, users.replace(peers=None)), (~own, users)):
        if part.any():
            mine = np.isin(owner, unit[part])
            found[:, part] = adapt_and_predict(model, table, items, take(support, mine), owner[mine],
                                               take(query, part), unit[part])  # fmt: skip
    return found[0], found[1]


def predict_seen(fitted: Fitted, items: Item, query: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of log-odds of the table's own users, each adapted to its training rows.

    Rows of unknown users (-1) are scored for their community, with variance of the user prior.
    """
    support, unit = _of_table(fitted, query)
    return predict_own(fitted.model, fitted.users, items, support, np.asarray(support.user), query, unit)


def _of_table(fitted: Fitted, query: Rows) -> tuple[Rows, np.ndarray]:
    """Training rows of the table's own users, and whose each query row is; unknown users share one number."""
    user, owner = np.asarray(query.user), np.asarray(fitted.rows.user)
    stranger = int(max(user.max(initial=-1), owner.max(initial=-1))) + 1
    return take(fitted.rows, owner >= 0), np.where(user >= 0, user, stranger)


def seen_on(fitted: Fitted, items: Item, query: Rows) -> Callable[[Item], tuple[np.ndarray, np.ndarray]]:
    """`predict_seen` for other features of the same items: users are adapted to `items`, once, and not to those.

    For families that are adapted row by row (`_AnyRoute`), whose users do not depend on what is asked.
    """
    model, users = fitted.model, fitted.users
    support, unit = _of_table(fitted, query)
    owner, support, query = np.asarray(support.user), strangers(support), strangers(query)
    with one_blas_thread():
        adapted = [
            (_adapt(model, users, items, padded(support, index), route(model, laplace_user)), rows)
            for index, rows in _rectangles(owner, unit, 2 * neutral_size(model))
        ]

    def predicted(view: Item) -> tuple[np.ndarray, np.ndarray]:
        mean, variance = np.zeros(len(unit)), np.zeros(len(unit))
        for posterior, rows in adapted:
            m, v = _predict(model, users, view, posterior, padded(query, rows))
            mean[rows[rows >= 0]] = np.asarray(m)[rows >= 0]
            variance[rows[rows >= 0]] = np.asarray(v)[rows >= 0]
        return mean, variance + float(users.residual)

    return predicted


@one_blas_thread()
def adapt_units(
    model: Any, users: Users, items: Item, support: Rows, unit: np.ndarray, *,
    adapter: Callable[..., UserPosterior] = laplace_user,
) -> dict[int, UserPosterior]:  # fmt: skip
    """Adapt every unit to its rows: {unit: posterior}. One call of the adapter a rectangle of units."""
    found: dict[int, UserPosterior] = {}
    for units, posterior in adapt_rectangles(model, users, items, support, unit, adapter=adapter):
        for i, u in enumerate(units):
            found[int(u)] = jax.tree.map(lambda x, i=i: x[i], posterior)
    return dict(sorted(found.items()))


def adapt_rectangles(
    model: Any, users: Users, items: Item, support: Rows, unit: np.ndarray, *,
    adapter: Callable[..., UserPosterior] = laplace_user,
) -> Iterator[tuple[np.ndarray, UserPosterior]]:  # fmt: skip
    """Yield units [u] and their posteriors, stacked as NumPy arrays [u, ...]: what a million users are kept as."""
    support, adapter = strangers(support), route(model, adapter)
    model, items = reduced(model, items)
    for units, index in buckets(unit, 4 * neutral_size(model)):
        posterior = jax.device_get(_adapt(model, users, items, padded(support, index), adapter))
        yield units, take(posterior, slice(len(units)))


@one_blas_thread()
def adapt_one(
    model: Any, users: Users, support: Comparisons[Item], *, adapter: Callable[..., UserPosterior] = laplace_user
) -> UserPosterior:
    """Adapt one unit to rows that carry their items (at least one row, NumPy)."""
    n = len(support.target)
    both = jax.tree.map(lambda a, b: np.concatenate([a, b]), support.first, support.second)
    items = take(both, np.pad(np.arange(2 * n), (0, step_up(2 * n) - 2 * n)))  # few shapes to compile
    rows = support.replace(first=np.arange(n), second=n + np.arange(n))
    [(_, stacked)] = adapt_rectangles(model, users, items, rows, np.zeros(n, int), adapter=adapter)
    return take(stacked, 0)


def joint_log_odds(model: Any, users: Users, items: Item, posterior: UserPosterior, rows: Rows) -> Joint:
    """Log-odds of rows and how they vary together under one user's posterior, as NumPy arrays (`adapt.Joint`)."""
    n = len(rows.target)
    parts = []
    for start in range(0, n, ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, n)
        width = step_up(stop - start)
        index = np.concatenate([np.arange(start, stop), np.full(width - (stop - start), -1)])
        joint = _joint(model, users, items, posterior.replace(base=""), padded(strangers(rows), index))
        parts.append(jax.tree.map(lambda x, m=stop - start: np.asarray(x, np.float64)[:m], joint))
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


@jax.jit
def _joint(model: Any, users: Users, items: Item, posterior: UserPosterior, rows: Rows) -> Joint:
    return predict_jointly(model, users, posterior, gathered(items, rows))


def predict_rows(
    model: Any, users: Users, items: Item, posterior: UserPosterior, rows: Rows
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the log-odds of rows, all under one user's posterior."""
    one = jax.tree.map(lambda x: jnp.asarray(x)[None], posterior.replace(base=""))
    width = step_up(len(rows.target))
    index = np.concatenate([np.arange(len(rows.target)), np.full(width - len(rows.target), -1)])
    m, v = _predict(model, users, items, one, padded(strangers(rows), index[None]))
    return np.asarray(m)[0, : len(rows.target)], np.asarray(v)[0, : len(rows.target)] + float(users.residual)


def gaussian_mean(function: Callable[[Any], Any], mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Mean of a function of a Gaussian, elementwise, by quadrature.

    >>> gaussian_mean(np.square, np.array([1.0]), np.array([4.0])).round(6)
    array([5.])
    """
    return function(mean[..., None] + np.sqrt(variance)[..., None] * _NODES) @ _MASSES


def probability_std(mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Standard deviation of s(l) for log-odds l with this mean and standard deviation."""
    first, second = (gaussian_mean(lambda x, p=p: expit(x) ** p, mean, std**2) for p in (1, 2))
    return np.sqrt(np.maximum(second - first**2, 0.0))


def user_rewards(model: Any, users: Users, items: Item, posterior: UserPosterior, community: int) -> np.ndarray:
    """Rewards of items under the mean user, [items]: their differences are the log-odds."""
    base, _ = gather(users, jnp.asarray(community), jnp.asarray(-1))
    return np.asarray(_gained(model, users, items, base, posterior.replace(base="", covariance=None)), np.float64)


@jax.jit
def _gained(model: Any, users: Users, items: Item, base: Any, posterior: UserPosterior) -> Array:
    moved = jax.tree.map(jnp.add, base, posterior.mean.state)

    def one(item: Item) -> Array:
        return users.scale * (posterior.mean.gain * model.reward(base, item) + model.reward(moved, item))

    return jax.vmap(one)(items)


def mean_rewards(
    model: Any, users: Users, items: Item, rows: Rows, given: list[Deviation | None]
) -> tuple[np.ndarray, np.ndarray]:
    """Rewards of both sides of each row under the mean user: the table's, or the deviation given for the row.

    Their difference are the log-odds, the user's care (gain) included.
    """
    zero = jax.tree.map(np.asarray, neutral(model))
    stacked = jax.tree.map(lambda *x: np.stack(x), *(zero if one is None else one for one in given))
    own = np.array([one is None for one in given])
    rows = rows.replace(user=np.where(own, rows.user, -1))
    first, second = _rewards(model, users, items, rows, stacked)
    return np.asarray(first, np.float64), np.asarray(second, np.float64)


@jax.jit
def _rewards(model: Any, users: Users, items: Item, rows: Rows, given: Deviation) -> tuple[Array, Array]:
    def one(row: Rows, given: Deviation) -> tuple[Array, Array]:
        base, own = gather(users, row.community, row.user)
        moved = jax.tree.map(lambda a, b, c: a + b + c, base, own.state, given.state)

        def reward(index: Any) -> Array:
            item = jax.tree.map(lambda x: x[index], items)
            return users.scale * ((own.gain + given.gain) * model.reward(base, item) + model.reward(moved, item))

        return reward(row.first), reward(row.second)

    return jax.lax.map(lambda pair: one(*pair), (rows, given), batch_size=4096)
