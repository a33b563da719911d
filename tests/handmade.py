"""A run that nothing was fitted for: a family with drawn parameters, two communities, attribute columns as features."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pluralprefs.data import batches, comparisons
from pluralprefs.encoders.attributes import AttributeEncoder
from pluralprefs.experiment import Experiment
from pluralprefs.models.bradley_terry import BradleyTerry
from pluralprefs.registry import RunFolder
from pluralprefs.run import Run
from pluralprefs.users import Users


def handmade(table, model=None, *, base="handmade", residual=0.0, population=1.0):
    """A run for tables with the columns x and y; communities "a" and "b" differ, users' strength is 1 a coordinate."""
    items = batches.item_table(table)
    encoder = AttributeEncoder.fit(items, items["item_key"])
    model = model or BradleyTerry.init(key=jax.random.key(0), dim=encoder.dim, item_effects=False)
    users, draw = Users.init(model, users=0, communities=2, strength=1.0), np.random.default_rng(0)
    drawn = lambda x, std: jnp.asarray(std * draw.normal(size=x.shape), jnp.float32)  # noqa: E731
    users = users.replace(
        population=jax.tree.map(lambda x: drawn(x, population), users.population), residual=jnp.float32(residual),
        community=users.community.replace(state=jax.tree.map(lambda x: drawn(x, 0.5), users.community.state)),
    )  # fmt: skip
    experiment = Experiment(data=partial(comparisons.read, base), model=BradleyTerry.init)
    return Run(
        folder=RunFolder(base), experiment=experiment, model=model, users=users, maps=None, encoder=encoder,
        vocabulary=batches.Vocabulary((), ("a", "b"), (), (), ()), attributes=None, notes={}, rows=None, items=None,
        judged=(), fingerprint=base,
    )  # fmt: skip
