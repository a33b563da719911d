"""What people prefer, by their descriptions: every pair is asked in both orders and counts only if they agree.

A judge that goes by position, or that has no reason to prefer either, contradicts itself when the answers change
places. Such judgements are counted and left out; the share of the others says how far a description decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import polars as pl
from jaxtyping import Int

from pluralprefs.data.files import DataError
from pluralprefs.data.validation import validate
from pluralprefs.personas.passes import Passes
from pluralprefs.personas.responses import PAIRS
from pluralprefs.personas.tasks import Prefer

FIRST, SECOND, INCONSISTENT, UNREADABLE = OUTCOMES = ("first", "second", "inconsistent", "unreadable")
VERDICTS = {None: -1, "first": 0, "second": 1}
OUTCOME = pl.Enum(OUTCOMES)


def both_orders(tasks: Iterable[Prefer]) -> Iterator[Prefer]:
    """Yield each task and the same with the answers exchanged."""
    for task in tasks:
        yield task
        yield task.swapped()


def ask_both(tasks: Sequence[Prefer] | Iterator[Prefer], total: int, passes: Passes) -> Int[np.ndarray, "pairs 2"]:
    """Ask `total` tasks in both orders; 0 for the verdict first, 1 for second, -1 for none, as they were said.

    Column 0 is the task as it stands, column 1 with the answers exchanged. Raises TeacherError.
    """
    verdicts = np.full((total, 2), -1, np.int8)
    flat = verdicts.reshape(-1)
    for place, answer in enumerate(passes.ask(both_orders(tasks), 2 * total)):
        flat[place] = VERDICTS[answer.verdict]
    return verdicts


def outcomes(verdicts: Int[np.ndarray, "pairs 2"]) -> pl.Series:
    """Return the outcome of each pair: first or second where both orders chose the same answer.

    >>> outcomes(np.array([[0, 1], [1, 0], [0, 0], [1, -1]], np.int8)).to_list()
    ['first', 'second', 'inconsistent', 'unreadable']
    """
    forward, backward = verdicts[:, 0], verdicts[:, 1]
    agree = np.where(forward != backward, forward, OUTCOMES.index(INCONSISTENT))
    number = np.where((verdicts < 0).any(axis=1), OUTCOMES.index(UNREADABLE), agree)
    words = dict(enumerate(OUTCOMES))
    return pl.Series("outcome", number).replace_strict(words, return_dtype=OUTCOME)


def label_tasks(people: pl.DataFrame, pairs: pl.DataFrame) -> Iterator[Prefer]:
    """Yield a task for each person and pair, a person after the other; `both_orders` of them is what `label` asks."""
    for description in people["description"]:
        for prompt, first, second in pairs.select("prompt", "first", "second").iter_rows():
            yield Prefer(description, prompt, first, second)


def label(
    people: pl.DataFrame, pairs: pl.DataFrame, passes: Passes, *, tell: Callable[[str], None] | None = None
) -> pl.DataFrame:
    """Ask which answer of each pair each person prefers: user_id, description, `PAIRS`, forward, backward, outcome.

    people: user_id, description; pairs: as `responses.pairs` gives them. forward and backward are the verdicts as they
    were said, of the pair and of the pair exchanged; null where no verdict could be read. Raises TeacherError.
    """
    total = people.height * pairs.height
    verdicts = ask_both(label_tasks(people, pairs), total, passes)
    if tell:
        tell(f"labels: {passes.tally}")
    whose = people.select("user_id", "description")[np.repeat(np.arange(people.height), pairs.height)]
    what = pairs.select(*PAIRS)[np.tile(np.arange(pairs.height), people.height)]
    words = {number: word for word, number in VERDICTS.items()}
    said = [
        pl.Series(name, verdicts[:, column]).replace_strict(words, return_dtype=pl.Utf8)
        for column, name in enumerate(("forward", "backward"))
    ]
    return pl.concat([whose, what, pl.DataFrame([*said, outcomes(verdicts)])], how="horizontal")


def by_person(labels: pl.DataFrame) -> pl.DataFrame:
    """Count the labels of each person, and of all (user_id null): pairs, kept, inconsistent, unreadable; and shares.

    decided: kept among kept and inconsistent. said_first: verdicts for the first place among all that could be read,
    one half where position has no say.
    """
    whole = labels.with_columns(user_id=pl.lit(None, pl.Utf8))
    parts = [
        table.group_by("user_id", maintain_order=True).agg(
            pairs=pl.len().cast(pl.Int64),
            kept=pl.col("outcome").is_in([FIRST, SECOND]).sum().cast(pl.Int64),
            inconsistent=(pl.col("outcome") == INCONSISTENT).sum().cast(pl.Int64),
            unreadable=(pl.col("outcome") == UNREADABLE).sum().cast(pl.Int64),
            said_first=pl.concat([pl.col("forward"), pl.col("backward")]).drop_nulls().eq("first").mean(),
        )
        for table in (labels, whole)
    ]
    counts = pl.concat(parts)
    readable = pl.col("kept") + pl.col("inconsistent")
    share = pl.when(readable > 0).then(pl.col("kept") / readable).alias("decided")
    return counts.select("user_id", "pairs", "kept", "inconsistent", "unreadable", share, "said_first")


def comparisons(labels: pl.DataFrame) -> pl.DataFrame:
    """Return the consistent labels as a table of comparisons, with the description beside each.

    DataError where there is none.
    """
    kept = labels.filter(pl.col("outcome").is_in([FIRST, SECOND]))
    if not kept.height:
        raise DataError("labels: none is the same in both orders; refine the descriptions, or name another model")
    table = kept.select(
        *PAIRS,
        "user_id",
        "description",
        target=(pl.col("outcome") == FIRST).cast(pl.Float64),
        source=pl.lit("personas"),
    )
    return validate(table, name="labels")
