"""Fit shared parameters and a population by gradient, for families that Newton cannot fit at once.

`gradient_bases` trains model, population and (for families whose users are not linear weights) the user table jointly,
an epoch per `lax.scan`, and returns what `pooling.fit_pooled` builds on: a function from a mask of rows to a model
and its population. The trained user deviations are dropped: `pooling` solves them again, with uncertainty, out of fold.

Several seeds may train together, under one `vmap`: the same rows in another order from other initial values. An
accelerator that one small model leaves idle is then filled; a CPU is not faster for it (LOG.md).

With a folder for checkpoints an interrupted fit continues where it was: every training on a mask has its own, saved
when an epoch ends (no more often than `CHECKPOINT_SECONDS`) and when the training ends, so that what comes before it in
the seed is read back, not repeated. A batch is a function of (seed, epoch): the bits are those of a fit never stopped.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from pluralprefs.data.batches import epoch, steps_per_epoch
from pluralprefs.fitting import Rows, initial_root, row_log_odds, solve_level, strangers, updated_root
from pluralprefs.hosts import agreed, all_devices, everywhere, here, split_rows, tables_divided, whole
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
FROZEN = (("users/.*(root|scale|residual)|^model/stand_in/", "frozen"),)  # what other means than gradients fit


class Together:
    """Seeds that are trained by one program. What it trains for the first is kept for the others.

    `reports` has the ear of each seed, by seed; `checkpoints` is a folder that belongs to these seeds (None: keep
    none).
    """

    def __init__(self, reports: Mapping[int, Report | None], checkpoints: Path | None = None) -> None:
        self.reports, self.checkpoints = dict(reports), checkpoints
        self.stages: dict[str, tuple[list[Base], list[dict[str, Any]]]] = {}

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(self.reports)

    def base(
        self, seed: int, stage: str, epochs: int, fit: Callable[..., list[Base]]
    ) -> tuple[Base, dict[str, Any]]:  # fmt: skip
        """The base of a seed in a stage, and its notes: `fit` is `gradient_bases` without what is kept here.

        A stage after the first trains each seed for as many epochs as the first chose for it.
        """
        if stage not in self.stages:
            first = next(iter(self.stages.values()), None)
            notes = [{"epochs": epochs} for _ in self.seeds] if first is None else [
                {"epochs": found["epochs"]} for found in first[1]]  # fmt: skip
            bases = fit(
                seeds=self.seeds, epochs=[found["epochs"] for found in notes], notes=notes,
                reports=tuple(self.reports.values()), checkpoints=self.checkpoints and self.checkpoints / stage,
            )  # fmt: skip
            bases[0](None)  # the folds are trained for as many epochs as suit all rows
            self.stages[stage] = bases, notes
        bases, notes = self.stages[stage]
        place = self.seeds.index(seed)
        return bases[place], dict(notes[place])


def gradient_bases(
    models: Sequence[Any],
    items: Item,
    rows: Rows,
    pooled: Pooled,
    *,
    users: int,
    likelihood: Any,
    reduction: Reduction,
    optimizer: optax.GradientTransformation,
    epochs: Sequence[int],
    batch_size: int,
    seeds: Sequence[int],
    validation: Rows | None = None,
    notes: Sequence[dict[str, Any]] | None = None,
    reports: Sequence[Report | None] | None = None,
    checkpoints: Path | None = None,
    transform: Callable[..., Any] | None = None,
) -> list[Base]:
    """Return base(mask) of each seed: train from its model's initial values on the rows of the mask (None: all).

    `models`, `epochs`, `notes` and `reports` have one entry a seed. The first base that is asked for a mask trains it
    for all seeds. `users` is the size of the user table that is trained beside the model, 0 for a population alone; the
    strength of its prior is learned by empirical Bayes after 5, 10, 20, 40, ... epochs. With `validation` rows the
    parameters are those after the epoch that predicts them best, whose number goes to `notes["epochs"]`. Rows outside
    of the mask have weight 0, so that every fold shares one compilation. `report(epochs done, epochs, loss)` is called
    after each epoch; `transform(batch, key, step, steps=all of them)` changes each batch; `checkpoints` is a folder
    that belongs to this very fit, from which it continues (None: keep none). Raises FloatingPointError where a loss is
    not finite.
    """
    starts = [first_users(model, items, rows, pooled, users) for model in models]
    flat = rows.replace(community=np.full_like(rows.community, -1))
    flat = flat if users else strangers(flat)
    loss = comparison_loss(
        gather_state,
        reduction=reduction,
        user_penalty=penalty if users else None,
        rows=float(rows.weight.sum()),
    )
    update = grouped({"all": optimizer, "frozen": optax.set_to_zero()}, FROZEN, default="all")
    one_step = make_train_step(loss, update)
    steps = [count * steps_per_epoch(len(rows.target), batch_size) for count in epochs]
    asked = validation if validation is not None and len(validation.target) else None
    training = Training(
        _epoch_step(one_step, transform, steps), items,
        lambda number, masked: split_rows(stacked([epoch(seed, number, masked, batch_size) for seed in seeds])),
        None if asked is None else partial(row_nats, items=items, rows=asked, likelihood=likelihood),
        tuple(epochs), tuple(reports or (None,) * len(seeds)),
        partial(_learn_strength, items=items, users=users) if users else None,
    )  # fmt: skip
    trained: dict[bytes, list[tuple[Any, Users]]] = {}

    def base(place: int, mask: np.ndarray | None) -> tuple[Any, Users]:
        key = b"" if mask is None else mask.tobytes()
        if key not in trained:
            weight = rows.weight if mask is None else np.where(mask, rows.weight, 0.0).astype(np.float32)
            states = [
                init_state(Params(model, start, likelihood), update, jax.random.key(seed))
                for model, start, seed in zip(models, starts, seeds, strict=True)
            ]
            folder = checkpoints and checkpoints / hashlib.blake2b(key, digest_size=8).hexdigest()
            best = training(states, flat.replace(weight=weight), folder)
            if mask is None and notes is not None:
                for own, found in zip(notes, best, strict=True):
                    own.update({"epochs": found.epochs, "epochs_validation_nll": found.nats} if found.epochs else {})
            trained[key] = [_population_alone(found.params) for found in best]
        return trained[key][place]

    return [partial(base, place) for place in range(len(models))]


def first_users(model: Any, items: Item, rows: Rows, pooled: Pooled, users: int) -> Users:
    """The user table that training starts from."""
    start = Users.init(model, users=users, communities=0)
    if not users:
        return start
    root = jnp.asarray(initial_root(model, start, items, strangers(rows), pooled.strength))
    return start.replace(user_root=jnp.where(root > 0, jnp.maximum(root, 1e-3), 1.0))


def _population_alone(params: Params) -> tuple[Any, Users]:
    population = Users.init(params.model, users=0, communities=0)
    return params.model, population.replace(population=params.users.population)


def _epoch_step(one_step: Any, transform: Callable[..., Any] | None, steps: Sequence[int]) -> Any:
    """A jitted epoch of one seed, or of several; `steps` of each seed in all."""

    def run(state: TrainState, batches: tuple[Item, Any], steps: Any) -> tuple[TrainState, Any]:
        changed = make_transformed_step(one_step, partial(transform, steps=steps)) if transform else one_step
        return make_epoch_step(changed)(state, batches)

    if len(steps) == 1:
        return staying(partial(run, steps=steps[0]))
    together = staying(jax.vmap(run, in_axes=(0, (None, 0), 0)))
    each = everywhere(jnp.asarray(steps))
    return lambda state, batches: together(state, batches, each)


def staying(run: Any) -> Any:
    """Jit a function whose first argument and first result are a state, which stays where it is."""
    place = all_devices()
    if place is None:
        return jax.jit(run)
    compiled: list[Any] = []

    def stay(state: Any, *rest: Any) -> Any:
        if not compiled:
            compiled.append(jax.jit(run, out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), place)))
        return compiled[0](state, *rest)

    return stay


def stacked(trees: Sequence[Any]) -> Any:
    """Pytrees of several seeds with a leading axis of seeds; of one seed the tree as it is."""
    return trees[0] if len(trees) == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstacked(tree: Any, seeds: int) -> list[Any]:
    """The inverse of `stacked`."""
    return [tree] if seeds == 1 else [jax.tree.map(itemgetter(place), tree) for place in range(seeds)]


@dataclass(frozen=True)
class Training:
    """What trainings on several sets of rows share; called with a state a seed and rows, it returns the best of each.

    step     jitted, an epoch long: (state, (items, batches)) -> (state, metrics), both `stacked`
    batch    the batches of an epoch, a pure function of (number, rows), `stacked`
    nats     validation nats of parameters, None where the last parameters are the best
    epochs   of each seed
    reports  of each seed
    learn    what is learned not by gradient but after the epochs of `LEARN_STRENGTH`: (params, rows) -> params
    """

    step: Any
    items: Item
    batch: Callable[[int, Rows], Any]
    nats: Callable[[Params], float] | None
    epochs: tuple[int, ...]
    reports: tuple[Report | None, ...]
    learn: Callable[[Params, Rows], Params] | None = None

    def __call__(self, states: Sequence[TrainState], rows: Rows, folder: Path | None) -> list[_Best]:
        with closing(_Kept(folder, max(self.epochs))) as kept:
            done, state, best = kept.latest(states)
            state, items = tables_divided(state), everywhere(self.items)
            for number in range(done, max(self.epochs)):
                state, losses = self._epoch(number, state, items, rows)
                best = self._better(number + 1, here(whole(state.params)), best)
                kept.save(number + 1, state, best)
                for report, epochs, loss in zip(self.reports, self.epochs, losses, strict=True):
                    if report is not None and number < epochs:
                        report(number + 1, epochs, loss)
        return best

    def _epoch(self, number: int, state: TrainState, items: Item, rows: Rows) -> tuple[TrainState, list[float]]:
        if self.learn is not None and number in LEARN_STRENGTH:
            learned = [self.learn(params, rows) for params in unstacked(here(whole(state.params)), len(self.epochs))]
            state = state.replace(params=tables_divided(stacked(learned)))
        state, metrics = self.step(state, (items, self.batch(number, rows)))
        losses = np.atleast_1d(np.asarray(jnp.mean(here(metrics["loss"]), axis=-1))).tolist()
        running = [loss for loss, epochs in zip(losses, self.epochs, strict=True) if number < epochs]
        if not np.isfinite(running).all():
            broken = next(loss for loss in running if not np.isfinite(loss))
            raise FloatingPointError(f"the loss is {broken} in epoch {number}: lower the learning rate")
        return state, losses

    def _better(self, done: int, params: Params, best: list[_Best]) -> list[_Best]:
        """A seed that has had its epochs keeps what it had, while others go on."""
        found = []
        for own, before, epochs in zip(unstacked(params, len(best)), best, self.epochs, strict=True):
            nats = 0.0 if self.nats is None or done > epochs else float(agreed(self.nats(own)))
            if done > epochs or (self.nats is not None and not nats < before.nats):
                found.append(before)
            else:
                found.append(_Best(nats, 0 if self.nats is None else done, own))
        return found


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

    def latest(self, states: Sequence[TrainState]) -> tuple[int, TrainState, list[_Best]]:
        """Epochs done, the state after them and the best parameters until then; `states` themselves at the start."""
        start = [_Best(np.inf, 0, state.params) for state in states]
        done = None if self.store is None else self.store.latest()
        if self.store is None or done is None:
            return 0, stacked(states), start
        found = self.store.restore(tables_divided(_leaves(stacked(states), start)))
        found |= here(whole({name: found[name] for name in ("best", "nats", "epochs")}))
        params = unstacked(found["best"], len(states))
        best = [_Best(float(nats), int(epochs), own)
                for nats, epochs, own in zip(found["nats"], found["epochs"], params, strict=True)]  # fmt: skip
        return done, found["state"], best

    def save(self, done: int, state: TrainState, best: list[_Best]) -> None:
        """Save after the last epoch, and after another where the last save is old."""
        if self.store is None:
            return
        if done == self.epochs or agreed(time.monotonic() - self.saved >= CHECKPOINT_SECONDS):
            self.store.save(done, tables_divided(_leaves(state, best)))
            self.saved = time.monotonic()

    def close(self) -> None:
        if self.store is not None:
            self.store.close()


def _leaves(state: TrainState, best: list[_Best]) -> dict[str, Any]:
    numbers = {"nats": np.array([found.nats for found in best], np.float32),
               "epochs": np.array([found.epochs for found in best], np.int32)}  # fmt: skip
    return {"state": state, "best": stacked([found.params for found in best]), **numbers}


def row_nats(params: Params, items: Item, rows: Rows, likelihood: Any) -> float:
    """Mean loss of rows of known users under their trained states."""
    logits = row_log_odds(params.model, params.users, items, rows)
    return float(jnp.mean(jax.vmap(likelihood)(jnp.asarray(logits, jnp.float32), jax.tree.map(jnp.asarray, rows))))


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
    new = agreed(updated_root(root, moments, tuple(names)))
    return params.replace(users=params.users.replace(user_root=jnp.where(new > 0, jnp.maximum(new, 1e-3), 1.0)))


def gather_state(users: Users, community: Array, user: Array) -> Any:
    """The state of one row's user: what `train.comparison_loss` asks for."""
    base, deviation = gather(users, community, user)
    return jax.tree.map(jnp.add, base, deviation.state)


def temperature_scale(model: Any, users: Users, items: Item, validation: Rows) -> Float[np.ndarray, ""]:
    """Inverse temperature that minimises the validation nats, by golden-section search over its logarithm.

    Hinge and IPO scores are not log-odds: without this no probability of theirs may be reported.
    """
    return inverse_temperature(row_log_odds(model, users, items, strangers(validation)), np.asarray(validation.target))


def inverse_temperature(log_odds: np.ndarray, target: np.ndarray) -> Float[np.ndarray, ""]:
    """The factor in [e^-6, e^6] of scores [rows] that loses the fewest nats on soft targets, by golden section."""

    def nats(log_scale: float) -> float:
        scaled = log_odds * np.exp(log_scale)
        return float((target * np.logaddexp(0, -scaled) + (1 - target) * np.logaddexp(0, scaled)).mean())

    low, high, golden = -6.0, 6.0, (np.sqrt(5) - 1) / 2
    for _ in range(60):
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if nats(a) < nats(b) else (a, high)
    return np.asarray(np.exp((low + high) / 2), np.float32)
