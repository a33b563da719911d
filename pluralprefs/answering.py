"""Answer questions about responses by a run, many in one call, for users who are named in the question.

A user is looked up among the states that were loaded, then among the run's own (kept unless `--no-save-users`); anybody
else is scored by the community's or the population's prior, and the answer says which. Texts are kept nowhere, not in
the feature cache either. Numbers of rows and of items are rounded up to few, so that after a while nothing is compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import polars as pl

from pluralprefs.adapted import is_one_user
from pluralprefs.adapting import adapt_units
from pluralprefs.attributes.fitting import embedder
from pluralprefs.attributes.source import Predicted
from pluralprefs.data.ids import MESSAGES, content_ids
from pluralprefs.encoders.attributes import AttributeEncoder
from pluralprefs.fitting import step_up, take
from pluralprefs.registry.environment import package_versions
from pluralprefs.types import UserPosterior

if TYPE_CHECKING:
    from pluralprefs.run import Run

Text = str | list[dict[str, str]]
STATES_KEPT = 1024  # of the run's own users, which are solved from their rows when they are first asked for


class ServeError(ValueError):
    """A run or a machine that cannot serve; one line with the cure."""


class Question(NamedTuple):
    """Responses to one prompt, texts or message lists, for one user; None where nobody or no community is named."""

    prompt: Text
    responses: tuple[Text, ...]
    user: str | None = None
    community: str | None = None

    @property
    def rows(self) -> int:
        """Comparisons of the first response with the others; one response is compared with itself."""
        return max(len(self.responses) - 1, 1)

    @property
    def characters(self) -> int:
        """Of the comparisons, each of which repeats the prompt and the first response."""
        first, *others = map(_length, self.responses)
        return self.rows * (_length(self.prompt) + first) + (sum(others) if others else first)


def _length(text: Text) -> int:
    """Characters of a text or of a message list."""
    return len(text or "") if isinstance(text, str | None) else sum(len(str(part)) for part in text)


class Answer(NamedTuple):
    """`rewards` of all responses; of the first against each other one P(first), log-odds and standard deviation."""

    rewards: list[float] | None
    probability_first: list[float]
    log_odds: list[float]
    log_odds_std: list[float]
    user_source: str


class Scorer:
    """Answer questions by a run, many in one call; see the module for whose state is used.

    `users` is a file of states. Raises ServeError for a run that reads more than texts.
    """

    def __init__(self, run: Run, users: Path | None = None) -> None:
        attributes = run.attributes
        if isinstance(run.encoder, AttributeEncoder) or not isinstance(attributes, Predicted | None):
            raise ServeError(f"{run.folder.name}: reads attribute columns, which no request carries; score files with "
                             "`pluralprefs score`")  # fmt: skip
        if attributes is not None:  # its encoder is loaded once, and keeps nothing
            embed = embedder(attributes.predictors.encoder, cache=False, progress=False)
            attributes = replace(attributes, embed=embed)
        self.run = run
        self._scoring = replace(run, attributes=attributes, rows=None, items=None, cache=False)
        self._states = run.load_users(users) if users else {}
        if "" in self._states:
            raise ServeError(f"{users}: holds a state without a name, which no request can ask for; adapt again with "
                             "--user-id")  # fmt: skip
        self._one = run.load_user(users) if users and is_one_user(users) else None
        kept = set() if run.rows is None else set(np.unique(np.asarray(run.rows.user)).tolist())
        self._numbers = {name: at for at, name in enumerate(run.vocabulary.users) if at in kept}
        self._homes = {name: self._home(at) for name, at in self._numbers.items()}
        self._seen = lru_cache(STATES_KEPT)(self._solve)
        self._prior = run.prior()
        self._pooled = bool(np.asarray(run.users.community_root).any())

    def __call__(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer questions in their order. Raises ValueError where the run cannot read one of them."""
        kinds: dict[tuple[type, type], list[int]] = {}
        for place, question in enumerate(questions):
            kinds.setdefault((type(question.prompt), type(question.responses[0])), []).append(place)
        found: dict[int, Answer] = {}
        for places in kinds.values():  # a column holds texts or messages
            found |= dict(zip(places, self._score([questions[place] for place in places]), strict=True))
        return [found[place] for place in range(len(questions))]

    def info(self) -> dict[str, Any]:
        """What is served, without names of users."""
        return {
            "run": self.run.folder.name,
            "family": self.run.experiment.name,
            "fingerprint": self.run.fingerprint,
            "encoder": self.run.encoder.kind,
            "joint": self.run.encoder.joint,
            "max_length": self.run.encoder.renderer.max_length,
            "users": len(self._states.keys() | self._numbers.keys()),
            "communities": len(self.run.vocabulary.communities),
            "version": package_versions().get("pluralprefs"),
        }

    def _score(self, questions: Sequence[Question]) -> list[Answer]:
        whose = [self._state(question) for question in questions]
        table = self._table(questions, [name for name, *_ in whose])
        states = {name: state for name, state, _ in whose}
        scores = self._scoring.score(table, states).to_dict(as_series=False)
        answers, at = [], 0
        for question, (*_, source) in zip(questions, whose, strict=True):
            part = {name: values[at : at + question.rows] for name, values in scores.items()}
            at += question.rows
            rewards = None
            if part["reward_first"][0] is not None:
                rewards = [part["reward_first"][0], *part["reward_second"]][: len(question.responses)]
            others = len(question.responses) - 1
            compared = (part[name][:others] for name in ("probability", "log_odds", "log_odds_std"))
            answers.append(Answer(rewards, *compared, user_source=source))
        return answers

    def _state(self, question: Question) -> tuple[str, UserPosterior, str]:
        """Name, state and source of a question's user; a stranger's name is "". Raw names are known by pseudonyms."""
        for name in () if not question.user else (question.user, self.run.known_as(question.user)):
            if name in self._states:
                return name, self._states[name], "adapted"
            if name in self._numbers:
                return name, self._seen(name), "seen"
        known = self._pooled and question.community in self.run.vocabulary.communities
        return "", self._prior, "community" if known else "population"

    def _home(self, number: int) -> str | None:
        """The community that one of the run's own users departs from: that of most of their rows."""
        assert self.run.rows is not None
        community = np.asarray(self.run.rows.community)[np.asarray(self.run.rows.user) == number]
        usual = int(np.bincount(community + 1).argmax()) - 1
        return self.run.vocabulary.communities[usual] if usual >= 0 else None

    def _solve(self, name: str) -> UserPosterior:
        """The state of one of the run's own users, from the rows that the run kept."""
        rows, items, number = self.run.rows, self.run.items, self._numbers[name]
        assert rows is not None
        assert items is not None
        mine = np.flatnonzero(np.asarray(rows.user) == number)
        unit = np.full(len(mine), number)
        users = self.run.users.replace(peers=None)  # of whom this user may be one
        return adapt_units(self.run.model, users, items, take(rows, mine), unit)[number]

    def _table(self, questions: Sequence[Question], names: Sequence[str]) -> pl.DataFrame:
        """The comparisons that questions ask for, then as many repetitions of the last as make the number round."""
        rows = [
            (question.prompt, question.responses[0], other, name, question.community)
            for question, name in zip(questions, names, strict=True)
            for other in question.responses[1:] or question.responses
        ]
        rows += rows[-1:] * (step_up(len(rows)) - len(rows))
        prompts, first, second, users, communities = map(list, zip(*rows, strict=True))
        text = lambda name, values: pl.Series(name, values, pl.Utf8 if isinstance(values[0], str) else MESSAGES)  # noqa: E731
        table = pl.DataFrame([text("prompt", prompts), text("first", first), text("second", second)])
        table = table.with_columns(content_ids(table[name]).alias(f"{name}_id") for name in table.columns)
        column = self.run.experiment.community
        named = pl.Series(column, communities, pl.Utf8)
        # A user departs from a community of their own where the request names none.
        homes = {name: home for name, home in self._homes.items() if name not in self._states}
        if self._one is not None:
            homes[self._one.name] = self._one.prior.partition(":")[2] or None
        named = named.zip_with(named.is_not_null(), pl.Series([homes.get(user) for user in users], dtype=pl.Utf8))
        return table.with_columns(
            pl.Series("user_id", users, pl.Utf8), named.alias(column), tie=pl.lit(False), target=pl.lit(0.5),
            weight=pl.lit(1.0), annotator_id=pl.lit(None, pl.Utf8), source=pl.lit(None, pl.Utf8),
            example_id=pl.int_range(pl.len()).cast(pl.Utf8),
        )  # fmt: skip
