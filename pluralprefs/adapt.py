"""From a few comparisons to a user: MAP by gradient (`fit_user`) and a Laplace posterior by Newton (`laplace_user`).

A family that infers its users from shots in one pass has a third way, `infer_user`. The other two maximise

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
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from pluralprefs.newton import (
    ROUNDS,
    STEPS,
    Judgements,
    Solution,
    Vector,
    by_coordinates,
    newton,
    newton_by_coordinates,
    row_nats,
    row_sums,
)
from pluralprefs.types import (
    Comparisons,
    Covariance,
    InfersUser,
    Item,
    LeavesOpen,
    LinearInUser,
    ReducesItems,
    RewardModel,
    User,
    UserPosterior,
)
from pluralprefs.users import Deviation, Peers, Users, apply_root, deviating_log_odds, gather, neutral, ravel

CHUNK = 1024  # rows at once in `solve_many`
FORWARD = 8  # coordinates of a state up to which slopes are taken forwards, one pass a coordinate


def laplace_user(
    model: RewardModel, support: Comparisons[Item], users: Users, *, steps: int = STEPS, rounds: int = ROUNDS
) -> UserPosterior:
    """Return the Gaussian posterior of one user's deviation, given support rows and the table's priors.

    Newton to the mode, then `rounds` of moments towards the mean; rounds=0 is the textbook Laplace posterior. No rows,
    or rows of weight 0, return the prior. Weights temper. `vmap` it over users. Where the table has `peers`, the prior
    is their mixture, and what is returned has the mean and the covariance of the posterior, itself a mixture.
    """
    if users.peers is not None:
        return _among_peers(model, support, users, users.peers, steps, rounds)
    solution = solve_rows(model, support, users, users.user_root, steps=steps, rounds=rounds)
    return posterior(solution, users.user_root, ravel(neutral(model))[1])


def mode_user(model: RewardModel, support: Comparisons[Item], users: Users) -> UserPosterior:
    """Return the MAP of one user's deviation by Newton, under the table's Gaussian prior, without a covariance."""
    found = laplace_user(model, support, users.replace(peers=None), rounds=0)
    return found.replace(covariance=None)


def _among_peers(
    model: RewardModel, support: Comparisons[Item], users: Users, peers: Peers, steps: int, rounds: int
) -> UserPosterior:
    """The posterior under a mixture of Gaussians: one for each, weighed by its evidence, and their moments together."""
    evidence, means, covariances = peer_posteriors(model, support, users, peers, steps=steps, rounds=rounds)
    return mixed(model, jax.nn.softmax(evidence), means, covariances)


def peer_posteriors(
    model: RewardModel, support: Comparisons[Item], users: Users, peers: Peers, *, steps: int = STEPS,
    rounds: int = ROUNDS,
) -> tuple[Float[Array, " peers"], Float[Array, "peers size"], Float[Array, "peers size size"]]:  # fmt: skip
    """Were a new user like each of the peers: the log evidence of the rows, posterior mean and covariance."""
    unravel = ravel(neutral(model))[1]

    def like(peer: Peers) -> tuple[Array, Array, Array]:
        moved = jax.tree.map(jnp.add, users.population, unravel(peer.mean).state)
        solution = solve_rows(model, support, users.replace(population=moved, peers=None), peer.root, steps=steps,
                              rounds=rounds)  # fmt: skip
        found = posterior(solution, peer.root, unravel)
        assert found.covariance is not None
        factor = covariance_root(found.covariance)
        return solution.evidence, peer.mean + ravel(found.mean)[0], factor @ factor.T

    return jax.vmap(like)(peers)


def mixed(
    model: RewardModel, share: Float[Array, " peers"], means: Float[Array, "peers size"],
    covariances: Float[Array, "peers size size"],
) -> UserPosterior:  # fmt: skip
    """Mean and covariance of a mixture of Gaussians."""
    mean = share @ means
    apart = means - mean[None, :]
    covariance = jnp.einsum("p,pij->ij", share, covariances) + (apart * share[:, None]).T @ apart
    values, vectors = jnp.linalg.eigh(covariance)
    root = vectors * jnp.sqrt(jnp.maximum(values, 0.0))[None, :]
    return UserPosterior(ravel(neutral(model))[1](mean), Covariance(root, jnp.zeros((0, mean.shape[0]))))


def prior_user(model: RewardModel, users: Users) -> UserPosterior:
    """The posterior of a user of whom nothing is known: the prior."""
    if users.peers is None:
        return UserPosterior(neutral(model), Covariance(users.user_root, jnp.zeros((0, neutral_size(model)))))
    count, root = users.peers.mean.shape[0], users.peers.root
    return mixed(model, jnp.full(count, 1 / count), users.peers.mean, root @ jnp.swapaxes(root, 1, 2))


def solve_rows(
    model: RewardModel, support: Comparisons[Item], users: Users, root: Array, *, steps: int = STEPS,
    rounds: int = ROUNDS,
) -> Solution:  # fmt: skip
    """Solve for a deviation from the table's base with one latent value per row: any family, any user state."""
    unravel = ravel(neutral(model))[1]
    if not support.target.shape[0]:  # a row that says nothing
        support = jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape[1:]), leaf.dtype), support)

    def at_base(row: Comparisons[Item]) -> tuple[Any, Float[Array, ""]]:
        base, _ = gather(users, row.community, jnp.asarray(-1))
        return base, model.log_odds(base, row.first, row.second)

    known = jax.vmap(at_base)(support)  # once, not in every step

    def value(beta: Vector, row: Comparisons[Item], base: Any, known: Float[Array, ""]) -> Float[Array, ""]:
        return deviating_log_odds(model, base, unravel(apply_root(root, beta)), row, users.scale, known)

    def values(beta: Vector) -> Float[Array, " rows"]:
        return jax.vmap(partial(value, beta))(support, *known)

    n, size = support.target.shape[0], neutral_size(model)

    def slopes(beta: Vector) -> Float[Array, "rows size"]:
        if size <= FORWARD:  # what the state alone decides, such as an ideal point, has its derivatives once
            return jax.jacfwd(values)(beta)
        return jax.vmap(partial(jax.grad(value), beta))(support, *known)

    if isinstance(model, LinearInUser):
        at_zero, slope = values(jnp.zeros(size)), slopes(jnp.zeros(size))  # once, not in every step
        values, slopes = lambda beta: at_zero + slope @ beta, lambda beta: slope
    if n > size:
        return newton_by_coordinates(values, slopes, support, size, steps=steps, rounds=rounds)
    none = jnp.zeros(n)
    rows = Judgements(jnp.arange(n), jnp.full(n, -1), none, none, support.target, support.weight)
    jacobian = slopes(jnp.zeros(size)) if isinstance(model, LinearInUser) else slopes
    return newton(values, jacobian, rows, size, steps=steps, rounds=rounds)


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
    latents, size = a.shape
    if latents > size and rows.target.shape[0] * size < latents**2:
        pick = lambda index: jnp.where(index[:, None] >= 0, a[jnp.maximum(index, 0)], 0.0)  # noqa: E731
        slope = pick(rows.first) - pick(rows.second) + rows.care[:, None] * a[-1][None, :]
        logits = lambda beta: rows.fixed + slope @ beta  # noqa: E731
        return newton_by_coordinates(logits, lambda _: slope, rows, size, steps=steps, rounds=rounds)
    return newton(lambda beta: a @ beta, a, rows, a.shape[1], steps=steps, rounds=rounds)


def solve_many(
    model: LinearInUser, items: Item, rows: Judgements, root: Array, scale: Array, *, steps: int = STEPS,
    rounds: int = ROUNDS, chunk: int = CHUNK,
) -> Solution:  # fmt: skip
    """Solve as `solve_items` does where a unit has judged more items than its state has coordinates.

    Sums over chunks of rows make one system [size, size], so memory does not grow with rows or items. `items` are those
    that `rows.first` and `rows.second` index, all at least 0, with rows a multiple of `chunk` (weight 0 as padding).
    """
    gain = ravel(Deviation(jax.tree.map(jnp.zeros_like, model.init_user()), jnp.ones(())))[0]
    size = gain.shape[0]
    parts = jax.tree.map(lambda x: jnp.asarray(x).reshape(-1, chunk, *jnp.shape(x)[1:]), rows)

    def directions(part: Judgements) -> Float[Array, "chunk size"]:
        pick = lambda index: latent_features(model, jax.tree.map(lambda x: x[index], items))  # noqa: E731
        phi = scale * (pick(part.first) - pick(part.second)) + part.care[:, None] * gain[None, :]
        return phi * root[None, :] if root.ndim == 1 else phi @ root

    def over_chunks(part: Callable[..., Any], zero: Any) -> Callable[[Vector, Array | None], Any]:
        def total(beta: Vector, covariance: Array | None) -> Any:
            def add(sofar: Any, rows: Judgements) -> tuple[Any, None]:
                slope = directions(rows)
                found = part(rows.fixed + slope @ beta, slope, rows, covariance)
                return jax.tree.map(jnp.add, sofar, found), None

            return jax.lax.scan(add, zero, parts)[0]

        return total

    sums = over_chunks(row_sums, (jnp.zeros(size), jnp.zeros((size, size))))
    return by_coordinates(sums, over_chunks(row_nats, jnp.zeros(())), size, steps, rounds)


def reduced(model: Any, items: Item) -> tuple[Any, Item]:
    """The model and the items of a table with what no user changes computed, where the family can (`ReducesItems`)."""
    return _reduced(model, items) if isinstance(model, ReducesItems) else (model, items)


@jax.jit
def _reduced(model: ReducesItems, items: Item) -> tuple[ReducesItems, Item]:
    return model.reduced(items)


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
    first_order: bool = False,
    eps_root: float = 1e-12,
) -> UserPosterior:
    """Return the deviation of one user after `steps` of Adam towards the MAP: a `lax.scan`, hence differentiable.

    With many comparisons the mode is further than that: 0.2 log-odds off at 40 comparisons of a rank of 8, say.
    `mode_user` is there, and is what adapts a user with method="map".

    Meta-training through adaptation is a gradient through this function; with `first_order` the steps themselves count
    as constants of the model (first-order MAML). `eps_root` is Adam's, under its square root: where the slope is 0, a
    step's derivative is learning_rate / sqrt(eps_root), to the power of the steps. The point estimate carries no
    covariance.
    """
    _, unravel = ravel(neutral(model))
    optimizer = optax.adam(learning_rate, eps_root=eps_root)

    def objective(beta: Float[Array, " size"]) -> Float[Array, ""]:
        deviation = unravel(apply_root(users.user_root, beta))
        logits = jax.vmap(lambda row: _row_log_odds(model, users, deviation, row))(support)
        nats = support.target * jax.nn.softplus(-logits) + (1 - support.target) * jax.nn.softplus(logits)
        return jnp.sum(support.weight * nats) + 0.5 * beta @ beta

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        beta, state = carry
        slope = jax.grad(objective)(beta)
        update, state = optimizer.update(jax.lax.stop_gradient(slope) if first_order else slope, state)
        return (beta + update, state), None

    start = jnp.zeros(neutral_size(model))
    (beta, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), None, length=steps)
    return UserPosterior(mean=unravel(apply_root(users.user_root, beta)))


def stepped_user(
    model: RewardModel, start: User, support: Comparisons[Item], *, steps: int, learning_rate: float, strength: float,
    first_order: bool,
) -> User:  # fmt: skip
    """Return the state that `fit_user` reaches from `start`, under the prior N(start, strength^2): an inner loop."""
    table = Users.init(model, users=0, communities=0, strength=strength).replace(population=start)
    root = table.user_root.at[-1].set(0.0)  # the gain comes last: it is no part of a family's user
    fitted = fit_user(model, support, table.replace(user_root=root), steps=steps, learning_rate=learning_rate,
                      first_order=first_order, eps_root=0.1)  # fmt: skip
    return jax.tree.map(jnp.add, start, fitted.mean.state)


def infer_user(model: InfersUser, support: Comparisons[Item], users: Users) -> UserPosterior:
    """Return the deviation of the user that a family infers from support rows: one pass, nothing is fitted.

    No rows, or rows of weight 0, give the prior user. The covariance, if the family has one, knows the gain for sure.
    """
    found = model.infer_user(support)
    state = jax.tree.map(jnp.subtract, found.mean, users.population)
    covariance = found.covariance
    if covariance is not None:
        pad = [(0, 1)] * covariance.root.ndim
        covariance = Covariance(jnp.pad(covariance.root, pad), jnp.pad(covariance.downdate, [(0, 0), (0, 1)]))
    return UserPosterior(Deviation(state, jnp.zeros(())), covariance)


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

    beside = left_open(model, users, posterior, row)
    if posterior.covariance is None:
        return value(vector), beside @ beside
    if isinstance(model, LinearInUser):
        mean, gradient = jax.value_and_grad(value)(vector)
        return mean, variance(posterior.covariance, gradient) + beside @ beside
    steps = jnp.sqrt(vector.shape[0]) * covariance_root(posterior.covariance).T
    found = jax.vmap(value)(vector[None, :] + jnp.concatenate([steps, -steps]))
    return found.mean(), found.var() + beside @ beside


def left_open(
    model: RewardModel, users: Users, posterior: UserPosterior, row: Comparisons[Item]
) -> Float[Array, " directions"]:
    """What a row's log-odds have of a user's unknowns, which are standard normal (`LeavesOpen`); else nothing."""
    if not isinstance(model, LeavesOpen):
        return jnp.zeros(0)
    base, _ = gather(users, row.community, jnp.asarray(-1))
    state = jax.tree.map(jnp.add, base, posterior.mean.state)
    return users.scale * (model.left_open(state, row.first) - model.left_open(state, row.second))


class Joint(NamedTuple):
    """Log-odds of several rows under one posterior: their covariance is `plus plus' - minus minus'`.

    Nothing of size [rows, rows] is made: `plus` is [rows, k], `minus` [rows, r], and r is 0 but for families that are
    linear in the user, with fewer comparisons than unknowns.
    """

    mean: Float[Array, " rows"]
    plus: Float[Array, "rows k"]
    minus: Float[Array, "rows r"]


def predict_jointly(model: RewardModel, users: Users, posterior: UserPosterior, rows: Comparisons[Item]) -> Joint:
    """Return what `predict` says of each row, and how the rows vary together.

    A point estimate has no variance but for what it leaves open (`LeavesOpen`).
    """
    vector, unravel = ravel(posterior.mean)

    def values(v: Float[Array, " size"]) -> Float[Array, " rows"]:
        return jax.vmap(lambda row: _row_log_odds(model, users, unravel(v), row))(rows)

    nothing = jnp.zeros((rows.target.shape[0], 0))
    beside = jax.vmap(lambda row: left_open(model, users, posterior, row))(rows)
    if posterior.covariance is None:
        return Joint(values(vector), beside, nothing)
    if isinstance(model, LinearInUser):
        root, downdate = posterior.covariance.root, posterior.covariance.downdate
        slope = jax.vmap(lambda row: jax.grad(lambda v: _row_log_odds(model, users, unravel(v), row))(vector))(rows)
        plus = slope * root[None, :] if root.ndim == 1 else slope @ root
        return Joint(values(vector), jnp.concatenate([plus, beside], axis=1), slope @ downdate.T)
    steps = jnp.sqrt(vector.shape[0]) * covariance_root(posterior.covariance).T
    found = jax.vmap(values)(vector[None, :] + jnp.concatenate([steps, -steps]))
    mean = found.mean(0)
    plus = (found - mean[None, :]).T / jnp.sqrt(found.shape[0])
    return Joint(mean, jnp.concatenate([plus, beside], axis=1), nothing)


def covariance_root(covariance: Covariance) -> Float[Array, "size size"]:
    """A matrix R with R R' the covariance."""
    root, downdate = covariance.root, covariance.downdate
    root = jnp.diag(root) if root.ndim == 1 else root
    if downdate.shape[0] == 0:
        return root
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
