"""Ideal points: PAL (arXiv 2406.08469, ICLR 2025). A user is a mixture of K prototypes, w_u = softmax(omega_u).

    PAL-A  x~ = f(e),  a_u = f(P' w_u)          l = |x~_second - a_u| - |x~_first - a_u|          (plain L2 norm)
    PAL-B  x~ = f(e),  z_u = sum_k w_k g_k(h)   l = min(exp(t), 100) [cos(x~_first, z_u) - cos(x~_second, z_u)]

e is the encoded response (`Item.embedding`), h the encoded prompt (`Item.prompt`), f and g_k MLPs
(`projector`, `prompt_projectors`), P the `prototypes` [K, dim], unit-norm rows at the start, and t `log_scale`. The
user state is omega [K]. One prototype is one user-independent reward. Where we depart: distances carry a learned
`log_scale` in PAL-A too (a distance has no natural unit of log-odds), and where data has no prompt PAL-B's g_k see a
constant, so that each prototype is one learned direction.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pluralprefs.models.layers import Weights, cosine, init_mlp, mlp, mlp_after_kernel, safe_norm
from pluralprefs.pytrees import pytree, static
from pluralprefs.types import Item, Key


@pytree
class IdealPoint:
    """PAL-A; see the module. The user state is the logits omega of the mixture weights, [prototypes]."""

    projector: Weights
    points: Float[Array, "prototypes dim"]
    log_scale: Float[Array, ""]
    squared: bool = static(default=False)
    is_reduced: bool = static(default=False)

    @classmethod
    def init(
        cls, *, key: Key, dim: int, prototypes: int = 4, point: int = 64, hidden: tuple[int, ...] | None = None,
        squared: bool = False, **_: Any,
    ) -> Self:  # fmt: skip
        """`point` is the dimension of the ideal-point space, `hidden` sizes f's layers (one of `point`; () is linear).

        `squared` uses squared distances.
        """
        layers = (point,) if hidden is None else hidden
        first, second = jax.random.split(key)
        points = jax.random.normal(second, (prototypes, dim))
        points = points / jnp.linalg.norm(points, axis=1, keepdims=True)
        return cls(init_mlp(first, (dim, *layers, point)), points, jnp.zeros(()), squared)

    def init_user(self) -> Float[Array, " prototypes"]:
        return jnp.zeros(self.points.shape[0])

    def reward(self, user: Float[Array, " prototypes"], item: Item) -> Float[Array, ""]:
        """Minus the distance from the user's ideal point."""
        mixed = jax.nn.softmax(user) @ self.points
        ideal = mlp_after_kernel(self.projector, mixed) if self.is_reduced else mlp(self.projector, mixed)
        point = item.embedding if self.is_reduced else mlp(self.projector, item.embedding)
        distance = safe_norm(point - ideal)
        return -jnp.exp(self.log_scale) * (distance**2 if self.squared else distance)

    def log_odds(self, user: Float[Array, " prototypes"], first: Item, second: Item) -> Float[Array, ""]:
        return self.reward(user, first) - self.reward(user, second)

    def reduced(self, items: Item) -> tuple[Self, Item]:
        """`types.ReducesItems`: items are their f(e), prototypes what f's first kernel makes of them."""
        if self.is_reduced:
            return self, items
        points = self.points @ self.projector[0]["kernel"]
        items = items.replace(embedding=mlp(self.projector, items.embedding))
        return replace(self, points=points, is_reduced=True), items


@pytree
class IdealDirection:
    """PAL-B; see the module. The user state is the logits omega of the mixture weights, [prototypes]."""

    projector: Weights
    prompt_projectors: Weights
    log_scale: Float[Array, ""]
    is_reduced: bool = static(default=False)

    @classmethod
    def init(
        cls, *, key: Key, dim: int, prompt_dim: int = 0, prototypes: int = 4, point: int = 64,
        hidden: tuple[int, ...] | None = None, **_: Any,
    ) -> Self:  # fmt: skip
        """`prompt_dim` is 0 where the data has no prompt embedding; `hidden` sizes the layers of f and of each g_k.

        One layer of `point` by default; () makes them linear. log_scale starts at log(1/0.07).
        """
        layers = (point,) if hidden is None else hidden
        first, second = jax.random.split(key)
        sizes = (max(prompt_dim, 1), *layers, point)
        heads = jax.vmap(lambda k: init_mlp(k, sizes))(jax.random.split(second, prototypes))
        return cls(init_mlp(first, (dim, *layers, point)), heads, jnp.log(1 / 0.07))

    def init_user(self) -> Float[Array, " prototypes"]:
        return jnp.zeros(self.prompt_projectors[0]["bias"].shape[0])

    def reward(self, user: Float[Array, " prototypes"], item: Item) -> Float[Array, ""]:
        """Scaled cosine between the response and the user's ideal direction for the prompt."""
        point = item.embedding if self.is_reduced else mlp(self.projector, item.embedding)
        ideal = jax.nn.softmax(user) @ self._directions(item)
        return jnp.minimum(jnp.exp(self.log_scale), 100.0) * cosine(point, ideal)

    def log_odds(self, user: Float[Array, " prototypes"], first: Item, second: Item) -> Float[Array, ""]:
        return self.reward(user, first) - self.reward(user, second)

    def reduced(self, items: Item) -> tuple[Self, Item]:
        """`types.ReducesItems`: items are their f(e), prompts the g_k(h) of all prototypes, one after the other."""
        if self.is_reduced:
            return self, items
        flat = None
        if items.prompt is not None:
            flat = jax.lax.map(lambda item: self._directions(item).reshape(-1), items, batch_size=4096)
        items = items.replace(embedding=mlp(self.projector, items.embedding), prompt=flat)
        return replace(self, is_reduced=True), items

    def _directions(self, item: Item) -> Float[Array, "prototypes point"]:
        """The g_k(h) of an item's prompt."""
        if self.is_reduced and item.prompt is not None:
            return item.prompt.reshape(self.init_user().shape[0], -1)
        prompt = jnp.ones(1) if item.prompt is None else item.prompt
        return jax.vmap(lambda weights: mlp(weights, prompt))(self.prompt_projectors)
