"""Read a checkpoint's tensors straight onto their places: every host reads the parts that its devices hold, once.

A parameter of a model here has a name there (`Names`), and its place comes from ordered rules over its path
(`sharding.shard_rules`). Files are mapped, not loaded: a part is sliced out of the file, so a host never holds a whole
tensor of which it needs a part.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from pluralprefs.encoders.weights import EncoderError, weight_files
from pluralprefs.sharding import Rules, shard_rules

LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
FLOATS = ("F64", "F32", "F16", "BF16")
Slices = tuple[slice, ...]


class Tensors:
    """The tensors of a folder by their plain names, as open files. A context manager: closing it closes the files.

    `plain` turns a stored name into the plain one. Raises EncoderError for a file that is not safetensors.
    """

    def __init__(self, folder: Path, plain: Callable[[str], str] = str):
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        self._files = contextlib.ExitStack()
        self._tensors: dict[str, tuple[Any, str]] = {}
        for path in weight_files(folder):
            try:
                file = self._files.enter_context(safe_open(path, framework="numpy"))
            except SafetensorError as error:
                self._files.close()
                raise EncoderError(
                    f"{path}: not a readable safetensors file ({error}); fetch the model again"
                ) from error
            self._tensors |= {plain(name): (file, name) for name in file.keys()}  # noqa: SIM118, not a mapping

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    @property
    def names(self) -> set[str]:
        """The plain names of all tensors."""
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor as stored. Raises EncoderError where there is none of this name."""
        if name not in self._tensors:
            raise EncoderError(f"{self.folder}: the weights lack {name}; config.json belongs to another model")
        file, stored = self._tensors[name]
        tensor = file.get_slice(stored)
        if tensor.get_dtype() not in FLOATS:
            raise EncoderError(f"{self.folder}: {name} is of {tensor.get_dtype()}; only {', '.join(FLOATS)} are read")
        return tuple(tensor.get_shape())

    def part(self, name: str, index: Slices) -> np.ndarray:
        """The part of a tensor at `index`, as float32."""
        file, stored = self._tensors[name]
        return np.asarray(file.get_slice(stored)[index]).astype(np.float32)


def fill(
    tensors: Tensors,
    shapes: Mapping[str, Any],
    names: Mapping[str, str],
    *,
    mesh: Mesh | None = None,
    rules: Rules = (),
) -> dict[str, Any]:
    """Make the parameters whose `shapes` are given, float32, each read once onto its place.

    `names` maps a parameter's path here, `{}` standing for the layer, to its name there; kernels are stored transposed.
    Without a mesh everything is on the default device. Raises EncoderError for a missing or misshapen tensor.
    """
    default = SingleDeviceSharding(jax.local_devices()[0])
    places = jax.tree.map(lambda _: default, shapes) if mesh is None else shard_rules(shapes, mesh, rules)

    def read(path: Sequence[Any], shape: jax.ShapeDtypeStruct, place: jax.sharding.Sharding) -> jax.Array:
        name, kernel = stored_name(path, names), str(path[-1].key) == "kernel"
        found = tensors.shape(name)
        if (found[::-1] if kernel else found) != shape.shape:
            raise EncoderError(f"{tensors.folder}: {name} is {found}, config.json says {_there(shape, kernel)}")
        parts: dict[str, np.ndarray] = {}

        def part(index: Any) -> np.ndarray:
            # Devices that hold the same part ask for it one by one.
            if str(index) not in parts:
                parts[str(index)] = tensors.part(name, index[::-1] if kernel else index)
            return parts[str(index)].T if kernel else parts[str(index)]

        return jax.make_array_from_callback(shape.shape, place, part)

    return jax.tree_util.tree_map_with_path(read, shapes, places)


def stored_name(path: Sequence[Any], names: Mapping[str, str]) -> str:
    """The name of a parameter in the checkpoint, from its path here."""
    *parts, leaf = (str(key.key) for key in path)
    layer = parts[1] if parts[0] == "layers" else ""
    own = ".".join("{}" if part == layer else part for part in parts)
    return f"{names[own].format(layer)}.{LEAVES[leaf]}"


def check_all_read(tensors: Tensors, shapes: Mapping[str, Any], names: Mapping[str, str], *, own: str) -> None:
    """Refuse weights of the backbone (names that begin as the pattern `own` says) that nothing here reads.

    They would be left out of the computation. Raises EncoderError with the first.
    """
    read = {stored_name(path, names) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)}
    found = {name for name in tensors.names if re.match(own, name)} - read
    left = sorted(name for name in found if not name.endswith("rotary_emb.inv_freq"))
    if left:
        raise EncoderError(f"{tensors.folder}: the weights hold {left[0]}, which config.json does not announce")


def _there(shape: jax.ShapeDtypeStruct, kernel: bool) -> tuple[int, ...]:
    return shape.shape[::-1] if kernel else shape.shape
