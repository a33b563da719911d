"""From the table to batches: integer rows on the host or the device, and an order that can be resumed anywhere.

Strings become integers once. A `Vocabulary` lists the users, communities, items, sources and raters of the TRAINING
rows, so that a stranger is -1 whichever table comes later. The item table holds every response of a table once; a
comparison then is two rows of it, and `gather` turns such an index batch into `Comparisons[Item]`.

The order of an epoch is `permutation(fold_in(key, epoch))`: the batch of a step is a function of (seed, step) alone and
a run resumes in O(1) steps. The last batch of an epoch is filled up with -1, which becomes rows of weight 0, so that
every row is seen exactly once an epoch. Features either live on the device (`resident`, `epoch`) or are read from a
memory-mapped file as they are needed (`stream`): the same batches, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from jaxtyping import Array, Int

from pluralprefs.data.comparisons import DataError
from pluralprefs.types import Comparisons, Item

T = TypeVar("T")

TRAINING_FOLDS = ("train", "validation")
TRAINING_CELLS = ("train", "validation", "train_only_final")


class Vocabulary(NamedTuple):
    """Names seen in training, each sorted; a name's position is its index. Items are item keys of the item table."""

    users: tuple[str, ...]
    communities: tuple[str, ...]
    items: tuple[str, ...]
    sources: tuple[str, ...]
    raters: tuple[str, ...]


def vocabulary(table: pl.DataFrame, community: str = "community_id") -> Vocabulary:
    """Collect the names of rows whose fold is train or validation (and whose cell, if there is one, is of training).

    Raises DataError where no row is of training or the column `community` is absent.
    """
    _require_column(table, community)
    seen = pl.col("fold").is_in(TRAINING_FOLDS)
    if "cell" in table.columns:
        seen &= pl.col("cell").is_in(TRAINING_CELLS)
    rows = table.filter(seen)
    if rows.is_empty():
        raise DataError("no row has fold train or validation: split the table first (pluralprefs.data.splits)")
    keys = pl.concat([rows.select(_item_key(side).alias("key")) for side in ("first_id", "second_id")])
    return Vocabulary(
        users=_names(rows["user_id"]),
        communities=_names(rows[community]),
        items=_names(keys["key"]),
        sources=_names(rows["source"]),
        raters=_names(rows["annotator_id"]),
    )


def item_table(table: pl.DataFrame) -> pl.DataFrame:
    """List every response once, sorted: item_key, item_id, prompt_id, prompt, text and `attr:<name>`.

    An item is a (prompt_id, item id); its key is "prompt_id/item_id". Raises DataError naming the item where two rows
    give it different texts, prompts or attribute values.
    """
    sides = [_side(table, side) for side in ("first", "second")]
    stacked = pl.concat(sides, how="diagonal")
    attributes = sorted(name for name in stacked.columns if name.startswith("attr:"))
    values = ["prompt", "text", *attributes]
    groups = stacked.group_by("prompt_id", "item_id")
    _require_one_value(groups.agg(pl.col(values).drop_nulls().n_unique()).sort("prompt_id", "item_id"), values)
    items = groups.agg(pl.col(values).drop_nulls().first()).sort("prompt_id", "item_id")
    items = items.select(_item_key("item_id").alias("item_key"), "item_id", "prompt_id", *values)
    if items["item_key"].n_unique() < items.height:
        key = items.filter(pl.col("item_key").is_duplicated())["item_key"][0]
        raise DataError(f"item key {key!r} stands for two items: remove '/' from prompt_id or the item ids")
    return items


def item_index(items: pl.DataFrame, vocabulary: Vocabulary) -> Int[np.ndarray, " items"]:
    """Give each row of an item table its position among the items of training, -1 for an item never seen."""
    return _positions(items["item_key"], vocabulary.items)


def index_rows(
    table: pl.DataFrame, items: pl.DataFrame, vocabulary: Vocabulary, community: str = "community_id"
) -> Comparisons[Any]:
    """Turn a table into numpy arrays; `first` and `second` are int32 rows of the item table, offset is 0.

    Names outside the vocabulary, and null, are -1. Raises DataError for a response that the item table lacks.
    """
    _require_column(table, community)
    first, second = (_item_rows(table, side, items) for side in ("first_id", "second_id"))
    columns: dict[str, Any] = {
        "target": table["target"].cast(pl.Float32).to_numpy(writable=True),
        "tie": table["tie"].fill_null(False).to_numpy(writable=True),
        "user": _positions(table["user_id"], vocabulary.users),
        "community": _positions(table[community], vocabulary.communities),
        "rater": _positions(table["annotator_id"], vocabulary.raters),
        "source": _positions(table["source"], vocabulary.sources),
        "offset": np.zeros(table.height, np.float32),
        "weight": table["weight"].fill_null(1.0).cast(pl.Float32).to_numpy(writable=True),
    }
    return Comparisons(first=first, second=second, **columns)


def gather(items: Item, comparisons: Comparisons[Any]) -> Comparisons[Item]:
    """Look up the items of an index batch of any leading shape; may be jitted, sharded and differentiated."""

    def pick(rows: Any) -> Item:
        return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0), items)

    return comparisons.replace(first=pick(comparisons.first), second=pick(comparisons.second))  # type: ignore[attr-defined]


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Count the batches of an epoch, the last of which may be part empty.

    >>> steps_per_epoch(10, 4)
    3
    """
    if rows < 1 or batch_size < 1:
        raise ValueError(f"{rows} rows in batches of {batch_size}: both must be at least 1")
    return -(-rows // batch_size)


def epoch_indices(seed: int | jax.Array, epoch: Any, rows: int, batch_size: int) -> Int[Array, "steps batch_size"]:
    """Order the rows of one epoch: each of 0..rows-1 once, then -1 up to whole batches. `seed` may be a key."""
    key = jax.random.key(seed) if isinstance(seed, int) else seed
    order = jax.random.permutation(jax.random.fold_in(key, epoch), rows)
    steps = steps_per_epoch(rows, batch_size)
    padded = jnp.pad(order.astype(jnp.int32), (0, steps * batch_size - rows), constant_values=-1)
    return padded.reshape(steps, batch_size)


def batch_at(seed: int | jax.Array, step: Any, rows: int, batch_size: int) -> Int[Array, " batch_size"]:
    """Give the rows of any step, -1 for padding, without running through the steps before it."""
    steps = steps_per_epoch(rows, batch_size)
    return epoch_indices(seed, step // steps, rows, batch_size)[step % steps]


def take_rows(comparisons: Comparisons[T], indices: Any) -> Comparisons[T]:
    """Pick rows by an index array of any shape; -1 gives padding: weight 0, target 1/2, ids -1.

    Padding repeats the items of row 0, so that families never meet an item that could not occur. numpy indices of
    numpy rows stay numpy.
    """
    xp = jnp if isinstance(indices, jax.Array) else np
    safe = xp.where(indices < 0, 0, indices)
    picked = jax.tree.map(lambda leaf: xp.take(leaf, safe, axis=0), comparisons)
    return _masked(picked, indices < 0, xp)


def epoch(seed: int | jax.Array, number: Any, comparisons: Comparisons[T], batch_size: int) -> Comparisons[T]:
    """Lay out epoch `number` as `[steps, batch_size]` rows, ready for `lax.scan` (`train.make_epoch_step`)."""
    return take_rows(comparisons, epoch_indices(seed, number, len(comparisons.weight), batch_size))


def resident(
    items: Item, comparisons: Comparisons[Any], *, seed: int | jax.Array, batch_size: int, start: int = 0
) -> Iterator[Comparisons[Item]]:
    """Yield the batches of steps `start`, `start + 1`, ... without end, from features on the device."""
    items, comparisons = jax.device_put((items, comparisons))
    for indices in _index_batches(seed, len(comparisons.weight), batch_size, start):
        yield gather(items, take_rows(comparisons, jnp.asarray(indices)))


def stream(
    items: Item | str | Path,
    comparisons: Comparisons[Any],
    *,
    seed: int | jax.Array,
    batch_size: int,
    start: int = 0,
    sharding: jax.sharding.Sharding | None = None,
) -> Iterator[Comparisons[Item]]:
    """Yield the batches of `resident` from features larger than memory.

    `items` is an Item of numpy arrays, memory-mapped or not, or the path of a .npy matrix of embeddings. One thread
    reads the next batch, each needed row once and in file order, while the caller computes. Errors of the thread are
    raised here; closing the generator ends it.
    """
    source = items if isinstance(items, Item) else Item(embedding=np.load(items, mmap_mode="r"))  # type: ignore[arg-type]
    batches = _index_batches(seed, len(comparisons.weight), batch_size, start)

    def read() -> Comparisons[Item]:
        batch = _read(source, take_rows(comparisons, next(batches)))
        return jax.device_put(batch, sharding)

    return _prefetched(read)


def group_by_user(comparisons: Comparisons[T], users: int, max_rows: int | None = None) -> Comparisons[T]:
    """Lay out numpy rows as `[users, rows]`, each user's in their order, filled up with weight 0.

    `rows` is the largest count of a user, or `max_rows` if that is fewer: later rows of a user are left out, as are
    rows of users outside 0..users-1.
    """
    user = np.asarray(comparisons.user)
    order = np.argsort(user, kind="stable")
    order = order[(user[order] >= 0) & (user[order] < users)]
    counts = np.bincount(user[order], minlength=users)
    place = np.arange(order.size) - np.repeat(np.cumsum(counts) - counts, counts)
    rows = int(counts.max(initial=0))
    rows = rows if max_rows is None else min(rows, max_rows)
    kept = place < rows
    indices = np.full((users, rows), -1, np.int32)
    indices[user[order][kept], place[kept]] = order[kept]
    return take_rows(comparisons, indices)


def pad_to(comparisons: Comparisons[T], rows: int) -> Comparisons[T]:
    """Fill up numpy rows to `rows` with weight 0. Raises ValueError where there are more already.

    With no row to repeat, padding has item row 0 (or an embedding of zeros).
    """
    length = len(comparisons.weight)
    if length > rows:
        raise ValueError(f"{length} comparisons do not fit {rows} rows")
    indices = np.where(np.arange(rows) < length, np.arange(rows), -1)
    if length:
        return take_rows(comparisons, indices)
    blank = jax.tree.map(lambda leaf: np.zeros((rows, *leaf.shape[1:]), leaf.dtype), comparisons)
    return _masked(blank, indices < 0, np)


def _masked(comparisons: Comparisons[T], padding: Any, xp: Any) -> Comparisons[T]:
    fills = {"target": 0.5, "tie": False, "offset": 0.0, "weight": 0.0}
    fills |= dict.fromkeys(("user", "community", "rater", "source"), -1)
    values = {name: getattr(comparisons, name) for name in fills}
    masked = {name: xp.where(padding, xp.asarray(fills[name], v.dtype), v) for name, v in values.items()}
    return replace(comparisons, **masked)  # type: ignore[type-var]


def _index_batches(seed: int | jax.Array, rows: int, batch_size: int, start: int) -> Iterator[np.ndarray]:
    """The same rows as `batch_at`, with one permutation an epoch."""
    steps = steps_per_epoch(rows, batch_size)
    for number in count(start // steps):
        order = np.asarray(epoch_indices(seed, number, rows, batch_size))
        yield from order[start % steps if number == start // steps else 0 :]


def _read(items: Item, rows: Comparisons[Any]) -> Comparisons[Item]:
    wanted, inverse = np.unique(np.concatenate([rows.first, rows.second]), return_inverse=True)
    found = jax.tree.map(lambda leaf: np.asarray(leaf[wanted]), items)
    first, second = np.split(inverse, 2)
    picked = (jax.tree.map(lambda leaf, side=side: leaf[side], found) for side in (first, second))
    return replace(rows, first=next(picked), second=next(picked))  # type: ignore[type-var]


def _prefetched(read: Callable[[], T]) -> Iterator[T]:
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as reader:
        waiting = reader.submit(read)
        while True:
            batch = waiting.result()
            waiting = reader.submit(read)
            yield batch


def _require_column(table: pl.DataFrame, name: str) -> None:
    if name not in table.columns:
        raise DataError(f"no column {name!r} to take communities from; the table has {', '.join(table.columns)}")


def _require_one_value(counts: pl.DataFrame, values: list[str]) -> None:
    for name in values:
        broken = counts.filter(pl.col(name) > 1)
        if broken.height:
            item, prompt, found = broken.select("item_id", "prompt_id", name).row(0)
            raise DataError(
                f"item {item!r} of prompt {prompt!r} has {found} values of {name!r}: give each its own item id"
            )


def _side(table: pl.DataFrame, side: str) -> pl.DataFrame:
    ending = f":{side}"
    attributes = [name for name in table.columns if name.startswith("attr:") and name.endswith(ending)]
    return table.select(
        "prompt_id",
        pl.col(f"{side}_id").alias("item_id"),
        "prompt",
        pl.col(side).alias("text"),
        *(pl.col(name).alias(name.removesuffix(ending)) for name in attributes),
    )


def _item_key(item_id: str) -> pl.Expr:
    return pl.concat_str("prompt_id", item_id, separator="/")  # pl.format panics in polars 2.1 on an empty first chunk


def _names(column: pl.Series) -> tuple[str, ...]:
    return tuple(column.drop_nulls().unique().sort().to_list())


def _positions(column: pl.Series, names: tuple[str, ...]) -> Int[np.ndarray, " rows"]:
    known = pl.DataFrame({"name": pl.Series(names, dtype=pl.Utf8), "index": np.arange(len(names), dtype=np.int32)})
    asked = pl.DataFrame({"name": column.cast(pl.Utf8)})
    joined = asked.join(known, on="name", how="left", maintain_order="left")
    return joined["index"].fill_null(-1).to_numpy(writable=True)


def _item_rows(table: pl.DataFrame, side: str, items: pl.DataFrame) -> Int[np.ndarray, " rows"]:
    keys = table.select(_item_key(side).alias("key"))["key"]
    rows = _positions(keys, tuple(items["item_key"]))
    if rows.size and rows.min() < 0:
        row = int(np.argmax(rows < 0))
        raise DataError(
            f"row {row} (example_id {table['example_id'][row]!r}), {side}: item {keys[row]!r} is not in "
            "the item table; make it from the same table"
        )
    return rows
