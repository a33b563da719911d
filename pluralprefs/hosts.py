"""Several processes, a host each or more, that compute one run: who is who, and arrays that belong to all.

Every process runs the same program on the same table. What is trained by gradient is one computation over all devices
of all processes: parameters are everywhere (those of an encoder where name rules place them), each process puts its own
part of a batch on its devices. What is scored is divided by users and gathered, however unevenly. Fits by Newton's
method are repeated by each process. Process 0 writes.

With one process every function here is the identity, and none needs to be asked first.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from pluralprefs.sharding import BATCH_AXES, make_mesh, replicated


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


def gathered(values: np.ndarray, positions: np.ndarray, total: int) -> np.ndarray:
    """Join rows [own, ...] that each process computed at its `positions` to [total, ...], to the bit, on each."""
    if jax.process_count() == 1:
        return values
    from jax.experimental.multihost_utils import process_allgather

    most = int(process_allgather(np.int32(len(positions))).max())
    # Bytes, for JAX would round float64 and int64.
    width = math.prod(values.shape[1:])  # said, since a process may have no rows to tell it from
    raw = np.ascontiguousarray(values).reshape(len(positions), width).view(np.uint8)
    places = np.asarray(process_allgather(_upto(positions.astype(np.int32), most, -1))).reshape(-1)
    rows = np.asarray(process_allgather(_upto(raw, most, 0))).reshape(-1, raw.shape[1])
    out = np.zeros((total, *values.shape[1:]), values.dtype)
    out[places[places >= 0]] = np.ascontiguousarray(rows[places >= 0]).view(values.dtype).reshape(-1, *values.shape[1:])
    return out


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
    from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather

    own = str(folder.absolute()).encode()
    told = np.zeros(int(agreed(len(own))), np.uint8)
    if writes():
        told[:] = np.frombuffer(own, np.uint8)
    found = Path(np.asarray(broadcast_one_to_all(told)).astype(np.uint8).tobytes().decode())
    return found if np.asarray(process_allgather(np.int32(found.is_dir()))).all() else None


def require_same(text: str) -> None:
    """Raise ValueError on every process where they do not all say the same."""
    if jax.process_count() == 1:
        return
    from jax.experimental.multihost_utils import process_allgather

    own = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), np.int32)
    if (np.asarray(process_allgather(own)) != own).any():
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


def _upto(rows: np.ndarray, most: int, fill: int) -> np.ndarray:
    return np.pad(rows, [(0, most - len(rows))] + [(0, 0)] * (rows.ndim - 1), constant_values=fill)
