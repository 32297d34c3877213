"""What an argument is, and how a sentence shows it.

numpy's numbers are numbers; booleans are not.
"""

from __future__ import annotations

import math
from numbers import Integral, Real


def is_count(value: object) -> bool:
    """Whether it is an integer, and none that nothing here could count to."""
    return isinstance(value, Integral) and not isinstance(value, bool) and abs(value) < 2**31


def is_number(value: object) -> bool:
    """Whether it is a real number within the range of floats."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def require(config: object, name: str, ok: bool, allowed: str) -> None:
    """Raise ValueError unless a field of a config is ok, with its value and what is allowed."""
    if not ok:
        raise ValueError(f"{name} is {short(getattr(config, name))}, must be {allowed}")


def short(value: object, length: int = 80) -> str:
    """repr of a value for a sentence: one line of at most `length` characters."""
    if isinstance(value, str | bytes):
        value = value[: length + 1]  # a long text need not be escaped to its end
    try:
        text = repr(value)
    except Exception:  # an int of more digits than Python prints, or somebody's own class
        text = f"a {type(value).__name__} that can't be printed"
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 3]}..."
