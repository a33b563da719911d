"""From ordered pairs to attribute predictors: choose kernel and strength of L2, fit heads, calibrate, find directions.

Beside the ordered pairs of one response's rewrites a head learns from two kinds of pairs that counterfactuals imply:

across   rewrites of different responses: the higher level is higher whatever was rewritten; equal levels are equal
at rest  rewrites of a response at levels of OTHER attributes: they were asked to leave this one alone, so they stand
         equal on it; where responses are neutral themselves, those of different responses do too

Without them a head orders the rewrites of one response, yet answers to what other attributes say and to the topic: on
texts that express several attributes at once its scores hardly followed the levels (LOG.md).

Kernel width and the strength of L2 (of each attribute) are those whose scores follow the levels best over all rewrites
of the validation slice, which have phrases of their own where the teacher has such; the heads are then fitted anew on
all training pairs. Held-out splits are used by `accuracy` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import polars as pl
from jaxtyping import Float

from pluralprefs.attributes.folds import TRAIN, VALIDATION
from pluralprefs.attributes.heads import Heads, Rows, fit_heads
from pluralprefs.attributes.predictors import AttributePredictors
from pluralprefs.attributes.sentences import Embed, kernel, read
from pluralprefs.data.ids import stable_hash
from pluralprefs.encoders.features import Features

STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3)  # of L2, on features of mean square norm 1
UNCHECKED = 1e-3  # where no pair of an attribute is in the validation slice
WIDTHS = (0.25, 0.4, 0.6)  # of the kernel over sentences, in median distances
ACROSS, AT_REST = 2000, 3000  # pairs of these kinds an attribute
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
    """Unique texts of the pairs, their centred and scaled features, and each attribute's pairs as rows of them.

    `levels` are each attribute's rewrites and their levels, `checks` those of the validation slice.
    """

    names: tuple[str, ...]
    features: Float[np.ndarray, "texts dim"]
    centre: Float[np.ndarray, " dim"]
    scale: float
    train: Pairs
    validation: Pairs
    everything: Pairs
    levels: list[tuple[np.ndarray, np.ndarray]]
    checks: list[tuple[np.ndarray, np.ndarray]]
    neutral: bool


class Pairs(NamedTuple):
    """Each attribute's pairs (low, high): of one response, across responses, and of texts that stand equal."""

    ordered: list[list[tuple[int, int]]]
    across: list[list[tuple[int, int]]]
    equal: list[list[tuple[int, int]]]

    def rows(self) -> Rows:
        return Rows.of([a + b for a, b in zip(self.ordered, self.across, strict=True)], self.equal)


def fit_predictors(
    pairs: pl.DataFrame,
    embed: Embed,
    *,
    encoder: str = "minilm",
    names: Sequence[str] | None = None,
    hidden: tuple[int, ...] = (),
    strengths: Sequence[float] = STRENGTHS,
    widths: Sequence[float] = WIDTHS,
    width: int = WIDTH,
    neutral: bool = False,
    seed: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> AttributePredictors:
    """Fit predictors on the training and validation splits of `pairs.ordered_pairs`.

    embed: texts to the features of `encoder`, [texts, dim]. names: the attributes, in the order wanted; by default all
    of the pairs, sorted. hidden: () for linear heads, (units,) for a hidden layer. widths: of the kernel over sentences
    to choose from; () reads the embedding of the whole text. width: of an attribute's embedding. neutral: whether the
    responses themselves are in the middle of every attribute, as the lexicon's answers are: then rewrites at rest are
    equal whatever was rewritten, and not of one response alone. report(done, total): told of
    each fit of all heads. Raises ValueError for an attribute without training pairs.
    """
    options = {"hidden": tuple(hidden), "seed": seed}
    grid = [_prepare(pairs, embed, names, one, neutral, seed) for one in (widths or (None,))]
    total, done = len(grid) * len(strengths) + 1, count(1)
    tell = lambda: report(next(done), total)  # noqa: E731
    chosen = [_choose(data, strengths, options, tell, always=len(grid) > 1) for data, _ in grid]
    best = int(np.argmin([nats for _, nats in chosen]))
    (data, maps), strength = grid[best], chosen[best][0]
    heads = fit_heads(data.features, data.everything.rows(), strength, data.names, **options)
    report(total, total)
    parts = [
        _finished(data.features, heads, a, data.everything.ordered[a], data.levels[a], width)
        for a in range(len(data.names))
    ]
    slope, intercept, directions, offset = (np.stack(part).astype(np.float32) for part in zip(*parts, strict=True))
    return AttributePredictors(
        data.names, encoder, data.centre, data.scale, heads.weight, slope, intercept, directions, offset,
        heads.hidden, heads.bias, maps,
    )  # fmt: skip


def _prepare(
    pairs: pl.DataFrame, embed: Embed, names: Sequence[str] | None, width: float | None, neutral: bool, seed: int
) -> tuple[Data, Features | None]:
    chosen = tuple(names) if names is not None else tuple(sorted(pairs["attribute"].unique()))
    known = pairs.filter(pl.col("split").is_in([TRAIN, VALIDATION]) & pl.col("attribute").is_in(chosen))
    for name in chosen:
        if not (known["attribute"] == name).any():
            raise ValueError(f"attribute {name!r}: no training pair is kept; look at its row of the report")
    texts = sorted({*known["low_text"], *known["high_text"]})
    maps = None if width is None else kernel(texts, embed, width)
    raw = np.asarray(embed(texts), np.float32) if maps is None else read(texts, embed, maps)
    centre = raw.mean(0)
    scale = float(np.sqrt(((raw - centre) ** 2).sum(1).mean())) or 1.0
    place = {text: row for row, text in enumerate(texts)}
    train, validation, everything = (
        _pairs(known.filter(pl.col("split").is_in(part)), chosen, place, neutral, seed)
        for part in ([TRAIN], [VALIDATION], [TRAIN, VALIDATION])
    )
    features, levels = (raw - centre) / np.float32(scale), _levels(known, chosen, place)
    checks = _levels(known.filter(pl.col("split") == VALIDATION), chosen, place)
    return Data(chosen, features, centre, scale, train, validation, everything, levels, checks, neutral), maps


def _pairs(known: pl.DataFrame, names: tuple[str, ...], place: dict[str, int], neutral: bool, seed: int) -> Pairs:
    """Pairs of all kinds; those across and at rest are drawn for each attribute from its name."""
    ordered: list[list[tuple[int, int]]] = []
    across: list[list[tuple[int, int]]] = []
    equal: list[list[tuple[int, int]]] = []
    levels = _levels(known, names, place)
    rows_of = dict.fromkeys(names, ()) | {
        name: tuple(zip(part["low_text"], part["high_text"], part["low"], part["high"], strict=True))
        for (name,), part in known.sort("attribute", "response_id", "low", "high").group_by("attribute")
    }
    for name, (text, level) in zip(names, levels, strict=True):
        draw = np.random.default_rng([seed, stable_hash(name) % 2**32])
        ordered.append([(place[low], place[high]) for low, high, _, _ in rows_of[name]])
        trained = {(low, high) for _, _, low, high in rows_of[name]}
        others = [
            rows for other, (rows, _) in sorted(zip(names, levels, strict=True), key=itemgetter(0)) if other != name
        ]
        rest = np.concatenate(others) if others else np.zeros(0, int)
        above, same = _across(text, level, trained, draw)
        across.append(above)
        drawn = _draw(rest, AT_REST, draw) if neutral else _draw_within(known, name, place, draw)
        equal.append(same + [(a, b) for a, b in drawn if a != b])
    return Pairs(ordered, across, equal)


def _across(
    text: np.ndarray, level: np.ndarray, trained: set[tuple[int, int]], draw: np.random.Generator
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Random pairs of an attribute's rewrites: ordered by level (only levels that are trained on), and equal ones."""
    above, same = [], []
    for a, b in _draw(np.arange(len(text)), ACROSS, draw):
        low, high = (a, b) if level[a] <= level[b] else (b, a)
        if (int(level[low]), int(level[high])) in trained:
            above.append((int(text[low]), int(text[high])))
        elif level[a] == level[b] and text[a] != text[b]:
            same.append((int(text[a]), int(text[b])))
    return above, same


def _draw_within(
    known: pl.DataFrame, name: str, place: dict[str, int], draw: np.random.Generator
) -> list[tuple[int, int]]:
    """Draw pairs of rewrites of one response at other attributes."""
    sides = [known.select("attribute", "response_id", text=f"{side}_text") for side in ("low", "high")]
    others = pl.concat(sides).filter(pl.col("attribute") != name).unique().sort("response_id", "attribute", "text")
    groups = [[place[text] for text in part["text"]] for _, part in others.group_by("response_id", maintain_order=True)]
    each = -(-AT_REST // max(len(groups), 1))
    return [pair for rows in groups for pair in _draw(np.array(rows), each, draw)]


def _draw(rows: np.ndarray, count: int, draw: np.random.Generator) -> list[tuple[int, int]]:
    """Draw pairs of rows; none where there are fewer than two."""
    if len(rows) < 2:
        return []
    return [(int(a), int(b)) for a, b in rows[draw.integers(len(rows), size=(count, 2))]]


def _choose(
    data: Data, strengths: Sequence[float], options: dict, tell: Callable[[], None], *, always: bool
) -> tuple[Float[np.ndarray, " attributes"], float]:
    """Each attribute's strength of least validation loss (`_loss`), of equal ones the greatest, and their mean loss."""
    checked = np.array([bool(a and b) for a, b in zip(data.train.ordered, data.validation.ordered, strict=True)])
    if not checked.any() or (len(strengths) == 1 and not always):
        return np.full(len(data.names), strengths[0] if len(strengths) == 1 else UNCHECKED), 0.0
    grid, losses = sorted(strengths, reverse=True), []
    for strength in grid:
        heads = fit_heads(data.features, data.train.rows(), np.full(len(data.names), strength), data.names, **options)
        losses.append([_loss(data, heads, a) for a in range(len(data.names))])
        tell()
    best = np.argmin(losses, axis=0)
    return np.where(checked, np.asarray(grid)[best], UNCHECKED), float(np.min(losses, axis=0)[checked].mean())


def _loss(data: Data, heads: Heads, attribute: int) -> float:
    """Share of the variance of an attribute's scores that levels do not explain, over all validation rewrites.

    Rewrites of other attributes are at this one's middle where responses are neutral, else left out. Scale-free, since
    scores are calibrated afterwards: nats would choose heads that say little, for they are never surely wrong in a new
    phrase.
    """
    text, level = data.checks[attribute]
    others = [rows for other, (rows, _) in enumerate(data.checks) if other != attribute and data.neutral]
    rows = np.concatenate([text, *others])
    wanted = np.concatenate([(level - 2) / 2, np.zeros(len(rows) - len(text))])
    reward = _phi(data.features, heads, attribute)[rows] @ heads.weight[attribute]
    if not len(rows) or reward.std() == 0 or wanted.std() == 0 or reward[: len(text)].std() == 0:
        return 1.0
    together = float(np.corrcoef(reward, wanted)[0, 1])
    return 1.0 - max(together, 0.0) ** 2


def _phi(features: np.ndarray, heads: Heads, attribute: int) -> np.ndarray:
    return features if heads.hidden is None else np.tanh(features @ heads.hidden[attribute] + heads.bias[attribute])


def _levels(known: pl.DataFrame, names: tuple[str, ...], place: dict[str, int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each attribute's rewrites: rows of texts, and their levels."""
    sides = [known.select("attribute", pl.col(f"{side}_text").alias("text"), level=side) for side in ("low", "high")]
    table = pl.concat(sides).unique().sort("attribute", "text", "level")
    found = []
    for name in names:
        mine = table.filter(pl.col("attribute") == name)
        found.append((np.array([place[text] for text in mine["text"]], int), mine["level"].to_numpy()))
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
    vectors = np.linalg.svd(difference, full_matrices=False)[2][:count].T
    # a sign is arbitrary: the largest entry is positive
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])])
    return np.pad(vectors, ((0, 0), (0, count - vectors.shape[1])))
