"""Embeddings and calibrated scores of responses on disk, found by response id and attribute name.

    index.json         names of the attributes, ids of the responses in the order of the rows, width, the array files
    embeddings-*.npy   [responses, attributes, width], bfloat16 as its sixteen bits, memory-mapped
    scores-*.npy       [responses, attributes], float32, memory-mapped

The arrays are written under names of their own and the index is moved into place last: a reader finds the old store or
the new one. bfloat16 keeps eight bits of precision, so an embedding is read back within 0.4 %; scores are exact, and
the first number of an embedding, which is the score, is read from them.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from pluralprefs.attributes.predictors import AttributePredictors
from pluralprefs.data.files import DataError
from pluralprefs.registry.files import write_json

FORMAT = "pluralprefs attribute store 1"
BLOCK = 4096  # responses written at a time


class Found(NamedTuple):
    """What a store holds of some responses and attributes; zeros where `mask` is False."""

    embedding: Float[np.ndarray, "responses attributes width"]
    score: Float[np.ndarray, "responses attributes"]
    mask: Bool[np.ndarray, "responses attributes"]


@dataclass(frozen=True)
class AttributeStore:
    """An opened store; arrays stay on disk until they are looked up."""

    folder: Path
    ids: tuple[str, ...]
    names: tuple[str, ...]
    encoder: str
    _embeddings: np.ndarray
    _scores: np.ndarray

    @classmethod
    def open(cls, folder: str | Path) -> AttributeStore:
        """Open what `write_store` wrote. Raises DataError, naming the file, for anything else."""
        folder = Path(folder)
        index = folder / "index.json"
        if not index.is_file():
            raise DataError(f"{index}: no such file; `pluralprefs attributes embed` writes it")
        try:
            about = json.loads(index.read_text("utf-8"))
            if about["format"] != FORMAT:
                raise ValueError(f"format {about['format']!r}")
            bits, scores = (
                np.load(folder / Path(about[part]).name, mmap_mode="r") for part in ("embeddings", "scores")
            )
            ids, names, width = about["ids"], about["names"], about["width"]
            if bits.shape != (len(ids), len(names), width) or scores.shape != bits.shape[:2]:
                raise ValueError(f"arrays of shape {bits.shape} and {scores.shape}")
        except (ValueError, LookupError, TypeError, OSError) as error:
            raise DataError(f"{index}: not a whole attribute store ({error}); embed again") from error
        return cls(folder, tuple(ids), tuple(names), about["encoder"], bits, scores)

    @property
    def width(self) -> int:
        """Size of an attribute's embedding."""
        return self._embeddings.shape[2]

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.ids)}

    def lookup(self, ids: Sequence[str], names: Sequence[str]) -> Found:
        """Return embeddings, scores and mask in the order asked; an unknown id or attribute is masked, not an error."""
        import ml_dtypes

        rows = np.array([self._rows.get(one, -1) for one in ids], np.int64)
        columns = np.array([self.names.index(name) if name in self.names else -1 for name in names], np.int64)
        mask = (rows >= 0)[:, None] & (columns >= 0)
        embedding = np.zeros((*mask.shape, self.width), np.float32)
        score = np.zeros(mask.shape, np.float32)
        at = np.nonzero(mask)
        place = rows[at[0]], columns[at[1]]
        embedding[at] = self._embeddings[place].view(ml_dtypes.bfloat16).astype(np.float32)
        score[at] = self._scores[place]
        embedding[..., 0] = score
        return Found(embedding, score, mask)


def write_store(
    folder: str | Path,
    ids: Sequence[str],
    embedding: Float[np.ndarray, "responses dim"],
    predictors: AttributePredictors,
) -> AttributeStore:
    """Write embeddings and scores of responses, given the encoder's features of each, and open the store.

    A store that is there is replaced. Raises ValueError for an id that is given twice.
    """
    folder = Path(folder)
    if len(set(ids)) < len(ids) or len(ids) != len(embedding):
        raise ValueError(f"{folder}: {len(ids)} ids, {len(set(ids))} of them different, for {len(embedding)} responses")
    folder.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(4)
    files = {"embeddings": f"embeddings-{mark}.npy", "scores": f"scores-{mark}.npy"}
    shape = len(ids), len(predictors.names), predictors.width
    try:
        _fill(folder / files["embeddings"], np.uint16, shape, _blocks(embedding, predictors))
        _fill(folder / files["scores"], np.float32, shape[:2], _blocks(embedding, predictors, scores=True))
        about = {"format": FORMAT, "encoder": predictors.encoder, "width": predictors.width, **files}
        write_json(folder / "index.json", {**about, "names": predictors.names, "ids": list(ids)})
    except BaseException:
        _remove(folder / name for name in files.values())
        raise
    old = (path for kind in files for path in folder.glob(f"{kind}-*.npy") if path.name not in files.values())
    _remove(old)
    return AttributeStore.open(folder)


def _blocks(embedding: np.ndarray, predictors: AttributePredictors, scores: bool = False) -> Iterator[np.ndarray]:
    import ml_dtypes

    for start in range(0, len(embedding), BLOCK):
        block = np.asarray(embedding[start : start + BLOCK], np.float32)
        if scores:
            yield predictors.scores(block)
        else:
            yield predictors.embeddings(block).astype(ml_dtypes.bfloat16).view(np.uint16)


def _fill(path: Path, dtype: Any, shape: tuple[int, ...], blocks: Iterable[np.ndarray]) -> None:
    """Write an array block by block, without holding it whole."""
    if 0 in shape:  # no bytes to map
        np.save(path, np.zeros(shape, dtype))
        return
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    start = 0
    for block in blocks:
        array[start : start + len(block)] = block
        start += len(block)
    array.flush()


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
