"""Files that people really hand over: broken, odd or extreme. Each says what must come of it.

`MALFORMED` serves the reader's tests and the command line's: a file is either refused with an error that holds every
text of `says`, or read into `rows` comparisons.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import polars as pl

GOOD = {"prompt": "p", "first": "a", "second": "b", "target": 1, "user_id": "ana"}
PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
CHAT = [{"role": "assistant", "content": "a"}]


@dataclass(frozen=True)
class Malformed:
    """A file to write, and either the texts its refusal must hold or the rows it must give."""

    title: str
    file: str
    content: bytes | Callable[[Path], object]
    says: tuple[str, ...] = ()
    rows: int | None = None

    def write(self, folder: Path) -> Path:
        """Write the file into a folder and return its path."""
        path = folder / self.file
        if isinstance(self.content, bytes):
            path.write_bytes(self.content)
        else:
            self.content(path)
        return path


def lines(*rows: dict | str) -> bytes:
    """JSON Lines of rows; a text stands as it is."""
    return "".join(
        (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows
    ).encode()


def bad(title: str, *rows: dict | str, says: tuple[str, ...]) -> Malformed:
    return Malformed(title, "data.jsonl", lines(*rows), says=says)


def fine(title: str, *rows: dict | str, count: int) -> Malformed:
    return Malformed(title, "data.jsonl", lines(*rows), rows=count)


def parquet(**columns: list) -> Callable[[Path], object]:
    return lambda path: pl.DataFrame(columns).write_parquet(path)


def without(name: str) -> dict:
    return {key: value for key, value in GOOD.items() if key != name}


MALFORMED = [
    bad(
        "an attribute beyond all scores is refused",
        GOOD | {"attr:x:first": 1e38, "attr:x:second": 0.0},
        says=("row 1", "'attr:x:first'", "too large"),
    ),
    bad(
        "words mixed with numbers are named both",
        GOOD | {"target": "1"},
        GOOD | {"target": "x"},
        says=("row 2", "mixes 'x' with a number in row 1"),
    ),
    Malformed("an empty file is refused", "data.jsonl", b"", says=("no comparisons",)),
    bad("blank lines alone are refused", "", "  ", says=("no comparisons",)),
    bad("a missing response column is refused", without("second"), says=("'second'",)),
    bad("a missing target column is refused", without("target"), says=("'target'",)),
    bad("a misspelt response column is refused", {"prompt": "p", "choosen": "a", "rejected": "b"}, says=("'chosen'",)),
    bad("two layouts in one file are refused", GOOD | PAIR, says=("both layouts",)),
    bad("a NaN target is refused", GOOD, GOOD | {"target": float("nan")}, says=("row 2", "'target'")),
    bad("an infinite target is refused", GOOD, GOOD | {"target": float("inf")}, says=("row 2", "'target'")),
    bad("a target above one is refused", GOOD, GOOD | {"target": 2}, says=("row 2", "'target'")),
    bad("a negative target is refused", GOOD | {"target": -1}, says=("row 1", "'target'")),
    bad("a missing target is refused", GOOD, without("target"), says=("row 2", "'target'")),
    bad("an unknown target word is refused", GOOD | {"target": "better"}, says=("row 1", "'target'", "better")),
    bad(
        "words mixed with numbers are refused",
        GOOD | {"target": "first"},
        GOOD | {"target": "0"},
        says=("row 2", "'target'", "mixes"),
    ),
    bad("true and false as target are refused", GOOD | {"target": True}, says=("'target'", "1 where")),
    bad("a target that is a list is refused", GOOD | {"target": [1, 0]}, says=("row 1", "'target'")),
    bad("a NaN weight is refused", GOOD | {"weight": float("nan")}, says=("row 1", "'weight'")),
    bad("a negative weight is refused", GOOD, GOOD | {"weight": -2}, says=("row 2", "'weight'")),
    bad(
        "an infinite attribute is refused",
        GOOD | {"attr:cost:first": float("inf"), "attr:cost:second": 1},
        says=("row 1", "'attr:cost:first'"),
    ),
    bad("an attribute of one side is refused", GOOD | {"attr:cost:first": 1}, says=("'attr:cost:second'",)),
    bad("a tie with a winner is refused", GOOD | {"tie": True}, says=("row 1", "'tie'")),
    bad("a missing response is refused", GOOD, GOOD | {"first": None}, says=("row 2", "'first'")),
    bad("a missing chosen response is refused", PAIR, PAIR | {"chosen": None}, says=("row 2", "'chosen'")),
    bad("two empty responses are refused", GOOD | {"first": "", "second": ""}, says=("row 1", "'first'")),
    bad("a response that is a number is refused", GOOD, GOOD | {"first": 3}, says=("line 2", "'first'")),
    bad("responses that are numbers are refused", GOOD | {"first": 3}, says=("row 1", "'first'")),
    bad("a chat answered by a text is refused", PAIR | {"chosen": CHAT}, says=("'rejected'",)),
    bad(
        "a message without content is refused",
        PAIR | {"chosen": CHAT, "rejected": [{"role": "user", "content": None}]},
        says=("row 1", "'rejected'", "role or content"),
    ),
    bad(
        "a message with a tool call is refused",
        PAIR | {"chosen": CHAT, "rejected": [{"role": "user", "content": "x", "tool": "t"}]},
        says=("row 1", "'rejected'", "'tool'"),
    ),
    bad(
        "an example_id given twice is refused",
        GOOD | {"example_id": "e"},
        GOOD | {"example_id": "e", "first": "c"},
        says=("row 2", "'example_id'", "row 1"),
    ),
    bad(
        "one item id for two texts is refused",
        GOOD | {"first_id": "x", "second_id": "y"},
        GOOD | {"first": "c", "first_id": "x", "second_id": "y"},
        says=("row 2", "'first_id'", "'x'"),
    ),
    bad("an unknown fold is refused", GOOD | {"fold": "dev"}, says=("row 1", "'fold'", "dev")),
    bad("a user id that is an object is refused", GOOD | {"user_id": {"name": "ana"}}, says=("line 1", "'user_id'")),
    bad("a line cut short is refused", GOOD, '{"prompt": "p", "first": "a', says=("line 2", "cut short")),
    bad("a line that is a list is refused", GOOD, "[1, 2]", says=("line 2", "list")),
    bad("two objects on a line are refused", json.dumps(GOOD) + json.dumps(GOOD), says=("line 1", "not JSON")),
    bad("a column given twice is refused", '{"prompt": "p", "prompt": "q"}', says=("line 1", "'prompt'", "twice")),
    bad(
        "half a surrogate pair is refused",
        GOOD,
        '{"prompt": "\\ud800", "first": "a", "second": "b", "target": 1}',
        says=("line 2", "'prompt'", "surrogate"),
    ),
    bad("a number beyond 64 bits is refused", GOOD | {"seconds": 10**30}, says=("line 1", "'seconds'", "64 bits")),
    bad("deep nesting is refused", "[" * 100_000, says=("line 1", "nested")),
    bad("only identical pairs are refused", GOOD | {"first": "b"}, says=("same",)),
    Malformed("UTF-16 is refused", "data.jsonl", lines(GOOD).decode().encode("utf-16"), says=("line 1", "UTF-8")),
    Malformed(
        "Latin-1 is refused", "data.jsonl", lines(GOOD) + '{"prompt": "é"}'.encode("latin-1"), says=("line 2", "UTF-8")
    ),
    Malformed("a JSON object instead of a list is refused", "data.json", json.dumps(GOOD).encode(), says=("list",)),
    Malformed("a JSON list of numbers is refused", "data.json", b"[1]", says=("row 1", "number")),
    Malformed(
        "a CSV row with a cell too many is refused",
        "data.csv",
        b"first,second,target\na,b,1\na,b,1,x\n",
        says=("row 2", "4 cells"),
    ),
    Malformed(
        "a CSV with an open quote is refused", "data.csv", b'first,second,target\na,"b,1\n', says=("row 1", "quote")
    ),
    Malformed(
        "a CSV that names a column twice is refused", "data.csv", b"first,first,target\na,b,1\n", says=("header",)
    ),
    Malformed(
        "a CSV weight that is a word is refused",
        "data.csv",
        b"first,second,target,weight\na,b,1,much\n",
        says=("row 1", "'weight'", "much"),
    ),
    Malformed("a CSV header alone is refused", "data.csv", b"first,second,target\n", says=("no comparisons",)),
    Malformed("a Parquet file cut short is refused", "data.parquet", b"PAR1\x00\x00", says=("Parquet",)),
    Malformed(
        "numbers as Parquet responses are refused",
        "data.parquet",
        parquet(first=[1], second=[2], target=[1.0]),
        says=("row 1", "'first'"),
    ),
    Malformed(
        "a gzip file cut short is refused", "data.jsonl.gz", gzip.compress(lines(GOOD) * 50)[:-20], says=("cut short",)
    ),
    Malformed("an unknown suffix is refused", "data.xlsx", b"x", says=(".jsonl", ".parquet")),
    Malformed("a folder instead of a file is refused", "data.jsonl", lambda path: path.mkdir(), says=("no such file",)),
    Malformed("a byte order mark is read over", "data.jsonl", b"\xef\xbb\xbf" + lines(GOOD), rows=1),
    fine("one comparison is enough", GOOD, count=1),
    fine("blank lines between rows are skipped", GOOD, "", GOOD | {"first": "c"}, count=2),
    fine("equal rows are two judgements", GOOD, GOOD, count=2),
    fine("an identical pair is dropped", GOOD, GOOD | {"first": "b"}, count=1),
    fine("a text of a megabyte is read", GOOD | {"first": "é" * 500_000}, count=1),
    fine("a user id may look like a path", GOOD | {"user_id": "../../etc/passwd", "community_id": "../x"}, count=1),
    fine("ids may be in any script", GOOD | {"user_id": "Ольга ۱ 🙂", "first_id": "a b", "second_id": "ア"}, count=1),
    fine("an unknown user may be null", GOOD | {"user_id": None}, GOOD | {"user_id": ""}, count=2),
    fine("numeric ids are read", GOOD | {"user_id": 7}, GOOD | {"user_id": "x"}, count=2),
    fine("one empty response is an answer", GOOD | {"first": ""}, count=1),
    fine("words may be capital", GOOD | {"target": "First"}, GOOD | {"target": "TIE"}, count=2),
    Malformed(
        "a CSV with a megabyte in a cell is read",
        "data.csv",
        b"first,second,target\n" + b"a" * 1_000_000 + b",b,1\n",
        rows=1,
    ),
    Malformed("a CSV text with line breaks is read", "data.csv", b'first,second,target\n"a\nb","c, d",2\n', rows=1),
]
