"""How near each method comes to the flow's equation, by what it costs: a table and a plot.

    python examples/evaluate.py --model mini-lumina --seeds 8 --plot docs/evaluate-mini-lumina.png
    python examples/evaluate.py --methods corrected paper --seeds 2
    torchrun --nproc-per-node 4 examples/evaluate.py --device cuda ...   # seeds shared out

Every picture is drawn from the noise of its seed and compared with the equation solved finely from
the same noise ("ODE": 64 corrected steps): SNR of the final latents in dB, mean and 95 % interval
over all prompts and seeds. The cost is in network evaluations: the tokens computed in all steps,
divided by those of the picture. Results go into the folder --out as soon as they are there; a run
that was interrupted goes on where it stopped, and the table is made from the files, so that it does
not depend on the number of processes.
"""

from __future__ import annotations

import cli  # isort: skip

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import minidit
import rivals
from curves import Curves, Rows, curves, draw_lines, gains, read, shared, table
from pictures import check_plot
from ras import RASConfig, Upstream

PROMPTS = (  # one thing or two, whose places are said or left to the noise
    "a red apple on a sky blue background",
    "a panda on a pink background",
    "a hamburger on a black background",
    "a unicorn on a purple to pink gradient background",
    "a fox to the left of a red apple on a teal background",
    "two penguins on a red background",
    "a tiger face and a cactus on a lavender background",
    "a strawberry above a cupcake on a yellow background",
)


# ---------------------------------------------------------------- methods


@dataclass(frozen=True)
class Setting:
    """One way to draw.

    rule   what makes `ras=` of `ras` and of the drawing: see rivals.py
    fresh  a bound: active tokens attend to fresh keys and values of all tokens
    """

    steps: int
    solver: str = "corrected"
    ras: RASConfig | Upstream | None = None
    rule: Callable | None = None
    fresh: bool = False


DEFAULT, PAPER = RASConfig.preset("default"), replace(RASConfig.preset("paper"), fall=0.2)
STEPS = (4, 6, 8, 10, 12, 14, 18)  # of the corrected solver
RATIOS = (0.125, 0.25, 0.5, 0.75, 0.9)  # of the paper and of the official code, in 28 steps
OFFICIAL = Upstream(scheduler_end_step=28, error_reset_steps=(12, 20))
MENDED = replace(OFFICIAL, starvation_scale=-OFFICIAL.starvation_scale)
NONE = {"ratio": 1e-6}  # steps are left out: a single token is as good as none


def regional(rule: Callable | None = None, fresh: bool = False, **changes) -> list[Setting]:
    """The corrected solver with the default preset, changed, at every number of steps."""
    config = replace(DEFAULT, **changes)
    return [Setting(steps, ras=config, rule=rule, fresh=fresh) for steps in STEPS]


def ratios(config: RASConfig | Upstream) -> list[Setting]:
    """28 Euler steps with RAS, at every ratio."""
    return [Setting(28, "euler", config.with_ratio(ratio)) for ratio in RATIOS]


def refreshes(rule: Callable | None, **changes) -> list[Setting]:
    """28 Euler steps, of which the first three are dense and some more."""
    configs = (RASConfig(start=3, end=None, refresh=n, **changes) for n in (1, 3, 5, 9, 12))
    return [Setting(28, "euler", config, rule) for config in configs]


METHODS: dict[str, list[Setting]] = {
    "official Euler": [Setting(steps, "euler") for steps in (6, 8, 12, 18, 28)],
    "corrected": [Setting(steps) for steps in (*STEPS, 28)],
    "ours": regional(),
    "ours by ratio": [Setting(12, ras=DEFAULT.with_ratio(ratio)) for ratio in RATIOS],
    "ours, random tokens": regional(score="random"),
    "ours, steps left out": regional(**NONE),
    "ours, fewer tokens late": regional(fall=0.8),
    "ours, more tokens late": regional(fall=-0.8),
    "ours, chosen once": regional(rivals.Once),
    "ours, forecast": regional(rivals.line),
    "ours, oracle's tokens": regional(rivals.Oracle),
    "ours, fresh keys": regional(fresh=True),
    "ours, oracle's tokens, fresh keys": regional(rivals.Oracle, fresh=True),
    "paper": ratios(PAPER),
    "paper, random tokens": ratios(replace(PAPER, score="random", starvation=0.0)),
    "paper by refreshes": [
        Setting(28, "euler", replace(PAPER, ratio=0.25, refresh=n)) for n in (0, 1, 2, 5, 10)
    ],
    "official RAS": ratios(OFFICIAL),
    "official RAS, sign mended": ratios(MENDED),
}
RIVALS = {
    "hold": None,  # the plan of the others, and nothing else
    "TeaCache": rivals.tea_cache,
    "MagCache": rivals.mag_cache,
    "MagCache, scaled": rivals.Scaled,
    "TaylorSeer, line": rivals.line,
    "TaylorSeer, parabola": rivals.parabola,
}
TOKENS = {
    "": NONE,
    ", regions": {"ratio": 0.25},
    ", random tokens": {"ratio": 0.25, "score": "random"},
}
METHODS |= {
    name + suffix: refreshes(rule, **tokens)
    for name, rule in RIVALS.items()
    for suffix, tokens in TOKENS.items()
}

CONTROL = "corrected"  # whole steps, which the others are to beat at equal cost
GREY = "0.55"
NEARNESS = {  # what the plot shows, and how, where no methods are named
    CONTROL: "C0",
    "ours": "C1",
    "TaylorSeer, line": "C2",
    "TaylorSeer, line, regions": "C8",
    "TeaCache": "C9",
    "MagCache": "C6",
    "paper": "C3",
    "official RAS": "C5",
    "official Euler": GREY,
    "hold": "0.25",
}
GAINS = {
    "ours": "C1",
    "ours, fewer tokens late": "C3",
    "ours, fresh keys": "C4",
    "ours, oracle's tokens": "C6",
    "ours, random tokens": GREY,
    "ours, steps left out": "0.25",
}
COLOURS = dict.fromkeys(METHODS, GREY) | GAINS | NEARNESS
BOUNDS = [name for name in METHODS if "oracle" in name or "fresh" in name]  # dashed


# ---------------------------------------------------------------- measuring


def draw(
    pipe, setting: Setting, prompts: list[str], seed: int, size: int | None, calibrate=None
) -> tuple[torch.Tensor, float]:
    """A setting's latents (B, C, h, w) on the CPU, from the noise of the seed, and evaluations."""
    how, config = {"steps": setting.steps, "solver": setting.solver}, setting.ras
    if setting.rule is not None:
        drawing = rivals.Drawing(pipe, prompts, seed, **how, size=size, calibrate=calibrate)
        config = setting.rule(config, drawing)
    if setting.fresh:
        pipe = replace(pipe, transformer=rivals.FreshKeys(pipe.transformer))
    out = pipe(prompts, **how, ras=config, seed=seed, height=size, width=size, output="latent")
    return out.latents.cpu(), setting.steps * (out.trace.share if out.trace else 1)


def reference(pipe, prompts: list[str], seed: int, args: argparse.Namespace) -> torch.Tensor:
    """The ODE's latents, from the folder or made and kept there."""
    name = re.sub(r"\W+", "-", args.model)
    path = args.out / f"{name}-{args.size}-{args.ode_steps}-{seed}.safetensors"
    kept = load_file(path) if path.is_file() else {}
    missing = [prompt for prompt in prompts if prompt not in kept]
    if missing:
        latents, _ = draw(pipe, Setting(args.ode_steps), missing, seed, args.size)
        kept |= {prompt: x.clone() for prompt, x in zip(missing, latents, strict=True)}
        save_file(kept, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    return torch.stack([kept[prompt] for prompt in prompts])


def snr(latents: torch.Tensor, exact: torch.Tensor) -> list[float]:
    """Decibels of every sample, at most 99."""
    signal, error = (x.square().flatten(1).mean(dim=1) for x in (exact, latents - exact))
    return (10 * torch.log10(signal / error).clamp_max(9.9)).tolist()


def measure(pipe, args: argparse.Namespace, seed: int, done: Rows, file) -> None:
    """Add a row for every method, cost and prompt of a seed that is not there yet.
    Rules are calibrated on the first two prompts, seed 0."""
    calibrate = cache(partial(rivals.dense_path, pipe, args.prompts[:2], 0, size=args.size))
    for name in args.methods:
        for index, setting in enumerate(METHODS[name]):
            if args.steps and setting.steps not in args.steps:
                continue
            keys = {p: (args.model, args.size, name, index, p, seed) for p in args.prompts}
            prompts = [prompt for prompt, key in keys.items() if key not in done]
            for start in range(0, len(prompts), args.batch):
                some = prompts[start : start + args.batch]
                exact = reference(pipe, some, seed, args)
                latents, cost = draw(pipe, setting, some, seed, args.size, calibrate)
                for prompt, value in zip(some, snr(latents, exact), strict=True):
                    row = {"key": keys[prompt], "evaluations": cost, "snr": value}
                    print(json.dumps(row), file=file, flush=True)
        print(f"seed {seed}: {name}", file=sys.stderr)


# ---------------------------------------------------------------- plot


def plot(found: Curves, gained: Curves, title: str, path: Path) -> None:
    """Nearness against evaluations, and below it what is gained over whole steps of that cost."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MultipleLocator

    panels = {"nearness to the ODE, dB": found}
    if gained:
        panels[f"the same, less that of {CONTROL}\nsteps at the same cost, dB"] = gained
    figure = Figure(figsize=(7, 5.5 * len(panels)), layout="constrained")
    figure.suptitle(title, fontsize=13)
    subplots = figure.subplots(len(panels), squeeze=False)
    for axes, (what, some) in zip(subplots.flat, panels.items(), strict=True):
        draw_lines(axes, some, COLOURS, BOUNDS)
        axes.xaxis.set_major_locator(MultipleLocator(4))
        axes.set_xlim(2, 30)
        axes.set_xlabel("network evaluations", fontsize=13)
        axes.set_ylabel(what, fontsize=13)
    if gained:
        axes.axhline(0, color=NEARNESS[CONTROL])
    figure.savefig(path, dpi=100)


# ---------------------------------------------------------------- command line


def main() -> None:
    args = parse_args()
    pipe = minidit.load(args.model, device=cli.device_of(args), dtype=cli.DTYPES[args.dtype])
    with shared(args.out, args.seeds) as (seeds, done, file):
        for seed in seeds:
            measure(pipe, args, seed, done, file)
    if cli.share()[0] > 0:
        return
    rows = [
        row for (model, size, name, index, prompt, seed), row in read(args.out).items()
        if (model, size) == (args.model, args.size) and name in args.methods
        and (not args.steps or METHODS[name][index].steps in args.steps)
        and prompt in args.prompts and seed < args.seeds
    ]  # fmt: skip
    found, gained = curves(rows, args.methods), gains(rows, args.methods, CONTROL)
    print(table(found))
    if gained:
        print(
            f"\nless {CONTROL} steps of the same cost, picture by picture\n\n{table(gained, 'dB')}"
        )
    if args.plot is not None:
        top, bottom = (
            {name: some[name] for name in shown if name in some}
            for some, shown in ((found, args.named or NEARNESS), (gained, args.named or GAINS))
        )
        plot(top, bottom, args.model, args.plot)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Nearness to the ODE by cost, many pictures.")
    add = parser.add_argument
    add("--model", default="mini-lumina")
    add("--methods", nargs="+", choices=list(METHODS), metavar="NAME", help="all if not given")
    add("--prompts", nargs="+", default=list(PROMPTS))
    add("--captions", type=Path, help="a text file with one prompt a line, instead of --prompts")
    add("--seeds", type=int, default=2)
    add("--steps", type=int, nargs="+", help="only settings with these numbers of steps")
    add("--size", type=int, help="pixels of a side, the model's own if not given")
    add("--batch", type=int, default=8, help="prompts drawn at once")
    add("--device", default="cpu")
    add("--dtype", choices=cli.DTYPES, default="float32")
    add("--ode-steps", type=int, default=64, help="corrected steps of the reference")
    add("--out", type=Path, default=Path("runs/evaluate"), help="folder of the results")
    add("--plot", type=Path, help="picture of the curves, of all methods the main ones")
    args = parser.parse_args()
    cli.at_least(parser, args, seeds=1, size=16, batch=1, ode_steps=1)
    check_plot(args.plot)
    args.named, args.methods = args.methods, args.methods or list(METHODS)
    if args.captions is not None:
        args.prompts = cli.read_lines(args.captions)
    return args


if __name__ == "__main__":
    cli.run(main)
