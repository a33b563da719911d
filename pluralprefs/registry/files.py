"""Files that are whole or absent: written under a temporary name in the same folder, then renamed.

A name that comes from data or from a command line never becomes part of a path unchecked: `slug` turns any string into
letters, digits, "-" and "_", and `checked_table_name` refuses whatever is not a plain word.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

TABLE_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


class RegistryError(ValueError):
    """A run folder that is missing, broken or misused: one line with the file and the cure."""


class StillRunning(RegistryError):
    """A run that another process is writing, or may be writing on another host."""


def slug(name: str, longest: int = 40) -> str:
    """Turn any string into a safe part of a file name.

    >>> slug("../Äpfel & low rank"), slug("///")
    ('pfel-low-rank', 'unnamed')
    """
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:longest].rstrip("-") or "unnamed"


def checked_table_name(name: str) -> str:
    """Return `name` if it is a plain lower-case word; a path or a suffix is an error.

    >>> checked_table_name("attribute_weights")
    'attribute_weights'
    """
    if not TABLE_NAME.fullmatch(name):
        raise RegistryError(
            f"table name {name!r}: use lower-case letters, digits and _ only, such as attribute_weights"
        )
    return name


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file atomically; a kill at any moment leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(2)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON atomically. NaN and infinities become null: they are not JSON."""
    write_bytes(path, (json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_parquet(path: Path, table: pl.DataFrame) -> None:
    """Write a table as Parquet atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(2)}.tmp")
    try:
        table.write_parquet(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_arrays(path: Path | str, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays and string metadata as one safetensors file, atomically."""
    from safetensors.numpy import save

    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_bytes(Path(path), save(contiguous, metadata=dict(metadata or {})))


def load_arrays(path: Path | str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read back what `save_arrays` wrote; a broken file is an error that names it."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise RegistryError(f"{path}: no such file; `pluralprefs adapt` writes user states")
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise RegistryError(
            f"{path}: not a readable safetensors file ({error}); copy it again or adapt again"
        ) from error


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> list[int]:
    """Append JSON lines in one write and return the first byte of each; a line torn by an earlier kill is cut off."""
    lines = [(json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n").encode() for row in rows]
    with path.open("a+b") as file:
        end = _whole_lines(file)
        if end < file.seek(0, os.SEEK_END):
            file.truncate(end)
        file.write(b"".join(lines))
        file.flush()
        os.fsync(file.fileno())
    return list(accumulate(map(len, lines[:-1]), initial=end))[: len(lines)]


def _whole_lines(file: Any, block: int = 65536) -> int:
    """The number of bytes up to and including the last line break."""
    position = file.seek(0, os.SEEK_END)
    while position > 0:
        start = max(0, position - block)
        file.seek(start)
        found = file.read(position - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        position = start
    return 0


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; a last line without its line break was torn by a kill and is left out."""
    return [row for _, row in placed_lines(path)]


def placed_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the first byte and the content of each line that `read_lines` would read."""
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except ValueError as error:
                raise RegistryError(f"{path}, line {number}: not JSON ({error}); delete that line") from error
            yield start, row
            start += len(line)


def plain(value: Any) -> Any:
    """Turn arrays, paths, tuples and numpy scalars into JSON values; numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(part) for part in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
