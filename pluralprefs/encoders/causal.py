"""A decoder as an encoder: a text becomes the hidden state of its last real token, as reward models read it.

The last token is found by the mask, never by the id of the padding token, which may equal that of the end of a text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
from jax.sharding import Mesh

from pluralprefs.encoders.attention import Kernel
from pluralprefs.encoders.decoder_config import MODEL_TYPES, DecoderConfig
from pluralprefs.encoders.decoder_weights import DECODER_RULES, read_decoder
from pluralprefs.encoders.pooling import read_pooling
from pluralprefs.encoders.text import TextEncoder
from pluralprefs.encoders.tokens import Renderer
from pluralprefs.encoders.weights import EncoderError, digest, weight_files
from pluralprefs.pytrees import pytree
from pluralprefs.sharding import Rules

__all__ = ["MODEL_TYPES", "CausalEncoder"]


@pytree
class CausalEncoder(TextEncoder):
    """A decoder's embedding of a text: the hidden state of its last real token, or the mean over its tokens.

    Called with Tokens it takes one text a row; several are read by `spans`.
    """

    packs: ClassVar[bool] = True

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
        head: bool = False,
        remat: str | None = None,
        kernel: Kernel = "auto",
        mesh: Mesh | None = None,
        rules: Rules = DECODER_RULES,
    ) -> CausalEncoder:
        """Read config.json, safetensors and tokenizer of a folder, onto `mesh` by `rules` where one is given.

        `pooling` ("last" or "mean") and `normalise` default to what the folder's sentence-transformers files say, else
        the last token and no normalisation; `max_length` to 256 tokens or, where it has fewer, the model's positions.
        `head` reads the language model's head too, for `generate`; `remat` is one of `decoder.REMAT`, `kernel` that of
        attention: "cudnn", "xla", or "auto" for cuDNN's where it can be had. Raises EncoderError for a folder or a
        model that it cannot read exactly.
        """
        folder = Path(folder)
        config = DecoderConfig.read(folder)
        found, normalised = read_pooling(folder, pooling, ("last", "mean"))
        length = max_length or min(256, config.positions)
        if length > config.positions:
            raise EncoderError(f"{folder}: max_length {length} exceeds the model's {config.positions} positions")
        renderer = Renderer.load(folder, max_length=length, segments=1, joined=True, vocabulary=config.vocabulary)
        loaded = read_decoder(folder, head=head, dtype=dtype, remat=remat, kernel=kernel, mesh=mesh, rules=rules)
        return cls(
            params=loaded.params,
            graphdef=loaded.graphdef,
            renderer=renderer,
            pooling=found,
            normalise=normalised if normalise is None else normalise,
            joint=joint,
            prompt=prompt,
            dim=config.word_dim,
            dtype=jnp.dtype(dtype).name,
            weights=digest([folder / "config.json", *weight_files(folder)]),
            kind=config.model_type,
        )
