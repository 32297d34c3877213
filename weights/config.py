"""A config dataclass from a JSON file; it checks its fields itself, type by type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

C = TypeVar("C")


def config_from(cls: type[C], values: Mapping[str, Any], path: Path) -> C:
    """A config dataclass from what a JSON file holds; keys without a field are ignored.

    Raises ValueError with the file, the key and its value where a type does not fit.
    """
    found = {f.name: values[f.name] for f in fields(cls) if f.name in values}  # type: ignore
    try:
        return cls(**found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
