"""Neural process: a transformer without positions reads shots as tokens (GPO, arXiv 2310.11523) into a few latents.

    token_i = (MLP([k_first; k_second; y_i]) + MLP([k_second; k_first; -y_i])) / 2        `token`, y = 2 t - 1, k = P e
    layer   latents attend to {null, tokens}, an MLP follows                        `null`, `latents`, `blocks`
    target  starts as MLP(k), attends to the latents of each layer, is read by a linear head: the reward      `target`
    l = r(first) - r(second)

The user state is the latents after each layer, [layers, latents, width]. Targets see the context alone, never each
other; the null token is always there, so that no shots are a context too; a shot of weight w counts as w tokens. Where
we depart: GPO's targets attend to the tokens themselves, so that its user is as long as the context; with latents
between (as in LBANP, arXiv 2211.08458) a user has one size, and any number of shots costs a target the same. The
pairwise likelihood stands in the place of GPO's regression, and tokens hold pairs, in either order the same.
"""

from __future__ import annotations

from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pluralprefs.models.layers import Weights, init_mlp, mlp
from pluralprefs.pytrees import pytree, static
from pluralprefs.types import Comparisons, Item, Key, UserPosterior

Block = dict[str, Any]


@pytree
class NeuralProcess:
    """See the module. The user state is the latents of every layer, [layers, latents, width]."""

    projection: Weights
    token: Weights
    null: Float[Array, "1 width"]
    latents: Float[Array, "latents width"]
    blocks: tuple[tuple[Block, Block], ...]
    target: Weights
    head: Weights
    heads: int = static()

    @classmethod
    def init(
        cls, *, key: Key, dim: int, width: int = 32, latents: int = 4, layers: int = 2, heads: int = 4, **_: Any
    ) -> Self:
        """Draw parameters. Raises ValueError unless `heads` divides `width`."""
        if width % heads:
            raise ValueError(f"width {width} does not divide into {heads} heads")
        keys = jax.random.split(key, 6 + 2 * layers)
        blocks = [_init_block(k, width) for k in keys[6:]]
        return cls(
            init_mlp(keys[0], (dim, width)), init_mlp(keys[1], (2 * width + 1, width, width)),
            0.1 * jax.random.normal(keys[2], (1, width)), jax.random.normal(keys[3], (latents, width)),
            tuple(zip(blocks[:layers], blocks[layers:], strict=True)), init_mlp(keys[4], (width, width, width)),
            jax.tree.map(lambda x: 0.1 * x, init_mlp(keys[5], (width, 1))), heads,
        )  # fmt: skip

    def init_user(self) -> Float[Array, "layers latents width"]:
        return jnp.zeros((len(self.blocks), *self.latents.shape))

    def infer_user(self, support: Comparisons[Item]) -> UserPosterior:
        """The latents of each layer, having read the shots; of the null token alone without any."""
        first, second = (mlp(self.projection, side.embedding) for side in (support.first, support.second))
        label = 2 * support.target[:, None] - 1
        tokens = 0.5 * (mlp(self.token, jnp.concatenate([first, second, label], axis=1))
                        + mlp(self.token, jnp.concatenate([second, first, -label], axis=1)))  # fmt: skip
        context = jnp.concatenate([self.null, tokens])
        weight = jnp.concatenate([jnp.ones(1), support.weight])
        latents, found = self.latents, []
        for read, _ in self.blocks:
            latents = _block(read, latents, context, weight, self.heads)
            found.append(latents)
        return UserPosterior(jnp.stack(found))

    def reward(self, user: Float[Array, "layers latents width"], item: Item) -> Float[Array, ""]:
        asked = mlp(self.target, mlp(self.projection, item.embedding))[None, :]
        every = jnp.ones(user.shape[1])
        for layer, (_, look) in enumerate(self.blocks):
            asked = _block(look, asked, user[layer], every, self.heads)
        return mlp(self.head, asked)[0, 0]

    def log_odds(self, user: Float[Array, "layers latents width"], first: Item, second: Item) -> Float[Array, ""]:
        return self.reward(user, first) - self.reward(user, second)


def _init_block(key: Key, width: int) -> Block:
    keys = jax.random.split(key, 5)
    draw = {name: jax.random.normal(k, (width, width)) / jnp.sqrt(width) for name, k in zip("qkvo", keys, strict=False)}
    return draw | {"mlp": init_mlp(keys[4], (width, 2 * width, width))}


def _block(
    block: Block,
    asking: Float[Array, "n width"],
    asked: Float[Array, "m width"],
    weight: Float[Array, " m"],
    heads: int,
) -> Float[Array, "n width"]:
    """Attention from `asking` to `asked` (one of weight w counts w times, of 0 not at all), then an MLP; both added."""
    query = _heads(_normed(asking) @ block["q"], heads)
    key, value = (_heads(_normed(asked) @ block[name], heads) for name in "kv")
    scores = jnp.einsum("hnd,hmd->hnm", query, key) / jnp.sqrt(query.shape[-1])
    present = jnp.log(jnp.where(weight > 0, weight, 1.0))
    scores = jnp.where(weight[None, None, :] > 0, scores + present[None, None, :], -1e30)
    seen = jnp.einsum("hnm,hmd->nhd", jax.nn.softmax(scores, axis=-1), value)
    asking = asking + seen.reshape(asking.shape) @ block["o"]
    return asking + mlp(block["mlp"], _normed(asking))


def _heads(x: Float[Array, "n width"], heads: int) -> Float[Array, "heads n part"]:
    return jnp.moveaxis(x.reshape(x.shape[0], heads, x.shape[1] // heads), 1, 0)


def _normed(x: Float[Array, "n width"]) -> Float[Array, "n width"]:
    """Each row at mean 0 and variance 1."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-6)
