"""Attribute predictors: calibrated scores and embeddings of responses, from a shared frozen encoder.

`read` makes of texts the features that the heads take: the means over their sentences (`attributes.sentences`), or the
encoder's embedding of the whole text where the predictors have no `maps`.
The score of an attribute is its head's reward, mapped by a line fitted on the training rewrites so that a rewrite at
level l scores about (l - 2) / 2: -1 at the low pole, 1 at the high one. The embedding of an attribute is that score,
then the head's features projected on the leading directions in which the training pairs of this attribute differ, the
head's own direction taken out; each projection is centred, with root mean square 1 on the training rewrites.

Attributes are known by name: they are stored with their names, and `select` returns them in any order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from pluralprefs.attributes.sentences import Embed, read
from pluralprefs.data.files import DataError
from pluralprefs.encoders.features import Features
from pluralprefs.registry.files import load_arrays, save_arrays

FORMAT = "pluralprefs attribute predictors 2"
KERNEL = "kernel/"
BLOCK = 4096  # responses whose hidden features are held at once
PER_ATTRIBUTE = ("weight", "slope", "intercept", "directions", "offset", "hidden", "bias")


@dataclass(frozen=True, eq=False)
class AttributePredictors:
    """Heads, calibration and directions of attributes, by the order of `names`; `encoder` is the name to load."""

    names: tuple[str, ...]
    encoder: str
    centre: Float[np.ndarray, " dim"]
    scale: float
    weight: Float[np.ndarray, "attributes features"]
    slope: Float[np.ndarray, " attributes"]
    intercept: Float[np.ndarray, " attributes"]
    directions: Float[np.ndarray, "attributes features projections"]
    offset: Float[np.ndarray, "attributes projections"]
    hidden: Float[np.ndarray, "attributes dim features"] | None = None
    bias: Float[np.ndarray, "attributes features"] | None = None
    maps: Features | None = None

    def read(self, texts: Sequence[str], embed: Embed) -> Float[np.ndarray, "texts dim"]:
        """Features of texts, for `scores` and `embeddings`; `embed` gives the encoder's of a list of texts."""
        return np.asarray(embed(texts)) if self.maps is None else read(texts, embed, self.maps)

    @property
    def width(self) -> int:
        """Size of an attribute's embedding."""
        return 1 + self.directions.shape[2]

    def scores(self, embedding: Float[np.ndarray, "texts dim"]) -> Float[np.ndarray, "texts attributes"]:
        """Return calibrated scores: about -1 at an attribute's low pole, 0 in the middle, 1 at the high pole."""
        parts = [self._scores(block) for block in self._blocks(embedding)]
        return np.concatenate(parts) if parts else np.zeros((0, len(self.names)), np.float32)

    def embeddings(self, embedding: Float[np.ndarray, "texts dim"]) -> Float[np.ndarray, "texts attributes width"]:
        """Return each attribute's embedding: its calibrated score, then its projections (see the module)."""
        parts = []
        for block in self._blocks(embedding):
            projected = [self._features(block, a) @ self.directions[a] for a in range(len(self.names))]
            rest = np.stack(projected, axis=1) - self.offset
            parts.append(np.concatenate([self._scores(block)[:, :, None], rest], axis=2).astype(np.float32))
        return np.concatenate(parts) if parts else np.zeros((0, len(self.names), self.width), np.float32)

    def select(self, names: Iterable[str]) -> AttributePredictors:
        """Return the predictors of the named attributes, in the order named. ValueError names one that is missing."""
        wanted = tuple(names)
        for name in wanted:
            if name not in self.names:
                raise ValueError(f"attribute {name!r}: no predictor; there are {', '.join(self.names)}")
        rows = [self.names.index(name) for name in wanted]
        parts = {field: getattr(self, field) for field in PER_ATTRIBUTE}
        chosen: dict[str, Any] = {field: part if part is None else part[rows] for field, part in parts.items()}
        return AttributePredictors(wanted, self.encoder, self.centre, self.scale, **chosen, maps=self.maps)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: the arrays, and names and encoder as JSON in its metadata."""
        arrays = {field: getattr(self, field) for field in ("centre", *PER_ATTRIBUTE)}
        about = {"format": FORMAT, "names": list(self.names), "encoder": self.encoder, "scale": self.scale}
        if self.maps is not None:
            arrays |= {KERNEL + name: np.asarray(getattr(self.maps, name)) for name in ("anchors", "whiten", "width")}
        present = {field: array for field, array in arrays.items() if array is not None}
        save_arrays(path, present, {"predictors": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> AttributePredictors:
        """Read what `save` wrote. Raises DataError or RegistryError, naming the file, for anything else."""
        path = Path(path)
        if not path.is_file():
            raise DataError(f"{path}: no such file; `pluralprefs attributes train` writes it")
        arrays, metadata = load_arrays(path)
        about = json.loads(metadata.get("predictors", "{}"))
        if about.get("format") != FORMAT:
            raise DataError(f"{path}: holds no attribute predictors of this version; train them again")
        fields: dict[str, Any] = {name: array for name, array in arrays.items() if not name.startswith(KERNEL)}
        parts = {name.removeprefix(KERNEL): array for name, array in arrays.items() if name.startswith(KERNEL)}
        if parts:
            fields["maps"] = Features.restore(parts)
        return cls(names=tuple(about["names"]), encoder=about["encoder"], scale=about["scale"], **fields)

    def _blocks(self, embedding: np.ndarray) -> Iterable[np.ndarray]:
        if embedding.shape[1] != len(self.centre):
            raise ValueError(
                f"embedding of {embedding.shape[1]} columns: these predictors take {len(self.centre)}, as `read` makes "
                f"them with the encoder {self.encoder!r}"
            )
        for start in range(0, len(embedding), BLOCK):
            yield (np.asarray(embedding[start : start + BLOCK], np.float32) - self.centre) / np.float32(self.scale)

    def _scores(self, x: np.ndarray) -> np.ndarray:
        if self.hidden is None:
            rewards = x @ self.weight.T
        else:
            rewards = np.stack([self._features(x, a) @ self.weight[a] for a in range(len(self.names))], axis=1)
        return (rewards * self.slope + self.intercept).astype(np.float32)

    def _features(self, x: np.ndarray, attribute: int) -> np.ndarray:
        if self.hidden is None or self.bias is None:
            return x
        return np.tanh(x @ self.hidden[attribute] + self.bias[attribute])
