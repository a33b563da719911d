"""The offline teacher: the phrases of `data.lexicon` behind the interface of a language model.

It makes the whole pipeline run, and be tested, without a server. It is no judge of language: it rewrites by putting a
known phrase before or after a text, it recognises only those phrases again (and length, for verbosity), and it calls a
meaning kept where the sentences are still there. What it says about texts that others wrote means little, and that its
judgements agree with its own rewrites shows that the pipeline works, not that the rewrites are good.
"""

from __future__ import annotations

import re
from hashlib import blake2b
from typing import Literal, get_args

from pluralprefs.attributes.teacher import Answer, Judge, Preserved, Rewrite, Task, TeacherError, Usage
from pluralprefs.data.lexicon.express import CONTRACTIONS, express
from pluralprefs.data.lexicon.phrases import CATALOG

Phrases = Literal["train", "fit", "validation", "heldout", "all"]
MIDDLE = 2  # where a text stands that says nothing on an attribute, beside one that does


class LexiconTeacher:
    """Answer tasks from the lexicon. phrases: those that rewrites draw from; judgements know all of them."""

    def __init__(self, phrases: Phrases = "train", seed: int = 0) -> None:
        if phrases not in get_args(Phrases):
            raise ValueError(f"phrases={phrases!r}: use one of {', '.join(get_args(Phrases))}")
        self.phrases, self.seed = phrases, seed
        # Changed phrases are another teacher: what it said before must not be taken from a cache.
        lexicon = blake2b(repr(CATALOG).encode(), digest_size=4).hexdigest()
        self.name = f"lexicon {lexicon} {phrases} seed {seed}"

    def ask(self, task: Task) -> Answer:
        """Answer a task at no cost; TeacherError where the lexicon lacks an attribute, or what a task asks for."""
        if isinstance(task, Rewrite):
            return Answer(text=self._rewrite(task))
        if isinstance(task, Judge):
            return _judge(task)
        if isinstance(task, Preserved):
            return Answer(score=kept(task.original, task.rewrite))
        raise TeacherError(f"{task}: the lexicon rewrites and judges texts, no more; name a chat server")

    def bound(self, task: Task) -> Usage:
        """Return zero: nothing is called and nothing paid."""
        return Usage()

    def _rewrite(self, task: Rewrite) -> str:
        try:
            return express(task.text, task.attribute.name, task.level, self.seed, phrases=self.phrases)
        except ValueError as error:
            raise TeacherError(f"{task}: the lexicon has no such phrases: {error}") from error


def _judge(task: Judge) -> Answer:
    name = task.attribute.name
    if name == "verbosity":
        first, second = len(task.first), len(task.second)
    else:
        levels = [expressed(text, name) for text in (task.first, task.second)]
        first, second = (MIDDLE if level is None else level for level in levels)
    if first == second:
        return Answer()
    return Answer(verdict="first" if (first > second) == (task.direction == "higher") else "second")


def expressed(text: str, attribute: str) -> int | None:
    """Return the level (0..4) of the lexicon's phrase in a text; None where it has none for the attribute.

    The outermost phrase counts, which is the one that was said last, and of two in one place the longer.

    >>> expressed("Thanks for asking. Rest a day.", "politeness"), expressed("Rest a day.", "politeness")
    (3, None)
    """
    if attribute not in CATALOG:
        return None
    entry = CATALOG[attribute]
    found = []
    for level in range(5):
        for phrase in entry.phrases(level):
            at = text.find(phrase) if entry.place == "before" else text.rfind(phrase)
            if at >= 0:
                depth = at if entry.place == "before" else len(text) - at - len(phrase)
                found.append((depth, -len(phrase), level))
    return min(found)[2] if found else None


def kept(original: str, rewrite: str) -> float:
    """Return the share (0..1) of the sentences of a text that still occur, contracted or not; 1 where it has none.

    >>> kept("It is late. Go home.", "It's late.")
    0.5
    """
    sentences = [sentence for sentence in re.split(r"(?<=[.!?])\s+", _plain(original)) if sentence]
    within = _plain(rewrite)
    return sum(sentence in within for sentence in sentences) / len(sentences) if sentences else 1.0


def _plain(text: str) -> str:
    """Lower case, contractions written out, single blanks."""
    text = " ".join(text.lower().replace("’", "'").split())
    for plain, short in CONTRACTIONS.items():
        text = re.sub(rf"\b{short}\b", plain, text)
    return text
