"""Layouts: which columns of a raw table say what was compared and what was judged.

Two layouts are read. Our own has `first`, `second` and `target`. TRL's preference layout has `chosen` and `rejected`,
with the prompt in a column of its own (explicit) or at the start of both (implicit), as text or as message lists.

A chosen/rejected file always names the winner first, and a model that sees that order learns it. Each pair is therefore
given sides by the stable hash of its prompt and its two responses, whichever of them won: all judgements of one pair
have the same sides. Columns that come in twos (`chosen_id`, `attr:<name>:chosen` and their `rejected` twins) follow.
`margin`, `score_chosen`, `score_rejected` and all other columns are carried along as they are.
"""

from __future__ import annotations

from difflib import get_close_matches

import polars as pl

from pluralprefs.data.files import DataError, shown
from pluralprefs.data.ids import canonical, content_ids, example_ids, map_unique, stable_hash

WORDS = {"first": 1.0, "a": 1.0, "left": 1.0, "second": 0.0, "b": 0.0, "right": 0.0}
DIGITS = {"1": 1.0, "2": 0.0}
TIE = {"tie": 0.5}
NULLABLE = (
    "user_id",
    "annotator_id",
    "community_id",
    "strength",
    "strength_scale",
    "fold",
    "source",
    "source_revision",
    "licence",
)
NAMED = {"prompt": "prompt", "user": "user_id", "community": "community_id"}


def rename_columns(raw: pl.DataFrame, name: str, **columns: str) -> pl.DataFrame:
    """Give the caller's prompt, user and community columns our names; one column may be both user and community.

    Raises DataError where a column named by the caller is absent, or where our name is taken by another column.
    """
    taken = [columns[kind] for kind in columns]
    for kind, column in columns.items():
        ours = NAMED[kind]
        if column == ours:
            continue
        if column not in raw.columns:
            near = get_close_matches(column, raw.columns, 1)
            hint = f"did you mean {shown(near[0])}" if near else f"it has {shown(raw.columns)}"
            raise DataError(f"{name}: no {kind} column {shown(column)}; {hint}")
        if ours in raw.columns and ours not in taken:
            raise DataError(f"{name}: column {shown(ours)} is there beside {kind} column {shown(column)}; remove one")
        raw = raw.with_columns(pl.col(column).alias(ours))
    return raw.drop([c for kind, c in columns.items() if c != NAMED[kind] and c not in NAMED.values()], strict=False)


def to_first_second(
    raw: pl.DataFrame, name: str, *, extract_prompt: bool = False, labelled: bool = True
) -> pl.DataFrame:
    """Bring a raw table of either layout to `prompt, first, second, target, tie` and the rest.

    In the own layout a target is P(first) in [0, 1] or a word in any case: first, a, left, 1; second, b, right, 2; tie.
    Texts that are all "1", "2" or "tie" are words; other numbers in text are numbers; a mixture is an error.
    Without `labelled`, rows that carry no target get 0.5 at weight 0, so that nothing is learned or measured on them.
    """
    trl, own = {"chosen", "rejected"} & set(raw.columns), {"first", "second"} & set(raw.columns)
    if trl and own:
        both = shown(sorted(trl | own))
        raise DataError(f"{name}: has columns of both layouts {both}; keep first/second or chosen/rejected")
    missing = sorted(({"chosen", "rejected"} if trl else {"first", "second"}) - trl - own)
    if missing:
        cure = "give first, second and target, or chosen and rejected"
        raise DataError(f"{name}: no column {shown(missing[0])} among {shown(raw.columns)}; {cure}")
    if trl:
        return _from_chosen(raw, name, extract_prompt)
    return _with_target(raw if "prompt" in raw.columns else raw.with_columns(prompt=pl.lit("")), name, labelled)


def _with_target(raw: pl.DataFrame, name: str, labelled: bool) -> pl.DataFrame:
    if "target" not in raw.columns:
        if labelled:
            raise DataError(f"{name}: no column 'target'; say P(first) in [0, 1], or first, second or tie")
        return raw.with_columns(target=pl.lit(0.5), weight=pl.lit(0.0))
    if raw["target"].dtype == pl.Boolean:
        raise DataError(f"{name}: column 'target': is true or false; write 1 where the first is preferred, else 0")
    raw = _words_to_numbers(raw, name) if raw["target"].dtype == pl.Utf8 else raw
    if labelled or not raw["target"].null_count():
        return raw
    weight = pl.col("weight") if "weight" in raw.columns else pl.lit(1.0)
    absent = pl.col("target").is_null()
    return raw.with_columns(weight=pl.when(absent).then(0.0).otherwise(weight), target=pl.col("target").fill_null(0.5))


def _words_to_numbers(raw: pl.DataFrame, name: str) -> pl.DataFrame:
    words = raw["target"].str.strip_chars().str.to_lowercase().replace("", None)
    spoken = words.drop_nulls()
    numbers = words.cast(pl.Float64, strict=False)
    if len(spoken) == numbers.count() and not spoken.is_in(list(DIGITS)).all():
        return raw.with_columns(numbers.alias("target"))
    meaning = DIGITS | TIE if spoken.is_in(list(DIGITS | TIE)).all() else WORDS | TIE
    targets = words.replace_strict(meaning, default=None, return_dtype=pl.Float64)
    wrong = (targets.is_null() & words.is_not_null()).arg_true()
    if len(wrong):
        word, number = words.is_not_null() & numbers.is_null(), numbers.is_not_null()
        row = int((word if numbers.count() else targets.is_null() & words.is_not_null()).arg_max() or 0)
        what = f"unknown word {shown(raw['target'][row])}"
        if numbers.count():
            what = f"mixes {shown(raw['target'][row])} with a number in row {int(number.arg_max() or 0) + 1}"
        cure = "write P(first) in [0, 1], or first, second or tie throughout"
        raise DataError(f"{name}: row {row + 1}, column 'target': {what}; {cure}")
    tie = raw["tie"] if "tie" in raw.columns else words.is_in(list(TIE)).fill_null(False)
    return raw.with_columns(targets.alias("target"), tie.alias("tie"))


def _from_chosen(raw: pl.DataFrame, name: str, extract_prompt: bool) -> pl.DataFrame:
    _check_chosen(raw, name)
    raw = raw if "prompt" in raw.columns else _split_prompt(raw, extract_prompt)
    if raw["prompt"].null_count():
        raise DataError(
            f"{name}: row {raw['prompt'].is_null().arg_true()[0] + 1}, column 'prompt': is missing; write \"\""
        )
    chosen_first = _chosen_first(raw)
    for ours, theirs in _sided(raw.columns, "chosen", "rejected"):
        winner, loser = raw[theirs[0]], raw[theirs[1]]
        first, second = winner.zip_with(chosen_first, loser), loser.zip_with(chosen_first, winner)
        raw = raw.drop(theirs).with_columns(first.alias(ours[0]), second.alias(ours[1]))
    return raw.with_columns(chosen_first.cast(pl.Float64).alias("target"))


def _check_chosen(raw: pl.DataFrame, name: str) -> None:
    ours = [c for c in raw.columns if c in ("target", "tie", "first_id", "second_id")]
    ours += [c for c in raw.columns if c.startswith("attr:") and c.endswith((":first", ":second"))]
    if ours:
        raise DataError(
            f"{name}: column {shown(ours[0])} beside chosen and rejected; remove it, or name it by chosen and rejected"
        )
    for column in ("chosen", "rejected"):
        missing = raw[column].is_null().arg_true()
        if len(missing):
            raise DataError(
                f"{name}: row {missing[0] + 1}, column {column!r}: is missing; write a response or remove the row"
            )
    chosen, rejected = raw["chosen"].dtype, raw["rejected"].dtype
    if chosen.is_nested() != rejected.is_nested():
        raise DataError(f"{name}: column 'rejected': is {rejected} where 'chosen' is {chosen}; use one kind for both")


def _sided(columns: list[str], first: str, second: str) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """Pairs of columns that follow the sides, such as chosen_id and rejected_id: (the other layout's, these)."""
    others = ("first", "second") if first == "chosen" else ("chosen", "rejected")
    patterns = ["{}", "{}_id"] + [
        c.removesuffix(first) + "{}" for c in columns if c.startswith("attr:") and c.endswith(f":{first}")
    ]
    pairs = [((p.format(others[0]), p.format(others[1])), (p.format(first), p.format(second))) for p in patterns]
    return [pair for pair in pairs if set(pair[1]) <= set(columns)]


def _chosen_first(raw: pl.DataFrame) -> pl.Series:
    ids = pl.DataFrame([content_ids(raw[c]).alias(c) for c in ("prompt", "chosen", "rejected")])
    low, high = pl.min_horizontal("chosen", "rejected"), pl.max_horizontal("chosen", "rejected")
    pair = ids.select(pl.concat_str("prompt", low, high, separator="|"))["prompt"]
    low_first = map_unique(pair, lambda key: stable_hash(f"side|{key}") % 2 == 0, pl.Boolean)
    return (ids["chosen"] <= ids["rejected"]) == low_first


def _split_prompt(raw: pl.DataFrame, extract_prompt: bool) -> pl.DataFrame:
    """Take what both responses share at the start as the prompt: messages always, text where asked for."""
    texts = not raw["chosen"].dtype.is_nested()
    if texts and not extract_prompt:
        return raw.with_columns(prompt=pl.lit(""))
    chosen, rejected = raw["chosen"].to_list(), raw["rejected"].to_list()
    shared = [_shared(c, r, texts) for c, r in zip(chosen, rejected, strict=True)]
    dtype = pl.Utf8 if texts else raw["chosen"].dtype
    return raw.with_columns(
        pl.Series("prompt", [c[:n] for c, n in zip(chosen, shared, strict=True)], dtype=dtype),
        pl.Series("chosen", [c[n:] for c, n in zip(chosen, shared, strict=True)], dtype=dtype),
        pl.Series("rejected", [r[n:] for r, n in zip(rejected, shared, strict=True)], dtype=dtype),
    )


def _shared(chosen: str | list, rejected: str | list, texts: bool) -> int:
    if texts:
        shortest = min(len(chosen), len(rejected))
        length = next((i for i in range(shortest) if chosen[i] != rejected[i]), shortest)
        return length - (length > 0 and chosen[length - 1] == " ")  # the space belongs to the response, as in TRL
    last = min(len(chosen), len(rejected)) - 1  # each side keeps at least one message
    return next((i for i in range(last) if chosen[i] != rejected[i]), max(last, 0))


def to_trl(
    table: pl.DataFrame,
    implicit: bool = False,
    *,
    ties: str = "error",
    prompt: str = "prompt",
    user: str = "user_id",
    community: str = "community_id",
) -> pl.DataFrame:
    """Write comparisons back to TRL's preference layout, in their order: the inverse of reading it.

    `implicit` puts the prompt at the start of both responses. Columns that were only filled in on reading (ids from
    content, weight 1, empty columns) are left out. A tie or a graded target cannot be said in this layout:
    `ties="error"` refuses it, `ties="drop"` leaves such rows out, `len(table) - len(result)` of them.
    """
    if ties not in ("error", "drop"):
        raise ValueError(f"ties must be 'error' or 'drop', not {ties!r}")
    decided = table["target"].is_in([0.0, 1.0]) & ~table["tie"]
    undecided = (~decided).arg_true()
    if len(undecided) and ties == "error":
        row, target = undecided[0], table["target"][undecided[0]]
        where = f"table: row {row + 1}, column 'target'"
        raise DataError(f"{where}: chosen/rejected cannot say a tie or a graded {target}; leave them out (ties='drop')")
    kept = table.filter(decided)
    rows, chosen_first = _without_defaults(kept), kept["target"] == 1.0
    for theirs, ours in _sided(rows.columns, "first", "second"):
        first, second = rows[ours[0]], rows[ours[1]]
        winner, loser = first.zip_with(chosen_first, second), second.zip_with(chosen_first, first)
        rows = rows.drop(ours).with_columns(winner.alias(theirs[0]), loser.alias(theirs[1]))
    rows = _joined(rows) if implicit else rows
    front = [c for c in ("prompt", "chosen", "rejected") if c in rows.columns]
    names = {"prompt": prompt, "user_id": user, "community_id": community}
    return rows.select(*front, pl.exclude(front)).rename(names, strict=False)


def _joined(rows: pl.DataFrame) -> pl.DataFrame:
    prompt = rows["prompt"]
    if prompt.dtype.is_nested() == rows["chosen"].dtype.is_nested():
        join = pl.concat_list if prompt.dtype.is_nested() else pl.concat_str
        return rows.with_columns(join("prompt", c).alias(c) for c in ("chosen", "rejected")).drop("prompt")
    if (canonical(prompt) == "").all():
        return rows.drop("prompt")
    raise DataError("table: column 'prompt': text cannot be joined to message lists; write it with implicit=False")


def _without_defaults(table: pl.DataFrame) -> pl.DataFrame:
    contents = pl.DataFrame([content_ids(table[text]) for text in ("prompt", "first", "second")])
    made = {f"{text}_id": (table[f"{text}_id"] == contents[text]).all() for text in contents.columns}
    made["first_id"] = made["second_id"] = made["first_id"] and made["second_id"]
    made["example_id"] = (table["example_id"] == example_ids(table, contents)).all()
    made["weight"] = (table["weight"] == 1.0).all()
    made |= {column: table[column].null_count() == len(table) for column in NULLABLE}
    return table.drop("target", "tie", *(column for column, is_made in made.items() if is_made))
