"""Fit a pooled user table in stages: population, communities, users; each on out-of-fold scores of the ones before.

`fit_pooled` is what every family goes through. Families that are linear in the user state (`LinearInUser`) have their
population fitted here, by Newton over all rows; the others bring the population and the shared parameters that a joint
gradient fit found (`training`), once on all rows and once per fold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize_scalar

from pluralprefs.adapt import neutral_size
from pluralprefs.adapting import adapt_and_predict, predict_seen
from pluralprefs.data.ids import stable_hash
from pluralprefs.fitting import (
    Fitted,
    Moments,
    Rows,
    deviations,
    fit_scale,
    fit_strength,
    initial_root,
    row_log_odds,
    solve_level,
    strangers,
    take,
)
from pluralprefs.types import Item, LinearInUser
from pluralprefs.users import Pooled, Users, neutral, part_names

ENOUGH = 10_000  # users that teach the strength of all
TURNS = 10  # of scale and strength, at most
SETTLED = 0.005  # of the logarithm of the scale
NOTHING = 0.1  # of a base is left: it says nothing of users, and would be flattened for ever


@dataclass(frozen=True)
class Fold:
    """One part of the cross-fit: the rows it predicts and the rows it is fitted on (never the same)."""

    predict: np.ndarray
    fit: np.ndarray


Base = Callable[[np.ndarray | None], tuple[Any, Users]]


def folds_by(kind: str, rows: Rows, count: int) -> list[Fold]:
    """Cut training rows into folds by unordered "pair", by "item" or by "prompt" (the row's community).

    Rows are hashed by position-free names, so the folds do not depend on the file's order. By item, a row is predicted
    by a fit that saw neither of its two items, hence count * (count + 1) / 2 fits.
    """
    first, second = np.asarray(rows.first), np.asarray(rows.second)
    if kind == "pair":
        low, high = np.minimum(first, second), np.maximum(first, second)
        label = np.array([stable_hash(f"{a}|{b}") % count for a, b in zip(low, high, strict=True)])
        return [Fold(label == k, label != k) for k in range(count) if (label == k).any()]
    if kind == "prompt":
        label = np.array([stable_hash(f"prompt|{c}") % count for c in np.asarray(rows.community)])
        return [Fold(label == k, label != k) for k in range(count) if (label == k).any() and (label != k).any()]
    if kind != "item":
        raise ValueError(f"cross_fit is 'pair', 'item', 'prompt' or None, not {kind!r}")
    a = np.array([stable_hash(f"item|{i}") % count for i in first])
    b = np.array([stable_hash(f"item|{i}") % count for i in second])
    low, high = np.minimum(a, b), np.maximum(a, b)
    found = []
    for i in range(count):
        for j in range(i, count):
            predict = (low == i) & (high == j)
            if predict.any():
                found.append((i != j, Fold(predict, ~np.isin(a, (i, j)) & ~np.isin(b, (i, j)))))
    return [fold for _, fold in sorted(found, key=lambda entry: entry[0])]  # both items in one part first


def prompt_parts(prompts: Sequence[str], count: int) -> list[np.ndarray]:
    """Which rows fall into each of at most `count` parts of the prompts, whole prompts each: masks, [rows].

    Prompts are dealt out in the order of a hash, so that no part is empty while there are prompts enough.
    """
    place = {
        name: i % count for i, name in enumerate(sorted(set(prompts), key=lambda name: stable_hash(f"prompt|{name}")))
    }
    label = np.array([place[name] for name in prompts], int)
    return [label == part for part in range(min(count, len(place)))]


def fit_pooled(
    base: Base,
    items: Item,
    rows: Rows,
    pooled: Pooled,
    *,
    users: int,
    communities: int,
    validation: Rows | None = None,
    notes: dict[str, Any] | None = None,
) -> Fitted:
    """Fit communities and users on top of `base` and return the whole table.

    base(mask) returns (model, users) with the population fitted on the rows of the mask (None: all), and no deviations.
    `validation` rows choose the tempering exponent where `pooled.temper` offers several, and the residual variance; the
    exponent of the communities is `notes["population_temper"]`, which whatever fitted the population leaves there.
    """
    notes = {} if notes is None else notes
    model, table = base(None)
    table = _sized(model, table, users=users, communities=communities)
    roots: dict[str, np.ndarray] = {}
    table = _fit_communities(model, table, items, rows, pooled, None, roots, notes)
    if pooled.cross_fit and len(rows.target) > 0:
        offset = np.zeros(len(rows.target), np.float32)
        at_base = row_log_odds(model, table, items, strangers(rows))
        for fold in folds_by(pooled.cross_fit, rows, pooled.folds):
            fold_model, fold_table = base(fold.fit)
            fold_table = _sized(fold_model, fold_table, users=users, communities=communities)
            fold_table = _fit_communities(fold_model, fold_table, items, rows, pooled, fold.fit, roots, notes)
            part = strangers(take(rows, fold.predict))
            shift = row_log_odds(fold_model, fold_table, items, part) - at_base[fold.predict]
            offset[fold.predict] = shift / float(table.scale)
        rows = rows.replace(offset=offset)
    if "user" not in pooled.levels or users == 0:
        return Fitted(model, table.replace(user_root=jnp.zeros_like(table.user_root)), rows, notes)
    return _fit_users(model, table, items, rows, pooled, users, validation, notes)


def _sized(model: Any, table: Users, *, users: int, communities: int) -> Users:
    empty = Users.init(model, users=users, communities=communities)
    root = jnp.zeros(neutral_size(model))
    return empty.replace(population=table.population, scale=table.scale, community_root=root, user_root=root)


def _fit_communities(
    model: Any, table: Users, items: Item, rows: Rows, pooled: Pooled, mask: np.ndarray | None,
    roots: dict[str, np.ndarray], notes: dict[str, Any],
) -> Users:  # fmt: skip
    """Fit the community level on the masked rows; its strength is learned once, on all rows, and kept for the folds."""
    count = table.community.gain.shape[0]
    if "community" not in pooled.levels or count == 0:
        return table
    rows = tempered(rows, notes.get("population_temper", 1.0))
    unit = np.asarray(rows.community).copy()
    if mask is not None:
        unit[~mask] = -1
    flat = strangers(rows).replace(community=np.full_like(rows.community, -1))
    if "community" not in roots:
        root = initial_root(model, table, items, flat, pooled.strength)
        root = _shared(model, root, pooled.population_parts)
        roots["community"], moments = fit_strength(model, table, items, flat, unit, count, root, rounds=pooled.rounds)
        notes["community_strength"] = strengths(model, roots["community"])
    else:
        moments = solve_level(model, table, items, flat, unit, count, roots["community"])
    root = roots["community"]
    return table.replace(community=deviations(model, root, moments.mean), community_root=jnp.asarray(root))


def strengths(model: Any, root: np.ndarray) -> dict[str, float]:
    """Prior standard deviation of each part of the state (root mean square over its coordinates)."""
    names = np.array(part_names(neutral(model)))
    deviation = np.sqrt((np.atleast_2d(root if root.ndim == 2 else np.diag(root)) ** 2).sum(1))
    return {str(n): float(np.sqrt((deviation[names == n] ** 2).mean())) for n in dict.fromkeys(names)}


def _fit_users(
    model: Any, table: Users, items: Item, rows: Rows, pooled: Pooled, users: int, validation: Rows | None,
    notes: dict[str, Any],
) -> Fitted:  # fmt: skip
    """Learn the user level for every tempering exponent on offer and keep the best on validation."""
    names = np.array(part_names(neutral(model)))
    start = initial_root(model, table, items, strangers(rows), pooled.strength)
    if not pooled.gain:
        start[names == "gain"] = 0.0
    if pooled.parts is not None:
        start[~np.isin(names, (*pooled.parts, "gain"))] = 0.0
    if pooled.covariance == "full":
        start = np.diag(np.where(start > 0, start + 1e-3, 0.0))
    best: tuple[float, Fitted] | None = None
    tried = {}
    for exponent in pooled.temper:
        support = tempered(rows, exponent)
        scaled, root, moments = _users_and_scale(model, table, items, strangers(support), pooled, users, start,
                                                 np.asarray(rows.user))  # fmt: skip
        candidate = scaled.replace(
            user=deviations(model, root, moments.mean), user_root=jnp.asarray(root),
            residual=jnp.float32(0.0 if pooled.residual is True else pooled.residual),
        )  # fmt: skip
        fitted = Fitted(model, candidate, support, notes | {
            "temper": exponent, "user_strength": strengths(model, root), "evidence": moments.evidence,
            "scale": float(scaled.scale),
        })  # fmt: skip
        nats = 0.0
        if validation is not None and len(validation.target):
            mean, variance = predict_seen(fitted, items, validation)
            if pooled.residual is True:
                residual = residual_variance(mean, variance, validation)
                fitted.users = candidate.replace(residual=jnp.float32(residual))
                fitted.notes["residual"] = residual
                variance = variance + residual
            nats = validation_nats(mean, variance, validation)
            fitted.notes["validation_nll"] = nats
        tried[str(exponent)] = nats
        if best is None or nats < best[0]:
            best = nats, fitted
    assert best is not None
    if len(tried) > 1:
        best[1].notes["temper_validation_nll"] = tried
    return best[1]


def _users_and_scale(
    model: Any, table: Users, items: Item, rows: Rows, pooled: Pooled, users: int, root: np.ndarray, unit: np.ndarray
) -> tuple[Users, np.ndarray, Moments]:
    """Learn the users' strength and, where there is a base, how sharp it is for one user, in turn until that settles.

    Each waits for the other: a base that is too flat leaves users too little to differ by, who would sharpen it.
    Of more than `ENOUGH` users a fixed sample of that many teaches both: their error is then below a per cent.
    """
    known = np.unique(unit[unit >= 0])
    taught, count = unit, users
    if len(known) > ENOUGH:
        chosen = np.sort(np.random.default_rng(0).choice(known, ENOUGH, replace=False))
        taught, count = np.where(np.isin(unit, chosen), np.searchsorted(chosen, unit), -1), ENOUGH
    strength = partial(fit_strength, rounds=pooled.rounds, care=pooled.gain)
    root, moments = strength(model, table, items, rows, taught, count, root)
    first = float(table.scale)
    for _ in range(TURNS if pooled.population and len(known) else 0):
        before = float(table.scale)
        table, root, moments = fit_scale(model, table, items, rows, taught, count, root, moments, care=pooled.gain)
        if abs(np.log(float(table.scale) / before)) < SETTLED or float(table.scale) < NOTHING * first:
            break
        root, moments = strength(model, table, items, rows, taught, count, root)
    if count != users:
        moments = solve_level(model, table, items, rows, unit, users, root, care=pooled.gain)
    return table, root, moments


def half_fits(base: Base, fitted: Fitted) -> list[Fitted]:
    """The fit with shared parameters from either half of the users, the rest unchanged; empty where they are few."""
    user = np.asarray(fitted.rows.user)
    side = np.array([stable_hash(f"half|{u}") % 2 for u in user])
    if len(np.unique(user[user >= 0])) < 4 or len(np.unique(side[user >= 0])) < 2:
        return []
    found = []
    for half in (0, 1):
        model, population = base(side == half)
        found.append(replace(fitted, model=model, users=fitted.users.replace(population=population.population)))
    return found


def shared_variance(halves: Sequence[Fitted], items: Item, *, most: int = 500) -> float:
    """Variance of a user's log-odds that comes from the shared parameters, which posteriors take as given.

    Both of `half_fits` adapt everyone (`most` users at most) to one half of their rows and predict the other.
    Estimates from halves have twice the variance of one from all, and their difference four times: the mean squared
    difference is divided by 4. 0 where there are no halves.
    """
    if not halves:
        return 0.0
    rows = halves[0].rows
    user = np.asarray(rows.user)
    known = np.unique(user[user >= 0])
    pairs = zip(user, np.asarray(rows.first), np.asarray(rows.second), strict=True)
    even = np.array([stable_hash(f"row|{u}|{first}|{second}") % 2 == 0 for u, first, second in pairs])
    chosen = np.isin(user, known[np.linspace(0, len(known) - 1, min(most, len(known))).astype(int)])
    given, asked = (np.flatnonzero(chosen & half) for half in (even, ~even))
    if not len(asked):
        return 0.0
    means = [
        adapt_and_predict(half.model, half.users, items, take(rows, given), user[given], take(rows, asked), user[asked])
        for half in halves
    ]
    return float(np.mean((means[0][0] - means[1][0]) ** 2) / 4)


def residual_variance(mean: np.ndarray, variance: np.ndarray, rows: Rows) -> float:
    """Variance in [0, 100] to add to `variance` so that moderated predictions of the rows lose the fewest nats."""
    found: Any = minimize_scalar(
        lambda log_variance: validation_nats(mean, variance + np.exp(log_variance), rows), bounds=(-7.0, 4.6),
        method="bounded",
    )  # fmt: skip
    value = float(np.exp(found.x))
    return value if found.fun < validation_nats(mean, variance, rows) - 1e-5 else 0.0


def validation_nats(mean: np.ndarray, variance: np.ndarray, rows: Rows) -> float:
    """Mean negative log-likelihood of moderated predictions, in nats."""
    logits = mean / np.sqrt(1 + np.pi * variance / 8)
    nats = rows.target * np.logaddexp(0, -logits) + (1 - rows.target) * np.logaddexp(0, logits)
    return float(np.average(nats, weights=rows.weight))


def population_by_newton(
    model: Any,
    items: Item,
    rows: Rows,
    *,
    strength: float = 1.0,
    rounds: int = 6,
    parts: tuple[str, ...] | None = None,
    skip: bool = False,
) -> tuple[Base, dict[str, Any]]:
    """`base` for families that are linear in the user state: the population is a deviation from the neutral user.

    Part strengths are learned by empirical Bayes on all rows; folds refit the weights under the same strengths.
    `parts` names the parts it has (None: all); `skip` leaves it at zero.
    """
    if not isinstance(model, LinearInUser):
        raise TypeError(f"{type(model).__name__} is not linear in the user state: fit its population by gradient")
    flat = strangers(rows).replace(community=np.full_like(rows.community, -1))
    empty = Users.init(model, users=0, communities=0)
    if skip:
        return (lambda mask: (model, empty)), {}
    root = initial_root(model, empty, items, flat, strength)
    root = _shared(model, root, parts)
    unit = np.zeros(len(rows.target), np.int64)
    root, moments = fit_strength(model, empty, items, flat, unit, 1, root, rounds=rounds)
    whole = _population(model, empty, root, moments.mean)
    notes = {"population_strength": strengths(model, root), "population_evidence": moments.evidence}

    solved: dict[bytes, Users] = {}

    def base(mask: np.ndarray | None) -> tuple[Any, Users]:
        if mask is None:
            return model, whole
        if mask.tobytes() not in solved:
            mode = solve_level(model, empty, items, flat, np.where(mask, 0, -1), 1, root).mean
            solved[mask.tobytes()] = _population(model, empty, root, mode)
        return model, solved[mask.tobytes()]

    return base, notes


def tempered_population(
    model: Any, items: Item, rows: Rows, pooled: Pooled, validation: Rows | None
) -> tuple[Base, dict[str, Any]]:
    """`population_by_newton` with its likelihood raised to the exponent that predicts validation rows best."""
    asked = validation if validation is not None and len(validation.target) else None
    tried, found = {}, {}
    for exponent in pooled.population_temper if asked is not None else pooled.population_temper[:1]:
        base, notes = population_by_newton(
            model, items, tempered(rows, exponent), parts=pooled.population_parts, skip=not pooled.population
        )
        found[exponent] = base, notes | {"population_temper": exponent}
        tried[exponent] = 0.0
        if asked is not None:
            mean = row_log_odds(*base(None), items, strangers(asked))
            tried[exponent] = validation_nats(mean, np.zeros_like(mean), asked)
    base, notes = found[min(tried, key=lambda exponent: tried[exponent])]
    if len(tried) > 1:
        notes |= {"population_temper_validation_nll": {str(k): v for k, v in tried.items()}}
    return base, notes


def tempered(rows: Rows, exponent: float) -> Rows:
    """Rows whose likelihood is raised to a power."""
    return rows.replace(weight=(rows.weight * exponent).astype(np.float32))


def _shared(model: Any, root: np.ndarray, parts: tuple[str, ...] | None) -> np.ndarray:
    """A root without the gain, which is a user's alone, and without parts that are not asked for."""
    names = np.array(part_names(neutral(model)))
    keep = names != "gain" if parts is None else np.isin(names, parts)
    return np.where(keep, root, 0.0).astype(np.float32)


def _population(model: Any, table: Users, root: np.ndarray, mode: np.ndarray) -> Users:
    state = jax.tree.map(lambda x: x[0], deviations(model, root, mode).state)
    return table.replace(population=jax.tree.map(jnp.add, table.population, state))
