"""One person, adapted to a run: what they have said so far, and the state that follows from it.

    user = run.adapt(comparisons, prior="population")     # or prior="community:askdocs"; no comparisons: the prior
    user = user.update(more)                              # in any order the same as all at once, bit for bit
    user = user.forget(["c1"])                            # the state is solved again without them; forget() is all
    user.save("u.safetensors");  run.load_user("u.safetensors")

The state is a function of the comparisons, so the comparisons are kept: a logistic likelihood has no smaller form that
could be added to, or from which one could be taken away exactly. They are sorted by id before they are solved.

What is kept of a comparison, in memory and in the file: the numbers that the run's encoder made of the two responses,
target, tie, weight, community, its `example_id`, and a hash of the pair. No text is kept, nor the name of the user
beyond the pseudonym that `read` gave. What is forgotten is in neither; the file has to be saved again, and copies of
it are not ours to delete.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl

from pluralprefs.adapt import fit_user, infer_user, laplace_user, mode_user
from pluralprefs.adapting import adapt_one
from pluralprefs.data.batches import Vocabulary
from pluralprefs.data.files import DataError, shown
from pluralprefs.data.ids import content_id, map_unique
from pluralprefs.fitting import Rows, gathered, take
from pluralprefs.registry.files import load_arrays, save_arrays
from pluralprefs.registry.folder import RunFolder
from pluralprefs.types import Comparisons, Covariance, InfersUser, Item, UserPosterior
from pluralprefs.users import Users, neutral, ravel

POPULATION = "population"
COMMUNITY = "community:"
ADAPTERS: dict[str, Callable[..., UserPosterior]] = {"laplace": laplace_user, "map": mode_user}


class Adapts(Protocol):
    """What a user needs of a run: the fitted model, what it was fitted on, and how it reads a table."""

    @property
    def folder(self) -> RunFolder: ...
    @property
    def experiment(self) -> Any: ...
    @property
    def model(self) -> Any: ...
    @property
    def users(self) -> Users: ...
    @property
    def vocabulary(self) -> Vocabulary: ...
    @property
    def notes(self) -> dict[str, Any]: ...
    @property
    def fingerprint(self) -> str: ...
    def arrays(self, table: pl.DataFrame) -> tuple[Item, Rows]: ...
    def encode(self, items: pl.DataFrame) -> Item: ...
    def prior(self) -> UserPosterior: ...


@dataclass(frozen=True)
class AdaptedUser:
    """A user of a run; see the module. Every change gives another one and leaves this one as it was.

    `prior` is "population" or "community:NAME", from which the user departs wherever a row names no community itself.
    `method` is "laplace", "map" (which has no uncertainty) or "" for the run's own adapter. `rows` are the comparisons
    in the order in which they came (None where there are none), `ids` their example_ids and `pairs` hashes of what was
    compared, whichever came first.
    """

    run: Adapts
    name: str
    prior: str
    method: str
    posterior: UserPosterior
    ids: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()
    rows: Comparisons[Item] | None = None

    def update(self, more: pl.DataFrame) -> AdaptedUser:
        """The user after more comparisons (of this user, or of none). An id that is there already counts again.

        Who has no name takes that of the comparisons. A row of weight 0 is kept and says nothing. Raises DataError for
        comparisons of somebody else.
        """
        if not self.name and (name := one_name(more)):
            return replace(self, name=name).update(more)
        strangers = more.filter(pl.col("user_id").is_not_null() & (pl.col("user_id") != self.name))
        if strangers.height:
            raise DataError(f"the comparisons are of user {shown(strangers['user_id'][0])}, not of "
                            f"{shown(self.name)}: give each user their own")  # fmt: skip
        if not more.height:
            return self
        items, index = self.run.arrays(self.own(more))
        rows = jax.tree.map(np.asarray, gathered(items, index))
        both = rows if self.rows is None else jax.tree.map(lambda a, b: np.concatenate([a, b]), self.rows, rows)
        ids, pairs = (*self.ids, *more["example_id"]), (*self.pairs, *pair_ids(more))
        return replace(self, ids=ids, pairs=pairs, rows=both)._solved()

    def forget(self, ids: Collection[str] | None = None) -> AdaptedUser:
        """The user without the comparisons of these example_ids; without any, where none is named.

        Raises DataError where an id is not among them.
        """
        if isinstance(ids, str):
            raise TypeError("forget takes a list of example_ids, ['c1'], or nothing for all of them")
        unknown = sorted(set(ids or ()) - set(self.ids))
        if unknown:
            raise DataError(f"example_id {shown(unknown[0])}: no such comparison of user {shown(self.name)}; there are "
                            f"{len(self.ids)}, see user.ids")  # fmt: skip
        return self._keep([i for i, name in enumerate(self.ids) if ids is not None and name not in ids])

    def undo(self) -> AdaptedUser:
        """The user before the comparison that came last; the same where there is none."""
        return self._keep(list(range(len(self.ids) - 1)))

    def _keep(self, places: list[int]) -> AdaptedUser:
        rows = None if not places else take(self.rows, np.array(places))
        ids, pairs = (tuple(names[i] for i in places) for names in (self.ids, self.pairs))
        return replace(self, ids=ids, pairs=pairs, rows=rows)._solved()

    def _solved(self) -> AdaptedUser:
        """The user with the state that follows from the comparisons, in the order of their ids."""
        if self.rows is None:
            return replace(self, posterior=start(self.run, self.method))
        rows = take(self.rows, np.array(sorted(range(len(self.ids)), key=self.ids.__getitem__)))
        temper = self.run.notes.get("temper", 1.0)
        rows = rows.replace(weight=(rows.weight * temper).astype(np.float32))
        found = adapt_one(self.run.model, self.run.users, rows, adapter=adapter(self.run, self.method))
        check_finite([self.name], jax.tree.map(lambda x: x[None], found))
        return replace(self, posterior=found.replace(base=self.run.fingerprint))

    def own(self, table: pl.DataFrame) -> pl.DataFrame:
        """The same rows as this user's: named so, and of the user's community where they name none."""
        column = self.run.experiment.community
        community = self.prior.removeprefix(COMMUNITY) if self.prior.startswith(COMMUNITY) else None
        there = pl.col(column) if column in table.columns else pl.lit(None, pl.Utf8)
        return table.with_columns(
            pl.lit(self.name, pl.Utf8).alias("user_id"), there.fill_null(pl.lit(community, pl.Utf8)).alias(column)
        )

    @property
    def community(self) -> int:
        """The number of the community that the user departs from, -1 for the population."""
        if self.prior == POPULATION:
            return -1
        return self.run.vocabulary.communities.index(self.prior.removeprefix(COMMUNITY))

    def save(self, path: str | Path) -> None:
        """Write state and comparisons to one safetensors file, whole or not at all; see the module for what is in it.

        `Run.load_users` reads it too, as the state alone.
        """
        kept = {f"rows/{name}": value for name, value in flat(self.rows).items()}
        about = {"name": self.name, "prior": self.prior, "method": self.method, "ids": self.ids, "pairs": self.pairs}
        save_states(path, self.run, {self.name: self.posterior}, kept, {"user": json.dumps(about, ensure_ascii=False)})


def check_finite(names: Sequence[str], stacked: UserPosterior) -> None:
    """Raise DataError where a user of a stack of posteriors [users, ...] has a state that is not finite."""
    whole = [np.isfinite(x).reshape(len(names), -1).all(axis=1) for x in jax.tree.leaves(stacked.mean) if np.size(x)]
    wrong = np.flatnonzero(~np.all(whole, axis=0)) if whole else []
    if len(wrong):
        raise DataError(
            f"adapt: the state of user {shown(names[wrong[0]])} is not finite: some features of their "
            "comparisons are far larger than those of training. Correct them, or leave them out"
        )


def adapted(run: Adapts, table: pl.DataFrame | None, prior: str, method: str) -> AdaptedUser:
    """One user from their comparisons, or from none. See `Run.adapt`."""
    if prior != POPULATION and not prior.startswith(COMMUNITY):
        raise DataError(f'prior {prior!r}: write "population" or "community:NAME"')
    community = prior.removeprefix(COMMUNITY)
    if prior != POPULATION and community not in run.vocabulary.communities:
        known = ", ".join(run.vocabulary.communities) or "none"
        raise DataError(f"prior {prior!r}: the run's communities are: {known}")
    if prior != POPULATION and not np.asarray(run.users.community_root).any():
        raise DataError(f"prior {prior!r}: {run.folder.name} fitted no communities (users.levels), they are its "
                        'population: write "population"')  # fmt: skip
    name = "" if table is None else one_name(table)
    user = AdaptedUser(run, name, prior, method, start(run, method))
    return user if table is None else user.update(table)


def one_name(table: pl.DataFrame) -> str:
    """The one user whom a table names, "" where it names none. Raises DataError where it names several."""
    names = table["user_id"].drop_nulls().unique(maintain_order=True).to_list()
    if len(names) > 1:
        raise DataError(f"the comparisons are of {len(names)} users, such as {shown(names[0])} and {shown(names[1])}: "
                        "leave prior out to adapt each of them")  # fmt: skip
    return names[0] if names else ""


def owned(table: pl.DataFrame, users: Collection[str]) -> pl.DataFrame:
    """A table whose rows without a user are the one user's, where there is one only."""
    return table if len(users) != 1 else table.with_columns(pl.col("user_id").fill_null(next(iter(users))))


def adapter(run: Adapts, method: str) -> Callable[..., UserPosterior]:
    """The adapter of a name; "" is the run's own. A family that infers its users has no other than that."""
    if method and method not in ADAPTERS:
        raise DataError(f"method {method!r}: write {' or '.join(map(repr, ADAPTERS))}")
    if isinstance(run.model, InfersUser):
        if method:
            raise DataError(f"method {method!r}: {run.folder.name} infers users, its only method: leave it out")
        return infer_user
    return ADAPTERS[method] if method else run.experiment.adapter


def start(run: Adapts, method: str) -> UserPosterior:
    """The state of a user of whom nothing is known; a point estimate where the method makes one."""
    if adapter(run, method) in (fit_user, mode_user):  # whose prior is the Gaussian, whatever the table's
        return UserPosterior(neutral(run.model), None, run.fingerprint)
    return run.prior()


def pair_ids(table: pl.DataFrame) -> list[str]:
    """A hash of prompt and responses a row, whichever response came first."""
    low, high = pl.min_horizontal("first_id", "second_id"), pl.max_horizontal("first_id", "second_id")
    keys = table.select(key=pl.concat_str(["prompt_id", low, high], separator="\x1f"))["key"]
    return map_unique(keys, content_id, pl.Utf8).to_list()


def flat(tree: Any) -> dict[str, np.ndarray]:
    """The arrays of a pytree by their paths, "first/embedding"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def save_states(
    path: str | Path, run: Adapts, posteriors: Mapping[str, UserPosterior],
    kept: Mapping[str, np.ndarray] | None = None, about: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Write user states to one safetensors file, with their names and the model's fingerprint in its metadata."""
    arrays = {}
    for number, posterior in enumerate(posteriors.values()):
        arrays[f"{number}/mean"] = np.asarray(ravel(posterior.mean)[0])
        if posterior.covariance is not None:
            arrays[f"{number}/root"] = np.asarray(posterior.covariance.root)
            arrays[f"{number}/downdate"] = np.asarray(posterior.covariance.downdate)
    arrays["users"] = np.asarray(len(posteriors))
    names = json.dumps(list(posteriors), ensure_ascii=False)
    metadata = {"base": run.fingerprint, "users": names, "run": run.folder.name}
    save_arrays(path, arrays | dict(kept or {}), metadata | dict(about or {}))


def load_states(path: str | Path, run: Adapts) -> dict[str, UserPosterior]:
    """Read user states. Raises DataError where they belong to another model."""
    arrays, metadata = _belonging(path, run)
    return _states(arrays, metadata, run)


def load_user(path: str | Path, run: Adapts) -> AdaptedUser:
    """Read what `AdaptedUser.save` wrote. Raises DataError for another model's user, or states without comparisons."""
    arrays, metadata = _belonging(path, run)
    if "user" not in metadata:
        raise DataError(f"{path}: holds states without the comparisons behind them, which can be scored, but not "
                        "updated; adapt one user with --prior (in Python: run.adapt(..., prior=...).save)")  # fmt: skip
    try:
        about = json.loads(metadata["user"])
        user = AdaptedUser(
            run, about["name"], about["prior"], about["method"], _states(arrays, metadata, run)[about["name"]],
            tuple(about["ids"]), tuple(about["pairs"]), _rows(arrays),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: is not a whole user ({error!r}); adapt the user again") from error
    if len({len(user.ids), len(user.pairs), 0 if user.rows is None else len(user.rows.target)}) > 1:
        raise DataError(f"{path}: its comparisons and their names differ in number; adapt the user again")
    return user


def is_one_user(path: str | Path) -> bool:
    """Whether `load_user` can read a file of states."""
    return "user" in load_arrays(path)[1]


def _belonging(path: str | Path, run: Adapts) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    arrays, metadata = load_arrays(path)
    if metadata.get("base") != run.fingerprint and metadata.get("run") == run.folder.name:
        raise DataError(f"{path}: these users were adapted to another fit of {run.folder.name!r}: give the same --seed "
                        "and --communities, or adapt them again")  # fmt: skip
    if metadata.get("base") != run.fingerprint:
        raise DataError(f"{path}: these users belong to run {metadata.get('run', '?')!r}, not to "
                        f"{run.folder.name!r}: adapt them to this run")  # fmt: skip
    return arrays, metadata


def _states(arrays: dict[str, np.ndarray], metadata: dict[str, str], run: Adapts) -> dict[str, UserPosterior]:
    unravel = ravel(neutral(run.model))[1]
    found = {}
    for number, name in enumerate(json.loads(metadata["users"])):
        root = arrays.get(f"{number}/root")
        downdate = arrays.get(f"{number}/downdate", np.zeros((0, 0)))
        covariance = None if root is None else Covariance(jnp.asarray(root), jnp.asarray(downdate))
        found[name] = UserPosterior(unravel(jnp.asarray(arrays[f"{number}/mean"])), covariance, run.fingerprint)
    return found


def _rows(arrays: dict[str, np.ndarray]) -> Comparisons[Item] | None:
    """The comparisons of a file, None where it holds none."""
    kept: dict[str, Any] = {
        name.removeprefix("rows/"): value for name, value in arrays.items() if name.startswith("rows/")
    }
    if not kept:
        return None

    def item(side: str) -> Item:
        return Item(**{name.removeprefix(side): value for name, value in kept.items() if name.startswith(side)})

    rest: dict[str, Any] = {name: value for name, value in kept.items() if "/" not in name}
    return Comparisons(first=item("first/"), second=item("second/"), **rest)
