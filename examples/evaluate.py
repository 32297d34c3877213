"""What RAS costs and how far it is from the dense picture: many prompts and seeds, one table.

    python examples/evaluate.py --seeds 4 --out runs/evaluate.jsonl
    python examples/evaluate.py --settings default paper dense --seeds 16 --steps 28

Every picture is drawn from the same noise as its dense reference. One line a picture goes into the
file as soon as it is measured; a run that was interrupted goes on where it stopped, and the table
is made from the file. SNR compares final latents, PSNR pictures, both in decibels, mean and 95 %
interval over all prompts and seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

from compare import psnr

import minidit
from ras import RASConfig

PROMPTS = (
    "red apple on a sky blue background",
    "panda on a pink background",
    "grinning face on a white background",
    "pizza on a teal background",
    "tiger face on a lavender background",
    "strawberry on a yellow background",
    "smiling face with sunglasses on a navy blue background",
    "penguin on a red background",
)
# the common frame of the paper's and the official settings: 4 dense steps, 2 refreshes, half active
FRAME = RASConfig(
    ratio=0.5, start=4, refresh=2, score="std", prefer="low", starvation=0.1, starved_by="skips",
    reuse="hold",
)  # fmt: skip
Setting = Callable[[int], RASConfig | int]  # of the number of steps: a config, or fewer dense steps
SETTINGS: dict[str, Setting] = {
    "default": lambda steps: RASConfig(),
    "default, held": lambda steps: RASConfig(reuse="hold"),
    "paper": lambda steps: RASConfig.preset("paper"),
    "upstream": lambda steps: upstream(steps),
    "upstream, SD3 script": lambda steps: upstream(steps, high_ratio=0.3),
    "upstream, sign mended": lambda steps: FRAME,
    "random": lambda steps: replace(FRAME, score="random", starvation=0.0),
    "drift": lambda steps: replace(FRAME, score="drift", prefer="high", starvation=0.0),
    "drift, extrapolated": lambda steps: replace(
        FRAME, score="drift", prefer="high", starvation=0.0, reuse="extrapolate"
    ),
    # one active token a regional step: as good as skipping the step
    "whole steps skipped, held": lambda steps: replace(FRAME, ratio=1e-6, refresh=steps),
    "whole steps skipped": lambda steps: RASConfig(ratio=1e-6, start=4, refresh=steps),
    "dense, 61 % of the steps": lambda steps: round(0.61 * steps),
}


def upstream(steps: int, **more: float) -> RASConfig:
    """The official code's defaults, its refresh steps moved into a run of this length."""
    resets = (round(steps * 12 / 28), round(steps * 20 / 28))
    return RASConfig.upstream(scheduler_end_step=steps, error_reset_steps=resets, **more)


def main() -> None:
    args = parse_args()
    done = read(args.out)
    pipe = minidit.load(args.model, device=args.device)
    steps = args.steps or pipe.scheduler.default_steps
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as file:
        for seed in range(args.seeds):
            for prompt in args.prompts:
                missing = [s for s in args.settings if (s, prompt, seed, steps) not in done]
                if not missing:
                    continue
                dense = pipe(prompt, steps=steps, seed=seed)
                for name in missing:
                    row = measure(pipe, name, prompt, seed, steps, dense)
                    done[name, prompt, seed, steps] = row
                    print(json.dumps(row), file=file, flush=True)
                    print(f"{name}, {prompt!r}, seed {seed}: {row['snr']:.1f} dB", file=sys.stderr)
    print(table(done, args.settings, steps))


def measure(pipe, name: str, prompt: str, seed: int, steps: int, dense: minidit.Output) -> dict:
    """One picture under one setting, compared with its dense reference."""
    setting = SETTINGS[name](steps)
    if isinstance(setting, int):
        out, cost = pipe(prompt, steps=setting, seed=seed), setting / steps
    else:
        out = pipe(prompt, steps=steps, seed=seed, ras=setting)
        cost = out.trace.share
    error = (out.latents - dense.latents).square().mean().item()
    signal = dense.latents.square().mean().item()
    return {
        "setting": name, "prompt": prompt, "seed": seed, "steps": steps, "cost": cost,
        "snr": 10 * math.log10(signal / max(error, 1e-20)),
        "psnr": min(99.0, psnr(out.images[0], dense.images[0])),
    }  # fmt: skip


def read(path: Path) -> dict[tuple, dict]:
    """Finished rows by what they are of; a last line cut off by an interruption is dropped."""
    done = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        done[row["setting"], row["prompt"], row["seed"], row["steps"]] = row
    return done


def table(done: dict[tuple, dict], settings: list[str], steps: int) -> str:
    """Markdown: cost, SNR and PSNR of each setting, mean and 95 % interval."""
    groups = defaultdict(list)
    for row in done.values():
        if row["steps"] == steps:
            groups[row["setting"]].append(row)
    lines = ["| setting | token-steps | SNR, dB | PSNR, dB | pictures |", "|---|---|---|---|---|"]
    for name in settings:
        rows = groups[name]
        cells = [name, f"{mean(row['cost'] for row in rows):.0%}"]
        for key in ("snr", "psnr"):
            values = [row[key] for row in rows]
            half = 1.96 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
            cells.append(f"{mean(values):.1f} ± {half:.1f}")
        lines.append("| " + " | ".join([*cells, str(len(rows))]) + " |")
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Cost and distance to dense, over many pictures.")
    add = parser.add_argument
    add("--model", default="mini-sd3")
    add("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), metavar="NAME")
    add("--prompts", nargs="+", default=list(PROMPTS))
    add("--seeds", type=int, default=2)
    add("--steps", type=int)
    add("--device", default="cpu")
    add("--out", type=Path, default=Path("runs/evaluate.jsonl"))
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds is {args.seeds}, must be at least 1")
    return args


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        sys.exit(f"error: {error.args[0] if isinstance(error, KeyError) else error}")
