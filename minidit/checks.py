"""Arguments at the door: each check returns the value or raises ValueError with one sentence that
names the argument, the value and what is allowed.

numpy's numbers are numbers; booleans and tensors are not.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from os import PathLike
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from ras.values import require, short

MOST_PIXELS = 8192 * 8192  # of one picture
MOST_CHARACTERS = 20_000  # of one text; every window is shorter by far
MOST_PICTURES = 10_000  # of one prompt


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """The value as an int within low..high."""
    limits = f"of at least {low}" if high is None else f"within {low}..{high}"
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        raise ValueError(f"{name} is {short(value)}, must be an integer {limits}")
    return int(value)


def number(name: str, value: Any, low: float, high: float = math.inf, also: str = "") -> float:
    """The value as a finite float within low..high; `also` is added to the sentence."""
    limits = f"of at least {low:g}" if high == math.inf else f"within {low:g}..{high:g}"
    sentence = f"{name} is {short(value)}, must be a finite number {limits}{also}"
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(sentence)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or not low <= number <= high:
        raise ValueError(sentence)
    return number


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} is {short(value)}, must be True or False")
    return bool(value)


def choice(name: str, value: Any, allowed: Iterable[str]) -> str:
    """One of the allowed strings."""
    allowed = list(allowed)
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} is {short(value)}, must be {' or '.join(map(repr, allowed))}")
    return value


def function(name: str, value: Any) -> None:
    """A function, or None."""
    if value is not None and not callable(value):
        raise ValueError(f"{name} is {short(value)}, must be a function or None")


def texts(name: str, value: Any, count: int | None = None) -> list[str]:
    """One string or a list of them as a list; of `count`, where a single string serves for all."""
    listed = [value] * (count or 1) if isinstance(value, str) else value
    if not isinstance(listed, list | tuple):
        raise ValueError(f"{name} is {short(value)}, must be a string or a list of strings")
    if not listed:
        raise ValueError(f"{name} is an empty list, must have at least one string")
    if count is not None and len(listed) != count:
        raise ValueError(f"{name} has {len(listed)} strings, must have one or {count}")
    return [text(name, each) for each in listed]


def text(name: str, value: Any) -> str:
    """A string, and no book: a long word takes a tokenizer time by the square of its length."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {short(value)}, must be a string")
    if len(value) > MOST_CHARACTERS:
        raise ValueError(
            f"{name} has {len(value):,} characters, at most {MOST_CHARACTERS:,} are possible"
        )
    return value


def tensor(name: str, value: Any, *shape: int | str, like: Tensor | None = None) -> Tensor:
    """A tensor of this shape, on the device of `like`; a word in place of a size stands for any."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        raise ValueError(f"{name} is {short(value)}, must be a dense tensor")
    sizes = zip(value.shape, shape, strict=False)
    if value.ndim != len(shape) or any(have != want for have, want in sizes if want != str(want)):
        wanted = f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"
        raise ValueError(f"{name} has shape {tuple(value.shape)}, must be {wanted}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, must be on {like.device}")
    return value


def floating(name: str, value: Any, *shape: int | str, like: Tensor | None = None) -> Tensor:
    """The same of real floating-point numbers."""
    if not tensor(name, value, *shape, like=like).is_floating_point():
        raise ValueError(f"{name} is {value.dtype}, must be floating point")
    return value


def instance(name: str, value: Any, *kinds: type | None) -> Any:
    """An object of one of these classes, or None where that is one of them."""
    if not any(value is None if kind is None else isinstance(value, kind) for kind in kinds):
        wanted = " or ".join("None" if kind is None else kind.__name__ for kind in kinds)
        raise ValueError(f"{name} is {short(value)}, must be a {wanted}")
    return value


def ids(name: str, value: Any) -> None:
    """A dict of ids by their texts."""
    if not isinstance(value, dict) or not all(
        type(text) is str and type(id) is int for text, id in value.items()
    ):
        raise ValueError(f"{name} is {short(value)}, must be a dict of integers by strings")


def config(config: Any) -> None:
    """Refuse a config dataclass with a field that its annotation does not allow, or a size below 1.

    Fields become what they are annotated as: a list a tuple, numpy's numbers and integers in place
    of floats plain numbers.
    """
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if isinstance(value, np.generic):
            value = value.item()
        fits, words = _judge(value, hint)
        if not fits:
            raise ValueError(f"{field.name} is {short(value)}, must be {words}")
        if type(value) is int and float in (hint, *get_args(hint)):
            value = float(value)  # torch takes no integer of more than 64 bits for a number
        if type(value) is int and value < 1:
            raise ValueError(f"{field.name} is {value}, must be at least 1")
        object.__setattr__(config, field.name, tuple(value) if type(value) is list else value)


def multiple(config: Any, name: str, of: str) -> None:
    """Raise ValueError unless one field of a config is a multiple of another."""
    unit = getattr(config, of)
    require(config, name, getattr(config, name) % unit == 0, f"a multiple of {of} = {unit}")


def _judge(value: Any, hint: Any) -> tuple[bool, str]:
    """Whether a value can be what an annotation asks for, and what that is in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        judged = [_judge(value, option) for option in inner]
        return any(fits for fits, _ in judged), " or ".join(words for _, words in judged)
    if origin is tuple:
        fits = type(value) in (tuple, list) and all(_judge(each, inner[0])[0] for each in value)
        return fits, f"a list, each {_judge(None, inner[0])[1]}"
    if origin is not None:  # Mapping[str, Any]
        return isinstance(value, Mapping), "an object"
    if hint is int:
        return type(value) is int and abs(value) < 2**31, "an integer below 2**31"
    if hint is float:  # not infinite, not NaN
        return type(value) in (int, float) and abs(value) < 1e30, "a finite number"
    words = {bool: "true or false", str: "a string", type(None): "null"}
    return type(value) is hint, words[hint]


def path(name: str, value: Any) -> None:
    """The name of a file or folder."""
    parts = str(value).split("/") if isinstance(value, str | PathLike) and str(value) else ["\0"]
    if any("\0" in part or len(part) > 255 for part in parts) or len(parts) > 2000:
        raise ValueError(f"{name} is {short(value)}, must be a path")


def names(what: str, given: Iterable[str], allowed: Sequence[str]) -> None:
    """Refuse names that are not allowed."""
    unknown = [name for name in given if name not in allowed]
    if unknown:
        known = ", ".join(allowed) or "none"
        raise ValueError(f"{what} takes no {', '.join(unknown)}; allowed are {known}")


def device(value: Any) -> torch.device:
    """A device that is there."""
    try:
        device = torch.device(value)
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, ValueError, AssertionError, OverflowError) as error:
        raise ValueError(f"device {short(value)} is not available here: {reason(error)}") from None
    return device


def reason(error: BaseException, length: int = 200) -> str:
    """What an exception of a library says, for a sentence: its first line, printable and cut."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return "".join(c if c.isprintable() else " " for c in text[:length])
