"""An encoder that reads a response as attribute predictors do: whole, and sentence by sentence through a kernel.

    encoder=partial(SentenceEncoder.load, "minilm")    # of an Experiment; its anchors are fitted to training items

The embedding of a text as a whole mixes a phrase with all else that is said, and a linear map of it cannot say what a
head says that has met the phrase alone (LOG.md). Here the text branch of a family gets both: the encoder's embedding of
the whole response, then the mean of kernel features of its sentences (`attributes.sentences`). What attribute heads
compute of sentences a stand-in can then compute as well. It costs what reading for predictors costs: one more pass of
the encoder, over unique sentences.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl

from pluralprefs.attributes.sentences import kernel, read
from pluralprefs.encoders import load
from pluralprefs.encoders.cache import Cache, encode_texts
from pluralprefs.encoders.features import Features
from pluralprefs.encoders.tokens import plain
from pluralprefs.encoders.weights import EncoderError
from pluralprefs.registry.files import load_arrays, save_arrays
from pluralprefs.types import Item


@dataclass(frozen=True, eq=False)
class SentenceEncoder:
    """A text encoder of responses, and the kernel over their sentences: None until `fit` or `restore` gives it."""

    base: Any
    anchors: int = 512
    width: float = 0.4
    maps: Features | None = None
    joint: ClassVar[bool] = False
    prompt: ClassVar[bool] = False

    @classmethod
    def load(cls, name: str | Path, *, anchors: int = 512, width: float = 0.4) -> SentenceEncoder:
        """Load the text encoder by name (`encoders.load`); `width` of the kernel in median distances of sentences."""
        return cls(load(name), anchors, width)

    @property
    def dim(self) -> int:
        """Number of features of an item: twice the encoder's, the anchors and the length."""
        return 2 * self.base.dim + (0 if self.maps is None else len(np.asarray(self.maps.anchors))) + 1

    @property
    def kind(self) -> str:
        """What is read, for a reader."""
        return f"{self.base.kind}, whole and by sentence"

    @property
    def pooling(self) -> str:
        """How the text encoder makes one vector of a text."""
        return self.base.pooling

    @property
    def renderer(self) -> Any:
        """How the text encoder makes tokens of a text."""
        return self.base.renderer

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides the features, beside the training items: an entry of run.json."""
        return {**self.base.identity, "sentences": True, "anchors": self.anchors, "width": self.width}

    def fit(self, items: pl.DataFrame, train_item_keys: Iterable[Any]) -> SentenceEncoder:
        """Choose the anchors among the sentences of the training items."""
        known = items.filter(pl.col("item_key").is_in(list(train_item_keys)))
        maps = kernel(_texts(known), partial(encode_texts, self.base), self.width, self.anchors)
        return replace(self, maps=maps)

    def __call__(self, items: pl.DataFrame, *, cache: Cache = None, progress: Any = True) -> Item:
        """Item with embedding [items, dim], float32 numpy. Raises EncoderError before `fit`."""
        if self.maps is None:
            raise EncoderError("the sentence encoder has no anchors yet; call fit(items, train_item_keys)")
        embed, texts = partial(encode_texts, self.base, cache=cache, progress=progress), _texts(items)
        return Item(embedding=np.concatenate([embed(texts), read(texts, embed, self.maps)], axis=1))  # pyright: ignore[reportArgumentType]

    def save(self, path: Path) -> None:
        """Write the kernel as one safetensors file; the text encoder is loaded again by name."""
        found = {field.name: getattr(self.maps, field.name) for field in fields(Features)}
        save_arrays(path, {name: np.asarray(leaf) for name, leaf in found.items() if leaf is not None})

    def restore(self, path: Path) -> SentenceEncoder:
        """The encoder with the kernel that `save` wrote."""
        return replace(self, maps=Features.restore(load_arrays(path)[0]))


def _texts(items: pl.DataFrame) -> list[str]:
    return ["" if text is None else plain(text) for text in items["text"].to_list()]
