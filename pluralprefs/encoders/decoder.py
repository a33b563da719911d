"""Decoders in Flax NNX: Llama, Mistral, Qwen and Gemma, with the weights of Hugging Face checkpoints.

A stack of layers, each a causal self-attention and a perceptron on a residual stream,

    x <- x + attention(norm(x))        x <- x + down(act(gate(norm(x))) * up(norm(x)))

Queries share keys and values in groups, positions are rotary (`rope.py`), attention may be limited to a window. What
varies between model types is read by `decoder_config.py` and stated there.

Rows may be padded on either side, and may hold several sequences one after the other (packing): `Tokens.segment`
changes where the next one begins. Positions are counted along the mask and restart with every sequence, and a token
sees its own sequence alone.

Parameters are float32; a lower `dtype` is that of the products, while statistics of norms, rotations, the softmax and
the head stay in float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pluralprefs.encoders.decoder_config import DecoderConfig
from pluralprefs.encoders.layers import ACTIVATIONS, precision
from pluralprefs.encoders.rope import rotate, turn
from pluralprefs.types import Tokens

Turns = tuple[Float[Array, "batch length planes"], Float[Array, "batch length planes"]]


class Places(NamedTuple):
    """Where every token stands: in which sequence of its row (`run`), where in it, and how long that is."""

    position: Int[Array, "batch length"]
    run: Int[Array, "batch length"]
    longest: Int[Array, "batch length"]


class Norm(nnx.Module):
    """x / sqrt(mean(x^2) + epsilon) * (offset + scale), in float32 and back to the type of x."""

    def __init__(self, size: int, config: DecoderConfig):
        self.scale = nnx.Param(jnp.ones(size))
        self.epsilon, self.offset = config.epsilon, config.norm_offset

    def __call__(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.epsilon)
        return (wide * jnp.broadcast_to(self.offset + self.scale[...], wide.shape)).astype(x.dtype)


class Layer(nnx.Module):
    """Self-attention and a gated perceptron, each on the normalised residual stream."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs):
        linear, size = _linear(dtype, rngs), config.head_dim
        self.query = linear(config.dim, config.heads * size, config.qkv_bias)
        self.key = linear(config.dim, config.kv_heads * size, config.qkv_bias)
        self.value = linear(config.dim, config.kv_heads * size, config.qkv_bias)
        self.out = linear(config.heads * size, config.dim, config.out_bias)
        self.gate = linear(config.dim, config.hidden, config.mlp_bias)
        self.up = linear(config.dim, config.hidden, config.mlp_bias)
        self.down = linear(config.hidden, config.dim, config.mlp_bias)
        self.attention_norm, self.mlp_norm = Norm(config.dim, config), Norm(config.dim, config)
        self.attention_after = Norm(config.dim, config) if config.blocks_normed else None
        self.mlp_after = Norm(config.dim, config) if config.blocks_normed else None
        self.query_norm = Norm(size, config) if config.qk_norm else None
        self.key_norm = Norm(size, config) if config.qk_norm else None
        self.config = config

    def __call__(
        self, x: Float[Array, "batch length dim"], turns: Turns, seen: Bool[Array, "batch 1 length length"]
    ) -> Float[Array, "batch length dim"]:
        added = self.attend(self.attention_norm(x), turns, seen)
        x = x + (added if self.attention_after is None else self.attention_after(added))
        added = self.perceive(self.mlp_norm(x))
        return x + (added if self.mlp_after is None else self.mlp_after(added))

    def attend(
        self, x: Float[Array, "batch length dim"], turns: Turns, seen: Bool[Array, "batch 1 length length"]
    ) -> Float[Array, "batch length dim"]:
        """Every token attends to the tokens that `seen` gives it."""
        split = (*x.shape[:2], -1, self.config.head_dim)
        query, key, value = (project(x).reshape(split) for project in (self.query, self.key, self.value))
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = rotate(query, *turns), rotate(key, *turns)
        mixed = attention(query, key, value, seen, scale=self.config.scale, cap=self.config.score_cap)
        return self.out(mixed.reshape(*x.shape[:2], -1))

    def perceive(self, x: Float[Array, "batch length dim"]) -> Float[Array, "batch length dim"]:
        """The perceptron."""
        return self.down(ACTIVATIONS[self.config.activation](self.gate(x)) * self.up(x))


class Decoder(nnx.Module):
    """Token ids to the hidden states behind the last norm, and from those to logits where it has a head."""

    def __init__(self, config: DecoderConfig, *, head: bool, dtype: Any, rngs: nnx.Rngs):
        self.words = nnx.Embed(config.vocabulary, config.dim, rngs=rngs)
        self.layers = nnx.List([Layer(config, dtype=dtype, rngs=rngs) for _ in range(config.layers)])
        self.norm = Norm(config.dim, config)
        # The head is of float32 whatever the rest is: differences of logits are small beside logits.
        untied = head and not config.tied
        self.head = _linear(jnp.float32, rngs)(config.dim, config.vocabulary, False) if untied else None
        self.config, self.dtype = config, dtype

    def __call__(self, tokens: Tokens) -> Float[Array, "batch length dim"]:
        """Hidden states in the compute type; those of padding are meaningless."""
        mask = jnp.asarray(tokens.mask)
        places = locate(mask, jnp.asarray(tokens.segment))
        x = self.words(jnp.asarray(tokens.ids)).astype(self.dtype) * jnp.asarray(
            self.config.embedding_scale, self.dtype
        )
        turns = {rope: turn(rope, places.position, places.longest) for rope in set(self.config.ropes)}
        seen = {window: visible(places, places, mask, window) for window in set(self.config.windows)}
        for layer, rope, window in zip(self.layers, self.config.ropes, self.config.windows, strict=True):
            x = layer(x, turns[rope], seen[window])
        return self.norm(x)

    def embed(self, ids: Int[Array, "batch length"]) -> Float[Array, "batch length dim"]:
        """Word embeddings in the compute type; an id outside the vocabulary gives NaN."""
        return self.words(ids).astype(self.dtype) * jnp.asarray(self.config.embedding_scale, self.dtype)

    def logits(self, hidden: Float[Array, "*batch dim"]) -> Float[Array, "*batch vocabulary"]:
        """Logits of the next token, in float32. Raises ValueError where the head was not loaded."""
        wide = hidden.astype(jnp.float32)
        if self.config.tied:
            logits = jnp.matmul(wide, self.words.embedding[...].T, precision=jax.lax.Precision.HIGHEST)
        elif self.head is not None:
            logits = self.head(wide)
        else:
            raise ValueError("this decoder was loaded without its head; load it with head=True")
        return cap_softly(logits, self.config.logit_cap)


def locate(mask: Bool[Array, "batch length"], segment: Int[Array, "batch length"]) -> Places:
    """Count positions along the mask, anew wherever the segment changes.

    A sequence stands in one piece: padding is before, behind or between sequences, not within one.
    """
    count = jnp.cumsum(mask, axis=1) - 1
    before = jnp.pad(segment[:, :-1], ((0, 0), (1, 0)))
    begins = mask & ((segment != before) | (count == 0))
    start = jax.lax.cummax(jnp.where(begins, count, 0), axis=1)
    total = count[:, -1:] + 1
    following = jnp.concatenate([jnp.where(begins, count, total)[:, 1:], total], axis=1)
    longest = jax.lax.cummin(following, axis=1, reverse=True) - start
    return Places(jnp.maximum(count - start, 0), jnp.cumsum(begins, axis=1), longest)


def visible(
    query: Places, key: Places, mask: Bool[Array, "batch keys"], window: int | None
) -> Bool[Array, "batch 1 length keys"]:
    """Which keys a query sees: real tokens of its own sequence, up to itself, the last `window` of them."""
    distance = query.position[:, :, None] - key.position[:, None, :]
    seen = mask[:, None, :] & (query.run[:, :, None] == key.run[:, None, :]) & (distance >= 0)
    return (seen if window is None else seen & (distance < window))[:, None]


def attention(
    query: Float[Array, "batch length heads dim"],
    key: Float[Array, "batch keys kv_heads dim"],
    value: Float[Array, "batch keys kv_heads dim"],
    seen: Bool[Array, "batch 1 length keys"],
    *,
    scale: float,
    cap: float | None = None,
) -> Float[Array, "batch length heads dim"]:
    """Softmax attention with shared keys and values. A query that sees nothing (padding) has a finite result.

    `jax.nn.dot_product_attention` computes it, save where scores are capped: it has no place for a function between
    the product and the mask.
    """
    with jax.default_matmul_precision("highest" if query.dtype == jnp.float32 else "default"):
        if cap is None:
            return jax.nn.dot_product_attention(query, key, value, mask=seen, scale=scale)
        batch, length, heads, dim = query.shape
        grouped = query.reshape(batch, length, key.shape[2], -1, dim)
        scores = jnp.einsum("bqkgd,bskd->bkgqs", grouped, key, preferred_element_type=jnp.float32) * scale
        scores = jnp.where(seen[:, :, None], cap_softly(scores, cap), jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        return jnp.einsum("bkgqs,bskd->bqkgd", weights, value).reshape(batch, length, heads, dim)


def cap_softly(x: Float[Array, "*batch"], cap: float | None) -> Float[Array, "*batch"]:
    """cap * tanh(x / cap): x itself where it is small, never beyond the cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def _linear(dtype: Any, rngs: nnx.Rngs) -> Any:
    return lambda inputs, outputs, bias: nnx.Linear(
        inputs, outputs, use_bias=bias, dtype=dtype, precision=precision(dtype), rngs=rngs
    )
