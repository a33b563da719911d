"""Newton's method for one unit: the posterior of a whitened deviation under a unit Gaussian prior.

`newton` works on latent values (a row's log-odds shift, or a distinct item's reward) and solves whichever system is
smaller: one unknown per coordinate (primal) or one per latent value (dual). `newton_by_coordinates` is for units with
more rows than coordinates: its sums over rows never make anything of size [rows, rows]. Both step to the mode, then
take `ROUNDS` of moments; see `adapt`. No step raises the objective, and a round that lowers the bound of the evidence
by more than `AWAY` is not taken: where a prior is so wide that a mixture saturates, whole steps run away to NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pluralprefs.pytrees import pytree
from pluralprefs.types import Comparisons

STEPS = 32  # at most
ENOUGH = 8  # steps after which only those are worth it that lower the objective by more than `WORTH`
WORTH = 0.01  # nats
ROUNDS = 2  # of the moments; more change a strength by less than 1 %
LENGTHS = (1.0, 0.5, 0.125, 0.015625)  # of a step, in Newton's
AWAY = 3.0  # nats by which a round that runs away lowers the bound at least; the bound of a linearisation errs by less
_NODES, _MASSES = (x.astype(np.float32) for x in np.polynomial.hermite_e.hermegauss(12))
_MASSES = _MASSES / _MASSES.sum()  # quadrature of a standard normal


@pytree
class Judgements:
    """One unit's rows in terms of latent values: log-odds = fixed + care latent[-1] + latent[first] - latent[second].

    The last latent value is the gain, where `care` is not zero. Indices of -1 contribute nothing.
    """

    first: Any  # Int[Array, " rows"], or NumPy before a call
    second: Any  # Int[Array, " rows"], or NumPy before a call
    fixed: Any  # Float[Array, " rows"], or NumPy before a call
    care: Any  # Float[Array, " rows"], or NumPy before a call
    target: Any  # Float[Array, " rows"], or NumPy before a call
    weight: Any  # Float[Array, " rows"], or NumPy before a call


class Solution(NamedTuple):
    """Posterior of a whitened deviation.

    mean        [size], or [latents] on the way to it (see `newton`); the mode after no rounds of moments
    jacobian    [latents, size] derivatives of the latent values, a, where the last round took them; where latents are
                not fewer than coordinates, the coordinates are the latents and it is the identity
    precision   [latents, latents] M = (C^-1 + a a')^-1, C the (expected) curvature of minus the log-likelihood in the
                latent values: the whitened covariance is I - a' M a
    evidence    lower bound of the log evidence, nats; Laplace's after no rounds
    """

    mean: Float[Array, " unknowns"]
    jacobian: Float[Array, "latents size"]
    precision: Float[Array, "latents latents"]
    evidence: Float[Array, ""]


Vector = Float[Array, " size"]


def newton(
    values: Callable[[Vector], Float[Array, " latents"]],
    jacobian: Callable[[Vector], Float[Array, "latents size"]] | Float[Array, "latents size"],
    rows: Judgements,
    size: int,
    *,
    steps: int = STEPS,
    rounds: int = ROUNDS,
) -> Solution:
    """Find the posterior of a whitened deviation under a unit Gaussian prior, by damped Gauss-Newton.

    `values` gives the latent values at a deviation; `jacobian` their derivatives, an array where they are constant.
    A step is the best of `LENGTHS`, or none; iteration stops when no step lowers the objective or moves, when one after
    `ENOUGH` gains less than `WORTH`, or after `steps`. Then `rounds` of moments follow (see the module).
    """
    constant = None if callable(jacobian) else jacobian
    gram = None if constant is None else _gram(constant)
    at = jacobian if callable(jacobian) else lambda _: jacobian
    # With a constant jacobian a and fewer latent values than coordinates, a deviation is a' x and all is told by a a'.
    zero = values(jnp.zeros(size))
    inside = values if gram is None else lambda x: zero + gram @ x
    along = (lambda a, x: a @ x) if gram is None else lambda _, x: gram @ x
    square = (lambda x: x @ x) if gram is None else lambda x: jnp.maximum(x @ (gram @ x), 0.0)
    # Where rows repeat each other under a wide prior, x' a a' x cancels: what of it is rounding is no objective.
    rounding = None if gram is None else jnp.finfo(gram.dtype).eps * jnp.abs(gram)
    noise = (lambda _: 0.0) if rounding is None else lambda x: jnp.abs(x) @ (rounding @ jnp.abs(x))
    moved = (lambda x: x) if gram is None else lambda x: gram @ x

    def objective(x: Vector) -> Float[Array, ""]:
        return jnp.sum(_nats(_logits(inside(x), rows), rows)) + 0.5 * square(x)

    def propose(x: Vector) -> Vector:
        a = at(x)
        gradient, curvature = _curvature(_logits(inside(x), rows), rows, a.shape[0])
        return _solve(a, gram, curvature, curvature @ along(a, x) + gradient)

    def lifted(found: Solution) -> Solution:
        return found if gram is None or constant is None else found._replace(mean=constant.T @ found.mean)

    latents = jax.eval_shape(at, jnp.zeros(size)).shape[0]
    mean = _descend(propose, jax.vmap(objective), moved, noise, size if gram is None else latents, steps)
    if not rounds:
        a = at(mean)
        gradient, curvature = _curvature(_logits(inside(mean), rows), rows, a.shape[0])
        _, _, shape, determinant = _posterior(a, gram, curvature, gradient)
        return lifted(Solution(mean, *shape, -objective(mean) - 0.5 * determinant))

    def bound(mean: Vector, covariance: Array, curvature: Array, determinant: Array) -> Array:
        logits, deviation = _logits(inside(mean), rows), jnp.sqrt(_row_variance(covariance, rows))
        nats = _MASSES @ jax.vmap(lambda node: _nats(logits + node * deviation, rows))(_NODES)
        known = jnp.sum(curvature * covariance)  # size minus the trace of the whitened covariance
        return -jnp.sum(nats) - 0.5 * (square(mean) - known + determinant)

    def again(mean: Vector, covariance: Array, moved: Array) -> tuple[Solution, Array]:
        a, spread = at(mean), _row_variance(covariance, rows)
        gradient, curvature = _curvature(_logits(inside(mean), rows), rows, a.shape[0], spread)
        target = curvature @ along(a, mean) + gradient
        settled, covariance, shape, determinant = _posterior(a, gram, curvature, target)
        mean = jnp.where(moved, settled, mean)
        return Solution(mean, *shape, bound(mean, covariance, curvature, determinant)), covariance

    return lifted(_rounds(again, mean, latents, rounds))


def _descend(
    propose: Callable[[Vector], Vector], objectives: Callable[[Float[Array, "trials size"]], Float[Array, " trials"]],
    moved: Callable[[Vector], Array], noise: Callable[[Vector], Any], size: int, steps: int,
) -> Vector:  # fmt: skip
    """Go from zero to the mode by steps that never raise the objective; of equally good ones by the longest.

    `moved` is what a step changes, by which its size is judged; `noise` is what the objective is not sure of beyond the
    rounding of its sum. Linear families are there after a few steps. Mixtures creep on for long without gaining, and
    all of a batch would wait; but a few are on a plateau after eight steps, with the mode still to be found.
    """

    def going(carry: tuple) -> Array:
        i, _, distance, gain = carry
        return (i < steps) & (distance > 1e-4) & ((i < ENOUGH) | (gain > WORTH))

    def step(carry: tuple) -> tuple:
        i, beta, *_ = carry
        proposal = propose(beta)
        trials = jnp.stack([beta + t * (proposal - beta) for t in LENGTHS] + [beta])
        found = jnp.nan_to_num(objectives(trials), nan=jnp.inf)
        chosen = jnp.argmax(found <= jnp.min(found) + _rounding(found[-1]) + noise(proposal))
        new = trials[chosen]
        return i + 1, new, jnp.max(jnp.abs(moved(new - beta))), found[-1] - found[chosen]

    carry = (0, jnp.zeros(size), jnp.asarray(jnp.inf), jnp.asarray(jnp.inf))
    return jax.lax.while_loop(going, step, carry)[1]


def _rounds(
    again: Callable[[Vector, Array, Array], tuple[Solution, Array]], mode: Vector, latents: int, rounds: int
) -> Solution:
    """Take the posterior at the mode, then `rounds` of moments, each from the covariance before.

    again(mean, covariance of the latent values, moved) returns both anew, the mean as it was unless `moved`. The mode
    is a round without variance that does not move, so that one program serves all: compiling is most of a small fit.
    """
    none = jnp.zeros((latents, latents))
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(again, mode, none, jnp.asarray(True)))

    def one(best: tuple[Solution, Array], i: Array) -> tuple[tuple[Solution, Array], None]:
        mean = jnp.where(i > 0, best[0].mean, mode)
        found = again(mean, best[1], i > 0)
        return jax.tree.map(partial(jnp.where, i > 0), _better(found, best), found), None

    return jax.lax.scan(one, empty, jnp.arange(rounds + 1))[0][0]


def _better(found: tuple[Solution, Array], best: tuple[Solution, Array]) -> tuple[Solution, Array]:
    """What was found, unless its bound is NaN or lower by more than `AWAY`.

    Not every fall counts: of a family that is not linear the bound is that of a linearisation, and users whose rounds
    were refused at the smallest fall had intervals that covered 3 points too little (ideal directions, 3 comparisons).
    """
    lowest = best[0].evidence - AWAY - _rounding(best[0].evidence)
    return jax.tree.map(partial(jnp.where, found[0].evidence >= lowest), found, best)


def _rounding(nats: Float[Array, ""]) -> Float[Array, ""]:
    """What a sum of so many nats is not sure of."""
    return 8 * jnp.finfo(nats.dtype).eps * (1 + jnp.abs(nats))


def _posterior(
    a: Float[Array, "latents size"],
    gram: Array | None,
    curvature: Float[Array, "latents latents"],
    target: Float[Array, " latents"],
) -> tuple[Float[Array, " unknowns"], Float[Array, "latents latents"], tuple[Array, Array], Float[Array, ""]]:
    """Solve (I + a' C a) x = a' target; return x, covariance of the latent values, jacobian and M, and log det.

    With the gram matrix at hand: the y of x = a' y instead.

    All from one factorisation and one solve: batched solves that run at once wait for each other's threads and hang on
    CPU (jax 0.10; as many solves as cores), so no two in this module are independent of each other. Nothing large is
    subtracted from anything large, so that a wide prior or many rows cost no digits.
    """
    latents, size = a.shape
    known = gram is not None
    factors = jax.scipy.linalg.lu_factor(_inner(a, gram, curvature))
    determinant = jnp.sum(jnp.log(jnp.abs(jnp.diagonal(factors[0]))))
    inverse = jax.scipy.linalg.lu_solve(factors, jnp.eye(min(latents, size)))
    if latents < size:
        gram = a @ a.T if gram is None else gram
        x = inverse @ target if known else a.T @ (inverse @ target)
        return x, gram @ inverse, (a, inverse @ curvature), determinant
    eye = jnp.eye(size)
    return inverse @ (a.T @ target), a @ inverse @ a.T, (eye, eye - inverse), determinant


def _row_variance(covariance: Float[Array, "latents latents"], rows: Judgements) -> Float[Array, " rows"]:
    """Variance of each row's log-odds from the covariance of the latent values."""

    def one(first: Array, second: Array, care: Array) -> Array:
        index, sign = jnp.stack([first, second, jnp.asarray(-1)]), jnp.stack([jnp.ones(()), -jnp.ones(()), care])
        sign = jnp.where(jnp.stack([first >= 0, second >= 0, jnp.asarray(True)]), sign, 0.0)
        return sign @ covariance[jnp.ix_(index, index)] @ sign

    return jnp.maximum(jax.vmap(one)(rows.first, rows.second, rows.care), 0.0)


def _gram(a: Float[Array, "latents size"]) -> Array | None:
    """Gram matrix of the latent values, where the dual system is the smaller one."""
    return a @ a.T if a.shape[0] < a.shape[1] else None


def _inner(a: Float[Array, "latents size"], gram: Array | None, curvature: Float[Array, "latents latents"]) -> Array:
    """I + curvature a a' (dual) or I + a' curvature a (primal): both have the determinant that the evidence needs."""
    latents, size = a.shape
    if latents < size:
        return jnp.eye(latents) + curvature @ (a @ a.T if gram is None else gram)
    return jnp.eye(size) + a.T @ curvature @ a


def _solve(
    a: Float[Array, "latents size"], gram: Array | None, curvature: Array, target: Float[Array, " latents"]
) -> Float[Array, " unknowns"]:
    """Solve (I + a' curvature a) x = a' target through the smaller of its two systems.

    With the gram matrix at hand: the y of x = a' y instead.
    """
    inner = _inner(a, gram, curvature)
    if a.shape[0] < a.shape[1]:
        solved = jnp.linalg.solve(inner, target)
        return solved if gram is not None else a.T @ solved
    return jnp.linalg.solve(inner, a.T @ target)  # not by Cholesky: inside this loop it can deadlock on CPU (jax 0.10)


def _logits(latent: Float[Array, " latents"], rows: Judgements) -> Float[Array, " rows"]:
    pick = lambda index: jnp.where(index >= 0, latent[jnp.maximum(index, 0)], 0.0)  # noqa: E731
    return rows.fixed + rows.care * latent[-1] + pick(rows.first) - pick(rows.second)


def _nats(logits: Float[Array, " rows"], rows: Judgements) -> Float[Array, " rows"]:
    soft = rows.target * jax.nn.softplus(-logits) + (1.0 - rows.target) * jax.nn.softplus(logits)
    return rows.weight * soft


def _curvature(
    logits: Float[Array, " rows"], rows: Judgements, out: int, variance: Float[Array, " rows"] | None = None
) -> tuple[Float[Array, " latents"], Float[Array, "latents latents"]]:
    """Gradient of the log-likelihood, and curvature of its negative, in the `out` latent values.

    With the variance of each row's log-odds: their expectations, in the probit approximation of `moderated`.
    """
    shrink = 1.0 if variance is None else 1.0 / jnp.sqrt(1.0 + jnp.pi * variance / 8.0)
    p = jax.nn.sigmoid(shrink * logits)
    g = rows.weight * (rows.target - p)
    h = rows.weight * shrink * p * (1.0 - p)
    # Unknown indices are sent out of range and dropped.
    a, b = (jnp.where(index >= 0, index, out) for index in (rows.first, rows.second))
    z = rows.care
    gradient = jnp.zeros(out).at[a].add(g, mode="drop").at[b].add(-g, mode="drop").at[-1].add(jnp.sum(g * z))
    matrix = jnp.zeros((out, out)).at[a, a].add(h, mode="drop").at[b, b].add(h, mode="drop")
    matrix = matrix.at[a, b].add(-h, mode="drop").at[b, a].add(-h, mode="drop")
    cross = jnp.zeros(out).at[a].add(h * z, mode="drop").at[b].add(-h * z, mode="drop")
    matrix = matrix.at[-1, :].add(cross).at[:, -1].add(cross).at[-1, -1].add(jnp.sum(h * z * z))
    return gradient, matrix


def newton_by_coordinates(
    values: Callable[[Vector], Float[Array, " rows"]],
    slopes: Callable[[Vector], Float[Array, "rows size"]],
    rows: Judgements | Comparisons[Any],
    size: int,
    *,
    steps: int = STEPS,
    rounds: int = ROUNDS,
) -> Solution:
    """Find what `newton` finds where rows are more than coordinates, from log-odds and their slopes by row.

    Rows need targets and weights. Latent values are the coordinates: the jacobian is the identity, M is I - covariance.
    """

    def total(part: Callable[..., Any]) -> Callable[[Vector, Array | None], Any]:
        return lambda beta, covariance: part(values(beta), slopes(beta), rows, covariance)

    return by_coordinates(total(row_sums), total(row_nats), size, steps, rounds)


def row_sums(
    logits: Float[Array, " rows"], slope: Float[Array, "rows size"], rows: Any, covariance: Array | None
) -> tuple[Vector, Float[Array, "size size"]]:
    """Gradient of the log-likelihood, and (expected) curvature of its negative, in the coordinates."""
    shrink = jnp.ones(logits.shape)
    if covariance is not None:
        shrink = 1.0 / jnp.sqrt(1.0 + jnp.pi * _spread(slope, covariance) / 8.0)
    p = jax.nn.sigmoid(shrink * logits)
    h = rows.weight * shrink * p * (1.0 - p)
    return (rows.weight * (rows.target - p)) @ slope, slope.T @ (h[:, None] * slope)


def row_nats(
    logits: Float[Array, " rows"], slope: Float[Array, "rows size"], rows: Any, covariance: Array | None
) -> Float[Array, ""]:
    """(Expected) minus log-likelihood."""
    if covariance is None:
        return jnp.sum(_nats(logits, rows))
    deviation = jnp.sqrt(_spread(slope, covariance))
    each = jax.lax.map(lambda node: jnp.sum(_nats(logits + node * deviation, rows)), jnp.asarray(_NODES))
    return _MASSES @ each


def _spread(slope: Float[Array, "rows size"], covariance: Float[Array, "size size"]) -> Float[Array, " rows"]:
    return jnp.maximum(jnp.sum((slope @ covariance) * slope, axis=1), 0.0)


def by_coordinates(
    sums: Callable[[Vector, Array | None], tuple[Vector, Float[Array, "size size"]]],
    nats: Callable[[Vector, Array | None], Float[Array, ""]],
    size: int,
    steps: int,
    rounds: int,
) -> Solution:
    """Newton and rounds of moments in the coordinates, as in `newton`."""

    def propose(beta: Vector) -> Vector:
        gradient, curvature = sums(beta, None)
        return jnp.linalg.solve(jnp.eye(size) + curvature, curvature @ beta + gradient)

    def settle(mean: Vector, covariance: Array | None) -> tuple[Vector, Float[Array, "size size"], Float[Array, ""]]:
        """Newton's mean, the covariance, and the log determinant of its inverse, under the curvature at a posterior."""
        gradient, curvature = sums(mean, covariance)
        factors = jax.scipy.linalg.lu_factor(jnp.eye(size) + curvature)
        target = (curvature @ mean + gradient)[:, None]
        solved = jax.scipy.linalg.lu_solve(factors, jnp.concatenate([jnp.eye(size), target], axis=1))
        return solved[:, -1], solved[:, :-1], jnp.sum(jnp.log(jnp.abs(jnp.diagonal(factors[0]))))

    def solution(mean: Vector, covariance: Array, evidence: Array) -> Solution:
        return Solution(mean, jnp.eye(size), jnp.eye(size) - covariance, evidence)

    objectives = partial(jax.lax.map, lambda b: nats(b, None) + 0.5 * b @ b)
    mean = _descend(propose, objectives, lambda b: b, lambda _: 0.0, size, steps)
    if not rounds:
        _, covariance, determinant = settle(mean, None)
        return solution(mean, covariance, -nats(mean, None) - 0.5 * (mean @ mean + determinant))

    def again(mean: Vector, covariance: Array, moved: Array) -> tuple[Solution, Array]:
        settled, covariance, determinant = settle(mean, covariance)
        mean = jnp.where(moved, settled, mean)
        known = size - jnp.trace(covariance)
        evidence = -nats(mean, covariance) - 0.5 * (mean @ mean - known + determinant)
        return solution(mean, covariance, evidence), covariance

    return _rounds(again, mean, size, rounds)
