"""The BERT family in Flax NNX, from Hugging Face safetensors (arXiv 1810.04805, 1907.11692, 1911.02116, 1910.01108).

BERT, MiniLM, RoBERTa, XLM-R and DistilBERT are post-norm transformer encoders: with x the sum of word, position and
(in BERT) segment embeddings, normalised,

    x <- norm(x + attention(x))        x <- norm(x + down(act(up(x))))

for each layer, and then one vector a text: the mean over the real tokens or the first token, L2-normalised if asked.
NNX is used inside only. `BertEncoder` holds the parameters as a plain nested dict and the graph as static data, so
the same call serves the feature cache and a train step that differentiates through it.

Positions are counted along the mask, not along the array: padding may lie on either side. RoBERTa and XLM-R begin to
count behind the id of their padding token, and do not count one that a text names.

`BertEncoder` reads ModernBERT too, whose layers are in `modernbert.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from pluralprefs.encoders.checkpoint import Tensors, check_all_read, fill
from pluralprefs.encoders.layers import ACTIVATIONS, precision
from pluralprefs.encoders.modernbert import MODEL_TYPE, MODERNBERT_NAMES, ModernBert, ModernBertConfig
from pluralprefs.encoders.pooling import read_pooling
from pluralprefs.encoders.text import TextEncoder
from pluralprefs.encoders.tokens import Renderer
from pluralprefs.encoders.weights import EncoderError, digest, read_json, weight_files
from pluralprefs.pytrees import pytree
from pluralprefs.types import Tokens

# A parameter's path here -> its name in a checkpoint; {} is the layer. Kernels are stored transposed there.
BERT_NAMES = {
    "words": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "segments": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
    "layers.{}.query": "encoder.layer.{}.attention.self.query",
    "layers.{}.key": "encoder.layer.{}.attention.self.key",
    "layers.{}.value": "encoder.layer.{}.attention.self.value",
    "layers.{}.out": "encoder.layer.{}.attention.output.dense",
    "layers.{}.attention_norm": "encoder.layer.{}.attention.output.LayerNorm",
    "layers.{}.up": "encoder.layer.{}.intermediate.dense",
    "layers.{}.down": "encoder.layer.{}.output.dense",
    "layers.{}.norm": "encoder.layer.{}.output.LayerNorm",
}
DISTILBERT_NAMES = {
    "words": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "norm": "embeddings.LayerNorm",
    "layers.{}.query": "transformer.layer.{}.attention.q_lin",
    "layers.{}.key": "transformer.layer.{}.attention.k_lin",
    "layers.{}.value": "transformer.layer.{}.attention.v_lin",
    "layers.{}.out": "transformer.layer.{}.attention.out_lin",
    "layers.{}.attention_norm": "transformer.layer.{}.sa_layer_norm",
    "layers.{}.up": "transformer.layer.{}.ffn.lin1",
    "layers.{}.down": "transformer.layer.{}.ffn.lin2",
    "layers.{}.norm": "transformer.layer.{}.output_layer_norm",
}
NAMES = {"bert": BERT_NAMES, "roberta": BERT_NAMES, "xlm-roberta": BERT_NAMES, "distilbert": DISTILBERT_NAMES}
NAMES |= {MODEL_TYPE: MODERNBERT_NAMES}


@dataclass(frozen=True)
class BertConfig:
    """The sizes of a BERT-family model. `segments` is 0 where the model has no segment embedding, `first` the
    row of its table at which `positions` begin."""

    model_type: str
    vocabulary: int
    positions: int
    segments: int
    dim: int
    hidden: int
    heads: int
    layers: int
    activation: str
    epsilon: float
    first: int = 0

    @classmethod
    def read(cls, folder: Path) -> BertConfig:
        """Read config.json; whatever this file does not compute exactly is an EncoderError."""
        path = folder / "config.json"
        raw = read_json(path)
        kind = raw.get("model_type")
        if kind not in NAMES:
            raise EncoderError(f"{path}: model_type {kind!r} is not one of {sorted(NAMES)}; use a BERT-family model")
        if raw.get("pad_token_id", 1) is None and kind in ("roberta", "xlm-roberta"):
            raise EncoderError(
                f"{path}: pad_token_id is null, but positions are counted from it; write the model's own"
            )
        try:
            config = _read_distilbert(raw) if kind == "distilbert" else _read_bert(raw)
        except KeyError as error:
            raise EncoderError(f"{path}: lacks {error}; fetch the model again") from error
        if config.activation not in ACTIVATIONS:
            raise EncoderError(f"{path}: activation {config.activation!r} is not one of {sorted(ACTIVATIONS)}")
        if config.dim % config.heads:
            raise EncoderError(f"{path}: {config.heads} heads do not divide {config.dim} dimensions")
        if raw.get("position_embedding_type", "absolute") != "absolute" or raw.get("is_decoder"):
            raise EncoderError(f"{path}: only encoders with absolute positions are read")
        return config


class Layer(nnx.Module):
    """Self-attention and a two-layer perceptron, each followed by a residual sum and a norm."""

    def __init__(self, config: BertConfig, *, dtype: Any, rngs: nnx.Rngs):
        linear = _linear(dtype, rngs)
        self.query, self.key, self.value, self.out = (linear(config.dim, config.dim) for _ in range(4))
        self.up, self.down = linear(config.dim, config.hidden), linear(config.hidden, config.dim)
        self.attention_norm, self.norm = _norm(config, dtype, rngs), _norm(config, dtype, rngs)
        self.heads, self.activation = config.heads, config.activation

    def __call__(
        self, x: Float[Array, "batch length dim"], mask: Bool[Array, "batch length"]
    ) -> Float[Array, "batch length dim"]:
        x = self.attention_norm(x + self.out(self.attend(x, mask)))
        return self.norm(x + self.down(ACTIVATIONS[self.activation](self.up(x))))

    def attend(
        self, x: Float[Array, "batch length dim"], mask: Bool[Array, "batch length"]
    ) -> Float[Array, "batch length dim"]:
        """Every token attends to every real token."""
        split = (*x.shape[:2], self.heads, x.shape[2] // self.heads)
        query, key, value = (project(x).reshape(split) for project in (self.query, self.key, self.value))
        exact = precision(x.dtype)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, precision=exact) / np.sqrt(split[-1])
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores, axis=-1)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, value, precision=exact).reshape(x.shape)


class Bert(nnx.Module):
    """Token ids to the hidden states of the last layer."""

    def __init__(self, config: BertConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.words = nnx.Embed(config.vocabulary, config.dim, dtype=dtype, rngs=rngs)
        self.positions = nnx.Embed(config.first + config.positions, config.dim, dtype=dtype, rngs=rngs)
        self.segments = nnx.Embed(config.segments, config.dim, dtype=dtype, rngs=rngs) if config.segments else None
        self.norm, self.first = _norm(config, dtype, rngs), config.first
        self.layers = nnx.List([Layer(config, dtype=dtype, rngs=rngs) for _ in range(config.layers)])

    def __call__(self, tokens: Tokens) -> Float[Array, "batch length dim"]:
        mask = jnp.asarray(tokens.mask)
        ids = jnp.asarray(tokens.ids)
        # RoBERTa's padding token has the row before the first position, also where a text names it.
        counted = mask & (ids != self.first - 1) if self.first else mask
        position = jnp.where(counted, jnp.cumsum(counted, axis=-1) - 1, -1 if self.first else 0)
        x = self.words(ids) + self.positions(self.first + position)
        if self.segments is not None:
            x = x + self.segments(jnp.asarray(tokens.segment))
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, mask)
        return x


@pytree
class BertEncoder(TextEncoder):
    """A BERT-family model's embedding of a text.

    Attention is bidirectional, so a prompt seen beside its response would differ between the two items of a comparison:
    `prompt` embeds it alone.
    """

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        pooling: str | None = None,
        normalise: bool | None = None,
        joint: bool = False,
        prompt: bool = False,
        max_length: int | None = None,
        dtype: Any = jnp.float32,
    ) -> BertEncoder:
        """Read config.json, safetensors and tokenizer of a folder.

        `pooling` and `normalise` default to what the folder's sentence-transformers files say, else mean and no
        normalisation; `max_length` to 256 tokens or, where it has fewer, the model's positions. Raises EncoderError
        for a folder, model type, activation or position type it cannot read.
        """
        folder = Path(folder)
        config, model = _architecture(folder, dtype)
        default_pooling, default_normalise = read_pooling(folder, pooling)
        segments = 1 if config.segments == 1 and config.model_type != "bert" else 2
        renderer = Renderer.load(folder, max_length=max_length or min(256, config.positions), segments=segments)
        _check_sizes(folder, config, renderer, joint=joint)
        graphdef, shapes = nnx.split(model)
        with Tensors(folder, _modern_name) as tensors:
            wanted, names = nnx.to_pure_dict(shapes), NAMES[config.model_type]
            if config.model_type == MODEL_TYPE:
                check_all_read(tensors, wanted, names, own=r"embeddings\.|layers\.|final_norm\.")
            params = fill(tensors, wanted, names)
        return cls(
            params=params,
            graphdef=graphdef,
            renderer=renderer,
            pooling=default_pooling,
            normalise=default_normalise if normalise is None else normalise,
            joint=joint,
            prompt=prompt,
            dim=config.dim,
            dtype=jnp.dtype(dtype).name,
            weights=digest([folder / "config.json", *weight_files(folder)]),
            kind=MODEL_TYPE if config.model_type == MODEL_TYPE else "bert",
        )


def _architecture(folder: Path, dtype: Any) -> tuple[BertConfig | ModernBertConfig, nnx.Module]:
    """What config.json asks for, and the model without its numbers."""
    if read_json(folder / "config.json").get("model_type") == MODEL_TYPE:
        modern = ModernBertConfig.read(folder)
        return modern, nnx.eval_shape(lambda: ModernBert(modern, dtype=dtype, rngs=nnx.Rngs(0)))
    config = BertConfig.read(folder)
    return config, nnx.eval_shape(lambda: Bert(config, dtype=dtype, rngs=nnx.Rngs(0)))


def _read_bert(raw: dict[str, Any]) -> BertConfig:
    # RoBERTa's rows up to that of the padding token's id are not positions of tokens.
    first = 0 if raw["model_type"] == "bert" else raw.get("pad_token_id", 1) + 1
    return BertConfig(
        model_type=raw["model_type"],
        vocabulary=raw["vocab_size"],
        positions=raw["max_position_embeddings"] - first,
        first=first,
        segments=raw["type_vocab_size"],
        dim=raw["hidden_size"],
        hidden=raw["intermediate_size"],
        heads=raw["num_attention_heads"],
        layers=raw["num_hidden_layers"],
        activation=raw["hidden_act"],
        epsilon=raw["layer_norm_eps"],
    )


def _read_distilbert(raw: dict[str, Any]) -> BertConfig:
    return BertConfig(
        model_type="distilbert",
        vocabulary=raw["vocab_size"],
        positions=raw["max_position_embeddings"],
        segments=0,
        dim=raw["dim"],
        hidden=raw["hidden_dim"],
        heads=raw["n_heads"],
        layers=raw["n_layers"],
        activation=raw["activation"],
        epsilon=1e-12,  # fixed in the reference, not configured
    )


def _linear(dtype: Any, rngs: nnx.Rngs) -> Any:
    return lambda inputs, outputs: nnx.Linear(inputs, outputs, dtype=dtype, precision=precision(dtype), rngs=rngs)


def _norm(config: BertConfig, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The fast variance, E[x^2] - E[x]^2, loses the digits that parity with the reference needs.
    return nnx.LayerNorm(config.dim, epsilon=config.epsilon, use_fast_variance=False, dtype=dtype, rngs=rngs)


def _check_sizes(folder: Path, config: BertConfig | ModernBertConfig, renderer: Renderer, *, joint: bool) -> None:
    """JAX clamps an index out of range and would be silently wrong, so sizes are compared before anything runs."""
    if renderer.max_length > config.positions:
        raise EncoderError(
            f"{folder}: max_length {renderer.max_length} exceeds the model's {config.positions} positions"
        )
    if len(renderer.tokenizer) > config.vocabulary:
        raise EncoderError(
            f"{folder}: the tokenizer has {len(renderer.tokenizer)} tokens, the model {config.vocabulary}; "
            "they belong to different models"
        )
    if joint and config.segments == 1 and renderer.segments == 2:
        raise EncoderError(f"{folder}: joint=True needs two segments, type_vocab_size is 1")


def _modern_name(name: str) -> str:
    """Drop the prefix of a task model's backbone and the old names of a norm's parameters."""
    name = re.sub(r"^(bert|roberta|distilbert|model)\.", "", name)
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
