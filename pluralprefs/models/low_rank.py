"""Low-rank users: r_u(x, y) = w_u . V' e, with e the encoded response and V shared by all users.

    LoRe (arXiv 2504.14439): w_u on the simplex, softmax of the user's logits (`weights="simplex"`)
    PReF (arXiv 2503.06358), RFM (arXiv 2503.17338): w_u free and signed (`weights="free"`)

`basis` holds V, [dim, rank]; with `hidden` sizes the basis functions are an MLP of e instead (reward features learned
jointly with the users, as RFM does). One rank, or no evidence about the user, is Bradley-Terry. Where we depart: free
weights have a Gaussian prior whose covariance is learned, hence a Laplace posterior and tempering; the released LoRe
has a regulariser towards a reference head, which here is the optimiser's weight decay.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pluralprefs.models.layers import Weights, init_mlp, mlp
from pluralprefs.pytrees import pytree, static
from pluralprefs.types import Item, Key


@pytree
class LowRank:
    """See the module. The user state is [rank]: weights if free, logits if on the simplex."""

    basis: Weights
    rank: int = static()
    weights: str = static(default="free")
    is_reduced: bool = static(default=False)

    @classmethod
    def init(
        cls, *, key: Key, dim: int, rank: int = 8, weights: str = "free", hidden: tuple[int, ...] = (), **_: Any
    ) -> Self:
        """Draw the basis. `weights` is "free" or "simplex"; `hidden` makes the basis functions nonlinear."""
        if weights not in ("free", "simplex"):
            raise ValueError(f"weights is 'free' or 'simplex', not {weights!r}")
        return cls(init_mlp(key, (dim, *hidden, rank)), rank, weights)

    def init_user(self) -> Float[Array, " rank"]:
        return jnp.zeros(self.rank)

    def basis_rewards(self, item: Item) -> Float[Array, "*batch rank"]:
        """V' e: the rewards of the basis."""
        return item.embedding if self.is_reduced else mlp(self.basis, item.embedding)

    def reward(self, user: Float[Array, " rank"], item: Item) -> Float[Array, ""]:
        weight = jax.nn.softmax(user) if self.weights == "simplex" else user
        return weight @ self.basis_rewards(item)

    def log_odds(self, user: Float[Array, " rank"], first: Item, second: Item) -> Float[Array, ""]:
        return self.reward(user, first) - self.reward(user, second)

    def reduced(self, items: Item) -> tuple[Self, Item]:
        """`types.ReducesItems`: items are the rewards of the basis."""
        return replace(self, is_reduced=True), items.replace(embedding=self.basis_rewards(items))
