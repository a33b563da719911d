"""The sizes and variants of a decoder, read from a Hugging Face config.json; what is not computed exactly is refused.

One frozen dataclass describes every supported model type, so that `decoder.py` asks about variants and never about
names of models. Where config.json leaves an entry out, the default is that of the model's class in transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pluralprefs.encoders.layers import ACTIVATIONS
from pluralprefs.encoders.rope import Rope, read_rope
from pluralprefs.encoders.weights import EncoderError, read_json

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "opt")
# Entries that would change the computation and that nothing here computes.
REFUSED = ("quantization_config", "auto_map", "per_layer_config", "use_bidirectional_attention")
BIASED = ("llama", "qwen3", "gemma2", "gemma3_text")  # the types whose config can ask for biases of attention
HEAD_DIMS = {"qwen3": 128, "gemma2": 256, "gemma3_text": 256}
LOGIT_CAPS = {"gemma2": 30.0, "gemma3_text": None}
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder. `windows` and `ropes` have one entry a layer; a window of None is attention to the whole past, and
    without ropes positions are learned.

    `scale` multiplies products of query and key, `score_cap` and `logit_cap` bound those and the logits softly,
    `embedding_scale` multiplies word embeddings, `norm_offset` is added to a norm's weight. `blocks_normed` says that
    what a block adds to the residual stream is normalised too. `word_dim` is the size of word embeddings and of the
    hidden states that come out. The norms of OPT subtract the mean, may lack weights (`norm_affine`), and may stand
    behind the residual sum instead of before the block (`norm_first`); its perceptron has no gate.
    """

    model_type: str
    vocabulary: int
    positions: int
    dim: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    activation: str
    epsilon: float
    tied: bool
    scale: float
    windows: tuple[int | None, ...]
    ropes: tuple[Rope | None, ...]
    word_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    blocks_normed: bool = False
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    score_cap: float | None = None
    logit_cap: float | None = None
    gated: bool = True
    norm_mean: bool = False
    norm_affine: bool = True
    norm_first: bool = True
    norm_last: bool = True

    @classmethod
    def read(cls, folder: Path) -> DecoderConfig:
        """Read config.json. Raises EncoderError with one line for whatever is not computed exactly here."""
        path = folder / "config.json"
        raw = read_json(path)
        kind = raw.get("model_type")
        if kind not in MODEL_TYPES:
            raise EncoderError(f"{path}: model_type {kind!r} is not one of {', '.join(MODEL_TYPES)}")
        for name in REFUSED:
            if raw.get(name):
                raise EncoderError(f"{path}: {name} is not computed here; use a plain checkpoint of the same model")
        try:
            config = _read_opt(path, raw) if kind == "opt" else _read(path, raw)
        except KeyError as error:
            raise EncoderError(f"{path}: lacks {error}; fetch the model again") from error
        if config.activation not in ACTIVATIONS:
            raise EncoderError(f"{path}: activation {config.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        if config.heads % config.kv_heads:
            raise EncoderError(f"{path}: {config.kv_heads} key-value heads do not divide {config.heads} heads")
        if kind == "opt" and config.head_dim * config.heads != config.dim:
            raise EncoderError(f"{path}: {config.heads} heads do not divide {config.dim} dimensions")
        if kind != "opt" and config.head_dim % 2:
            raise EncoderError(f"{path}: heads of {config.head_dim} dimensions have no halves to rotate")
        return config


def _read(path: Path, raw: dict[str, Any]) -> DecoderConfig:
    """Read the model types whose positions are rotary."""
    kind, layers, heads = raw["model_type"], raw["num_hidden_layers"], raw["num_attention_heads"]
    gemma, dim = kind.startswith("gemma"), raw["hidden_size"]
    head_dim = raw.get("head_dim") or HEAD_DIMS.get(kind) or dim // heads
    bias = kind in BIASED and flag(path, raw, "attention_bias")
    kinds, window = _layer_types(path, raw), _window(raw)
    if window is None and SLIDING in kinds:
        raise EncoderError(f"{path}: layer_types name {SLIDING!r}, but there is no sliding_window")
    if kind == "gemma3_text" and raw.get("attn_logit_softcapping"):
        raise EncoderError(f"{path}: attn_logit_softcapping is an entry of gemma2, model_type 'gemma3_text' has none")
    return DecoderConfig(
        model_type=kind,
        vocabulary=raw["vocab_size"],
        positions=raw["max_position_embeddings"],
        dim=dim,
        word_dim=dim,
        hidden=raw["intermediate_size"],
        heads=heads,
        kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        layers=layers,
        activation=raw["hidden_activation" if gemma else "hidden_act"],
        epsilon=raw["rms_norm_eps"],
        tied=flag(path, raw, "tie_word_embeddings", gemma),
        scale=(raw["query_pre_attn_scalar"] if gemma else head_dim) ** -0.5,
        windows=tuple(window if each == SLIDING else None for each in kinds),
        ropes=_ropes(path, raw, kinds, head_dim),
        qkv_bias=bias or kind == "qwen2",
        out_bias=bias,
        mlp_bias=kind == "llama" and flag(path, raw, "mlp_bias"),
        qk_norm=kind in ("qwen3", "gemma3_text"),
        blocks_normed=gemma,
        norm_offset=1.0 if gemma else 0.0,
        embedding_scale=dim**0.5 if gemma else 1.0,
        score_cap=raw.get("attn_logit_softcapping", 50.0) if kind == "gemma2" else None,
        logit_cap=raw.get("final_logit_softcapping", LOGIT_CAPS[kind]) if gemma else None,
    )


def _read_opt(path: Path, raw: dict[str, Any]) -> DecoderConfig:
    layers, heads, dim = raw["num_hidden_layers"], raw["num_attention_heads"], raw["hidden_size"]
    bias = flag(path, raw, "enable_bias", True)
    first = flag(path, raw, "do_layer_norm_before", True)
    return DecoderConfig(
        model_type="opt",
        vocabulary=raw["vocab_size"],
        positions=raw["max_position_embeddings"],
        dim=dim,
        word_dim=raw.get("word_embed_proj_dim") or dim,
        hidden=raw["ffn_dim"],
        heads=heads,
        kv_heads=heads,
        head_dim=dim // heads,
        layers=layers,
        activation=raw["activation_function"],
        epsilon=1e-5,  # fixed in the reference, not configured
        tied=flag(path, raw, "tie_word_embeddings", True),
        scale=(dim // heads) ** -0.5,
        windows=(None,) * layers,
        ropes=(None,) * layers,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        gated=False,
        norm_mean=True,
        norm_affine=flag(path, raw, "layer_norm_elementwise_affine", True),
        norm_first=first,
        norm_last=first and not flag(path, raw, "_remove_final_layer_norm"),
    )


def _ropes(path: Path, raw: dict[str, Any], kinds: tuple[str, ...], head_dim: int) -> tuple[Rope, ...]:
    """One rope a layer; transformers 5 writes rope_parameters, earlier versions rope_scaling and rope_theta.

    Layers of Gemma 3 that slide have a base of their own and are not scaled.
    """
    if raw["model_type"] == "gemma3_text":
        given = raw.get("rope_parameters") or {}
        unknown = sorted(set(given) - {FULL, SLIDING})
        if unknown:
            raise EncoderError(f"{path}: rope_parameters has unknown {unknown[0]!r}; it has {FULL} and {SLIDING}")
        bases = {FULL: raw.get("rope_theta") or 1e6, SLIDING: raw.get("rope_local_base_freq") or 1e4}
        given = given | {FULL: (given.get(FULL) or {}) | (raw.get("rope_scaling") or {})}
        ropes = {
            each: read_rope(path, raw, given.get(each) or {}, theta=theta, dim=head_dim)
            for each, theta in bases.items()
        }
        return tuple(ropes[each] for each in kinds)
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    rope = read_rope(path, raw, given, theta=raw.get("rope_theta") or 10_000.0, dim=head_dim)
    return (rope,) * len(kinds)


def _window(raw: dict[str, Any]) -> int | None:
    """How many tokens a sliding layer sees, its own included."""
    if raw["model_type"] == "llama" or (raw["model_type"].startswith("qwen") and not raw.get("use_sliding_window")):
        return None
    return raw["sliding_window"]


def _layer_types(path: Path, raw: dict[str, Any]) -> tuple[Literal["full_attention", "sliding_attention"], ...]:
    """Which layers slide: as listed, else as the model's class does."""
    kind, layers, given = raw["model_type"], raw["num_hidden_layers"], raw.get("layer_types")
    if kind in ("llama", "mistral"):
        if given:
            raise EncoderError(f"{path}: layer_types is not an entry of model_type {kind!r}")
        return (FULL if _window(raw) is None else SLIDING,) * layers
    if given:
        unknown = sorted(set(given) - {FULL, SLIDING})
        if unknown or len(given) != layers:
            wrong = f"names {unknown[0]!r}" if unknown else f"has {len(given)} entries for {layers} layers"
            raise EncoderError(f"{path}: layer_types {wrong}; it lists {FULL!r} or {SLIDING!r}, one a layer")
        return tuple(given)
    if kind.startswith("gemma"):
        period = 2 if kind == "gemma2" else raw.get("sliding_window_pattern") or 6
        return tuple(SLIDING if (layer + 1) % period else FULL for layer in range(layers))
    first = raw.get("max_window_layers", 28)
    return tuple(SLIDING if _window(raw) is not None and layer >= first else FULL for layer in range(layers))


def flag(path: Path, raw: dict[str, Any], name: str, default: bool = False) -> bool:
    """An entry of a config that is true or false. Raises EncoderError for anything else."""
    value = raw.get(name, default)
    if not isinstance(value, bool):
        raise EncoderError(f"{path}: {name} is {value!r}, expected true or false")
    return value
