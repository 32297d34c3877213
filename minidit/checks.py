"""Arguments at the door: each check returns the value or raises ValueError with one sentence that
names the argument, the value and what is allowed.

numpy's numbers are numbers; booleans and tensors are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

MOST_STEPS = 10_000
MOST_PIXELS = 8192 * 8192  # of one picture
MOST_PICTURES = 10_000  # of one prompt


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """The value as an int within low..high."""
    limits = f"of at least {low}" if high is None else f"within {low}..{high}"
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError(f"{name} is {short(value)}, must be an integer {limits}")
    if value < low or (high is not None and value > high):
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
    if not isinstance(listed, list | tuple) or not all(isinstance(t, str) for t in listed):
        raise ValueError(f"{name} is {short(value)}, must be a string or a list of strings")
    if not listed:
        raise ValueError(f"{name} is an empty list, must have at least one string")
    if count is not None and len(listed) != count:
        raise ValueError(f"{name} has {len(listed)} strings, must have one or {count}")
    return list(listed)


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
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {short(value)} is not available here: {reason(error)}") from None
    return device


def short(value: Any, length: int = 80) -> str:
    """repr of a value for a sentence: one line of at most `length` characters."""
    if isinstance(value, str | bytes):
        value = value[: length + 1]  # a long text need not be escaped to its end
    try:
        text = repr(value)
    except Exception:  # an int of more digits than Python prints, or somebody's own class
        text = f"a {type(value).__name__} that can't be printed"
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 3]}..."


def reason(error: BaseException, length: int = 200) -> str:
    """What an exception of a library says, for a sentence: its first line, printable and cut."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return "".join(c if c.isprintable() else " " for c in text[:length])
