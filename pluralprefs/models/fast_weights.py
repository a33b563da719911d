"""Fast weights: a reward whose weights the shots write (the fast-weight form of P-TTT), ridge-normalised.

    k = K e                              `key`              d_i = k_first - k_second of shot i,  y_i = 2 t_i - 1
    v = sum_i w_i y_i d_i                  normaliser "sum", as published: r_u = eta v . k
    v = (sum_i w_i d_i d_i' + lambda)^-1 sum_i w_i y_i d_i       normaliser "ridge", where the delta rule ends
    l = eta v . (k_first - k_second)     eta = exp(`log_rate`), lambda = exp(`log_ridge`)

The user state is v, [width]. It is odd in the labels: reversing every shot negates it exactly, and a shot of a tie says
only that its direction is known. A sum grows with every shot; ridge regression (Schlag et al. 2021, arXiv 2102.11174,
for the delta rule) bounds it. The published slow part w . h is the population's, which has a model of its own here
(`models.residual`). Where we depart: keys may come from an MLP (`hidden`), and rate and ridge are learned.
"""

from __future__ import annotations

from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pluralprefs.models.layers import Weights, init_mlp, mlp
from pluralprefs.pytrees import pytree, static
from pluralprefs.types import Comparisons, Item, Key, UserPosterior


@pytree
class FastWeights:
    """See the module. The user state is the fast weight vector, [width]."""

    key: Weights
    log_rate: Float[Array, ""]
    log_ridge: Float[Array, ""]
    normaliser: str = static(default="ridge")

    @classmethod
    def init(
        cls, *, key: Key, dim: int, width: int = 32, hidden: tuple[int, ...] = (), normaliser: str = "ridge", **_: Any
    ) -> Self:
        """Draw the keys' weights. `normaliser` is "ridge" or "sum"; `hidden` makes the keys nonlinear."""
        if normaliser not in ("ridge", "sum"):
            raise ValueError(f"normaliser is 'ridge' or 'sum', not {normaliser!r}")
        return cls(init_mlp(key, (dim, *hidden, width)), jnp.log(3.0), jnp.zeros(()), normaliser)

    def init_user(self) -> Float[Array, " width"]:
        return jnp.zeros(self.key[-1]["bias"].shape[0])

    def infer_user(self, support: Comparisons[Item]) -> UserPosterior:
        """The fast weights that the shots write; zeros without any."""
        shown = mlp(self.key, support.first.embedding) - mlp(self.key, support.second.embedding)
        weighted = support.weight[:, None] * shown
        written = (2 * support.target - 1) @ weighted
        if self.normaliser == "sum":
            return UserPosterior(written)
        seen = shown.T @ weighted + jnp.exp(self.log_ridge) * jnp.eye(written.shape[0])
        return UserPosterior(jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(seen), written))

    def reward(self, user: Float[Array, " width"], item: Item) -> Float[Array, ""]:
        return jnp.exp(self.log_rate) * (user @ mlp(self.key, item.embedding))

    def log_odds(self, user: Float[Array, " width"], first: Item, second: Item) -> Float[Array, ""]:
        return self.reward(user, first) - self.reward(user, second)
