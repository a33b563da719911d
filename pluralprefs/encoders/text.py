"""What every text encoder here is once its weights are read: a pytree that turns Tokens into one embedding a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pluralprefs.encoders.pooling import Pooling, l2_normalise, pool, pool_spans
from pluralprefs.encoders.tokens import Renderer
from pluralprefs.encoders.weights import EncoderError
from pluralprefs.pytrees import pytree, static
from pluralprefs.types import Comparisons, Encoder, Item, Replaceable, Tokens


@pytree
class Span(Replaceable):
    """The place of a text in a packed row: its first token and how many it has."""

    start: Int[Array, "*batch"]
    size: Int[Array, "*batch"]


@pytree
class Packed(Replaceable):
    """Comparisons whose texts stand one after the other in shared rows, all texts of a comparison in one row.

    `rows` holds Tokens [rows, length] whose segment changes from text to text. `comparisons` is flat, as many of every
    row in the order of the rows; where an item would hold Tokens it holds a Span of its row.
    """

    rows: Tokens
    comparisons: Comparisons[Any]


@pytree
class TextEncoder(Replaceable):
    """Tokens -> Item with one embedding a text, jit-able and differentiable in `params`.

    `joint` says that item embeddings are of prompt and response together; `prompt` that items also carry an embedding
    of the prompt alone. Both steer what `cache.encode_items` renders, not this call. `kind` names the architecture in
    cache keys. `packs` says that a row may hold several texts, told apart by their segments.
    """

    packs: ClassVar[bool] = False

    params: Mapping[str, Any]
    graphdef: Any = static()
    renderer: Renderer = static()
    pooling: Pooling = static()
    normalise: bool = static()
    joint: bool = static()
    prompt: bool = static()
    dim: int = static()
    dtype: str = static()
    weights: str = static()
    kind: str = static()

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

    def spans(self, rows: Tokens, places: Span) -> Float[Array, "rows spans dim"]:
        """Embeddings of texts [rows, spans] of packed rows, in float32. Raises EncoderError where `packs` is false."""
        require_packing(self)
        embedding = pool_spans(self.hidden(rows).astype(jnp.float32), places.start, places.size, self.pooling)
        return l2_normalise(embedding) if self.normalise else embedding


def require_packing(encoder: TextEncoder) -> None:
    """Raise EncoderError for an encoder whose segments are not texts of their own."""
    if not encoder.packs:
        raise EncoderError(f"a row of a {encoder.kind} holds one text: it cannot be packed; leave backbone.packed out")


def encode(encoder: Encoder, comparisons: Comparisons[Any] | Packed) -> Comparisons[Item]:
    """Comparisons of items that hold Tokens, encoded. Frozen or trained is only where this is called.

    Both responses go through the encoder in one batch; the prompt, equal in the two, once. Of packed rows all texts go
    through it together. What else the items hold (attributes, index) is kept.
    """
    if isinstance(comparisons, Packed):
        return _encode_packed(encoder, comparisons)
    first, second = comparisons.first, comparisons.second
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first.embedding, second.embedding)
    one, other = jnp.split(encoder(both).embedding, 2)
    prompt = None if first.prompt is None else encoder(first.prompt).embedding
    return comparisons.replace(
        first=first.replace(embedding=one, prompt=prompt), second=second.replace(embedding=other, prompt=prompt)
    )


def _encode_packed(encoder: Any, packed: Packed) -> Comparisons[Item]:
    first, second = packed.comparisons.first, packed.comparisons.second
    texts = [first.embedding, second.embedding, *([] if first.prompt is None else [first.prompt])]
    rows = len(packed.rows.ids)
    # A row's texts stay with it, so that rows may be divided over devices.
    places = jax.tree.map(lambda *parts: jnp.concatenate([part.reshape(rows, -1) for part in parts], axis=1), *texts)
    found = jnp.split(encoder.spans(packed.rows, places), len(texts), axis=1)
    one, other, *prompt = [part.reshape(-1, part.shape[-1]) for part in found]
    return packed.comparisons.replace(
        first=first.replace(embedding=one, prompt=prompt[0] if prompt else None),
        second=second.replace(embedding=other, prompt=prompt[0] if prompt else None),
    )
