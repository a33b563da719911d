"""How much memory a decoder takes in training, computed from the shapes of its parameters; nothing here is measured.

Parameters are float32 whatever computes with them (`decoder.py`): the weights are the masters. What is trained has a
gradient and Adam's two moments beside it, of float32 too. With `remat="nothing_saveable"` the gradient keeps the input
of every layer, and one layer at a time is computed again, with all that is inside it. Attention is cuDNN's: no scores
are kept. Programs, buffers of collectives, fragments and the features of a head come on top.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pluralprefs.encoders.decoder import Decoder
from pluralprefs.encoders.decoder_config import DecoderConfig
from pluralprefs.encoders.rope import Rope

Mode = Literal["frozen", "lora", "full"]
MODES: tuple[Mode, ...] = ("frozen", "lora", "full")
FLOAT32 = 4  # bytes


class Memory(NamedTuple):
    """Bytes by what they are for."""

    weights: int
    gradients: int
    moments: int
    activations: int


def llama(dim: int, hidden: int, layers: int, heads: int, head_dim: int, *, vocabulary: int = 128_256) -> DecoderConfig:
    """The shape of a Llama 3 of these sizes, eight key-value heads, without a head: what a reward model stands on."""
    planes = tuple(float(500_000.0 ** (-2 * plane / head_dim)) for plane in range(head_dim // 2))
    return DecoderConfig(
        model_type="llama",
        vocabulary=vocabulary,
        positions=131_072,
        dim=dim,
        hidden=hidden,
        heads=heads,
        kv_heads=8,
        head_dim=head_dim,
        layers=layers,
        activation="silu",
        epsilon=1e-5,
        tied=True,
        scale=head_dim**-0.5,
        windows=(None,) * layers,
        ropes=(Rope(planes),) * layers,
        word_dim=dim,
    )


SHAPES = {
    "1B": llama(2048, 8192, 16, 32, 64),
    "3B": llama(3072, 8192, 28, 24, 128),
    "8B": llama(4096, 14_336, 32, 32, 128),
}


def parameters(config: DecoderConfig) -> int:
    """The number of parameters of a decoder without its head."""
    shapes = dict(_shapes(config))
    layer, rest = (
        sum(math.prod(shape.shape) for shape in jax.tree.leaves(part)) for part in (shapes.pop("layers"), shapes)
    )
    return config.layers * layer + rest


def lora_parameters(config: DecoderConfig, rank: int) -> int:
    """The number of parameters of adapters on every linear map of every layer: rank x (inputs + outputs) each."""
    leaves = jax.tree_util.tree_leaves_with_path(_shapes(config)["layers"])
    kernels = [leaf for path, leaf in leaves if path[-1].key == "kernel"]
    return config.layers * rank * sum(sum(kernel.shape) for kernel in kernels)


def training_memory(
    config: DecoderConfig, mode: Mode, *, tokens: int, rank: int = 16, activation_bytes: int = 2
) -> Memory:
    """Bytes for one step over `tokens` tokens (padding included), of `rank` adapters in "lora".

    A frozen decoder keeps nothing for a gradient. `activation_bytes` is 2 for bfloat16.
    """
    whole = parameters(config)
    trained = {"frozen": 0, "lora": lora_parameters(config, rank), "full": whole}[mode]
    heads = (2 * config.heads + 2 * config.kv_heads) * config.head_dim  # query and what it brings, key, value
    inside = tokens * (4 * config.dim + heads + 3 * config.hidden) * activation_bytes
    kept = 0 if mode == "frozen" else config.layers * tokens * config.dim * activation_bytes
    extra = trained if mode == "lora" else 0
    return Memory(
        weights=FLOAT32 * (whole + extra),
        gradients=FLOAT32 * trained,
        moments=2 * FLOAT32 * trained,
        activations=kept + inside,
    )


def table(tokens: int = 16_384) -> str:
    """The Markdown table of docs/scaling.md, in GB (1e9 bytes)."""
    lines = [
        "| model | parameters | mode | weights | gradients | Adam | activations | total |",
        "|---|---|---|" + "---|" * 5,
    ]
    for name, config in SHAPES.items():
        for mode in MODES:
            memory = training_memory(config, mode, tokens=tokens)
            cells = " | ".join(f"{value / 1e9:.1f}" for value in (*memory, sum(memory)))
            lines.append(f"| {name} | {parameters(config) / 1e9:.2f} B | {mode} | {cells} |")
    return "\n".join(lines)


@cache
def _shapes(config: DecoderConfig) -> dict[str, Any]:
    """The shapes of a decoder with one layer: all layers have the same."""
    config = replace(config, layers=1, windows=config.windows[:1], ropes=config.ropes[:1])
    model = nnx.eval_shape(lambda: Decoder(config, head=False, dtype=jnp.bfloat16, remat=None, rngs=nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.split(model)[1])
