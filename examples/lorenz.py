"""How unevenly holding hurts: Lorenz curves of its error over the tokens, step by step.

    python examples/lorenz.py --model mini-lumina --plot lorenz.png

A dense run; in every step but the first, the squared error of holding each token's velocity of the
step before. What share of it do the worst tokens make? It is what computing them would save, so no
choice of tokens saves more in that step. If all tokens were alike, 25 % of them would make 25 %.
The last columns: the 25 % that the rule `error` picks, as they changed most a step before, and how
many decibels the worst 25 % are worth at most.
"""

from __future__ import annotations

import cli  # isort: skip

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from evaluate import PROMPTS
from pictures import check_plot
from rivals import dense_path

SHARES = (0.1, 0.25, 0.5)  # of the tokens


def main() -> None:
    args = parse_args()
    pipe = cli.load_model(args)
    solver = pipe.scheduler.default_solver
    steps = args.steps or pipe.scheduler.steps(solver)
    runs = [
        dense_path(pipe, args.prompts, seed, steps, solver, args.size) for seed in range(args.seeds)
    ]
    velocity = torch.cat([run.velocity for run in runs], dim=1)  # (steps, B, N, P*P, C)
    error = velocity.diff(dim=0).square().sum(dim=(3, 4))  # (steps - 1, B, N), of steps 1, 2, ...
    print(f"{args.model}, {steps} steps, {solver}, {error.shape[1]} pictures\n")
    print(table(error, runs[0].sigmas.tolist()))
    if args.plot is not None:
        plot(error, runs[0].sigmas.tolist(), args)


def lorenz(error: Tensor, score: Tensor | None = None) -> Tensor:
    """Share of the error that the first k = 0 .. N tokens make, (..., N + 1).

    error (..., N); the tokens of highest score (..., N) come first, where not given the worst.
    """
    order = (error if score is None else score).argsort(dim=-1, descending=True)
    total = error.gather(-1, order).cumsum(dim=-1)
    shares = total / total[..., -1:].clamp_min(1e-30)
    return torch.cat((torch.zeros_like(shares[..., :1]), shares), dim=-1)


def table(error: Tensor, sigmas: list[float]) -> str:
    """Markdown: a row a step, mean over the pictures. error (steps - 1, B, N)."""
    counts = [round(share * error.shape[2]) for share in SHARES]
    worst = lorenz(error).mean(dim=1)[:, counts]  # (steps - 1, 3)
    picked = lorenz(error[1:], error[:-1]).mean(dim=1)[:, counts[1]]  # (steps - 2,)
    found = ["", *(f"{share:.0%}" for share in picked.tolist())]  # nothing is known in step 1
    names = " | ".join(f"worst {share:.0%}" for share in SHARES)
    lines = [f"| step | noise | {names} | 25% by `error` | 25%, dB |", "|---" * 7 + "|"]
    for i, shares in enumerate(worst.tolist()):
        cells = " | ".join(f"{share:.0%}" for share in shares)
        most = -10 * math.log10(max(1e-9, 1 - shares[1]))
        lines.append(f"| {i + 1} | {sigmas[i + 1]:.3f} | {cells} | {found[i]} | {most:.1f} |")
    return "\n".join(lines)


def plot(error: Tensor, sigmas: list[float], args: argparse.Namespace) -> None:
    """A curve a step, from the first one, dark, to the last one; the steepest is named, too."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    axes, curves = figure.subplots(), 100 * lorenz(error).mean(dim=1)  # (steps - 1, N + 1)
    percent = torch.linspace(0, 100, curves.shape[1])
    colours = colormaps["viridis"](torch.linspace(0, 0.9, len(curves)).numpy())
    named = {0, len(curves) - 1, curves.sum(dim=1).argmax().item()}
    for i, (curve, colour) in enumerate(zip(curves, colours, strict=True)):
        label = f"step {i + 1}, noise {sigmas[i + 1]:.2f}"
        axes.plot(percent, curve, color=colour, label=label if i in named else None)
    axes.plot((0, 100), (0, 100), color="0.6", linestyle="--", label="all tokens alike")
    axes.legend(loc="lower right", fontsize=12)
    axes.grid(alpha=0.3)
    axes.set_title(args.model, fontsize=13)
    axes.set_xlabel("worst tokens, %", fontsize=13)
    axes.set_ylabel("share of the error of holding, %", fontsize=13)
    figure.savefig(args.plot, dpi=100)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How the error of holding is spread over tokens.")
    add = parser.add_argument
    cli.add_model_options(parser)
    add("--prompts", nargs="+", default=list(PROMPTS))
    add("--seeds", type=int, default=1)
    add("--steps", type=int, help="default: what the model asks for")
    add("--size", type=int, help="pixels of a side, the model's own if not given")
    add("--plot", type=Path, help="picture of the curves, needs matplotlib")
    args = parser.parse_args()
    cli.at_least(parser, args, seeds=1, steps=3, size=16)
    check_plot(args.plot)
    return args


if __name__ == "__main__":
    cli.run(main)
