"""Which tokens see which, and attention itself: causal within a token's own sequence, or to both sides within a row."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pluralprefs.encoders.weights import EncoderError

Kernel = Literal["auto", "cudnn", "xla"]
KERNELS: tuple[Kernel, ...] = ("auto", "cudnn", "xla")


class Places(NamedTuple):
    """Where every token stands: in which sequence of its row (`run`), where in it, and how long that is."""

    position: Int[Array, "batch length"]
    run: Int[Array, "batch length"]
    longest: Int[Array, "batch length"]


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


def surrounding(
    position: Int[Array, "batch length"], mask: Bool[Array, "batch length"], window: int | None
) -> Bool[Array, "batch 1 length length"]:
    """Which keys an encoder's query sees: the real tokens of its row, `window` of them at most on either side."""
    seen = jnp.broadcast_to(mask[:, None, :], (*mask.shape, mask.shape[1]))
    distance = jnp.abs(position[:, :, None] - position[:, None, :])
    return (seen if window is None else seen & (distance <= window))[:, None]


def attention(
    query: Float[Array, "batch length heads dim"],
    key: Float[Array, "batch keys kv_heads dim"],
    value: Float[Array, "batch keys kv_heads dim"],
    seen: Bool[Array, "batch 1 length keys"],
    *,
    scale: float,
    cap: float | None = None,
    causal: bool = False,
    kernel: Kernel = "auto",
) -> Float[Array, "batch length heads dim"]:
    """Softmax attention with shared keys and values. A query that sees nothing (padding) has a finite result.

    `jax.nn.dot_product_attention` computes it, save where scores are capped: it has no place for a function between
    the product and the mask. `kernel` is "cudnn" (flash attention: no scores are kept, only `seen`, the same for all
    heads), "xla", or "auto", the first where `why_not_cudnn` knows no reason. `causal` says that no query sees a later
    column, so that cuDNN skips those. Raises EncoderError where "cudnn" was asked for and cannot be had.
    """
    reason = why_not_cudnn(query, key, cap)
    if kernel == "cudnn" and reason:
        raise EncoderError(f"attention by cuDNN: {reason}; load the model with kernel='auto'")
    with jax.default_matmul_precision("highest" if query.dtype == jnp.float32 else "default"):
        if cap is None and not reason and kernel != "xla":
            return jax.nn.dot_product_attention(
                query, key, value, mask=seen, scale=scale, is_causal=causal, implementation="cudnn"
            )
        if cap is None:
            return jax.nn.dot_product_attention(query, key, value, mask=seen, scale=scale, implementation="xla")
        batch, length, heads, dim = query.shape
        grouped = query.reshape(batch, length, key.shape[2], -1, dim)
        scores = jnp.einsum("bqkgd,bskd->bkgqs", grouped, key, preferred_element_type=jnp.float32) * scale
        scores = jnp.where(seen[:, :, None], cap_softly(scores, cap), jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        return jnp.einsum("bkgqs,bskd->bqkgd", weights, value).reshape(batch, length, heads, dim)


def why_not_cudnn(
    query: Float[Array, "batch length heads dim"], key: Float[Array, "batch keys kv_heads dim"], cap: float | None
) -> str:
    """What keeps cuDNN's flash attention from these arrays on this machine; empty where nothing does."""
    dim, lengths = query.shape[-1], (query.shape[1], key.shape[1])
    capability = nvidia_capability()
    if cap is not None:
        return "scores are softly capped, for which it has no place"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 or float16, not {query.dtype}"
    if any(length % 2 for length in lengths):
        return f"lengths of {lengths[0]} and {lengths[1]} tokens, where a masked gradient wants even ones"
    if capability is None or capability < 8.0:
        return "there is no NVIDIA GPU of compute capability 8.0 or more"
    most = 256 if capability >= 9.0 else 128
    return "" if dim % 8 == 0 and dim <= most else f"heads of {dim} dimensions, where multiples of 8 to {most} fit"


def nvidia_capability() -> float | None:
    """The compute capability of the GPU that JAX computes on, such as 9.0; None where that is no NVIDIA GPU."""
    if jax.default_backend() != "gpu" or "cuda" not in jax.local_devices()[0].client.platform_version:
        return None
    return float(jax.local_devices()[0].compute_capability)


def cap_softly(x: Float[Array, "*batch"], cap: float | None) -> Float[Array, "*batch"]:
    """cap * tanh(x / cap): x itself where it is small, never beyond the cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)
