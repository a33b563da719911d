"""Decoders in Flax NNX: Llama, Mistral, Qwen, Gemma and OPT, with the weights of Hugging Face checkpoints.

A stack of layers, each a causal self-attention and a perceptron on a residual stream,

    x <- x + attention(norm(x))        x <- x + down(act(gate(norm(x))) * up(norm(x)))

Queries share keys and values in groups, positions are rotary (`rope.py`; learned in OPT), attention may be limited to a
window. What varies between model types is read by `decoder_config.py` and stated there.

Rows may be padded on either side, and may hold several sequences one after the other (packing): `Tokens.segment`
changes where the next one begins. Positions are counted along the mask and restart with every sequence, and a token
sees its own sequence alone.

Parameters are float32; a lower `dtype` is that of the products, while statistics of norms, rotations, the softmax and
the head stay in float32. `remat` says what of a layer is kept for the gradient; the rest is computed again.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from pluralprefs.encoders.attention import Kernel, Places, attention, cap_softly, locate, visible
from pluralprefs.encoders.decoder_config import DecoderConfig
from pluralprefs.encoders.layers import ACTIVATIONS, precision
from pluralprefs.encoders.rope import rotate, turn
from pluralprefs.pytrees import pytree
from pluralprefs.types import Replaceable, Tokens

Turns = tuple[Float[Array, "batch length planes"], Float[Array, "batch length planes"]]
Kept = tuple[Float[Array, "batch size kv_heads head_dim"], Float[Array, "batch size kv_heads head_dim"]]
REMAT = ("nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable")
OPT_OFFSET = 2  # the first rows of OPT's position table are of padding


class Norm(nnx.Module):
    """x / sqrt(mean(x^2) + epsilon) * (offset + scale), in float32 and back to the type of x.

    OPT's takes the mean off x first and adds a bias.
    """

    def __init__(self, size: int, config: DecoderConfig):
        self.scale = nnx.Param(jnp.ones(size)) if config.norm_affine else None
        self.bias = nnx.Param(jnp.zeros(size)) if config.norm_affine and config.norm_mean else None
        self.epsilon, self.offset, self.centred = config.epsilon, config.norm_offset, config.norm_mean

    def __call__(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        wide = x.astype(jnp.float32)
        if self.centred:
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.epsilon)
        if self.scale is not None:
            wide = wide * jnp.broadcast_to(self.offset + self.scale[...], wide.shape)
        if self.bias is not None:
            wide = wide + jnp.broadcast_to(self.bias[...], wide.shape)
        return wide.astype(x.dtype)


@pytree
class Memory(Replaceable):
    """Keys and values of the tokens so far, a pair a layer, of a fixed size; `filled` tells how much is written."""

    layers: tuple[Kept, ...]
    places: Places
    mask: Bool[Array, "batch size"]
    filled: Int[Array, ""]


class Layer(nnx.Module):
    """Self-attention and a perceptron, each on the normalised residual stream."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, rngs: nnx.Rngs, kernel: Kernel = "auto"):
        linear, size = _linear(dtype, rngs), config.head_dim
        self.query = linear(config.dim, config.heads * size, config.qkv_bias)
        self.key = linear(config.dim, config.kv_heads * size, config.qkv_bias)
        self.value = linear(config.dim, config.kv_heads * size, config.qkv_bias)
        self.out = linear(config.heads * size, config.dim, config.out_bias)
        self.gate = linear(config.dim, config.hidden, config.mlp_bias) if config.gated else None
        self.up = linear(config.dim, config.hidden, config.mlp_bias)
        self.down = linear(config.hidden, config.dim, config.mlp_bias)
        self.attention_norm, self.mlp_norm = Norm(config.dim, config), Norm(config.dim, config)
        self.attention_after = Norm(config.dim, config) if config.blocks_normed else None
        self.mlp_after = Norm(config.dim, config) if config.blocks_normed else None
        self.query_norm = Norm(size, config) if config.qk_norm else None
        self.key_norm = Norm(size, config) if config.qk_norm else None
        self.config = config
        self.kernel: Kernel = kernel

    def __call__(
        self,
        x: Float[Array, "batch length dim"],
        turns: Turns | None,
        seen: Bool[Array, "batch 1 length keys"],
        past: tuple[Kept, Int[Array, ""]] | None = None,
    ) -> tuple[Float[Array, "batch length dim"], Kept | None]:
        """The layer's output, and what `past` kept with the new keys and values written from where it ended."""
        added, kept = self.attend(self.attention_norm(x) if self.config.norm_first else x, turns, seen, past)
        if not self.config.norm_first:
            x = self.attention_norm(x + added)
            return self.mlp_norm(x + self.perceive(x)), kept
        x = x + (added if self.attention_after is None else self.attention_after(added))
        added = self.perceive(self.mlp_norm(x))
        return x + (added if self.mlp_after is None else self.mlp_after(added)), kept

    def attend(
        self,
        x: Float[Array, "batch length dim"],
        turns: Turns | None,
        seen: Bool[Array, "batch 1 length keys"],
        past: tuple[Kept, Int[Array, ""]] | None,
    ) -> tuple[Float[Array, "batch length dim"], Kept | None]:
        """Every token attends to the tokens that `seen` gives it, of this call or of the past."""
        split = (*x.shape[:2], -1, self.config.head_dim)
        query, key, value = (project(x).reshape(split) for project in (self.query, self.key, self.value))
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if turns is not None:
            query, key = rotate(query, *turns), rotate(key, *turns)
        kept = None
        if past is not None:
            (keys, values), filled = past
            kept = key, value = write(keys, key, filled), write(values, value, filled)
        # One token at a time is no work for cuDNN, and memory has columns behind those that are filled.
        kernel: Kernel = self.kernel if past is None else "xla"
        scale, cap = self.config.scale, self.config.score_cap
        mixed = attention(query, key, value, seen, scale=scale, cap=cap, causal=past is None, kernel=kernel)
        return self.out(mixed.reshape(*x.shape[:2], -1)), kept

    def perceive(self, x: Float[Array, "batch length dim"]) -> Float[Array, "batch length dim"]:
        """The perceptron."""
        activate = ACTIVATIONS[self.config.activation]
        return self.down(activate(self.up(x)) if self.gate is None else activate(self.gate(x)) * self.up(x))


class Decoder(nnx.Module):
    """Token ids to the hidden states behind the last norm, and from those to logits where it has a head."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        head: bool,
        dtype: Any,
        remat: str | None,
        rngs: nnx.Rngs,
        kernel: Kernel = "auto",
    ):
        linear, projected = _linear(dtype, rngs), config.word_dim != config.dim
        self.words = nnx.Embed(config.vocabulary, config.word_dim, rngs=rngs)
        self.project_in = linear(config.word_dim, config.dim, False) if projected else None
        table = config.positions + OPT_OFFSET
        self.positions = nnx.Embed(table, config.dim, rngs=rngs) if config.ropes[0] is None else None
        self.layers = nnx.List([Layer(config, dtype=dtype, rngs=rngs, kernel=kernel) for _ in range(config.layers)])
        self.norm = Norm(config.dim, config) if config.norm_last else None
        self.project_out = linear(config.dim, config.word_dim, False) if projected else None
        # The head is of float32 whatever the rest is: differences of logits are small beside logits.
        untied = head and not config.tied
        self.head = _linear(jnp.float32, rngs)(config.word_dim, config.vocabulary, False) if untied else None
        self.config, self.dtype, self.remat = config, dtype, remat

    def __call__(self, tokens: Tokens) -> Float[Array, "batch length dim"]:
        """Hidden states in the compute type; those of padding are meaningless."""
        mask = jnp.asarray(tokens.mask)
        places = locate(mask, jnp.asarray(tokens.segment))
        return self.through(jnp.asarray(tokens.ids), places, places, mask)[0]

    def remember(self, batch: int, size: int) -> Memory:
        """An empty memory for `size` tokens a row."""
        empty = jnp.zeros((batch, size, self.config.kv_heads, self.config.head_dim), self.dtype)
        nowhere = Places(*(jnp.zeros((batch, size), jnp.int32) for _ in Places._fields))
        layers = tuple((empty, empty) for _ in self.layers)
        return Memory(layers, nowhere, jnp.zeros((batch, size), bool), jnp.int32(0))

    def extend(
        self, ids: Int[Array, "batch length"], places: Places, mask: Bool[Array, "batch length"], memory: Memory
    ) -> tuple[Float[Array, "batch length dim"], Memory]:
        """Hidden states of tokens that follow those in memory, and the memory with them; it must have room."""
        known = Places(*(write(old, new, memory.filled) for old, new in zip(memory.places, places, strict=True)))
        real = write(memory.mask, mask, memory.filled)
        hidden, layers = self.through(ids, places, known, real, memory)
        return hidden, Memory(layers, known, real, memory.filled + ids.shape[1])

    def through(
        self,
        ids: Int[Array, "batch length"],
        places: Places,
        known: Places,
        mask: Bool[Array, "batch keys"],
        memory: Memory | None = None,
    ) -> tuple[Float[Array, "batch length dim"], tuple[Any, ...]]:
        """Hidden states of `ids` at `places`, which see the `known` places that `mask` marks; and what layers keep."""
        x = self.embed(ids, places)
        turns = {rope: rope and turn(rope, places.position, places.longest) for rope in set(self.config.ropes)}
        seen = {window: visible(places, known, mask, window) for window in set(self.config.windows)}
        step = Layer.__call__
        if self.remat is not None and memory is None:
            step = nnx.remat(step, policy=getattr(jax.checkpoint_policies, self.remat))
        kept = []
        for at, layer in enumerate(self.layers):
            past = None if memory is None else (memory.layers[at], memory.filled)
            x, new = step(layer, x, turns[self.config.ropes[at]], seen[self.config.windows[at]], past)
            kept.append(new)
        x = x if self.norm is None else self.norm(x)
        return x if self.project_out is None else self.project_out(x), tuple(kept)

    def embed(self, ids: Int[Array, "batch length"], places: Places) -> Float[Array, "batch length dim"]:
        """Embeddings in the compute type. An id outside the vocabulary, or a place beyond OPT's, gives NaN."""
        x = self.words(ids).astype(self.dtype) * jnp.asarray(self.config.embedding_scale, self.dtype)
        if self.project_in is not None:
            x = self.project_in(x)
        return x if self.positions is None else x + self.positions(places.position + OPT_OFFSET).astype(self.dtype)

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


def write(
    old: Shaped[Array, "batch size *rest"], new: Shaped[Array, "batch length *rest"], start: Int[Array, ""]
) -> Shaped[Array, "batch size *rest"]:
    """`old` with `new` in the columns from `start` on."""
    return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=1)


def _linear(dtype: Any, rngs: nnx.Rngs) -> Any:
    return lambda inputs, outputs, bias: nnx.Linear(
        inputs, outputs, use_bias=bias, dtype=dtype, precision=precision(dtype), rngs=rngs
    )
