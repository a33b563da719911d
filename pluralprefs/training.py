"""Fit shared parameters and a population by gradient, for families that Newton cannot fit at once.

`gradient_base` trains model, population and (for families whose users are not linear weights) the user table jointly,
an epoch per `lax.scan`, and returns what `pooling.fit_pooled` builds on: a function from a mask of rows to a model
and its population. The trained user deviations are dropped: `pooling` solves them again, with uncertainty, out of fold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from pluralprefs.data.batches import epoch
from pluralprefs.fitting import Rows, initial_root, row_log_odds, solve_level, strangers, updated_root
from pluralprefs.pooling import Base
from pluralprefs.train import comparison_loss, grouped, init_state, make_epoch_step, make_train_step
from pluralprefs.types import Item, Params, Reduction
from pluralprefs.users import Pooled, Users, gather, neutral, part_names, penalty

Report = Callable[[int, float], None]
LEARN_STRENGTH = frozenset(5 * 2**i for i in range(12))
FROZEN = (("users/.*(root|scale|residual)", "frozen"),)


def gradient_base(
    model: Any,
    items: Item,
    rows: Rows,
    pooled: Pooled,
    *,
    users: int,
    likelihood: Any,
    reduction: Reduction,
    optimizer: optax.GradientTransformation,
    epochs: int,
    batch_size: int,
    seed: int,
    validation: Rows | None = None,
    notes: dict[str, Any] | None = None,
    report: Report | None = None,
) -> Base:
    """Return base(mask): train from `model`'s initial values on the rows of the mask (None: all of them).

    `users` is the size of the user table that is trained beside the model, 0 for a population alone; the strength of
    its prior is learned by empirical Bayes after 5, 10, 20, 40, ... epochs. With `validation` rows the parameters are
    those after the epoch that predicts them best, whose number goes to `notes["epochs"]`. Rows outside of the mask have
    weight 0, so that every fold shares one compilation. Raises FloatingPointError where the loss is not finite.
    """
    start = Users.init(model, users=users, communities=0)
    if users:
        root = jnp.asarray(initial_root(model, start, items, strangers(rows), pooled.strength))
        start = start.replace(user_root=jnp.where(root > 0, jnp.maximum(root, 1e-3), 1.0))
    flat = rows.replace(community=np.full_like(rows.community, -1))
    flat = flat if users else strangers(flat)
    loss = comparison_loss(
        _gather_state,
        reduction=reduction,
        user_penalty=penalty if users else None,
        rows=float(rows.weight.sum()),
    )
    transform = grouped({"all": optimizer, "frozen": optax.set_to_zero()}, FROZEN, default="all")
    step = jax.jit(make_epoch_step(make_train_step(loss, transform)))
    trained: dict[bytes, tuple[Any, Users]] = {}

    def base(mask: np.ndarray | None) -> tuple[Any, Users]:
        key = b"" if mask is None else mask.tobytes()
        if key not in trained:
            weight = rows.weight if mask is None else np.where(mask, rows.weight, 0.0).astype(np.float32)
            record = notes if mask is None else None
            params = _run(step, transform, Params(model, start, likelihood), items, flat.replace(weight=weight), record)
            trained[key] = (
                params.model,
                Users.init(params.model, users=0, communities=0).replace(population=params.users.population),
            )
        return trained[key]

    def _run(step: Any, transform: Any, params: Params, items: Item, flat: Rows, record: Any) -> Params:
        state = init_state(params, transform, jax.random.key(seed))
        best = (np.inf, state.params)
        for number in range(epochs):
            if users and number in LEARN_STRENGTH:
                state = state.replace(params=_learn_strength(state.params, items, flat, users))
            state, metrics = step(state, (items, epoch(seed, number, flat, batch_size)))
            value = float(jnp.mean(metrics["loss"]))
            if not np.isfinite(value):
                raise FloatingPointError(f"the loss is {value} in epoch {number}: lower the learning rate")
            if report is not None:
                report(number, value)
            if validation is None or not len(validation.target):
                best = (0.0, state.params)
                continue
            nats = _validation_nats(state.params, items, validation, likelihood)
            if nats < best[0]:
                best = (nats, state.params)
                if record is not None:
                    record.update(epochs=number + 1, epochs_validation_nll=nats)
        return best[1]

    return base


def _validation_nats(params: Params, items: Item, rows: Rows, likelihood: Any) -> float:
    """Mean loss of rows of known users under their trained states."""
    logits = row_log_odds(params.model, params.users, items, rows)
    return float(jnp.mean(jax.vmap(likelihood)(jnp.asarray(logits, jnp.float32), jax.tree.map(jnp.asarray, rows))))


def _learn_strength(params: Params, items: Item, rows: Rows, users: int) -> Params:
    """One empirical-Bayes update of the user prior under which the rest is trained.

    The shared parameters take the shape that the prior leaves to them: a prior that is too narrow is made up for by
    steeper rewards, and the other way round. The gradient of the joint objective would let it collapse.
    """
    names = np.array(part_names(neutral(params.model)))
    root = np.where(names == "gain", 0.0, np.asarray(params.users.user_root)).astype(np.float32)
    table = Users.init(params.model, users=0, communities=0).replace(population=params.users.population)
    unit = np.asarray(rows.user)
    moments = solve_level(params.model, table, items, strangers(rows), unit, users, root)
    new = updated_root(root, moments, tuple(names))
    return params.replace(users=params.users.replace(user_root=jnp.where(new > 0, jnp.maximum(new, 1e-3), 1.0)))


def _gather_state(users: Users, community: Array, user: Array) -> Any:
    base, deviation = gather(users, community, user)
    return jax.tree.map(jnp.add, base, deviation.state)


def temperature_scale(model: Any, users: Users, items: Item, validation: Rows) -> Float[np.ndarray, ""]:
    """Inverse temperature that minimises the validation nats, by golden-section search over its logarithm.

    Hinge and IPO scores are not log-odds: without this no probability of theirs may be reported.
    """
    logits = row_log_odds(model, users, items, strangers(validation))

    def nats(log_scale: float) -> float:
        scaled = logits * np.exp(log_scale)
        return float((validation.target * np.logaddexp(0, -scaled)
                      + (1 - validation.target) * np.logaddexp(0, scaled)).mean())  # fmt: skip

    low, high, golden = -6.0, 6.0, (np.sqrt(5) - 1) / 2
    for _ in range(60):
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if nats(a) < nats(b) else (a, high)
    return np.asarray(np.exp((low + high) / 2), np.float32)
