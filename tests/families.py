"""The table of families: every law of test_laws.py runs on every row."""

import jax
import jax.numpy as jnp
import numpy as np

from pluralprefs.models.attribute_attention import AttributeAttention
from pluralprefs.models.bradley_terry import BradleyTerry
from pluralprefs.models.ideal_point import IdealDirection, IdealPoint
from pluralprefs.models.low_rank import LowRank
from pluralprefs.types import Comparisons, Item

DIM, ITEMS = 4, 6
KEY = jax.random.key(0)
FAMILIES = {
    "bradley_terry": lambda: BradleyTerry.init(key=KEY, dim=DIM, items=ITEMS, parts={"linear": 3, "kernel": 1}),
    "bradley_terry_mlp": lambda: BradleyTerry.init(key=KEY, dim=DIM, hidden=(5,), item_effects=False),
    "low_rank_free": lambda: LowRank.init(key=KEY, dim=DIM, rank=2),
    "low_rank_mlp": lambda: LowRank.init(key=KEY, dim=DIM, rank=2, hidden=(5,)),
    "lore": lambda: LowRank.init(key=KEY, dim=DIM, rank=3, weights="simplex"),
    "pal_a": lambda: IdealPoint.init(key=KEY, dim=DIM, prototypes=3, point=5),
    "pal_a_squared": lambda: IdealPoint.init(key=KEY, dim=DIM, prototypes=3, point=5, squared=True),
    "attribute_attention": lambda: AttributeAttention.init(key=KEY, dim=DIM, attributes=3, attribute_dim=DIM, width=5),
    "prefpalette": lambda: AttributeAttention.init(key=KEY, dim=DIM, attributes=3, attribute_dim=DIM, paper=True),
    "pal_b": lambda: IdealDirection.init(key=KEY, dim=DIM, prompt_dim=3, prototypes=2, point=5),
}


def items(seed: int, count: int = ITEMS, prompt: bool = True) -> Item:
    """Items of one prompt, all seen in training."""
    draw = np.random.default_rng(seed)
    hidden = np.broadcast_to(draw.normal(size=3), (count, 3)).astype(np.float32)
    embedding = draw.normal(size=(count, DIM)).astype(np.float32)
    attributes = draw.normal(size=(count, 3, DIM)).astype(np.float32)
    item = Item(
        embedding=embedding, prompt=hidden if prompt else None, attributes=attributes,
        attribute_mask=np.ones((count, 3), bool), index=np.arange(count, dtype=np.int32),
    )  # fmt: skip
    return arrays(item)


def user(model, seed: int):
    """A random user state of a family."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape), jnp.float32), model.init_user())


def rows(first, second, target, weight=None) -> Comparisons:
    """Rows with everything unknown but the items and the targets."""
    n = len(target)
    none = np.full(n, -1, np.int32)
    weight = np.ones(n, np.float32) if weight is None else np.asarray(weight, np.float32)
    made = Comparisons(
        first=first, second=second, target=np.asarray(target, np.float32), tie=np.zeros(n, bool), user=none,
        community=none, rater=none, source=none, offset=np.zeros(n, np.float32), weight=weight,
    )  # fmt: skip
    return arrays(made)


def arrays(tree):
    return jax.tree.map(jnp.asarray, tree)


def pick(tree, index):
    return jax.tree.map(lambda x: x[index], tree)
