"""Partially pooled users: state = population + d_community(row) + d_user, each deviation shrunk towards zero.

`Users` is the table. A deviation has two parts: `state`, shaped like the family's user, and `gain`, the user's care: a
careful judge sharpens the population's log-odds, a careless one flattens them. For one row,

    base = population + d_community(row)
    log-odds = scale * [ (1 + gain) * (l(base) + offset) + l(base + d_user) - l(base) ],    l = the family's log_odds

so that zero deviation gives l(base), whatever the family. `offset` is the out-of-fold correction of the population's
log-odds (zero outside of a two-stage fit), `scale` the inverse temperature of families whose scores are not log-odds.

`residual` is the variance of a row's log-odds that no level explains (a user's effect of this very item): predictions
are moderated by it, and validation rows teach it.

Priors are Gaussian. `Pooled` says which levels exist and how their covariances are tied: "block" learns one variance
per part of the state (a linear weight, a kernel weight, an item effect, the gain), "full" a whole matrix. Strengths
are learned by empirical Bayes, prior covariance = mean(m m' + C) over the level's posteriors, never by gradient on
the joint objective (which collapses to zero): see `fitting`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from pluralprefs.pytrees import pytree
from pluralprefs.types import Comparisons, Item, Replaceable, RewardModel, User


@dataclass(frozen=True)
class Pooled:
    """How users are pooled. `levels` beyond the population, outermost first.

    covariance   "block": one variance per part of the user state; "full": a matrix (small states only)
    gain         whether users differ in care; it multiplies the base log-odds by (1 + gain)
    strength     prior standard deviation of each deviation at the start, in log-odds per comparison
    rounds       empirical-Bayes rounds
    temper       exponents of a user's likelihood to choose from on validation: pairs derived from one ordering or one
                 set of votes are not independent, and a covariance that trusts them all falls below the population
    temper_by    what chooses among several `temper`: "validation" rows, or "prompt": users adapted on some prompts of
                 training predict those held out, of which the family has not seen a comparison either. For questions
                 of new prompts where validation rows follow from training rows, as those of one ordering do
    population_temper   the same for the population's and the communities' likelihood, chosen first; one exponent for
                 families that are trained by gradient
    cross_fit    what the out-of-fold population scores are folded by: "pair", "item", "prompt" or None (in-sample);
                 with "item", shots and questions of families that infer their users have no response in common
    residual     the variance that no level explains; True learns it on validation
    parts        parts of the state that may deviate at user level (None: all)
    population_parts   parts that the population and the communities have (None: all)
    population   whether there is a shared population at all; without one, users are individuals
    peers        at most so many users of the training, whose posteriors together are the prior of a new user, in place
                 of the Gaussian, where left-out users bear that out (`peers`); for families with few coordinates
    """

    levels: tuple[str, ...] = ("user",)
    covariance: str = "block"
    gain: bool = True
    strength: float = 0.5
    rounds: int = 8
    temper: tuple[float, ...] = (1.0,)
    temper_by: str = "validation"
    population_temper: tuple[float, ...] = (1.0,)
    cross_fit: str | None = "pair"
    folds: int = 5
    residual: float | bool = 0.0
    parts: tuple[str, ...] | None = None
    population_parts: tuple[str, ...] | None = None
    population: bool = True
    peers: int = 0

    def __post_init__(self) -> None:
        for name in ("temper", "population_temper"):
            exponents = getattr(self, name)
            if not exponents or min(exponents) <= 0:
                raise ValueError(f"users.{name} {exponents}: give one exponent or more, each above 0")
        if self.temper_by not in ("validation", "prompt"):
            raise ValueError(f"users.temper_by is 'validation' or 'prompt', not {self.temper_by!r}")
        if self.peers < 0:
            raise ValueError(f"users.peers {self.peers}: give a number of users, 0 for a Gaussian prior")


@pytree
class Deviation(Replaceable):
    """A departure from a prior user: `state` like the family's user, `gain` the relative care."""

    state: User
    gain: Float[Array, "*batch"]


@pytree
class Peers(Replaceable):
    """Posteriors of users of the training, over the raveled deviation; the covariance of each is root root'."""

    mean: Float[Array, "peers size"]
    root: Float[Array, "peers size size"]

    @classmethod
    def empty(cls, model: RewardModel, count: int) -> Peers:
        size = ravel(neutral(model))[0].shape[0]
        return cls(jnp.zeros((count, size)), jnp.zeros((count, size, size)))


@pytree
class Users(Replaceable):
    """The pooled user table. `root` is the root of a level's prior covariance, over the raveled deviation.

    The prior of a user of the table is N(0, user_root user_root'); that of a new one too, or the mixture of `peers`,
    each as likely as the other, where there are any.
    """

    population: User
    community: Deviation
    user: Deviation
    community_root: Float[Array, " size"] | Float[Array, "size size"]
    user_root: Float[Array, " size"] | Float[Array, "size size"]
    scale: Float[Array, ""]
    residual: Float[Array, ""]
    peers: Peers | None = None

    @classmethod
    def init(cls, model: RewardModel, *, users: int, communities: int, strength: float = 0.5) -> Users:
        """Everyone at the family's neutral user. `strength` is the prior deviation of each coordinate."""
        neutral = Deviation(state=model.init_user(), gain=jnp.zeros(()))
        vector, _ = ravel_pytree(neutral)
        zeros = lambda rows: jax.tree.map(lambda x: jnp.zeros((rows, *x.shape)), neutral)  # noqa: E731
        root = jnp.full(vector.shape, strength)
        return cls(model.init_user(), zeros(communities), zeros(users), root, root, jnp.ones(()), jnp.zeros(()))


def gather(users: Users, community: Int[Array, ""], user: Int[Array, ""]) -> tuple[User, Deviation]:
    """Return one row's base state and the user's deviation: the only reader of the table.

    -1 (unknown) gives a zero deviation by `where`: JAX wraps negative indices, even under mode="fill", and would
    silently score the last user.
    """

    def take(table: Deviation, index: Int[Array, ""]) -> Deviation:
        def pick(x: Array) -> Array:
            if x.shape[0] == 0:
                return jnp.zeros(x.shape[1:], x.dtype)
            return jnp.where(index >= 0, x[jnp.maximum(index, 0)], 0.0)

        return jax.tree.map(pick, table)

    base = jax.tree.map(jnp.add, users.population, take(users.community, community).state)
    return base, take(users.user, user)


def deviating_log_odds(
    model: RewardModel, base: User, deviation: Deviation, row: Comparisons[Item], scale: Float[Array, ""],
    at_base: Float[Array, ""] | None = None,
) -> Float[Array, ""]:  # fmt: skip
    """Log-odds of one row for a user who departs from `base`; see the module for the formula.

    `at_base` are the family's log-odds at the base, where they are at hand.
    """
    at_base = model.log_odds(base, row.first, row.second) if at_base is None else at_base
    moved = jax.tree.map(jnp.add, base, deviation.state)
    shift = model.log_odds(moved, row.first, row.second) - at_base
    return scale * ((1.0 + deviation.gain) * (at_base + row.offset) + shift)


def log_odds(model: RewardModel, users: Users, row: Comparisons[Item]) -> Float[Array, ""]:
    """Log-odds of one row for the users of the table."""
    base, deviation = gather(users, row.community, row.user)
    return deviating_log_odds(model, base, deviation, row, users.scale)


def ravel(deviation: Deviation) -> tuple[Float[Array, " size"], Any]:
    """Flatten a deviation to a vector and return the inverse."""
    return ravel_pytree(deviation)


def neutral(model: RewardModel) -> Deviation:
    """The zero deviation of a family: where every prior is centred."""
    return Deviation(state=jax.tree.map(jnp.zeros_like, model.init_user()), gain=jnp.zeros(()))


def part_names(deviation: Deviation) -> tuple[str, ...]:
    """Name the part of the deviation that each coordinate of its vector belongs to."""
    paths = jax.tree_util.tree_flatten_with_path(deviation)[0]
    names = []
    for path, leaf in paths:
        text = jax.tree_util.keystr(path, simple=True, separator=".")
        names.extend([text.removeprefix("state.")] * leaf.size)
    return tuple(names)


def apply_root(root: Array, vector: Float[Array, "*rows size"]) -> Float[Array, "*rows size"]:
    """Multiply whitened vectors (rows) by a prior root, diagonal or square."""
    if root.ndim == 1:
        return vector * jnp.broadcast_to(root, vector.shape)
    return vector @ root.T


def penalty(users: Users) -> Float[Array, ""]:
    """Minus the log prior of all deviations, up to a constant: nats to add to a joint objective."""

    def level(table: Deviation, root: Array) -> Float[Array, ""]:
        flat = jnp.concatenate([x.reshape(x.shape[0], math.prod(x.shape[1:])) for x in jax.tree.leaves(table)], axis=1)
        if root.ndim == 1:
            whitened = jnp.where(root[None, :] > 0, flat / jnp.where(root > 0, root, 1.0)[None, :], 0.0)
        else:
            whitened = jax.scipy.linalg.solve_triangular(root, flat.T, lower=True).T
        return 0.5 * jnp.sum(whitened**2)

    return level(users.community, users.community_root) + level(users.user, users.user_root)
