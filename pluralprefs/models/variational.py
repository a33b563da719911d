"""Variational users: VPL (arXiv 2408.10075), and a swap-symmetric encoder, odd by construction (arXiv 2603.12595).

    shot i   p_i = softplus(precision head),  m_i = mean head       of a pair encoder on k_chosen, k_rejected
    user     q(z | shots) = N(0, I) prod_i N(z; m_i, diag 1/p_i)^w_i             k = P e   `projection`
    reward   r_u = MLP([k; z]) + z . C k                                       `decoder`, `bilinear`
    penalty  beta KL(q(z | shots) | N(0, I)) per comparison

The user state is z, [latent]; its posterior is a product of one Gaussian factor a shot, so that no shots give the prior
exactly, the order of shots is without effect, and each shot sharpens (where VPL has attention and a mean over shots,
which know neither). `symmetric=True` makes each m_i odd and each p_i even in the pair's difference: a shot with its
label reversed has the opposite mean and the same precision, so mu is odd and the log-variance even in the labels.
Graded targets mix the two readings of a shot. The training loop draws z (`train.episode_loss`) and anneals the penalty.
Collapse is this family's known failure; `bilinear` is ours and against it: what an MLP of [k; z] must find by products
of hidden units is there from the start.
"""

from __future__ import annotations

from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pluralprefs.models.layers import Weights, init_mlp, mlp
from pluralprefs.pytrees import pytree, static
from pluralprefs.types import Comparisons, Covariance, Item, Key, UserPosterior

LEAST = 0.01  # variance over users of a coordinate that says something of them


def active_units(means: Float[np.ndarray, "users latent"]) -> int:
    """How many coordinates of z say something of users: the variance of their posterior mean is above `LEAST`.

    Burda et al. 2016 (arXiv 1509.00519, 5.2). A collapsed family has none.

    >>> active_units(np.array([[0.5, 0.0], [-0.5, 0.01]]))
    1
    """
    return int((np.var(np.asarray(means, np.float64), axis=0) > LEAST).sum()) if len(means) else 0


@pytree
class Variational:
    """See the module. The user state is z, [latent]; `beta` weighs the KL of a user in nats per comparison."""

    projection: Weights
    encoder: Weights
    decoder: Weights
    bilinear: Float[Array, "latent width"]
    beta: float = static()
    symmetric: bool = static()

    @classmethod
    def init(
        cls, *, key: Key, dim: int, latent: int = 8, width: int = 32, hidden: tuple[int, ...] = (64,),
        beta: float = 1e-3, symmetric: bool = False, **_: Any,
    ) -> Self:  # fmt: skip
        """Draw parameters. `width` of the projected items, `hidden` sizes encoder and decoder."""
        if beta < 0:
            raise ValueError(f"beta is {beta}; the weight of the KL must be at least 0")
        keys = jax.random.split(key, 4)
        return cls(
            init_mlp(keys[0], (dim, width)), init_mlp(keys[1], (2 * width, *hidden, 2 * latent)),
            init_mlp(keys[2], (width + latent, *hidden, 1)),
            jax.random.normal(keys[3], (latent, width)) / jnp.sqrt(width), beta, symmetric,
        )  # fmt: skip

    def init_user(self) -> Float[Array, " latent"]:
        return jnp.zeros(self.bilinear.shape[0])

    def infer_user(self, support: Comparisons[Item]) -> UserPosterior:
        """q(z | shots): mean, and the standard deviations as a diagonal root. N(0, I) without shots."""
        first, second = (mlp(self.projection, side.embedding) for side in (support.first, support.second))
        mean, precision = self._factors(first, second)
        mean_reversed, precision_reversed = self._factors(second, first)
        share = support.target[:, None]
        weight = support.weight[:, None]
        for_first, for_second = weight * share * precision, weight * (1 - share) * precision_reversed
        total = 1 + jnp.sum(for_first + for_second, axis=0)
        centre = jnp.sum(for_first * mean + for_second * mean_reversed, axis=0) / total
        return UserPosterior(centre, Covariance(total**-0.5, jnp.zeros((0, total.shape[0]))))

    def _factors(
        self, chosen: Float[Array, "shots width"], rejected: Float[Array, "shots width"]
    ) -> tuple[Float[Array, "shots latent"], Float[Array, "shots latent"]]:
        """Mean and precision of each shot's factor, were the first of the two responses preferred."""

        def heads(a: Array, b: Array) -> tuple[Array, Array]:
            mean, precision = jnp.split(mlp(self.encoder, jnp.concatenate([a, b], axis=1)), 2, axis=1)
            return mean, precision

        if not self.symmetric:
            mean, precision = heads(chosen, rejected)
            return mean, jax.nn.softplus(precision)
        apart = chosen - rejected
        (mean, precision), (other, precision_other) = (heads(x, -x) for x in (apart, -apart))
        return 0.5 * (mean - other), jax.nn.softplus(0.5 * (precision + precision_other))

    def penalty(self, users: UserPosterior, batch: Comparisons[Item], key: Key) -> Float[Array, ""]:
        """beta times the mean KL of the posteriors (leading axis: users) of users who are asked about."""
        assert users.covariance is not None
        variance = users.covariance.root**2
        divergence = 0.5 * jnp.sum(variance + users.mean**2 - 1 - jnp.log(variance), axis=1)
        asked = jnp.any(batch.weight > 0, axis=1)
        return self.beta * jnp.sum(jnp.where(asked, divergence, 0.0)) / jnp.maximum(jnp.sum(asked), 1)

    def reward(self, user: Float[Array, " latent"], item: Item) -> Float[Array, ""]:
        shown = mlp(self.projection, item.embedding)
        return mlp(self.decoder, jnp.concatenate([shown, user]))[0] + user @ (self.bilinear @ shown)

    def log_odds(self, user: Float[Array, " latent"], first: Item, second: Item) -> Float[Array, ""]:
        return self.reward(user, first) - self.reward(user, second)
