"""Adapt more users than fit in memory: tables of users in, one file of states a table out.

    for shard in write_shards(run, tables, "states"):    # tables: any iterable; each user's rows are in one of them
        print(shard)
    states = read_shard(run, "states/users-00007.safetensors")      # {user_id: UserPosterior}

Memory is that of one table and its states. A shard is written whole or not at all, and one that is there already is
not solved again: the same call goes on where it was stopped. A shard holds posteriors stacked by how they are factored;
where the prior's own root is part of the factor it is not stored a user. It holds no comparisons (see `adapted`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import polars as pl

from pluralprefs.data.files import DataError, shown
from pluralprefs.data.ids import stable_hash
from pluralprefs.registry.files import load_arrays, save_arrays
from pluralprefs.types import Covariance, UserPosterior
from pluralprefs.users import neutral, ravel

if TYPE_CHECKING:
    from pluralprefs.run import Run

SAID = ("user_id", "example_id", "prompt_id", "first_id", "second_id", "target", "weight")  # what a state follows from


def write_shards(run: Run, tables: Iterable[pl.DataFrame], folder: str | Path, *, method: str = "") -> Iterator[Path]:
    """Adapt the users of one table after the other and yield the file of each, `users-00000.safetensors` and so on.

    Raises DataError where a user occurs in two tables, or a shard is there that is of other users or comparisons,
    another method or another model.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[int] = set()  # hashes: 64 bits a user are all that grows with their number
    for number, table in enumerate(tables):
        path = folder / f"users-{number:05d}.safetensors"
        names = table["user_id"].fill_null("").unique(maintain_order=True).to_list()
        hashes = [stable_hash(name) for name in names]
        again = next((name for name, code in zip(names, hashes, strict=True) if code in seen), None)
        if again is not None:
            raise DataError(
                f"user {shown(again)} is in table {number} and in an earlier one: keep a user's rows in one"
            )
        seen.update(hashes)
        numbers = sorted(name for name in table.columns if name.startswith("attr:"))
        columns = (*SAID, run.experiment.community, *numbers)
        said = table.select(name for name in dict.fromkeys(columns) if name in table.columns).sort(pl.all())
        digest = str(stable_hash(f"{method}|{run.fingerprint}|{said.write_csv()}"))
        if path.exists():
            if load_arrays(path)[1].get("digest") != digest:
                raise DataError(
                    f"{path}: is of other users or comparisons, another method or another model: choose an empty folder"
                )
        else:
            _write(run, table, path, method, digest)
        yield path


def read_shard(run: Run, path: str | Path) -> dict[str, UserPosterior]:
    """Read the users of one shard: posteriors by name, as `Run.adapt` gives them. DataError for another model's."""
    loaded, metadata = load_arrays(path)
    arrays: dict[str, Any] = loaded
    if metadata.get("base") != run.fingerprint or "groups" not in metadata:
        raise DataError(f"{path}: is no shard of users of {run.folder.name!r}; adapt them to this run")
    unravel = ravel(neutral(run.model))[1]
    found: dict[str, UserPosterior] = {}
    for part, names in enumerate(json.loads(metadata["groups"])):
        downdate, root = arrays.get(f"{part}/downdate"), arrays.get(f"{part}/root")
        for i, name in enumerate(names):
            covariance = None
            if downdate is not None:
                covariance = Covariance(run.users.user_root if root is None else root[i], downdate[i])
            found[name] = UserPosterior(unravel(arrays[f"{part}/mean"][i]), covariance, run.fingerprint)
    return found


def _write(run: Run, table: pl.DataFrame, path: Path, method: str, digest: str) -> None:
    arrays: dict[str, np.ndarray] = {}
    names: list[list[str]] = []
    shared = np.asarray(run.users.user_root)
    for part, (group, stacked) in enumerate(run.adapt_stacked(table, method=method)):
        names.append(group)
        arrays[f"{part}/mean"] = np.asarray(jax.vmap(lambda one: ravel(one)[0])(stacked.mean))
        if stacked.covariance is None:
            continue
        root = np.asarray(stacked.covariance.root)
        arrays[f"{part}/downdate"] = np.asarray(stacked.covariance.downdate)
        if root.shape[1:] != shared.shape or not (root == shared).all():
            arrays[f"{part}/root"] = root
    metadata = {"base": run.fingerprint, "run": run.folder.name, "digest": digest}
    save_arrays(path, arrays, metadata | {"groups": json.dumps(names, ensure_ascii=False)})
