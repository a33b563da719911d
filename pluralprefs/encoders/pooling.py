"""How the hidden states of a text become one vector: mean, first or last token, then the L2 norm where asked.

What belongs to a model is written in its sentence-transformers files (modules.json, 1_Pooling/config.json); what those
files ask for and is not computed here is an error rather than an approximation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pluralprefs.encoders.weights import EncoderError, read_json

Pooling = Literal["mean", "cls", "last"]
MODULES = {"Transformer", "Pooling", "Normalize"}


def pool(
    hidden: Float[Array, "batch length dim"], mask: Bool[Array, "batch length"], pooling: Pooling
) -> Float[Array, "batch dim"]:
    """One vector a text: the mean of the real tokens (special ones included), the first or the last real token."""
    if pooling == "cls":
        first = jnp.argmax(mask, axis=-1)
        return jnp.take_along_axis(hidden, first[:, None, None], axis=1)[:, 0]
    if pooling == "last":
        last = mask.shape[-1] - 1 - jnp.argmax(mask[:, ::-1], axis=-1)
        return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    total = jnp.sum(jnp.where(mask[:, :, None], hidden, 0.0), axis=1)
    return total / jnp.maximum(jnp.sum(mask, axis=1), 1)[:, None]


def pool_spans(
    hidden: Float[Array, "batch length dim"],
    start: Int[Array, "batch spans"],
    size: Int[Array, "batch spans"],
    pooling: Pooling,
) -> Float[Array, "batch spans dim"]:
    """`pool` of several texts a row, each of `size` tokens from `start` on; the token at `start` of an empty one."""
    if pooling != "mean":
        at = start if pooling == "cls" else start + jnp.maximum(size, 1) - 1
        return jnp.take_along_axis(hidden, at[:, :, None], axis=1)
    column = jnp.arange(hidden.shape[1])[None, None]
    inside = (column >= start[:, :, None]) & (column < (start + size)[:, :, None])
    total = jnp.einsum("bsl,bld->bsd", inside.astype(hidden.dtype), hidden, precision=jax.lax.Precision.HIGHEST)
    return total / jnp.maximum(size, 1)[:, :, None]


def read_pooling(
    folder: Path, pooling: str | None, allowed: Sequence[Pooling] = ("mean", "cls")
) -> tuple[Pooling, bool]:
    """Pooling and normalisation that a folder's sentence-transformers files ask for; `pooling` overrides the first.

    The first of `allowed` is the default, and any other than those an EncoderError.
    """
    modules = folder / "modules.json"
    kinds = [module["type"].rpartition(".")[2] for module in read_json(modules, list)] if modules.is_file() else []
    unknown = sorted(set(kinds) - MODULES)
    if unknown:
        raise EncoderError(f"{modules}: module {unknown[0]} is not computed here; use a model without it")
    path = folder / "1_Pooling" / "config.json"
    if pooling is None and path.is_file():
        raw = read_json(path)
        modes = [key.removeprefix("pooling_mode_") for key, value in raw.items() if value is True and "mode" in key]
        named = "+".join(modes or [str(raw.get("pooling_mode"))]).replace("_tokens", "").replace("_token", "")
        pooling = named.replace("lasttoken", "last")
    for each in allowed:
        if each == (pooling or allowed[0]):
            return each, "Normalize" in kinds
    choices = " or ".join(map(repr, allowed))
    raise EncoderError(f"{folder}: pooling {pooling!r} is not computed here; give pooling={choices}")


def l2_normalise(embedding: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
    """Scale to length one; a zero vector (a row of padding) stays zero and has a finite gradient."""
    return embedding * jax.lax.rsqrt(jnp.sum(embedding**2, axis=-1, keepdims=True) + 1e-24)
