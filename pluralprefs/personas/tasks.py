"""What a teacher is asked about people: questions, views, responses, preferences and better descriptions.

Tasks are those of `attributes.teacher`: every text, a person's description among them, stands in a block of its own as
data, and a reply counts only if it is the JSON object that was asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from typing import Any, ClassVar, NamedTuple

from pluralprefs.attributes.teacher import (
    CHARACTERS_PER_TOKEN,
    SHORT_REPLY,
    SYSTEM,
    Answer,
    excerpt,
    usable,
    value,
    verdict,
)

LONGEST_LINE = 500  # characters of a question or a view; a longer one is no question

PERSON = "A person is described like this:\n{person}"
QUESTION = "The question:\n{question}"
QUESTIONS = (
    "Write {count} questions that this person might put to an assistant. Let each be about another matter, none of "
    "them about the description itself, and let what a good answer looks like depend on who asks. Other people will "
    "be asked the same questions, so do not let them show who this person is. This is request number {draw} for the "
    'same person: do not begin with what comes to mind first. Reply with {{"questions": ["...", "..."]}} and nothing '
    "else, one line a question."
)
VIEWS = (
    "Name {count} points of view from which good answers to the question would differ as much as they can, in what "
    "they say and in how they say it. A point of view is one short line that says how to answer, not the answer. Reply "
    'with {{"views": ["...", "..."]}} and nothing else.'
)
FOR_PERSON = "Answer the question as this person would most like it answered. Do not mention the person."
FROM_VIEW = "Answer the question from this point of view, without naming it:\n{view}"
RESPOND = (
    "Write a few sentences at most. This is answer number {draw}: of the answers that fit, do not give the most "
    'usual one. Reply with {{"response": "..."}} and nothing else.'
)
PREFER = (
    "First answer:\n{first}\n\nSecond answer:\n{second}\n\n{whose} Reply with "
    '{{"answer": "first"}} or {{"answer": "second"}} and nothing else.'
)
OF_PERSON = (
    "Which of the two answers would this person prefer, by what the description says? Do not judge by what you or "
    "others would prefer, nor by the order in which the answers stand."
)
OF_ANYBODY = "Which of the two answers is better? Do not judge by the order in which they stand."
DISPUTE = "A question:\n{question}\nOne answer to it:\n{first}\nAnother answer to it:\n{second}"
REFINE = (
    "The description does not say which of the answers above the person prefers: asked twice, somebody who had nothing "
    "but the description chose differently. Write a description that settles such cases. Keep all that it says now, "
    "add what this very person would plausibly want of an answer in content and style, and do not mention these "
    'questions and answers. Use at most {words} words. Reply with {{"description": "..."}} and nothing else.'
)
WORDS = 200  # of a refined description
TEMPLATES = sha256(
    json.dumps(
        [SYSTEM, PERSON, QUESTION, QUESTIONS, VIEWS, FOR_PERSON, FROM_VIEW, RESPOND, PREFER, OF_PERSON, OF_ANYBODY,
         DISPUTE, REFINE, WORDS]
    ).encode()
).hexdigest()[:12]  # fmt: skip


class Pair(NamedTuple):
    """Two responses to one question."""

    question: str
    first: str
    second: str


class _Task:
    """What all tasks of this file share."""

    temperature: ClassVar[float] = 1.0
    max_tokens: ClassVar[int] = 1024
    writes: ClassVar[bool] = True

    @property
    def templates(self) -> str:
        return TEMPLATES

    def content(self) -> Mapping[str, Any]:
        return asdict(self)  # pyright: ignore[reportArgumentType]  # every task below is a dataclass


@dataclass(frozen=True)
class Questions(_Task):
    """Write `count` questions that a person might ask; `draw` numbers the requests for one person.

    The answer's text is a question a line.
    """

    person: str
    count: int
    draw: int = 0

    def __str__(self) -> str:
        return f"questions of {excerpt(self.person)}"

    def texts(self) -> Mapping[str, str]:
        return {"person": self.person}

    def wording(self, blocks: Mapping[str, str]) -> str:
        return f"{PERSON.format(**blocks)}\n\n{QUESTIONS.format(count=self.count, draw=self.draw + 1)}"

    def read(self, content: str) -> Answer:
        return _lines(self, value(content, "questions"))

    def expected(self) -> int:
        return 25 * self.count


@dataclass(frozen=True)
class Views(_Task):
    """Name `count` points of view from which to answer a question. The answer's text is a view a line."""

    question: str
    count: int

    def __str__(self) -> str:
        return f"views on {excerpt(self.question)}"

    def texts(self) -> Mapping[str, str]:
        return {"question": self.question}

    def wording(self, blocks: Mapping[str, str]) -> str:
        return f"{QUESTION.format(**blocks)}\n\n{VIEWS.format(count=self.count)}"

    def read(self, content: str) -> Answer:
        return _lines(self, value(content, "views"))

    def expected(self) -> int:
        return 20 * self.count


@dataclass(frozen=True)
class Respond(_Task):
    """Answer a question as a person would like it (`person`), or from a point of view (`view`)."""

    question: str
    person: str = ""
    view: str = ""
    draw: int = 0
    max_tokens: ClassVar[int] = 512

    def __post_init__(self) -> None:
        if bool(self.person) == bool(self.view):
            raise ValueError(f"{self}: give a person or a view, one of them")

    def __str__(self) -> str:
        return f"response to {excerpt(self.question)} for {excerpt(self.person or self.view)}"

    def texts(self) -> Mapping[str, str]:
        how = {"person": self.person} if self.person else {"view": self.view}
        return {"question": self.question, **how}

    def wording(self, blocks: Mapping[str, str]) -> str:
        person = [PERSON.format(**blocks)] if self.person else []
        how = FOR_PERSON if self.person else FROM_VIEW.format(**blocks)
        return "\n\n".join([*person, QUESTION.format(**blocks), how, RESPOND.format(draw=self.draw + 1)])

    def read(self, content: str) -> Answer:
        text = value(content, "response")
        return Answer(text=text.strip() if usable(text, self) else None)

    def expected(self) -> int:
        return 100


@dataclass(frozen=True)
class Prefer(_Task):
    """Say which of two answers to `question` a person prefers; without a person, which is better."""

    person: str
    question: str
    first: str
    second: str
    temperature: ClassVar[float] = 0.0
    max_tokens: ClassVar[int] = 32
    writes: ClassVar[bool] = False

    def __str__(self) -> str:
        whose = f" by {excerpt(self.person)}" if self.person else ""
        return f"preference{whose} between {excerpt(self.first)} and {excerpt(self.second)}"

    def swapped(self) -> Prefer:
        """Return the same question with the answers in the other order."""
        return replace(self, first=self.second, second=self.first)

    def texts(self) -> Mapping[str, str]:
        person = {"person": self.person} if self.person else {}
        return {**person, "question": self.question, "first": self.first, "second": self.second}

    def wording(self, blocks: Mapping[str, str]) -> str:
        person = [PERSON.format(**blocks)] if self.person else []
        asked = PREFER.format(whose=OF_PERSON if self.person else OF_ANYBODY, **blocks)
        return "\n\n".join([*person, QUESTION.format(**blocks), asked])

    def read(self, content: str) -> Answer:
        return Answer(verdict=verdict(content))

    def expected(self) -> int:
        return SHORT_REPLY


@dataclass(frozen=True)
class Refine(_Task):
    """Describe a person so that `disputes`, pairs which the description does not decide, are decided."""

    person: str
    disputes: tuple[Pair, ...]
    temperature: ClassVar[float] = 0.7

    def __str__(self) -> str:
        return f"better description of {excerpt(self.person)}"

    def texts(self) -> Mapping[str, str]:
        pairs = {
            f"{name} {number}": text
            for number, pair in enumerate(self.disputes)
            for name, text in pair._asdict().items()
        }
        return {"person": self.person, **pairs}

    def wording(self, blocks: Mapping[str, str]) -> str:
        pairs = [
            DISPUTE.format(**{name: blocks[f"{name} {number}"] for name in Pair._fields})
            for number in range(len(self.disputes))
        ]
        return "\n\n".join([PERSON.format(**blocks), *pairs, REFINE.format(words=WORDS)])

    def read(self, content: str) -> Answer:
        text = value(content, "description")
        return Answer(text=" ".join(text.split()) if usable(text, self) else None)

    def expected(self) -> int:
        return len(self.person) // CHARACTERS_PER_TOKEN + 60


def _lines(task: Questions | Views, found: Any) -> Answer:
    """The texts of a list as lines; no answer where one is no line of text. More than were asked for are left out."""
    if not isinstance(found, list) or not all(usable(text, task) for text in found):
        return Answer()
    lines = [" ".join(text.split()) for text in found][: task.count]
    return Answer(text="\n".join(lines) if lines and max(map(len, lines)) <= LONGEST_LINE else None)
