"""Encoders: texts or attribute columns to the features that every family reads.

`load` takes a name and returns the encoder; `encode_items` runs it once over an item table, through the feature cache.
Importing this package costs neither JAX nor transformers; loading an encoder does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pluralprefs.encoders.attributes import AttributeEncoder
    from pluralprefs.encoders.bert import BertEncoder

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
) -> BertEncoder | AttributeEncoder:
    """Load an encoder: "minilm", a folder, a Hugging Face id (`owner/name`) or "attributes".

    `joint` embeds prompt and response together instead of the response alone; `prompt` adds an embedding of the prompt
    to every item. `pooling` ("mean" or "cls") and `normalise` default to what the model was published with,
    `max_length` (tokens) to 256 or the model's positions where it has fewer. The encoder of `attributes` comes back
    without columns: call its `fit`. Raises `weights.EncoderError`.
    """
    if str(name) == "attributes":
        from pluralprefs.encoders.attributes import AttributeEncoder

        return AttributeEncoder()
    from pluralprefs.encoders import weights

    folder = weights.find(name)
    from pluralprefs.encoders.bert import BertEncoder

    return BertEncoder.load(
        folder,
        pooling=pooling,
        normalise=normalise,
        joint=joint,
        prompt=prompt,
        max_length=max_length,
        dtype=dtype,
    )
