"""Fit shared parameters and a population by gradient, for families that Newton cannot fit at once.

`gradient_base` trains model, population and (for families whose users are not linear weights) the user table jointly,
an epoch per `lax.scan`, and returns what `pooling.fit_pooled` builds on: a function from a mask of rows to a model
and its population. The trained user deviations are dropped: `pooling` solves them again, with uncertainty, out of fold.

With a folder for checkpoints an interrupted fit continues where it was: every training on a mask has its own, saved
when an epoch ends (no more often than `CHECKPOINT_SECONDS`) and when the training ends, so that what comes before it in
the seed is read back, not repeated. A batch is a function of (seed, epoch): the bits are those of a fit never stopped.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from pluralprefs.data.batches import epoch, steps_per_epoch
from pluralprefs.fitting import Rows, initial_root, row_log_odds, solve_level, strangers, updated_root
from pluralprefs.pooling import Base
from pluralprefs.train import (
    CheckpointStore,
    comparison_loss,
    grouped,
    init_state,
    make_epoch_step,
    make_train_step,
    make_transformed_step,
)
from pluralprefs.types import Item, Params, Reduction, TrainState
from pluralprefs.users import Pooled, Users, gather, neutral, part_names, penalty

Report = Callable[[int, int, float], None]
CHECKPOINT_SECONDS = 10.0  # what a kill can cost
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
    checkpoints: Path | None = None,
    transform: Callable[..., Any] | None = None,
) -> Base:
    """Return base(mask): train from `model`'s initial values on the rows of the mask (None: all of them).

    `users` is the size of the user table that is trained beside the model, 0 for a population alone; the strength of
    its prior is learned by empirical Bayes after 5, 10, 20, 40, ... epochs. With `validation` rows the parameters are
    those after the epoch that predicts them best, whose number goes to `notes["epochs"]`. Rows outside of the mask have
    weight 0, so that every fold shares one compilation. `report(epochs done, epochs, loss)` is called after each epoch;
    `transform(batch, key, step, steps=all of them)` changes each batch; `checkpoints` is a folder that belongs to this
    very fit, from which it continues (None: keep none). Raises FloatingPointError where the loss is not finite.
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
    update = grouped({"all": optimizer, "frozen": optax.set_to_zero()}, FROZEN, default="all")
    one_step = make_train_step(loss, update)
    if transform is not None:
        steps = epochs * steps_per_epoch(len(rows.target), batch_size)
        one_step = make_transformed_step(one_step, partial(transform, steps=steps))
    step = jax.jit(make_epoch_step(one_step))
    asked = validation if validation is not None and len(validation.target) else None
    training = Training(
        step, items, partial(_index_epoch, seed, batch_size),
        None if asked is None else partial(_validation_nats, items=items, rows=asked, likelihood=likelihood),
        epochs, report, partial(_learn_strength, items=items, users=users) if users else None,
    )  # fmt: skip
    trained: dict[bytes, tuple[Any, Users]] = {}

    def base(mask: np.ndarray | None) -> tuple[Any, Users]:
        key = b"" if mask is None else mask.tobytes()
        if key not in trained:
            weight = rows.weight if mask is None else np.where(mask, rows.weight, 0.0).astype(np.float32)
            state = init_state(Params(model, start, likelihood), update, jax.random.key(seed))
            folder = checkpoints and checkpoints / hashlib.blake2b(key, digest_size=8).hexdigest()
            best = training(state, flat.replace(weight=weight), folder)
            if mask is None and notes is not None and best.epochs:
                notes.update(epochs=best.epochs, epochs_validation_nll=best.nats)
            population = Users.init(best.params.model, users=0, communities=0)
            trained[key] = best.params.model, population.replace(population=best.params.users.population)
        return trained[key]

    return base


@dataclass(frozen=True)
class Training:
    """What trainings on several sets of rows share; called with a state and rows, it trains and returns the best.

    step     jitted, an epoch long: (state, (items, batches)) -> (state, metrics)
    batch    the batches of an epoch, a pure function of (number, rows)
    nats     validation nats of parameters, None where the last parameters are the best
    learn    what is learned not by gradient but after the epochs of `LEARN_STRENGTH`: (params, rows) -> params
    """

    step: Any
    items: Item
    batch: Callable[[int, Rows], Any]
    nats: Callable[[Params], float] | None
    epochs: int
    report: Report | None
    learn: Callable[[Params, Rows], Params] | None = None

    def __call__(self, state: TrainState, rows: Rows, folder: Path | None) -> _Best:
        with closing(_Kept(folder, self.epochs)) as kept:
            done, state, best = kept.latest(state)
            for number in range(done, self.epochs):
                state, value = self._epoch(number, state, rows)
                best = self._better(number + 1, state.params, best)
                kept.save(number + 1, state, best)
                if self.report is not None:
                    self.report(number + 1, self.epochs, value)
        return best

    def _epoch(self, number: int, state: TrainState, rows: Rows) -> tuple[TrainState, float]:
        if self.learn is not None and number in LEARN_STRENGTH:
            state = state.replace(params=self.learn(state.params, rows))
        state, metrics = self.step(state, (self.items, self.batch(number, rows)))
        value = float(jnp.mean(metrics["loss"]))
        if not np.isfinite(value):
            raise FloatingPointError(f"the loss is {value} in epoch {number}: lower the learning rate")
        return state, value

    def _better(self, done: int, params: Params, best: _Best) -> _Best:
        if self.nats is None:
            return _Best(0.0, 0, params)
        nats = self.nats(params)
        return _Best(nats, done, params) if nats < best.nats else best


class _Best(NamedTuple):
    """The parameters that predict validation rows best, and after how many epochs; 0 epochs where nothing was asked."""

    nats: float
    epochs: int
    params: Params


class _Kept:
    """Checkpoints of one training; without a folder it keeps nothing."""

    def __init__(self, folder: Path | None, epochs: int) -> None:
        self.store = None if folder is None else CheckpointStore(folder, keep=1)
        self.epochs, self.saved = epochs, time.monotonic()

    def latest(self, state: TrainState) -> tuple[int, TrainState, _Best]:
        """Epochs done, the state after them and the best parameters until then; `state` itself at the start."""
        start = _Best(np.inf, 0, state.params)
        done = None if self.store is None else self.store.latest()
        if self.store is None or done is None:
            return 0, state, start
        found = self.store.restore(_leaves(state, start))
        best = _Best(float(found["nats"]), int(found["epochs"]), found["best"])
        return done, found["state"], best

    def save(self, done: int, state: TrainState, best: _Best) -> None:
        """Save after the last epoch, and after another where the last save is old."""
        old = time.monotonic() - self.saved >= CHECKPOINT_SECONDS
        if self.store is not None and (old or done == self.epochs):
            self.store.save(done, _leaves(state, best))
            self.saved = time.monotonic()

    def close(self) -> None:
        if self.store is not None:
            self.store.close()


def _leaves(state: TrainState, best: _Best) -> dict[str, Any]:
    numbers = {"nats": np.asarray(best.nats, np.float32), "epochs": np.asarray(best.epochs, np.int32)}
    return {"state": state, "best": best.params, **numbers}


def _validation_nats(params: Params, items: Item, rows: Rows, likelihood: Any) -> float:
    """Mean loss of rows of known users under their trained states."""
    logits = row_log_odds(params.model, params.users, items, rows)
    return float(jnp.mean(jax.vmap(likelihood)(jnp.asarray(logits, jnp.float32), jax.tree.map(jnp.asarray, rows))))


def _index_epoch(seed: int, batch_size: int, number: int, rows: Rows) -> Rows:
    return epoch(seed, number, rows, batch_size)


def _learn_strength(params: Params, rows: Rows, *, items: Item, users: int) -> Params:
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
