"""Windows: judgements of one user as shots in a prompt, a question behind them, and the two responses to it.

A window is drawn from a table of comparisons: the number of its shots anew every time, and no pair is both shown and
asked (`data.episodes`). It becomes tokens by `encoders.in_context`. Everything that reads users from prompts, to train
or to predict, reads windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
import polars as pl
from jaxtyping import Array, Float

from pluralprefs.data.batches import TRAINING_CELLS, index_rows, item_table, take_rows, vocabulary
from pluralprefs.data.episodes import episode_epoch
from pluralprefs.encoders.in_context import Prompter, Shot, padded
from pluralprefs.encoders.tokens import Content, Rendered
from pluralprefs.fitting import Rows, take
from pluralprefs.pytrees import pytree
from pluralprefs.types import Comparisons, Episode, Replaceable, Tokens


@pytree
class Windows(Replaceable):
    """A batch: comparisons whose tokens hold the shots, and where there are any the users' descriptions behind theirs.

    `reference` has the reference's log-probabilities of first and second responses, once they are known.
    """

    rows: Comparisons[Tokens]
    description: Tokens | None = None
    reference: Float[Array, "2 rows"] | None = None


@dataclass(frozen=True)
class Drawn:
    """How windows are drawn: `epochs` passes, at most `shots` in a window, `queries` windows of a user in a batch."""

    epochs: int = 1
    batch_size: int = 16
    shots: int = 8
    queries: int = 1

    def __post_init__(self) -> None:
        if not (self.epochs >= 1 and self.shots >= 0 and 1 <= self.queries <= self.batch_size):
            raise ValueError(f"{self}: needs epochs >= 1, shots >= 0 and 1 <= queries <= batch_size")


class Asked(NamedTuple):
    """A question about two responses, and the shots of the user whose preference is asked for."""

    shots: Sequence[Shot]
    question: Content
    first: Content
    second: Content
    description: str | None = None


class Corpus:
    """A table of comparisons as index rows and texts, from which windows are made.

    `table` is split (columns fold and cell). Descriptions are by user_id, of all users of training rows. Raises
    ValueError for a user without one.
    """

    def __init__(
        self, table: pl.DataFrame, prompter: Prompter, descriptions: Mapping[str, str] | None = None
    ) -> None:  # fmt: skip
        known = vocabulary(table)
        self.table, self.prompter = table, prompter
        self.items = item_table(table)
        self.rows = index_rows(table, self.items, known)
        self.prompts, self.texts = (self.items[name].to_list() for name in ("prompt", "text"))
        missing = [] if descriptions is None else [name for name in known.users if name not in descriptions]
        if missing:
            raise ValueError(f"no description of user {missing[0]!r}: describe all users of training rows, or none")
        self.descriptions = None if descriptions is None else [descriptions[name] for name in known.users]

    def training(self) -> Rows:
        """The rows of known users that are there to train on."""
        cells = self.table["cell"].is_in(TRAINING_CELLS).fill_null(False).to_numpy()
        return take(self.rows, np.flatnonzero(cells & (np.asarray(self.rows.user) >= 0)))

    def shots(self, rows: Rows, *, flipped: bool = False) -> list[Shot]:
        """Rows as shots, with their labels reversed where `flipped`."""
        found = []
        for first, second, target, tie in zip(rows.first, rows.second, rows.target, rows.tie, strict=True):
            preferred, other = (first, second) if target >= 0.5 else (second, first)
            shot = Shot(self.prompts[first] or "", self.texts[preferred], self.texts[other], bool(tie) or target == 0.5)
            found.append(shot.reversed if flipped else shot)
        return found

    def asked(self, row: Rows, shots: Sequence[Shot], description: str | None = None) -> Asked:
        """One row as a question behind shots."""
        return Asked(shots, self.prompts[row.first] or "", self.texts[row.first], self.texts[row.second], description)

    def description(self, rows: Rows, at: int) -> str | None:
        """What is known in words of the user of a row of `training`; None where nobody is described."""
        return None if self.descriptions is None else self.descriptions[int(rows.user[at])]

    def windows(self, episodes: Episode[Any], batch_size: int) -> Windows:
        """Render index episodes [users, shots | queries] of `training` rows, filled up to `batch_size` windows."""
        asked, rows, told = [], [], []
        for line in range(len(episodes.query.weight)):
            shown, wanted = (take(part, line) for part in (episodes.support, episodes.query))
            place = np.flatnonzero(np.asarray(wanted.weight) > 0)
            if not len(place):
                continue
            shots = self.shots(take(shown, np.flatnonzero(np.asarray(shown.weight) > 0)))
            said = self.description(wanted, place[0])
            each = [take(wanted, at) for at in place]
            asked += [self.asked(row, shots, said) for row in each]
            rows += each
            if said is not None:
                told.append(self.prompter.description(shots, said))
        filled = tokens_of(self.prompter, asked, jax.tree.map(_stack, *rows), batch_size)
        if not told:
            return Windows(filled)
        return Windows(filled, padded(told, max_length=self.prompter.renderer.max_length, batch=batch_size))

    def stream(self, rows: Rows, seed: int, drawn: Drawn) -> Iterator[Windows]:
        """Windows of `rows` in batches, a function of the seed: drawn again they are the same."""
        for number in range(drawn.epochs):
            epoch = episode_epoch(seed, number, rows, drawn.batch_size, shots=drawn.shots, queries=drawn.queries)
            for step in range(len(epoch.query.weight)):
                episodes = jax.tree.map(lambda x: x[step], epoch)  # noqa: B023
                if (np.asarray(episodes.query.weight) > 0).any():
                    yield self.windows(episodes, drawn.batch_size)


def unknown(count: int) -> Comparisons[Any]:
    """Rows of which nothing is known."""
    none: Any = np.full(count, -1, np.int32)
    zero: Any = np.zeros(count, np.float32)
    return Comparisons(
        first=none, second=none, target=zero + 0.5, tie=zero > 0, user=none, community=none, rater=none, source=none,
        offset=zero, weight=zero + 1,
    )  # fmt: skip


def tokens_of(prompter: Prompter, asked: Sequence[Asked], rows: Comparisons[Any], size: int) -> Comparisons[Tokens]:
    """The questions as tokens, beside what else their rows hold, filled up to `size` rows of weight 0."""
    pairs = [
        prompter.responses(each.shots, each.question, (each.first, each.second), each.description) for each in asked
    ]
    most = prompter.renderer.max_length
    sides: list[list[Rendered]] = [[pair[side] for pair in pairs] for side in (0, 1)]
    length = padded(sides[0] + sides[1], max_length=most).ids.shape[1]
    first, second = (padded(side, max_length=most, length=length, batch=size) for side in sides)
    filled = take_rows(rows, np.where(np.arange(size) < len(pairs), np.arange(size), -1))
    return filled.replace(first=first, second=second)  # type: ignore[return-value]


def _stack(*leaves: Any) -> np.ndarray:
    return np.stack(leaves)
