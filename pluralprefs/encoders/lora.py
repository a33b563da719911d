"""LoRA: train a small addition to chosen products of an encoder, whatever its architecture (arXiv 2106.09685).

    y = x W + (alpha / rank) (x D) U          D: [inputs, rank], drawn      U: [rank, outputs], zero at the start

so that an encoder with fresh adapters is the encoder itself. W stays as it is, in float32 or bfloat16; D and U are
float32. The product x W is never changed into x (W + D U): a small addition would be lost in a bfloat16 W, and adapters
of several users or attributes share x W under `jax.vmap`.

The factors are parameters like others, named after the kernel they belong to ("layers/0/query/dot_general/down"). What
of an encoder is trained is a matter of labels over such names: `split` parts a pytree by them and `join` undoes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from pluralprefs.encoders.text import TextEncoder
from pluralprefs.encoders.weights import EncoderError
from pluralprefs.sharding import Rules, leaf_name
from pluralprefs.types import Key

Encoder = TypeVar("Encoder", bound=TextEncoder)
FACTORS = r"/dot_general/(down|up)$"  # the names of adapters
KERNEL = "/kernel"


@dataclass(frozen=True)
class Lora:
    """Which products of an encoder get an addition, and of what size.

    targets   regular expression, searched in the names of parameters; what it finds must be kernels of linear layers
    alpha     the addition is multiplied by alpha / rank, so that another rank needs no other learning rate
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str = r"/(query|value)/kernel$"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise EncoderError(f"LoRA of rank {self.rank}: give a rank of at least 1")


class LowRank(nnx.Module):
    """The product x W and its addition, in place of a linear layer's `dot_general`."""

    def __init__(self, inputs: int, outputs: int, lora: Lora, key: Key):
        self.down = nnx.Param(jax.random.normal(key, (inputs, lora.rank)) / jnp.sqrt(inputs))
        self.up = nnx.Param(jnp.zeros((lora.rank, outputs)))
        self.scale = lora.alpha / lora.rank

    def __call__(self, x: Float[Array, "*batch inputs"], kernel: Array, dimensions: Any, **options: Any) -> Array:
        down, up = (jnp.asarray(factor[...], x.dtype) for factor in (self.down, self.up))
        added = jax.lax.dot_general(jax.lax.dot_general(x, down, dimensions, **options), up, dimensions, **options)
        return jax.lax.dot_general(x, kernel, dimensions, **options) + self.scale * added


def attach(encoder: Encoder, lora: Lora, key: Key) -> Encoder:
    """The encoder with fresh adapters at `lora.targets`; every text is embedded as before.

    Raises EncoderError where nothing fits the targets, or
    what fits is no kernel of a linear layer.
    """
    names = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(encoder.params)]
    targets = [name for name in names if re.search(lora.targets, name)]
    if not targets:
        raise EncoderError(f"LoRA targets {lora.targets!r} fit no parameter; there are: {', '.join(names)}")
    model = nnx.merge(encoder.graphdef, encoder.params)
    linear = dict(_linears(model))
    for name in targets:
        if name.removesuffix(KERNEL) not in linear or not name.endswith(KERNEL):
            raise EncoderError(f"LoRA targets {lora.targets!r} fit {name}, which is no kernel of a linear layer; "
                               f"targets such as {Lora.targets!r} do not")  # fmt: skip
        layer = linear[name.removesuffix(KERNEL)]
        own = jax.random.fold_in(key, names.index(name))
        layer.dot_general = nnx.data(LowRank(layer.in_features, layer.out_features, lora, own))
    return _parted(encoder, model)


def merge(encoder: Encoder) -> Encoder:
    """The encoder with its adapters added to the weights, W + (alpha / rank) D U, in the type of W; none are left."""
    model = nnx.merge(encoder.graphdef, encoder.params)
    for _, layer in _linears(model):
        low = layer.dot_general
        if isinstance(low, LowRank):
            added = jnp.matmul(low.down[...], low.up[...], precision=jax.lax.Precision.HIGHEST)
            kernel = layer.kernel[...]
            layer.kernel[...] = (kernel.astype(jnp.float32) + low.scale * added).astype(kernel.dtype)
            layer.dot_general = nnx.static(jax.lax.dot_general)
    return _parted(encoder, model)


def factor_rules(rules: Rules) -> Rules:
    """Rules that place the factors of a kernel as `rules` place the kernel itself; the rank is never divided.

    D lies over the mesh as the inputs of W and U as its outputs: no product needs a part of W and another of a factor.
    """
    found = []
    for pattern, spec in rules:
        if pattern.endswith(KERNEL + "$"):
            inputs, outputs = (*spec, None, None)[:2]
            factor = pattern.removesuffix(KERNEL + "$") + "/dot_general"
            found.append((f"{factor}/down$", PartitionSpec(inputs)))
            found.append((f"{factor}/up$", PartitionSpec(None, outputs)))
    return tuple(found)


def split(params: Any, trained: Callable[[str], bool]) -> tuple[Any, Any]:
    """Part a pytree by the names of its leaves: (trained, rest), each with None where the other has a leaf."""

    def part(kept: bool) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf if trained(leaf_name(path)) == kept else None, params
        )

    return part(True), part(False)


def join(trained: Any, rest: Any) -> Any:
    """The whole of two parts that `split` made."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, rest, is_leaf=lambda leaf: leaf is None)


def _linears(model: nnx.Module) -> Iterator[tuple[str, nnx.Linear]]:
    """Linear layers with the names of their paths."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Linear):
            yield "/".join(map(str, path)), module


def _parted(encoder: Encoder, model: nnx.Module) -> Encoder:
    graphdef, state = nnx.split(model)
    return encoder.replace(graphdef=graphdef, params=nnx.to_pure_dict(state))
