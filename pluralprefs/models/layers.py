"""The few blocks that several papers share, as pure functions over plain parameter dictionaries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

gelu = partial(jax.nn.gelu, approximate=False)  # the one of PyTorch, and of the released models
Weights = tuple[dict[str, Array], ...]
RIDGES = tuple(10.0**power for power in range(-6, 3))


def init_mlp(key: jax.Array, sizes: Sequence[int]) -> Weights:
    """Draw an MLP's weights: `sizes` is input, hidden..., output; He-scaled weights, zero biases."""
    keys = jax.random.split(key, len(sizes) - 1)
    return tuple(
        {"kernel": jax.random.normal(k, (n, m)) * jnp.sqrt(2.0 / n), "bias": jnp.zeros(m)}
        for k, n, m in zip(keys, sizes[:-1], sizes[1:], strict=True)
    )


def mlp(
    weights: Weights, x: Float[Array, "*batch n"], activation: Callable[[Array], Array] = gelu
) -> Float[Array, "*batch m"]:
    """Apply an MLP: the activation stands between layers, not after the last."""
    for i, layer in enumerate(weights):
        x = x @ layer["kernel"]
        x = x + jnp.broadcast_to(layer["bias"], x.shape)
        if i < len(weights) - 1:
            x = activation(x)
    return x


def mlp_after_kernel(weights: Weights, x: Float[Array, "*batch m"]) -> Float[Array, "*batch k"]:
    """What `mlp` makes of an input that its first kernel has been applied to."""
    x = x + jnp.broadcast_to(weights[0]["bias"], x.shape)
    return mlp(weights[1:], gelu(x)) if len(weights) > 1 else x


def safe_norm(z: Float[Array, "*batch n"]) -> Float[Array, "*batch"]:
    """Euclidean norm `sqrt(z.z + 1e-12)`: the plain one has a NaN gradient at zero, that is, at the ideal point."""
    return jnp.sqrt(jnp.sum(z * z, axis=-1) + 1e-12)


def cosine(x: Float[Array, "*batch n"], y: Float[Array, "*batch n"]) -> Float[Array, "*batch"]:
    """Cosine of the angle between vectors; 0 where one of them is zero."""
    return jnp.sum(x * y, axis=-1) / (safe_norm(x) * safe_norm(y))


def ridge(
    x: Float[np.ndarray, "rows n"], y: Float[np.ndarray, "rows m"], strengths: Sequence[float] = RIDGES
) -> tuple[Float[np.ndarray, "n m"], Float[np.ndarray, " m"]]:
    """Kernel and bias of the ridge regression of each column of y on x, which are centred first.

    The strength is in units of the mean variance of x; a column's own has the least generalised cross-validation error
    (Golub, Heath and Wahba 1979), |residuals|^2 / (rows - degrees of freedom)^2.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    centre, middle = x.mean(0), y.mean(0)
    values, vectors = np.linalg.eigh((x - centre).T @ (x - centre))
    values, rotated = np.maximum(values, 0.0), (x - centre) @ vectors
    together = rotated.T @ (y - middle)
    unit = float(values.mean()) or 1.0
    best, least = np.zeros_like(together), np.full(y.shape[1], np.inf)
    for strength in strengths:
        weights = together / (values + strength * unit)[:, None]
        freedom = 1.0 + (values / (values + strength * unit)).sum()
        error = ((y - middle - rotated @ weights) ** 2).sum(0) / max(len(x) - freedom, 1e-9) ** 2
        best, least = np.where(error < least, weights, best), np.minimum(error, least)
    kernel = vectors @ best
    return kernel, middle - centre @ kernel
