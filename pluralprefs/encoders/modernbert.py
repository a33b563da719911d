"""ModernBERT in Flax NNX (arXiv 2412.13663): BERT's place, with what decoders have learned since.

A pre-norm transformer encoder on normalised word embeddings x, with rotary positions (`rope.py`) and no others,

    x <- x + attention(norm(x))        x <- x + down(act(input) * gate),  [input, gate] = up(norm(x))

for each layer, then a last norm. The first layer's attention reads x as it is. Some layers see the whole text, the
others `window` tokens on either side, each kind with a rope of its own. Linear maps and norms have no biases unless
config.json asks for them. There are no segments: a pair is told apart by its special tokens alone.

`bert.BertEncoder` loads it as it loads the rest of the family.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from pluralprefs.encoders.attention import attention, locate, surrounding
from pluralprefs.encoders.decoder_config import FULL, SLIDING, flag
from pluralprefs.encoders.layers import ACTIVATIONS, precision
from pluralprefs.encoders.rope import Rope, read_rope, rotate, turn
from pluralprefs.encoders.weights import EncoderError, read_json
from pluralprefs.types import Tokens

MODEL_TYPE = "modernbert"
# A parameter's path here -> its name in a checkpoint; {} is the layer. `mixed` is query, key and value in one.
MODERNBERT_NAMES = {
    "words": "embeddings.tok_embeddings",
    "words_norm": "embeddings.norm",
    "layers.{}.attention_norm": "layers.{}.attn_norm",
    "layers.{}.mixed": "layers.{}.attn.Wqkv",
    "layers.{}.out": "layers.{}.attn.Wo",
    "layers.{}.mlp_norm": "layers.{}.mlp_norm",
    "layers.{}.up": "layers.{}.mlp.Wi",
    "layers.{}.down": "layers.{}.mlp.Wo",
    "norm": "final_norm",
}
THETAS = {FULL: ("global_rope_theta", 160_000.0), SLIDING: ("local_rope_theta", 10_000.0)}
Turns = tuple[Float[Array, "batch length planes"], Float[Array, "batch length planes"]]


@dataclass(frozen=True)
class ModernBertConfig:
    """The sizes of a ModernBERT. `windows` (None: the whole text) and `ropes` have one entry a layer."""

    vocabulary: int
    positions: int
    dim: int
    hidden: int
    heads: int
    layers: int
    activation: str
    epsilon: float
    windows: tuple[int | None, ...]
    ropes: tuple[Rope, ...]
    norm_bias: bool
    attention_bias: bool
    mlp_bias: bool
    model_type: str = MODEL_TYPE
    segments: int = 1

    @classmethod
    def read(cls, folder: Path) -> ModernBertConfig:
        """Read config.json; whatever this file does not compute exactly is an EncoderError."""
        path = folder / "config.json"
        raw = read_json(path)
        try:
            config = _read(path, raw)
        except KeyError as error:
            raise EncoderError(f"{path}: lacks {error}; fetch the model again") from error
        if config.activation not in ACTIVATIONS:
            raise EncoderError(f"{path}: activation {config.activation!r} is not one of {sorted(ACTIVATIONS)}")
        return config


class Layer(nnx.Module):
    """Self-attention and a gated perceptron, each on the normalised residual stream."""

    def __init__(self, config: ModernBertConfig, layer: int, *, dtype: Any, rngs: nnx.Rngs):
        attend, perceive = _linear(config.attention_bias, dtype, rngs), _linear(config.mlp_bias, dtype, rngs)
        self.attention_norm = _norm(config, dtype, rngs) if layer else None
        self.mixed, self.out = attend(config.dim, 3 * config.dim), attend(config.dim, config.dim)
        self.mlp_norm = _norm(config, dtype, rngs)
        self.up, self.down = perceive(config.dim, 2 * config.hidden), perceive(config.hidden, config.dim)
        self.heads, self.activation = config.heads, config.activation

    def __call__(
        self, x: Float[Array, "batch length dim"], turns: Turns, seen: Bool[Array, "batch 1 length length"]
    ) -> Float[Array, "batch length dim"]:
        x = x + self.attend(x if self.attention_norm is None else self.attention_norm(x), turns, seen)
        first, gate = jnp.split(self.up(self.mlp_norm(x)), 2, axis=-1)
        return x + self.down(ACTIVATIONS[self.activation](first) * gate)

    def attend(
        self, x: Float[Array, "batch length dim"], turns: Turns, seen: Bool[Array, "batch 1 length length"]
    ) -> Float[Array, "batch length dim"]:
        """Every token attends to the tokens that `seen` gives it."""
        mixed = self.mixed(x).reshape(*x.shape[:2], 3, self.heads, -1)
        query, key, value = (mixed[:, :, part] for part in range(3))
        query, key = rotate(query, *turns), rotate(key, *turns)
        return self.out(attention(query, key, value, seen, scale=query.shape[-1] ** -0.5).reshape(x.shape))


class ModernBert(nnx.Module):
    """Token ids to the hidden states behind the last norm."""

    def __init__(self, config: ModernBertConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.words = nnx.Embed(config.vocabulary, config.dim, dtype=dtype, rngs=rngs)
        self.words_norm, self.norm = _norm(config, dtype, rngs), _norm(config, dtype, rngs)
        self.layers = nnx.List([Layer(config, layer, dtype=dtype, rngs=rngs) for layer in range(config.layers)])
        self.windows, self.ropes = config.windows, config.ropes

    def __call__(self, tokens: Tokens) -> Float[Array, "batch length dim"]:
        mask, ids = jnp.asarray(tokens.mask), jnp.asarray(tokens.ids)
        position, _, longest = locate(mask, jnp.zeros_like(ids))
        turns = {rope: turn(rope, position, longest) for rope in set(self.ropes)}
        seen = {window: surrounding(position, mask, window) for window in set(self.windows)}
        x = self.words_norm(self.words(ids))
        for layer, window, rope in zip(self.layers, self.windows, self.ropes, strict=True):
            x = layer(x, turns[rope], seen[window])
        return self.norm(x)


def _read(path: Path, raw: dict[str, Any]) -> ModernBertConfig:
    dim, heads, kinds = raw["hidden_size"], raw["num_attention_heads"], _layer_types(path, raw)
    if dim % (2 * heads):
        raise EncoderError(f"{path}: {heads} heads do not divide {dim} dimensions into halves to rotate")
    if raw.get("head_dim", dim // heads) != dim // heads:
        raise EncoderError(f"{path}: head_dim is {raw['head_dim']}, but {heads} heads share {dim} dimensions")
    ropes = _ropes(path, raw, dim // heads)
    return ModernBertConfig(
        vocabulary=raw["vocab_size"],
        positions=raw["max_position_embeddings"],
        dim=dim,
        hidden=raw["intermediate_size"],
        heads=heads,
        layers=len(kinds),
        activation=raw["hidden_activation"],
        epsilon=raw["norm_eps"],
        windows=tuple(raw["local_attention"] // 2 if kind == SLIDING else None for kind in kinds),
        ropes=tuple(ropes[kind] for kind in kinds),
        norm_bias=flag(path, raw, "norm_bias"),
        attention_bias=flag(path, raw, "attention_bias"),
        mlp_bias=flag(path, raw, "mlp_bias"),
    )


def _layer_types(path: Path, raw: dict[str, Any]) -> tuple[str, ...]:
    """Which layers slide: as listed, else all but every third (or what global_attn_every_n_layers says)."""
    layers, given = raw["num_hidden_layers"], raw.get("layer_types")
    if given is None:
        period = raw.get("global_attn_every_n_layers", 3)
        return tuple(SLIDING if layer % period else FULL for layer in range(layers))
    if len(given) != layers or set(given) - {FULL, SLIDING}:
        raise EncoderError(f"{path}: layer_types must have {layers} entries, each {FULL!r} or {SLIDING!r}")
    return tuple(given)


def _ropes(path: Path, raw: dict[str, Any], head_dim: int) -> dict[str, Rope]:
    """One rope a kind of layer; transformers 5 writes rope_parameters, earlier versions one theta a kind."""
    given = raw.get("rope_parameters") or {}
    unknown = sorted(set(given) - {FULL, SLIDING})
    if unknown:
        raise EncoderError(f"{path}: rope_parameters has unknown {unknown[0]!r}; it has {FULL} and {SLIDING}")
    ropes = {}
    for kind, (name, usual) in THETAS.items():
        theta = raw.get(name, usual)
        if theta is None:
            raise EncoderError(f"{path}: {name} is null; write the base that the model was trained with")
        entries = (given.get(kind) or {}) | (raw.get("rope_scaling") or {})
        ropes[kind] = read_rope(path, raw, entries, theta=theta, dim=head_dim)
    return ropes


def _linear(bias: bool, dtype: Any, rngs: nnx.Rngs) -> Any:
    return lambda inputs, outputs: nnx.Linear(
        inputs, outputs, use_bias=bias, dtype=dtype, precision=precision(dtype), rngs=rngs
    )


def _norm(config: ModernBertConfig, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The fast variance, E[x^2] - E[x]^2, loses the digits that parity with the reference needs.
    return nnx.LayerNorm(
        config.dim, epsilon=config.epsilon, use_bias=config.norm_bias, use_fast_variance=False, dtype=dtype, rngs=rngs
    )
