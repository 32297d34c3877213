"""What RAS costs and how far it is from the dense picture: many prompts and seeds, one table.

    python examples/evaluate.py --seeds 8 --steps 28 --plot docs/evaluate.png
    python examples/evaluate.py --model mini-lumina --settings default paper --seeds 2
    torchrun --nproc-per-node 4 examples/evaluate.py --device cuda ...   # seeds shared out

Every picture is drawn from the same noise as two references: the same sampler dense, and the flow's
equation solved with 64 second-order steps ("ODE"). One line a picture goes into the file as soon
as it is measured; a run that was interrupted goes on where it stopped, and the table is made from
the files, so that it does not depend on the number of processes. SNR compares final latents, PSNR
and SSIM pictures; mean and 95 % interval over all prompts and seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch

import minidit
from cli import DTYPES, at_least, run
from measures import psnr
from pictures import check_writable
from quality import picture_name, read_captions
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


# ---------------------------------------------------------------- settings


@dataclass(frozen=True)
class Setting:
    """How to draw: with RAS or without, a share of the steps, of which order, with which cache."""

    ras: Callable[[int], RASConfig] | None = None  # of the number of steps
    steps: float = 1.0
    order: int = 1
    cache: bool = True


def upstream(steps: int, **more: float) -> RASConfig:
    """The official code's defaults, its refresh steps moved into a run of this length."""
    resets = (round(steps * 12 / 28), round(steps * 20 / 28))
    return RASConfig.upstream(scheduler_end_step=steps, error_reset_steps=resets, **more)


class NoCache(torch.nn.Module):
    """A network whose regional steps see the active tokens and the text alone."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network, self.config = network, network.config
        self.guided_channels = getattr(network, "guided_channels", None)

    def forward(self, *args, cache=None, **kwargs) -> torch.Tensor:
        return self.network(*args, cache=None if cache is None else self, **kwargs)

    def write(self, layer, k, v, rows):
        return k, v


DEFAULT, PAPER = RASConfig.preset("default"), RASConfig.preset("paper")
# the common frame of the paper's and the official settings: 4 dense steps, 2 refreshes, half active
FRAME = RASConfig(
    ratio=0.5, start=4, refresh=2, score="std", prefer="low", starvation=0.1, starved_by="skips",
    reuse="hold",
)  # fmt: skip
SKIP = 1e-6  # one active token a regional step: as good as skipping the step


def fixed(config: RASConfig, order: int = 1, **changes) -> Setting:
    return Setting(lambda steps: replace(config, **changes), order=order)


def every(n: int, config: RASConfig) -> Setting:
    """Every n-th step dense, the others skipped whole."""
    return Setting(
        lambda steps: replace(config, ratio=SKIP, start=1, end=None, refresh=(*range(n, steps, n),))
    )


# whole steps skipped, and extrapolated along the velocity of the last two
BARE = replace(DEFAULT, ratio=SKIP, correct=False)

SETTINGS: dict[str, Setting] = {
    "default": fixed(DEFAULT),
    "default, second order": fixed(DEFAULT, order=2),
    "default, 25 % active": fixed(DEFAULT, ratio=0.25),
    "default, random tokens": fixed(DEFAULT, score="random"),
    "default, not corrected": fixed(DEFAULT, correct=False),
    "default, keys held": fixed(DEFAULT, cache="hold"),
    "default, velocity held": fixed(DEFAULT, reuse="hold"),
    "default's steps skipped, corrected": fixed(DEFAULT, ratio=SKIP),
    "default's steps skipped": fixed(BARE),
    "every other step skipped, corrected": fixed(BARE, start=4, end=None, correct=True),
    "every other step skipped": fixed(BARE, start=4, end=None),
    "every other step skipped, held": fixed(BARE, start=4, end=None, reuse="hold"),
    "dense, fewer steps": Setting(steps=0.625),
    "second order, fewer steps": Setting(steps=0.625, order=2),
    "upstream": Setting(upstream),
    "upstream, SD3 script": Setting(lambda steps: upstream(steps, high_ratio=0.3)),
    "upstream, sign mended": fixed(FRAME),
    "paper": fixed(PAPER),
    "paper, ratio constant": fixed(PAPER, fall=0.0),
    "paper, random tokens": fixed(PAPER, score="random", starvation=0.0),
    "paper, no refresh": fixed(PAPER, refresh=0),
    "paper, early refresh": Setting(
        lambda steps: replace(PAPER, refresh=(round(steps * 0.29), round(steps * 0.43)))
    ),
    "paper, late refresh": Setting(
        lambda steps: replace(PAPER, refresh=(round(steps * 0.71), round(steps * 0.86)))
    ),
    "paper, corrected": fixed(PAPER, correct=True),
    "paper, no starvation": fixed(PAPER, starvation=0.0),
    "paper, no cache": Setting(lambda steps: PAPER, cache=False),
    "paper's frame, drift": fixed(FRAME, score="drift", prefer="high", starvation=0.0),
    "a quarter of the steps dense": every(4, BARE),
    "a quarter of the steps dense, corrected": every(4, replace(BARE, correct=True)),
    "dense, a quarter of the steps": Setting(steps=0.25),
    "second order, a quarter of the steps": Setting(steps=0.25, order=2),
    "second order": Setting(order=2),
    "dense": Setting(),
}


# ---------------------------------------------------------------- measuring


def draw(pipe, setting: Setting, prompts: list[str], seed: int, steps: int) -> minidit.Output:
    """The pictures of a setting, one a prompt, all from the noise of the seed."""
    count = max(1, round(setting.steps * steps))
    if not setting.cache:
        pipe = replace(pipe, transformer=NoCache(pipe.transformer))
    config = setting.ras(steps) if setting.ras else None
    return pipe(prompts, steps=count, seed=seed, ras=config, order=setting.order)


def measure(
    pipe, names: Sequence[str], prompts: list[str], seed: int, steps: int, ode_steps: int,
    save_as: Callable[[str, int], Path] | None,
) -> list[dict]:  # fmt: skip
    """One row for every setting and prompt, compared with both references."""
    rows, exact = [], None
    dense = draw(pipe, SETTINGS["dense"], prompts, seed, steps)
    if ode_steps:
        exact = draw(pipe, SETTINGS["second order"], prompts, seed, ode_steps)
    for name in names:
        setting = SETTINGS[name]
        out = dense if name == "dense" else draw(pipe, setting, prompts, seed, steps)
        cost = out.trace.share if out.trace else round(setting.steps * steps) / steps
        for i, prompt in enumerate(prompts):
            rows.append({
                "setting": name, "prompt": prompt, "seed": seed, "steps": steps, "cost": cost,
                "snr": snr(out.latents[i], dense.latents[i]),
                "ode": snr(out.latents[i], exact.latents[i]) if exact else None,
                "psnr": min(99.0, psnr(out.images[i], dense.images[i])),
                "ssim": ssim(out.images[i], dense.images[i]),
            })  # fmt: skip
            if save_as is not None:
                out.images[i].save(save_as(name, i))
    return rows


def picture_path(folder: Path, start: int, seed: int, setting: str, i: int) -> Path:
    """Where the picture of prompt number start + i goes: a folder a setting."""
    own = folder / re.sub(r"\W+", "-", setting)
    own.mkdir(parents=True, exist_ok=True)
    return own / picture_name(start + i, seed)


def snr(latents: torch.Tensor, reference: torch.Tensor) -> float:
    """Decibels, at most 99."""
    error = (latents - reference).square().mean().item()
    return min(99.0, 10 * math.log10(reference.square().mean().item() / max(error, 1e-20)))


def ssim(image, reference) -> float | None:
    """Structural similarity in [-1, 1]; none where scikit-image is not installed."""
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        return None
    pictures = (np.asarray(x) for x in (image, reference))
    return float(structural_similarity(*pictures, channel_axis=2))


# ---------------------------------------------------------------- files, table, plot


def read(path: Path) -> dict[tuple, dict]:
    """Finished rows of all processes by what they are of; a last line cut off by an interruption
    is dropped."""
    done = {}
    for part in sorted(path.parent.glob(f"{path.stem}*{path.suffix}")):
        for line in part.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            done[row["setting"], row["prompt"], row["seed"], row["steps"]] = row
    return done


def summary(rows: list[dict], key: str) -> tuple[float, float]:
    """Mean and half the 95 % interval; not a number where too few were measured."""
    rows = sorted(rows, key=lambda row: (row["seed"], row["prompt"]))
    values = [row[key] for row in rows if row[key] is not None]
    half = 1.96 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return mean(values) if values else math.nan, half


def table(groups: dict[str, list[dict]]) -> str:
    """Markdown: cost and distances of each setting."""
    columns = {"snr": "SNR, dB", "psnr": "PSNR, dB", "ssim": "SSIM", "ode": "SNR to ODE, dB"}
    lines = [
        " | ".join(["| setting", "token-steps", *columns.values(), "pictures |"]),
        "|---" * (len(columns) + 3) + "|",
    ]
    for name, rows in groups.items():
        cells = [name, f"{mean(row['cost'] for row in rows):.0%}"]
        for key in columns:
            digits = 3 if key == "ssim" else 1
            cells.append(" ± ".join(f"{x:.{digits}f}" for x in summary(rows, key)))
        lines.append("| " + " | ".join([*cells, str(len(rows))]) + " |")
    return "\n".join(lines)


def plot(groups: dict[str, list[dict]], path: Path) -> None:
    """Cost against the distance to each reference: a colour for each first word, a mark within."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.5), layout="constrained")
    for axes, key, title in zip(
        figure.subplots(1, 2), ("snr", "ode"), ("the same sampler, dense", "the ODE"), strict=True
    ):
        marks: dict[str, int] = {}
        for name, rows in groups.items():
            kind = re.split(r"\W", name)[0]
            marks[kind] = marks.get(kind, -1) + 1
            style = {"marker": "oXsDP^v<>*p"[marks[kind] % 11], "label": name}
            style["color"] = f"C{list(marks).index(kind) % 10}"
            if name == "dense" and key == "snr":  # the reference itself
                continue
            value, half = summary(rows, key)
            axes.errorbar(100 * mean(row["cost"] for row in rows), value, half, ls="", **style)
        axes.set(xlabel="token-steps, % of the dense run", ylabel="SNR of the final latents, dB")
        axes.set_title(f"Distance to {title}")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right", fontsize=8)
    figure.savefig(path, dpi=80)


# ---------------------------------------------------------------- command line


def main() -> None:
    args = parse_args()
    rank, world = (int(os.environ.get(k, d)) for k, d in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if world > 1:
        torch.distributed.init_process_group("gloo")  # nothing but a barrier: no tensors are sent
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    pipe = minidit.load(args.model, device=args.device, dtype=DTYPES[args.dtype])
    steps = args.steps or pipe.scheduler.default_steps
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = read(args.out)
    own = args.out if world == 1 else args.out.with_stem(f"{args.out.stem}.{rank}")
    with own.open("a") as file:
        file.write("\n" if own.stat().st_size else "")  # after a line that was cut off
        for seed in range(rank, args.seeds, world):
            for start in range(0, len(args.prompts), args.batch):
                prompts = args.prompts[start : start + args.batch]
                missing = [
                    name for name in args.settings
                    if any((name, p, seed, steps) not in done for p in prompts)
                ]  # fmt: skip
                if not missing:
                    continue
                save_as = partial(picture_path, args.images, start, seed) if args.images else None
                rows = measure(pipe, missing, prompts, seed, steps, args.ode_steps, save_as)
                for row in rows:
                    print(json.dumps(row), file=file, flush=True)
                print(
                    f"seed {seed}: {len(prompts)} prompts, {len(missing)} settings", file=sys.stderr
                )
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if rank == 0:
        wanted = {(p, seed, steps) for p in args.prompts for seed in range(args.seeds)}
        rows = [row for key, row in read(args.out).items() if key[1:] in wanted]
        groups = {name: [r for r in rows if r["setting"] == name] for name in args.settings}
        print(table(groups))
        if args.plot is not None:
            plot(groups, args.plot)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Cost and distance to dense, over many pictures.")
    add = parser.add_argument
    add("--model", default="mini-sd3")
    add("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), metavar="NAME")
    add("--prompts", nargs="+", default=list(PROMPTS))
    add("--captions", type=Path, help="a text file with one prompt a line, instead of --prompts")
    add("--seeds", type=int, default=2)
    add("--steps", type=int)
    add("--batch", type=int, default=8, help="prompts drawn at once")
    add("--device", default="cpu")
    add("--dtype", choices=DTYPES, default="float32")
    add("--ode-steps", type=int, default=64, help="steps of the second reference, 0 for none")
    add("--out", type=Path, default=Path("runs/evaluate.jsonl"))
    add("--images", type=Path, help="folder for the pictures, one folder a setting")
    add("--plot", type=Path, help="picture of the table, needs matplotlib")
    args = parser.parse_args()
    at_least(parser, args, seeds=1, steps=1, batch=1, ode_steps=0)
    if args.plot is not None:
        try:
            from matplotlib.backend_bases import FigureCanvasBase
        except ImportError:
            parser.error('--plot needs matplotlib: pip install -e ".[plots]"')
        check_writable(args.plot, {f".{kind}" for kind in FigureCanvasBase.filetypes})
    if args.captions is not None:
        args.prompts = read_captions(args.captions)
    return args


if __name__ == "__main__":
    run(main)
