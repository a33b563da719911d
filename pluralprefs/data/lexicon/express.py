"""An answer, said differently: openings before it, closings after it, and more or less of it.

Every attribute but verbosity adds a phrase of its level. Verbosity keeps one sentence (level 0), two (1) or all (2),
and adds to them (3, 4). A casual voice also contracts ("do not" to "don't"). Meaning stays; nothing random but the
choice of phrase, which depends on the seed, the answer, the attribute and its level alone, so that adding an attribute
to a rewrite leaves its other phrases as they were.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import blake2b
from typing import NamedTuple

from pluralprefs.data.lexicon.answers import ANSWERS, TOPICS
from pluralprefs.data.lexicon.phrases import CATALOG, NORMS
from pluralprefs.data.lexicon.values import VALUES

CONTRACTIONS = {"do not": "don't", "it is": "it's", "cannot": "can't", "that is": "that's", "you are": "you're"}


class BaseAnswer(NamedTuple):
    """A question, a plain answer to it, and the everyday topic they are about."""

    prompt: str
    answer: str
    topic: str


def base_answers() -> list[BaseAnswer]:
    """Return the questions and plain answers, in a fixed order.

    >>> base_answers()[1].prompt, base_answers()[1].topic
    ('How do I begin to run?', 'fitness')
    """
    paragraphs = [paragraph.split("\n") for paragraph in ANSWERS.strip().split("\n\n")]
    topics = zip(paragraphs, TOPICS.split(), strict=True)
    return [BaseAnswer(question, " ".join(lines), topic) for (question, *lines), topic in topics]


def attributes(kind: str | None = None) -> tuple[str, ...]:
    """Return the names of the attributes that can be expressed, sorted: of a kind ("norm" or "value"), or all.

    >>> attributes("value")[:3]
    ('achievement', 'benevolence', 'conformity')
    """
    kinds = {None: CATALOG, "norm": NORMS, "value": VALUES}
    if kind not in kinds:
        raise ValueError(f"kind={kind!r}: use 'norm', 'value' or None for both")
    return tuple(sorted(kinds[kind]))


def express(
    answer: str, attribute: str | Mapping[str, int], level: int | None = None, seed: int = 0, *, phrases: str = "all"
) -> str:
    """Express an answer at a level (0..4) of one attribute, or of several given as {attribute: level}.

    phrases: "train", "heldout" or "all" of them; "corpus" draws from the smaller set, of both kinds, that `corpus`
    uses, to which no phrase is ever added, so that its texts stay what they are. ValueError names an unknown
    attribute or a level outside 0..4.
    """
    if isinstance(attribute, str):
        if level is None:
            raise ValueError(f"express(answer, {attribute!r}, level): the level (0..4) is missing")
        attribute = {attribute: level}
    levels = _checked(attribute)
    said = {name: _phrase(answer, name, levels[name], seed, phrases) for name in CATALOG if name in levels}
    before = [text for name, text in said.items() if CATALOG[name].place == "before"]
    after = [text for name, text in said.items() if CATALOG[name].place == "after"]
    body = _shortened(answer, levels.get("verbosity", 2))
    if levels.get("formality", 2) < 2:
        body = _contracted(body)
    return " ".join(part for part in [*before, body, *after] if part)


def _checked(levels: Mapping[str, int]) -> Mapping[str, int]:
    for name, level in levels.items():
        if name not in CATALOG:
            raise ValueError(f"attribute {name!r}: use one of {', '.join(attributes())}")
        if level not in range(5):
            raise ValueError(f"{name}={level!r}: levels are 0, 1, 2, 3 and 4")
    return levels


def _phrase(answer: str, name: str, level: int, seed: int, phrases: str) -> str:
    """Choose by hash, which needs no state and is equal on every machine."""
    choices = CATALOG[name].phrases(level, phrases)
    if not choices:
        return ""
    key = f"{seed}|{name}|{level}|{answer}".encode()
    return choices[int.from_bytes(blake2b(key, digest_size=8).digest(), "big") % len(choices)]


def _shortened(answer: str, verbosity: int) -> str:
    sentences = re.split(r"(?<=[.!?])\s+", answer.strip())
    return " ".join(sentences[: verbosity + 1]) if verbosity < 2 else " ".join(sentences)


def _contracted(text: str) -> str:
    for plain, short in CONTRACTIONS.items():
        text = re.sub(rf"\b{plain}\b", short, text)
        text = re.sub(rf"\b{plain.capitalize()}\b", short.capitalize(), text)
    return text
