"""Experiments become plain JSON and come back; a stranger's description reaches nothing but what is allowed."""

import json
import math
import subprocess
import sys
from dataclasses import dataclass, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pluralprefs import metrics
from pluralprefs.describe import DescriptionError, describe, override, paths, resolve

HERE = (__name__,)


@dataclass(frozen=True)
class Users:
    levels: tuple[str, ...] = ("user",)
    strength: float = 1.0


@dataclass(frozen=True)
class Part:
    """A small experiment of every kind of part."""

    model: Any = None
    users: Users = Users()
    shots: tuple[int, ...] = (0, 2)
    folder: Path = Path("runs")
    cross_fit: bool = True


@dataclass
class Changeable:
    value: int = 0


class Family:
    @classmethod
    def init(cls, prototypes: int = 4, hidden: tuple[int, ...] = ()) -> tuple[type, int, tuple[int, ...]]:
        return cls, prototypes, hidden

    def method(self) -> None: ...


class Derived(Family):
    pass


def build(size: int, *, scale: float = 1.0) -> tuple[int, float]:
    return size, scale


def _private() -> None: ...


def there_and_back(value: Any, allowed: tuple[str, ...] = HERE) -> Any:
    """Write a value down as JSON text and read it back."""
    return resolve(json.loads(json.dumps(describe(value), allow_nan=False)), allowed)


def same(left: Any, right: Any) -> bool:
    """Tell whether two parts are equal: partials by what they call, types strictly, NaN as itself."""
    if type(left) is not type(right):
        return False
    if isinstance(left, partial):
        return left.func == right.func and same(left.args, right.args) and same(left.keywords, right.keywords)
    if is_dataclass(left) and not isinstance(left, type):
        return same(vars(left), vars(right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right or (isinstance(left, float) and math.isnan(left) and math.isnan(right))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
KEYS = st.sampled_from(["call", "new", "ref", "list", "dict", "path", "float", "args", "size"]) | st.text(max_size=3)
VALUES = st.recursive(
    SCALARS | st.sampled_from([Path("a/b"), Path("/tmp"), build, Family, Family.init, Users(strength=math.inf)]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
        | inner.map(lambda part: partial(build, scale=part))
        | inner.map(lambda part: partial(Derived.init, part, hidden=part))
        | inner.map(lambda part: Part(model=part))
    ),
    max_leaves=6,
)


@given(VALUES)
def test_what_is_described_comes_back_and_is_described_the_same(value):
    back = there_and_back(value)
    assert same(back, value)
    assert describe(back) == describe(value)


def test_a_classmethod_is_named_by_the_class_it_is_called_on():
    described = describe(partial(Derived.init, prototypes=8))
    assert described == {"call": f"{__name__}:Derived.init", "prototypes": 8}
    assert resolve(described, HERE)() == (Derived, 8, ())


def test_a_dataclass_comes_back_with_every_field():
    part = Part(model=partial(build, 3, scale=math.nan), users=Users(("community", "user")), folder=Path("a/b"))
    back = there_and_back(part)
    assert (back.users, back.shots, back.folder, back.cross_fit) == (part.users, (0, 2), Path("a/b"), True)
    assert back.model.func is build
    assert back.model.args == (3,)
    assert math.isnan(back.model.keywords["scale"])


def test_private_homes_are_recorded_under_their_public_name():
    optax = pytest.importorskip("optax")
    assert describe(optax.adamw) == {"ref": "optax:adamw"}
    assert resolve({"ref": "optax:adamw"}) is optax.adamw


def test_numbers_of_numpy_become_plain_numbers():
    described = describe({"rate": np.float64(0.5), "name": np.str_("x")})
    assert [type(part) for part in described.values()] == [float, str]


def _local() -> Any:
    def inner() -> None: ...

    return inner


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (lambda: 0, "cannot be found by that name"),
        (_local(), "cannot be found by that name"),
        (_private, "cannot be found by that name"),
        (Family().method, "cannot be found by that name"),
        (np.zeros(2), "a ndarray cannot be recorded"),
        (np.int64(3), "a int64 cannot be recorded"),
        ({1, 2}, "a set cannot be recorded"),
        ({1: "a"}, "the key 1 cannot be recorded"),
        (Changeable(), "declare it frozen=True"),
        (partial(build, call=1), "an argument called 'call' cannot be recorded"),
    ],
)
def test_what_could_not_be_rebuilt_is_refused_with_its_path(value, why):
    with pytest.raises(DescriptionError, match=why) as error:
        describe(Part(model={"inner": (0, value)}))
    assert str(error.value).startswith("experiment.model.inner.1: ")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("os:system", "outside the allowed modules"),
        ("subprocess:run", "outside the allowed modules"),
        ("pluralprefsx:run", "outside the allowed modules"),
        ("builtins:eval", "outside the allowed modules"),
        ("pluralprefs.describe:sys.exit", "has no sys.exit"),
        ("pluralprefs.describe:importlib", "not a function or class of the allowed modules"),
        ("pluralprefs.describe:importlib.import_module", "has no importlib.import_module"),
        ("pluralprefs.describe:partial", "not a function or class of the allowed modules"),
        ("pluralprefs.describe:ALLOWED", "not a function or class of the allowed modules"),
        ("pluralprefs.describe:_walk", "not a public module:name"),
        ("pluralprefs.describe:describe.__globals__", "not a public module:name"),
        ("pluralprefs.metrics", "not a public module:name"),
        ("../x:y", "not a public module:name"),
        ("pluralprefs.nowhere:f", "No module named"),
        ("pluralprefs.metrics:summarize", "was it renamed"),
        (3, "not a public module:name"),
    ],
)
@pytest.mark.parametrize("tag", ["call", "ref", "new"])
def test_a_strangers_description_reaches_nothing_else(tag, name, why):
    with pytest.raises(DescriptionError, match=why) as error:
        resolve({"model": [{tag: name}]})
    assert str(error.value).startswith("experiment.model.0: ")


REFUSED = """
import sys
from pluralprefs.describe import resolve
try:
    resolve({"ref": "xmlrpc.client:loads"})
except ValueError:
    print("xmlrpc" in sys.modules)
"""


def test_a_refused_module_is_not_even_imported():
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", REFUSED], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_caller_can_allow_more_modules():
    with pytest.raises(DescriptionError, match="outside the allowed modules"):
        resolve({"ref": f"{__name__}:build"})
    assert resolve({"ref": f"{__name__}:build"}, HERE) is build
    assert resolve({"ref": "pluralprefs.metrics:summarise"}) is metrics.summarise


def test_only_dataclasses_are_built_and_nothing_else_is_called():
    with pytest.raises(DescriptionError, match="is not a dataclass"):
        resolve({"new": f"{__name__}:build", "size": 3}, HERE)
    assert isinstance(resolve({"call": f"{__name__}:build", "size": 3}, HERE), partial)


@pytest.mark.parametrize(
    ("description", "why"),
    [
        ({"new": f"{__name__}:Users", "level": 1}, "unexpected keyword argument 'level'"),
        ({"ref": f"{__name__}:build", "size": 1}, "'ref' stands alone"),
        ({"list": 3}, "expected a JSON list"),
        ({"path": 3}, "3 is not a valid 'path'"),
        ({"float": "one"}, "'one' is not a valid 'float'"),
        ({"dict": []}, r"\[\] is not a valid 'dict'"),
    ],
)
def test_a_broken_description_is_refused_with_its_path(description, why):
    with pytest.raises(DescriptionError, match=why) as error:
        resolve({"users": description}, HERE)
    assert str(error.value).startswith("experiment.users: ")


EXAMPLE = Part(model=partial(Family.init, prototypes=4))


@pytest.mark.parametrize(
    ("assignment", "read", "expected"),
    [
        ("model.prototypes=8", lambda part: part.model()[1], 8),
        ("model.hidden=[64, 32]", lambda part: part.model()[2], (64, 32)),
        ("shots=[0,4,8]", lambda part: part.shots, (0, 4, 8)),
        ("users.strength=2.5", lambda part: part.users.strength, 2.5),
        ("folder=elsewhere/runs", lambda part: part.folder, Path("elsewhere/runs")),
        ("cross_fit=false", lambda part: part.cross_fit, False),
        (f'model={{"ref": "{__name__}:build"}}', lambda part: part.model, build),
    ],
)
def test_one_argument_is_replaced_and_the_rest_is_left(assignment, read, expected):
    before = describe(EXAMPLE)
    changed = override(EXAMPLE, assignment, HERE)
    assert read(changed) == expected
    assert describe(EXAMPLE) == before
    name = assignment.partition("=")[0].partition(".")[0]
    assert [key for key, part in describe(changed).items() if part != before[key]] == [name]


def test_a_bare_function_becomes_a_partial_when_an_argument_is_set():
    changed = override({"model": build}, "model.scale=2")["model"]
    assert (changed.func, changed.keywords) == (build, {"scale": 2})


@pytest.mark.parametrize(
    ("assignment", "nearest"),
    [
        ("model.prototype=8", "model.prototypes"),
        ("users.strenght=1", "users.strength"),
        ("prototypes=8", "model.prototypes"),
        ("shot=[1]", "shots"),
    ],
)
def test_an_unknown_path_lists_the_valid_ones_and_the_nearest(assignment, nearest):
    with pytest.raises(DescriptionError) as error:
        override(EXAMPLE, assignment)
    message = str(error.value)
    path = assignment.partition("=")[0]
    parent = path.rpartition(".")[0]
    assert message.startswith(f"unknown path {path}; did you mean {nearest}? Valid: ")
    siblings = {known for known in paths(EXAMPLE) if known.rpartition(".")[0] == parent}
    assert set(message.partition("Valid: ")[2].split(", ")) == siblings
    assert "\n" not in message


def test_a_path_that_resembles_nothing_lists_the_valid_ones_alone():
    with pytest.raises(DescriptionError, match=r"^unknown path zzz\. Valid: model, users, shots, folder, cross_fit$"):
        override(EXAMPLE, "zzz=1")
    with pytest.raises(DescriptionError, match=r"none below shots"):
        override(EXAMPLE, "shots.first=1")


def test_every_listed_path_can_be_set():
    for path in paths(EXAMPLE):
        assert describe(override(EXAMPLE, f"{path}=null")) != describe(EXAMPLE), path


@pytest.mark.parametrize(
    ("assignment", "why"),
    [
        ("model.prototypes", "write PATH=VALUE"),
        ("=3", "write PATH=VALUE"),
        ("users.strength=high", "^users.strength: expected a number"),
        ("model.prototypes=2.5", "^model.prototypes: expected a whole number"),
        ("cross_fit=yes", "^cross_fit: expected true or false"),
        ("users=3", "^users is a part, not a value; set one of users.levels, users.strength$"),
        ('model={"ref": "os:system"}', "^model: os:system lies outside"),
    ],
)
def test_a_wrong_value_is_refused_with_its_path(assignment, why):
    with pytest.raises(DescriptionError, match=why):
        override(EXAMPLE, assignment)


def test_a_list_is_not_replaced_by_text_that_is_not_json():
    with pytest.raises(DescriptionError, match="JSON list"):
        override({"shots": (0, 2)}, "shots=(0,4)")
