"""A decoder from a Hugging Face folder: the names of its parameters there, and where they are placed on a mesh."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from pluralprefs.encoders.attention import KERNELS, Kernel
from pluralprefs.encoders.checkpoint import Tensors, check_all_read, fill, stored_name
from pluralprefs.encoders.decoder import REMAT, Decoder
from pluralprefs.encoders.decoder_config import MODEL_TYPES, DecoderConfig
from pluralprefs.encoders.weights import WEIGHTS, EncoderError, weight_files
from pluralprefs.sharding import Rules

# A parameter's path here -> its name in a checkpoint; {} is the layer.
LLAMA_NAMES = {
    "words": "embed_tokens",
    "norm": "norm",
    "head": "lm_head",
    "layers.{}.query": "layers.{}.self_attn.q_proj",
    "layers.{}.key": "layers.{}.self_attn.k_proj",
    "layers.{}.value": "layers.{}.self_attn.v_proj",
    "layers.{}.out": "layers.{}.self_attn.o_proj",
    "layers.{}.query_norm": "layers.{}.self_attn.q_norm",
    "layers.{}.key_norm": "layers.{}.self_attn.k_norm",
    "layers.{}.gate": "layers.{}.mlp.gate_proj",
    "layers.{}.up": "layers.{}.mlp.up_proj",
    "layers.{}.down": "layers.{}.mlp.down_proj",
    "layers.{}.attention_norm": "layers.{}.input_layernorm",
    "layers.{}.mlp_norm": "layers.{}.post_attention_layernorm",
}
GEMMA_NAMES = LLAMA_NAMES | {
    "layers.{}.attention_after": "layers.{}.post_attention_layernorm",
    "layers.{}.mlp_norm": "layers.{}.pre_feedforward_layernorm",
    "layers.{}.mlp_after": "layers.{}.post_feedforward_layernorm",
}
OPT_NAMES = {
    "words": "embed_tokens",
    "positions": "embed_positions",
    "project_in": "project_in",
    "project_out": "project_out",
    "norm": "final_layer_norm",
    "head": "lm_head",
    "layers.{}.query": "layers.{}.self_attn.q_proj",
    "layers.{}.key": "layers.{}.self_attn.k_proj",
    "layers.{}.value": "layers.{}.self_attn.v_proj",
    "layers.{}.out": "layers.{}.self_attn.out_proj",
    "layers.{}.up": "layers.{}.fc1",
    "layers.{}.down": "layers.{}.fc2",
    "layers.{}.attention_norm": "layers.{}.self_attn_layer_norm",
    "layers.{}.mlp_norm": "layers.{}.final_layer_norm",
}
NAMES: dict[str, dict[str, str]] = dict.fromkeys(MODEL_TYPES, LLAMA_NAMES)
NAMES |= {"gemma2": GEMMA_NAMES, "gemma3_text": GEMMA_NAMES, "opt": OPT_NAMES}
# Heads and hidden units are split over `tensor`, the model's dimension over `fsdp`: a product that ends a block is
# summed over `tensor` once, and weights are gathered from `fsdp` layer by layer.
DECODER_RULES: Rules = (
    (r"(^|/)(query|key|value|gate|up)/kernel$", PartitionSpec("fsdp", "tensor")),
    (r"(^|/)(query|key|value|gate|up)/bias$", PartitionSpec("tensor")),
    (r"(^|/)(out|down)/kernel$", PartitionSpec("tensor", "fsdp")),
    (r"(^|/)words/embedding$", PartitionSpec("tensor", "fsdp")),
    (r"(^|/)head/kernel$", PartitionSpec("fsdp", "tensor")),
)

BACKBONE = re.compile(r"layers\.|embed_|project_|norm\.|final_layer_norm\.")
FILE_BYTES = 5 * 2**30


class Loaded(NamedTuple):
    """A decoder split into static data and parameters: `nnx.merge(graphdef, params)` is the module."""

    config: DecoderConfig
    graphdef: Any
    params: dict[str, Any]


def read_decoder(
    folder: Path,
    *,
    head: bool = False,
    dtype: Any = jnp.float32,
    remat: str | None = None,
    kernel: Kernel = "auto",
    mesh: Mesh | None = None,
    rules: Rules = DECODER_RULES,
) -> Loaded:
    """Read config.json and safetensors of a folder, onto `mesh` by `rules` where one is given.

    `head` reads the language model's head too, which reward models lack; `dtype` is that of the products; `remat` is
    one of `decoder.REMAT`, or None to keep everything for the gradient; `kernel` that of attention. Raises EncoderError
    for a model that is not computed exactly, and for weights that config.json does not announce.
    """
    config = DecoderConfig.read(folder)
    if remat not in (None, *REMAT):
        raise EncoderError(f"remat {remat!r} is not one of {', '.join(REMAT)}, or None")
    if kernel not in KERNELS:
        raise EncoderError(f"kernel {kernel!r} is not one of {', '.join(KERNELS)}")
    if kernel == "cudnn" and config.score_cap is not None:
        raise EncoderError(f"{folder}: scores of attention are softly capped, which cuDNN cannot; leave kernel out")
    make = partial(Decoder, config, head=head, dtype=dtype, remat=remat, kernel=kernel)
    model = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    shapes, names = nnx.to_pure_dict(state), NAMES[config.model_type]
    with Tensors(folder, _plain_name) as tensors:
        check_all_read(tensors, shapes, names, own=BACKBONE.pattern)
        return Loaded(config, graphdef, fill(tensors, shapes, names, mesh=mesh, rules=rules))


def _plain_name(name: str) -> str:
    """Drop the prefix of a task model's backbone."""
    return re.sub(r"^(model\.)?(decoder\.)?", "", name)


def _of_backbone(name: str) -> bool:
    """Whether a plain name is a weight of the decoder itself: no head, and no table that follows from the config."""
    return bool(BACKBONE.match(name)) and not name.endswith("rotary_emb.inv_freq")


def stored_tensors(folder: Path) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yield the name of each file of a checkpoint and its tensors of the backbone by plain name, in the stored type.

    A file that holds none is left out.
    """
    from safetensors import safe_open

    for path in weight_files(folder):
        with safe_open(path, framework="numpy") as file:
            found = {_plain_name(name): name for name in file.keys()}  # noqa: SIM118, not a mapping
            held = {plain: file.get_tensor(name) for plain, name in found.items() if _of_backbone(plain)}
        if held:
            yield path.name, held


def stored_parameters(
    params: Mapping[str, Any], kind: str, *, file_bytes: int = FILE_BYTES
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yield names of files and tensors by plain name, as `stored_tensors` does, of parameters of a `Decoder` here.

    `kind` is the model's type. No file but one of a single tensor is larger than `file_bytes`.
    """
    parts: list[list[tuple[str, Any, Any]]] = [[]]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = stored_name(path, NAMES[kind])
        if not _of_backbone(name):
            continue
        if parts[-1] and sum(each.nbytes for *_, each in parts[-1]) + leaf.nbytes > file_bytes:
            parts.append([])
        parts[-1].append((name, path, leaf))
    stem = WEIGHTS.removesuffix(".safetensors")
    for number, part in enumerate(parts, 1):
        file = WEIGHTS if len(parts) == 1 else f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors"
        yield (
            file,
            {
                name: np.asarray(leaf).T if str(path[-1].key) == "kernel" else np.asarray(leaf)
                for name, path, leaf in part
            },
        )
