"""Prompt to picture, with Region-Adaptive Sampling.

    python examples/sample.py "a red apple on a sky blue background"
    python examples/sample.py "a fox on a teal background" --ras 0.25 --active-map map.png
    python examples/sample.py "a castle" --model stabilityai/stable-diffusion-3-medium-diffusers \\
        --device cuda --dtype bfloat16
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

import minidit
import ras
from cli import DTYPES, run
from minidit.scheduler import SOLVERS
from pictures import active_map, check_writable, save


def main() -> None:
    args = parse_args()
    for path in filter(None, (args.out, args.active_map)):
        check_writable(path)
    config = ras_config(args)
    width, height = args.size or (None, None)
    pipe = minidit.load(
        args.model, device=args.device, dtype=DTYPES[args.dtype], offload=args.offload,
        use_t5=not args.no_t5, extra=args.extra,
    )  # fmt: skip
    clock = StepClock(args.device)
    out = pipe(
        args.prompt, args.negative, height, width, args.steps, args.guidance, args.seed,
        num_images=args.n, ras=config, callback=clock, progress=True, solver=args.solver,
    )  # fmt: skip
    seconds = time.perf_counter() - clock.begin
    for i, image in enumerate(out.images):
        path = args.out if args.n == 1 else args.out.with_stem(f"{args.out.stem}-{i}")
        save(image, path)
        print(f"wrote {path} ({image.width}x{image.height}, seed {out.seed}, picture {i})")
    if args.active_map:
        save(active_map(out.images[0], out.trace), args.active_map)
        print(f"wrote {args.active_map}: share of the regional steps that computed each region")
    print(cost_line(out.trace, clock, seconds))
    if args.verbose:
        print(memory_line(pipe, args.device))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Draw a picture of a prompt.", formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("prompt", nargs="?", default="a red apple on a sky blue background")
    add(
        "--model",
        default="mini-lumina",
        help="mini-sd3, mini-lumina, folder, .safetensors or hub id",
    )
    add("--ras", default=None, metavar="RATIO|off", help="active share of a regional step")
    add("--ras-preset", default=None, metavar="NAME", help=f"one of {', '.join(ras.PRESETS)}")
    add("--active-map", type=Path, metavar="FILE", help="picture of how often regions were active")
    add("--steps", type=int, help="default: what the model asks for")
    add("--solver", choices=SOLVERS, help="euler, or corrected: second order at no cost")
    add("--size", type=size, metavar="WxH", help="pixels, e.g. 1024x768")
    add("--seed", type=int, default=0)
    add("--negative", default="", metavar="PROMPT", help="what the picture should not show")
    add("--guidance", type=float, help="1 is off, default: what the model asks for")
    add("--n", type=int, default=1, help="number of pictures")
    add("--dtype", choices=DTYPES, default="float32")
    add("--device", default="cpu", help="cpu, cuda or mps")
    add("--offload", action="store_true", help="keep only the running part on the device")
    add("--no-t5", action="store_true", help="leave out SD3's largest text encoder")
    add("--with", dest="extra", nargs="+", default=[], metavar="PATH", help="what a file lacks")
    add("--out", type=Path, default=Path("sample.png"))
    add("--verbose", action="store_true", help="print memory too")
    return parser.parse_args()


def size(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT, or one number for a square."""
    try:
        width, height = (int(part) for part in (text.split("x") * 2)[:2])
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size, e.g. 1024x768") from None
    return width, height


def ras_config(args: argparse.Namespace) -> ras.RASConfig | None:
    """The configuration that --ras and --ras-preset ask for; None is dense."""
    if args.ras == "off":
        if args.ras_preset or args.active_map:
            raise ValueError("--ras off leaves no regions: drop --ras-preset and --active-map")
        return None
    config = ras.RASConfig.preset(args.ras_preset or "default")
    if args.ras is None:
        return config
    try:
        ratio = float(args.ras)
    except ValueError:
        raise ValueError(f"--ras is {args.ras!r}, must be a number in (0, 1] or off") from None
    return config.with_ratio(ratio)


class StepClock:
    """A callback that notes how long each step took, dense or regional."""

    def __init__(self, device: str) -> None:
        self.device, self.dense, self.regional = device.split(":")[0], [], []
        self.begin = self.last = time.perf_counter()

    def __call__(self, step, sigma, latents, velocity, active) -> None:
        if self.device != "cpu":
            getattr(torch, self.device).synchronize()
        now = time.perf_counter()
        if step > 0:  # the first one includes encoding the prompt
            (self.dense if active is None else self.regional).append(now - self.last)
        self.last = now


def cost_line(trace: ras.Trace | None, clock: StepClock, seconds: float) -> str:
    """Work and time against the same number of dense steps; their time is this run's own dense
    steps' mean, so that no second run is needed."""
    if trace is None or not clock.regional:
        return f"cost: 100 % of the dense token-steps, {seconds:.1f} s in all"
    h, w = trace.grid
    full = len(trace.steps) * h * w
    line = f"cost: {trace.token_steps:,} of {full:,} token-steps ({trace.share:.0%} of dense)"
    line += f", {seconds:.1f} s in all"
    if clock.dense:
        dense = sum(clock.dense) / len(clock.dense)
        regional = sum(clock.regional) / len(clock.regional)
        line += f"; a regional step took {regional / dense:.0%} of a dense one"
    return line


def memory_line(pipe, device: str) -> str:
    """Bytes of the weights, and the peak that the device reports."""
    parts = {k: v for k, v in vars(pipe).items() if isinstance(v, torch.nn.Module)}
    sizes = {k: sum(p.nbytes for p in v.parameters()) / 2**20 for k, v in parts.items()}
    line = "weights: " + ", ".join(f"{k} {v:.0f} MiB" for k, v in sizes.items())
    expected = max(sizes.values()) if pipe.offload else sum(sizes.values())
    line += f"; expected on the device: {expected:.0f} MiB and activations"
    if device.startswith("cuda"):
        line += f"; measured peak: {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB"
    else:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak /= 2**20 if sys.platform == "darwin" else 2**10
        line += f"; measured peak of this process: {peak:.0f} MiB"
    return line


if __name__ == "__main__":
    run(main)
