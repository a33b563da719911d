"""Frozen dataclasses that are pytrees, as in `flax.struct`, and that JAX's caches tell apart by their type.

`jax.tree_util.register_dataclass`, by which flax registers, makes nodes that are equal whatever their type (seen with
jax 0.10 and 0.12): the structures of two families with as many fields, or of a family and one that inherits its
fields, compare equal, and now and then `jit` takes the program that was compiled for the other. Nodes that are
registered with functions of their own carry their type, and cost a fifth more when a jitted function is called (36
microseconds for a table of comparisons).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar, dataclass_transform

import jax
from jax.tree_util import GetAttrKey

T = TypeVar("T")


def static(*, default: Any = dataclasses.MISSING) -> Any:
    """A field that is no child of the pytree: what a program is compiled for, and never traced."""
    return dataclasses.field(default=default, metadata={"pytree_node": False})


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
def pytree(cls: type[T]) -> type[T]:
    """Make a frozen dataclass with `replace`, whose fields are children of the pytree unless they are `static`.

    >>> @pytree
    ... class One:
    ...     x: float
    >>> @pytree
    ... class Other(One):
    ...     pass
    >>> jax.tree.structure(One(0.0)) == jax.tree.structure(Other(0.0))
    False
    """
    made: Any = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(made)
    children = tuple(f.name for f in fields if f.metadata.get("pytree_node", True))
    fixed = tuple(f.name for f in fields if not f.metadata.get("pytree_node", True))
    keys = tuple(GetAttrKey(name) for name in children)

    def flatten(node: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple(getattr(node, name) for name in children), tuple(getattr(node, name) for name in fixed)

    def flatten_with_keys(node: Any) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
        values, kept = flatten(node)
        return tuple(zip(keys, values, strict=True)), kept

    def unflatten(kept: tuple[Any, ...], values: Iterable[Any]) -> Any:
        node = object.__new__(made)  # JAX builds nodes of any objects: nothing is to be checked here
        for name, value in (*zip(children, values, strict=True), *zip(fixed, kept, strict=True)):
            object.__setattr__(node, name, value)
        return node

    made.replace = _replace
    jax.tree_util.register_pytree_with_keys(made, flatten_with_keys, unflatten, flatten)
    return made


def _replace(self: Any, **changes: Any) -> Any:
    """A copy with some fields exchanged."""
    return dataclasses.replace(self, **changes)
