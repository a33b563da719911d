"""From a few comparisons to a user: MAP by gradient (`fit_user`) and a Laplace posterior by Newton (`laplace_user`).

Both maximise

    sum_i w_i [t_i log s(l_i) + (1 - t_i) log s(-l_i)] - |beta|^2 / 2

over a whitened deviation d = root beta, so that the prior N(0, root root') is the unit ball. Newton's step linearises
the log-odds (exactly, for families that are linear in the user state; Gauss-Newton otherwise) and solves whichever
system is smaller: one unknown per coordinate of the state (primal) or one per latent value (dual). The posterior
covariance is the inverse Hessian, kept as factors.

The mode of a skewed posterior lies nearer to the prior than its mean (log-odds of new users of a known prior came out
9 % short at 80 comparisons and 8 weights), and strengths learned from modes are too small (0.46 for 0.5). So `ROUNDS`
rounds follow that put E[s(l)] and E[s'(l)] under the current posterior in the place of s(l) and s'(l): the fixed point
is the Gaussian nearest in KL(q | posterior). rounds=0 is the textbook Laplace posterior.

Latent values are log-odds shifts of rows; for families with rewards that are linear in the user (`features`), one per
distinct item, since a unit that judged n pairs among m items says only m things, however large n is.

References: MacKay 1992 and Rasmussen and Williams 2006, chapter 3 (Laplace, moderated output); Opper and Archambeau
2009 (Gaussian variational posteriors); Chu and Ghahramani 2005.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Float

from pluralprefs.types import Comparisons, Covariance, Item, LinearInUser, RewardModel, UserPosterior
from pluralprefs.users import Deviation, Users, apply_root, deviating_log_odds, gather, neutral, ravel

STEPS = 8
CHUNK = 1024  # rows at once in `solve_many`
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


def laplace_user(
    model: RewardModel, support: Comparisons[Item], users: Users, *, steps: int = STEPS, rounds: int = ROUNDS
) -> UserPosterior:
    """Return the Gaussian posterior of one user's deviation, given support rows and the table's priors.

    Newton to the mode, then `rounds` of moments towards the mean; rounds=0 is the textbook Laplace posterior. No rows,
    or rows of weight 0, return the prior. Weights temper. `vmap` it over users.
    """
    solution = solve_rows(model, support, users, users.user_root, steps=steps, rounds=rounds)
    return posterior(solution, users.user_root, ravel(neutral(model))[1])


def solve_rows(
    model: RewardModel, support: Comparisons[Item], users: Users, root: Array, *, steps: int = STEPS,
    rounds: int = ROUNDS,
) -> Solution:  # fmt: skip
    """Solve for a deviation from the table's base with one latent value per row: any family, any user state."""
    unravel = ravel(neutral(model))[1]

    def value(beta: Vector, row: Comparisons[Item]) -> Float[Array, ""]:
        return _row_log_odds(model, users, unravel(apply_root(root, beta)), row)

    n = support.target.shape[0]
    none = jnp.zeros(n)
    rows = Judgements(jnp.arange(n), jnp.full(n, -1), none, none, support.target, support.weight)
    return newton(
        lambda beta: jax.vmap(lambda row: value(beta, row))(support),
        lambda beta: jax.vmap(lambda row: jax.grad(value)(beta, row))(support),
        rows,
        neutral_size(model),
        steps=steps,
        rounds=rounds,
    )


def solve_items(
    model: LinearInUser, items: Item, rows: Judgements, root: Array, scale: Array, *, minus: Item | None = None,
    steps: int = STEPS, rounds: int = ROUNDS,
) -> Solution:  # fmt: skip
    """Solve for a deviation with one latent value per item: for units that judged many pairs among few items.

    `items` are the unit's distinct items; `rows.first` and `rows.second` index them; `rows.care` multiplies the gain.
    With `minus`, a latent value is the difference of an item of `items` and one of `minus`: one per row, where a unit
    judged few pairs among many items.
    """

    gain = ravel(Deviation(jax.tree.map(jnp.zeros_like, model.init_user()), jnp.ones(())))[0]
    features = latent_features(model, items)
    if minus is not None:
        features = features - latent_features(model, minus)
    phi = jnp.concatenate([scale * features, gain[None, :]])
    a = phi * root[None, :] if root.ndim == 1 else phi @ root
    return newton(lambda beta: a @ beta, a, rows, a.shape[1], steps=steps, rounds=rounds)


def solve_many(
    model: LinearInUser, items: Item, rows: Judgements, root: Array, scale: Array, *, steps: int = STEPS,
    rounds: int = ROUNDS, chunk: int = CHUNK,
) -> Solution:  # fmt: skip
    """Solve as `solve_items` does where a unit has judged more items than its state has coordinates.

    Sums over chunks of rows make one system [size, size], so memory does not grow with rows or items. `items` are those
    that `rows.first` and `rows.second` index, all at least 0, with rows a multiple of `chunk` (weight 0 as padding).
    Latent values are the coordinates themselves: the covariance is I - M, with the identity as jacobian.
    """
    gain = ravel(Deviation(jax.tree.map(jnp.zeros_like, model.init_user()), jnp.ones(())))[0]
    size = gain.shape[0]
    parts = jax.tree.map(lambda x: jnp.asarray(x).reshape(-1, chunk, *jnp.shape(x)[1:]), rows)

    def directions(part: Judgements) -> Float[Array, "chunk size"]:
        pick = lambda index: latent_features(model, jax.tree.map(lambda x: x[index], items))  # noqa: E731
        phi = scale * (pick(part.first) - pick(part.second)) + part.care[:, None] * gain[None, :]
        return phi * root[None, :] if root.ndim == 1 else phi @ root

    def sums(beta: Vector, covariance: Float[Array, "size size"] | None) -> tuple[Vector, Float[Array, "size size"]]:
        """Gradient of the log-likelihood, and (expected) curvature of its negative, in the coordinates."""

        def add(total: tuple, part: Judgements) -> tuple[tuple, None]:
            a = directions(part)
            shrink = jnp.ones(chunk)
            if covariance is not None:
                shrink = 1.0 / jnp.sqrt(1.0 + jnp.pi * jnp.sum((a @ covariance) * a, axis=1) / 8.0)
            p = jax.nn.sigmoid(shrink * (part.fixed + a @ beta))
            h = part.weight * shrink * p * (1.0 - p)
            return (total[0] + (part.weight * (part.target - p)) @ a, total[1] + a.T @ (h[:, None] * a)), None

        return jax.lax.scan(add, (jnp.zeros(size), jnp.zeros((size, size))), parts)[0]

    def nats(beta: Vector, covariance: Float[Array, "size size"] | None = None) -> Float[Array, ""]:
        def add(total: Array, part: Judgements) -> tuple[Array, None]:
            a = directions(part)
            logits, nodes = part.fixed + a @ beta, ((0.0, 1.0),) if covariance is None else QUADRATURE
            spread = 0.0 if covariance is None else jnp.sqrt(jnp.maximum(jnp.sum((a @ covariance) * a, axis=1), 0.0))
            return total + sum(mass * jnp.sum(_nats(logits + node * spread, part)) for node, mass in nodes), None

        return jax.lax.scan(add, jnp.zeros(()), parts)[0]

    def step(carry: tuple) -> tuple:
        i, beta, _ = carry
        gradient, curvature = sums(beta, None)
        proposal = jnp.linalg.solve(jnp.eye(size) + curvature, curvature @ beta + gradient)
        trials = jnp.stack([beta + t * (proposal - beta) for t in (1.0, 0.5, 0.25)])
        new = trials[jnp.argmin(jax.lax.map(lambda b: nats(b) + 0.5 * b @ b, trials))]
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
        evidence = -nats(mean) - 0.5 * (mean @ mean + determinant)
        return Solution(mean, jnp.eye(size), jnp.eye(size) - covariance, evidence)
    for _ in range(rounds):
        mean, covariance, determinant = settle(mean, covariance)
    known = size - jnp.trace(covariance)
    evidence = -nats(mean, covariance) - 0.5 * (mean @ mean - known + determinant)
    return Solution(mean, jnp.eye(size), jnp.eye(size) - covariance, evidence)


def latent_features(model: LinearInUser, items: Item) -> Float[Array, "items size"]:
    """Derivative of each item's reward with respect to the raveled deviation (zero for the gain)."""

    def one(item: Item) -> Vector:
        return ravel(Deviation(state=model.features(item), gain=jnp.zeros(())))[0]

    return jax.vmap(one)(items)


def posterior(solution: Solution, root: Array, unravel: Callable[[Array], Deviation]) -> UserPosterior:
    """Undo the whitening: deviation = root beta; the covariance stays a factor of the smaller size."""
    a, precision = solution.jacobian, solution.precision
    latents, size = a.shape
    mean = unravel(apply_root(root, solution.mean))
    if latents < size:
        values, vectors = jnp.linalg.eigh(0.5 * (precision + precision.T))
        downdate = (vectors * jnp.sqrt(jnp.maximum(values, 0.0))[None, :]).T @ a
        return UserPosterior(mean, Covariance(root, apply_root(root, downdate)))
    values, vectors = jnp.linalg.eigh(jnp.eye(size) - a.T @ precision @ a)
    factor = vectors * jnp.sqrt(jnp.maximum(values, 0.0))[None, :]
    return UserPosterior(mean, Covariance(apply_root(root, factor.T).T, jnp.zeros((0, size))))


def fit_user(
    model: RewardModel,
    support: Comparisons[Item],
    users: Users,
    *,
    steps: int = 50,
    learning_rate: float = 0.1,
) -> UserPosterior:
    """Return the MAP deviation of one user by Adam on the whitened deviation: a `lax.scan`, hence differentiable.

    Meta-training through adaptation is a gradient through this function. The point estimate carries no covariance.
    """
    _, unravel = ravel(neutral(model))
    optimizer = optax.adam(learning_rate)

    def objective(beta: Float[Array, " size"]) -> Float[Array, ""]:
        deviation = unravel(apply_root(users.user_root, beta))
        logits = jax.vmap(lambda row: _row_log_odds(model, users, deviation, row))(support)
        nats = support.target * jax.nn.softplus(-logits) + (1 - support.target) * jax.nn.softplus(logits)
        return jnp.sum(support.weight * nats) + 0.5 * beta @ beta

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        beta, state = carry
        update, state = optimizer.update(jax.grad(objective)(beta), state)
        return (beta + update, state), None

    start = jnp.zeros(neutral_size(model))
    (beta, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), None, length=steps)
    return UserPosterior(mean=unravel(apply_root(users.user_root, beta)))


def predict(
    model: RewardModel, users: Users, posterior: UserPosterior, row: Comparisons[Item]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the mean and the variance of one row's log-odds under a user's posterior.

    Exact for families that are linear in the user state. Elsewhere by cubature of degree 3 (Arasaratnam and Haykin
    2009), for a slope says little where a mixture saturates: 2 points a coordinate, at sqrt(size) standard deviations.
    """
    vector, unravel = ravel(posterior.mean)

    def value(v: Float[Array, " size"]) -> Float[Array, ""]:
        return _row_log_odds(model, users, unravel(v), row)

    if posterior.covariance is None:
        return value(vector), jnp.zeros(())
    if isinstance(model, LinearInUser):
        mean, gradient = jax.value_and_grad(value)(vector)
        return mean, variance(posterior.covariance, gradient)
    steps = jnp.sqrt(vector.shape[0]) * covariance_root(posterior.covariance).T
    found = jax.vmap(value)(vector[None, :] + jnp.concatenate([steps, -steps]))
    return found.mean(), found.var()


def covariance_root(covariance: Covariance) -> Float[Array, "size size"]:
    """A matrix R with R R' the covariance."""
    root, downdate = covariance.root, covariance.downdate
    if root.ndim == 2 and downdate.shape[0] == 0:
        return root
    root = jnp.diag(root) if root.ndim == 1 else root
    values, vectors = jnp.linalg.eigh(root @ root.T - downdate.T @ downdate)
    return vectors * jnp.sqrt(jnp.maximum(values, 0.0))[None, :]


def variance(covariance: Covariance, direction: Float[Array, " size"]) -> Float[Array, ""]:
    """Variance of `direction . d`, never negative."""
    root, downdate = covariance.root, covariance.downdate
    spread = root * direction if root.ndim == 1 else root.T @ direction
    return jnp.maximum(spread @ spread - jnp.sum((downdate @ direction) ** 2), 0.0)


def moderated(mean: Float[Array, "*rows"], variance: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """Log-odds of the predictive probability: mean / sqrt(1 + pi variance / 8) (MacKay 1992)."""
    return mean / jnp.sqrt(1.0 + jnp.pi * variance / 8.0)


def neutral_size(model: RewardModel) -> int:
    """Number of coordinates of a deviation."""
    return ravel(neutral(model))[0].shape[0]


def _row_log_odds(model: RewardModel, users: Users, deviation: Deviation, row: Comparisons[Item]) -> Float[Array, ""]:
    base, _ = gather(users, row.community, jnp.asarray(-1))
    return deviating_log_odds(model, base, deviation, row, users.scale)
