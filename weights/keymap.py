"""How published tensors become ours and back: the mechanism of the tables in sd3.py and lumina.py.

A table maps names of ours, without a trailing .weight or .bias, to where a file keeps the tensor.
`*` stands for the same number on both sides; the first entry that fits a name holds.

    "a": "x"                    the tensor x
    "a": ("x", "y", "z")        x, y and z one below the other (our qkv is one Linear)
    "a": Swap("x")              x with its two halves exchanged (scale, shift for shift, scale)
    "a": Conv1x1("x")           the matrix x, stored as a 1x1 convolution
    "a": Same("x", "y")         x, of which y is a copy
    "a": IDENTITY               in no file: the identity matrix

Tables are written in this direction only. Reading and writing both follow from it, because every
entry comes down to rows of stored tensors one below the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from weights.files import Stored, Tensors, read_rows, row_chunks


@dataclass(frozen=True)
class Swap:
    """A stored tensor with its two halves exchanged."""

    name: str


@dataclass(frozen=True)
class Conv1x1:
    """A matrix that is stored as a 1x1 convolution."""

    name: str


@dataclass(frozen=True)
class Same:
    """A stored tensor of which the file holds a copy."""

    name: str
    copy: str


IDENTITY = ()
Source = str | tuple[str, ...] | Swap | Conv1x1 | Same
Table = Mapping[str, Source]
Shape = tuple[int, ...]


class Piece(NamedTuple):
    """Rows start..stop of a stored tensor."""

    name: str
    start: int
    stop: int


class Recipe(NamedTuple):
    """One tensor of ours: pieces one below the other, all from tensors of the same shape."""

    pieces: tuple[Piece, ...]
    shape: Shape  # of each stored tensor
    copy: str | None = None  # another stored tensor that must hold the same

    @property
    def names(self) -> list[str]:
        """The stored tensors that this one accounts for."""
        names = {piece.name: None for piece in self.pieces}
        return [*names, self.copy] if self.copy else [*names]


def recipes(table: Table, shapes: Mapping[str, Shape]) -> dict[str, Recipe]:
    """What to read for every tensor of ours, given their names and shapes.

    A name that no entry of the table fits is a mistake in the table: KeyError.
    """
    patterns = [
        (re.compile(re.escape(ours).replace(r"\*", r"(\d+)") + r"(\.weight|\.bias)?"), source)
        for ours, source in table.items()
    ]
    return {name: _recipe(name, shape, patterns) for name, shape in shapes.items()}


def _recipe(name: str, shape: Shape, patterns: list[tuple[re.Pattern[str], Source]]) -> Recipe:
    fits = ((match, source) for pattern, source in patterns if (match := pattern.fullmatch(name)))
    match, source = next(fits, (None, ""))
    if match is None:
        raise KeyError(f"the key map has no entry for {name}")
    *numbers, leaf = match.groups()

    def theirs(pattern: str) -> str:
        parts = iter(numbers)
        return re.sub(r"\*", lambda _: next(parts), pattern) + (leaf or "")

    rows = shape[0]
    if isinstance(source, tuple):
        each = rows // max(1, len(source))
        pieces = tuple(Piece(theirs(part), 0, each) for part in source)
        return Recipe(pieces, (each, *shape[1:]))
    if isinstance(source, Swap):
        stored, half = theirs(source.name), rows // 2
        return Recipe((Piece(stored, half, rows), Piece(stored, 0, half)), shape)
    if isinstance(source, Conv1x1):
        matrix = len(shape) == 2
        return Recipe((Piece(theirs(source.name), 0, rows),), (*shape, 1, 1) if matrix else shape)
    if isinstance(source, Same):
        return Recipe((Piece(theirs(source.name), 0, rows),), shape, copy=theirs(source.copy))
    return Recipe((Piece(theirs(source), 0, rows),), shape)


def check(plan: Mapping[str, Recipe], stored: Tensors, unused: tuple[str, ...], what: str) -> None:
    """Raise one ValueError that lists missing, unexpected, mis-shaped and non-float tensors.

    unused are names that published files are known to carry and that nobody needs.
    """
    wanted = {name: recipe.shape for recipe in plan.values() for name in recipe.names}
    missing = [name for name in wanted if name not in stored]
    unexpected = [name for name in stored if name not in wanted and name not in unused]
    shaped = [
        f"{name} is {list(stored[name].shape)} and must be {list(shape)}"
        for name, shape in wanted.items()
        if name in stored and stored[name].shape != shape
    ]
    integers = [
        f"{name} is {stored[name].dtype}"
        for name in wanted
        if name in stored and not stored[name].dtype.is_floating_point
    ]
    faults = (
        _some(missing, "missing"),
        _some(unexpected, "unexpected"),
        _some(shaped, "of another shape"),
        _some(integers, "not floating point"),
    )
    if any(faults):
        raise ValueError(f"{what}: " + "; ".join(fault for fault in faults if fault))


def _some(names: list[str], kind: str, most: int = 10) -> str:
    if not names:
        return ""
    tail = ", ..." if len(names) > most else ""
    return f"{len(names)} tensors {kind} ({', '.join(name[:200] for name in names[:most])}{tail})"


def read_into(out: Tensor, recipe: Recipe, stored: Tensors) -> None:
    """Fill a tensor of ours from the files, a few megabytes at a time, in its own dtype.

    Raises ValueError where two tensors that must be the same are not.
    """
    if not recipe.pieces:
        out.copy_(torch.eye(*out.shape, dtype=out.dtype))
    at = 0
    for name, start, stop in recipe.pieces:
        for first, last in row_chunks(stored[name], start, stop):
            rows = read_rows(stored[name], first, last)
            if recipe.copy and not same_values(stored[name], stored[recipe.copy], first, last):
                raise ValueError(
                    f"{stored[name].file} holds {name} and {recipe.copy}, which must be the same "
                    "and are not"
                )
            if not out.is_cpu:  # convert here: not every device knows every stored type
                rows = rows.to(out.dtype)
            target = out[at : at + last - first]
            target.copy_(rows.reshape(target.shape))
            at += last - first


def same_values(one: Stored, other: Stored, first: int, last: int) -> bool:
    """Whether two stored tensors of the same shape hold the same numbers in these rows."""
    a, b = (read_rows(stored, first, last).float() for stored in (one, other))
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def write_out(value: Tensor, recipe: Recipe) -> dict[str, Tensor]:
    """The other direction: the stored tensors that one tensor of ours becomes."""
    out: dict[str, Tensor] = {}
    at = 0
    for name, start, stop in recipe.pieces:
        target = out.setdefault(name, value.new_empty(recipe.shape))
        target[start:stop] = value[at : at + stop - start].reshape(target[start:stop].shape)
        at += stop - start
    if recipe.copy:
        out[recipe.copy] = out[recipe.pieces[0].name]
    return out
