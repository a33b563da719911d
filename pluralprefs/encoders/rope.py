"""Rotary positions, of every kind that the decoders' configs name (arXiv 2104.09864; scalings below).

The two halves of a head are the coordinates of `dim / 2` planes; a token at position p is turned by p * frequency_i in
plane i, so that a product of query and key depends on their distance alone. The plain frequencies are
theta^(-2i / dim). Scalings for texts longer than those of pre-training change them:

    linear      frequency / factor
    dynamic     theta grows with the length of the sequence once that exceeds the configured positions
    yarn        short waves kept, long ones divided, a ramp between; cosine and sine scaled (arXiv 2309.00071)
    llama3      the same with another ramp, over wave lengths
    longrope    a factor a plane, one list for short and one for long sequences (arXiv 2402.13753)

The length that dynamic and longrope look at is that of a token's own sequence, never of its neighbours in the batch or
of the padding: a result does not depend on what else is computed beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pluralprefs.encoders.weights import EncoderError

# What a kind needs and may have beside rope_theta; any other entry is an error.
KINDS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "yarn": (
        {"factor"},
        {"original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
        | {"truncate"},
    ),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, {"original_max_position_embeddings"}),
    "longrope": (
        {"short_factor", "long_factor"},
        {"original_max_position_embeddings", "attention_factor", "factor"},
    ),
}


@dataclass(frozen=True)
class Rope:
    """Frequencies in radians a position, one a plane, and the scale of cosine and sine.

    `long_frequencies` (longrope) hold for sequences longer than `original`; `growth` (dynamic) is theta and factor.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0
    original: int = 0
    long_frequencies: tuple[float, ...] = ()
    growth: tuple[float, float] | None = None

    @property
    def needs_length(self) -> bool:
        """Whether frequencies depend on the length of the sequence."""
        return bool(self.long_frequencies) or self.growth is not None


def read_rope(path: Path, raw: dict[str, Any], given: dict[str, Any], *, theta: float, dim: int) -> Rope:
    """Read one rope from its entries `given` (rope_parameters, or the older rope_scaling) of the config `raw`.

    `theta` is the base where `given` has none, `dim` the size of a head. Raises EncoderError, with `path` in front, for
    a kind or an entry that is not computed here.
    """
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in KINDS:
        raise EncoderError(f"{path}: rope type {kind!r} is not one of {', '.join(KINDS)}")
    needed, optional = KINDS[kind]
    entries = {name for name, value in given.items() if value is not None} - {"rope_type", "type", "rope_theta"}
    if given.get("partial_rotary_factor", raw.get("partial_rotary_factor")) in (None, 1.0):
        entries -= {"partial_rotary_factor"}
    else:
        raise EncoderError(f"{path}: partial_rotary_factor is not computed here, only heads that turn as a whole")
    if needed - entries or entries - needed - optional:
        wrong, word = (needed - entries, "lacks") if needed - entries else (entries - needed - optional, "has unknown")
        raise EncoderError(f"{path}: rope type {kind!r} {word} {min(wrong)!r}; it has {', '.join(sorted(needed))}")
    positions = raw["max_position_embeddings"]
    theta = float(given.get("rope_theta") or theta)
    original = raw.get("original_max_position_embeddings") or given.get("original_max_position_embeddings") or positions
    plain = theta ** (-np.arange(0, dim, 2) / dim)
    if kind == "default":
        return Rope(tuple(plain))
    if kind == "linear":
        return Rope(tuple(plain / given["factor"]))
    if kind == "dynamic":
        return Rope(tuple(plain), original=positions, growth=(theta, float(given["factor"])))
    if kind == "yarn":
        return Rope(tuple(_yarn(plain, theta, original, given)), scale=_yarn_scale(given))
    if kind == "llama3":
        return Rope(tuple(_llama3(plain, original, given)))
    return _longrope(path, plain, original, positions, given)


def turn(
    rope: Rope, position: Int[Array, "batch length"], longest: Int[Array, "batch length"]
) -> tuple[Float[Array, "batch length planes"], Float[Array, "batch length planes"]]:
    """Cosine and sine of every token's angles, in float32. `longest` is the length of the token's sequence."""
    frequencies = jnp.asarray(rope.frequencies, jnp.float32)[None, None, :]
    if rope.long_frequencies:
        long = jnp.asarray(rope.long_frequencies, jnp.float32)[None, None, :]
        frequencies = jnp.where(longest[:, :, None] > rope.original, long, frequencies)
    if rope.growth is not None:
        theta, factor = rope.growth
        dim = 2 * len(rope.frequencies)
        grown = factor * jnp.maximum(longest, rope.original) / rope.original - (factor - 1)
        base = theta * grown ** (dim / (dim - 2))
        frequencies = base[:, :, None] ** -(jnp.arange(0, dim, 2) / dim)[None, None, :]
    angles = position[:, :, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * rope.scale, jnp.sin(angles) * rope.scale


def rotate(
    x: Float[Array, "batch length heads dim"],
    cosine: Float[Array, "batch length planes"],
    sine: Float[Array, "batch length planes"],
) -> Float[Array, "batch length heads dim"]:
    """Turn every head's planes; computed in float32, returned in the type of `x`."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cosine, sine = cosine[:, :, None, :], sine[:, :, None, :]
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1).astype(x.dtype)


def _yarn(plain: np.ndarray, theta: float, original: int, given: dict[str, Any]) -> np.ndarray:
    """Planes that turn more than beta_fast times within `original` tokens are kept, fewer than beta_slow divided."""
    dim = 2 * len(plain)

    def plane(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = plane(given.get("beta_fast") or 32), plane(given.get("beta_slow") or 1)
    if given.get("truncate", True) is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    divided = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    return plain / given["factor"] * divided + plain * (1 - divided)


def _yarn_scale(given: dict[str, Any]) -> float:
    """The factor on cosine and sine: given, else 1 + 0.1 log(factor), with weights where both mscales are given."""
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    factor = given["factor"]

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    whole, part = given.get("mscale"), given.get("mscale_all_dim")
    return scale(whole) / scale(part) if whole and part else scale(1.0)


def _llama3(plain: np.ndarray, original: int, given: dict[str, Any]) -> np.ndarray:
    """Waves longer than original / low_freq_factor are divided, shorter than original / high_freq_factor kept."""
    low, high = given["low_freq_factor"], given["high_freq_factor"]
    turns = original * plain / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return plain / given["factor"] * (1 - kept) + plain * kept


def _longrope(path: Path, plain: np.ndarray, original: int, positions: int, given: dict[str, Any]) -> Rope:
    factor = given.get("factor") or positions / original
    scale = given.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    for name in ("short_factor", "long_factor"):
        if len(given[name]) != len(plain):
            raise EncoderError(f"{path}: rope {name} has {len(given[name])} entries, a head has {len(plain)} planes")
    short, long = (tuple(plain / np.array(given[name], float)) for name in ("short_factor", "long_factor"))
    return Rope(short, scale=float(scale), original=original, long_frequencies=long)
