"""Prompt to picture, with Region-Adaptive Sampling.

    python examples/sample.py "a red apple on a sky blue background"
    python examples/sample.py "a fox on a teal background" --ras 0.25 --active-map map.png
    python examples/sample.py "a panda on a pink background" --image sample.png --mask mask.png
    python examples/sample.py "a castle" --model stabilityai/stable-diffusion-3-medium-diffusers
    torchrun --nproc-per-node 4 examples/sample.py --prompts prompts.txt --out pictures/p.png

A PNG carries in its metadata what it was drawn with.
"""

from __future__ import annotations

import cli  # isort: skip

import argparse
import sys
from pathlib import Path
from statistics import mean

import torch
from PIL import Image

import minidit
import ras
from minidit.scheduler import SOLVERS
from pictures import check_outputs, heat_image, save, sheet

PROMPT = "a red apple on a sky blue background"
FEW_STEPS = 12  # a model that asks for fewer has none to spare for stale tokens


def main() -> None:
    args = parse_args()
    prompts = cli.read_lines(args.prompts) if args.prompts else [args.prompt or PROMPT]
    paths = [out_paths(args, line) for line in range(len(prompts))]
    check_outputs(args.active_map, *(path for some in paths for path in some))
    config, pictures = ras_config(args), source_pictures(args)
    pipe = cli.load_model(args, offload=args.offload, use_t5=not args.no_t5, extra=args.extra)
    if args.no_t5 and pipe.family != "sd3":
        raise ValueError(f"--no-t5 is for SD3, and {args.model} is not of that family")
    if too_few_steps(args, pipe):
        print(
            f"RAS is off: {args.model} draws in {pipe.scheduler.default_steps} steps, which leaves "
            "none to spare (--ras 0.5 turns it on)"
        )
        config = None
    process, processes = cli.share()
    for line in range(process, len(prompts), processes):
        draw(args, pipe, prompts[line], paths[line], config, pictures)
    if args.verbose:
        print(memory_line(pipe))


def draw(
    args: argparse.Namespace,
    pipe: minidit.Pipeline,
    prompt: str,
    paths: list[Path],
    config: ras.RASConfig | ras.Upstream | ras.Given | None,
    pictures: dict[str, Image.Image],
) -> None:
    """Draw the pictures of a prompt, write them, and say what they cost."""
    clock = StepClock(pipe.device)
    width, height = args.size or (None, None)
    out = pipe(
        prompt, negative_prompt=args.negative, height=height, width=width, steps=args.steps,
        guidance=args.guidance, seed=args.seed, num_images=args.n, ras=config,
        solver=args.solver, callback=clock, progress=True, strength=args.strength, **pictures,
    )  # fmt: skip
    seconds = cli.now(pipe.device) - clock.begin
    defaults = pipe.scheduler
    about = {
        "prompt": prompt,
        "negative prompt": args.negative,
        "seed": out.seed,
        "steps": clock.steps,
        "solver": args.solver or defaults.default_solver,
        "guidance": defaults.default_guidance if args.guidance is None else args.guidance,
        "RAS": config or "off",
        **{name: getattr(args, name) for name in ("image", "mask", "strength") if pictures},
        "model": args.model,
        "Software": f"minidit {minidit.__version__}",
    }
    for i, (image, path) in enumerate(zip(out.images, paths, strict=True)):
        save(image, path, about | {"picture": i})
        print(f"wrote {path} ({image.width}x{image.height}, seed {out.seed}, picture {i})")
    if args.active_map:
        heat = heat_image(out.trace.heat(), out.images[0].size)
        save(sheet([[out.images[0], heat]]), args.active_map)
        print(f"wrote {args.active_map}: share of the regional steps that computed each region")
    print(cost_line(out.trace, clock, seconds))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw a picture of a prompt.")
    add = parser.add_argument
    add("prompt", nargs="?", help=f"default: {PROMPT}")
    add("--prompts", type=Path, metavar="FILE", help="a picture of every line instead")
    cli.add_model_options(parser)
    add("--ras", metavar="RATIO|off", help="active share of a regional step")
    add("--ras-preset", metavar="NAME", help=f"one of {', '.join(ras.PRESETS)}")
    add("--active-map", type=Path, metavar="FILE", help="picture of how often regions were active")
    add("--image", type=Path, metavar="FILE", help="a picture to redraw")
    add("--mask", type=Path, metavar="FILE", help="white is drawn anew, black stays")
    add("--strength", type=float, help="of redrawing, in (0, 1]; default: 0.6, with a mask 1")
    add("--steps", type=int, help="default: what the model asks for")
    add("--solver", choices=SOLVERS, help="default: what the model asks for")
    add("--size", type=cli.size, metavar="WxH", help="pixels, e.g. 1024x768")
    add("--seed", type=cli.seed, default=0, help="a number (default 0), or random")
    add("--negative", default="", metavar="PROMPT", help="what the picture should not show")
    add("--guidance", type=float, help="1 is off, default: what the model asks for")
    add("--n", type=int, default=1, help="number of pictures of the prompt")
    add("--offload", action="store_true", help="keep only the running part on the device")
    add("--no-t5", action="store_true", help="leave out SD3's largest text encoder")
    add("--with", dest="extra", nargs="+", default=[], metavar="PATH", help="what a file lacks")
    add("--out", type=Path, default=Path("sample.png"), help="-0, -1, ... are added for several")
    add("--verbose", action="store_true", help="print memory too")
    args = parser.parse_args()
    cli.at_least(parser, args, n=1, steps=1)
    for other in ("prompt", "active_map"):
        if args.prompts and getattr(args, other):
            parser.error(f"--prompts and {other.replace('_', ' ')} are given, must be one of them")
    return args


def out_paths(args: argparse.Namespace, line: int) -> list[Path]:
    """Where the pictures of a prompt go: --out, numbered where there are several."""
    path = args.out.with_stem(f"{args.out.stem}-{line}") if args.prompts else args.out
    return [path.with_stem(f"{path.stem}-{i}") for i in range(args.n)] if args.n > 1 else [path]


def source_pictures(args: argparse.Namespace) -> dict[str, Image.Image]:
    """The pictures of --image and --mask, by these names."""
    found = {}
    for name in ("image", "mask"):
        path = getattr(args, name)
        if path is not None:
            found[name] = Image.open(path)
            found[name].load()  # a broken file is refused now
    return found


def ras_config(args: argparse.Namespace) -> ras.RASConfig | ras.Upstream | ras.Given | None:
    """The configuration that --ras and --ras-preset ask for; None is dense. Under a mask the region
    is given."""
    if args.ras == "off":
        if args.ras_preset or args.active_map:
            raise ValueError("--ras off leaves no regions: drop --ras-preset and --active-map")
        return None
    if args.mask and not (args.ras or args.ras_preset):
        return ras.Given()
    config = ras.RASConfig.preset(args.ras_preset or "default")
    if args.ras is None:
        return config
    try:
        ratio = float(args.ras)
    except ValueError:
        raise ValueError(f"--ras is {args.ras!r}, must be a number in (0, 1] or off") from None
    return config.with_ratio(ratio)


def too_few_steps(args: argparse.Namespace, pipe: minidit.Pipeline) -> bool:
    """Whether this is a run of a few-step model (FLUX schnell, SD3.5 turbo) with RAS by default."""
    asked = args.ras or args.ras_preset or args.active_map
    steps = args.steps or pipe.scheduler.steps(args.solver or pipe.scheduler.default_solver)
    return not asked and pipe.scheduler.default_steps < FEW_STEPS and steps < FEW_STEPS


class StepClock:
    """A callback that notes how long each step took, dense or regional."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.steps = device, 0
        self.dense: list[float] = []
        self.regional: list[float] = []
        self.begin = self.last = cli.now(device)

    def __call__(self, step, sigma, latents, velocity, active) -> None:
        now = cli.now(self.device)
        if step > 0:  # the first one includes encoding the prompt
            (self.dense if active is None else self.regional).append(now - self.last)
        self.last, self.steps = now, step + 1


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
        share = mean(clock.regional) / mean(clock.dense)
        line += f"; a regional step took {share:.0%} of a dense one"
    return line


def memory_line(pipe: minidit.Pipeline) -> str:
    """Bytes of the weights, and the peak that the device reports."""
    parts = {k: v for k, v in vars(pipe).items() if isinstance(v, torch.nn.Module)}
    sizes = {k: sum(p.nbytes for p in v.parameters()) / 2**20 for k, v in parts.items()}
    line = "weights: " + ", ".join(f"{k} {v:.0f} MiB" for k, v in sizes.items())
    expected = max(sizes.values()) if pipe.offload else sum(sizes.values())
    line += f"; expected on the device: {expected:.0f} MiB and activations"
    if pipe.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(pipe.device)
        return f"{line}; measured peak: {peak / 2**20:.0f} MiB"
    try:
        import resource
    except ImportError:  # not on Windows
        return line
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak /= 2**20 if sys.platform == "darwin" else 2**10
    return f"{line}; measured peak of this process: {peak:.0f} MiB"


if __name__ == "__main__":
    cli.run(main)
