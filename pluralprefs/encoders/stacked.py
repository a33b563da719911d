"""Adapters of several users or attributes on one encoder, as an encoder whose columns are their rewards.

    reward_g(x) = w_g . e(x; W + (alpha / rank) D_g U_g)

The weights W of the encoder are shared and stay as they are; factors D, U and heads w have a leading axis of names,
along which they are computed side by side (`jax.vmap`). `pluralprefs.adapters` trains them. What encodes items encodes
them with this too: its features are kept by the digest of what was learned.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from pluralprefs.encoders.cache import write_whole
from pluralprefs.encoders.lora import FACTORS, Lora, attach, join, split
from pluralprefs.encoders.text import TextEncoder
from pluralprefs.encoders.tokens import Renderer
from pluralprefs.encoders.weights import ADAPTERS, EncoderError
from pluralprefs.pytrees import pytree, static
from pluralprefs.sharding import leaf_name
from pluralprefs.types import Item, Replaceable, Tokens

TOGETHER = 16  # adapters that are computed side by side: each has activations of its own
HEAD = "head"


@pytree
class StackedEncoder(Replaceable):
    """Tokens -> Item with one reward a name. `frozen` is the encoder with adapters whose values do not count."""

    frozen: TextEncoder
    factors: Any  # of `frozen.params`, with a leading axis of names
    head: Float[Array, "names dim"]
    names: tuple[str, ...] = static()
    lora: Lora = static()
    digest: str = static()

    @classmethod
    def of(
        cls, encoder: TextEncoder, lora: Lora, names: Sequence[str], factors: Any, head: Float[Array, "names dim"]
    ) -> StackedEncoder:
        """Put learned factors and heads on an encoder without adapters. Raises EncoderError where they do not fit."""
        require_no_prompt(encoder)
        frozen = attach(encoder, lora, jax.random.key(0))
        expected = {name: (len(names), *leaf.shape) for name, leaf in _named(factors_of(frozen)).items()}
        found = {name: leaf.shape for name, leaf in _named(factors).items()}
        if found != expected or head.shape != (len(names), encoder.dim):
            raise EncoderError(f"stacked adapters: {found} and a head of {head.shape} do not fit an encoder that takes "
                               f"{expected} and {(len(names), encoder.dim)}")  # fmt: skip
        digest = hashlib.sha256(json.dumps([encoder.identity, asdict(lora), list(names)], sort_keys=True).encode())
        for name, leaf in sorted((_named(factors) | {HEAD: head}).items()):
            digest.update(name.encode() + np.ascontiguousarray(leaf).tobytes())
        return cls(frozen, factors, head, tuple(names), lora, digest.hexdigest())

    @property
    def dim(self) -> int:
        """Rewards of a text: one a name."""
        return len(self.names)

    @property
    def renderer(self) -> Renderer:
        """How texts become tokens: as the encoder's do."""
        return self.frozen.renderer

    @property
    def joint(self) -> bool:
        """Whether rewards are of prompt and response together."""
        return self.frozen.joint

    @property
    def prompt(self) -> bool:
        """False: a prompt alone has no reward."""
        return False

    @property
    def kind(self) -> str:
        """What is read, for a reader."""
        return f"{self.frozen.kind}, {len(self.names)} adapters"

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides the rewards of a text: the cache key."""
        return {**self.frozen.identity, "adapters": self.digest}

    def __call__(self, tokens: Tokens) -> Item:
        """Encode Tokens [batch, length] as Item with embedding [batch, names], in float32."""
        rest = split(self.frozen.params, is_factor)[1]

        def one(learned: tuple[Any, Array]) -> Float[Array, " batch"]:
            factors, head = learned
            return self.frozen.replace(params=join(factors, rest))(tokens).embedding @ head

        rewards = jax.lax.map(one, (self.factors, self.head), batch_size=min(TOGETHER, len(self.names)))
        return Item(embedding=rewards.T)

    def select(self, name: str) -> TextEncoder:
        """The encoder with the adapter of one name, which embeds as that name's head reads. KeyError for no name."""
        if name not in self.names:
            raise KeyError(f"{name!r} has no adapter; there are {', '.join(self.names)}")
        own = jax.tree.map(lambda leaf: leaf[self.names.index(name)], self.factors)
        weights = hashlib.sha256(f"{self.digest} {name}".encode()).hexdigest()
        return self.frozen.replace(params=join(own, split(self.frozen.params, is_factor)[1]), weights=weights)

    def save(self, folder: str | Path, encoder: str) -> None:
        """Write one safetensors file into a folder, which `encoders.load` then takes; `encoder` names the encoder."""
        from safetensors.numpy import save

        base, folder_of_it = self.frozen, Path(encoder).expanduser()
        encoder = str(folder_of_it.resolve()) if folder_of_it.is_dir() else encoder  # wherever it is read from
        options = {"joint": base.joint, "pooling": base.pooling, "normalise": base.normalise, "dtype": base.dtype}
        about = {"names": list(self.names), "lora": asdict(self.lora), "encoder": encoder, "digest": self.digest,
                 "options": options | {"max_length": base.renderer.max_length}}  # fmt: skip
        arrays = {name: np.asarray(leaf) for name, leaf in (_named(self.factors) | {HEAD: self.head}).items()}
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_whole(Path(folder) / ADAPTERS, save(arrays, {"adapters": json.dumps(about)}))

    @classmethod
    def load(cls, folder: str | Path, load: Callable[..., Any]) -> StackedEncoder:
        """Read what `save` wrote; `load(name, **options)` gives its encoder. EncoderError where that is another one."""
        from safetensors import SafetensorError, safe_open

        path = Path(folder) / ADAPTERS
        try:
            with safe_open(path, framework="numpy") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
                about = json.loads((file.metadata() or {})["adapters"])
            encoder, lora = load(about["encoder"], **about["options"]), Lora(**about["lora"])
            like = factors_of(attach(encoder, lora, jax.random.key(0)))
            factors = jax.tree_util.tree_map_with_path(lambda at, _: jax.numpy.asarray(arrays[leaf_name(at)]), like)
            found = cls.of(encoder, lora, about["names"], factors, jax.numpy.asarray(arrays[HEAD]))
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise EncoderError(f"{path}: holds no stacked adapters ({error}); train them again") from error
        if found.digest != about["digest"]:
            raise EncoderError(f"{path}: was trained on another encoder than {about['encoder']!r} is now: bring its "
                               "weights back, or train again")  # fmt: skip
        return found


def require_no_prompt(encoder: TextEncoder) -> None:
    """Raise EncoderError for an encoder that embeds prompts alone."""
    if encoder.prompt:
        raise EncoderError("stacked adapters give a response one reward a name, and a prompt alone has none: load "
                           "the encoder without prompt=True, or with joint=True")  # fmt: skip


def is_factor(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return bool(re.search(FACTORS, name))


def factors_of(encoder: TextEncoder) -> Any:
    """The factors of an encoder with adapters, None elsewhere."""
    return split(encoder.params, is_factor)[0]


def _named(tree: Any) -> dict[str, Any]:
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
