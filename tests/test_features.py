"""Feature maps: principal components, log length and a kernel's features, each against NumPy."""

import jax
import numpy as np
import pytest

from pluralprefs.encoders.features import Features
from pluralprefs.saving import flat

DRAW = np.random.default_rng(0)
MIX = DRAW.normal(size=(6, 6)) * 3.0 ** -np.arange(6)[:, None]  # directions in which items differ less and less
X = (DRAW.normal(size=(40, 6)) @ MIX + 5.0).astype(np.float32)
LENGTH = DRAW.integers(5, 200, 40).astype(float)


def test_components_are_the_directions_in_which_training_items_differ_most():
    maps = Features.fit(X[:30], LENGTH[:30], log_length=False, components=2)
    found = maps(X, LENGTH)
    values, vectors = np.linalg.eigh(np.cov(X[:30].T))
    expected = X @ vectors[:, ::-1][:, :2]
    np.testing.assert_allclose(np.abs(found - found[0]), np.abs(expected - expected[0]), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found[:30].var(0, ddof=1), values[::-1][:2], rtol=1e-4)
    assert maps.parts(2) == {"linear": 2}
    again = Features.fit(X[:30][::-1], LENGTH[:30], log_length=False, components=2)(X, LENGTH)
    np.testing.assert_allclose(np.abs(again), np.abs(found), rtol=1e-3, atol=1e-4)  # whatever the order of the items


@pytest.mark.parametrize(("items", "asked"), [(3, 5), (30, 99)])
def test_there_are_no_more_components_than_items_or_columns(items, asked):
    maps = Features.fit(X[:items], LENGTH[:items], log_length=False, components=asked)
    assert maps(X, LENGTH).shape == (40, min(items, 6))


def test_length_and_kernel_stand_beside_the_components():
    maps = Features.fit(X, LENGTH, components=3, anchors=4)
    found = maps(X, LENGTH)
    assert maps.parts(3) == {"linear": 4, "kernel": 4}
    assert found.shape == (40, 8)
    logs = np.log1p(LENGTH)
    np.testing.assert_allclose(found[:, 3], 0.3 * (logs - logs.mean()) / logs.std(), atol=1e-4)
    z, points, width = found[:, :3].astype(float), np.asarray(maps.anchors, float), float(maps.width)
    square = ((z[:, None] - points[None]) ** 2).sum(2)
    gram = ((points[:, None] - points[None]) ** 2).sum(2)
    values, vectors = np.linalg.eigh(np.exp(-gram / (2 * width**2)))
    expected = np.exp(-square / (2 * width**2)) @ (vectors / np.sqrt(values)) @ vectors.T
    np.testing.assert_allclose(found[:, 4:], expected, atol=2e-3)


def test_maps_come_back_from_arrays():
    maps = Features.fit(X, LENGTH, components=3, anchors=4)
    again = Features.restore({name: np.asarray(value) for name, value in flat(maps).items()})
    np.testing.assert_array_equal(again(X, LENGTH), maps(X, LENGTH))
    older = Features.restore({"length_mean": np.float32(1), "length_scale": np.float32(2)})  # before there were any
    assert older(X, LENGTH).shape == (40, 7)
    assert jax.tree.structure(older) != jax.tree.structure(maps)
