"""From ordered pairs to attribute predictors: choose the strength of L2, fit the heads, calibrate, find directions.

The strength is chosen for each attribute by accuracy on the validation slice of the training responses (scores are
calibrated afterwards, so their order alone matters); the heads are then fitted anew on all training pairs. Held-out
splits are used by `accuracy` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Float

from pluralprefs.attributes.folds import TRAIN, VALIDATION
from pluralprefs.attributes.heads import Heads, Rows, fit_heads
from pluralprefs.attributes.predictors import AttributePredictors

Embed = Callable[[Sequence[str]], np.ndarray]
STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # of L2, on features of mean square norm 1
UNCHECKED = 1e-3  # where no pair of an attribute is in the validation slice
WIDTH = 8  # of an attribute's embedding


def embedder(name: str, **options: object) -> Embed:
    """Return a function from texts to the features of an encoder by name; texts go through its feature cache.

    options: of `encoders.cache.encode_texts`, such as cache and progress. Raises `encoders.weights.EncoderError`.
    """
    from pluralprefs.encoders import load
    from pluralprefs.encoders.cache import encode_texts

    encoder = load(name)

    def embed(texts: Sequence[str]) -> np.ndarray:
        return encode_texts(encoder, texts, **options)  # pyright: ignore[reportArgumentType]

    return embed


class Data(NamedTuple):
    """Unique texts of the pairs, their centred and scaled features, and each attribute's pairs as rows of them."""

    names: tuple[str, ...]
    texts: list[str]
    features: Float[np.ndarray, "texts dim"]
    centre: Float[np.ndarray, " dim"]
    scale: float
    train: list[list[tuple[int, int]]]
    validation: list[list[tuple[int, int]]]


def fit_predictors(
    pairs: pl.DataFrame,
    embed: Embed,
    *,
    encoder: str = "minilm",
    names: Sequence[str] | None = None,
    hidden: tuple[int, ...] = (),
    strengths: Sequence[float] = STRENGTHS,
    width: int = WIDTH,
    seed: int = 0,
) -> AttributePredictors:
    """Fit predictors on the training and validation splits of `pairs.ordered_pairs`.

    embed: texts to the features of `encoder`, [texts, dim]. names: the attributes, in the order wanted; by default all
    of the pairs, sorted. hidden: () for linear heads, (units,) for a hidden layer. width: of an attribute's embedding.
    Raises ValueError for an attribute without training pairs.
    """
    data = _prepare(pairs, embed, names)
    options = {"hidden": tuple(hidden), "seed": seed}
    strength = _choose(data, strengths, options)
    everything = [train + held for train, held in zip(data.train, data.validation, strict=True)]
    heads = fit_heads(data.features, Rows.of(everything), strength, data.names, **options)
    levels = _levels(pairs, data)
    parts = [_finished(data.features, heads, a, everything[a], levels[a], width) for a in range(len(data.names))]
    slope, intercept, directions, offset = (np.stack(part).astype(np.float32) for part in zip(*parts, strict=True))
    return AttributePredictors(
        data.names, encoder, data.centre, data.scale, heads.weight, slope, intercept, directions, offset,
        heads.hidden, heads.bias,
    )  # fmt: skip


def _prepare(pairs: pl.DataFrame, embed: Embed, names: Sequence[str] | None) -> Data:
    chosen = tuple(names) if names is not None else tuple(sorted(pairs["attribute"].unique()))
    known = pairs.filter(pl.col("split").is_in([TRAIN, VALIDATION]) & pl.col("attribute").is_in(chosen))
    for name in chosen:
        if not (known["attribute"] == name).any():
            raise ValueError(f"attribute {name!r}: no training pair is kept; look at its row of the report")
    texts = sorted({*known["low_text"], *known["high_text"]})
    raw = np.asarray(embed(texts), np.float32)
    centre = raw.mean(0)
    scale = float(np.sqrt(((raw - centre) ** 2).sum(1).mean())) or 1.0
    place = {text: row for row, text in enumerate(texts)}

    def rows(split: str) -> list[list[tuple[int, int]]]:
        found: dict[str, list[tuple[int, int]]] = {name: [] for name in chosen}
        of_split = known.filter(pl.col("split") == split).sort("attribute", "response_id", "low", "high")
        for name, low, high in of_split.select("attribute", "low_text", "high_text").iter_rows():
            found[name].append((place[low], place[high]))
        return list(found.values())

    return Data(chosen, texts, (raw - centre) / np.float32(scale), centre, scale, rows(TRAIN), rows(VALIDATION))


def _choose(data: Data, strengths: Sequence[float], options: dict) -> Float[np.ndarray, " attributes"]:
    """The strength with the fewest validation pairs in the wrong order, of equal ones the greatest, by attribute."""
    if len(strengths) == 1 or not any(data.validation):
        return np.full(len(data.names), strengths[0] if len(strengths) == 1 else UNCHECKED)
    grid, errors = sorted(strengths, reverse=True), []
    for strength in grid:
        heads = fit_heads(data.features, Rows.of(data.train), np.full(len(data.names), strength), data.names, **options)
        errors.append([_wrong(data.features, heads, a, rows) for a, rows in enumerate(data.validation)])
    chosen = np.asarray(grid)[np.argmin(errors, axis=0)]
    checked = [bool(train and held) for train, held in zip(data.train, data.validation, strict=True)]
    return np.where(checked, chosen, UNCHECKED)


def _wrong(features: np.ndarray, heads: Heads, attribute: int, rows: list[tuple[int, int]]) -> float:
    """Share of one attribute's pairs in the wrong order."""
    if not rows:
        return 0.0
    low, high = np.asarray(rows).T
    reward = _phi(features, heads, attribute) @ heads.weight[attribute]
    return float((reward[low] >= reward[high]).mean())


def _phi(features: np.ndarray, heads: Heads, attribute: int) -> np.ndarray:
    return features if heads.hidden is None else np.tanh(features @ heads.hidden[attribute] + heads.bias[attribute])


def _levels(pairs: pl.DataFrame, data: Data) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each attribute's training rewrites: rows of texts, and their levels."""
    place = {text: row for row, text in enumerate(data.texts)}
    known = pairs.filter(pl.col("split").is_in([TRAIN, VALIDATION]))
    sides = [known.select("attribute", pl.col(f"{side}_text").alias("text"), level=side) for side in ("low", "high")]
    table = pl.concat(sides).unique().sort("attribute", "text", "level")
    found = []
    for name in data.names:
        mine = table.filter(pl.col("attribute") == name)
        found.append((np.array([place[text] for text in mine["text"]]), mine["level"].to_numpy()))
    return found


def _finished(
    features: np.ndarray, heads: Heads, attribute: int, rows: list[tuple[int, int]], levels: tuple, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Slope and intercept of the calibration; directions and offset of the projections."""
    phi, weight = _phi(features, heads, attribute), heads.weight[attribute]
    texts, level = levels
    reward, wanted = (phi[texts] @ weight).astype(np.float64), (level - 2) / 2
    spread = reward.var()
    slope = ((reward - reward.mean()) * (wanted - wanted.mean())).mean() / spread if spread > 0 else 0.0
    directions = _directions(phi, weight, rows, width - 1)
    projected = phi[texts] @ directions
    size = np.sqrt(projected.var(0))
    directions = directions / np.where(size > 1e-6, size, np.inf)  # a direction without spread says nothing
    offset = (phi[texts] @ directions).mean(0)
    return np.asarray(slope), np.asarray(wanted.mean() - slope * reward.mean()), directions, offset


def _directions(phi: np.ndarray, weight: np.ndarray, rows: list[tuple[int, int]], count: int) -> np.ndarray:
    """Leading principal directions of the pairs' differences, orthogonal to the head: [features, count]."""
    low, high = np.asarray(rows).T
    difference = (phi[high] - phi[low]).astype(np.float64)
    unit = weight / (np.linalg.norm(weight) or 1.0)
    difference = difference - np.outer(difference @ unit, unit)
    vectors = np.linalg.eigh(difference.T @ difference)[1][:, ::-1][:, :count]
    # a sign is arbitrary: the largest entry is positive
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])])
    return np.pad(vectors, ((0, 0), (0, count - vectors.shape[1])))
