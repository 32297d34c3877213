"""Damage as many files as asked for and count what reading them comes to.

    python tests/fuzz.py --count 100000 [--first 0] [--seed 0] [--show 3]

File i is damaged by a generator that is seeded with the seed and i, so that every one can be made
again: --first i --count 1. The outcomes are
    loaded        it loads: the damage cannot be seen, or does not matter
    one sentence  ValueError or FileNotFoundError with one printable line
    wrong         anything else; the first few are printed with their traceback
The exit status is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import corrupt
import torch
from damaged import refusal, write_layouts
from weight_files import GOLDENS

from weights.load import load_component, open_model
from weights.networks import build
from weights.tokenizers import read_tokenizer

OUTCOMES = ("loaded", "one sentence", "wrong")


class Target(NamedTuple):
    """A file to damage, and what reads it."""

    file: Path
    read: Callable[[], Any]


def read_component(folder: Path, name: str) -> None:
    load_component(folder, name)


def read_model(path: Path) -> None:
    """All that is checked before data is read, and the data of the files' own networks."""
    model = open_model(path)
    for part in model.parts.values():
        if part.stored:
            build(part, compare=True)


def read_scheduler(folder: Path) -> None:
    config = load_component(folder, "scheduler")
    for solver in ("euler", "corrected"):
        levels = config.sigmas(4, solver, 64)
        assert levels.shape == (5,) and torch.isfinite(levels).all(), levels


def read_words(folder: Path) -> None:
    tokenizer = read_tokenizer(folder)
    ids = tokenizer.encode("a photo of a cat <pad> <|endoftext|> 猫!")
    assert all(type(id) is int and id >= 0 for id in ids), ids
    tokenizer.decode(ids)


def targets(root: Path) -> dict[str, list[Target]]:
    """Every file that is read of a tiny model in every layout: kind -> targets."""
    found: dict[str, list[Target]] = {}

    def add(file: Path, read: Callable[..., Any], *arguments: Any) -> None:
        kind = file.name if file.suffix in (".json", ".model", ".txt") else f"*{file.suffix}"
        found.setdefault(kind, []).append(Target(file, lambda: read(*arguments)))

    for path in write_layouts(root).values():
        folder = path if path.is_dir() else path.parent
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = file.parent.name
            if file.parent == folder:
                add(file, read_model, path)
            elif name == "scheduler":
                add(file, read_scheduler, folder)
            elif not name.startswith("tokenizer"):
                add(file, read_component, folder, name)
    for case in ("tok_clip_pad_bang", "tok_t5_tiny", "tok_gemma_tiny"):
        folder = Path(shutil.copytree(GOLDENS / case / "tokenizer", root / case))
        for file in sorted(folder.iterdir()):
            add(file, read_words, folder)
    return found


def outcome(read: Callable[[], Any]) -> tuple[str, str]:
    """How reading ends, one of OUTCOMES, and the traceback of what is wrong."""
    try:
        read()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # Rust's panics are no Exception
        if refusal(error):
            return "one sentence", ""
        return "wrong", "".join(traceback.format_exception(error, limit=-6))[-3000:]
    return "loaded", ""


def parse(text: str) -> argparse.Namespace:
    """The command line of this script and of calls.py."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=3, help="how many tracebacks")
    return parser.parse_args()


def report(counts: dict[str, Counter[str]], outcomes: Sequence[str]) -> int:
    """Print how often what came of each kind; the exit status."""
    total: Counter[str] = sum(counts.values(), Counter())
    for kind, each in [*sorted(counts.items()), ("all", total)]:
        line = "  ".join(f"{each[name]:7} {name}" for name in outcomes)
        print(f"{kind:40} {line}")
    return 1 if total["wrong"] else 0


def main() -> int:
    options = parse(__doc__)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    counts: dict[str, Counter[str]] = {}
    shown, start = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        found = targets(Path(temporary))
        for i in range(options.first, options.first + options.count):
            rng = Random(f"{options.seed}:{i}")
            kind = rng.choice(sorted(found))
            file, read = rng.choice(found[kind])
            raw = file.read_bytes()
            file.write_bytes(corrupt.damage(raw, file, rng))
            result, trace = outcome(read)
            file.write_bytes(raw)
            counts.setdefault(kind, Counter())[result] += 1
            if trace and shown < options.show:
                shown += 1
                print(f"file {i}, {file.relative_to(temporary)}:\n{trace}", flush=True)
            done = i + 1 - options.first
            if done % 1000 == 0:
                wrong = sum(each["wrong"] for each in counts.values())
                took = time.monotonic() - start
                print(f"{done} files, {wrong} wrong, {took:.0f} s", file=sys.stderr, flush=True)
    return report(counts, OUTCOMES)


if __name__ == "__main__":
    sys.exit(main())
