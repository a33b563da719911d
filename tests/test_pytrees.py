"""Pytrees keep their type: JAX must not take one family for another that has the same fields."""

import importlib
import pkgutil
from dataclasses import FrozenInstanceError
from itertools import combinations

import jax
import jax.numpy as jnp
import pytest
from families import FAMILIES

import pluralprefs
from pluralprefs.models.ideal_point import IdealPoint
from pluralprefs.pytrees import pytree, static


@pytree
class Flattered(IdealPoint):
    """A family that inherits all its fields, and changes a method."""


@pytree
class Kept:
    x: jax.Array
    rest: dict
    rank: int = static(default=3)


def test_a_family_is_not_taken_for_one_whose_fields_it_inherits():
    made = IdealPoint.init(key=jax.random.key(0), dim=4, prototypes=2)
    other = Flattered(**vars(made))
    assert jax.tree.structure(made) != jax.tree.structure(other)
    assert jax.tree.structure(other) == jax.tree.structure(other.replace(points=other.points + 1))


def test_no_two_families_have_one_structure():
    structures = {name: jax.tree.structure(draw()) for name, draw in FAMILIES.items()}
    for one, other in combinations(structures, 2):
        assert structures[one] != structures[other], (one, other)


def test_every_pytree_of_the_package_keeps_its_type():
    """flax's own decorator registers nodes that are equal whatever their type."""
    for module in pkgutil.walk_packages(pluralprefs.__path__, "pluralprefs."):
        if not module.name.startswith("pluralprefs.__main__"):
            for value in vars(importlib.import_module(module.name)).values():
                assert "_flax_dataclass" not in getattr(value, "__dict__", {}), value


def test_children_are_named_static_fields_are_not_traced_and_nothing_can_be_set():
    kept = Kept(jnp.arange(3.0), {"y": jnp.ones(2)}, rank=5)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(kept)]
    assert paths == [".x", ".rest['y']"]
    doubled = jax.jit(lambda node: node.replace(x=node.rank * node.x))(kept)
    assert doubled.rank == 5
    assert doubled.x.tolist() == [0.0, 5.0, 10.0]
    assert jax.tree.structure(kept) != jax.tree.structure(kept.replace(rank=6))
    assert Kept(kept.x, {}).rank == 3
    with pytest.raises(FrozenInstanceError):
        kept.rank = 1
