"""The catalogue of attributes: ours is whole, a user's own set is read or refused with a cure, names choose."""

import json
from dataclasses import asdict

import pytest

from pluralprefs.attributes.catalog import CATALOG, Attribute, choose, load
from pluralprefs.data.files import DataError

POLES = {  # METHODS, section 4
    "supportiveness": ("toxic", "supportive"),
    "politeness": ("rude", "polite"),
    "sarcasm": ("genuine", "sarcastic"),
    "humor": ("serious", "humorous"),
    "formality": ("casual", "formal"),
    "verbosity": ("concise", "verbose"),
    "directness": ("indirect", "direct"),
    "assertiveness": ("passive", "assertive"),
    "empathy": ("detached", "empathetic"),
}
VALUES = [
    *("self-direction", "stimulation", "hedonism", "achievement", "power"),
    *("security", "conformity", "tradition", "benevolence", "universalism"),
]
WARMTH = {
    "name": "warmth",
    "kind": "norm",
    "low": "cold",
    "high": "warm",
    "definition": "how much fondness for the reader shows",
    "levels": ["icy throughout", "rather cool", "neither cold nor warm", "friendly", "full of affection"],
}
TOML = """
[[attributes]]
name = "warmth"
kind = "norm"
low = "cold"
high = "warm"
definition = '''how much fondness
  for the reader shows'''
levels = ["icy throughout", "rather cool", "neither cold nor warm", "friendly", "full of affection"]
"""


@pytest.fixture
def written(tmp_path):
    def write(*entries):
        path = tmp_path / "own.json"
        path.write_text(json.dumps({"attributes": entries}), encoding="utf-8")
        return path

    return write


def test_the_nineteen_attributes_have_the_poles_of_the_paper():
    assert list(CATALOG) == [*POLES, *VALUES]
    for name, attribute in CATALOG.items():
        assert attribute.name == name
        assert (attribute.low, attribute.high) == POLES.get(name, ("strongly against", "strongly values"))
        assert attribute.kind == ("norm" if name in POLES else "value")


def test_every_level_of_every_attribute_is_described_differently():
    texts = [text for attribute in CATALOG.values() for text in (attribute.definition, *attribute.levels)]
    assert len(texts) == len(set(texts)) == 19 * 6
    assert all(text == text.strip() and not text.endswith(".") for text in texts)


def test_the_catalogue_cannot_be_changed_by_accident():
    with pytest.raises(TypeError):
        CATALOG["humor"] = CATALOG["power"]  # pyright: ignore[reportIndexIssue]
    with pytest.raises(AttributeError):
        CATALOG["humor"].low = "dull"  # pyright: ignore[reportAttributeAccessIssue]


def test_toml_and_json_give_the_same_set(tmp_path, written):
    (tmp_path / "own.toml").write_text(TOML, encoding="utf-8-sig")
    own = load(tmp_path / "own.toml")
    assert own == load(str(written(WARMTH)))
    assert own == {"warmth": Attribute(**{**WARMTH, "levels": tuple(WARMTH["levels"])})}


def test_an_own_set_stands_instead_of_ours_or_after_it(written):
    assert list(load(written(WARMTH))) == ["warmth"]
    assert list(load(written(WARMTH), extend=True)) == [*CATALOG, "warmth"]
    assert list(load(written({**WARMTH, "name": "humor"}))) == ["humor"]


def test_our_own_catalogue_survives_a_file(written):
    assert load(written(*(asdict(attribute) for attribute in CATALOG.values()))) == CATALOG


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "red"}, r"attribute 'warmth', field 'colour': is unknown; use name, low"),
        ({"levels": WARMTH["levels"][:4]}, r"attribute 'warmth', field 'levels': holds 4 texts; describe exactly five"),
        ({"levels": "five"}, r"field 'levels': holds 'five'; describe exactly five"),
        ({"levels": [*WARMTH["levels"][:4], 7]}, r"field 'levels', level 4: is 7; write some text"),
        ({"levels": ["same"] * 5}, r"field 'levels': describes two levels alike"),
        ({"name": "Warmth"}, r"attribute 'Warmth', field 'name': is no name; start with a-z"),
        ({"name": "../warmth"}, r"field 'name': is no name"),
        ({"name": "warmth\n"}, None),
        ({"name": 3}, r"attribute 1, field 'name': is 3; write some text"),
        ({"kind": "taste"}, r"attribute 'warmth', field 'kind': is 'taste'; use 'norm' or 'value'"),
        ({"high": "cold"}, r"field 'high': is the same as 'low'"),
        ({"definition": " "}, r"attribute 'warmth', field 'definition': is ' '; write some text"),
        ({"definition": "a\x1b[31m"}, r"field 'definition': holds control characters"),
        ({"low": "\ud800"}, r"field 'low': holds control characters or half of a surrogate"),
    ],
)
def test_a_faulty_field_is_named_with_its_cure(written, change, message):
    path = written({**WARMTH, **change})
    if message is None:
        assert list(load(path)) == ["warmth"]
        return
    with pytest.raises(DataError, match=message) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: attribute ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", WARMTH)
def test_every_field_is_needed(written, field):
    with pytest.raises(DataError, match=rf"own.json: attribute .*, field '{field}': is missing; add it"):
        load(written({key: value for key, value in WARMTH.items() if key != field}))


def test_no_attribute_is_given_twice(written):
    with pytest.raises(DataError, match=r"attribute 'warmth', field 'name': is given twice; keep one"):
        load(written(WARMTH, WARMTH))
    with pytest.raises(DataError, match=r"attribute 'humor', field 'name': is in the catalogue already; rename it"):
        load(written({**WARMTH, "name": "humor"}), extend=True)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("own.json", '{"attributes": [', "is not JSON .*line 1"),
        ("own.toml", "[[attributes]]\nname = x", "is not TOML .*line 2"),
        ("own.toml", "[[attributes]]\nname = 'a'\nname = 'b'", "is not TOML"),
        (
            "own.json",
            '{"attributes": [{"name": "a", "low": "x", "low": "y"}]}',
            "attribute 'a', field 'low': is given twice",
        ),
        ("own.json", '{"attributes": [4]}', "attribute 1: is 4; write an object"),
        ("own.json", '{"attributes": []}', 'holds no list named "attributes"'),
        ("own.json", "[]", 'holds no list named "attributes"'),
        ("own.json", '{"attributes": [4], "more": 1}', "field 'more' beside"),
        ("own.json", "[" * 100_000, "is nested too deeply"),
        ("own.yaml", "attributes:", "unknown kind of file; write .* .toml or .json"),
    ],
)
def test_a_file_that_is_no_set_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load(tmp_path / name)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none.toml: cannot be read \(No such file"):
        load(tmp_path / "none.toml")
    (tmp_path / "latin.json").write_bytes(b"\xff")
    with pytest.raises(DataError, match="byte 0 is not UTF-8"):
        load(tmp_path / "latin.json")


def test_names_choose_in_catalogue_order_and_the_nearest_name_is_offered():
    assert list(choose(["security", "humor", "politeness", "humor"])) == ["politeness", "humor", "security"]
    assert choose("empathy")["empathy"] is CATALOG["empathy"]
    with pytest.raises(ValueError, match=r"'humour': did you mean 'humor'\? use one of supportiveness, .*universalism"):
        choose(["security", "humour"])
    with pytest.raises(ValueError, match="no attribute is named"):
        choose([])
