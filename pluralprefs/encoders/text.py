"""What every text encoder here is once its weights are read: a pytree that turns Tokens into one embedding a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Float

from pluralprefs.encoders.pooling import Pooling, l2_normalise, pool
from pluralprefs.encoders.tokens import Renderer
from pluralprefs.types import Comparisons, Encoder, Item, Replaceable, Tokens


@struct.dataclass
class TextEncoder(Replaceable):
    """Tokens -> Item with one embedding a text, jit-able and differentiable in `params`.

    `joint` says that item embeddings are of prompt and response together; `prompt` that items also carry an embedding
    of the prompt alone. Both steer what `cache.encode_items` renders, not this call. `kind` names the architecture in
    cache keys.
    """

    params: Mapping[str, Any]
    graphdef: Any = struct.field(pytree_node=False)
    renderer: Renderer = struct.field(pytree_node=False)
    pooling: Pooling = struct.field(pytree_node=False)
    normalise: bool = struct.field(pytree_node=False)
    joint: bool = struct.field(pytree_node=False)
    prompt: bool = struct.field(pytree_node=False)
    dim: int = struct.field(pytree_node=False)
    dtype: str = struct.field(pytree_node=False)
    weights: str = struct.field(pytree_node=False)
    kind: str = struct.field(pytree_node=False)

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides the embedding of a text: the cache key, and an entry of run.json."""
        return {
            "encoder": self.kind,
            "weights": self.weights,
            **self.renderer.identity,
            "pooling": self.pooling,
            "normalise": self.normalise,
            "dtype": self.dtype,
        }

    def hidden(self, tokens: Tokens) -> Float[Array, "batch length dim"]:
        """Hidden states behind the last layer and its norm; those of padding are meaningless."""
        return nnx.merge(self.graphdef, self.params)(tokens)

    def __call__(self, tokens: Tokens) -> Item:
        """Encode Tokens [batch, length] as Item with embedding [batch, dim], in float32."""
        embedding = pool(self.hidden(tokens).astype(jnp.float32), jnp.asarray(tokens.mask), self.pooling)
        return Item(embedding=l2_normalise(embedding) if self.normalise else embedding)


def encode(encoder: Encoder, comparisons: Comparisons[Any]) -> Comparisons[Item]:
    """Comparisons of items that hold Tokens, encoded. Frozen or trained is only where this is called.

    Both responses go through the encoder in one batch; the prompt, equal in the two, once. What else the items hold
    (attributes, index) is kept.
    """
    first, second = comparisons.first, comparisons.second
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first.embedding, second.embedding)
    one, other = jnp.split(encoder(both).embedding, 2)
    prompt = None if first.prompt is None else encoder(first.prompt).embedding
    return comparisons.replace(
        first=first.replace(embedding=one, prompt=prompt), second=second.replace(embedding=other, prompt=prompt)
    )
