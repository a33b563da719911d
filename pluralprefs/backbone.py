"""Train the encoder beside the family: adapters (LoRA), all of its weights, or a part of them chosen by name.

The parameters of a step are those of the family, the user table and the likelihood, as on frozen features, and what is
trained of the encoder (`Params.encoder`); the loss is that of `train.comparison_loss` and the step that of
`train.make_train_step`. What stays frozen travels with the batch: it has no gradient, no optimiser state and no place
in a checkpoint. Which is which, and the learning rate of each group, is one list of (regular expression, label) over
the names of parameters ("encoder/layers/0/query/kernel", "model/head", "users/population"), where "frozen" is a label.

This is a stage before the fit. Its result is the encoder alone, with weights of its own and so features of its own in
the cache; family and users are fitted anew on those features, and pooled and evaluated as for any encoder.

What it does to honesty. The encoder learns from rows of the cell "train" only. Validation rows choose its epochs, then
choose for the fit too; test rows and unseen users are never met. But "out of fold" no longer means unseen: each fold of
the cross-fit predicts rows from features that have learned those rows, so the population looks surer there than it is
on new pairs, and the strength of users and the spread between halves come out smaller than they are. Cells of the test
are not concerned. One encoder serves all seeds of a run, whose spread does not contain its own.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float

from pluralprefs.encoders.cache import encode_items, fetch_texts
from pluralprefs.encoders.decoder_weights import DECODER_RULES
from pluralprefs.encoders.lora import FACTORS, Lora, attach, factor_rules, join, split
from pluralprefs.encoders.text import Packed, TextEncoder, encode, require_packing
from pluralprefs.encoders.weights import EncoderError
from pluralprefs.fitting import Rows, strangers, take
from pluralprefs.hosts import agreed, everywhere, here, placed, spread, whole
from pluralprefs.registry.files import load_arrays, save_arrays
from pluralprefs.sharding import (
    BATCH_AXES,
    USER_TABLE_RULES,
    batch_sharding,
    leaf_name,
    make_mesh,
    replicated,
    shard_rules,
    sharded_init,
)
from pluralprefs.token_batches import PackedBatches, TokenBatches
from pluralprefs.train import (
    CheckpointStore,
    LossFn,
    Metrics,
    StepFn,
    comparison_loss,
    init_state,
    label_by_path,
    make_train_step,
    make_transformed_step,
    train,
)
from pluralprefs.training import FROZEN, Report, first_users, gather_state, row_nats
from pluralprefs.types import Comparisons, Item, Key, Params, Reduction, TrainState
from pluralprefs.users import Pooled, penalty

SAVE_SECONDS = 600.0  # between checkpoints: what a kill can cost
SAMPLE = 256  # pairs that tell how far a user state moves log-odds before any training
BACKBONE = "backbone.safetensors"  # in a run folder
RULES = (*DECODER_RULES, *factor_rules(DECODER_RULES), *USER_TABLE_RULES)
Labels = tuple[tuple[str, str], ...]
Texts = Comparisons[Any] | Packed


@dataclass(frozen=True)
class Backbone:
    """How an encoder is trained. The defaults are LoRA; without `lora` all weights are trained.

    groups       (regular expression, label) over names of parameters, before the rules that say the above; the label is
                 "frozen" or one of `optimizers`: layer-wise learning rates are groups of "^encoder/layers/0/" and so on
    optimizers   of each group of parameters, at its full learning rate; what is not of the encoder is of the "head"
    epochs       at most; validation rows choose how many
    batch_tokens of a batch, padding included; `accumulate` batches make one update
    packed       texts share rows, and all batches one shape, which decoders read; None: of a decoder, except on a CPU,
                 where attention over long rows costs more than padding (docs/scaling.md)
    clip         largest norm of a gradient
    warmup, final   shares: of updates in which the rate grows, and what is left of it at the end of its cosine
    frozen_dtype of the weights that are not trained: "bfloat16" for half the memory
    mesh         sizes of `sharding.make_mesh`; none is one device, of several processes all devices
    """

    lora: Lora | None = field(default_factory=Lora)
    groups: Labels = ()
    optimizers: Mapping[str, Callable[[], optax.GradientTransformation]] = field(
        default_factory=lambda: {
            "backbone": partial(optax.adamw, learning_rate=1e-4, weight_decay=1e-2),
            "head": partial(optax.adamw, learning_rate=5e-3, weight_decay=1e-2),
        }
    )
    epochs: int = 3
    batch_tokens: int = 8192
    accumulate: int = 1
    packed: bool | None = None
    clip: float = 1.0
    warmup: float = 0.03
    final: float = 0.1
    frozen_dtype: str = "float32"
    mesh: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0

    def labels(self, params: Params) -> dict[str, str]:
        """The label of every parameter by its name. Raises ValueError for a group without parameters or optimiser."""
        label_by_path(self.groups, default="head")(params)  # a misspelt name is an error
        unknown = {label for _, label in self.groups} - {"frozen", *self.optimizers}
        if unknown:
            known = ", ".join(("frozen", *self.optimizers))
            raise ValueError(f"backbone.groups: no optimiser for {min(unknown)!r}; there are {known}")
        trained = (FACTORS if self.lora else "^encoder/", "backbone")
        rules = (*self.groups, trained, ("^encoder/", "frozen"), *FROZEN, ("", "head"))
        names = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        return {name: next(label for pattern, label in rules if re.search(pattern, name)) for name in names}

    def folder(self, encoder: TextEncoder) -> str:
        """Name of a folder of checkpoints: another encoder, or other batches, begin anew."""
        kind = "-packed" if self.batches(encoder) is PackedBatches else ""
        return f"backbone-{encoder.weights[:16]}{kind}"

    def batches(self, encoder: TextEncoder) -> type[TokenBatches]:
        """How pairs are batched for this encoder. Raises EncoderError where they cannot be packed as asked."""
        if self.packed:
            require_packing(encoder)
        packed = encoder.packs and jax.default_backend() != "cpu" if self.packed is None else self.packed
        return PackedBatches if packed else TokenBatches

    def optimizer(self, labels: Mapping[str, str], steps: int) -> optax.GradientTransformation:
        """The optimiser of `steps` batches: clipped, each group at its own rate, one schedule for all."""

        def labelled(params: Any) -> Any:
            return jax.tree_util.tree_map_with_path(lambda path, _: labels[leaf_name(path)], params)

        updates = max(steps // self.accumulate, 1)
        warm = min(round(self.warmup * updates), updates - 1)
        schedule = optax.warmup_cosine_decay_schedule(0.0 if warm else 1.0, 1.0, warm, updates, self.final)
        frozen: dict[Any, optax.GradientTransformation] = {"frozen": optax.set_to_zero()}
        each: dict[Any, Any] = frozen | {name: make() for name, make in self.optimizers.items()}
        # What is frozen counts in no norm: first it goes, then the rest is clipped.
        only: dict[Any, Any] = frozen | dict.fromkeys(self.optimizers, optax.identity())
        chain = optax.chain(
            optax.partition(only, labelled),
            optax.clip_by_global_norm(self.clip),
            optax.partition(each, labelled),
            optax.scale_by_schedule(schedule),
        )
        return optax.MultiSteps(chain, self.accumulate).gradient_transformation() if self.accumulate > 1 else chain


def encoding_loss(loss_fn: LossFn, encoder: TextEncoder) -> LossFn:
    """Make a loss over (what is frozen of the encoder, comparisons of texts) from one over comparisons of Items.

    Of `encoder` only the architecture counts: its parameters are those of `Params.encoder` and of the batch.
    """
    blank = encoder.replace(params={})

    def loss(
        params: Params, batch: tuple[Any, Comparisons[Any] | Packed], key: Key
    ) -> tuple[Float[Array, ""], Metrics]:
        frozen, comparisons = batch
        whole = blank.replace(params=join(params.encoder, frozen))
        return loss_fn(params, encode(whole, comparisons), key)

    return loss


def train_backbone(
    backbone: Backbone,
    encoder: Any,
    model: Any,
    *,
    table: pl.DataFrame,
    items: Item,
    rows: Rows,
    validation: Rows,
    pooled: Pooled,
    users: int,
    likelihood: Any,
    reduction: Reduction,
    transform: Callable[..., Any] | None = None,
    checkpoints: Path | None = None,
    report: Report | None = None,
) -> tuple[TextEncoder, dict[str, Any], dict[str, Any]]:
    """Train an encoder beside a family's fresh `model`; return it, its trained parameters by name, and plain notes.

    `table` is the item table that `rows` and `validation` speak of, `items` what goes with its texts (attributes), as
    numpy arrays; `users` is the size of the user table trained along, 0 for a population alone. The parameters are
    those after the epoch that predicts the validation rows best, the last where there are none. `checkpoints` is a
    folder that belongs to this very training, from which it continues to the same bits, or, on another mesh, up to
    rounding. Several processes train one encoder together, which each then has whole, on its own devices, or, where it
    was read onto a mesh of all, in part; all have to see `checkpoints`. `report(epochs done, epochs, loss)` is called
    after each epoch. Raises FloatingPointError where a loss is not finite, ValueError where the mesh does not divide
    the batches of a checkpoint, or is not the one that the encoder was read onto.
    """
    started = begun(backbone, encoder)
    several = jax.process_count() > 1
    mesh = make_mesh(**dict[str, Any](backbone.mesh)) if backbone.mesh or several else None
    together = not several or spread(encoder.params)  # else each process reads its texts with an encoder of its own
    _require_mesh(encoder, mesh)
    if together:
        started = started.replace(params=_placed(started.params, mesh))
    flat = rows.replace(community=np.full_like(rows.community, -1))
    flat = flat if users else strangers(flat)
    store = None if checkpoints is None else CheckpointStore(checkpoints, keep=1)
    divided = math.prod(mesh.shape[axis] for axis in BATCH_AXES) if mesh else 1
    multiple = divided if store is None else store.notes().get("multiple", divided)
    batches = backbone.batches(started).render(
        started, table, items, flat, budget=backbone.batch_tokens, seed=backbone.seed, multiple=multiple
    )
    if any(len(index) % divided for _, index in batches.epoch(0)):  # other batches would be another training
        raise ValueError(f"{checkpoints}: holds a training in batches for data x fsdp = {multiple} parts of a mesh, "
                         f"which {divided} do not divide: resume it with as many processes, or with a backbone.mesh "
                         f"whose data x fsdp divides {multiple}")  # fmt: skip
    steps = backbone.epochs * batches.steps
    asked = [validation.first, validation.second]
    sample = take(strangers(flat), np.linspace(0, len(flat.target) - 1, min(len(flat.target), SAMPLE)).astype(int))
    table = fetch_texts(table, np.concatenate([*asked, sample.first, sample.second]))  # what all encode together
    seen = _encoded(started, table, items, sample) if users else (items, sample)
    table_of_users = first_users(model, *seen, pooled, users)
    labels = backbone.labels(Params(model, table_of_users, likelihood, encoder=started.params))
    trained, frozen = split(started.params, lambda name: labels[f"encoder/{name}"] != "frozen")
    frozen = _placed(jax.tree.map(lambda leaf: leaf.astype(backbone.frozen_dtype), frozen), mesh)
    # The step donates its state: the caller's encoder and model are not to go with it.
    params = jax.tree.map(jnp.copy, _placed(Params(model, table_of_users, likelihood, encoder=trained), mesh))
    update = backbone.optimizer(labels, steps)
    state = _begin(params, update, jax.random.key(backbone.seed), mesh)
    del params  # where the state is made of copies, these are of no use

    def nats(params: Params) -> float:
        now = started.replace(params=join(params.encoder, frozen))
        found = _encoded(now, table, items, validation)
        return float(agreed(row_nats(whole(params.replace(encoder=None)), *found, likelihood)))

    step = _step(started, update, batches, steps, reduction=reduction, users=users, transform=transform)
    # Of several processes each has to hold the losses; a state stays where it was put.
    stay = mesh and (jax.tree.map(lambda leaf: leaf.sharding, state), replicated(mesh))
    step = jax.jit(step, donate_argnums=0, out_shardings=stay)
    best = {"encoder": state.params.encoder, "nats": np.float32(np.inf), "epochs": np.int32(0)}
    state, best = _train(
        {"state": state, "best": best}, step, batches, steps, frozen, mesh,
        nats if len(validation.target) else None, store, report,
    )  # fmt: skip
    learned = jax.tree_util.tree_leaves_with_path(whole(best["encoder"]))
    found = {leaf_name(path): leaf for path, leaf in learned}
    sizes = {"trained_parameters": _count(trained), "frozen_parameters": _count(frozen)}
    notes = {"epochs": int(best["epochs"]), "steps": int(state.step), "padding": batches.padding, **sizes}
    notes |= {"validation_nll": float(best["nats"])} if len(validation.target) else {}
    return applied(backbone, encoder, found, mesh if together else None), found, notes


def _mesh_of(encoder: TextEncoder) -> Any:
    """The mesh that an encoder was read onto; None where it is on one device."""
    places = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(encoder.params))
    return next((place.mesh for place in places if isinstance(place, NamedSharding) and place.mesh.size > 1), None)


def _require_mesh(encoder: TextEncoder, mesh: Mesh | None) -> None:
    """Raise ValueError where an encoder is spread over processes in another way than it is to be trained."""
    own = _mesh_of(encoder)
    if spread(encoder.params) and own != mesh:
        sizes = [dict(one.shape) if one is not None else {} for one in (own, mesh)]
        raise ValueError(f"the encoder was read onto a mesh of {sizes[0]}, and is to be trained on {sizes[1]}: give "
                         "backbone.mesh and the encoder's mesh the same sizes")  # fmt: skip


def begun(backbone: Backbone, encoder: Any) -> TextEncoder:
    """The encoder that training starts from, adapters attached. Raises EncoderError for one without weights."""
    if not isinstance(encoder, TextEncoder):
        raise EncoderError("backbone: this encoder has no weights to train; give a text encoder, or backbone=None")
    return encoder if backbone.lora is None else attach(encoder, backbone.lora, jax.random.key(backbone.seed))


def applied(backbone: Backbone, encoder: Any, found: Mapping[str, Any], mesh: Mesh | None = None) -> TextEncoder:
    """The encoder with trained parameters, by name, in their places, and an identity of its own.

    Raises EncoderError for parameters that the encoder does not have.
    """
    started = begun(backbone, encoder)
    if mesh is None and spread(started.params):
        mesh = _mesh_of(started)
    names = {leaf_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(started.params)}
    for name, leaf in found.items():
        if names.get(name) != leaf.shape:
            raise EncoderError(f"backbone: parameter {name} is {leaf.shape}, the encoder has {names.get(name)}")

    def place(path: Any, leaf: Any, to: Any) -> Any:
        """A leaf at a time: no device holds the whole encoder on the way."""
        name = leaf_name(path)
        new = np.asarray(found[name]) if name in found else leaf.astype(backbone.frozen_dtype)
        if mesh is None and len(leaf.sharding.device_set) == 1:
            return jnp.asarray(new)
        return placed(new, to if mesh else leaf.sharding)  # else where the encoder was read

    places = shard_rules(started.params, mesh, RULES) if mesh else started.params
    params = jax.tree_util.tree_map_with_path(place, started.params, places)
    return started.replace(params=params, weights=_digest(backbone, started.weights, found))


def save_backbone(path: Path, encoder: TextEncoder, found: Mapping[str, Any]) -> None:
    """Write trained parameters as one safetensors file that names the weights of the encoder they were trained from."""
    save_arrays(path, {name: np.asarray(leaf) for name, leaf in found.items()}, {"weights": encoder.weights})


def restore_backbone(path: Path, backbone: Backbone, encoder: Any) -> TextEncoder:
    """Apply what `save_backbone` wrote. Raises EncoderError where the encoder is not the one that was trained."""
    found, about = load_arrays(path)
    if about.get("weights") != encoder.weights:
        raise EncoderError(f"{path}: was trained from another encoder than the one at hand: bring back its weights")
    return applied(backbone, encoder, found)


def _step(
    encoder: TextEncoder, update: optax.GradientTransformation, batches: TokenBatches, steps: int, *,
    reduction: Reduction, users: int, transform: Callable[..., Any] | None,
) -> StepFn:  # fmt: skip
    """One step, in which a pair counts alike in a batch of few pairs and in one of many."""
    total = float(batches.rows.weight.sum())

    def evenly(nats: Float[Array, " rows"], batch: Comparisons[Any]) -> Float[Array, ""]:
        return reduction(nats, batch) * jnp.sum(batch.weight) * (batches.steps / total)

    loss = comparison_loss(
        gather_state, reduction=evenly, user_penalty=penalty if users else None, rows=total if users else None
    )
    step = make_train_step(encoding_loss(loss, encoder), update)
    if transform is not None:
        change = partial(transform, steps=steps)
        step = make_transformed_step(step, lambda batch, key, at: (batch[0], _changed(change, batch[1], key, at)))
    return step


def _changed(change: Callable[..., Any], batch: Texts, key: Key, at: Any) -> Texts:
    """A batch whose comparisons a transform has changed."""
    if isinstance(batch, Packed):
        return batch.replace(comparisons=change(batch.comparisons, key, at))
    return change(batch, key, at)


def _train(
    kept: dict[str, Any], step: StepFn, batches: TokenBatches, steps: int, frozen: Any, mesh: Mesh | None,
    nats: Callable[[Params], float] | None, store: CheckpointStore | None, report: Report | None,
) -> tuple[TrainState, dict[str, Any]]:  # fmt: skip
    """Train to the end, from the last checkpoint where there is one; return the state and the best epoch's encoder."""
    if store is not None and store.latest() is not None:
        found = store.restore(everywhere(kept))
        kept = {"state": found["state"], "best": found["best"] | here(_numbers(found["best"]))}
    best, start, epochs = kept["best"], int(kept["state"].step), steps // batches.steps
    began: TrainState = kept["state"]
    state, losses, saved = began, [], time.monotonic()
    place = None if mesh is None else batch_sharding(mesh)
    # What is kept beyond a step that donates its state is a copy.
    best = best | {"encoder": jax.tree.map(jnp.copy, best["encoder"])}
    stream = ((frozen, placed(batch, place)) for batch in batches.stream(start))
    for done, state, metrics in islice(train(began, stream, step), steps - start):
        losses.append(float(metrics["loss"]))
        if done % batches.steps == 0:
            found = np.float32(np.inf if nats is None else nats(state.params))
            if np.isnan(found):
                raise FloatingPointError(f"validation nats are {found} after {done} steps: lower the learning rates")
            if nats is None or found < best["nats"]:
                encoder = jax.tree.map(jnp.copy, state.params.encoder)
                best = {"encoder": encoder, "nats": found, "epochs": np.int32(done // batches.steps)}
            if report is not None:
                report(done // batches.steps, epochs, float(np.mean(losses)))
            losses = []
        if store is not None and (done == steps or agreed(time.monotonic() - saved >= SAVE_SECONDS)):
            store.save(done, everywhere({"state": state, "best": best}), {"multiple": batches.multiple})
            saved = time.monotonic()
    if store is not None:
        store.close()
    return state, best


def _numbers(best: Mapping[str, Any]) -> dict[str, Any]:
    return {name: best[name] for name in ("nats", "epochs")}


def _encoded(encoder: TextEncoder, table: pl.DataFrame, items: Item, rows: Rows) -> tuple[Item, Rows]:
    """The items of these rows as the encoder is now, and the rows in terms of them."""
    used, places = np.unique(np.stack([rows.first, rows.second]), return_inverse=True)
    first, second = places.reshape(2, -1).astype(np.int32)
    found = encode_items(table[used], encoder, cache=False, progress=False)
    rest = take(items.replace(embedding=None, prompt=None), used)
    whole = rest.replace(embedding=found.embedding, prompt=found.prompt)
    return jax.tree.map(jnp.asarray, whole), rows.replace(first=first, second=second)


def _begin(params: Params, update: optax.GradientTransformation, key: Key, mesh: Mesh | None) -> TrainState:
    """The state before the first step, the optimiser's part born in its place: it is twice the parameters."""
    if mesh is None:
        return init_state(params, update, key)
    return sharded_init(lambda params: init_state(params, update, key), mesh, RULES, params)


def _placed(tree: Any, mesh: Mesh | None) -> Any:
    return tree if mesh is None else placed(tree, shard_rules(tree, mesh, RULES))


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _digest(backbone: Backbone, weights: str, found: Mapping[str, Any]) -> str:
    """SHA-256 of all that decides what the trained encoder computes."""
    about = [weights, backbone.lora and asdict(backbone.lora), backbone.frozen_dtype]
    digest = hashlib.sha256(json.dumps(about).encode())
    for name, leaf in sorted(found.items()):
        digest.update(name.encode() + np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
