"""The tables of families: every law of test_laws.py runs on every row; those of INFERRING pass more of them."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from pluralprefs.adapt import stepped_user
from pluralprefs.models.attribute_attention import AttributeAttention
from pluralprefs.models.bradley_terry import BradleyTerry
from pluralprefs.models.fast_weights import FastWeights
from pluralprefs.models.ideal_point import IdealDirection, IdealPoint
from pluralprefs.models.low_rank import LowRank
from pluralprefs.models.meta_reward import MetaReward
from pluralprefs.models.neural_process import NeuralProcess
from pluralprefs.models.residual import Residual
from pluralprefs.models.set_pooled import SetPooled
from pluralprefs.models.variational import Variational
from pluralprefs.types import Comparisons, Item

DIM, ITEMS = 4, 6
KEY = jax.random.key(0)
small_variational = partial(Variational.init, key=KEY, dim=DIM, latent=2, width=3, hidden=(4,))
small_meta = partial(MetaReward.init, key=KEY, dim=DIM, adapter=stepped_user, rewards=3)


def residual() -> Residual:
    """A residual whose population, prior and trust all matter."""
    model = Residual.init(population=FAMILIES["low_rank_free"](), family=FAMILIES["neural_process"](), knots=3, dim=DIM)
    prior = model.family.infer_user(rows(items(0), items(1), np.ones(ITEMS), np.zeros(ITEMS))).mean
    others = jax.tree.map(lambda x: x[None] + jax.random.normal(KEY, (5, *x.shape)), prior)
    return model.replace(weights=jnp.asarray([0.5, -1.0]), prior=prior, others=others, most=jnp.asarray([4.0, 3.0]),
                         trust=jnp.asarray([[0.0, 0.4, 0.8], [0.0, 0.1, 0.2]]),
                         even=jnp.asarray([[0.0, 0.2, 0.3], [0.0, 0.1, 0.2]]),
                         scale=jnp.asarray([[1.1, 1.2, 1.4], [1.1, 1.3, 1.5]]),
                         efficiency=jnp.asarray([[0.0, 0.5, 0.8], [0.0, 0.2, 0.3]]), spread=jnp.asarray(0.9),
                         axes=0.5 * jax.random.normal(KEY, (5 + DIM, 3)))  # fmt: skip


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
    "fast_weights": lambda: FastWeights.init(key=KEY, dim=DIM, width=3),
    "variational": small_variational,
    "neural_process": lambda: NeuralProcess.init(key=KEY, dim=DIM, width=4, latents=2, layers=1, heads=2),
    "meta_reward": lambda: small_meta().replace(start=jnp.asarray([0.3, -0.2, 0.1])),
    "set_pooled": lambda: SetPooled.init(key=KEY, dim=DIM, width=3, hidden=4),
}
INFERRING = {name: FAMILIES[name] for name in ("fast_weights", "variational", "neural_process", "set_pooled")} | {
    "fast_weights_sum": lambda: FastWeights.init(key=KEY, dim=DIM, width=3, normaliser="sum"),
    "swap_symmetric": partial(small_variational, symmetric=True),
    "meta_reward": FAMILIES["meta_reward"],
    "residual": residual,
}
FAMILIES = {name: cache(draw) for name, draw in FAMILIES.items()}  # they are values: one of each serves every test
INFERRING = {name: FAMILIES.get(name, cache(draw)) for name, draw in INFERRING.items()}


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
