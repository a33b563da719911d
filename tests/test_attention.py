"""Attention by every kernel: equal to the formula, whatever tokens see; cuDNN where it can be had, else an error."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pluralprefs.encoders import attention as module
from pluralprefs.encoders.attention import attention, locate, surrounding, visible, why_not_cudnn
from pluralprefs.encoders.weights import EncoderError

MASK = np.array([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]], bool)
SEGMENT = np.array([[0] * 8, [0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 2, 2, 2]], np.int32)


def arrays(dtype=jnp.float32, dim=8, length=8) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(3, length, heads, dim)).astype(dtype)) for heads in (4, 2, 2)]


def seen_by(kind: str) -> np.ndarray:
    places = locate(jnp.asarray(MASK), jnp.asarray(SEGMENT))
    if kind == "both sides":
        return np.asarray(surrounding(places.position, jnp.asarray(MASK), 2))
    return np.asarray(visible(places, places, jnp.asarray(MASK), 3 if kind == "window" else None))


def formula(query, key, value, seen, scale) -> np.ndarray:
    """Softmax over the seen keys, head by head, in float64; 0 where nothing is seen."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros(query.shape)
    for row, at, head in np.ndindex(query.shape[:3]):
        keys = np.flatnonzero(seen[row, 0, at])
        if len(keys):
            scores = key[row, keys, head // 2] @ query[row, at, head] * scale
            weights = np.exp(scores - scores.max())
            out[row, at, head] = weights / weights.sum() @ value[row, keys, head // 2]
    return out


@pytest.mark.parametrize("kind", ["past", "window", "both sides"])
@pytest.mark.parametrize("path", ["auto", "xla", "capped", "as cuDNN is called"])
def test_every_kernel_equals_the_formula_for_masks_windows_and_segments(kind, path, monkeypatch):
    seen, options = seen_by(kind), {"kernel": "xla" if path == "xla" else "auto", "causal": kind != "both sides"}
    if path == "as cuDNN is called":  # with cuDNN's arguments, computed by XLA
        plain = jax.nn.dot_product_attention
        asked = []

        def on_cpu(*args, implementation, **arguments):
            asked.append(implementation)
            return plain(*args, **arguments, implementation="xla")

        monkeypatch.setattr(module, "why_not_cudnn", lambda *_: "")
        monkeypatch.setattr(jax.nn, "dot_product_attention", on_cpu)
    cap = 1e4 if path == "capped" else None  # so high that it changes nothing
    found = np.asarray(attention(*arrays(), jnp.asarray(seen), scale=0.3, cap=cap, **options))
    assert path != "as cuDNN is called" or asked == ["cudnn"]
    assert np.isfinite(found).all()
    real = seen.any(-1)[:, 0, :, None, None]
    np.testing.assert_allclose(found * real, formula(*arrays(), seen, 0.3), atol=1e-5)


@pytest.mark.parametrize(
    ("given", "cap", "capability", "reason"),
    [
        ({"dtype": jnp.bfloat16}, None, 8.0, ""),
        ({"dtype": jnp.float16, "dim": 256}, None, 9.0, ""),
        ({"dtype": jnp.bfloat16}, 30.0, 9.0, "softly capped"),
        ({}, None, 9.0, "not float32"),
        ({"dtype": jnp.bfloat16, "dim": 256}, None, 8.0, "heads of 256 dimensions, where multiples of 8 to 128 fit"),
        ({"dtype": jnp.bfloat16, "dim": 12}, None, 9.0, "heads of 12 dimensions"),
        ({"dtype": jnp.bfloat16, "length": 7}, None, 9.0, "lengths of 7 and 7 tokens"),
        ({"dtype": jnp.bfloat16}, None, 7.5, "no NVIDIA GPU of compute capability 8.0"),
        ({"dtype": jnp.bfloat16}, None, None, "no NVIDIA GPU"),
    ],
)
def test_cudnn_is_chosen_where_dtype_heads_lengths_and_the_gpu_allow(given, cap, capability, reason, monkeypatch):
    monkeypatch.setattr(module, "nvidia_capability", lambda: capability)
    query, key, _ = arrays(**given)
    found = why_not_cudnn(query, key, cap)
    assert reason in found if reason else found == ""


def test_cudnn_asked_for_where_it_cannot_be_had_is_an_error():
    with pytest.raises(EncoderError, match="attention by cuDNN: there is no NVIDIA GPU") as error:
        attention(*arrays(jnp.bfloat16), jnp.asarray(seen_by("past")), scale=1.0, kernel="cudnn")
    assert "\n" not in str(error.value)
