"""People in words: a file of descriptions, or a few of our own for trying."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from pluralprefs.data.files import DataError, read_frame, shown
from pluralprefs.data.ids import content_id

SCHEMA = {"user_id": pl.Utf8, "description": pl.Utf8}

# What they like is said in words that the offline teacher understands too.
_EXAMPLES = {
    "nurse": "A nurse on night shifts who is short of sleep. Likes empathetic and supportive answers. "
    "Dislikes sarcastic ones.",
    "engineer": "An engineer who reads answers between two meetings. Likes direct and assertive answers. "
    "Dislikes humorous ones.",
    "comedian": "Writes for a comedy club and is easily bored. Likes humorous and sarcastic answers. "
    "Dislikes formal ones.",
    "judge": "A retired judge with old manners. Likes formal and polite answers. Dislikes assertive ones.",
    "student": "A student in a shared flat who asks late at night. Likes casual and humorous answers. "
    "Dislikes polite ones, which sound false.",
    "carer": "Looks after an ill father and worries much. Likes polite and empathetic answers. Dislikes direct ones.",
    "critic": "Reviews plays for a paper and tests every claim. Likes sarcastic and detached answers. "
    "Dislikes supportive ones.",
    "coach": "Coaches a youth team and wants people to move. Likes supportive and direct answers. "
    "Dislikes passive ones.",
}


def examples() -> pl.DataFrame:
    """Return eight people of our own: user_id, description.

    >>> examples().height
    8
    """
    return pl.DataFrame(list(_EXAMPLES.items()), schema=SCHEMA, orient="row")


def read_people(path: str | Path) -> pl.DataFrame:
    """Read user_id and description from a file; a person without a user_id is named for the description.

    Blanks at the ends of descriptions are cut. Raises DataError, naming file, row and cure, where a description is
    missing or is no text, or a name stands twice.
    """
    table = read_frame(path, ids=("user_id",))
    if not table.height:
        raise DataError(f"{path}: holds nobody; write one description a row")
    if "description" not in table.columns:
        raise DataError(f"{path}: no column 'description' among {shown(table.columns)}; describe each person in it")
    descriptions = [_text(text, f"{path}: row {row}") for row, text in enumerate(table["description"].to_list(), 1)]
    given = table["user_id"].to_list() if "user_id" in table.columns else [None] * table.height
    names = [name or f"person-{content_id(text)}" for name, text in zip(given, descriptions, strict=True)]
    first: dict[str, int] = {}
    for row, name in enumerate(names, 1):
        if name in first:
            raise DataError(f"{path}: row {row}, column 'user_id': {shown(name)} is also row {first[name]}; rename one")
        first[name] = row
    return pl.DataFrame({"user_id": names, "description": descriptions}, schema=SCHEMA)


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}, column 'description': is {shown(value)}; describe the person in words")
    return value.strip()
