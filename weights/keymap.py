"""How published tensors become ours and back: the mechanism of the tables in sd3.py, lumina.py ...

A table maps names of ours, without a trailing .weight or .bias, to where a file keeps the tensor;
the first entry that fits a name holds. `*` stands for the same number on both sides, `?` for the
same one of q, k and v.

    "a": "x"                    the tensor x
    "a": "x_?"                  x_q, x_k and x_v one below the other (our qkv is one Linear)
    "a": Rows("x", 1, 3, 4)     of the 4 equal parts of x's rows the second and the third
    "a": [Rows(...), Rows(...)] these one below the other
    "a": []                     in no file: the identity matrix
    "a": Same("x", "y")         x, of which y is a copy
    "a": ("x", "z")             one for each layout of the network: the diffusers folder, the
                                authors' single file

Tables are written in this direction only. Reading and writing both follow from it, because every
entry comes down to rows of stored tensors one below the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minidit.scheduler import SchedulerConfig


class Rows(NamedTuple):
    """Parts start..stop of the `total` equal parts of a stored tensor's rows."""

    name: str
    start: int
    stop: int
    total: int


class Same(NamedTuple):
    """A stored tensor of which the file holds a copy."""

    name: str
    copy: str


Source = str | Rows | Same | list[Rows]
Table = Mapping[str, "Source | tuple[Source, Source]"]
Shape = tuple[int, ...]


def swap(name: str) -> list[Rows]:
    """A stored tensor with its two halves exchanged (scale, shift for shift, scale)."""
    return [Rows(name, 1, 2, 2), Rows(name, 0, 1, 2)]


class Network(NamedTuple):
    """A kind of network: its classes, its key map, and how its config and files are told.

    table    (config, names in the file) -> the key map
    classes  what config.json or model_index.json calls it; the first is written
    extras   what else config.json says that other readers need
    sign     a tensor that tells it in a file without a config; "" if there is no such layout
    sizes    headers -> layout and config, for such a file; raises ValueError
    ignore   tensor names to ignore
    convs    its matrices may be stored as 1x1 convolutions
    """

    module: type[nn.Module]
    config: type
    table: Callable[[Any, Collection[str]], Table]
    classes: tuple[str, ...]
    extras: Mapping[str, Any] = {}
    sign: str = ""
    sizes: Callable[[Any], tuple[str, Any]] | None = None
    ignore: tuple[str, ...] = ()
    convs: bool = False


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

    name: str
    title: str
    pipeline: str
    repo: str
    components: Mapping[str, str]
    widths: Mapping[str, list[tuple[str, str]]]
    scheduler: Callable[[Any, str], SchedulerConfig]
    optional: tuple[str, ...] = ()
    beside: Mapping[str, tuple[str, ...]] = {}
    latents: Mapping[str, float] = {}


class Recipe(NamedTuple):
    """One tensor of ours: pieces one below the other, all from tensors of the same shape."""

    pieces: list[tuple[str, int, int]]  # a stored tensor, first and last + 1 of its rows
    shape: Shape  # of each stored tensor
    copy: str | None = None  # another stored tensor that must hold the same

    @property
    def names(self) -> list[str]:
        """The stored tensors that this one accounts for."""
        names = [*dict.fromkeys(name for name, _, _ in self.pieces)]
        return [*names, self.copy] if self.copy else names


def recipes(table: Table, layout: int, shapes: Mapping[str, Shape]) -> dict[str, Recipe]:
    """What to read for every tensor of ours, given their names and shapes.

    layout is which entry of the table's pairs counts. A name that no entry of the table fits is a
    mistake in the table: KeyError.
    """
    patterns = []
    for ours, source in table.items():
        pattern = re.escape(ours).replace(r"\*", r"(\d+)").replace(r"\?", "([qkv])")
        source = source[layout] if type(source) is tuple else source
        if isinstance(source, str) and "?" in source and "?" not in ours:
            source = [Rows(source.replace("?", letter), 0, 1, 1) for letter in "qkv"]
        patterns.append((re.compile(pattern + r"(\.weight|\.bias)?"), source))
    found = {}
    for name, shape in shapes.items():
        fits = ((match, source) for p, source in patterns if (match := p.fullmatch(name)))
        match, source = next(fits, (None, ""))
        if match is None:
            raise KeyError(f"the key map has no entry for {name}")
        *wild, leaf = match.groups("")
        found[name] = _recipe(source, shape, wild, leaf)
    return found


def _recipe(source: Source, shape: Shape, wild: list[str], leaf: str) -> Recipe:
    """The recipe of a tensor of this shape, in whose name `*` and `?` stood for `wild`."""

    def theirs(pattern: str) -> str:
        parts = iter(wild)
        return re.sub(r"[*?]", lambda _: next(parts), pattern) + leaf

    copy = theirs(source.copy) if isinstance(source, Same) else None
    if isinstance(source, str | Same):
        source = Rows(source if isinstance(source, str) else source.name, 0, 1, 1)
    parts = source if isinstance(source, list) else [source]
    if not parts:
        return Recipe([], shape)
    rows = shape[0] // sum(part.stop - part.start for part in parts)  # of one part
    pieces = [(theirs(part.name), part.start * rows, part.stop * rows) for part in parts]
    return Recipe(pieces, (parts[0].total * rows, *shape[1:]), copy)


def write_out(value: Tensor, recipe: Recipe) -> dict[str, Tensor]:
    """The stored tensors that one tensor of ours becomes."""
    out: dict[str, Tensor] = {}
    at = 0
    for name, start, stop in recipe.pieces:
        rows = value[at : at + stop - start]
        if name in out:
            rows = torch.cat((out[name], rows) if start else (rows, out[name]))
        out[name] = rows
        at += stop - start
    if recipe.copy:
        out[recipe.copy] = value.clone()
    return out
