"""What is left open of inferred users: how far they depart from what is predicted of them, and how sharp they are.

spread       how far users of whom nothing is known depart from what is predicted, in directions in which users of the
             training differ, as what the answers of one user have in common says: that of the most evidence, in
             log-odds (`left_open`)
efficiency   the share of what shots tell of the unknowns that a family has read: it leaves as much open as an ideal
             reader of so much less would, by evidence, and so much that what it predicts and what is open vary together
             as users do (`efficiency_of`)
scale        how much sharper one user is than the mean over users that a prediction is: with it the average over the
             unknowns says what was predicted (`scale_of`)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.optimize import brentq, minimize_scalar
from scipy.special import expit

from pluralprefs.directions import Ways, differences, directed
from pluralprefs.fitting import Rows, padded, step_up, take
from pluralprefs.judging import SHOTS, usable_rows
from pluralprefs.models.residual import Residual
from pluralprefs.pooling import validation_nats
from pluralprefs.types import Item, Key

MOST_DRAWS = 300  # of users, to learn what is left open
MIXES = (0.0, 0.1, 0.3, 0.6, 1.0)  # the features' part of the variance in which users differ, to choose from
MODE_STEPS = 12  # of Newton's method
STEPS = 0.5 ** np.arange(6)  # parts of such a step, of which the best is taken
SAMPLES, WIDER = 256, 1.1  # of a user's unknowns, and their standard deviation in that of Laplace's method
NO_SPREAD = -5.0  # a logarithm: a spread of next to nothing, with which questions can still be ranked
MOST_SPREAD = 3.5  # the same
NOTHING = 1e-3  # log-odds, below which nothing is predicted

Factor = float | Float[np.ndarray, " 2"]  # of the odd and the even part of a shift


class Asked(NamedTuple):
    """Comparisons that users are asked about: the odd and the even part of the shift that shots make, log-odds without
    them, whose draw it is, what each has of the unknowns of its draw, and what shots tell of these (`Residual`)."""

    shift: Float[np.ndarray, "asked 2"]
    offset: Float[np.ndarray, " asked"]
    rows: Rows
    unit: Int[np.ndarray, " asked"]
    apart: Float[np.ndarray, "asked directions"]
    known: Float[np.ndarray, "asked directions"]


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
    apart = differences(model, items, picked)
    return Asked(np.zeros((len(place), 2)), np.asarray(picked.offset, float), picked, user[place], apart, 0 * apart)


def mixed(model: Residual, found: Ways, items: Item, rows: Rows, dependent: bool = False) -> float:
    """The mix of directions (`directed`) in which users of whom nothing is known differ, by evidence."""
    if not found.rewards.unit:
        return 1.0
    lost = {}
    for mix in MIXES:
        asked = of_nobody(directed(model, found, mix), items, rows, dependent)
        lost[mix] = _most_evident(asked, 0.0)[1]
    return min(lost, key=lost.__getitem__)


def left_open(found: Asked, factor: Factor) -> tuple[float, float]:
    """Scale of what is predicted (`scale_of`), and the spread of users about it that has the most evidence.

    Next to nothing is open where the answers say so, nothing where users of the training do not differ, or nobody
    answers. Few users say little: the spread is half Cauchy beforehand with scale 1, in log-odds.
    """
    spread = _most_evident(found, factor)[0]
    return scale_of(found, factor, spread), spread


def _most_evident(found: Asked, factor: Factor) -> tuple[float, float]:
    """The spread, and minus its log evidence."""
    if not len(found.unit) or not found.apart.any():
        return 0.0, np.inf
    lost = _evidence(found, factor)

    def posterior(logarithm: float) -> float:
        spread = np.exp(logarithm)
        return lost(spread, 0.0) + np.log1p(spread**2)

    best: Any = minimize_scalar(posterior, bounds=(NO_SPREAD, MOST_SPREAD), method="bounded", options={"xatol": 1e-3})
    return float(np.exp(best.x)), float(best.fun)


def efficiency_of(found: Asked, factor: Factor, spread: float) -> float:
    """The share in [0, 1] of what shots tell that a prediction with these factors has read: that of the most evidence,
    up to `_most_read`.

    Answers tell the sign of log-odds and little of their size: of few users the evidence is much the same for any
    share, and what bounds it decides. Where predictions are larger than they should be, the evidence does.
    """
    most = _most_read(found, factor, spread)
    if not most:
        return 0.0
    lost = _evidence(found, factor)
    best: Any = minimize_scalar(lambda root: lost(spread, root**2), bounds=(0.0, np.sqrt(most)), method="bounded",
                                options={"xatol": 1e-3})  # fmt: skip
    return float(best.x**2)


def _most_read(found: Asked, factor: Factor, spread: float) -> float:
    """The efficiency with which predictions and what is open after them vary together as users do (the law of total
    variance): with more, part of how users differ would be neither predicted nor open."""
    if not spread or not len(found.unit) or not found.apart.any():
        return 0.0

    def meant(factor: Factor, efficiency: float) -> np.ndarray:
        """Log-odds of whom the predictions are means over what is open."""
        return scale_of(found, factor, spread, efficiency) * predicted(found, factor)

    whole, before = (_open(found, spread, 0.0) * found.apart**2).sum(1).mean(), meant(0.0, 0.0)

    def too_much(root: float) -> float:
        """Variance that is there twice, with the efficiency `root` squared."""
        still = (_open(found, spread, root**2) * found.apart**2).sum(1).mean()
        return float(((meant(factor, root**2) - before) ** 2).mean() + still - whole)

    if too_much(0.0) <= NOTHING**2:
        return 0.0
    root: Any = 1.0 if too_much(1.0) >= 0 else brentq(too_much, 0.0, 1.0, xtol=1e-3)
    return float(root) ** 2


def _evidence(found: Asked, factor: Factor) -> Callable[[float, float], float]:
    """Minus the log evidence of a spread and an efficiency, with the scale that goes with them (`scale_of`): a free one
    would take what trust has left out of a prediction for its sharpness.

    Each draw is a user, but the draws of one user count as one.
    """
    draws, begin, unit = np.unique(found.unit, return_index=True, return_inverse=True)
    user = np.asarray(found.rows.user)[begin]
    chosen = np.sort(np.random.default_rng(0).permutation(len(draws))[:MOST_DRAWS])
    lines = np.full((min(step_up(len(chosen)), MOST_DRAWS), SHOTS), -1)  # few shapes to compile
    for line, draw in zip(lines, chosen, strict=False):
        own = np.flatnonzero(unit == draw)  # a draw asks no more
        line[: len(own)] = own
    rows = padded(found.rows.replace(offset=predicted(found, factor).astype(np.float32)), lines)
    repeats = len(chosen) / len(np.unique(user[chosen]))

    def lost(spread: float, efficiency: float) -> float:
        apart = found.apart * np.sqrt(_open(found, spread, efficiency))
        scale = scale_of(found, factor, spread, efficiency)
        return float(lost_evidence(scale, apart[np.maximum(lines, 0)].astype(np.float32), rows)) / repeats

    return lost


def _open(found: Asked, spread: float, efficiency: float) -> Float[np.ndarray, "asked directions"]:
    """Variances of the unknowns, in squared log-odds."""
    return spread**2 / (1 + efficiency * spread**2 * found.known)


def scale_of(found: Asked, factor: Factor, spread: float, efficiency: float = 0.0) -> float:
    """How much sharper one user is than the mean over users that is predicted: 1 where nothing is open.

    With this scale the average over what is open says what was predicted, as nearly as one scale for all comparisons
    can: it loses the fewest nats on the predictions themselves. Answers have no part in it: what is predicted was
    fitted to those of many users already, and the few who are held out would add their noise. None is below 1.
    """
    if not len(found.unit):
        return 1.0
    mean = predicted(found, factor)
    variance = (_open(found, spread, efficiency) * found.apart**2).sum(1)
    if np.abs(mean).max() < NOTHING:  # any scale keeps that: what it is where little is predicted
        flatter = 1 / np.sqrt(1 + np.pi * variance / 8)
        return float(flatter.mean() / (flatter**2).mean())
    meant = found.rows.replace(target=expit(mean))

    def nats(log_scale: float) -> float:
        return validation_nats(np.exp(log_scale) * mean, variance, meant)

    scaled: Any = minimize_scalar(nats, bounds=(0.0, np.log(10.0)), method="bounded")
    return float(np.exp(scaled.x))


@jax.jit
def lost_evidence(
    scale: Float[Array, ""], apart: Float[Array, "users rows directions"], rows: Rows
) -> Float[Array, ""]:
    """Minus the log evidence of users who depart from what is predicted, times a scale, by `apart` z, z ~ N(0, 1).

    By importance sampling from the Gaussian of Laplace's method, a little widened: that method alone (Rasmussen and
    Williams 2006, 3.4) finds too little spread where much is open and little is asked.
    """

    def one(key: Key, apart: Float[Array, "rows directions"], rows: Rows) -> Float[Array, ""]:
        fixed = scale * rows.offset
        half = WIDER * jax.random.normal(key, (SAMPLES // 2, apart.shape[-1]))
        draws = jnp.concatenate([half, -half])

        def joint(z: Float[Array, " directions"]) -> Float[Array, ""]:
            """Minus the log posterior of the unknowns."""
            logits = fixed + apart @ z
            nats = rows.target * jax.nn.softplus(-logits) + (1 - rows.target) * jax.nn.softplus(logits)
            return 0.5 * z @ z + jnp.sum(rows.weight * nats)

        def step(z: Float[Array, " directions"], _: None) -> tuple[Float[Array, " directions"], None]:
            whole = jax.scipy.linalg.cho_solve((triangle(z), True), jax.grad(joint)(z))
            tried = z[None] - jnp.outer(STEPS, whole)  # a whole one runs away where much is open
            return tried[jnp.argmin(jax.vmap(joint)(tried))], None

        def triangle(z: Float[Array, " directions"]) -> Float[Array, "directions directions"]:
            p = jax.nn.sigmoid(fixed + apart @ z)
            return jnp.linalg.cholesky(jnp.eye(len(z)) + (apart * (rows.weight * p * (1 - p))[:, None]).T @ apart)

        mode, _ = jax.lax.scan(step, jnp.zeros(apart.shape[-1]), None, length=MODE_STEPS)
        root = triangle(mode)
        at = mode[None] + jax.scipy.linalg.solve_triangular(root, draws.T, lower=True, trans=1).T
        heavier = 0.5 * jnp.sum((draws / WIDER) ** 2, axis=1) - jax.vmap(joint)(at)
        volume = jnp.sum(jnp.log(jnp.diagonal(root))) - len(mode) * jnp.log(WIDER)
        return volume - jax.nn.logsumexp(heavier) + jnp.log(len(draws))

    return jnp.sum(jax.vmap(one)(jax.random.split(jax.random.key(0), len(apart)), apart, rows))
