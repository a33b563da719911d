"""Set-pooled few-shot users: a user is the pooled embedding of a few of their pairs (after PPD, arXiv 2501.06655).

    k = P e                                                             `projection`
    p_i = t_i MLP([k_first; k_second]) + (1 - t_i) MLP([k_second; k_first])         `pair`, preferred response first
    u = U sum_i w_i p_i / (c + sum_i w_i)                  `out`, c = exp(`log_count`)
    r_u = u . tanh(k)                                      l = r_u(first) - r_u(second)

Pairs are embedded, not single responses: what a person rejected says as much. The user state is u, [width], zero
without shots (the published model's dropped user, by which it is guided; here episodes without shots train it). The
mean is shrunk by c, so that two shots move a user less than twenty. Where we depart: PPD conditions a diffusion model
by cross-attention to such embeddings; here they are the weights of a reward.
"""

from __future__ import annotations

from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pluralprefs.models.layers import Weights, init_mlp, mlp
from pluralprefs.pytrees import pytree
from pluralprefs.types import Comparisons, Item, Key, UserPosterior


@pytree
class SetPooled:
    """See the module. The user state is the pooled embedding u, [width]."""

    projection: Weights
    pair: Weights
    out: Float[Array, "hidden width"]
    log_count: Float[Array, ""]

    @classmethod
    def init(cls, *, key: Key, dim: int, width: int = 32, hidden: int = 64, **_: Any) -> Self:
        """Draw parameters. `width` of the projected items and of a user, `hidden` of a pair's embedding."""
        keys = jax.random.split(key, 3)
        pair = init_mlp(keys[1], (2 * width, hidden, hidden))
        out = jax.random.normal(keys[2], (hidden, width)) / jnp.sqrt(hidden)
        return cls(init_mlp(keys[0], (dim, width)), pair, out, jnp.zeros(()))

    def init_user(self) -> Float[Array, " width"]:
        return jnp.zeros(self.out.shape[1])

    def infer_user(self, support: Comparisons[Item]) -> UserPosterior:
        """The pooled embedding of the shots; zeros without any."""
        first, second = (mlp(self.projection, side.embedding) for side in (support.first, support.second))
        forward, backward = (
            mlp(self.pair, jnp.concatenate(sides, axis=1)) for sides in ((first, second), (second, first))
        )
        share = support.target[:, None]
        pairs = support.weight @ (share * forward + (1 - share) * backward)
        pooled = pairs / (jnp.exp(self.log_count) + jnp.sum(support.weight))
        return UserPosterior(pooled @ self.out)

    def reward(self, user: Float[Array, " width"], item: Item) -> Float[Array, ""]:
        return user @ jnp.tanh(mlp(self.projection, item.embedding))

    def log_odds(self, user: Float[Array, " width"], first: Item, second: Item) -> Float[Array, ""]:
        return self.reward(user, first) - self.reward(user, second)
