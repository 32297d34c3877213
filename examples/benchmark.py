"""How long a regional step takes, as a share of a dense step, against its share of the FLOPs.

    python examples/benchmark.py                                  # SD3-medium's width, 2 layers
    python examples/benchmark.py --family lumina --layers 2 --size 1024 --dtype bfloat16
    python examples/benchmark.py --layers 24 --device cuda --dtype float16 --compile
    python examples/benchmark.py --run                            # whole runs instead of steps

Random weights at true width: time and memory do not depend on what the weights say. Dense and
regional steps take turns, so that a machine whose speed drifts slows all of them alike; the table
shows medians. So do whole runs: the default preset's, without regions, and the official sampler's.
"""

from __future__ import annotations

import cli  # isort: skip

import argparse
from dataclasses import replace
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from minidit import (
    Flux,
    FluxConfig,
    Lumina2,
    Lumina2Config,
    MMDiT,
    MMDiTConfig,
    NextDiT,
    NextDiTConfig,
    denoise,
)
from minidit.scheduler import SchedulerConfig
from ras import KVCache, RASConfig

VARIANTS = {  # the official configs
    "sd3": MMDiTConfig(),
    "sd3.5-medium": MMDiTConfig(
        pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))
    ),
    "sd3.5-large": MMDiTConfig(
        num_layers=38, num_attention_heads=38, caption_projection_dim=2432, qk_norm="rms_norm"
    ),
    "lumina": NextDiTConfig(),
    "flux": FluxConfig(guidance_embeds=True),
    "lumina2": Lumina2Config(),
}
NETWORKS = {
    MMDiTConfig: MMDiT, NextDiTConfig: NextDiT, FluxConfig: Flux, Lumina2Config: Lumina2,
}  # fmt: skip
TEXT_TOKENS = {
    "sd3": 333, "sd3.5-medium": 333, "sd3.5-large": 333, "lumina": 32, "flux": 512, "lumina2": 64,
}  # fmt: skip

RUNS = {  # steps, solver, regions
    "official Euler": (28, "euler", None),
    "corrected": (14, "corrected", None),
    "corrected, regions": (14, "corrected", RASConfig()),
}


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    device = cli.device_of(args)
    dtype = cli.dtype_of(args, device)
    step = Step(args, device, dtype)
    print(
        f"{args.family}, {args.layers} layers, {args.size} px, batch {args.batch}, {dtype}, "
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        + (", compiled" if args.compile else "")
    )
    if args.run:
        time_runs(step, args.repeats or 1)
    else:
        time_steps(step, args, args.repeats or 5)


def time_runs(step: Step, repeats: int) -> None:
    """Print the seconds of whole runs, and their share of the official run's."""
    step.run(1.0)  # warms up
    for how in RUNS.values() if step.compiled else ():
        step.draw(*how)
    times = {name: [] for name in RUNS}
    for _ in range(repeats):
        for name, how in RUNS.items():
            times[name].append(step.draw(*how))
    official = median(seconds for _, seconds in times["official Euler"])
    print("run                  steps   evaluations   seconds   time share")
    for name, (steps, *_) in RUNS.items():
        evaluations, seconds = times[name][0][0], median(seconds for _, seconds in times[name])
        share = seconds / official
        print(f"{name:20} {steps:5} {evaluations:13.2f} {seconds:9.1f} {share:12.1%}")


def time_steps(step: Step, args: argparse.Namespace, repeats: int) -> None:
    """Print the milliseconds of a dense step and of regional ones, and their share of it."""
    flops = {ratio: count_flops(args, ratio) for ratio in [1.0, *args.ratios]}
    rounds = {ratio: [] for ratio in flops}
    warm = 3 if step.compiled else 1  # rounds that are left out
    for _ in range(warm + repeats):
        for ratio, seconds in rounds.items():  # the dense step comes first and fills the cache
            seconds.append(step.run(ratio))
    times = {ratio: median(seconds[warm:]) for ratio, seconds in rounds.items()}
    print(f"cache: {step.cache.nbytes / 2**20:.1f} MiB for {step.tokens} image tokens")
    print("active   ms/step   time share   FLOP share   time / FLOP")
    for ratio, seconds in times.items():
        share, work = seconds / times[1.0], flops[ratio] / flops[1.0]
        print(f"{ratio:6.1%} {1000 * seconds:9.1f} {share:12.1%} {work:12.1%} {share / work:13.3f}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time dense and regional steps in turns.")
    add = parser.add_argument
    add("--family", choices=VARIANTS, default="sd3")
    add("--layers", type=int, default=2)
    add("--size", type=int, default=1024, help="pixels a side")
    add("--batch", type=int, default=2, help="2 is one picture with guidance (flux: 1)")
    add("--ratios", type=float, nargs="+", default=[0.75, 0.5, 0.25, 0.125])
    add("--repeats", type=int, help="5 if not given, of whole runs 1")
    add("--run", action="store_true", help="time whole runs instead of steps")
    add("--compile", action="store_true", help="the blocks, with torch.compile")
    cli.add_device_options(parser)
    args = parser.parse_args()
    if args.size < 16 or args.size % 16:
        parser.error(f"--size is {args.size}, must be a positive multiple of 16")
    cli.at_least(parser, args, layers=1, batch=1, repeats=1)
    if args.threads:
        torch.set_num_threads(args.threads)
    bad = [ratio for ratio in args.ratios if not 0 < ratio < 1]
    if bad:
        parser.error(f"--ratios has {bad[0]}, must be in (0, 1)")
    return args


def build(family: str, layers: int, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """A model of the official width with random weights and any number of layers."""
    changes = {"num_layers": layers}
    if family == "flux":
        changes["num_single_layers"] = 2 * layers  # as many a double block as the official 38
    if family == "lumina2":
        changes["num_refiner_layers"] = 1  # of 2, which are few beside the official 26 layers
    if family == "sd3.5-medium":
        changes["dual_attention_layers"] = tuple(range(min(layers, 13)))
    config = replace(VARIANTS[family], **changes)
    with torch.device(device):
        model = NETWORKS[type(config)](config)
    return model.to(dtype).eval().requires_grad_(False)


class Step:
    """A model, its inputs and cache, and the step that is timed."""

    def __init__(self, args, device: torch.device, dtype: torch.dtype) -> None:
        self.model = build(args.family, args.layers, device, dtype)
        self.compiled = args.compile and device.type != "meta"
        if self.compiled:
            cli.compile_blocks(self.model)
        config, side, B = self.model.config, args.size // 8, args.batch
        self.device, self.cache = device, KVCache()
        self.tokens = (side // config.patch_size) ** 2
        make = {"device": device, "dtype": dtype}
        channels = getattr(config, "latent_channels", config.in_channels)
        self.latents = torch.randn(B, channels, side, side, **make)
        self.sigma = torch.full((B,), 0.5, device=device)
        length = TEXT_TOKENS[args.family]
        if args.family in ("lumina", "lumina2"):
            width = config.cross_attention_dim if args.family == "lumina" else config.cap_feat_dim
            context = torch.randn(B, length, width, **make)
            mask = torch.ones(B, length, dtype=torch.bool, device=device)
            self.texts = {"context": context, "context_mask": mask}
        else:
            context = torch.randn(B, length, config.joint_attention_dim, **make)
            pooled = torch.randn(B, config.pooled_projection_dim, **make)
            self.texts = {"context": context, "pooled": pooled}
            if args.family == "flux":
                self.texts["guidance"] = 3.5
        self.cond = self.texts
        if hasattr(self.model, "prepare"):  # once a run, not once a step
            self.cond = self.model.prepare(**self.texts)

    def active(self, ratio: float) -> torch.Tensor | None:
        """A random set of active tokens, the same for every sample; None for all."""
        if ratio == 1:
            return None
        B, count = len(self.latents), max(1, round(ratio * self.tokens))
        rows = torch.randperm(self.tokens)[:count].sort().values
        return rows.expand(B, count).to(self.device)

    @torch.no_grad()
    def run(self, ratio: float) -> float:
        """Seconds of one step, dense with filling the cache or regional."""
        active = self.active(ratio)
        begin = cli.now(self.device)
        self.model(self.latents, self.sigma, **self.cond, active=active, cache=self.cache)
        return cli.now(self.device) - begin

    def draw(self, steps: int, solver: str, config: RASConfig | None) -> tuple[float, float]:
        """Evaluations and seconds of a whole run; an even batch is half negative prompts."""
        uncond, cond, count = None, self.texts, len(self.latents)
        if count % 2 == 0:
            uncond, cond = (
                {k: v.chunk(2)[i] if isinstance(v, torch.Tensor) else v for k, v in cond.items()}
                for i in (0, 1)
            )
            count //= 2
        sigmas = SchedulerConfig(shift=3.0).sigmas(steps, solver, self.tokens)
        begin = cli.now(self.device)
        _, trace = denoise(
            self.model, self.latents[:count], sigmas, cond, uncond, 7.0 if uncond else 1.0,
            ras=config, correct=solver == "corrected",
        )  # fmt: skip
        seconds = cli.now(self.device) - begin
        return steps * (trace.share if trace else 1), seconds


def count_flops(args: argparse.Namespace, ratio: float) -> int:
    """FLOPs of a step's matrix products, from their shapes: run on the meta device."""
    step = Step(args, torch.device("meta"), torch.float32)
    step.run(1.0)
    with FlopCounterMode(display=False) as counter:
        step.run(ratio)
    return counter.get_total_flops()


if __name__ == "__main__":
    cli.run(main)
