"""What does a community like, given comparisons of its members, whether or not training knew it?

A community is a deviation from the population (`users`), known through its members: rows are taken as if all of them
were one person's. What that person leaves out, that members differ, is in the scale on which the community is read, and
in the interval of its profile (`profiles`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from pluralprefs.adapting import adapt_units
from pluralprefs.fitting import Fitted, strangers, take
from pluralprefs.pooling import tempered
from pluralprefs.types import Covariance, Item, UserPosterior
from pluralprefs.users import Users, neutral, part_names


def with_new(fitted: Fitted, items: Item, count: int) -> Users:
    """The table with `count` communities, those beyond its own at their posterior means given the rows that name them.

    All else stays as it was, the spread of communities too: the same that a fit to the rows would find for them, but
    for what they would teach the rest.
    """
    users = fitted.users
    known = int(users.community.gain.shape[0])
    grown = jax.tree.map(lambda x: jnp.zeros((count - known, *x.shape[1:]), x.dtype), users.community)
    grown = users.replace(community=jax.tree.map(lambda a, b: jnp.concatenate([a, b]), users.community, grown))
    _, found = community_posteriors(replace(fitted, users=grown), items, range(known, count))
    means = [posterior.mean for posterior in found.values()]
    return users.replace(
        community=jax.tree.map(lambda x, *new: jnp.concatenate([x, jnp.stack(new)]), users.community, *means)
    )


def community_posteriors(fitted: Fitted, items: Item, numbers: Sequence[int]) -> tuple[Users, dict[int, UserPosterior]]:
    """Deviations of some communities given the training rows, and the table that they depart from: the population.

    They are those of the fit. Rows are weighed as it weighs them for communities, `fitted.rows` as it does for users;
    and log-odds have the scale that they had before users were told apart: a crowd of differing members is flatter than
    each of them, and it is the crowd that a community's rows are of. In the table that is returned they have the scale
    of one member.
    """
    power = fitted.notes.get("population_temper", 1.0) / fitted.notes.get("temper", 1.0)
    users, rows = fitted.users, tempered(strangers(fitted.rows), power)
    state = np.array(part_names(neutral(fitted.model))) != "gain"  # care is a user's alone
    root = jnp.where(state if users.community_root.ndim == 1 else state[:, None], users.community_root, 0.0)
    alone = users.replace(
        community=jax.tree.map(lambda x: x[:0], users.community), user_root=root, residual=jnp.zeros(())
    )
    unit = np.asarray(rows.community)
    rows = rows.replace(community=np.full_like(unit, -1), offset=np.zeros_like(rows.offset))
    known = np.isin(unit, numbers)
    crowd = alone.replace(scale=jnp.float32(fitted.notes.get("inverse_temperature", 1.0)))
    found = adapt_units(fitted.model, crowd, items, take(rows, np.flatnonzero(known)), unit[known])
    prior = UserPosterior(neutral(fitted.model), Covariance(root, jnp.zeros((0, len(state)))))
    return alone, {number: found.get(number, prior) for number in numbers}
