"""The offline teacher of people: a taste is what a description says it likes and dislikes, in the lexicon's words.

It makes the whole recipe run, and be tested against a known truth, without a server. It understands "Likes polite and
direct answers. Dislikes sarcastic ones.": the words are the poles of the lexicon's norms, verbosity left out, since a
phrase of any other attribute makes a text longer. A person who likes a pole weighs the attribute's level (-1 to 1) by
+1 towards it, one who dislikes it by -1; the answer of the greater sum is preferred. Where the sums are equal the
person is undecided and names the first, as a language model without a reason does, so that both orders contradict each
other. A description is refined by a taste for what undecided pairs differ in, which a hash of the description draws:
as arbitrary as what a language model would add.
"""

from __future__ import annotations

import re
from hashlib import blake2b

from pluralprefs.attributes.lexicon_teacher import expressed
from pluralprefs.attributes.teacher import Answer, Task, TeacherError, Usage, excerpt
from pluralprefs.data.ids import stable_hash
from pluralprefs.data.lexicon.express import base_answers, express
from pluralprefs.data.lexicon.phrases import CATALOG, NORMS
from pluralprefs.personas.tasks import Prefer, Questions, Refine, Respond, Views

POLES = {
    pole: (name, sign)
    for name, attribute in NORMS.items()
    if name != "verbosity"
    for pole, sign in ((attribute.low, -1), (attribute.high, 1))
}
NAMES = tuple(sorted({name for name, _ in POLES.values()}))
WORD = re.compile(rf"\b(likes?|dislikes?|{'|'.join(POLES)})\b", re.IGNORECASE)
MIDDLE = 2  # the level of a text that says nothing on an attribute


def tastes(description: str) -> dict[str, int]:
    """Return what a description likes: 1 for the high pole of an attribute, -1 for the low one.

    TeacherError where it names none, or both poles of one.

    >>> tastes("A nurse. Likes polite and direct answers. Dislikes humorous ones.")
    {'politeness': 1, 'directness': 1, 'humor': -1}
    """
    found: dict[str, int] = {}
    liked = 0
    for word in WORD.findall(description.lower()):
        if word not in POLES:
            liked = -1 if word.startswith("dis") else 1
            continue
        name, pole = POLES[word]
        if liked and found.setdefault(name, liked * pole) != liked * pole:
            raise TeacherError(f"description {excerpt(description)}: wants both more and less {name}; keep one")
    if not found:
        words = ", ".join(sorted(POLES))
        raise TeacherError(
            f"description {excerpt(description)}: says nothing that the lexicon understands; write Likes ... answers. "
            f"Dislikes ... ones. with {words}, or name a chat server"
        )
    return found


def liking(description: str, text: str) -> float:
    """Return how much a text is liked: the sum over `tastes` of sign x (level - 2) / 2."""
    levels = {name: expressed(text, name) for name in tastes(description)}
    return sum(
        sign * ((MIDDLE if (level := levels[name]) is None else level) - MIDDLE) / 2
        for name, sign in tastes(description).items()
    )


class LexiconPersonas:
    """Answer the tasks of `personas.tasks` from the lexicon; `seed` draws questions, views and phrases."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        lexicon = blake2b(repr((CATALOG, base_answers())).encode(), digest_size=4).hexdigest()
        self.name = f"lexicon people {lexicon} seed {seed}"

    def ask(self, task: Task) -> Answer:
        """Answer a task at no cost; TeacherError where the lexicon has no answer or does not understand somebody."""
        if isinstance(task, Questions):
            asked = [one.prompt for one in base_answers()]
            return Answer(text="\n".join(self._drawn(asked, f"{task.person}|{task.draw}")[: task.count]))
        if isinstance(task, Views):
            return Answer(text="\n".join(self._drawn(sorted(POLES), task.question)[: task.count]))
        if isinstance(task, Respond):
            return Answer(text=self._respond(task))
        if isinstance(task, Prefer):
            return _prefer(task)
        if isinstance(task, Refine):
            return self._refine(task)
        raise TeacherError(f"{task}: the lexicon's people know nothing of it; name a chat server")

    def bound(self, task: Task) -> Usage:
        """Return zero: nothing is called and nothing paid."""
        return Usage()

    def _drawn(self, values: list[str], key: str) -> list[str]:
        """The values in an order of the key's own."""
        return sorted(values, key=lambda value: stable_hash(f"{self.seed}|{key}|{value}"))

    def _respond(self, task: Respond) -> str:
        """Two attributes at a level of the right half, and one that the draw brings."""
        known = {one.prompt: one.answer for one in base_answers()}
        if task.question not in known:
            raise TeacherError(f"{task}: the lexicon has no answer to it; name a chat server")
        wanted = tastes(task.person or f"Likes {task.view}")
        key = f"{task.question}|{task.person}|{task.view}|{task.draw}"
        chosen = self._drawn(list(wanted), key)[:2]
        levels = {name: MIDDLE + wanted[name] * (1 + self._bit(f"{key}|{name}")) for name in chosen}
        other = self._drawn([name for name in NAMES if name not in wanted], key)[:1]
        levels |= {name: self._drawn(list("01234"), f"{key}|{name}")[0] for name in other}
        whole = {name: int(level) for name, level in levels.items()}
        return express(known[task.question], whole, seed=stable_hash(key) % 1000, phrases="corpus")

    def _refine(self, task: Refine) -> Answer:
        """Add a taste for the attribute that most undecided pairs differ in."""
        wanted = tastes(task.person)
        apart = {name: sum(_level(pair.first, name) != _level(pair.second, name) for pair in task.disputes)
                 for name in NAMES if name not in wanted}  # fmt: skip
        name = max(apart, key=lambda name: (apart[name], name), default=None)
        if name is None or not apart[name]:
            return Answer(text=task.person)
        pole = NORMS[name].high if self._bit(f"{task.person}|{name}") else NORMS[name].low
        return Answer(text=f"{task.person} Likes {pole} answers.")

    def _bit(self, key: str) -> int:
        return stable_hash(f"{self.seed}|{key}") % 2


def _prefer(task: Prefer) -> Answer:
    if not task.person:
        raise TeacherError(f"{task}: the lexicon judges for a person; give descriptions, or name a chat server")
    first, second = (liking(task.person, text) for text in (task.first, task.second))
    return Answer(verdict="second" if second > first else "first")


def _level(text: str, name: str) -> int:
    level = expressed(text, name)
    return MIDDLE if level is None else level
