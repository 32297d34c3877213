"""One prompt and seed, drawn densely, with RAS at some ratios, and with fewer dense steps.

    python examples/compare.py "a red apple on a sky blue background"
    python examples/compare.py "a fox" --ratios 0.5 0.25 --steps-map steps.png --gif active.gif

The fewer dense steps cost as much as the RAS run beside them. Under each picture: its share of the
token-steps, its seconds, and its PSNR to the dense picture, in decibels.
"""

from __future__ import annotations

import cli  # isort: skip

import argparse
import math
from pathlib import Path

import numpy as np
from PIL import Image

import minidit
import ras
from minidit.scheduler import SOLVERS
from pictures import check_outputs, check_writable, heat_image, labelled, save, sheet, step_map

ANIMATIONS = (".gif", ".webp", ".png", ".apng")


def main() -> None:
    args = parse_args()
    check_outputs(args.out, args.steps_map, args.gif)
    if args.gif:
        check_writable(args.gif, ANIMATIONS)
    preset = ras.RASConfig.preset(args.ras_preset)
    configs = [preset.with_ratio(ratio) for ratio in args.ratios]
    pipe = cli.load_model(args)
    solver = args.solver or pipe.scheduler.default_solver
    steps = args.steps or pipe.scheduler.steps(solver)

    def draw(steps: int, config: ras.RASConfig | ras.Upstream | None = None):
        begin = cli.now(pipe.device)
        out = pipe(
            args.prompt, steps=steps, seed=args.seed, ras=config, solver=solver, progress=True
        )
        return out, cli.now(pipe.device) - begin

    def cell(title: str, share: float, out: minidit.Output, seconds: float) -> Image.Image:
        distance = psnr(out.images[0], reference)
        return labelled(out.images[0], f"{title}\n{share:.0%}, {seconds:.1f} s, {distance:.1f} dB")

    dense, seconds = draw(steps)
    reference = dense.images[0]
    rows = [[labelled(reference, f"dense, {steps} steps\n100 %, {seconds:.1f} s")]]
    for ratio, config in zip(args.ratios, configs, strict=True):
        out, seconds = draw(steps, config)
        fewer = max(1, round(out.trace.share * steps))
        heat = heat_image(out.trace.heat(), reference.size)
        rows.append([
            cell(f"RAS, {ratio:.0%} active, {steps} steps", out.trace.share, out, seconds),
            labelled(heat, "how often active\nblue never, yellow always"),
            cell(f"dense, {fewer} steps", fewer / steps, *draw(fewer)),
        ])  # fmt: skip
    save(sheet(rows), args.out)
    print(f"wrote {args.out}")
    if args.steps_map:
        save(steps_figure(out), args.steps_map)
        print(f"wrote {args.steps_map}")
    if args.gif:
        image = out.images[0]
        frames = [sheet([[image, step_map(out.trace, t, image.size)]]) for t in range(steps)]
        save(frames[0], args.gif, save_all=True, append_images=frames[1:], duration=150, loop=0)
        print(f"wrote {args.gif}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Dense, RAS and fewer dense steps side by side.")
    add = parser.add_argument
    add("prompt", nargs="?", default="a red apple on a sky blue background")
    cli.add_model_options(parser)
    add("--ratios", type=float, nargs="+", default=[0.5, 0.1], help="active shares to draw with")
    add("--ras-preset", metavar="NAME", default="default", help=", ".join(ras.PRESETS))
    add("--steps", type=int, help="default: what the model asks for")
    add("--solver", choices=SOLVERS, help="default: what the model asks for")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("compare.png"))
    add("--steps-map", type=Path, metavar="FILE", help="active tokens of every step, last ratio")
    add("--gif", type=Path, metavar="FILE", help="the same as an animation")
    args = parser.parse_args()
    cli.at_least(parser, args, steps=1)
    return args


def psnr(image: Image.Image, reference: Image.Image) -> float:
    """Peak signal-to-noise ratio of two pictures of one size, in decibels."""
    difference = np.asarray(image, dtype=float) - np.asarray(reference, dtype=float)
    mse = np.square(difference).mean()
    return 10 * math.log10(255**2 / mse) if mse else math.inf


def steps_figure(out: minidit.Output) -> Image.Image:
    """The active tokens of every step, seven in a row."""
    size = (96 * out.images[0].width // out.images[0].height, 96)
    cells = [
        labelled(step_map(out.trace, t, size), f"{t}: {'regional' if s.regional else 'dense'}")
        for t, s in enumerate(out.trace.steps)
    ]
    return sheet([cells[i : i + 7] for i in range(0, len(cells), 7)])


if __name__ == "__main__":
    cli.run(main)
