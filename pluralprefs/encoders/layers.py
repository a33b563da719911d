"""What the backbones share: activations by their Hugging Face names, and the precision of products."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def precision(dtype: Any) -> jax.lax.Precision:
    """Full float32 products where float32 is asked for: accelerators otherwise round to ten bits or fewer."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
