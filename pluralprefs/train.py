"""Fitting parameters: a pure step, a generator that repeats it, and checkpoints that resume it exactly.

A step is a function `(state, batch) -> (state, metrics)`: nothing here is jitted or sharded, that is done once by the
caller who knows the mesh. The loop is a generator, so "every 100 steps evaluate" is an `if` in the caller's `for`:

    for step, state, metrics in train(start, batches, jax.jit(step_fn, donate_argnums=0)):
        if step % 100 == 0:
            store.save(step, state)

A step's randomness is `fold_in(key, step)` and a batch is a pure function of (seed, step), so a run continued from a
checkpoint repeats the bits of one that was never stopped. On features that fit the device, `make_epoch_step` runs a
whole epoch as one `lax.scan` and may itself be mapped over seeds.

The standard objective is the penalised likelihood per row: reduction(nats) + the family's own penalty + the user
table's penalty divided by the number of training rows, so that its sum over an epoch is the MAP objective.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from pluralprefs.data import batches
from pluralprefs.hosts import agreed
from pluralprefs.likelihoods import pooled_mean
from pluralprefs.sharding import leaf_name
from pluralprefs.types import (
    Comparisons,
    Episode,
    Item,
    Key,
    Params,
    Penalised,
    Reduction,
    TrainState,
    UserPosterior,
)

Metrics = dict[str, Array]
LossFn = Callable[[Params, Any, Key], tuple[Float[Array, ""], Metrics]]
StepFn = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
GatherUsers = Callable[[Any, Any, Any], Any]


def init_state(params: Params, optimizer: optax.GradientTransformation, key: Key) -> TrainState:
    """Start a loop at step 0.

    Weakly typed leaves (`jnp.full(3, 0.5)`) get the type that a step gives them: they would have it compiled twice.
    """
    params = jax.tree.map(lambda leaf: lax.convert_element_type(leaf, leaf.dtype), params)
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params), key=key)  # type: ignore[arg-type]


def make_train_step(loss_fn: LossFn, optimizer: optax.GradientTransformation) -> StepFn:
    """Make one gradient step, pure and not jitted. Metrics: `loss`, `grad_norm` and whatever `loss_fn` reports."""

    def step_fn(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)  # type: ignore[arg-type]
        params = optax.apply_updates(state.params, updates)  # type: ignore[arg-type]
        reported = {"loss": loss, "grad_norm": optax.tree.norm(grads), **metrics}
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state, key=state.key), reported  # type: ignore[arg-type]

    return step_fn


def make_transformed_step(step_fn: StepFn, transform: Callable[[Any, Key, Array], Any]) -> StepFn:
    """Change each batch before the step: `transform(batch, key, step)`, a pure function such as `attribute_dropout`."""

    def transformed(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 1)
        return step_fn(state, transform(batch, key, state.step))

    return transformed


def attribute_dropout(
    batch: Comparisons[Item], key: Key, step: Array, *, steps: int, most: float = 0.3, each: bool = False
) -> Comparisons[Item]:
    """Take attributes away with probability min(most, step / (0.75 steps)), `steps` of the optimiser in all.

    All attributes of a comparison go at once, of both its items (PrefPalette, arXiv 2507.13541, so that a model is
    ready for their absence); with `each` every attribute falls on its own. Items without attributes stay as they are.
    """
    if batch.first.attributes is None:
        return batch
    share = jnp.minimum(most, step / (0.75 * steps))
    rows, attributes = batch.first.attributes.shape[:2]
    kept = jax.random.uniform(key, (rows, attributes if each else 1)) >= share

    def without(item: Item) -> Item:
        mask = jnp.ones((rows, attributes), bool) if item.attribute_mask is None else item.attribute_mask
        return item.replace(attribute_mask=mask & jnp.broadcast_to(kept, mask.shape))

    return batch.replace(first=without(batch.first), second=without(batch.second))


def make_epoch_step(step_fn: StepFn) -> StepFn:
    """Scan `step_fn` over `(items, rows)`: the item matrix and an epoch of index batches, `[steps, batch_size]`.

    Items are an argument, not a closure, so that they may be sharded. Rows may also be any pytree that holds
    comparisons, such as episodes. Metrics gain a leading axis of steps.
    """
    comparisons = lambda part: isinstance(part, Comparisons)  # noqa: E731

    def epoch_step(state: TrainState, epoch: tuple[Item, Any]) -> tuple[TrainState, Metrics]:
        items, rows = epoch

        def gathered(part: Any) -> Any:
            return batches.gather(items, part) if comparisons(part) else part

        return lax.scan(lambda carry, batch: step_fn(carry, jax.tree.map(gathered, batch, is_leaf=comparisons)),
                        state, rows)  # fmt: skip

    return epoch_step


def train(state: TrainState, stream: Iterable[Any], step_fn: StepFn) -> Iterator[tuple[int, TrainState, Metrics]]:
    """Yield (steps done, state, metrics) after each batch, or after each epoch of a `make_epoch_step`.

    Raises FloatingPointError at the first loss that is not finite, before the broken state can be saved.
    """
    done = int(state.step)
    for batch in stream:
        state, metrics = step_fn(state, batch)
        losses = np.atleast_1d(np.asarray(metrics["loss"]))
        _require_finite(losses, done)
        done += losses.shape[-1]
        yield done, state, metrics


def _require_finite(losses: np.ndarray, done: int) -> None:
    """The last axis of `losses` is steps; leading ones, if any, are seeds or hyper-parameters under `vmap`."""
    broken = ~np.isfinite(losses)
    if broken.any():
        position = int(np.argwhere(broken)[:, -1].min())
        value = losses[..., position][broken[..., position]].ravel()[0]
        raise FloatingPointError(
            f"the loss of step {done + position} is {value}: lower the learning rate, or look for features and targets "
            "that are not finite"
        )


def comparison_loss(
    gather_user: GatherUsers,
    *,
    reduction: Reduction = pooled_mean,
    user_penalty: Callable[[Any], Float[Array, ""]] | None = None,
    rows: float | None = None,
) -> LossFn:
    """Make the standard loss over `Params` and `Comparisons[Item]`.

    `gather_user(users, community, user)` returns the state of one row's user; -1 is the prior user. `user_penalty`
    gives the nats of the whole user table and is divided by `rows`, the summed weight of the training rows. A family
    with a `penalty` adds it; it is given the batch's user states, leading axis rows. Raises ValueError for a
    user_penalty without rows.
    """
    if user_penalty is not None and (rows is None or rows <= 0):
        raise ValueError("user_penalty needs rows, the summed weight of the training rows it is spread over")

    def loss_fn(params: Params, batch: Comparisons[Item], key: Key) -> tuple[Float[Array, ""], Metrics]:
        users = jax.vmap(partial(gather_user, params.users))(batch.community, batch.user)
        nats = jax.vmap(partial(_row_nats, params))(users, batch)
        metrics = {"nats": reduction(nats, batch)}
        if isinstance(params.model, Penalised):
            metrics["model_penalty"] = params.model.penalty(users, batch, key)
        if user_penalty is not None:
            metrics["user_penalty"] = user_penalty(params.users) / (rows or 1.0)
        return sum(metrics.values(), start=jnp.zeros(())), metrics

    return loss_fn


def episode_loss(*, reduction: Reduction = pooled_mean, warm: float = 0.5) -> LossFn:
    """Make the loss of a family that infers its users, over `Params` and (episodes with a leading axis, progress).

    Each user is inferred from the support, drawn from the posterior where that has a covariance (whose root must be
    diagonal), and pays the nats of the query (`episode_nats`). A family's `penalty`, given the posteriors and the
    query, counts in full once `progress`, the share of training that is done, has come to `warm`, and in proportion
    before: a latent user that costs too much too early is never used.
    """

    def loss_fn(params: Params, batch: tuple[Episode[Item], Array], key: Key) -> tuple[Float[Array, ""], Metrics]:
        episode, progress = batch
        drawing, rest = jax.random.split(key)
        posterior = jax.vmap(params.model.infer_user)(episode.support)
        users = _drawn(posterior, drawing)
        nats = episode_nats(params, episode, users)
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), episode.query)
        metrics = {"nats": reduction(nats.reshape(-1), flat)}
        if isinstance(params.model, Penalised):
            share = jnp.clip(progress / max(warm, 1e-6), 0.0, 1.0)
            metrics["model_penalty"] = share * params.model.penalty(posterior, episode.query, rest)
        return sum(metrics.values(), start=jnp.zeros(())), metrics

    return loss_fn


def episode_nats(params: Params, episode: Episode[Item], users: Any) -> Float[Array, "users queries"]:
    """Nats of the query, given the user of each episode: log-odds are the offset plus the shift from the prior user.

    The shift alone counts, as when a user is scored (`models.residual`): what a family says of everyone would be
    learned again from rows that the population below it has learned already.
    """
    blank = jax.tree.map(lambda x: x[0], episode.support)
    prior = params.model.infer_user(blank.replace(weight=jnp.zeros_like(blank.weight))).mean

    def nats(user: Any, row: Comparisons[Item]) -> Float[Array, ""]:
        log_odds = params.model.log_odds
        shift = log_odds(user, row.first, row.second) - log_odds(prior, row.first, row.second)
        return params.likelihood(shift + row.offset, row)

    return jax.vmap(jax.vmap(nats, (None, 0)))(users, episode.query)


def _drawn(posterior: UserPosterior, key: Key) -> Any:
    """One user of each posterior of a batch; its mean where there is no covariance."""
    if posterior.covariance is None:
        return posterior.mean
    root = posterior.covariance.root
    noise = root * jax.random.normal(key, root.shape)

    def one(mean: Any, moved: Array) -> Any:
        vector, unravel = ravel_pytree(mean)
        return unravel(vector + moved)

    return jax.vmap(one)(posterior.mean, noise)


def _row_nats(params: Params, user: Any, row: Comparisons[Item]) -> Float[Array, ""]:
    log_odds = params.model.log_odds(user, row.first, row.second) + row.offset
    return params.likelihood(log_odds, row)


def label_by_path(rules: Sequence[tuple[str, str]], default: str | None = None) -> Callable[[Any], Any]:
    """Make a function from a pytree to a tree of labels, for `optax.partition`.

    Rules are (regular expression, label) in order; the first found in a leaf's path ("model/head/weight") counts.
    Raises ValueError for a leaf without a label and for a rule that fits no leaf, which is a misspelt path.
    """

    def labels(tree: Any) -> Any:
        names = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
        for pattern, _ in rules:
            if not any(re.search(pattern, name) for name in names):
                raise ValueError(f"no parameter fits {pattern!r}; there are: {', '.join(names)}")
        return jax.tree_util.tree_map_with_path(lambda path, _: _label(leaf_name(path), rules, default), tree)

    return labels


def _label(name: str, rules: Sequence[tuple[str, str]], default: str | None) -> str:
    label = next((label for pattern, label in rules if re.search(pattern, name)), default)
    if label is None:
        raise ValueError(f"parameter {name!r} has no label: add a rule for it or give a default")
    return label


def grouped(
    optimizers: Mapping[str, optax.GradientTransformation],
    rules: Sequence[tuple[str, str]],
    default: str | None = None,
) -> optax.GradientTransformation:
    """Give groups of parameters an optimiser (a learning rate) each; the label "frozen" is always there.

    >>> optimizer = grouped({"slow": optax.adam(1e-4), "fast": optax.adam(5e-3)}, [("^users/", "fast")], default="slow")
    """
    transforms = {"frozen": optax.set_to_zero(), **optimizers}
    return optax.partition(transforms, label_by_path(rules, default))  # type: ignore[arg-type]


class CheckpointStore:
    """Checkpoints of a run: each is complete or ignored, and the newest `keep` stay.

    Orbax writes a step beside the others and commits it last, so a process killed in mid-save leaves the previous step
    restorable. Leaves are stored under their path ("params/model/weight"), so that a state is restored by name.

    Of several processes all write one store together, a part each, in a folder that all see, unless the store is this
    process's `alone`. Then all have to call each method, with leaves that are on the devices of all (`hosts`).
    """

    def __init__(self, folder: str | Path, *, keep: int = 2, alone: bool = False) -> None:
        import orbax.checkpoint as ocp  # a second to import: only runs that save pay it

        self.folder = Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        shared = ocp.options.MultiprocessingOptions()
        self._alone = alone and jax.process_count() > 1
        if self._alone:
            mine = jax.process_index()
            shared = ocp.options.MultiprocessingOptions(mine, {mine}, f"process-{mine}")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, create=False, multiprocessing_options=shared
        )
        self._args = ocp.args
        handler = ocp.StandardCheckpointHandler(multiprocessing_options=shared)
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handler)

    def save(self, step: int, state: Any, notes: Mapping[str, Any] | None = None) -> None:
        """Write `state`, and `notes` (plain JSON) beside it, and return when it is committed.

        Raises ValueError unless `step` is later than all others.
        """
        latest = self.latest()
        if latest is not None and step <= latest:
            raise ValueError(f"{self.folder} already holds step {latest}; cannot save step {step} after it")
        stored = _stored(state)
        if self._alone:  # Orbax takes arrays of one process for mistakes
            stored = {name: np.asarray(leaf) for name, leaf in stored.items()}
        self._manager.save(step, args=self._args.StandardSave(stored), custom_metadata=dict(notes or {}))

    def latest(self) -> int | None:
        """Return the newest complete step, None where there is none. Of several processes, the one that 0 sees."""
        found = self._manager.latest_step()
        if self._alone or jax.process_count() == 1:
            return found
        step = int(agreed(-1 if found is None else found))
        return None if step < 0 else step

    def notes(self) -> dict[str, Any]:
        """Return what was written beside the newest complete step; nothing where there is none."""
        step = self.latest()
        return {} if step is None else dict(self._manager.metadata(step).custom_metadata or {})

    def restore(self, like: Any, step: int | None = None) -> Any:
        """Read the latest (or the given) step into the structure, dtypes and shardings of `like`.

        `like` is a state or its `jax.eval_shape`. Raises FileNotFoundError where there is no such step, ValueError
        naming the first leaf that is missing, left over or of another shape or dtype.
        """
        step = self.latest() if step is None else step
        if step is None or step not in self._manager.all_steps():
            raise FileNotFoundError(f"{self.folder} holds no complete checkpoint{'' if step is None else f' {step}'}")
        wanted = {name: _abstract(leaf) for name, leaf in _stored(like).items()}
        self._check(wanted, step)
        found = self._manager.restore(step, args=self._args.StandardRestore(wanted)) if wanted else {}
        return jax.tree_util.tree_map_with_path(lambda path, leaf: _revived(found.get(leaf_name(path)), leaf), like)

    def close(self) -> None:
        """Release Orbax's threads."""
        self._manager.close()

    def _check(self, wanted: dict[str, jax.ShapeDtypeStruct], step: int) -> None:
        found: Any = self._manager.item_metadata(step)
        for name in sorted({*wanted, *found}):
            saved = (tuple(found[name].shape), np.dtype(found[name].dtype)) if name in found else "absent"
            asked = (tuple(wanted[name].shape), np.dtype(wanted[name].dtype)) if name in wanted else "absent"
            if saved != asked:
                raise ValueError(f"{self.folder}: step {step}, leaf {name!r} is {saved}, the state has {asked}")


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _stored(state: Any) -> dict[str, Any]:
    """Leaves by name, as Orbax takes them: raw key data, and no leaf of size 0, which it refuses."""
    leaves = {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    return {name: _key_data(leaf) if _is_key(leaf) else leaf for name, leaf in leaves.items() if leaf.size}


def _key_data(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return jax.random.key_data(leaf)
    return jax.eval_shape(jax.random.key_data, leaf)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _revived(found: Any, like: Any) -> Any:
    if found is None:
        return jnp.zeros(like.shape, like.dtype, device=getattr(like, "sharding", None))
    if _is_key(like):
        # An example, because key_impl takes no ShapeDtypeStruct.
        return jax.random.wrap_key_data(found, impl=jax.random.key_impl(jnp.empty((), like.dtype)))
    return found
