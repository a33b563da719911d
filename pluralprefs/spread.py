"""What is left open of inferred users: how far they depart from what is predicted of them, and how sharp they are.

spread   how far users depart from what is predicted, in directions in which users of the training differ, as what
         the answers of one user have in common says: that of the most evidence, in log-odds (`spread_of`)
scale    how much sharper one user is than the mean over users that a prediction is: with it the average over the
         spread says what was predicted (`scale_of`)
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit

from pluralprefs.fitting import Rows, at, padded, step_up, take
from pluralprefs.judging import SHOTS, usable_rows
from pluralprefs.models.residual import Residual
from pluralprefs.pooling import validation_nats
from pluralprefs.types import Item

MOST_DRAWS = 300  # of users, to learn what is left open
MODE_STEPS = 12  # of Newton's method
USUAL_SCALE = 0.5  # of log(scale) beside which a spread is learned, beforehand
NO_SPREAD = -5.0  # a logarithm: a spread of next to nothing, with which questions can still be ranked
NOTHING = 1e-3  # log-odds, below which nothing is predicted

Factor = float | Float[np.ndarray, " 2"]  # of the odd and the even part of a shift


class Asked(NamedTuple):
    """Comparisons that users are asked about: the odd and the even part of the shift that shots make, log-odds without
    them, whose draw it is, and how users of the training differ about it."""

    shift: Float[np.ndarray, "asked 2"]
    offset: Float[np.ndarray, " asked"]
    rows: Rows
    unit: Int[np.ndarray, " asked"]
    apart: Float[np.ndarray, "asked others"]


def predicted(found: Asked, factor: Factor) -> Float[np.ndarray, " asked"]:
    """Log-odds with a factor of each part of the shift, or one of both."""
    return found.offset + found.shift @ np.broadcast_to(factor, 2)


def disjoint(found: Asked) -> Asked:
    """Comparisons of which no two of a user's draw share a response: the first that do not, in order.

    What a user said of one response is in all its pairs. Evidence that takes them for answers of their own finds users
    to differ, and to be sure, far more than they do. All are kept where that leaves hardly anybody two to compare, as
    where each pair has a response that all pairs have.
    """
    kept = _no_response_twice(found.rows, found.unit)
    return take(found, kept) if kept.sum() >= 2 * len(np.unique(found.unit)) else found


def _no_response_twice(rows: Rows, unit: np.ndarray) -> Bool[np.ndarray, " rows"]:
    kept, seen = np.zeros(len(unit), bool), set()
    for row, sides in enumerate(zip(unit, rows.first, rows.second, strict=True)):
        both = {(sides[0], sides[1]), (sides[0], sides[2])}
        if not seen & both:
            kept[row] = True
            seen |= both
    return kept


def of_nobody(model: Residual, items: Item, rows: Rows, dependent: bool = False) -> Asked:
    """Up to `SHOTS` comparisons of each of some users of whom nothing is known, `disjoint` where they are dependent."""
    draw, user = np.random.default_rng(0), np.where(usable_rows(rows), rows.user, -1)
    known = draw.permutation(np.unique(user[user >= 0]))[:MOST_DRAWS]
    mixed = [draw.permutation(np.flatnonzero(user == one)) for one in known]
    chosen = [own[:SHOTS] for own in mixed]
    if dependent:
        apart = [own[_no_response_twice(take(rows, own), user[own])][:SHOTS] for own in mixed]
        chosen = apart if sum(map(len, apart)) >= 2 * len(apart) else chosen
    place = np.concatenate([np.zeros(0, int), *chosen])
    picked = take(rows, place)
    return Asked(np.zeros((len(place), 2)), np.asarray(picked.offset, float), picked, user[place],
                 differences(model, items, picked))  # fmt: skip


def differences(model: Residual, items: Item, rows: Rows) -> Float[np.ndarray, "rows others"]:
    """How users of the training differ about the log-odds of `rows`: `left_open` of a user whose spread is 1."""
    sides = np.stack([rows.first, rows.second])
    met, place = np.unique(sides, return_inverse=True)
    index = np.pad(met, (0, step_up(len(met)) - len(met)))  # few shapes to compile
    rewards, (first, second) = np.asarray(_rewards_apart(model, items, index)), place.reshape(sides.shape)
    return rewards[first] - rewards[second]


@jax.jit
def _rewards_apart(model: Residual, items: Item, index: Int[Array, " items"]) -> Float[Array, "items others"]:
    user = model.init_user() | {"spread": jnp.ones(())}
    return jax.lax.map(lambda one: model.left_open(user, at(items, one)), index, batch_size=1024)


def left_open(found: Asked, factor: Factor, usual: float = 1.0) -> tuple[float, float]:
    """Scale of what is predicted (`scale_of`), and spread of users about it (`spread_of`)."""
    spread = spread_of(found, factor, usual)
    return scale_of(found, factor, spread), spread


def spread_of(found: Asked, factor: Factor, usual: float = 1.0) -> float:
    """The spread of users, about a prediction with these factors, that has the most evidence, with a scale of its own.

    What is predicted is the mean of a Gaussian process over a user's answers, whose kernel says how users of the
    training differ, and each draw is a user. Next to nothing is open where the answers say so, nothing where users of
    the training do not differ, or nobody answers.

    Few users say little: log(scale) is normal beforehand with deviation `USUAL_SCALE`, the spread half Cauchy with
    scale `usual`, in log-odds. The draws of one user count as one.
    """
    draws, begin, unit = np.unique(found.unit, return_index=True, return_inverse=True)
    if not len(draws) or not found.apart.any():
        return 0.0
    user = np.asarray(found.rows.user)[begin]
    chosen = np.sort(np.random.default_rng(0).permutation(len(draws))[:MOST_DRAWS])
    lines = np.full((min(step_up(len(chosen)), MOST_DRAWS), SHOTS), -1)  # few shapes to compile
    for line, draw in zip(lines, chosen, strict=False):
        own = np.flatnonzero(unit == draw)  # a draw asks no more
        line[: len(own)] = own
    rows = padded(found.rows.replace(offset=predicted(found, factor).astype(np.float32)), lines)
    apart = found.apart[np.maximum(lines, 0)].astype(np.float32)
    kernel, repeats = np.einsum("uiv,ujv->uij", apart, apart), len(chosen) / len(np.unique(user[chosen]))
    lost = partial(_lost, kernel, rows, repeats, max(usual, np.exp(NO_SPREAD)))
    best: Any = minimize(lost, np.zeros(2), jac=True, method="L-BFGS-B", tol=1e-5,
                         bounds=[(-1.6, 1.6), (NO_SPREAD, 3.5)])  # fmt: skip
    return float(np.exp(best.x[1]))


def scale_of(found: Asked, factor: Factor, spread: float) -> float:
    """How much sharper one user is than the mean over users that is predicted: 1 where nothing is open.

    With this scale the average over what is open says what was predicted, as nearly as one scale for all comparisons
    can: it loses the fewest nats on the predictions themselves. Answers have no part in it: what is predicted was
    fitted to those of many users already, and the few who are held out would add their noise. None is below 1.
    """
    if not len(found.unit):
        return 1.0
    mean = predicted(found, factor)
    variance = spread**2 * np.einsum("rv,rv->r", found.apart, found.apart)
    if np.abs(mean).max() < NOTHING:  # any scale keeps that: what it is where little is predicted
        flatter = 1 / np.sqrt(1 + np.pi * variance / 8)
        return float(flatter.mean() / (flatter**2).mean())
    meant = found.rows.replace(target=expit(mean))

    def nats(log_scale: float) -> float:
        return validation_nats(np.exp(log_scale) * mean, variance, meant)

    scaled: Any = minimize_scalar(nats, bounds=(0.0, np.log(10.0)), method="bounded")
    return float(np.exp(scaled.x))


def _lost(
    kernel: np.ndarray, rows: Rows, repeats: float, usual: float, logarithms: np.ndarray
) -> tuple[float, np.ndarray]:
    """Minus the log posterior of a scale and a spread, and its slope; each user is there `repeats` times."""
    nats, slope = lost_evidence(jnp.asarray(logarithms, jnp.float32), kernel, rows)
    if not np.isfinite(nats) or not np.isfinite(slope).all():  # steps that ran away: this is not the place
        return 1e12, np.zeros(2)
    standard, squared = logarithms[0] / USUAL_SCALE, np.exp(2 * logarithms[1]) / usual**2
    beforehand = 0.5 * standard**2 + np.log1p(squared), np.array([standard / USUAL_SCALE, 2 * squared / (1 + squared)])
    return float(nats) / repeats + beforehand[0], np.asarray(slope, float) / repeats + beforehand[1]


@jax.jit
@jax.value_and_grad
def lost_evidence(logarithms: Float[Array, 2], kernel: Float[Array, "users rows rows"], rows: Rows) -> Float[Array, ""]:
    """Minus the log evidence of a scale and a spread, by Laplace's method (Rasmussen and Williams 2006, 3.1)."""
    scale, spread = jnp.exp(logarithms)

    def one(kernel: Float[Array, "rows rows"], rows: Rows) -> Float[Array, ""]:
        kernel = spread**2 * kernel
        fixed = scale * rows.offset

        def step(f: Float[Array, " rows"], _: None) -> tuple[Float[Array, " rows"], None]:
            return kernel @ solved(f)[0], None

        def solved(f: Float[Array, " rows"]) -> tuple[Array, Array]:
            p = jax.nn.sigmoid(fixed + f)
            root = jnp.sqrt(jnp.maximum(rows.weight * p * (1 - p), 1e-12))  # of padding, a slope
            triangle = jnp.linalg.cholesky(jnp.eye(len(root)) + root[:, None] * kernel * root[None, :])
            b = root**2 * f + rows.weight * (rows.target - p)
            a = b - root * jax.scipy.linalg.cho_solve((triangle, True), root * (kernel @ b))
            return a, jnp.sum(jnp.log(jnp.diagonal(triangle)))

        f, _ = jax.lax.scan(step, jnp.zeros_like(fixed), None, length=MODE_STEPS)
        f, _ = step(jax.lax.stop_gradient(f), None)  # where a step ends at the mode, its slope is that of the mode
        a, half_log_det = solved(f)
        f = kernel @ a
        logits = fixed + f
        nats = rows.target * jax.nn.softplus(-logits) + (1 - rows.target) * jax.nn.softplus(logits)
        return 0.5 * a @ f + jnp.sum(rows.weight * nats) + half_log_det

    return jnp.sum(jax.vmap(one)(kernel, rows))
