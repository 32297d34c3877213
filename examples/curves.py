"""Measured pictures as rows in a folder, and what is made of them: curves, gains, a table, a plot.

A row has the `key` of its picture, (model, setting, method, index, prompt, seed, ...), its cost in
network `evaluations`, and what was measured: its `snr` to the reference in dB, and in evaluate_edit
its `seam`. Of one method every index is a cost.
"""

from __future__ import annotations

import cli  # isort: skip

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple, TextIO

import numpy as np
import torch

Rows = dict[tuple, dict]  # by key


class Point(NamedTuple):
    """What one method has at one cost: mean over the pictures, and half the 95 % interval."""

    evaluations: float
    value: float
    half: float
    pictures: int


Curves = dict[str, list[Point]]  # of every method, by cost


# ---------------------------------------------------------------- rows


@contextmanager
def shared(folder: Path, seeds: int) -> Iterator[tuple[range, Rows, TextIO]]:
    """This process's seeds, the rows that are there, and a file for more; in the end all processes
    wait for each other. A run that was interrupted goes on with the rows that it left."""
    rank, world = cli.share()
    if world > 1:
        torch.distributed.init_process_group("gloo")  # nothing but a barrier: no tensors are sent
    folder.mkdir(parents=True, exist_ok=True)
    own = folder / ("rows.jsonl" if world == 1 else f"rows.{rank}.jsonl")
    done = read(folder)
    with own.open("a", encoding="utf-8") as file:
        file.write("\n" if own.stat().st_size else "")  # after a line that was cut off
        yield range(rank, seeds, world), done, file
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def read(folder: Path) -> Rows:
    """Finished rows of all processes; a line cut off by an interruption is dropped."""
    done = {}
    for part in sorted(folder.glob("rows*.jsonl")):
        for line in part.read_text("utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            done[tuple(row["key"])] = row
    return done


# ---------------------------------------------------------------- curves


def curves(rows: Iterable[dict], methods: Iterable[str], what: str = "snr") -> Curves:
    """Mean of what was measured, of these methods, in this order, where there are rows of them."""
    return _by_cost((row for row in rows if what in row), methods, lambda row: row[what])


def gains(rows: Iterable[dict], methods: Iterable[str], control: str) -> Curves:
    """How much nearer each picture is than the control's picture of the same prompt and seed at the
    same cost, on the line between the costs that were measured; not beyond them."""
    paths = defaultdict(list)
    rows = [row for row in rows if "snr" in row]
    for row in rows:
        if row["key"][2] == control:
            paths[_picture(row)].append((row["evaluations"], row["snr"]))
    paths = {picture: tuple(zip(*sorted(path), strict=True)) for picture, path in paths.items()}

    def inside(row: dict) -> bool:
        costs, _ = paths.get(_picture(row), ((math.inf,), ()))
        return costs[0] <= row["evaluations"] <= costs[-1]

    def gain(row: dict) -> float:
        return row["snr"] - float(np.interp(row["evaluations"], *paths[_picture(row)]))

    return _by_cost(filter(inside, rows), [m for m in methods if m != control], gain)


def _picture(row: dict) -> tuple:
    """What a row has in common with those of other methods."""
    model, setting, _method, _index, *picture = row["key"]
    return model, setting, *picture


def _by_cost(
    rows: Iterable[dict], methods: Iterable[str], value: Callable[[dict], float]
) -> Curves:
    """Mean of a value of the rows, at every cost of these methods."""
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row["key"][2:4])].append(row)
    found = defaultdict(list)
    for (name, _), some in groups.items():
        values = sorted(map(value, some))  # the same sum in any order of processes
        half = 1.96 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        cost = mean(sorted(row["evaluations"] for row in some))
        found[name].append(Point(cost, mean(values), half, len(values)))
    return {name: sorted(found[name]) for name in methods if name in found}


def table(found: Curves, what: str = "SNR to the ODE, dB") -> str:
    """Markdown: a row a method, its costs and what it has there."""
    lines = [f"| method | evaluations: {what} | pictures |", "|---|---|---|"]
    for name, points in found.items():
        cells = ", ".join(f"{p.evaluations:.1f}: {p.value:.1f} ± {p.half:.1f}" for p in points)
        lines.append(f"| {name} | {cells} | {points[0].pictures} |")
    return "\n".join(lines)


# ---------------------------------------------------------------- plot


def draw_lines(axes, found: Curves, colours: dict[str, str], dashed: Iterable[str]) -> None:
    """A line a method, its name at the right, as high as its end where there is room."""
    for name, points in found.items():
        cost, value, half, _ = zip(*points, strict=True)
        look = {"color": colours[name], "linestyle": "--" if name in dashed else "-"}
        axes.errorbar(cost, value, half, **look, marker="o", markersize=3, elinewidth=0.6)
    low, high = axes.get_ylim()
    gap = (high - low) / 18
    ends = sorted((points[-1].value, points[-1].evaluations, n) for n, points in found.items())
    place = -math.inf
    for k, (value, cost, name) in enumerate(ends):
        room = high - gap * (len(ends) - k - 1)  # for those above
        place = max(min(value, room), place + gap)
        colour = colours[name]
        axes.annotate(
            name, (cost, value), (1.02, place), textcoords=("axes fraction", "data"), color=colour,
            va="center", fontsize=12, arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.4},
        )  # fmt: skip
    axes.grid(alpha=0.3)
