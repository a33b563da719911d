"""Train adapters of many users, communities or attributes on one encoder, side by side in one program.

Each name in a column of the table (`user_id`, `community_id`, an attribute) has LoRA factors and a linear head of its
own (`encoders.stacked`), learned from its own comparisons by the Bradley-Terry likelihood. The step is that of
`train.make_train_step` under `jax.vmap`: states have a leading axis of names, the encoder's weights have none. Names
share nothing but those weights, and what a name draws follows from the seed and itself: it learns what it would learn
alone, up to rounding.

For names with little data this is the wrong family: nothing is pooled. Use it where each name has hundreds of
comparisons (attributes; the heaviest users), and a family with pooled users elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
from jaxtyping import Int

from pluralprefs.backbone import encoding_loss
from pluralprefs.data.batches import Vocabulary, index_rows, item_table
from pluralprefs.data.comparisons import DataError
from pluralprefs.data.ids import stable_hash
from pluralprefs.encoders.lora import Lora, attach, split
from pluralprefs.encoders.stacked import TOGETHER, StackedEncoder, is_factor, require_no_prompt
from pluralprefs.encoders.text import TextEncoder
from pluralprefs.encoders.tokens import bucket
from pluralprefs.encoders.weights import EncoderError
from pluralprefs.likelihoods import Logistic, pooled_mean
from pluralprefs.models.bradley_terry import BradleyTerry
from pluralprefs.token_batches import TokenBatches
from pluralprefs.train import comparison_loss, init_state, make_train_step
from pluralprefs.types import Item, Params

NOBODY = Vocabulary((), (), (), (), ())
Report = Callable[[int, int, float], None]  # steps done and to be done, of all names; mean loss


def train_adapters(
    encoder: Any,
    table: pl.DataFrame,
    by: str,
    *,
    lora: Lora = Lora(),  # noqa: B008, immutable
    steps: int = 200,
    batch_size: int = 8,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-2,
    seed: int = 0,
    together: int = TOGETHER,
    report: Report | None = None,
) -> StackedEncoder:
    """Train an adapter and a head for every name in the column `by` of a table of comparisons, on all of its rows.

    A step takes `batch_size` comparisons of every name, which goes through its own again and again, shuffled each time.
    AdamW, gradients clipped at norm 1, the learning rate on a cosine to a tenth. `together` names are trained in one
    program: memory is that of their activations. `report` hears of every step. Raises DataError for a column that is
    not there or names nobody, EncoderError for an encoder without weights, FloatingPointError where a loss is not
    finite.
    """
    if not isinstance(encoder, TextEncoder):
        raise EncoderError("adapters: this encoder has no weights to adapt; give a text encoder")
    require_no_prompt(encoder)
    if by not in table.columns:
        raise DataError(f"no column {by!r} to take names from; the table has {', '.join(table.columns)}")
    column = table[by].cast(pl.Utf8)
    names = sorted(column.drop_nulls().unique())
    if not names:
        raise DataError(f"column {by!r} is empty: there is nobody to train an adapter for")
    items = item_table(table)
    rows = index_rows(table, items, NOBODY)
    batches = TokenBatches.render(encoder, items, _bare(items), rows, budget=1, seed=seed)
    own = {name: np.flatnonzero((column == name).fill_null(False).to_numpy()) for name in names}
    parts = []
    for start in range(0, len(names), together):
        few = names[start : start + together]

        def heard(done: int, loss: float, start: int = start, few: list[str] = few) -> None:
            if report is not None:
                report(start * steps + done * len(few), len(names) * steps, loss)

        parts.append(_trained(encoder, lora, batches, {name: own[name] for name in few}, steps, batch_size,
                              learning_rate, weight_decay, seed, heard))  # fmt: skip
    factors, head = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
    return StackedEncoder.of(encoder, lora, names, factors, head)


def _trained(
    encoder: TextEncoder, lora: Lora, batches: TokenBatches, own: dict[str, Int[np.ndarray, " rows"]], steps: int,
    batch_size: int, learning_rate: float, weight_decay: float, seed: int, heard: Callable[[int, float], None],
) -> tuple[Any, Any]:  # fmt: skip
    """Factors and heads of some names, with a leading axis."""
    schedule = optax.cosine_decay_schedule(learning_rate, steps, 0.1)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=weight_decay))
    keys = [jax.random.fold_in(jax.random.key(seed), stable_hash(name) % 2**31) for name in own]
    started = [attach(encoder, lora, key) for key in keys]
    factors = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(split(one.params, is_factor)[0] for one in started))
    frozen = split(started[0].params, is_factor)[1]
    model = BradleyTerry.init(key=keys[0], dim=encoder.dim, item_effects=False)
    head = jax.tree.map(lambda leaf: jnp.zeros((len(own), *leaf.shape)), model.init_user())
    loss = comparison_loss(lambda users, community, user: users, reduction=pooled_mean)
    step = make_train_step(encoding_loss(loss, started[0]), optimizer)
    stepped = jax.jit(jax.vmap(step, in_axes=(0, (None, 0))), donate_argnums=0)
    state = jax.vmap(lambda params, key: init_state(params, optimizer, key))(
        Params(model, head, Logistic(), encoder=factors), jnp.stack(keys)
    )
    for at in range(steps):
        index = np.stack([drawn(seed, name, rows, at, batch_size) for name, rows in own.items()])
        state, metrics = stepped(state, (frozen, _batch(batches, index)))
        losses = np.asarray(metrics["loss"])
        if not np.isfinite(losses).all():
            name = list(own)[int(np.argmin(np.isfinite(losses)))]
            raise FloatingPointError(f"adapter of {name!r}: loss {losses.min()} at step {at + 1}: lower learning_rate")
        heard(at + 1, float(losses.mean()))
    return state.params.encoder, state.params.users["linear"]


def drawn(seed: int, name: str, rows: Int[np.ndarray, " rows"], step: int, size: int) -> Int[np.ndarray, " size"]:
    """The rows of a name's batch at a step; -1 fills up the last batch of a pass over them."""
    each = -(-len(rows) // size)
    order = np.random.default_rng([seed, stable_hash(name) % 2**32, step // each]).permutation(rows)
    part = order[step % each * size :][:size]
    return np.pad(part, (0, size - len(part)), constant_values=-1)


def _batch(batches: TokenBatches, index: Int[np.ndarray, "names size"]) -> Any:
    """The comparisons at `index`, padded to one length; of rows of padding the weight is 0."""
    longest = int(batches.sizes[index[index >= 0], :2].max())
    found = batches.batch(bucket(longest, max_length=batches.max_length), index.ravel())
    return jax.tree.map(lambda leaf: np.reshape(leaf, (*index.shape, *leaf.shape[1:])), found)


def _bare(items: pl.DataFrame) -> Any:
    """Items of which nothing is known but their texts."""
    return Item(embedding=None, index=np.arange(items.height))  # pyright: ignore[reportArgumentType]
