"""A config dataclass from a JSON file, type by type."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from weights.files import read_json, short

C = TypeVar("C")


def config_from_json(cls: type[C], path: str | Path) -> C:
    """A config dataclass from a JSON file; keys without a field are ignored.

    Raises FileNotFoundError, or ValueError with the key and its value where a type does not fit.
    """
    return config_from(cls, read_json(Path(path)), path)


def config_from(cls: type[C], values: Mapping[str, Any], path: str | Path) -> C:
    """The same from values that were read from path."""
    hints = get_type_hints(cls)
    found = {}
    for field in fields(cls):  # type: ignore[arg-type]
        if field.name in values:
            value, hint = values[field.name], hints[field.name]
            if not _fits(value, hint):
                raise ValueError(f"{path}: {field.name} is {short(value)}, must be {_say(hint)}")
            found[field.name] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value can be what an annotation asks for."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if origin is tuple:
        return isinstance(value, list) and all(_fits(v, get_args(hint)[0]) for v in value)
    if origin is not None:  # Mapping[str, Any]
        return isinstance(value, dict)
    if hint is type(None):
        return value is None
    if hint is int:
        return type(value) is int and abs(value) < 2**31
    if hint is float:
        return type(value) in (int, float) and abs(value) < 1e30  # not infinite, not NaN
    return type(value) is hint


def _say(hint: Any) -> str:
    """An annotation in words."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_say(option) for option in get_args(hint))
    if origin is tuple:
        return f"a list, each {_say(get_args(hint)[0])}"
    if origin is not None:
        return "an object"
    words = {int: "an integer below 2**31", float: "a finite number", bool: "true or false"}
    return words.get(hint) or {str: "a string", type(None): "null"}[hint]
