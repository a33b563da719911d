"""Ask a teacher many things: some at a time, at a bounded rate and cost, and never the same thing twice.

Every answer is kept in a JSON Lines file under the content address of its task (`teacher.task_key`) as soon as it is
there. A pass that was killed, or that stopped at its cost limit, is resumed by running it again: what is in the file is
not asked. A line torn by the kill is cut off. Failures and replies that could not be read are not kept.

Tasks are taken from an iterable `BLOCK` at a time, so that a pass of millions holds few of them and of their answers.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from pluralprefs.attributes.kept import Kept
from pluralprefs.attributes.teacher import (
    CHARACTERS_PER_TOKEN,
    NOTHING,
    Answer,
    ServerError,
    SetupError,
    Task,
    Teacher,
    TeacherError,
    Usage,
    messages,
    task_key,
)
from pluralprefs.registry.files import append_lines

FAILURES_IN_A_ROW = 20  # of the server, not of tasks
BLOCK = 4096  # tasks held at once
Price = tuple[float, float]  # of a million prompt tokens and of a million completion tokens


def ask_all(
    teacher: Teacher,
    tasks: Sequence[Task],
    *,
    cache: Path | None,
    concurrency: int = 8,
    requests_per_second: float | None = None,
    max_cost: float | None = None,
    price: Price | None = None,
    progress: bool = True,
) -> list[Answer]:
    """Return the answers in the order of the tasks: `ask_in_order`, all at once."""
    options = {"concurrency": concurrency, "requests_per_second": requests_per_second, "max_cost": max_cost}
    answers = ask_in_order(teacher, tasks, len(tasks), cache=cache, price=price, progress=progress, **options)
    return list(answers)


def ask_in_order(
    teacher: Teacher,
    tasks: Iterable[Task],
    total: int,
    *,
    cache: Path | None,
    concurrency: int = 8,
    requests_per_second: float | None = None,
    max_cost: float | None = None,
    price: Price | None = None,
    progress: bool = True,
) -> Generator[Answer, None, None]:
    """Yield the answers in the order of the tasks, of which there are `total`, asking only for what `cache` lacks.

    Equal tasks are asked once a block, and once at all where there is a cache and the answer could be read; a block of
    `BLOCK` tasks is answered whole before its first answer is yielded.

    A task that fails alone gets an Answer with `failure` set, and the pass goes on. requests_per_second bounds new
    tasks; further attempts of one task come on top, slowed by their own waits. max_cost bounds what this pass can
    spend, at `price`: it stops before the call that could exceed it, where calls under way count the most they can
    cost. cache=None keeps nothing, for teachers that cost nothing.

    Raises TeacherError where the limit is reached, set-up is wrong, or the server fails 20 times in a row; what was
    answered by then is in the cache.
    """
    budget, pace, remaining = _Budget.of(max_cost, price), _Pace(requests_per_second), iter(tasks)
    with _alone(cache), closing(Kept(cache)) as kept, _bar(total, shown=progress) as advance:
        a_pass = _Pass(teacher, kept, budget, pace, advance, total)
        while block := list(islice(remaining, BLOCK)):
            yield from a_pass.run(block, max(1, concurrency))


class Estimate(NamedTuple):
    """What a pass would ask and cost. `most` is what `max_cost` would have to be for it never to stop."""

    calls: int
    cached: int
    repeated: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None
    most: float | None

    def __str__(self) -> str:
        text = (
            f"{self.calls:,} calls ({self.cached:,} more are cached, {self.repeated:,} repeat another), about "
            f"{self.prompt_tokens:,} prompt and {self.completion_tokens:,} completion tokens at "
            f"{CHARACTERS_PER_TOKEN} characters a token"
        )
        return text if self.cost is None else f"{text}: about {self.cost:,.2f}, and never over {self.most:,.2f}"


def estimate(
    teacher: Teacher, tasks: Iterable[Task], *, cache: Path | None = None, price: Price | None = None
) -> Estimate:
    """Say what `ask_all` would ask and cost, without asking.

    Tokens are characters / 4, and a reply is as long as its task expects. A teacher that is not paid costs 0.
    """
    calls = cached = repeated = 0
    total, most = NOTHING, NOTHING
    with closing(Kept(cache)) as kept:
        for task in tasks:
            key = task_key(teacher.name, task)
            place = kept.place(key)
            if place is not None:
                cached, repeated = cached + (place >= 0), repeated + (place < 0)
                continue
            kept.note([(key, -1)])  # nowhere in the file, but counted
            bound = teacher.bound(task)
            calls, most = calls + 1, most.plus(bound)
            total = total.plus(_likely(task) if bound.calls else NOTHING)
    return Estimate(
        calls=calls,
        cached=cached,
        repeated=repeated,
        prompt_tokens=total.prompt_tokens,
        completion_tokens=total.completion_tokens,
        cost=None if price is None else cost(total, price),
        most=None if price is None else cost(most, price),
    )


def cost(usage: Usage, price: Price) -> float:
    """Return what tokens cost at a price per million, in the price's currency.

    >>> cost(Usage(1, 2_000_000, 500_000), (0.5, 4.0))
    3.0
    """
    return (usage.prompt_tokens * price[0] + usage.completion_tokens * price[1]) / 1e6


@dataclass
class Tally:
    """Counts of answers, for one line about many."""

    answers: int = 0
    cached: int = 0
    unreadable: int = 0
    failed: int = 0
    first: str = ""
    used: Usage = NOTHING

    def add(self, answer: Answer) -> None:
        """Count an answer."""
        self.answers += 1
        self.cached += answer.cached
        self.unreadable += not answer.readable and not answer.failure
        self.failed += bool(answer.failure)
        self.first = self.first or answer.failure or ""
        self.used = self.used if answer.cached else self.used.plus(answer.usage)

    def __str__(self) -> str:
        text = f"{self.answers:,} answers, {self.cached:,} of them cached; {self.unreadable:,} unreadable; "
        text += f"{self.failed:,} failed"
        text = f"{text}, the first: {self.first}" if self.failed else text
        if not self.used.calls:
            return text
        return (
            f"{text}; {self.used.calls:,} calls, {self.used.prompt_tokens:,} + {self.used.completion_tokens:,} tokens"
        )


def summary(answers: Iterable[Answer]) -> str:
    """Say in one line how many answers there are, how many are missing and why, and the calls and tokens (of prompts,
    and completed) that they used now, where they used any.

    >>> summary([Answer(text="Rest.", cached=True), Answer(failure="server down")])
    '2 answers, 1 of them cached; 0 unreadable; 1 failed, the first: server down'
    >>> summary([Answer(text="Rest.", usage=Usage(2, 1200, 30))])
    '1 answers, 0 of them cached; 0 unreadable; 0 failed; 2 calls, 1,200 + 30 tokens'
    """
    tally = Tally()
    for answer in answers:
        tally.add(answer)
    return str(tally)


@dataclass
class _Budget:
    limit: float
    price: Price
    spent: float = 0.0

    @classmethod
    def of(cls, max_cost: float | None, price: Price | None) -> _Budget:
        if max_cost is None:
            return cls(float("inf"), price or (0.0, 0.0))
        if price is None or min(max_cost, *price) < 0:
            raise TeacherError(
                f"max_cost={max_cost}, price={price}: a limit needs the prices of a million prompt and of a million "
                "completion tokens, none of them negative"
            )
        return cls(max_cost, price)

    def allows(self, under_way: Sequence[Usage], following: Usage) -> bool:
        return self.spent + sum(cost(bound, self.price) for bound in [*under_way, following]) <= self.limit

    def pay(self, usage: Usage) -> None:
        self.spent += cost(usage, self.price)


class _Pace:
    """At most so many starts a second, evenly spread."""

    def __init__(self, per_second: float | None) -> None:
        if per_second is not None and not per_second > 0:
            raise TeacherError(f"requests_per_second={per_second}: use a number above 0, or leave it out")
        self.gap, self.following = 1 / per_second if per_second else 0.0, 0.0

    def delay(self) -> float:
        return max(0.0, self.following - time.monotonic())

    def start(self) -> None:
        self.following = max(time.monotonic(), self.following) + self.gap


@dataclass
class _Pass:
    """The calls that are missing. Threads only ask; this one starts them, counts, and writes the cache."""

    teacher: Teacher
    kept: Kept
    budget: _Budget
    pace: _Pace
    advance: Callable[[int], None]
    total: int
    asked: int = 0
    queue: deque[tuple[str, Task]] = field(default_factory=deque)
    answers: dict[str, Answer] = field(default_factory=dict)
    pending: dict[Future[Answer], tuple[str, Task, Usage]] = field(default_factory=dict)
    troubles: int = 0
    stop: BaseException | None = None

    def run(self, tasks: Sequence[Task], concurrency: int) -> list[Answer]:
        """Answer a block of tasks."""
        keys = [task_key(self.teacher.name, task) for task in tasks]
        self.answers = self.kept.find(keys)
        missing = {key: task for key, task in zip(keys, tasks, strict=True) if key not in self.answers}
        self.queue = deque(missing.items())
        self.advance(len(keys) - len(missing))
        with ThreadPoolExecutor(concurrency, thread_name_prefix="teacher") as pool:
            try:
                while (self.queue or self.pending) and not self.stop:
                    self._settle(self._start(pool, concurrency))
            finally:
                while self.pending:  # under way and to be paid for, whatever ends the pass: keep their answers
                    self._settle(None)
        if self.stop:
            raise self.stop
        return [self.answers[key] for key in keys]

    def _start(self, pool: ThreadPoolExecutor, concurrency: int) -> float | None:
        """Start what may start; return the seconds after which more may, None where a call has to end first."""
        while self.queue and len(self.pending) < concurrency:
            key, task = self.queue[0]
            bound = self.teacher.bound(task)
            if not self.budget.allows([under_way for *_, under_way in self.pending.values()], bound):
                if not self.pending:  # else a call that ends may leave enough
                    self.stop = self._too_dear(bound)
                return None
            if delay := self.pace.delay():
                return delay
            self.pace.start()
            self.queue.popleft()
            self.asked += 1
            self.pending[pool.submit(self.teacher.ask, task)] = (key, task, bound)
        return None

    def _settle(self, seconds: float | None) -> None:
        """Wait for an answer, but no longer than `seconds`, and keep all that have come, in one write."""
        if not self.pending:
            time.sleep(seconds or 0.0)
            return
        done, _ = wait(self.pending, seconds, FIRST_COMPLETED)
        rows = []
        for future in done:
            key, task, _ = self.pending.pop(future)
            answer = self.answers[key] = self._outcome(future)
            self.budget.pay(answer.usage)
            self.advance(1)
            if answer.readable:
                rows.append(_row(key, task, answer))
        if rows and self.kept.cache:
            starts = append_lines(self.kept.cache, rows)
            self.kept.note((row["key"], start) for row, start in zip(rows, starts, strict=True))

    def _outcome(self, future: Future[Answer]) -> Answer:
        error = future.exception()
        if error is None:
            self.troubles = 0
            return future.result()
        if not isinstance(error, TeacherError):
            self.stop = self.stop or error
            return Answer(failure=repr(error))
        self.troubles = self.troubles + 1 if isinstance(error, ServerError) else 0
        if isinstance(error, SetupError):
            self.stop = self.stop or error
        if self.troubles == FAILURES_IN_A_ROW:
            self.stop = self.stop or ServerError(f"{self.troubles} failures of the server in a row, the last: {error}")
        return Answer(failure=str(error), usage=error.usage)

    def _too_dear(self, bound: Usage) -> TeacherError:
        cache = self.kept.cache
        where = f"answers so far are in {cache}" if cache else "no cache keeps the answers so far"
        return TeacherError(
            f"max_cost={self.budget.limit:g}: stopped after {self.asked:,} of {self.total:,} tasks, "
            f"{self.budget.spent:.4f} spent; the next could cost {cost(bound, self.budget.price):.4f}; {where}: raise "
            "the limit to go on"
        )


def _row(key: str, task: Task, answer: Answer) -> Mapping[str, Any]:
    said = {"text": answer.text, "verdict": answer.verdict, "score": answer.score}
    return {"key": key, "task": type(task).__name__, **said, "usage": list(answer.usage)}


def _likely(task: Task) -> Usage:
    asked = sum(len(message["content"]) for message in messages(task))
    return Usage(1, asked // CHARACTERS_PER_TOKEN, min(task.expected(), task.max_tokens))


@contextmanager
def _alone(cache: Path | None) -> Iterator[None]:
    """Hold the cache, so that no second pass pays for the same answers or cuts into a line."""
    if cache is None:
        yield
        return
    cache.parent.mkdir(parents=True, exist_ok=True)
    with cache.open("a+b") as file:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TeacherError(f"{cache}: another pass is writing it; wait for its end, or name another") from None
        yield  # the lock goes with the file


@contextmanager
def _bar(total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Show how many answers there are on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not (shown and total and sys.stderr.isatty())
    with Progress(*columns, console=Console(stderr=True), disable=hidden, transient=True) as bar:
        asking = bar.add_task("asking the teacher", total=total)
        yield lambda count: bar.advance(asking, count)
