"""Newton's method for one unit: the posterior of a whitened deviation under a unit Gaussian prior.

`newton` works on latent values (a row's log-odds shift, or a distinct item's reward) and solves whichever system is
smaller: one unknown per coordinate (primal) or one per latent value (dual). `newton_by_coordinates` is for units with
more rows than coordinates: its sums over rows never make anything of size [rows, rows]. Both step to the mode, then
take `ROUNDS` of moments; see `adapt`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from pluralprefs.types import Comparisons

STEPS = 8
ROUNDS = 2  # of the moments; more change a strength by less than 1 %
_NODES, _MASSES = np.polynomial.hermite_e.hermegauss(12)
QUADRATURE = tuple(zip(_NODES.tolist(), (_MASSES / _MASSES.sum()).tolist(), strict=True))  # of a standard normal


@struct.dataclass
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

    mean        [size]; the mode after no rounds of moments
    jacobian    [latents, size] derivatives of the latent values at the mean, a
    precision   [latents, latents] M = (C^-1 + a a')^-1, C the (expected) curvature of minus the log-likelihood in the
                latent values: the whitened covariance is I - a' M a
    evidence    lower bound of the log evidence, nats; Laplace's after no rounds
    """

    mean: Float[Array, " size"]
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
    A step is the best of 1, 1/2 and 1/4 of Newton's; iteration stops when the mode has settled or after `steps`. Then
    `rounds` of moments follow (see the module).
    """
    constant = None if callable(jacobian) else jacobian
    gram = None if constant is None else _gram(constant)
    at = jacobian if callable(jacobian) else lambda _: jacobian

    def objective(beta: Vector) -> Float[Array, ""]:
        return jnp.sum(_nats(_logits(values(beta), rows), rows)) + 0.5 * beta @ beta

    def step(carry: tuple) -> tuple:
        i, beta, _ = carry
        a = at(beta)
        gradient, curvature = _curvature(_logits(values(beta), rows), rows, a.shape[0])
        proposal = _solve(a, gram, curvature, curvature @ (a @ beta) + gradient)
        trials = jnp.stack([beta + t * (proposal - beta) for t in (1.0, 0.5, 0.25)])
        new = trials[jnp.argmin(jax.vmap(objective)(trials))]
        return i + 1, new, jnp.max(jnp.abs(new - beta))

    start = (0, jnp.zeros(size), jnp.asarray(jnp.inf))
    _, mean, _ = jax.lax.while_loop(lambda carry: (carry[0] < steps) & (carry[2] > 1e-4), step, start)
    a = at(mean)
    gradient, curvature = _curvature(_logits(values(mean), rows), rows, a.shape[0])
    _, covariance, precision, determinant = _posterior(a, gram, curvature, gradient)
    if not rounds:
        return Solution(mean, a, precision, -objective(mean) - 0.5 * determinant)
    for _ in range(rounds):
        a = at(mean)
        gradient, curvature = _curvature(_logits(values(mean), rows), rows, a.shape[0], _row_variance(covariance, rows))
        target = curvature @ (a @ mean) + gradient
        mean, covariance, precision, determinant = _posterior(a, gram, curvature, target)
    logits, deviation = _logits(values(mean), rows), jnp.sqrt(_row_variance(covariance, rows))
    nats = sum(mass * _nats(logits + node * deviation, rows) for node, mass in QUADRATURE)
    known = jnp.sum(curvature * covariance)  # size minus the trace of the whitened covariance
    return Solution(mean, a, precision, -jnp.sum(nats) - 0.5 * (mean @ mean - known + determinant))


def _posterior(
    a: Float[Array, "latents size"], gram: Array | None, curvature: Float[Array, "latents latents"],
    target: Float[Array, " latents"],
) -> tuple[Vector, Float[Array, "latents latents"], Float[Array, "latents latents"], Float[Array, ""]]:  # fmt: skip
    """Solve (I + a' C a) x = a' target; return x, covariance K of the latent values, M (see Solution) and log det.

    All from one factorisation and one solve: batched solves that run at once wait for each other's threads and hang on
    CPU (jax 0.10; as many solves as cores), so no two in this module are independent of each other.
    """
    latents, size = a.shape
    factors = jax.scipy.linalg.lu_factor(_inner(a, gram, curvature))
    determinant = jnp.sum(jnp.log(jnp.abs(jnp.diagonal(factors[0]))))
    if latents < size:
        gram = a @ a.T if gram is None else gram
        both = jax.scipy.linalg.lu_solve(factors, jnp.concatenate([curvature, target[:, None]], axis=1))
        precision = both[:, :-1]
        return a.T @ both[:, -1], gram - gram @ precision @ gram, precision, determinant
    solved = jax.scipy.linalg.lu_solve(factors, a.T)
    covariance = a @ solved
    return solved @ target, covariance, curvature - curvature @ covariance @ curvature, determinant


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
) -> Vector:
    """Solve (I + a' curvature a) x = a' target through the smaller of its two systems."""
    inner = _inner(a, gram, curvature)
    if a.shape[0] < a.shape[1]:
        return a.T @ jnp.linalg.solve(inner, target)
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
    return sum((m * jnp.sum(_nats(logits + x * deviation, rows)) for x, m in QUADRATURE), start=jnp.zeros(()))


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

    def step(carry: tuple) -> tuple:
        i, beta, _ = carry
        gradient, curvature = sums(beta, None)
        proposal = jnp.linalg.solve(jnp.eye(size) + curvature, curvature @ beta + gradient)
        trials = jnp.stack([beta + t * (proposal - beta) for t in (1.0, 0.5, 0.25)])
        new = trials[jnp.argmin(jax.lax.map(lambda b: nats(b, None) + 0.5 * b @ b, trials))]
        return i + 1, new, jnp.max(jnp.abs(new - beta))

    def settle(mean: Vector, covariance: Array | None) -> tuple[Vector, Float[Array, "size size"], Float[Array, ""]]:
        """Newton's mean, the covariance, and the log determinant of its inverse, under the curvature at a posterior."""
        gradient, curvature = sums(mean, covariance)
        factors = jax.scipy.linalg.lu_factor(jnp.eye(size) + curvature)
        target = (curvature @ mean + gradient)[:, None]
        solved = jax.scipy.linalg.lu_solve(factors, jnp.concatenate([jnp.eye(size), target], axis=1))
        return solved[:, -1], solved[:, :-1], jnp.sum(jnp.log(jnp.abs(jnp.diagonal(factors[0]))))

    start = (0, jnp.zeros(size), jnp.asarray(jnp.inf))
    _, mean, _ = jax.lax.while_loop(lambda carry: (carry[0] < steps) & (carry[2] > 1e-4), step, start)
    _, covariance, determinant = settle(mean, None)
    if not rounds:
        evidence = -nats(mean, None) - 0.5 * (mean @ mean + determinant)
        return Solution(mean, jnp.eye(size), jnp.eye(size) - covariance, evidence)
    for _ in range(rounds):
        mean, covariance, determinant = settle(mean, covariance)
    known = size - jnp.trace(covariance)
    evidence = -nats(mean, covariance) - 0.5 * (mean @ mean - known + determinant)
    return Solution(mean, jnp.eye(size), jnp.eye(size) - covariance, evidence)
