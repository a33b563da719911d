"""What a valid table of comparisons is: fill what may be left out, cast, and refuse what cannot be right.

Every refusal is one line that names the file, the row (counted from 1), the column and the cure. A table that passed
`check` needs no further checks, and `check` of its own result changes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import polars as pl

from pluralprefs.data.files import DataError, as_id, shown
from pluralprefs.data.ids import MESSAGES, content_ids, example_ids

TEXTS = ("prompt", "first", "second")
SCHEMA: dict[str, pl.DataType | type[pl.DataType]] = {
    "example_id": pl.Utf8,
    "prompt": pl.Utf8,
    "first": pl.Utf8,
    "second": pl.Utf8,
    "target": pl.Float64,
    "tie": pl.Boolean,
    "strength": pl.Float64,
    "strength_scale": pl.Utf8,
    "weight": pl.Float64,
    "user_id": pl.Utf8,
    "annotator_id": pl.Utf8,
    "community_id": pl.Utf8,
    "prompt_id": pl.Utf8,
    "first_id": pl.Utf8,
    "second_id": pl.Utf8,
    "fold": pl.Utf8,
    "source": pl.Utf8,
    "source_revision": pl.Utf8,
    "licence": pl.Utf8,
}  # prompt, first and second may be message lists, `MESSAGES`, instead
PEOPLE = ("user_id", "annotator_id", "community_id")
IDS = ("example_id", *PEOPLE, "prompt_id", "first_id", "second_id", "chosen_id", "rejected_id")
NUMBERS = ("margin", "score_chosen", "score_rejected")  # carried along; numbers also where a file has them as text
FOLDS = ("train", "validation", "test")
LARGEST = 1e12  # of an attribute: squares of float32 end at 3e38


class Checked(NamedTuple):
    """A valid table, and how many rows a community lost because both responses were the same."""

    table: pl.DataFrame
    dropped: pl.DataFrame  # community_id, dropped


def validate(table: pl.DataFrame, *, name: str = "table") -> pl.DataFrame:
    """Return the table with all columns of `SCHEMA` filled, cast and checked; see `check`."""
    return check(table, name=name).table


def check(table: pl.DataFrame, *, name: str = "table", allow_empty: bool = False) -> Checked:
    """Fill defaults and missing ids, cast, and refuse what cannot be right; drop pairs of identical responses.

    Raises DataError in one line that names `name`, the row, the column and the cure. A table without rows is an error
    unless `allow_empty`.
    """
    if not table.height and not allow_empty:
        raise DataError(f"{name}: holds no comparisons; write one row a judgement")
    for column in ("first", "second", "target"):
        if column not in table.columns:
            raise DataError(f"{name}: no column {column!r} among {shown(table.columns)}; it is needed")
    table = _cast(table, name)
    _check_values(table, name)
    contents = pl.DataFrame([content_ids(table[text]) for text in TEXTS])
    table = _fill_ids(table, contents)
    _check_ids(table, contents, name)
    table, dropped = _drop_identical(table, contents)
    if not table.height and not allow_empty:
        raise DataError(f"{name}: in every row both responses are the same; give rows that compare two")
    attributes = sorted(c for c in table.columns if c.startswith("attr:"))
    return Checked(table.select(*SCHEMA, *attributes, pl.exclude(*SCHEMA, *attributes)), dropped)


def _cast(table: pl.DataFrame, name: str) -> pl.DataFrame:
    default = {"prompt": ""}
    absent = {c: pl.lit(default.get(c), dtype) for c, dtype in SCHEMA.items() if c not in table.columns}
    table = table.with_columns(**absent)
    dtypes = SCHEMA | {c: pl.Float64 for c in table.columns if c.startswith("attr:")}
    dtypes |= {c: pl.Float64 for c in NUMBERS if table.schema.get(c) == pl.Utf8}
    columns = [as_text(table[c], name) if c in TEXTS else as_column(table[c], t, name) for c, t in dtypes.items()]
    nullable = [pl.col(c).replace("", None) for c, t in SCHEMA.items() if t == pl.Utf8 and c not in TEXTS]
    filled = [pl.col("tie").fill_null(False), pl.col("weight").fill_null(1.0), *nullable]
    said_tie = pl.when(pl.col("tie") & pl.col("target").is_null()).then(0.5).otherwise("target")
    return table.with_columns(columns).with_columns(filled).with_columns(target=said_tie)


def as_text(values: pl.Series, name: str) -> pl.Series:
    """Return texts, or message lists in the one form `MESSAGES`; raise DataError for anything else."""
    dtype = values.dtype
    if isinstance(dtype, (pl.Categorical, pl.Enum)) or dtype == pl.Null:
        return values.cast(pl.Utf8)
    if dtype == pl.Utf8:
        return values
    inner = dtype.inner if isinstance(dtype, pl.List) else None
    fields = {field.name for field in inner.fields} if isinstance(inner, pl.Struct) else set()
    if inner is not None and inner == pl.Null:
        return values.cast(MESSAGES)
    if fields == {"role", "content"}:
        message = pl.struct(*(pl.element().struct.field(f).cast(pl.Utf8) for f in ("role", "content")))
        return _whole(values.to_frame().select(pl.col(values.name).list.eval(message))[values.name], name)
    row = next((i for i, v in enumerate(values.to_list()) if v is not None and _odd(v)), 0)
    extra = sorted(fields - {"role", "content"})
    what = f"messages have {shown(extra[0])}, which cannot be kept" if extra else f"is {dtype}, not text or messages"
    raise DataError(f"{name}: row {row + 1}, column {values.name!r}: {what}; give texts, or lists of {{role, content}}")


def _odd(value: object) -> bool:
    messages = value if isinstance(value, list) else [value]
    return any(
        not isinstance(m, dict) or any(v is not None for k, v in m.items() if k not in ("role", "content"))
        for m in messages
    )


def as_column(values: pl.Series, dtype: pl.DataType | type[pl.DataType], name: str) -> pl.Series:
    """Cast a column of ids, numbers or booleans; raise DataError with the first row that cannot be cast.

    Numbers written as text are numbers, empty or blank text is null; numeric ids lose a `.0`.
    """
    if dtype == pl.Utf8 and values.dtype == pl.Utf8:
        return (
            values.to_frame().select(pl.when(pl.col(values.name).str.strip_chars() != "").then(values.name)).to_series()
        )
    if dtype == pl.Utf8 and values.dtype.is_float():
        return pl.Series(values.name, [None if v is None else as_id(v) for v in values.to_list()], dtype=pl.Utf8)
    if values.dtype == pl.Utf8 and dtype != pl.Utf8:
        values = values.str.strip_chars().replace("", None)
    if dtype == pl.Boolean and values.dtype == pl.Utf8:
        words = {"true": True, "false": False, "1": True, "0": False}
        cast = values.str.to_lowercase().replace_strict(words, default=None, return_dtype=pl.Boolean)
    elif values.dtype.is_nested() or (
        values.dtype != pl.Null and (values.dtype == pl.Boolean) != (dtype == pl.Boolean)
    ):
        cast = pl.Series(values.name, [None] * len(values), dtype=dtype)
    else:
        cast = values.cast(dtype, strict=False)
    lost = (cast.is_null() & values.is_not_null()).arg_true()
    if len(lost):
        kind = "a number" if dtype == pl.Float64 else "true or false" if dtype == pl.Boolean else "text"
        where = f"{name}: row {lost[0] + 1}, column {values.name!r}"
        raise DataError(f"{where}: {shown(values[lost[0]])} is not {kind}; write {kind}")
    return cast


def _check_values(table: pl.DataFrame, name: str) -> None:
    target, weight = pl.col("target"), pl.col("weight")
    attributes = [c for c in table.columns if c.startswith("attr:")]
    rules = [
        *((c, pl.col(c).is_null(), "is missing; write a text") for c in TEXTS),
        ("first", _empty(table, "first") & _empty(table, "second"), "both responses are empty; remove the row"),
        ("target", target.is_null(), "is missing; write P(first) in [0, 1], or first, second or tie"),
        ("target", ~target.is_between(0, 1), "is not in [0, 1]; write P(first), 1 where it is preferred"),
        ("tie", pl.col("tie") & (target != 0.5), "stands beside a target that is not 0.5; correct one"),
        ("weight", ~(weight.is_finite() & (weight >= 0)), "is not a finite number >= 0; correct it"),
        *((c, ~pl.col(c).is_finite(), "is not finite; leave it empty") for c in ("strength", *attributes)),
        *((c, pl.col(c).abs() > LARGEST, "is too large to be a score; correct it") for c in attributes),
        ("fold", ~pl.col("fold").is_in(FOLDS), f"is not one of {', '.join(FOLDS)}; rename it"),
    ]
    for column, wrong, message in rules:
        rows = table.select(wrong.fill_null(False).alias("wrong"))["wrong"].arg_true()
        if len(rows):
            value = "" if column in TEXTS or table[column][rows[0]] is None else f"{shown(table[column][rows[0]])} "
            raise DataError(f"{name}: row {rows[0] + 1}, column {column!r}: {value}{message}")
    _check_attribute_names(attributes, name)


def _whole(chats: pl.Series, name: str) -> pl.Series:
    part = pl.element().struct
    half = pl.col(chats.name).list.eval(part.field("role").is_null() | part.field("content").is_null()).list.any()
    rows = chats.to_frame().select(half)[chats.name].fill_null(False).arg_true()
    if len(rows):
        where = f"{name}: row {rows[0] + 1}, column {chats.name!r}"
        raise DataError(f"{where}: has a message without role or content; write both as text")
    return chats


def _empty(table: pl.DataFrame, column: str) -> pl.Expr:
    return pl.col(column).list.len() == 0 if table[column].dtype.is_nested() else pl.col(column) == ""


def _check_attribute_names(columns: list[str], name: str) -> None:
    for column in columns:
        stem, _, side = column.rpartition(":")
        if side not in ("first", "second") or stem in ("attr", "attr:"):
            raise DataError(f"{name}: column {column!r}: name an attribute attr:<name>:first and attr:<name>:second")
        twin = f"{stem}:{'second' if side == 'first' else 'first'}"
        if twin not in columns:
            raise DataError(f"{name}: column {column!r} has no {twin!r}; give the attribute of both responses")


def _fill_ids(table: pl.DataFrame, contents: pl.DataFrame) -> pl.DataFrame:
    table = table.with_columns(table[f"{text}_id"].fill_null(contents[text]) for text in TEXTS)
    if not table["example_id"].null_count():
        return table
    return table.with_columns(table["example_id"].fill_null(example_ids(table, contents)))


def _check_ids(table: pl.DataFrame, contents: pl.DataFrame, name: str) -> None:
    twice = (~table["example_id"].is_first_distinct()).arg_true()
    if len(twice):
        value = table["example_id"][twice[0]]
        first = (table["example_id"] == value).arg_true()[0]
        where = f"{name}: row {twice[0] + 1}, column 'example_id': {shown(value)}"
        raise DataError(f"{where} is also row {first + 1}; number the rows, or leave the column out")
    row = pl.int_range(pl.len()).alias("row")
    sides = [
        table.select("prompt_id", row, item=f"{side}_id").with_columns(contents["prompt"], contents[side].alias("text"))
        for side in ("first", "second")
    ]
    texts = pl.concat(sides).unique(["prompt_id", "item", "prompt", "text"], keep="first", maintain_order=True)
    clash = texts.filter(~pl.struct("prompt_id", "item").is_first_distinct())
    if clash.height:
        where = f"{name}: row {clash['row'][0] + 1}, columns 'first_id', 'second_id': {shown(clash['item'][0])}"
        raise DataError(f"{where} stands for two texts; give each its own id, or leave the columns out")


def _drop_identical(table: pl.DataFrame, contents: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    same = contents["first"] == contents["second"]
    count = pl.len().cast(pl.Int64).alias("dropped")
    dropped = table.filter(same).group_by("community_id").agg(count).sort("community_id")
    return table.filter(~same), dropped
