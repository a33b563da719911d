"""Experiments are Python, and this file writes them down as plain JSON and reads them back.

A part of an experiment is a `functools.partial`, a function, a class or a frozen dataclass. `describe` names each of
them by where it lives, `module:qualname`, together with its arguments, so that a run folder says completely what was
run; `resolve` is the inverse, and `override` changes one argument (`--set model.prototypes=8`).

    partial(IdealPoint.init, prototypes=4)   {"call": "pluralprefs.models.ideal_point:IdealPoint.init", "prototypes": 4}
    pooled_mean                              {"ref": "pluralprefs.likelihoods:pooled_mean"}
    Logistic(temperature=2.0)                {"new": "pluralprefs.likelihoods:Logistic", "temperature": 2.0}
    (0, 2, 4)                                [0, 2, 4]          a tuple is a JSON list, a list is {"list": [...]}
    Path("a/b")                              {"path": "a/b"}
    float("inf")                             {"float": "inf"}   JSON has no infinities

A description may come from a stranger. `resolve` therefore imports only modules that the caller allows, walks only
through public names of classes, and returns only objects whose own home is an allowed module: a name that an allowed
module merely imported (`pluralprefs.cli:os.system`) is refused.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ALLOWED = ("pluralprefs", "optax")
_TAGS = frozenset({"call", "ref", "new", "list", "dict", "path", "float"})
_MISSING = object()


class DescriptionError(ValueError):
    """A value that cannot be described, a description that cannot be resolved, or an unknown `--set` path."""


def describe(value: Any, path: str = "experiment") -> Any:
    """Return the JSON form of `value`; `path` is where it stands, for error messages.

    Raises DescriptionError for anything that could not be rebuilt from its description: lambdas and local functions,
    private names, methods of instances, arrays, mutable dataclasses.

    >>> describe({"optimizer": partial(json.dumps, indent=2), "shots": (0, 2)})
    {'optimizer': {'call': 'json:dumps', 'indent': 2}, 'shots': [0, 2]}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(float(value))}
    if value is None or isinstance(value, bool | int | float | str):
        return _plain_scalar(value, path)
    if isinstance(value, Path):
        return {"path": value.as_posix()}
    if type(value) is tuple:
        return [describe(part, f"{path}.{i}") for i, part in enumerate(value)]
    if type(value) is list:
        return {"list": [describe(part, f"{path}.{i}") for i, part in enumerate(value)]}
    if type(value) is dict:
        return _describe_dict(value, path)
    if type(value) is partial:
        return _describe_partial(value, path)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _describe_dataclass(value, path)
    return {"ref": _name_of(value, path)}


def resolve(description: Any, allowed: Sequence[str] = (), path: str = "experiment") -> Any:
    """Rebuild the value that `describe` wrote down.

    `allowed` adds module prefixes to `ALLOWED`; nothing outside them is imported or returned.

    >>> resolve([0, 2, {"path": "runs"}])
    (0, 2, PosixPath('runs'))
    """
    if isinstance(description, list):
        return _resolve_all(description, allowed, path)
    if not isinstance(description, dict):
        return description
    tags = _TAGS & description.keys()
    if not tags:
        return {key: resolve(part, allowed, f"{path}.{key}") for key, part in description.items()}
    tag = next((name for name in ("call", "new") if name in tags), min(tags))
    body = description[tag]
    if tag in ("call", "new"):
        return _resolve_call(tag, description, allowed, path)
    if len(description) != 1:
        raise DescriptionError(f"{path}: {tag!r} stands alone in a description, found {sorted(description)}")
    return _resolve_tagged(tag, body, allowed, path)


def override(value: Any, assignment: str, allowed: Sequence[str] = ()) -> Any:
    """Return a copy of `value` with one argument replaced: `override(experiment, "model.prototypes=8")`.

    The path runs through dataclass fields, dictionary keys and arguments of partials (and of bare functions, which
    become partials). What follows `=` is JSON, with lists read as tuples and parts written as `describe` writes them;
    text that is not JSON is taken as a string. Raises DescriptionError for an unknown path, naming the nearest.

    >>> override({"shots": (0, 2)}, "shots=[0,4,8]")
    {'shots': (0, 4, 8)}
    """
    dotted, equals, text = assignment.partition("=")
    if not equals or not dotted.strip():
        raise DescriptionError(f"{assignment!r}: write PATH=VALUE, for example model.prototypes=8")
    try:
        new = resolve(json.loads(text), allowed, dotted)
    except json.JSONDecodeError:
        new = text
    return _replace(value, tuple(dotted.strip().split(".")), new, dotted.strip(), value)


def paths(value: Any, prefix: str = "") -> Iterator[str]:
    """Yield every path that `override` accepts for `value`, outer before inner.

    >>> list(paths({"shots": (0, 2), "users": {"levels": 2}}))
    ['shots', 'users', 'users.levels']
    """
    for name, part in _children(value).items():
        yield prefix + name
        yield from paths(part, f"{prefix}{name}.")


# Describing


def _plain_scalar(value: Any, path: str) -> Any:
    if type(value) in (type(None), bool, int, float, str):
        return value
    for plain in (bool, int, float, str):  # numpy.float64 is a float, numpy.str_ a string; an IntEnum is neither
        if isinstance(value, plain) and type(value).__module__ == "numpy":
            return plain(value)
    raise DescriptionError(f"{path}: a {type(value).__name__} cannot be recorded; use a plain number or string")


def _describe_dict(value: dict[Any, Any], path: str) -> dict[str, Any]:
    for key in value:
        if type(key) is not str:
            raise DescriptionError(f"{path}: the key {key!r} cannot be recorded; use strings as keys")
    described = {key: describe(part, f"{path}.{key}") for key, part in value.items()}
    return {"dict": described} if _TAGS & described.keys() else described


def _describe_partial(value: partial[Any], path: str) -> dict[str, Any]:
    _refuse_reserved(value.keywords, {"call", "new", "args"}, path)
    described: dict[str, Any] = {"call": _name_of(value.func, path)}
    if value.args:
        described["args"] = [describe(part, f"{path}.{i}") for i, part in enumerate(value.args)]
    return described | {key: describe(part, f"{path}.{key}") for key, part in value.keywords.items()}


def _describe_dataclass(value: Any, path: str) -> dict[str, Any]:
    cls = type(value)
    if not cls.__dataclass_params__.frozen:
        raise DescriptionError(f"{path}: {cls.__name__} can change after it is recorded; declare it frozen=True")
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
    _refuse_reserved(fields, {"call", "new", "args"}, path)
    return {"new": _name_of(cls, path)} | {key: describe(part, f"{path}.{key}") for key, part in fields.items()}


def _refuse_reserved(names: dict[str, Any], reserved: set[str], path: str) -> None:
    if clash := reserved & names.keys():
        raise DescriptionError(f"{path}: an argument called {min(clash)!r} cannot be recorded; rename it")


def _name_of(value: Any, path: str) -> str:
    """Return the public `module:qualname` under which importing finds exactly this object."""
    owner = getattr(value, "__self__", None)
    if isinstance(owner, type):  # a classmethod, named by the class it is called on, not the one that defines it
        return f"{_name_of(owner, path)}.{value.__name__}"
    module, qualname = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(qualname, str):
        raise DescriptionError(
            f"{path}: a {type(value).__name__} cannot be recorded; use a partial or frozen dataclass"
        )
    packages = module.split(".")
    homes = [".".join(packages[: i + 1]) for i in range(len(packages))] if "._" in module else [module]
    for home in homes:  # optax._src.alias:adamw is recorded under its public name optax:adamw
        if not _is_private(home, qualname) and _walk(sys.modules.get(home), qualname) is value:
            return f"{home}:{qualname}"
    raise DescriptionError(
        f"{path}: {module}:{qualname} cannot be found by that name; define it publicly at the top of a module"
    )


def _is_private(module: str, qualname: str) -> bool:
    return any(not name.isidentifier() or name.startswith("_") for name in f"{module}.{qualname}".split("."))


def _walk(root: Any, qualname: str) -> Any:
    """Follow a dotted name from a module through classes only; `_MISSING` where it leads elsewhere."""
    first, *rest = qualname.split(".")
    found = getattr(root, first, _MISSING)
    for name in rest:
        found = getattr(found, name, _MISSING) if isinstance(found, type) else _MISSING
    return found


# Resolving


def _resolve_all(parts: Any, allowed: Sequence[str], path: str) -> tuple[Any, ...]:
    if not isinstance(parts, list):
        raise DescriptionError(f"{path}: expected a JSON list, found {parts!r}")
    return tuple(resolve(part, allowed, f"{path}.{i}") for i, part in enumerate(parts))


def _resolve_call(tag: str, description: dict[str, Any], allowed: Sequence[str], path: str) -> Any:
    function = _find(description[tag], allowed, path)
    args = _resolve_all(description.get("args", []), allowed, f"{path}.args")
    rest = {key: part for key, part in description.items() if key not in (tag, "args")}
    keywords = {key: resolve(part, allowed, f"{path}.{key}") for key, part in rest.items()}
    if tag == "call":
        return partial(function, *args, **keywords)
    if not (isinstance(function, type) and dataclasses.is_dataclass(function)):
        raise DescriptionError(f"{path}: {description[tag]} is not a dataclass")
    try:
        return function(*args, **keywords)
    except TypeError as error:
        raise DescriptionError(f"{path}: {error}") from error


def _resolve_tagged(tag: str, body: Any, allowed: Sequence[str], path: str) -> Any:
    if tag == "ref":
        return _find(body, allowed, path)
    if tag == "list":
        return list(_resolve_all(body, allowed, path))
    if tag == "dict" and isinstance(body, dict):
        return {key: resolve(part, allowed, f"{path}.{key}") for key, part in body.items()}
    if tag == "path" and isinstance(body, str):
        return Path(body)
    if tag == "float" and body in ("inf", "-inf", "nan"):
        return float(body)
    raise DescriptionError(f"{path}: {body!r} is not a valid {tag!r}")


def _find(name: Any, allowed: Sequence[str], path: str) -> Callable[..., Any]:
    prefixes = (*ALLOWED, *allowed)
    module, colon, qualname = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not colon or _is_private(module, qualname):
        raise DescriptionError(f"{path}: {name!r} is not a public module:name")
    if not _within(module, prefixes):
        raise DescriptionError(f"{path}: {name} lies outside the allowed modules ({', '.join(prefixes)})")
    try:
        found = _walk(importlib.import_module(module), qualname)
    except ModuleNotFoundError as error:
        raise DescriptionError(f"{path}: {name}: {error}") from error
    if found is _MISSING:
        raise DescriptionError(f"{path}: {module} has no {qualname}; was it renamed since the description was written?")
    if not callable(found) or not _within(getattr(found, "__module__", None) or "", prefixes):
        raise DescriptionError(f"{path}: {name} is not a function or class of the allowed modules")
    return found


def _within(module: str, prefixes: Sequence[str]) -> bool:
    return any(module == p.rstrip(".") or module.startswith(p.rstrip(".") + ".") for p in prefixes)


# Overriding


def _children(value: Any) -> dict[str, Any]:
    """Return what a path can go on with, by name; an argument that is not set holds `_MISSING`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
    if isinstance(value, dict):
        return {key: part for key, part in value.items() if isinstance(key, str)}
    if not callable(value):
        return {}
    keywords = dict(value.keywords) if isinstance(value, partial) else {}
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):  # some builtins, and partials that no longer fit their function
        return keywords
    named = (p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    return keywords | {name: keywords.get(name, _MISSING) for name in named}


def _replace(value: Any, names: tuple[str, ...], new: Any, path: str, root: Any) -> Any:
    if not names:
        return _fit(value, new, path)
    children = _children(value)
    if names[0] not in children:
        raise DescriptionError(_unknown(path, names, children, root))
    part = _replace(children[names[0]], names[1:], new, path, root)
    if isinstance(value, dict):
        return value | {names[0]: part}
    if (callable(value) and not dataclasses.is_dataclass(value)) or isinstance(value, type):
        return partial(value, **{names[0]: part})
    return dataclasses.replace(value, **{names[0]: part})


def _fit(old: Any, new: Any, path: str) -> Any:
    """Check a new value against the one it replaces, where a mistake would otherwise surface much later."""
    if isinstance(old, bool | int | float) and isinstance(new, str):
        hint = "true or false" if isinstance(old, bool) else "a number"
        raise DescriptionError(f"{path}: expected {hint} (now {json.dumps(old)}), found {new!r}")
    if type(old) is int and isinstance(new, float) and new != int(new):
        raise DescriptionError(f"{path}: expected a whole number (now {old}), found {new!r}")
    if isinstance(old, tuple | list) and isinstance(new, str):
        raise DescriptionError(f"{path}: expected a JSON list such as {json.dumps(list(old))}, found {new!r}")
    if old is not _MISSING and (inner := list(_children(old))) and isinstance(new, bool | int | float | str):
        raise DescriptionError(f"{path} is a part, not a value; set one of {', '.join(f'{path}.{n}' for n in inner)}")
    if type(old) is int and isinstance(new, float):
        new = int(new)
    return Path(new) if isinstance(old, Path) and isinstance(new, str) else new


def _unknown(path: str, names: tuple[str, ...], children: dict[str, Any], root: Any) -> str:
    everything = list(paths(root))
    nearest = difflib.get_close_matches(path, everything, n=1, cutoff=0.5)
    nearest = nearest or [known for known in everything if known.split(".")[-1] == names[-1]][:1]
    parent = path.removesuffix(".".join(names))
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    valid = ", ".join(parent + name for name in children) or f"none below {parent.rstrip('.')}"
    return f"unknown path {path}{hint} Valid: {valid}" if hint else f"unknown path {path}. Valid: {valid}"
