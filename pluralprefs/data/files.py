"""Files to raw tables and back: JSON Lines, JSON, Parquet and CSV, before anyone asks what the columns mean.

Reading says the line and what is wrong there; JSON is therefore read a line at a time rather than inferred, and a
column holds one type. Writing goes to a temporary name in the same folder and is moved into place, so that a reader
finds the old file or the new one, never half of one.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import IO, Any

import polars as pl

from pluralprefs.data.ids import MESSAGES

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv")


class DataError(ValueError):
    """What is wrong with somebody's data, in one line: file, row, column and cure."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))


def shown(value: object) -> str:
    """Return a value as it may stand in an error: short and on one line."""
    text = repr(value.to_list() if isinstance(value, pl.Series) else value)
    return text if len(text) <= 60 else text[:57] + "..."


def require_targets(table: pl.DataFrame) -> None:
    """Raise DataError where a comparison does not say which response was preferred."""
    lacking = table["target"].is_null().arg_true()
    if len(lacking):
        raise DataError(f"row {lacking[0] + 1}, column 'target': is missing; say which response was preferred")


def read_frame(path: str | Path, *, ids: Collection[str] = ()) -> pl.DataFrame:
    """Read a file by its suffix into a raw table; columns named in `ids` become text whatever they hold.

    A file without rows gives a table without rows. Every text of a CSV stays text.
    Raises DataError for anything that cannot be read.
    """
    path = Path(path)
    read = _reader(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; check the path")
    try:
        return read(path, ids)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    except (EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the compressed file is cut short or not gzip ({error}); write it again") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _reader(path: Path) -> Callable[[Path, Collection[str]], pl.DataFrame]:
    readers = (_read_lines, _read_lines, _read_json, _read_parquet, _read_csv)
    for suffix, read in zip(SUFFIXES, readers, strict=True):
        if path.name.lower().endswith(suffix):
            return read
    raise DataError(f"{path}: unknown kind of file; use one of {', '.join(SUFFIXES)}")


def _read_lines(path: Path, ids: Collection[str]) -> pl.DataFrame:
    places, rows = [], []
    with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}: line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from error
            if text.strip():
                rows.append(_object(_parse(text, where), where))
                places.append(f"line {number}")
    return _frame(path, places, rows, ids)


def _read_json(path: Path, ids: Collection[str]) -> pl.DataFrame:
    text = path.read_text(encoding="utf-8-sig")
    rows = _parse(text, str(path)) if text.strip() else []
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds {_kind(rows)}, not a list of objects; one object a line is .jsonl")
    places = [f"row {number}" for number in range(1, len(rows) + 1)]
    return _frame(path, places, [_object(r, f"{path}: {p}") for r, p in zip(rows, places, strict=True)], ids)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _without_repeats(pairs, where))
    except json.JSONDecodeError as error:
        found = "is cut short" if error.pos >= len(text.rstrip()) else f"is not JSON at character {error.pos + 1}"
        raise DataError(f"{where}: {found} ({error.msg}); write one JSON object a line") from error
    except RecursionError as error:
        raise DataError(f"{where}: is nested too deeply; flatten it") from error
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{where}: is not JSON ({error})") from error


def _without_repeats(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"{where}: column {shown(twice)} is given twice; keep one")
    return result


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: is {_kind(row)}, not an object with named columns; write {{...}}")
    return row


def _kind(value: Any) -> str:
    kinds = ((bool, "true or false"), ((int, float), "a number"), (str, "text"), (list, "a list"), (dict, "an object"))
    return next((name for types, name in kinds if isinstance(value, types)), "null")


def _frame(path: Path, places: list[str], rows: list[dict[str, Any]], ids: Collection[str]) -> pl.DataFrame:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pl.DataFrame([_column(path, places, n, [row.get(n) for row in rows], n in ids) for n in names])


def _column(path: Path, places: list[str], name: str, values: list[Any], is_id: bool) -> pl.Series:
    def refuse(row: int, message: str) -> DataError:
        return DataError(f"{path}: {places[row]}, column {shown(name)}: {message}")

    if is_id:
        values = [as_id(v) if isinstance(v, (int, float)) and not isinstance(v, bool) else v for v in values]
    kinds = [None if v is None else _kind(v) for v in values]
    first = next((k for k in kinds if k is not None), None)
    odd = next((i for i, k in enumerate(kinds) if k is not None and k != first), None)
    if odd is not None:
        raise refuse(odd, f"is {kinds[odd]} where earlier rows hold {first}; give the column one type")
    if is_id and first not in (None, "text"):
        raise refuse(kinds.index(first), f"an id is text or a number, not {first}")
    try:
        return _typed(name, values, first)
    except (pl.exceptions.PolarsError, TypeError, OverflowError, UnicodeError, ValueError):
        one_by_one = (i for i, v in enumerate(values) if _fails(name, v, first))
        row = next(one_by_one, 0)
        raise refuse(row, f"cannot be stored ({_why(values[row])}); write plain text, numbers or messages") from None


def _typed(name: str, values: list[Any], kind: str | None) -> pl.Series:
    if kind == "a number":
        floats = any(isinstance(v, float) for v in values)
        return pl.Series(name, values, dtype=pl.Float64 if floats else pl.Int64)
    if kind == "a list" and _are_messages(values):
        return pl.Series(name, values, dtype=MESSAGES)
    dtypes: dict[str | None, Any] = {"text": pl.Utf8, "true or false": pl.Boolean, None: pl.Null}
    return pl.Series(name, values, dtype=dtypes.get(kind))


def _are_messages(values: Iterable[Any]) -> bool:
    messages = [m for value in values if value is not None for m in value]
    return all(isinstance(m, dict) and set(m) == {"role", "content"} for m in messages) and bool(messages)


def _fails(name: str, value: Any, kind: str | None) -> bool:
    try:
        _typed(name, [value], kind)
    except (pl.exceptions.PolarsError, TypeError, OverflowError, UnicodeError, ValueError):
        return True
    return False


def _why(value: Any) -> str:
    if isinstance(value, str):
        return "it is not valid Unicode: half of a surrogate pair"
    if isinstance(value, int):
        return "the number needs more than 64 bits"
    return f"its entries differ in type: {shown(value)}"


def as_id(value: float) -> str:
    """Return a numeric id as text, whole numbers without `.0`.

    >>> as_id(7.0), as_id(7), as_id(7.5)
    ('7', '7', '7.5')
    """
    return str(int(value)) if math.isfinite(value) and value == int(value) else str(value)


def _read_parquet(path: Path, ids: Collection[str]) -> pl.DataFrame:
    try:
        table = pl.read_parquet(path, glob=False, hive_partitioning=False)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise DataError(f"{path}: is not a complete Parquet file ({error}); write it again") from error
    numeric = [name for name in table.columns if name in ids and table[name].dtype.is_numeric()]
    as_text = [pl.Series(n, [None if v is None else as_id(v) for v in table[n].to_list()], pl.Utf8) for n in numeric]
    return table.with_columns(as_text)


def _read_csv(path: Path, ids: Collection[str]) -> pl.DataFrame:
    del ids  # every column of a CSV is text
    before = csv.field_size_limit(sys.maxsize)
    try:
        with open(path, encoding="utf-8-sig", newline="") as lines:
            header, rows = _records(path, csv.reader(lines, strict=True))
    finally:
        csv.field_size_limit(before)
    columns = zip(*rows, strict=True) if rows else ([] for _ in header)
    return pl.DataFrame([pl.Series(n, list(c), dtype=pl.Utf8) for n, c in zip(header, columns, strict=True)])


def _records(path: Path, reader: Iterator[list[str]]) -> tuple[list[str], list[list[str]]]:
    rows: list[list[str]] = []
    for number in count():
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            raise DataError(f'{path}: row {number}: is not CSV ({error}); quote texts with "') from error
        if rows and row and len(row) != len(rows[0]):
            raise DataError(
                f"{path}: row {number}: has {len(row)} cells under {len(rows[0])} columns; quote texts that hold commas"
            )
        if row:
            rows.append(row)
    header = rows[0] if rows else []
    if "" in header or len(set(header)) < len(header):
        raise DataError(
            f"{path}: the header names a column twice or not at all: {shown(header)}; name each column once"
        )
    return header, rows[1:]


def write_frame(table: pl.DataFrame, path: str | Path) -> None:
    """Write a table as .jsonl, .parquet or .csv, whole or not at all.

    Raises DataError for another suffix, and for message lists or other nested columns in CSV, which cannot hold them.
    """
    path = Path(path)
    if path.suffix == ".csv":
        nested = [name for name, dtype in table.schema.items() if dtype.is_nested()]
        if nested:
            raise DataError(f"{path}: CSV cannot hold lists (column {shown(nested[0])}); write .jsonl or .parquet")
    writers = {".jsonl": table.write_ndjson, ".parquet": table.write_parquet, ".csv": table.write_csv}
    if path.suffix not in writers:
        raise DataError(f"{path}: cannot write this kind of file; use one of {', '.join(writers)}")
    write_atomically(path, writers[path.suffix])


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Call `write` with a temporary file beside `path`, then move it into place; on failure leave nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
