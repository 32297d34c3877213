"""Train the embedded models: a small SD3 or Lumina-Next that draws scenes, all from nothing.

    npm install @lobehub/fluent-emoji-3d@1.1.0 unicode-emoji-json@0.9.0
    python examples/train.py vae        --run runs                  # instead of ours
    python examples/train.py psnr       --run runs                  # how much it keeps
    python examples/train.py scenes     --run runs --sizes 128 256  # drawn and encoded ahead
    python examples/train.py classifier --run runs                  # to measure with
    python examples/train.py text       --run runs --family lumina  # the text encoders alone
    python examples/train.py train      --run runs --family lumina --sizes 128 --steps 6000
    python examples/train.py train      --run runs --family lumina --sizes 256 --steps 12000
    python examples/train.py export     --run runs --family lumina --out my-lumina
    python examples/train.py measure    --run runs --model my-lumina
    python examples/train.py sheet      --model my-lumina

Every stage is a file of training/, and goes on where it was interrupted. A step's data, noise and
times are a function of seed and step number alone, so a resumed run makes the very steps of an
uninterrupted one.

Published models read prompts with encoders that others trained on much text. Ours learn from the
captions alone, in a stage of their own. After that the transformer learns the velocity of a
rectified flow, first on small pictures, where a step costs a fraction. Matrices are updated by Muon
(Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), everything else by AdamW.
"""

from __future__ import annotations

from cli import at_least, device_of, run, size  # isort: skip

import argparse
import os
from dataclasses import asdict, fields
from pathlib import Path

import torch

import minidit
from minidit.scheduler import SchedulerConfig
from pictures import check_writable
from ras import RASConfig
from training import latents, models
from training.classifier import train_classifier
from training.measure import held_out_cases, measure, vae_psnr
from training.optim import Plan
from training.scenes import Sprites, draw
from training.text import train_text
from training.transformer import draw_sheet, train
from training.vae import train_vae

PROMPTS = (
    "a red apple on a sky blue background",
    "a panda on a pink background",
    "a fox to the left of a red apple on a teal background",
    "two pizzas on a navy blue background",
    "a grinning face on a white background",
    "an octopus on a beige striped background",
    "a tiger face and a cactus on a lavender background",
    "a hamburger on a black background",
    "a castle on a sky blue to orange gradient background",
    "a strawberry above a cupcake on a yellow background",
    "three tulips on a lime green background",
    "a smiling face with sunglasses on a navy blue background",
    "a watermelon on a gray checkered background",
    "a unicorn on a purple to pink gradient background",
    "a rocket to the right of a robot on a navy blue background",
    "a guitar on a yellow background",
    "a soccer ball and a trophy on a green background",
    "two penguins on a red background",
    "a koala on an orange dotted background",
    "a sailboat below a rainbow on a pink background",
    "a banana on a purple background",
    "a red heart",
    "a crown, a teddy bear and a balloon on a magenta background",
    "a camera on a brown background",
)  # 13 of one thing, the rest of two or three
TWO_AT_MOST = {  # what a model of two things is asked for instead
    "three tulips on a lime green background": "two tulips on a lime green background",
    "a crown, a teddy bear and a balloon on a magenta background":
        "a teddy bear and a balloon on a magenta background",
}  # fmt: skip
STEPS = {"vae": 2500, "text": 2000, "train": 20000, "classifier": 3000}
BATCH = {"vae": 8, "text": 64, "train": 16, "classifier": 24}


def main() -> None:
    """Parse the command line and run one stage."""
    args = parse()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    device = device_of(args)
    if args.command in STEPS:
        plan = Plan(**{field.name: getattr(args, field.name) for field in fields(Plan)})
        given = {"device": device, "save_minutes": args.save_minutes, "workers": args.workers}
    if args.command == "vae":
        train_vae(args.run, args.packages, plan, **given)
    elif args.command == "scenes":
        vae, sprites = models.load_vae(args.run).to(device), Sprites(args.packages)
        latents.prepare(args.run / "data", vae, sprites, args.sizes, args.count, args.workers)
    elif args.command == "classifier":
        train_classifier(args.run, args.packages, plan, **given)
    elif args.command == "text":
        train_text(args.family, args.run, args.packages, plan, args.size, **given)
    elif args.command == "train":
        train(
            args.family, args.run, args.packages, plan, args.sizes, args.renew,
            sheet_minutes=args.sheet_minutes, compiled=args.compile,
            prompts=prompts_for(args.family) if args.sheet_minutes else (), **given,
        )  # fmt: skip
    elif args.command == "export":
        values = {field.name: getattr(args, field.name) for field in fields(SchedulerConfig)}
        models.export(args.family, args.run, args.out, SchedulerConfig(**values))
    elif args.command == "psnr":
        vae, sprites = models.load_vae(args.run).to(device), Sprites(args.packages)
        cases = held_out_cases(sprites.names, args.count, seed=1)
        for height, width in args.sizes:
            pictures = [draw(case.scene, sprites, height, width) for case in cases]
            print(f"{width}x{height}: {vae_psnr(vae, pictures):.1f} dB of {args.count} scenes")
    elif args.command == "sheet":
        check_writable(args.out)
        pipe = minidit.load(args.model, device)
        draw_sheet(pipe, prompts_for(pipe.family), args.out)
        print(f"wrote {args.out}")
    else:
        ras = RASConfig.preset(args.ras_preset) if args.ras_preset else None
        values = measure(
            args.model, args.run / "classifier.pt", args.packages, device, args.count, ras=ras,
            steps=args.steps, guidance=args.guidance, solver=args.solver,
        )  # fmt: skip
        print(f"{'':12s} {'drawn':>8s} {'real':>8s}")
        for name in values["real"]:
            both = (values[kind].get(name) for kind in ("drawn", "real"))
            print(f"{name:12s}", *("       -" if x is None else f"{x:8.3f}" for x in both))


def prompts_for(family: str) -> list[str]:
    """The fixed prompts, with no more things than the family's model knows."""
    instead = TWO_AT_MOST if models.MOST.get(family) == 2 else {}
    return [instead.get(prompt, prompt) for prompt in PROMPTS]


def sides(text: str) -> tuple[int, int]:
    """Height and width, as latents have them, of 256 or WIDTHxHEIGHT."""
    width, height = size(text)
    return height, width


def parse() -> argparse.Namespace:
    """The command line; wrong values are refused here, before any work."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str, family: bool = False) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        if name != "sheet":
            sub.add_argument("--run", type=Path, required=True, help="folder of all that is made")
            sub.add_argument("--packages", type=Path, default=Path("node_modules"))
        if family:
            sub.add_argument("--family", choices=models.PIXELS, required=True)
        sub.add_argument("--threads", type=int, default=os.cpu_count())
        sub.add_argument("--device", help="cpu, cuda or mps; default: the fastest that is there")
        if name in STEPS or name == "scenes":
            text = "processes that make the data ahead, e.g. all cores beside a GPU"
            sub.add_argument("--workers", type=int, default=0, help=text)
        if name in STEPS:
            for key, value in asdict(Plan(STEPS[name], BATCH[name])).items():
                sub.add_argument(f"--{key.replace('_', '-')}", type=type(value), default=value)
            # the last half by default; but how long train goes on is not known before its last size
            sub.set_defaults(cooldown=0 if name == "train" else None)
            sub.add_argument("--save-minutes", type=float, default=3)
        return sub

    command("vae", "train the autoencoder")
    sub = command("scenes", "compose and encode scenes ahead")
    sub.add_argument("--sizes", type=sides, nargs="+", required=True, help="256 or WIDTHxHEIGHT")
    sub.add_argument("--count", type=int, default=8000, help="scenes of each size")
    command("classifier", "train the classifier that measure asks")
    sub = command("text", "train the tokenizers and teach the text encoders", family=True)
    sub.add_argument("--size", type=sides, default=(128, 128))
    sub = command("train", "train the transformer", family=True)
    sub.add_argument("--sizes", type=sides, nargs="+", required=True, help="256 or WIDTHxHEIGHT")
    sub.add_argument("--renew", type=int, default=2, help="scenes that are new, each step")
    sub.add_argument("--sheet-minutes", type=float, default=30, help="0: no sheets")
    sub.add_argument("--compile", action="store_true", help="the blocks, with torch.compile")
    sub = command("export", "write a model in the official folder layout", family=True)
    sub.add_argument("--out", type=Path, required=True)
    for key, value in asdict(models.SCHEDULER).items():
        kind = {"type": float if value is None else type(value)}
        if isinstance(value, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        sub.add_argument(f"--{key.replace('_', '-')}", default=value, **kind)
    sub = command("measure", "print how good a model's pictures are")
    sub.add_argument("--model", type=Path, required=True)
    sub.add_argument("--count", type=int, default=150)
    sub.add_argument("--ras-preset", help="draw with RAS, default: dense")
    for key, kind in (("steps", int), ("guidance", float), ("solver", str)):
        sub.add_argument(f"--{key}", type=kind, help="default: what the model asks for")
    sub = command("psnr", "print how near decoded scenes are to those that were encoded")
    sub.add_argument("--sizes", type=sides, nargs="+", default=[(256, 256), (320, 320)])
    sub.add_argument("--count", type=int, default=100, help="held-out scenes")
    sub = command("sheet", "draw the fixed prompts with a model, all with seed 0")
    sub.add_argument("--model", type=Path, required=True)
    sub.add_argument("--out", type=Path, default=Path("sheet.png"))
    args = parser.parse_args()
    if getattr(args, "cooldown", 0) is None:
        args.cooldown = args.steps // 2
    latents.check_sizes(getattr(args, "sizes", ()))
    at_least(parser, args, steps=1, batch=1, warmup=1, cooldown=0, count=1, renew=0, workers=0)
    return args


if __name__ == "__main__":
    run(main)
