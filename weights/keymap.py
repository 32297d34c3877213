"""How published tensors become ours and back: the mechanism of the tables in sd3.py, lumina.py ...

A table maps names of ours, without a trailing .weight or .bias, to where a file keeps the tensor.
`*` stands for the same number on both sides; the first entry that fits a name holds.

    "a": "x"                    the tensor x
    "a": Stack("x", "y", "z")   x, y and z one below the other (our qkv is one Linear)
    "a": Stack()                in no file: the identity matrix
    "a": Rows("x", 8, 16, 24)   rows 8..16 of x, which has 24 (where the file's qkv is one)
    "a": Swap("x")              x with its two halves exchanged (scale, shift for shift, scale)
    "a": Conv1x1("x")           the matrix x, stored as a 1x1 convolution
    "a": Same("x", "y")         x, of which y is a copy
    "a": ("x", Swap("z"))       one entry for each layout of the network

Tables are written in this direction only. Reading and writing both follow from it, because every
entry comes down to rows of stored tensors one below the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minidit.scheduler import SchedulerConfig


@dataclass(frozen=True)
class Stack:
    """Stored tensors of equal shape one below the other; none of them: the identity matrix."""

    names: tuple[str, ...]

    def __init__(self, *names: str) -> None:
        object.__setattr__(self, "names", names)


@dataclass(frozen=True)
class Rows:
    """Rows start..stop of a stored tensor that has `total`."""

    name: str
    start: int
    stop: int
    total: int


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


Source = str | Stack | Rows | Swap | Conv1x1 | Same
Table = Mapping[str, "Source | tuple[Source, ...]"]
Shape = tuple[int, ...]


def qkv(pattern: str) -> Stack:
    """q, k and v one below the other, each in the place of the pattern's question mark."""
    return Stack(*(pattern.replace("?", letter) for letter in "qkv"))


class Network(NamedTuple):
    """A kind of network: its classes, its key map, and how its config and files are told.

    table    (config, headers or None) -> the key map; its tuples have one entry a layout
    layouts  in which its tensors are named; the first is written
    classes  what config.json or model_index.json calls it -> the layout
    extras   what else config.json says that other readers need
    sign     a tensor that tells it in a file without a config; "" if there is no such layout
    sizes    headers -> layout and config, for such a file; raises ValueError
    ignore   tensor names to ignore
    """

    module: type[nn.Module]
    config: type
    table: Callable[[Any, Any], Table]
    classes: Mapping[str, str]
    layouts: tuple[str, ...] = ("diffusers", "original")
    extras: Mapping[str, Any] = {}
    sign: str = ""
    sizes: Callable[[Any], tuple[str, Any]] | None = None
    ignore: tuple[str, ...] = ()


class Family(NamedTuple):
    """What a model of a family consists of, and what holds where its files do not say.

    pipeline    as model_index.json calls it
    components  component -> its class, as in model_index.json, besides the scheduler
    optional    components that a model may do without
    beside      component -> names of files that may hold it beside a single file, best first
    latents     scale and shift of the VAE's latents, for a file without a config
    widths      field of the transformer's config -> [(component, field)], which must sum to it
    scheduler   (transformer's config, name of the place) -> what to sample with
    repo        on the hub: has every component as a folder
    """

    title: str
    pipeline: str
    repo: str
    components: Mapping[str, str]
    widths: Mapping[str, list[tuple[str, str]]]
    scheduler: Callable[[Any, str], SchedulerConfig]
    optional: tuple[str, ...] = ()
    beside: Mapping[str, tuple[str, ...]] = {}
    latents: Mapping[str, float] = {}


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


def recipes(table: Table, layout: int, shapes: Mapping[str, Shape]) -> dict[str, Recipe]:
    """What to read for every tensor of ours, given their names and shapes.

    layout is which entry of the table's tuples counts. A name that no entry of the table fits is a
    mistake in the table: KeyError.
    """
    patterns = [
        (re.compile(re.escape(ours).replace(r"\*", r"(\d+)") + r"(\.weight|\.bias)?"), source)
        for ours, source in table.items()
    ]
    found = {}
    for name, shape in shapes.items():
        fits = ((match, source) for p, source in patterns if (match := p.fullmatch(name)))
        match, source = next(fits, (None, ""))
        if match is None:
            raise KeyError(f"the key map has no entry for {name}")
        source = source[layout] if isinstance(source, tuple) else source
        *numbers, leaf = match.groups()
        found[name] = _recipe(source, shape, numbers, leaf or "")
    return found


def _recipe(source: Source, shape: Shape, numbers: list[str], leaf: str) -> Recipe:
    """The recipe of a tensor of this shape, whose name had these numbers and this ending."""

    def theirs(pattern: str) -> str:
        parts = iter(numbers)
        return re.sub(r"\*", lambda _: next(parts), pattern) + leaf

    count = shape[0]
    if isinstance(source, Stack):
        each = count // max(1, len(source.names))
        pieces = tuple(Piece(theirs(name), 0, each) for name in source.names)
        return Recipe(pieces, (each, *shape[1:]))
    name = theirs(source if isinstance(source, str) else source.name)
    whole = Recipe((Piece(name, 0, count),), shape)
    if isinstance(source, Rows):
        rows = (Piece(name, source.start, source.stop),)
        return Recipe(rows, (source.total, *shape[1:]))
    if isinstance(source, Swap):
        return whole._replace(pieces=(Piece(name, count // 2, count), Piece(name, 0, count // 2)))
    if isinstance(source, Conv1x1) and len(shape) == 2:
        return whole._replace(shape=(*shape, 1, 1))
    if isinstance(source, Same):
        return whole._replace(copy=theirs(source.copy))
    return whole


def write_out(value: Tensor, recipe: Recipe) -> dict[str, Tensor]:
    """The stored tensors that one tensor of ours becomes."""
    out: dict[str, Tensor] = {}
    at = 0
    for name, start, stop in recipe.pieces:
        rows = value[at : at + stop - start]
        other = out.get(name)
        out[name] = rows if other is None else torch.cat((other, rows) if start else (rows, other))
        at += stop - start
    out = {name: tensor.reshape(recipe.shape) for name, tensor in out.items()}
    if recipe.copy:
        out[recipe.copy] = out[recipe.pieces[0].name].clone()
    return out
