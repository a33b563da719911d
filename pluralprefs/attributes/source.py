"""Where a run's attributes come from: predictors that read each response, or a store of what they said before.

A source gives `Item.attributes` and its mask by name (`AttributeSource`); `encoders.attributes` is the third kind,
columns of the data, and your own may be the fourth. `Predicted` scores any text, so a run that was trained on it can be
asked about new ones; `Stored` looks responses up by id, for data too large to encode twice, and masks those that it
lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import polars as pl
from jaxtyping import Bool, Float

from pluralprefs.attributes.fitting import embedder
from pluralprefs.attributes.predictors import AttributePredictors, Embed
from pluralprefs.attributes.store import AttributeStore
from pluralprefs.data.files import DataError
from pluralprefs.encoders.attributes import AttributeEncoder
from pluralprefs.encoders.tokens import Content, plain

PREDICTORS = "predictors.safetensors"
COLUMNS = "attributes.json"
Found = tuple[Float[np.ndarray, "items attributes width"], Bool[np.ndarray, "items attributes"]]


@runtime_checkable
class AttributeSource(Protocol):
    """What an experiment asks of a source of attributes."""

    @property
    def names(self) -> tuple[str, ...]:
        """The attributes, in the order of the columns."""
        ...

    def attributes(self, items: pl.DataFrame) -> Found:
        """Embeddings of the items of `data.batches.item_table`, calibrated scores first, and which are at hand."""
        ...

    def save(self, folder: Path, /) -> None:
        """Write into a run folder what `restore` needs; nothing where the experiment makes the source again."""
        ...


def checked(source: Any) -> AttributeSource:
    """Return the source; raise TypeError, naming what it lacks, where it is none."""
    lacking = [name for name in ("names", "attributes", "save") if not hasattr(source, name)]
    if lacking:
        raise TypeError(
            f"attributes: {type(source).__name__} has no {lacking[0]!r}; a source has names, attributes(items) and "
            "save(folder), see attributes.source.AttributeSource"
        )
    return source


@dataclass(frozen=True, eq=False)
class Predicted:
    """Attributes of responses by predictors; a response without text (null, or every content null) has none.

    `embed` encodes texts, where the predictors' encoder is not to be loaded at every call.
    """

    predictors: AttributePredictors
    embed: Embed | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The attributes, in the order of the columns."""
        return self.predictors.names

    def attributes(self, items: pl.DataFrame) -> Found:
        """Embeddings of the items' texts, calibrated scores first, and which are at hand."""
        said = items["text"].to_list()
        there = np.array([_has_text(content) for content in said], bool)
        texts = [plain(content) for content in said if _has_text(content)]
        values = np.zeros((items.height, len(self.names), self.predictors.width), np.float32)
        if texts:
            features = self.predictors.read(texts, self.embed or embedder(self.predictors.encoder))
            values[there] = self.predictors.embeddings(features)
        return values, np.broadcast_to(there[:, None], values.shape[:2]).copy()

    def save(self, folder: Path) -> None:
        """Write the predictors into a run folder, where `restore` finds them."""
        self.predictors.save(folder / PREDICTORS)


def _has_text(content: Content | None) -> bool:
    return isinstance(content, str) or any(message["content"] is not None for message in content or ())


@dataclass(frozen=True, eq=False)
class Stored:
    """Attributes of responses by item key ("prompt_id/item_id") from a store that stays where it is."""

    store: AttributeStore
    names: tuple[str, ...]

    def attributes(self, items: pl.DataFrame) -> Found:
        """Embeddings that the store has of the items, and which those are. DataError where it has none of them."""
        found = self.store.lookup(items["item_key"].to_list(), self.names)
        if items.height and not found.mask.any():
            raise DataError(
                f"{self.store.folder}: holds none of these {items.height} responses, the first of which is "
                f"{items['item_key'][0]!r}; embed them with `pluralprefs attributes embed`"
            )
        return found.embedding, found.mask

    def save(self, folder: Path) -> None:
        """Keep nothing: the experiment names the store, which may be larger than the run."""


def predicted(folder: str | Path, names: Sequence[str] | None = None) -> Predicted:
    """Load the predictors that `pluralprefs attributes train` left in a folder; some of them, by `names`."""
    found = AttributePredictors.load(Path(folder) / PREDICTORS)
    return Predicted(found if names is None else found.select(names))


def stored(folder: str | Path, names: Sequence[str] | None = None) -> Stored:
    """Open the store that `pluralprefs attributes embed` left in a folder (`<folder>/store`)."""
    store = AttributeStore.open(Path(folder) / "store")
    missing = sorted(set(names or ()) - set(store.names))
    if missing:
        raise DataError(f"{store.folder}: has no attribute {missing[0]!r}, but {', '.join(store.names)}")
    return Stored(store, store.names if names is None else tuple(names))


def restore(folder: Path) -> Predicted | AttributeEncoder | None:
    """Read the source that a run saved in its folder; None where it saved none."""
    if (folder / COLUMNS).is_file():
        return AttributeEncoder.restore(folder / COLUMNS)
    return predicted(folder) if (folder / PREDICTORS).is_file() else None
