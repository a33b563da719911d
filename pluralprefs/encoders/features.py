"""Feature maps of encoded items, fitted on the items of the training rows: principal components in place of the
embedding, and columns appended to it, log length and a kernel's features.

Leading principal components are for few responses: directions in which those of training hardly differ have a weight
each, of which comparisons say next to nothing, and responses that nobody has judged differ in them too.

Nystrom features z(x) = k(x, Z) k(Z, Z)^(-1/2) of the radial basis function k(x, z) = exp(-|x - z|^2 / (2 length^2))
turn any family that is linear in its embedding into a Gaussian process: a Gaussian prior on the weights of z(x) is
the process with kernel k, up to the anchors' resolution (Williams and Seeger 2001). They are computed once per item,
not per row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pluralprefs.pytrees import pytree
from pluralprefs.types import Item


@pytree
class Features:
    """Feature maps of one run.

    `length_mean` and `length_scale` standardise log(1 + characters) of the text; `components` has a direction a row.
    """

    length_mean: Float[Array, ""] | None
    length_scale: Float[Array, ""] | None
    anchors: Float[Array, "anchors dim"] | None
    whiten: Float[Array, "anchors anchors"] | None
    width: Float[Array, ""] | None
    components: Float[Array, "components dim"] | None = None

    @classmethod
    def fit(
        cls,
        embedding: Float[np.ndarray, "items dim"],
        length: Float[np.ndarray, " items"],
        *,
        log_length: bool = True,
        anchors: int = 0,
        width: float = 1.0,
        components: int = 0,
    ) -> Self:
        """Fit on training items: `length` in characters, `width` in units of the median distance between items.

        `components` leading principal directions stand for the embedding (0: it stays; no more than there are).
        Anchors are chosen by farthest-point sampling, which is deterministic and spreads over the data.
        """
        mean = scale = points = whiten = spread = directions = None
        if components:
            apart = np.asarray(embedding, np.float64) - np.asarray(embedding, np.float64).mean(0)
            directions = np.linalg.svd(apart, full_matrices=False)[2][:components].astype(np.float32)
            embedding = np.asarray(embedding, np.float32) @ directions.T
            directions = jnp.asarray(directions)
        if log_length:
            logs = np.log1p(np.asarray(length, np.float64))
            mean, scale = jnp.float32(logs.mean()), jnp.float32(logs.std() or 1.0)
        if anchors:
            x = np.asarray(embedding, np.float64)
            spread = width * _median_distance(x)
            points = x[_farthest_points(x, min(anchors, len(x)))]
            values, vectors = np.linalg.eigh(_rbf(points, points, spread))
            whiten = jnp.asarray((vectors / np.sqrt(np.maximum(values, 1e-6))) @ vectors.T, jnp.float32)
            points, spread = jnp.asarray(points, jnp.float32), jnp.float32(spread)
        return cls(mean, scale, points, whiten, spread, directions)

    @classmethod
    def restore(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """Make the maps of arrays by field, as a file keeps them; what is missing is None."""
        found = {field.name: arrays.get(field.name) for field in fields(cls)}
        scalars = ("length_mean", "length_scale", "width")
        return cls(**{
            name: None if value is None else jnp.asarray(value.reshape(()) if name in scalars else value)
            for name, value in found.items()
        })  # fmt: skip

    def __call__(
        self, embedding: Float[np.ndarray, "items dim"], length: Float[np.ndarray, " items"]
    ) -> Float[np.ndarray, "items columns"]:
        """Project, and append the fitted columns, [items, dim + ...]; works through the items in blocks."""
        columns = [np.asarray(embedding, np.float32)]
        if self.components is not None:
            columns = [columns[0] @ np.asarray(self.components).T]
        if self.length_mean is not None and self.length_scale is not None:
            # 0.3: an embedding of unit norm should not be drowned by one column
            z = (np.log1p(np.asarray(length, np.float32)) - float(self.length_mean)) / float(self.length_scale)
            columns.append(0.3 * z[:, None].astype(np.float32))
        if self.anchors is not None:
            blocks = [np.asarray(_nystrom(self, b)) for b in _blocks(columns[0])]
            columns.append(np.concatenate(blocks) if blocks else np.zeros((0, len(self.anchors)), np.float32))
        return np.concatenate(columns, axis=1)

    def parts(self, dim: int) -> dict[str, int]:
        """Names and sizes of the columns of the result, for an embedding of `dim` columns (once projected)."""
        sizes = {"linear": dim + (self.length_mean is not None)}
        return sizes | ({} if self.anchors is None else {"kernel": len(self.anchors)})


def append(items: Item, features: Features | None, length: Float[np.ndarray, " items"]) -> Item:
    """Items with the feature columns appended to their embedding; unchanged where there are none."""
    return items if features is None else items.replace(embedding=features(np.asarray(items.embedding), length))


@jax.jit
def _nystrom(features: Features, x: Float[Array, "items dim"]) -> Float[Array, "items anchors"]:
    z: Any = features.anchors
    whiten: Any = features.whiten
    width: Any = features.width
    square = jnp.sum(x**2, 1)[:, None] + jnp.sum(z**2, 1)[None, :] - 2 * x @ z.T
    return jnp.exp(-jnp.maximum(square, 0.0) / (2 * width**2)) @ whiten


def _blocks(x: np.ndarray, rows: int = 4096) -> list[np.ndarray]:
    return [x[i : i + rows] for i in range(0, len(x), rows)]


def _rbf(x: np.ndarray, z: np.ndarray, width: float) -> np.ndarray:
    square = (x**2).sum(1)[:, None] + (z**2).sum(1)[None, :] - 2 * x @ z.T
    return np.exp(-np.maximum(square, 0) / (2 * width**2))


def _median_distance(x: np.ndarray, most: int = 1000) -> float:
    x = x[:: max(1, len(x) // most)]
    square = (x**2).sum(1)[:, None] + (x**2).sum(1)[None, :] - 2 * x @ x.T
    median = np.sqrt(np.median(np.maximum(square[np.triu_indices(len(x), 1)], 0))) if len(x) > 1 else 1.0
    return float(median) or 1.0


def _farthest_points(x: np.ndarray, count: int) -> np.ndarray:
    chosen = np.empty(count, np.int64)
    distance = ((x - x.mean(0)) ** 2).sum(1)
    for i in range(count):
        chosen[i] = distance.argmax()
        distance = np.minimum(distance, ((x - x[chosen[i]]) ** 2).sum(1))
    return chosen
