"""Attribute attention: PrefPalette (arXiv 2507.13541). Latent attributes of a response, weighed by its context.

    q   = W_q h + b_q                          `query`          k_i = W_k e_i + b_k + a_i      `key`, `identity` (a_i)
    s_i = v' tanh(q + k_i) + b_v + c_ui        `score`          alpha = softmax(s) over the attributes at hand
    h'  = h + gamma sum_i alpha_i V_i e_i      `gain`, `value`  r = w . h' + sum_i p_ui z_i    `head`

h is the encoded response in its context (`Item.embedding`), e_i the embedding of attribute i by its own predictor
(`Item.attributes`, [attributes, attribute_dim], whose first column z_i is the predictor's calibrated score), and
`Item.attribute_mask` says which attributes are at hand: with none, r = w . h exactly. The user state holds c_u
("attention") and p_u ("preference"), one number an attribute, pooled over population, communities and users like any
other state: one model serves all communities, and a community may dislike an attribute, which attention alone cannot
say. Zero states give the paper's model back, and `paper=True` leaves out what we add (a_i, V_i, c_u, p_u).

Where we depart: the paper has one model per community and V_i = I, which needs attribute embeddings as wide as h;
a_i, so that two attributes with equal embeddings may count differently; c_u and p_u. `context=False` is the paper's
ablation, s_i = v' tanh(k_i) + b_v. The head and the sums are float32 whatever the encoder's precision.

Without predictors (ours too): `stand_in=True` puts S_i'h + s_i in the place of an e_i that is not at hand, so that
attention, values and everybody's preferences go on to apply. `taught` fits these maps by ridge regression of e_i on h
before the comparisons, on any texts that predictors have read, judged or not; comparisons never move them. Attribute
dropout then teaches all else to live with them.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pluralprefs.models.layers import ridge
from pluralprefs.pytrees import pytree, static
from pluralprefs.types import Item, Key, Replaceable


class _Read(NamedTuple):
    """Of an item: w . h, and of every attribute its score before c_u, w . V_i e_i, z_i, and whether it counts."""

    own: Float[Array, "*batch"]
    score: Float[Array, "*batch attributes"]
    shown: Float[Array, "*batch attributes"]
    calibrated: Float[Array, "*batch attributes"]
    mask: Bool[Array, "*batch attributes"]


@pytree
class AttributeAttention(Replaceable):
    """See the module. Sizes: dim of h, attributes A, attribute_dim of e_i, width of the attention."""

    query: dict[str, Array]
    key: dict[str, Array]
    identity: Float[Array, "attributes width"]
    score: dict[str, Array]
    value: Float[Array, "attributes attribute_dim dim"]
    gain: Float[Array, ""]
    head: Float[Array, " dim"]
    stand_in: dict[str, Array] | None = None
    paper: bool = static(default=False)
    context: bool = static(default=True)
    is_reduced: bool = static(default=False)

    @classmethod
    def init(
        cls, *, key: Key, dim: int, attributes: int, attribute_dim: int = 1, width: int | None = None,
        paper: bool = False, context: bool = True, stand_in: bool = False, **_: Any,
    ) -> Self:  # fmt: skip
        """Draw parameters. `width` of the attention is dim / 4 by default; the gain starts at 0.5.

        `paper` gives the published model and raises ValueError unless attribute_dim = dim, and with a `stand_in`, which
        says nothing (zeros) until it is `taught`.
        """
        if not attributes:
            raise ValueError("attribute_attention needs attributes: give the data `attr:` columns, or predictors")
        if paper and attribute_dim != dim:
            raise ValueError(f"paper=True adds raw embeddings of size {attribute_dim} to {dim}: the two must be equal")
        if paper and stand_in:
            raise ValueError("paper=True has no stand-in for predictors: without them its reward is w . h")
        width = max(dim // 4, 1) if width is None else width
        keys = jax.random.split(key, 5)
        eye = jnp.broadcast_to(jnp.eye(attribute_dim, dim), (attributes, attribute_dim, dim))
        value = eye if attribute_dim == dim else _draw(keys[4], attributes, attribute_dim, dim)
        return cls(
            query={"kernel": _draw(keys[0], dim, width), "bias": jnp.zeros(width)},
            key={"kernel": _draw(keys[1], attribute_dim, width), "bias": jnp.zeros(width)},
            identity=jnp.zeros((attributes, width)),
            score={"kernel": _draw(keys[2], width, 1)[:, 0], "bias": jnp.zeros(())},
            value=value,
            gain=jnp.asarray(0.5),
            head=_draw(keys[3], dim, 1)[:, 0],
            stand_in=_blank(dim, attributes, attribute_dim) if stand_in else None,
            paper=paper,
            context=context,
        )  # fmt: skip

    def init_user(self) -> dict[str, Array]:
        attributes = self.identity.shape[0]
        return {"attention": jnp.zeros(attributes), "preference": jnp.zeros(attributes)}

    @property
    def learns(self) -> bool:
        """`types.LearnsFromItems`: whether there is a stand-in."""
        return self.stand_in is not None

    def taught(self, items: Item) -> Self:
        """The model whose stand-in reads the attributes of these items [items] from their embeddings, as far as it can.

        Ridge regression; its strength, an attribute's own, is chosen by generalised cross-validation. An attribute that
        no item has stays zero. Without a stand-in the model comes back as it is.
        """
        if self.stand_in is None or items.attributes is None:
            return self
        found = {name: np.array(leaf) for name, leaf in self.stand_in.items()}
        h, e = np.asarray(items.embedding, np.float64), np.asarray(items.attributes)
        mask = np.ones(e.shape[:2], bool) if items.attribute_mask is None else np.asarray(items.attribute_mask)
        for pattern in np.unique(mask, axis=1).T:  # attributes of the same items are solved together
            own = (mask == pattern[:, None]).all(0)
            if pattern.any():
                kernel, bias = ridge(h[pattern], e[pattern][:, own].reshape(pattern.sum(), -1))
                found["kernel"][:, own] = kernel.reshape(h.shape[1], own.sum(), -1)
                found["bias"][own] = bias.reshape(own.sum(), -1)
        return self.replace(stand_in={name: jnp.asarray(leaf) for name, leaf in found.items()})

    def attribute_weights(self, user: dict[str, Array], item: Item) -> Float[Array, " attributes"]:
        """The attention alpha of a response's attributes, which sums to 1; 0 for one neither at hand nor stood in."""
        return self._weights(user, self._read(item))

    def reward(self, user: dict[str, Array], item: Item) -> Float[Array, ""]:
        read = self._read(item)
        reward = read.own + self.gain * (self._weights(user, read) @ read.shown)
        if self.paper:
            return reward
        return reward + jnp.sum(jnp.where(read.mask, user["preference"] * read.calibrated, 0.0))

    def log_odds(self, user: dict[str, Array], first: Item, second: Item) -> Float[Array, ""]:
        return self.reward(user, first) - self.reward(user, second)

    def reduced(self, items: Item) -> tuple[Self, Item]:
        """`types.ReducesItems`: items are w . h and, of every attribute, its score without the user, w . V e and z."""
        if self.is_reduced:
            return self, items
        read = jax.lax.map(self._read, items, batch_size=4096)  # keys of all items at once would not fit
        attributes = jnp.stack([read.score, read.shown, read.calibrated], axis=-1)
        less = Item(embedding=read.own[:, None], attributes=attributes, attribute_mask=read.mask, index=items.index)
        return self.replace(is_reduced=True), less

    def _weights(self, user: dict[str, Array], read: _Read) -> Float[Array, " attributes"]:
        scores = read.score if self.paper else read.score + user["attention"]
        top = jax.lax.stop_gradient(jnp.max(jnp.where(read.mask, scores, -jnp.inf), initial=-1e30))
        weights = jnp.where(read.mask, jnp.exp(jnp.where(read.mask, scores - top, 0.0)), 0.0)
        total = jnp.sum(weights)  # 1 or more, for the highest score; 0 where no attribute is at hand
        return weights / jnp.where(total > 0, total, 1.0)

    def _read(self, item: Item) -> _Read:
        """All that the reward needs to know of an item, whoever the user is."""
        if self.is_reduced:
            assert item.attributes is not None
            assert item.attribute_mask is not None
            score, shown, calibrated = item.attributes.T
            return _Read(item.embedding[0], score, shown, calibrated, item.attribute_mask)
        embeddings, mask = self._attributes(item)
        h = _wide(item.embedding)
        keys = embeddings @ self.key["kernel"] + self.key["bias"][None, :]
        keys = keys if self.paper else keys + self.identity
        if self.context:
            query = h @ self.query["kernel"] + self.query["bias"]
            keys = keys + query[None, :]
        scores = jnp.tanh(keys) @ self.score["kernel"] + self.score["bias"]
        # head . V_i e_i as (V_i' head) . e_i: the sum over h is the same for all responses, not one for each
        head = _wide(self.head)
        shown = head[None, :] if self.paper else jnp.einsum("adh,h->ad", _wide(self.value), head)
        return _Read(head @ h, scores, jnp.sum(embeddings * shown, axis=1), embeddings[:, 0], mask)

    def _attributes(self, item: Item) -> tuple[Float[Array, "attributes attribute_dim"], Bool[Array, " attributes"]]:
        """Embeddings and which of them count: the others are zero, or their stand-ins; no gradient into predictors."""
        attributes, attribute_dim, _ = self.value.shape
        embeddings, mask = jnp.zeros((attributes, attribute_dim)), jnp.zeros(attributes, bool)
        if item.attributes is not None:
            mask = jnp.ones(attributes, bool) if item.attribute_mask is None else item.attribute_mask
            embeddings = jnp.where(mask[:, None], _wide(jax.lax.stop_gradient(item.attributes)), 0.0)
        if self.stand_in is None:
            return embeddings, mask
        read = jnp.einsum("h,hae->ae", _wide(item.embedding), self.stand_in["kernel"]) + self.stand_in["bias"]
        return jnp.where(mask[:, None], embeddings, jax.lax.stop_gradient(read)), jnp.ones(attributes, bool)


def _blank(dim: int, attributes: int, attribute_dim: int) -> dict[str, Array]:
    return {"kernel": jnp.zeros((dim, attributes, attribute_dim)), "bias": jnp.zeros((attributes, attribute_dim))}


def _wide(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _draw(key: Key, *shape: int) -> Array:
    return jax.random.normal(key, shape) / jnp.sqrt(shape[-2])
