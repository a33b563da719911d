"""Several processes, a host each or more, that compute one run: who is who, and arrays that belong to all.

Every process runs the same program on the same judgements, of which each may hold the texts of its own part alone
(`data.parts`). What is trained by gradient is one computation over all devices of all processes: parameters are
everywhere (those of an encoder where name rules place them), each process puts its own part of a batch on its devices.
What is made of texts (tokens, features, lengths) and what is scored is divided and gathered, however unevenly. Fits by
Newton's method are repeated by each process. Process 0 writes.

With one process every function here is the identity, and none needs to be asked first.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Bool, Int, Shaped, UInt8

from pluralprefs.sharding import BATCH_AXES, make_mesh, replicated, shard_rules

SLAB = 2**26  # bytes that are sent at a time, of all processes: they pass through the memory of each device


def connect(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Join the processes of a run, before JAX computes anything.

    `coordinator` is "address:port" of process 0, `processes` how many there are and `process` which this one is, from
    0. With none of them, a SLURM step of several tasks and a TPU pod (GKE or not) are found by JAX itself, and anywhere
    else there is one process; `processes=1` says so in a SLURM step whose tasks are runs of their own. Raises
    ValueError where some are missing or do not fit.
    """
    if processes == 1 and coordinator is None and not process:
        return
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        if in_cluster(os.environ):
            jax.distributed.initialize()
        return
    if missing:
        raise ValueError(f"several processes: {missing[0]} is missing; give coordinator, processes and process")
    assert coordinator is not None  # for the type checker, as the next line
    assert processes is not None and process is not None  # noqa: PT018
    if not 0 <= process < processes:
        raise ValueError(f"process {process} of {processes}: count processes from 0 to {processes - 1}")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"coordinator {coordinator!r}: give address:port of process 0, for example 10.0.0.1:8476")
    jax.distributed.initialize(coordinator, processes, process)


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether a scheduler started several processes that belong together: a SLURM step, or the hosts of a TPU pod.

    >>> in_cluster({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "4"}), in_cluster({"TPU_WORKER_HOSTNAMES": "one"})
    (True, False)
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "")
    slices = environment.get("MEGASCALE_NUM_SLICES", "")
    return (
        ("SLURM_JOB_ID" in environment and tasks.isdecimal() and int(tasks) > 1)
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or (slices.isdecimal() and int(slices) > 1)
    )


def writes() -> bool:
    """Whether this process writes the run folder and speaks to the user."""
    return jax.process_index() == 0


def all_devices() -> NamedSharding | None:
    """The sharding of what all devices hold; None with one process."""
    return replicated(make_mesh()) if jax.process_count() > 1 else None


def everywhere(tree: Any) -> Any:
    """The same values on all devices of all processes, which must all have them."""
    place = all_devices()
    return tree if place is None else jax.tree.map(lambda leaf: _placed(leaf, place), tree)


def tables_divided(tree: Any) -> Any:
    """The same values `everywhere`, but for tables of users and communities, which all devices divide by rows.

    A table whose rows the devices do not divide is copied. What was divided is asked for by `whole`.
    """
    return tree if jax.process_count() == 1 else placed(tree, shard_rules(tree, make_mesh()))


def placed(tree: Any, places: Any) -> Any:
    """The same values, which all processes must have, where `places` (a sharding, or one a leaf) says.

    Each process puts only what its own devices hold.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, places)
    if isinstance(places, NamedSharding):
        return jax.tree.map(lambda leaf: _placed(leaf, places), tree)
    return jax.tree.map(_placed, tree, places)


def whole(tree: Any) -> Any:
    """What several processes hold parts of, as arrays of each process: all have to ask. Of one process, the same."""
    if jax.process_count() == 1:
        return tree
    from jax.experimental.multihost_utils import process_allgather

    return jax.tree.map(lambda leaf: leaf if _known(leaf) else process_allgather(leaf, tiled=True), tree)


def spread(tree: Any) -> bool:
    """Whether a tree has arrays of which this process holds a part: what uses them has to be asked by all."""
    return not all(_known(leaf) for leaf in jax.tree.leaves(tree))


def here(tree: Any) -> Any:
    """What is `everywhere` as arrays of this process alone, which may meet others of its own."""
    return tree if jax.process_count() == 1 else jax.tree.map(lambda leaf: jax.numpy.asarray(np.asarray(leaf)), tree)


def split_rows(batches: Any) -> Any:
    """Comparisons [..., rows] with the rows divided over all devices; each process makes those of its own.

    Rows are filled up with weight 0 (`Comparisons` of item rows) to a number that the devices divide.
    """
    if jax.process_count() == 1:
        return batches
    mesh = make_mesh()
    rows = batches.weight.shape[-1]
    short = -rows % mesh.size
    filled = jax.tree.map(lambda leaf: _filled(np.asarray(leaf), short), batches)
    filled = filled.replace(weight=filled.weight * (np.arange(rows + short) < rows))
    place = NamedSharding(mesh, PartitionSpec(*[None] * (filled.weight.ndim - 1), BATCH_AXES))
    return jax.tree.map(lambda leaf: _placed(leaf, place), filled)


def own_units(unit: Sequence[int] | np.ndarray) -> np.ndarray:
    """The positions of the units (users, say) that this process scores."""
    return np.flatnonzero(np.asarray(unit) % jax.process_count() == jax.process_index())


def own_rows(known: Bool[np.ndarray, " rows"]) -> Int[np.ndarray, " own"]:
    """The positions of the rows that this process works on, of those that it knows; each row has one process.

    A row goes in turn to those who know it, and one that nobody knows to any. All have to ask.
    """
    if jax.process_count() == 1:
        return np.arange(len(known))
    require_same(f"{len(known)} rows")
    sent = exchanged(np.packbits(known).tobytes())
    masks = [np.frombuffer(bits, np.uint8) for bits in sent]
    return np.flatnonzero(workers(masks, len(known)) == jax.process_index())


def workers(masks: Sequence[UInt8[np.ndarray, " bytes"]], rows: int) -> Int[np.ndarray, " rows"]:
    """The process of each row, from which rows each process knows, as packed bits.

    >>> workers([np.packbits([1, 1, 1, 0, 0]), np.packbits([1, 1, 0, 1, 0])], rows=5)
    array([0, 1, 0, 1, 0], dtype=int32)
    """

    def known(process: int) -> Bool[np.ndarray, " rows"]:  # one at a time: there may be many processes and many rows
        return np.unpackbits(masks[process], count=rows).astype(bool)

    able = np.zeros(rows, np.int32)
    for process in range(len(masks)):
        able += known(process)
    nobody = able == 0
    turn = np.arange(rows, dtype=np.int32) % np.where(nobody, len(masks), able)
    found, before = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    for process in range(len(masks)):
        can = known(process) | nobody
        found[can & (before == turn)] = process
        before += can
    return found


def divided(
    known: Bool[np.ndarray, " rows"],
    compute: Callable[[Int[np.ndarray, " own"]], Shaped[np.ndarray, "own ..."]],
) -> Shaped[np.ndarray, "rows ..."]:
    """What `compute` makes of the positions of rows, a row of an array each: every row by one process, on all.

    See `own_rows` for who computes what. What `compute` makes of no rows must have the type and width of the others.
    """
    own = own_rows(known)
    with all_or_none():
        found = compute(own)
    return gathered(found, own, len(known))


@contextmanager
def all_or_none(kind: type[Exception] = RuntimeError) -> Iterator[None]:
    """What a process does by itself, between what all do: where one fails all do, for they would wait for it.

    The one that failed raises its own error, the others the same line as a `kind`.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    line = "" if own is None else f"{own}" if isinstance(own, kind) else f"{type(own).__name__}: {own}"
    told = [said.decode() for said in exchanged(line.encode())]
    if own is not None:
        raise own
    if any(told):
        raise kind(next(said for said in told if said))


def gathered(values: np.ndarray, positions: np.ndarray, total: int) -> np.ndarray:
    """Join rows [own, ...] that each process computed at its `positions` to [total, ...], to the bit, on each."""
    if jax.process_count() == 1:
        return values
    rows = exchanged(np.ascontiguousarray(values).tobytes())  # bytes, for JAX would round float64 and int64
    places = exchanged(positions.astype(np.int64).tobytes())
    out = np.zeros((total, *values.shape[1:]), values.dtype)
    for at, found in zip(places, rows, strict=True):
        out[np.frombuffer(at, np.int64)] = np.frombuffer(found, values.dtype).reshape(-1, *values.shape[1:])
    return out


def exchanged(content: bytes) -> list[bytes]:
    """What every process gives, in the order of the processes, on each."""
    if jax.process_count() == 1:
        return [content]
    from jax.experimental.multihost_utils import process_allgather

    long, rest = np.asarray(process_allgather(np.array(divmod(len(content), SLAB), np.int32))).reshape(-1, 2).T
    sizes = long.astype(np.int64) * SLAB + rest
    raw, slabs, slab = np.frombuffer(content, np.uint8), [], max(SLAB // len(sizes), 1)
    for start in range(0, int(sizes.max()), slab):
        left = int(sizes.max()) - start
        most = min(slab, 2 ** (left - 1).bit_length())  # few lengths: a program is compiled for each
        part = raw[start : start + most]
        slabs.append(np.asarray(process_allgather(np.pad(part, (0, most - len(part))))).reshape(len(sizes), most))
    return [b"".join(part[process].tobytes() for part in slabs)[:size] for process, size in enumerate(sizes)]


def agreed(values: Any) -> Any:
    """Process 0's numbers, on each: what decides how many steps are made may not differ by a last bit."""
    if jax.process_count() == 1:
        return values
    from jax.experimental.multihost_utils import broadcast_one_to_all

    return np.asarray(broadcast_one_to_all(np.asarray(values)))


def shared(folder: Path) -> Path | None:
    """Process 0's folder, where every process sees it under that name; None where one does not. Of one, the same."""
    if jax.process_count() == 1:
        return folder
    found = Path(exchanged(str(folder.absolute()).encode())[0].decode())
    return found if all(answer == b"yes" for answer in exchanged(b"yes" if found.is_dir() else b"no")) else None


def require_same(text: str) -> None:
    """Raise ValueError on every process where they do not all say the same."""
    if len(set(exchanged(hashlib.blake2b(text.encode()).digest()))) > 1:
        raise ValueError("the processes have different data or experiments: give all the same files and one command")


def _known(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable


def _placed(leaf: Any, place: NamedSharding) -> jax.Array:
    if not _known(leaf):
        return leaf  # of all processes already
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_placed(jax.random.key_data(leaf), place), impl=jax.random.key_impl(leaf))
    known = np.asarray(leaf)
    return jax.make_array_from_callback(known.shape, place, lambda index: known[index])


def _filled(leaf: np.ndarray, short: int) -> np.ndarray:
    return np.pad(leaf, [(0, 0)] * (leaf.ndim - 1) + [(0, short)], mode="edge") if short else leaf
