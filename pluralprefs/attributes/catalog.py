"""The catalogue: nineteen attributes that a text may express, nine norms of style and ten values, at five levels each.

Names and poles are those of PrefPalette (arXiv 2507.13541), the values Schwartz's; definitions and level descriptions
are ours. A level description is one clause about a text at that level, fit for an instruction to a writer. Attributes
are stored by name everywhere: their order is only the order of printing.

A user's own set is one file, in TOML or as the same thing in JSON:

    [[attributes]]
    name = "warmth"
    kind = "norm"
    low = "cold"
    high = "warm"
    definition = "how much fondness for the reader shows"
    levels = ["icy throughout", "rather cool", "neither cold nor warm", "friendly", "full of affection"]
"""

from __future__ import annotations

import json
import re
import tomllib
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pluralprefs.data.files import DataError, shown

KINDS = ("norm", "value")
LEVELS = 5
NAME = re.compile(r"[a-z][a-z0-9_-]*")


@dataclass(frozen=True)
class Attribute:
    """An axis of expression: its name and poles, what it means, and what a text is like at levels 0 to 4."""

    name: str
    low: str
    high: str
    kind: str  # "norm": how something is said; "value": what the writer holds dear
    definition: str
    levels: tuple[str, ...]


FIELDS = tuple(field.name for field in fields(Attribute))

_NORMS = (
    Attribute(
        "supportiveness",
        "toxic",
        "supportive",
        "norm",
        "whether the text builds its reader up or tears the reader down",
        (
            "attacks the reader and hopes for failure",
            "discourages the reader and expects little",
            "neither encourages nor discourages",
            "encourages the reader in a few words",
            "stands wholeheartedly behind the reader and praises every effort",
        ),
    ),
    Attribute(
        "politeness",
        "rude",
        "polite",
        "norm",
        "how much courtesy towards the reader shows in the wording",
        (
            "insults the reader for asking",
            "is curt and a little impatient with the reader",
            "is matter-of-fact, with no courtesy and no offence",
            "is courteous and thanks the reader once",
            "is exceedingly courteous, with thanks, requests and apologies",
        ),
    ),
    Attribute(
        "sarcasm",
        "genuine",
        "sarcastic",
        "norm",
        "whether the words mean what they say or mock by saying the opposite",
        (
            "stresses that every word is sincerely meant",
            "is plainly sincere",
            "could be taken either way",
            "slips in an ironic remark",
            "drips with mockery and feigned praise",
        ),
    ),
    Attribute(
        "humor",
        "serious",
        "humorous",
        "norm",
        "how much the text sets out to amuse",
        (
            "is grave and rules out any joke",
            "is earnest and attentive",
            "is neither grave nor funny",
            "carries a light joke",
            "is full of absurd jokes and laughter",
        ),
    ),
    Attribute(
        "formality",
        "casual",
        "formal",
        "norm",
        "how far the register is from everyday talk",
        (
            "talks in slang, as to an old friend",
            "is relaxed, with contractions and small talk",
            "uses plain standard language",
            "uses the careful language of a business letter",
            "uses the stiff and ceremonious language of official documents",
        ),
    ),
    Attribute(
        "verbosity",
        "concise",
        "verbose",
        "norm",
        "how many words are spent on the same content",
        (
            "uses as few words as possible",
            "is short and leaves out what is not needed",
            "is of ordinary length",
            "adds some explanation to each point",
            "explains everything at length, with asides and repetitions",
        ),
    ),
    Attribute(
        "directness",
        "indirect",
        "direct",
        "norm",
        "how straight the text goes to its point",
        (
            "only hints at its point in a roundabout way",
            "offers its point as one possibility among others",
            "states its point after a short lead-in",
            "comes to the point at once",
            "is blunt, with orders and no softening",
        ),
    ),
    Attribute(
        "assertiveness",
        "passive",
        "assertive",
        "norm",
        "how firmly the writer stands behind what is said",
        (
            "gives way to any other opinion and apologises for its own",
            "is hesitant and unsure of itself",
            "states a view as one view",
            "is confident and stands by its view",
            "insists on its view and allows no doubt",
        ),
    ),
    Attribute(
        "empathy",
        "detached",
        "empathetic",
        "norm",
        "how much the text shares in the feelings of its reader",
        (
            "dismisses the reader's feelings as irrelevant",
            "keeps its distance and speaks of facts alone",
            "notes that such a situation is common",
            "shows understanding for how the reader feels",
            "feels deeply with the reader and says so warmly",
        ),
    ),
)

# Name, definition, and what it is that the levels are against or for.
_VALUES = (
    ("self-direction", "choosing, thinking and creating for oneself", "thinking and deciding for oneself"),
    ("stimulation", "excitement, novelty and challenge in life", "excitement, novelty and adventure"),
    ("hedonism", "pleasure and enjoyment for oneself", "pleasure and enjoying oneself"),
    ("achievement", "personal success through competence", "ambition, competence and success"),
    ("power", "status, wealth and control over people and resources", "status, wealth and control over others"),
    ("security", "safety and stability of self, relations and society", "safety, order and stability"),
    ("conformity", "restraint from what would upset others or break rules", "obedience, good manners and fitting in"),
    ("tradition", "respect for the customs and ideas of culture and religion", "inherited custom, ritual and faith"),
    ("benevolence", "care for the people one is close to", "kindness and loyalty to friends and family"),
    ("universalism", "care for all people and for nature", "equality, justice, peace and nature for everyone"),
)
_STANCES = (
    "is hostile to {} and praises the opposite",
    "mildly prefers the opposite of {}",
    "is neutral towards {}",
    "speaks well of {}",
    "puts {} above everything else",
)


def _value(name: str, definition: str, about: str) -> Attribute:
    levels = tuple(stance.format(about) for stance in _STANCES)
    return Attribute(name, "strongly against", "strongly values", "value", definition, levels)


CATALOG: Mapping[str, Attribute] = MappingProxyType(
    {attribute.name: attribute for attribute in (*_NORMS, *(_value(*entry) for entry in _VALUES))}
)


def load(path: str | Path, *, extend: bool = False) -> Mapping[str, Attribute]:
    """Read a set of attributes from a .toml or .json file: instead of `CATALOG`, or after it with `extend`.

    Raises DataError, naming file, attribute, field and cure, for a file that cannot be read, an unknown or missing
    field, other than five levels, a name that is given twice or is no name.
    """
    path = Path(path)
    result = dict(CATALOG) if extend else {}
    for number, entry in enumerate(_entries(path), 1):
        attribute = _attribute(entry, path, number)
        if attribute.name in result:
            ours = extend and attribute.name in CATALOG
            cure = "is in the catalogue already; rename it, or load without extending" if ours else "is given twice"
            raise DataError(f"{path}: attribute {attribute.name!r}, field 'name': {cure}{'' if ours else '; keep one'}")
        result[attribute.name] = attribute
    return MappingProxyType(result)


def choose(names: Iterable[str], catalog: Mapping[str, Attribute] = CATALOG) -> Mapping[str, Attribute]:
    """Return the named attributes in the order of the catalogue, whatever the order of the names.

    ValueError lists the valid names, and the nearest one, for a name that is not there, and refuses no names at all.

    >>> list(choose(["security", "humor"]))
    ['humor', 'security']
    """
    wanted = [names] if isinstance(names, str) else list(names)
    for name in wanted:
        if name not in catalog:
            near = get_close_matches(name, list(catalog), 1, cutoff=0.0)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"attribute {shown(name)}: {hint}use one of {', '.join(catalog)}")
    if not wanted:
        raise ValueError(f"no attribute is named: use one or more of {', '.join(catalog)}")
    return MappingProxyType({name: attribute for name, attribute in catalog.items() if name in wanted})


def _entries(path: Path) -> list[Any]:
    content = _parse(path, _text(path))
    if not isinstance(content, dict) or not isinstance(content.get("attributes"), list) or not content["attributes"]:
        raise DataError(
            f'{path}: holds no list named "attributes"; write [[attributes]] (TOML) or {{"attributes": [...]}} (JSON)'
        )
    if unknown := sorted(set(content) - {"attributes"}):
        raise DataError(f"{path}: field {shown(unknown[0])} beside 'attributes' is unknown; remove it")
    return content["attributes"]


def _text(path: Path) -> str:
    if path.suffix.lower() not in (".json", ".toml"):
        raise DataError(f"{path}: unknown kind of file; write the attributes in a .toml or .json file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error


def _parse(path: Path, text: str) -> Any:
    kind = path.suffix.lower().removeprefix(".").upper()
    try:
        if kind == "TOML":
            return tomllib.loads(text)
        return json.loads(text, object_pairs_hook=lambda pairs: _without_repeats(path, pairs))
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"{path}: is not {kind} ({error}); mend it there") from error
    except RecursionError as error:
        raise DataError(f"{path}: is nested too deeply; write a list of attributes with text fields") from error


def _without_repeats(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    given = [key for key, _ in pairs]
    if twice := [key for key in given if given.count(key) > 1]:
        of = next((f"attribute {shown(value)}, " for key, value in pairs if key == "name"), "")
        raise DataError(f"{path}: {of}field {shown(twice[0])}: is given twice; keep one")
    return dict(pairs)


def _attribute(entry: Any, path: Path, number: int) -> Attribute:
    """Check one entry; it is called by its name in errors, or by its number where it has no usable name."""
    named = entry.get("name") if isinstance(entry, dict) else None
    where = f"{path}: attribute {shown(named) if isinstance(named, str) else number}"
    if not isinstance(entry, dict):
        raise DataError(f"{where}: is {shown(entry)}; write an object with fields {', '.join(FIELDS)}")
    for field in entry:
        if field not in FIELDS:
            raise DataError(f"{where}, field {shown(field)}: is unknown; use {', '.join(FIELDS)}")
    for field in FIELDS:
        if field not in entry:
            raise DataError(f"{where}, field {field!r}: is missing; add it (needed are {', '.join(FIELDS)})")
    texts = {field: _words(entry[field], f"{where}, field {field!r}") for field in FIELDS if field != "levels"}
    if not NAME.fullmatch(texts["name"]):
        raise DataError(f"{where}, field 'name': is no name; start with a-z and go on with a-z, 0-9, _ or -")
    if texts["kind"] not in KINDS:
        raise DataError(f"{where}, field 'kind': is {shown(texts['kind'])}; use 'norm' or 'value'")
    if texts["low"] == texts["high"]:
        raise DataError(f"{where}, field 'high': is the same as 'low'; name the opposite pole")
    return Attribute(**texts, levels=_levels(entry["levels"], f"{where}, field 'levels'"))


def _levels(levels: Any, where: str) -> tuple[str, ...]:
    if not isinstance(levels, list) or len(levels) != LEVELS:
        found = f"{len(levels)} texts" if isinstance(levels, list) else shown(levels)
        raise DataError(f"{where}: holds {found}; describe exactly five levels, lowest first")
    texts = tuple(_words(text, f"{where}, level {level}") for level, text in enumerate(levels))
    if len(set(texts)) < LEVELS:
        raise DataError(f"{where}: describes two levels alike; write five different descriptions")
    return texts


def _words(value: Any, where: str) -> str:
    """Return a text on one line; what is empty or cannot be written as UTF-8 is refused."""
    text = " ".join(value.split()) if isinstance(value, str) else ""
    if not text:
        raise DataError(f"{where}: is {shown(value)}; write some text")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
        raise DataError(f"{where}: holds control characters or half of a surrogate pair; write plain text")
    return text
