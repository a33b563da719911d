"""Bradley-Terry rewards: linear, Gaussian-process or MLP in the encoded response, with item effects.

    r_u(x) = f(e) + sum_p w_u[p] . e[p] + b_u[item]            l = r_u(first) - r_u(second)

e is the encoded response (`Item.embedding`) and e[p] its named parts: the encoder's output ("linear"), and whatever
feature maps were appended to it, such as Nystrom features of a radial basis function kernel ("kernel",
`encoders.features`), on which a Gaussian prior over weights is a Gaussian-process prior over rewards. f is an
optional MLP that all users share, b an effect of the item itself: zero for an item never seen in training
(`Item.index` = -1). The user state is one weight vector per part. Its population value is the population's reward;
communities and users deviate from it with strengths learned part by part (`fitting`). No population at all is an
individual model per user.

References: Bradley and Terry 1952; Chu and Ghahramani 2005 (Gaussian processes). Item effects come first: where several
users judge the same items they are worth more than any user model, and left out, "personalisation" fits them instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pluralprefs.models.layers import Weights, init_mlp, mlp
from pluralprefs.pytrees import pytree, static
from pluralprefs.types import Item, Key


@pytree
class BradleyTerry:
    """See the module. `parts` names the columns of the embedding in order; `items` is the size of the item effects."""

    mlp: Weights | None
    parts: tuple[tuple[str, int], ...] = static()
    items: int = static()

    @classmethod
    def init(
        cls,
        *,
        key: Key,
        dim: int,
        items: int = 0,
        parts: Mapping[str, int] | None = None,
        hidden: tuple[int, ...] = (),
        item_effects: bool = True,
        **_: Any,
    ) -> Self:
        """`hidden` sizes an MLP shared by all users (none if empty). `parts` defaults to one, "linear"."""
        weights = init_mlp(key, (dim, *hidden, 1)) if hidden else None
        named = tuple((parts or {"linear": dim}).items())
        if sum(size for _, size in named) != dim:
            raise ValueError(f"parts {dict(named)} do not add up to the embedding's {dim} columns")
        return cls(weights, named, items if item_effects else 0)

    def init_user(self) -> dict[str, Array]:
        state = {name: jnp.zeros(size) for name, size in self.parts}
        return state | ({"item": jnp.zeros(self.items)} if self.items else {})

    def features(self, item: Item) -> dict[str, Array]:
        """What the user state multiplies: the gradient of the reward with respect to it, which is constant."""
        parts, start = {}, 0
        for name, size in self.parts:
            parts[name] = item.embedding[start : start + size]
            start += size
        if self.items:
            parts["item"] = jax.nn.one_hot(_place(item), self.items)  # zeros at -1
        return parts

    def reward(self, user: dict[str, Array], item: Item) -> Float[Array, ""]:
        reward = jnp.concatenate([user[name] for name, _ in self.parts]) @ item.embedding
        if self.items:
            place = _place(item)
            reward = reward + jnp.where(place >= 0, user["item"][jnp.maximum(place, 0)], 0.0)
        return reward if self.mlp is None else reward + mlp(self.mlp, item.embedding)[0]

    def log_odds(self, user: dict[str, Array], first: Item, second: Item) -> Float[Array, ""]:
        return self.reward(user, first) - self.reward(user, second)


def _place(item: Item) -> Int[Array, ""]:
    """Position of the item's effect, -1 where it has none."""
    return jnp.full((), -1, jnp.int32) if item.index is None else item.index.astype(jnp.int32)
