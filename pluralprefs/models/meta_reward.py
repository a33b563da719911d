"""Meta-learned rewards: base rewards whose softmax mixture a few gradient steps fit to a user (MRM, arXiv 2601.18731).

    r_u = s softmax(omega_u) . f(e)          `basis` (f), s = exp(`log_scale`)
    omega_u = omega_0 after `steps` steps on the user's shots          `start` (omega_0), meta-learned

The user state is omega_u, [rewards]. The steps are those of `adapt.fit_user`, handed in as `adapter`, so that training
by episodes differentiates through them (second order), or takes them as constants of the model (`first_order`, as in
first-order MAML). No steps, or no shots, are omega_0. The published outer loss weighs the users who are served worst:
`likelihoods.user_tail` as the experiment's reduction. Where we depart: the steps are Adam's on a posterior whose prior
is N(omega_0, `strength`^2), so that more of them approach a user's best weights and not infinity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pluralprefs.models.layers import Weights, init_mlp, mlp
from pluralprefs.pytrees import pytree, static
from pluralprefs.types import Comparisons, Item, Key, UserPosterior


@pytree
class MetaReward:
    """See the module. The user state is the logits omega of the mixture, [rewards]."""

    basis: Weights
    start: Float[Array, " rewards"]
    log_scale: Float[Array, ""]
    adapter: Callable[..., Any] = static()
    settings: tuple[tuple[str, Any], ...] = static()

    @classmethod
    def init(
        cls, *, key: Key, dim: int, adapter: Callable[..., Any], rewards: int = 8, hidden: tuple[int, ...] = (),
        steps: int = 10, learning_rate: float = 0.3, strength: float = 2.0, first_order: bool = False, **_: Any,
    ) -> Self:  # fmt: skip
        """`adapter(model, start, support, steps=, learning_rate=, strength=, first_order=)` gives the stepped state."""
        settings = {"steps": steps, "learning_rate": learning_rate, "strength": strength, "first_order": first_order}
        weights = init_mlp(key, (dim, *hidden, rewards))
        return cls(weights, jnp.zeros(rewards), jnp.log(4.0), adapter, tuple(settings.items()))

    def init_user(self) -> Float[Array, " rewards"]:
        return jnp.zeros(self.start.shape[0])

    def infer_user(self, support: Comparisons[Item]) -> UserPosterior:
        """The mixture after the inner steps; the start without shots."""
        return UserPosterior(self.adapter(self, self.start, support, **dict(self.settings)))

    def reward(self, user: Float[Array, " rewards"], item: Item) -> Float[Array, ""]:
        return jnp.exp(self.log_scale) * (jax.nn.softmax(user) @ mlp(self.basis, item.embedding))

    def log_odds(self, user: Float[Array, " rewards"], first: Item, second: Item) -> Float[Array, ""]:
        return self.reward(user, first) - self.reward(user, second)
