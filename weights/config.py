"""A config dataclass from a JSON file, type by type."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from minidit.checks import short

C = TypeVar("C")


def config_from(cls: type[C], values: Mapping[str, Any], path: Path) -> C:
    """A config dataclass from what a JSON file holds; keys without a field are ignored.

    Raises ValueError with the file, the key and its value where a type does not fit.
    """
    hints = get_type_hints(cls)
    found = {}
    for field in fields(cls):  # type: ignore[arg-type]
        if field.name in values:
            value, hint = values[field.name], hints[field.name]
            fits, words = _judge(value, hint)
            if not fits:
                raise ValueError(f"{path}: {field.name} is {short(value)}, must be {words}")
            if type(value) is int and float in (hint, *get_args(hint)):
                value = float(value)  # torch takes no integer of more than 64 bits for a number
            found[field.name] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _judge(value: Any, hint: Any) -> tuple[bool, str]:
    """Whether a JSON value can be what an annotation asks for, and what that is in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        judged = [_judge(value, option) for option in inner]
        return any(fits for fits, _ in judged), " or ".join(words for _, words in judged)
    if origin is tuple:
        fits = isinstance(value, list) and all(_judge(each, inner[0])[0] for each in value)
        return fits, f"a list, each {_judge(None, inner[0])[1]}"
    if origin is not None:  # Mapping[str, Any]
        return isinstance(value, dict), "an object"
    if hint is int:
        return type(value) is int and abs(value) < 2**31, "an integer below 2**31"
    if hint is float:  # not infinite, not NaN
        return type(value) in (int, float) and abs(value) < 1e30, "a finite number"
    words = {bool: "true or false", str: "a string", type(None): "null"}
    return type(value) is hint, words[hint]
