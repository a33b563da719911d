"""The file of a teacher's answers: JSON Lines under content addresses (`teacher.task_key`), never held whole.

A pass may have millions of answers. SQLite keeps where in the file each one stands, in a scratch database that goes to
disk where it grows and is made anew from the file by every pass; an answer is read from its line when it is wanted.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pluralprefs.attributes.teacher import Answer, TeacherError, Usage
from pluralprefs.registry.files import placed_lines

SCRATCH = 64 * 1024  # KiB of places held in memory


class Kept:
    """Where the answers of a file stand, by key; None for a file keeps nothing. Close it after use."""

    def __init__(self, cache: Path | None) -> None:
        self.cache = cache
        self._places = sqlite3.connect("")  # a scratch file without a name
        for setting in ("journal_mode=OFF", "synchronous=OFF", f"cache_size=-{SCRATCH}"):
            self._places.execute(f"PRAGMA {setting}")
        self._places.execute("CREATE TABLE place (key TEXT PRIMARY KEY, start INTEGER) WITHOUT ROWID")
        try:
            self.note((key, start) for key, start, _ in _answers(cache))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the scratch database back."""
        self._places.close()

    def note(self, places: Iterable[tuple[str, int]]) -> None:
        """Remember where answers stand: keys and first bytes of their lines."""
        self._places.executemany("INSERT OR REPLACE INTO place VALUES (?, ?)", places)

    def place(self, key: str) -> int | None:
        """The first byte of an answer's line; None for an answer that is not in the file."""
        row = self._places.execute("SELECT start FROM place WHERE key = ?", (key,)).fetchone()
        return row and row[0]

    def find(self, keys: Iterable[str]) -> dict[str, Answer]:
        """Read the answers to some of the keys: those that the file has."""
        places = [(start, key) for key in set(keys) if (start := self.place(key)) is not None]
        if not places or self.cache is None:
            return {}
        found = {}
        with self.cache.open("rb") as file:
            for start, key in sorted(places):
                file.seek(start)
                found[key] = _answer(json.loads(file.readline()))
        return found


def read_cache(cache: Path) -> dict[str, Answer]:
    """Read all answers of a file by their keys. Raises TeacherError, which names the line, where it holds others."""
    return {key: answer for key, _, answer in _answers(cache)}


def _answers(cache: Path | None) -> Iterator[tuple[str, int, Answer]]:
    """Key, first byte and content of every line."""
    lines = placed_lines(cache) if cache and cache.is_file() else ()
    for number, (start, row) in enumerate(lines, start=1):
        try:
            yield row["key"], start, _answer(row)
        except (LookupError, TypeError, AttributeError):
            raise TeacherError(f"{cache}, line {number}: not an answer of a teacher; delete that line") from None


def _answer(row: Mapping[str, Any]) -> Answer:
    said = {name: row.get(name) for name in ("text", "verdict", "score")}
    return Answer(**said, usage=Usage(*row["usage"]), cached=True)
