"""Encode the texts of many files into one folder of features, on as many machines as there are.

    files -> unique texts -> shards -> tasks

A text belongs to a shard by its own hash, whatever file it came from, and a shard to task `shard % tasks`; a task
encodes its shards alone and talks to nobody. A shard is one file, written whole or not at all, and its bytes follow
from its texts: two tasks write what one would. Done shards are verified by their checksums and skipped; a damaged one
is encoded again. Whoever finds all shards there writes `_SUCCESS`, a JSON object with counts and hashes.

    FOLDER/_SUCCESS
    FOLDER/<encoder>/encoder.json, shard-00000-of-00004.safetensors, ...

The folder is a feature cache: `PLURALPREFS_CACHE=FOLDER` makes a run read it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from pluralprefs.data import comparisons
from pluralprefs.data.batches import item_table
from pluralprefs.encoders.cache import Shards, Show, TextEncoder, encode_new, item_texts, text_key, write_whole
from pluralprefs.encoders.tokens import Text
from pluralprefs.encoders.weights import EncoderError

SUCCESS = "_SUCCESS"
SHARD_TEXTS = 32768  # responses a shard, repeats counted, where the number of shards is not given
Tell = Callable[[str], None]


class Task(NamedTuple):
    """Which of how many tasks this is, counted from 0."""

    number: int = 0
    tasks: int = 1

    @classmethod
    def read(cls, text: str) -> Task:
        """Read "2/8", the third of eight tasks. Raises ValueError for anything else."""
        number, _, tasks = text.partition("/")
        if not (number.isdecimal() and tasks.isdecimal() and int(number) < int(tasks)):
            raise ValueError(f"--task {text!r}: give I/N with I from 0 to N - 1, for example 0/8 to 7/8")
        return cls(int(number), int(tasks))


def encode_files(
    encoder: TextEncoder,
    files: Sequence[str | Path],
    folder: str | Path,
    *,
    shards: int | None = None,
    task: Task = Task(),  # noqa: B008, immutable
    batch_tokens: int | None = None,
    progress: Show = True,
    tell: Tell | None = None,
) -> bool:
    """Encode the shards of this task and return whether all shards of all tasks are there.

    `files` are comparisons; all tasks get the same, in any order. `shards` is the number of output files (None: one a
    32,768 responses). Raises EncoderError where the folder holds features of another encoder or of other texts.
    """
    folder, tell = Path(folder), tell or (lambda _: None)
    tables = [comparisons.read(path) for path in files]
    shards = shards or max(1, -(-2 * sum(table.height for table in tables) // SHARD_TEXTS))
    store = _opened(folder, encoder, shards)
    mine: dict[int, dict[bytes, Text]] = {number: {} for number in range(task.number, shards, task.tasks)}
    for key, text in _texts(tables, encoder):
        if (number := shard_of(key, shards)) in mine:
            mine[number].setdefault(key, text)
    for number, texts in mine.items():
        name = shard_name(number, shards)
        if _is_done(store, name, texts, tell):
            tell(f"{name}: {len(texts)} texts, there before")
            continue
        (folder / SUCCESS).unlink(missing_ok=True)
        _encode(store, name, encoder, texts, batch_tokens, progress)
        tell(f"{name}: {len(texts)} texts encoded")
    return _finish(folder, store, shards)


def shard_of(key: bytes, shards: int) -> int:
    """The shard of a text by its key, the same on every machine.

    >>> shard_of(bytes(15) + b"\\x07", 4)
    3
    """
    return int.from_bytes(key, "big") % shards


def shard_name(number: int, shards: int) -> str:
    """The name of a shard's file, without its ending."""
    return f"shard-{number:05d}-of-{shards:05d}"


def _texts(tables: Iterable[pl.DataFrame], encoder: TextEncoder) -> Iterator[tuple[bytes, Text]]:
    for table in tables:
        for part in item_texts(item_table(table), encoder):
            yield from ((text_key(text), text) for text in part)


def _opened(folder: Path, encoder: TextEncoder, shards: int) -> Shards:
    """The encoder's shards in the folder, which may hold nothing of another encoder or another number of shards."""
    store = Shards.open(folder, encoder)
    assert store is not None  # that is cache=False
    others = sorted(path.parent for path in folder.glob("*/encoder.json") if path.parent != store.folder)
    if others:
        if not any(path.suffix == ".safetensors" for path in store.folder.iterdir()):
            (store.folder / "encoder.json").unlink()
            store.folder.rmdir()
        raise EncoderError(f"{folder}: holds features of another encoder ({others[0].name}); choose an empty folder")
    for path in sorted(store.folder.glob("shard-*.safetensors")):
        if not path.stem.endswith(f"-of-{shards:05d}"):
            raise EncoderError(
                f"{folder}: holds {path.name}, but {shards} shards are asked for; give the same --shards"
            )
    return store


def _is_done(store: Shards, name: str, texts: dict[bytes, Text], tell: Tell) -> bool:
    path = store.folder / f"{name}.safetensors"
    if not path.exists():
        return False
    try:
        keys, _ = store.verified(path)
    except EncoderError as error:
        tell(f"{error}: encoded again")
        return False
    if keys != sorted(texts):
        raise EncoderError(f"{path}: is of other texts: give the files that it was made of, or choose an empty folder")
    return True


def _encode(
    store: Shards, name: str, encoder: TextEncoder, texts: dict[bytes, Text], batch_tokens: int | None, progress: Show
) -> None:
    """Encode a shard's texts in the order of their keys, which does not depend on files or tasks."""
    features = np.zeros((len(texts), encoder.dim), np.float32)
    place = {key: row for row, key in enumerate(sorted(texts))}
    for keys, rows in encode_new(encoder, {key: texts[key] for key in place}, batch_tokens, progress):
        features[[place[key] for key in keys]] = rows
    store.write(list(place), features, name)


def _finish(folder: Path, store: Shards, shards: int) -> bool:
    """Write `_SUCCESS` where every shard is there; a shard of another task is believed its checksum."""
    from safetensors import SafetensorError, safe_open

    found = []
    for number in range(shards):
        path = store.folder / f"{shard_name(number, shards)}.safetensors"
        if not path.exists():
            return False
        try:
            with safe_open(path, framework="numpy") as file:
                rows, metadata = file.get_slice("keys").get_shape()[0], file.metadata() or {}
        except SafetensorError as error:
            raise EncoderError(f"{path}: damaged ({error}); run the task of shard {number} again") from error
        found.append({"file": os.path.relpath(path, folder), "texts": rows, "hash": metadata.get("checksum")})
    content = {"encoder": store.folder.name, "texts": sum(shard["texts"] for shard in found), "dim": store.dim}
    content |= {"hash": text_key(Text(None, json.dumps(found))).hex(), "shards": found}
    write_whole(folder / SUCCESS, json.dumps(content, indent=1).encode())
    return True
