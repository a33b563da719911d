"""A fitted run, loaded from its folder: adapt new users, score comparisons, evaluate on other data.

    run = load("runs/2026-11-21T10-32-05-low_rank-mine-7f3a")
    users = run.adapt(comparisons)                 # {user_id: UserPosterior}, all in one call
    scores = run.score(pairs, users)               # rewards, P(first), uncertainty and whose state was used
    user = run.adapt(comparisons, prior="population")     # one user, who can be updated and saved (`adapted`)
    answers = run.score("Which tea?", ["Assam", "Sencha"], user=user)

A folder holds the described experiment, the sizes and names of the data, parameters (Orbax, one checkpoint a seed),
feature maps, and, only where `save_users` was on, the training rows of the seen users: their states are functions of
those rows and are solved again on demand, exactly, instead of being stored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from scipy.special import expit

from pluralprefs.adapt import neutral_size, prior_user
from pluralprefs.adapted import (
    AdaptedUser,
    adapted,
    adapter,
    check_finite,
    flat,
    load_states,
    load_user,
    save_states,
)
from pluralprefs.adapting import (
    adapt_rectangles,
    adapt_units,
    mean_rewards,
    predict_own,
    predict_rows,
    probability_std,
)
from pluralprefs.attributes.reading import SentenceEncoder
from pluralprefs.attributes.source import restore as restore_source
from pluralprefs.backbone import BACKBONE, restore_backbone
from pluralprefs.choosing import against_average, responses_table
from pluralprefs.communities import with_new
from pluralprefs.contrasts import controls
from pluralprefs.data import batches, comparisons, splits
from pluralprefs.data.files import DataError, require_targets
from pluralprefs.data.ids import pseudonym
from pluralprefs.describe import resolve
from pluralprefs.encoders.attributes import AttributeEncoder
from pluralprefs.encoders.cache import Cache, encode_items
from pluralprefs.encoders.features import Features
from pluralprefs.evaluate import evaluate
from pluralprefs.experiment import (
    Experiment,
    attach,
    baseline_predictions,
    draw_model,
    fingerprint,
    item_positions,
    text_lengths,
)
from pluralprefs.fitting import Fitted, Rows, step_up, take
from pluralprefs.metrics import summarise
from pluralprefs.pooling import tempered
from pluralprefs.profiled import of_communities, of_users
from pluralprefs.registry.files import RegistryError, load_arrays
from pluralprefs.registry.folder import RunFolder, open_run
from pluralprefs.saving import SENTENCES, full_covariance
from pluralprefs.train import CheckpointStore
from pluralprefs.types import Comparisons, InfersUser, Item, ScalarReward, UserPosterior
from pluralprefs.users import Peers, Users


@dataclass(frozen=True)
class Run:
    """A loaded run; see the module. `rows` and `items` are the seen users' support, None where it was not kept.

    `judged` are the item ids of `items`, `seed` says which of the run's fits it is. `cache` is where features of texts
    are kept, as `encoders.cache` has it.
    """

    folder: RunFolder
    experiment: Experiment
    model: Any
    users: Users
    vocabulary: batches.Vocabulary
    maps: Features | None
    encoder: Any
    attributes: Any
    notes: dict[str, Any]
    rows: Rows | None
    items: Item | None
    judged: tuple[str, ...]
    fingerprint: str
    seed: int = 0
    cache: Cache = None

    def read(self, path: str | Path, **options: Any) -> pl.DataFrame:
        """Read a file as this run's own data were read: the same columns, the same pseudonyms (`comparisons.read`)."""
        return comparisons.read(path, **{**self._reading(), **options})

    def known_as(self, user_id: str) -> str:
        """The name under which `read` puts a user: a pseudonym, unless the run keeps ids."""
        return pseudonym(user_id) if self._reading().get("pseudonymise", True) else user_id

    def _reading(self) -> dict[str, Any]:
        loader: Any = self.experiment.data
        return dict(loader.keywords) if getattr(loader, "func", None) is comparisons.read else {}

    @overload
    def adapt(self, table: pl.DataFrame, *, method: str = ...) -> dict[str, UserPosterior]: ...
    @overload
    def adapt(self, table: pl.DataFrame | None = ..., *, prior: str, method: str = ...) -> AdaptedUser: ...
    def adapt(
        self, table: pl.DataFrame | None = None, *, prior: str | None = None, method: str = ""
    ) -> dict[str, UserPosterior] | AdaptedUser:
        """Adapt every user of a comparisons table, or, with `prior`, the one user of a table or of none.

        All (one or a hundred thousand): posteriors by user_id. Rows without a user belong to one user, named "". No
        rows give an empty dict. One, who departs from `prior`, "population" or "community:NAME" (a row's own community
        comes first): an `AdaptedUser`, who can be updated, saved and asked.

        A user is at the prior until a comparison says otherwise; order does not matter; contradictory and tied
        comparisons are data. `method` is "laplace", "map" or the run's own adapter. Raises DataError.
        """
        if prior is not None:
            return adapted(self, table, prior, method)
        if table is None:
            raise DataError('adapt: give a table, or a prior such as "population" for a user without comparisons')
        found = {
            name: jax.tree.map(lambda x, i=i: x[i], stacked).replace(base=self.fingerprint)
            for names, stacked in self.adapt_stacked(table, method=method)
            for i, name in enumerate(names)
        }
        return {name: found[name] for name in table["user_id"].fill_null("").unique(maintain_order=True)}

    def adapt_stacked(self, table: pl.DataFrame, *, method: str = "") -> Iterator[tuple[list[str], UserPosterior]]:
        """Yield names of users and their posteriors, stacked [users, ...]: what `user_shards` writes."""
        chosen = adapter(self, method)
        if not table.height:
            return
        names = table["user_id"].fill_null("").to_list()
        place = {name: i for i, name in enumerate(dict.fromkeys(names))}
        order = list(place)
        items, rows = self.arrays(table)
        rows = tempered(rows, self.notes.get("temper", 1.0))
        unit = np.array([place[name] for name in names])
        for units, stacked in adapt_rectangles(self.model, self.users, items, rows, unit, adapter=chosen):
            known = [order[u] for u in units]
            check_finite(known, stacked)
            yield known, stacked

    def prior(self) -> UserPosterior:
        """The posterior of a user of whom nothing is known."""
        return prior_user(self.model, self.users).replace(base=self.fingerprint)

    @overload
    def score(
        self, table: pl.DataFrame, users: Mapping[str, UserPosterior] | None = ..., *, user: AdaptedUser | None = ...
    ) -> pl.DataFrame: ...
    @overload
    def score(
        self, table: str | list[dict[str, str]], users: Sequence[str] | pl.DataFrame, *, user: AdaptedUser
    ) -> pl.DataFrame: ...
    def score(self, table: Any, users: Any = None, *, user: AdaptedUser | None = None) -> pl.DataFrame:
        """Score comparisons, one row each: rewards, log-odds with standard deviation, P(first) and whose state it was.

        `user_source` is "adapted" (given in `users`, or all of them `user`'s), "seen" (a user of the training data,
        kept in the run), else "community" or "population": the prior of a stranger. The probability is moderated by the
        uncertainty.

        Or score responses to one prompt for one user, `score(prompt, responses, user=user)`, one row each: log-odds
        of the response against the average of all of them, with standard deviation. Responses are texts, or a table
        with `response` and the attribute columns that the run reads.
        """
        if isinstance(users, AdaptedUser):
            raise DataError("score: an adapted user is given by name, user=...")
        if not isinstance(table, pl.DataFrame):
            if user is None:
                raise DataError("score(prompt, responses) needs user=, such as run.adapt(prior='population')")
            return self._score_responses(responses_table(table, users), user)
        if user is not None:
            if users is not None:
                raise DataError("score: give users or user, not both")
            table, users = user.own(table), {user.name: user.posterior}
        for name, posterior in (users or {}).items():
            if isinstance(posterior, AdaptedUser):
                raise DataError(f"score: users has an adapted user for {name!r}: give its posterior, or user=")
            if posterior.base not in ("", self.fingerprint):
                raise DataError(f"the state of user {name!r} belongs to another model than {self.folder.name!r}: adapt "
                                "the user to this run")  # fmt: skip
        items, rows = self.arrays(table)
        mean, variance = np.zeros(table.height), np.zeros(table.height)
        names = table["user_id"].fill_null("").to_list()
        given = np.array([name in (users or {}) for name in names], bool)
        self._score_given(items, rows, names, given, users or {}, mean, variance)
        others = np.flatnonzero(~given)
        known = np.where(self.rows is None, -1, rows.user)[others]
        if len(others):
            part = jax.tree.map(lambda x: x[others], rows)
            mean[others], variance[others] = self._score_table(items, part, known)
        pooled = "community" if bool(jnp.any(self.users.community_root > 0)) else "population"
        source = np.where(rows.community >= 0, pooled, "population").astype(object)
        source[others[known >= 0]] = "seen"
        source[given] = "adapted"
        rewards = self._rewards(items, rows, names, users or {})
        logits = mean / np.sqrt(1 + np.pi * variance / 8)
        return table.select("example_id", "user_id").with_columns(
            **rewards,
            log_odds=pl.Series(mean),
            log_odds_std=pl.Series(np.sqrt(variance)),
            probability=pl.Series(expit(logits)),
            user_source=pl.Series(list(source), dtype=pl.Utf8),
        )

    @overload
    def predict_proba(
        self, table: pl.DataFrame, users: Mapping[str, UserPosterior] | None = ..., *, user: AdaptedUser | None = ...,
        return_std: Literal[False] = ...,
    ) -> np.ndarray: ...  # fmt: skip
    @overload
    def predict_proba(
        self, table: pl.DataFrame, users: Mapping[str, UserPosterior] | None = ..., *, user: AdaptedUser | None = ...,
        return_std: Literal[True],
    ) -> tuple[np.ndarray, np.ndarray]: ...  # fmt: skip
    def predict_proba(
        self, table: pl.DataFrame, users: Mapping[str, UserPosterior] | None = None, *, user: AdaptedUser | None = None,
        return_std: bool = False,
    ) -> Any:  # fmt: skip
        """P(first preferred) of each comparison, [rows], and with `return_std` how far it is known, [rows].

        The latter is the standard deviation of the user's own probability under the posterior: 0 where nothing about
        the user is open, at most 1/2.
        """
        scores = self.score(table, users, user=user)
        probability = scores["probability"].to_numpy()
        if not return_std:
            return probability
        return probability, probability_std(scores["log_odds"].to_numpy(), scores["log_odds_std"].to_numpy())

    def _score_responses(self, items: pl.DataFrame, user: AdaptedUser) -> pl.DataFrame:
        found = against_average(self, self.encode(items), items.height, user)
        return pl.DataFrame(
            {"response": items["text"], "log_odds": found.mean, "log_odds_std": np.sqrt(np.diag(found.covariance))}
        )

    def evaluate(self, table: pl.DataFrame) -> pl.DataFrame:
        """Metric rows of every cell, control and baseline on other data, which need no cells.

        Rows of users that the run kept are tested (seen/testpair), with the users' training rows as support; pairs that
        a user was trained on are left out. Of a user it does not know a fifth of the pairs is tested (unseen/testpair)
        and the shots come from the others. New prompts have no cells of their own here. A run that kept no rows cannot
        tell what it, or communities that were added (`with_communities`), were fitted to: leave such rows out.
        """
        items, rows = self.arrays(table)
        if "cell" not in table.columns:
            known = np.zeros(table.height, bool) if self.rows is None else np.isin(rows.user, self.rows.user)
            table = _with_cells(table, known & (np.asarray(rows.user) >= 0), self.trained_on(table, rows))
        draws = splits.support_draws(table, shots=self.experiment.shots, draws=self.experiment.draws)
        support, both, query = self.beside(items, rows)
        fitted = Fitted(self.model, self.users, support, self.notes)
        predictions = evaluate(fitted, both, table, query, draws, model=self.experiment.name,
                               shots=self.experiment.shots, adapter=self.experiment.adapter)  # fmt: skip
        parts = [predictions, baseline_predictions(table, 0)] if predictions.height else [predictions]
        joined = pl.concat(parts)
        return pl.concat([summarise(joined, pool_seeds=True), controls(joined, pool_seeds=True)])

    def with_communities(self, table: pl.DataFrame) -> Run:
        """This run with the communities of a table, which it has never met, fitted to their members' comparisons.

        Each departs from the population as far as its comparisons bear out, under the spread of the communities of
        training; nothing else moves. Strangers who name it start there, `adapt(prior="community:NAME")` departs from
        it, and `community_profile` has its row, with an interval; scores take it for known, as they do all communities.
        Where the run kept its training rows the members become seen users. States of users belong to the run that they
        were adapted in, and this is another.

        Raises DataError for a row without a community, a community that the run knows, a run without that level.
        """
        new = self._new_communities(table)
        vocabulary = self.vocabulary._replace(communities=(*self.vocabulary.communities, *new))
        if self.rows is not None:
            people = table["user_id"].drop_nulls().unique(maintain_order=True).to_list()
            known = set(vocabulary.users)
            vocabulary = vocabulary._replace(users=(*vocabulary.users, *(name for name in people if name not in known)))
        within = replace(self, vocabulary=vocabulary)
        items, rows = within.arrays(table)
        support, both, more = within.beside(items, rows)
        more = tempered(more, self.notes.get("temper", 1.0))
        users = with_new(Fitted(self.model, self.users, more, self.notes), both, len(vocabulary.communities))
        said = f"{self.fingerprint} {fingerprint(table)}"  # of what was said, so that the same again is the same run
        grown = replace(within, users=users, fingerprint=hashlib.sha256(said.encode()).hexdigest()[:32])
        if self.rows is None or self.items is None:
            return grown
        joined = jax.tree.map(lambda a, b: np.concatenate([a, b]), support, more)
        padding = [""] * (int(self.items.embedding.shape[0]) - len(self.judged))
        judged = (*self.judged, *padding, *batches.item_table(table)["item_id"])
        users = _with_members(
            self.model, users, both, joined, np.unique(more.user[more.user >= 0]), len(vocabulary.users)
        )
        return replace(grown, users=users, rows=joined, items=both, judged=judged)

    def _new_communities(self, table: pl.DataFrame) -> list[str]:
        """The communities that a table names, all of which the run can take in. Raises DataError for any other."""
        column, name = self.experiment.community, self.folder.name
        if isinstance(self.model, InfersUser) or not np.asarray(self.users.community_root).any():
            raise DataError(f"{name} fitted no communities, whose spread a new one's comparisons are weighed against: "
                            'fit with users.levels that hold "community"')  # fmt: skip
        if column not in table.columns:
            raise DataError(f"column {column!r}: is missing; it names the community of each row's member")
        lacking = table[column].is_null().arg_true()
        if len(lacking):
            raise DataError(f"row {lacking[0] + 1}, column {column!r}: names no community; give each row that of its "
                            "member")  # fmt: skip
        require_targets(table)
        found = sorted(table[column].unique().to_list())  # numbered alike whatever the order of the rows
        for community in found:
            if community in self.vocabulary.communities:
                raise DataError(f"community {community!r}: {name} was fitted to it; leave its rows out, or train again "
                                "with them")  # fmt: skip
        return found

    def community_profile(
        self, communities: Sequence[str] | None = None, *, test: pl.DataFrame | None = None
    ) -> pl.DataFrame:
        """Attribute profiles of communities, all and the population by default, new ones (`with_communities`) too.

        Preference and attention with intervals; with held-out comparisons in `test`, ablation and Shapley values too
        (`profiles.attribute_weights`), on those pairs that their users were not trained on. Slopes are taken over the
        kept training rows. Raises DataError where the run kept none, TypeError for a family without attributes.
        """
        return of_communities(self, communities, test)

    def profile(
        self, users: Mapping[str, UserPosterior] | Sequence[str] | None = None, *, community: str | None = None,
        test: pl.DataFrame | None = None,
    ) -> pl.DataFrame:  # fmt: skip
        """Attribute profiles of users: preference and attention with intervals (`profiles.user_weights`).

        `users` are adapted ones by name, who depart from `community` (None: from the population), or names of users of
        the training data, who depart each from the community of most of its rows; without `users` all of the latter.
        With held-out comparisons of theirs in `test`, ablation and Shapley values too, on those pairs that the run was
        not trained on with them; of adapted users it does not know the pairs. Slopes are taken over the kept training
        rows. Raises DataError where the run kept none or not that user's, TypeError for a family without attributes.
        """
        return of_users(self, users, community, test)

    def save_users(self, path: str | Path, posteriors: Mapping[str, UserPosterior]) -> None:
        """Write user states to one safetensors file, with their names and this model's fingerprint in its metadata."""
        save_states(path, self, posteriors)

    def load_users(self, path: str | Path) -> dict[str, UserPosterior]:
        """Read user states. Raises DataError where they belong to another model."""
        return load_states(path, self)

    def load_user(self, path: str | Path) -> AdaptedUser:
        """Read one user with the comparisons behind the state, which `AdaptedUser.save` wrote. Raises DataError."""
        return load_user(path, self)

    def arrays(self, table: pl.DataFrame) -> tuple[Item, Rows]:
        """Encode and index a table in this run's vocabulary: items, and rows in terms of them."""
        if not table.height:
            raise DataError("table: holds no comparisons; give at least one")
        items = batches.item_table(table)
        return self.encode(items), batches.index_rows(table, items, self.vocabulary, self.experiment.community)

    def encode(self, items: pl.DataFrame) -> Item:
        """Encode an item table (`data.batches.item_table`) as training items were; the last rows are repetitions."""
        item = encode_items(items, self.encoder, cache=self.cache)
        embedding = np.asarray(item.embedding, np.float32)
        if self.maps is not None:
            embedding = self.maps(embedding, text_lengths(items))
        item = item.replace(embedding=embedding, index=item_positions(items, self.vocabulary))
        item = item if self.attributes is None else attach(self.attributes, items, item)
        place = np.pad(np.arange(items.height), (0, step_up(items.height) - items.height))  # few shapes to compile
        return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[place]), item)

    def _score_given(
        self, items: Item, rows: Rows, names: list[str], given: np.ndarray, users: Mapping[str, UserPosterior],
        mean: np.ndarray, variance: np.ndarray,
    ) -> None:  # fmt: skip
        by_user: dict[str, list[int]] = {}
        for row in np.flatnonzero(given):
            by_user.setdefault(names[row], []).append(int(row))
        for name, index in by_user.items():
            part = jax.tree.map(lambda x, i=index: x[np.array(i)], rows)
            mean[index], variance[index] = predict_rows(self.model, self.users, items, users[name], part)

    def _score_table(self, items: Item, rows: Rows, user: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Score rows for users of the training data, solved again from their rows, or for strangers (-1)."""
        support, both, query = self.beside(items, rows)
        known = np.isin(support.user, user[user >= 0])
        support = jax.tree.map(lambda x: x[known], support)
        stranger = int(user.max(initial=-1)) + 1
        unit = np.where(user >= 0, user, stranger)
        return predict_own(self.model, self.users, both, support, np.asarray(support.user), query, unit)

    def trained_on(self, table: pl.DataFrame, rows: Rows) -> np.ndarray:
        """Which rows are a pair that the same user was trained on; all rows without a user are one such."""
        if self.rows is None:
            return np.zeros(table.height, bool)
        stranger = (np.asarray(rows.user) < 0) & table["user_id"].is_not_null().to_numpy()

        def keys(user: np.ndarray, first: Sequence[str], second: Sequence[str]) -> list[tuple[int, str, str]]:
            return [(u, min(a, b), max(a, b)) for u, a, b in zip(user.tolist(), first, second, strict=True)]

        kept = ([self.judged[i] for i in np.asarray(side)] for side in (self.rows.first, self.rows.second))
        known = set(keys(np.asarray(self.rows.user), *kept))
        asked = keys(np.where(stranger, -2, rows.user), table["first_id"].to_list(), table["second_id"].to_list())
        return np.array([key in known for key in asked], bool)

    def beside(self, items: Item, rows: Rows) -> tuple[Rows, Item, Rows]:
        """Kept training rows, their items before the given ones, and the given rows in terms of both."""
        if self.rows is None or self.items is None:
            return _no_rows(rows), items, rows
        shift = int(self.items.embedding.shape[0])
        if self.items.attributes is not None and items.attributes is None:  # loaded without: new items have none
            shape = (items.embedding.shape[0], *self.items.attributes.shape[1:])
            none = jnp.zeros(shape, self.items.attributes.dtype)
            items = items.replace(attributes=none, attribute_mask=jnp.zeros(shape[:2], bool))
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), self.items, items)
        return self.rows, both, rows.replace(first=rows.first + shift, second=rows.second + shift)

    def _rewards(
        self, items: Item, rows: Rows, names: list[str], users: Mapping[str, UserPosterior]
    ) -> dict[str, pl.Series]:
        """Rewards of both sides under the mean user; null for families without a scalar reward."""
        if not isinstance(self.model, ScalarReward):
            none = pl.Series([None] * len(names), dtype=pl.Float64)
            return {"reward_first": none, "reward_second": none}
        given = [users[name].mean if name in users else None for name in names]
        first, second = mean_rewards(self.model, self.users, items, rows, given)
        return {"reward_first": pl.Series(first), "reward_second": pl.Series(second)}


def _with_members(model: Any, users: Users, items: Item, rows: Rows, members: np.ndarray, count: int) -> Users:
    """The table with `count` users, these members at the means that all their rows give them."""
    more = count - int(users.user.gain.shape[0])
    table = jax.tree.map(lambda x: jnp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1)), users.user)
    if len(members):
        user = np.asarray(rows.user)
        mine = np.flatnonzero(np.isin(user, members))
        found = adapt_units(model, users, items, take(rows, mine), user[mine])
        means = jax.tree.map(lambda *leaves: np.stack(leaves), *(found[int(one)].mean for one in members))
        table = jax.tree.map(lambda all_, x: all_.at[members].set(x), table, means)
    return users.replace(user=table)


def _no_rows(rows: Rows) -> Rows:
    return jax.tree.map(lambda x: x[:0], rows)


def _with_cells(table: pl.DataFrame, known: np.ndarray, trained: np.ndarray) -> pl.DataFrame:
    """Cells for other data, from masks of its rows: of `known` users, and `trained` on."""
    key = pl.concat_str([pl.min_horizontal("first_id", "second_id"), pl.max_horizontal("first_id", "second_id")],
                        separator="|")  # fmt: skip
    share = key.map_elements(lambda text: splits.stable_hash(f"pair|{text}") % 100, return_dtype=pl.Int64)
    cell = (
        pl.when(pl.Series(trained)).then(pl.lit("train")).when(pl.Series(known)).then(pl.lit("seen/testpair"))
        .when(share < 80).then(pl.lit("unseen/support")).otherwise(pl.lit("unseen/testpair"))
    )  # fmt: skip
    return table.with_columns(pl.lit("test").alias("fold"), cell.alias("cell"))


def load(path: str | Path, *, seed: int | None = None, attributes: bool = True) -> Run:
    """Load a run from its folder; `seed` chooses one of its fits, the first that there is by default.

    attributes: whether responses are given theirs, by predictors or from columns. Without them attribute_attention has
    its stand-in, or w . h alone; states of users are the same.

    Raises RegistryError where the folder is no run, the seed is not fitted yet, or a family has other parameters now.
    """
    folder = open_run(path)
    content, where = folder.read(), Path(folder.path)
    fitted = [number for number in content["seeds"] if str(number) in content.get("notes", {})]
    chosen = int([*fitted, *content["seeds"]][0] if seed is None else seed)
    if chosen not in fitted:
        if chosen not in content["seeds"]:
            raise RegistryError(f"{where}: was not fitted with seed {chosen}, but with {content['seeds']}")
        raise RegistryError(f"{where}: the run is {folder.status} and has no parameters of seed {chosen}: continue it "
                            "with `pluralprefs train --resume`")  # fmt: skip
    experiment = resolve(content["experiment"])
    names = {name: tuple(v) for name, v in json.loads((where / "vocabulary.json").read_text("utf8")).items()}
    judged = names.pop("judged")
    vocabulary = batches.Vocabulary(**names)
    sizes = json.loads((where / "sizes.json").read_text("utf8"))
    model = draw_model(experiment, chosen, sizes)
    kept = (where / f"support-{chosen}.safetensors").exists()
    like = Users.init(model, users=len(vocabulary.users), communities=len(vocabulary.communities))
    if full_covariance(experiment):
        size = neutral_size(model)
        like = like.replace(user_root=jnp.zeros((size, size)))
    peers = content["notes"][str(chosen)].get("peers", 0)
    like = like.replace(peers=Peers.empty(model, peers) if peers else None)
    store = CheckpointStore(where / "params" / f"seed-{chosen}", keep=1, alone=True)
    with closing(store):
        try:
            params = store.restore({"model": model, "users": like})
        except ValueError as error:
            raise RegistryError(f"{error}: another version of its family, or a damaged run; train it again") from error
    rows = items = None
    if kept:
        arrays: dict[str, Any] = load_arrays(where / f"support-{chosen}.safetensors")[0]
        rows = Comparisons(**arrays)
        loaded, _ = load_arrays(where / "items.safetensors")
        items = Item(**{name: jnp.asarray(value) for name, value in loaded.items()})
    return Run(
        folder, experiment, params["model"], params["users"], vocabulary, _load_maps(where),
        _encoder(experiment, where), _attributes(experiment, where) if attributes else None,
        content["notes"][str(chosen)], rows, items,
        judged, _fingerprint(params), chosen,
    )  # fmt: skip


def _load_maps(where: Path) -> Features | None:
    if not (where / "features.safetensors").exists():
        return None
    arrays, _ = load_arrays(where / "features.safetensors")
    return Features.restore(arrays)


def _encoder(experiment: Experiment, where: Path) -> Any:
    saved = where / "encoder.json"
    if saved.exists():
        return AttributeEncoder.restore(saved)
    encoder: Any = (experiment.encoder or AttributeEncoder)()
    if isinstance(encoder, SentenceEncoder):
        return encoder.restore(where / SENTENCES)
    return restore_backbone(where / BACKBONE, experiment.backbone, encoder) if experiment.backbone else encoder


def _attributes(experiment: Experiment, where: Path) -> Any:
    if experiment.attributes is None:
        return None
    return restore_source(where) or experiment.attributes()


def _fingerprint(params: Any) -> str:
    """SHA-256 of the parameters that a user state depends on (not of the table of other users)."""
    digest = hashlib.sha256()
    users = params["users"].replace(user=None)
    for name, value in sorted(flat({"model": params["model"], "users": users}).items()):
        digest.update(name.encode() + str(value.shape).encode() + np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()[:32]
