"""Encoders: texts or attribute columns to the features that every family reads.

`load` takes a name and returns the encoder; `encode_items` runs it once over an item table, through the feature cache.
Importing this package costs neither JAX nor transformers; loading an encoder does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pluralprefs.encoders.attributes import AttributeEncoder
    from pluralprefs.encoders.bert import BertEncoder
    from pluralprefs.encoders.causal import CausalEncoder
    from pluralprefs.encoders.stacked import StackedEncoder

__all__ = ["load"]


def load(
    name: str | Path,
    *,
    pooling: str | None = None,
    normalise: bool | None = None,
    joint: bool = False,
    prompt: bool = False,
    max_length: int | None = None,
    dtype: Any = "float32",
    mesh: Mapping[str, int] | None = None,
    remat: str | None = None,
) -> BertEncoder | CausalEncoder | AttributeEncoder | StackedEncoder:
    """Load an encoder: "minilm", a folder, a Hugging Face id (`owner/name`) or "attributes".

    The model's type (config.json) decides whether it is read as a BERT or as a decoder, whose embedding of a text is
    the hidden state of the last token. `mesh` and `remat` are of decoders: the sizes of `sharding.make_mesh`, onto
    which the weights are read, each device its part, and what is computed again for the gradient (`decoder.REMAT`).
    What was fitted with a mesh is loaded on as many devices. On a mesh of several processes all read texts together;
    without, each has an encoder of its own.

    `joint` embeds prompt and response together instead of the response alone; `prompt` adds an embedding of the prompt
    to every item. `pooling` ("mean" or "cls"; of a decoder "last" or "mean") and `normalise` default to what the model
    was published with, `max_length` (tokens) to 256 or the model's positions where it has fewer. The encoder of
    `attributes` comes back without columns: call its `fit`. A folder of adapters (`encoders.stacked`) gives what was
    saved there, with no options. Raises `weights.EncoderError`.
    """
    if str(name) == "attributes":
        from pluralprefs.encoders.attributes import AttributeEncoder

        return AttributeEncoder()
    from pluralprefs.encoders import weights

    folder = weights.find(name)
    if (folder / weights.ADAPTERS).is_file():
        from pluralprefs.encoders.stacked import StackedEncoder

        if joint or prompt or mesh or remat or (pooling, normalise, max_length, dtype) != (None, None, None, "float32"):
            raise weights.EncoderError(f"{folder}: adapters are read as they were trained: give no other options")
        return StackedEncoder.load(folder, load)
    from pluralprefs.encoders import bert, causal

    path = folder / "config.json"
    kind = weights.read_json(path).get("model_type")
    if kind not in (*bert.NAMES, *causal.MODEL_TYPES):
        known = ", ".join((*bert.NAMES, *causal.MODEL_TYPES))
        raise weights.EncoderError(f"{path}: model_type {kind!r} is not one of {known}")
    options = {"pooling": pooling, "normalise": normalise, "joint": joint, "prompt": prompt, "max_length": max_length}
    if kind in causal.MODEL_TYPES:
        from pluralprefs.sharding import make_mesh

        place = make_mesh(**dict[str, Any](mesh)) if mesh else None
        return causal.CausalEncoder.load(folder, **options, dtype=dtype, mesh=place, remat=remat)
    if mesh or remat:
        raise weights.EncoderError(f"{path}: mesh and remat are of decoders, and {kind!r} is none: leave them out")
    return bert.BertEncoder.load(folder, **options, dtype=dtype)
