"""Train the embedded models: a small SD3 or Lumina-Next, text encoders included, on a CPU.

    npm install @lobehub/fluent-emoji-3d@1.1.0 unicode-emoji-json@0.9.0
    python examples/train.py vae     --family sd3 --run runs/sd3    # the autoencoder
    python examples/train.py prepare --family sd3 --run runs/sd3    # tokenizers and latents
    python examples/train.py text    --family sd3 --run runs/sd3    # the text encoders alone
    python examples/train.py train   --family sd3 --run runs/sd3 --size 128 --steps 6000
    python examples/train.py train   --family sd3 --run runs/sd3 --size 256 --steps 20000
    python examples/train.py export  --family sd3 --run runs/sd3 --out my-sd3
    python examples/train.py measure --model my-sd3
    python examples/train.py sheet   --model my-sd3

`vae` and `train` go on where they were interrupted; `text` takes minutes. A step's data, noise and
times are a function of seed and step number alone, so a resumed run makes the very steps of an
uninterrupted one. `vae --init MODEL --steps 0` takes over the autoencoder of another model and only
measures the scale of its latents again: so did our Lumina-Next with our SD3's.

Published models read prompts with encoders that others trained on much text. Ours learn from the
captions alone, in a stage of their own (`text`): to predict a thumbnail of the picture. After that
the transformer learns the velocity of a rectified flow, first at 128 pixels, where a step costs a
quarter, then at 256. Matrices are updated by Muon (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon), everything else by AdamW.

What the stages do is in training/; here are the last two of them and the command line.

B batch, C latent channels, h and w latent size.
"""

from __future__ import annotations

import interrupt  # noqa: F401  # isort: skip

import argparse
import copy
import math
import os
import random
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

# threads that wait must sleep: spinning ones make a shared machine several times slower
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minidit
from cli import at_least, run
from minidit.scheduler import SchedulerConfig
from pictures import check_writable, sheet
from pictures import save as save_image
from ras import RASConfig
from training import emoji
from training.autoencoder import prepare, train_vae
from training.files import export, save
from training.measuring import measure
from training.models import PIXELS, SCHEDULER, encode, new_pipeline, place, trainable
from training.optim import PlainAttention, Plan, autocast, optimisers, update

PROMPTS = (
    "red apple on a sky blue background",
    "panda on a pink background",
    "grinning face on a white background",
    "pizza on a teal background",
    "tiger face on a lavender background",
    "hamburger on a black background",
    "red heart",
    "fox on a lime green background",
    "strawberry on a yellow background",
    "smiling face with sunglasses on a navy blue background",
    "watermelon on a beige background",
    "unicorn on a purple background",
    "rocket on a navy blue background",
    "guitar on a yellow background",
    "soccer ball on a green background",
    "octopus on a beige background",
    "cactus on an orange background",
    "robot on a magenta background",
    "sailboat on a pink background",
    "castle on a sky blue background",
    "banana on a purple background",
    "penguin on a red background",
    "crown on a gray background",
    "camera on a brown background",
)  # fmt: skip


# ---------------------------------------------------------------- text encoders


def train_text(
    family: str, run: Path, steps: int, batch: int, size: int = 128, seed: int = 0
) -> None:
    """Teach the text encoders what the pictures look like, before there is a transformer.

    The official encoders come trained on more text than there is in our captions; a transformer
    that trains together with raw ones finds out very slowly that names matter. So each kind of
    their output learns first to predict, by one linear map, a thumbnail of the picture: its latents
    at 8 x 8. Nothing but the encoders is kept, in text.pt of the run.
    """
    torch.manual_seed(seed)
    data = emoji.Latents(run / "data", family, size)
    pipe = new_pipeline(family, run)
    encoders = trainable(pipe).train().requires_grad_(True)
    del encoders["transformer"]
    sizes = [view.shape[1] for view in text_views(encode(pipe, [""]))]
    heads = nn.ModuleList(nn.Linear(size, 64 * data.array.shape[2]) for size in sizes)
    muon, adam = optimisers(pipe, encoders, heads)
    plan, started, losses = Plan(steps=steps, cooldown=steps // 3), time.time(), []
    for step in range(steps):
        pictures, captions = data.batch(batch, random.Random(f"text/{seed}/{step}"))
        target = F.adaptive_avg_pool2d(torch.from_numpy(pictures), 8).flatten(1)  # (B, 64 * C)
        with autocast(), PlainAttention():
            views = text_views(encode(pipe, captions))
            drawn = [head(view) for head, view in zip(heads, views, strict=True)]
        loss = sum(F.mse_loss(one.float(), target) for one in drawn) / len(heads)
        loss.backward()
        update(muon, adam, plan, step)
        losses.append(loss.detach())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            mean, losses = torch.stack(losses).mean().item(), []
            left = (time.time() - started) / (step + 1) * (steps - step - 1) / 60
            print(f"step {step + 1:6d}  loss {mean:.4f}  {left:.1f} min left", flush=True)
    save(encoders.state_dict(), run / "text.pt")


def text_views(cond: dict[str, Tensor]) -> list[Tensor]:
    """The conditioning as vectors (B, size): SD3's pooled state and the mean of each window, or
    the mean of Lumina's states."""
    if "pooled" in cond:
        return [cond["pooled"], *(half.mean(dim=1) for half in cond["context"].chunk(2, dim=1))]
    mask = cond["context_mask"][..., None]  # (B, L, 1)
    return [(cond["context"] * mask).sum(dim=1) / mask.sum(dim=1)]


# ---------------------------------------------------------------- transformer


class Trainer:
    """Networks, their running average and the optimisers; `state` is all that a run has to keep."""

    def __init__(self, pipe: Any, plan: Plan) -> None:
        self.pipe, self.plan, self.steps = pipe, plan, 0
        self.networks = trainable(pipe).train().requires_grad_(False)
        learning = self.networks if plan.joint else self.networks["transformer"]
        self.muon, self.adam = optimisers(pipe, learning.requires_grad_(True))
        self.average = copy.deepcopy(self.networks).requires_grad_(False).eval()

    def step(self, data: emoji.Latents) -> Tensor:
        """One update; returns its loss, detached."""
        plan = self.plan
        rng = random.Random(f"{plan.seed}/{self.steps}")
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        pictures, captions = data.batch(plan.batch, rng)
        captions = ["" if rng.random() < plan.empty else text for text in captions]

        clean = torch.from_numpy(pictures)  # (B, C, h, w)
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.randn(plan.batch, generator=generator).sigmoid()
        sigma = plan.shift * t / (1 + (plan.shift - 1) * t)  # (B,)
        noisy = torch.lerp(clean, noise, sigma[:, None, None, None])
        with autocast(), PlainAttention():
            cond = encode(self.pipe, captions)
            velocity = self.pipe.transformer(noisy, sigma, **cond)
        loss = F.mse_loss(velocity.float(), noise - clean)

        loss.backward()
        update(self.muon, self.adam, plan, self.steps)
        self.steps += 1
        # an average over about the last tenth of the run, however long it gets (Karras et al. 2024)
        weight = min(1.0, 8 / (self.steps + 1))
        torch._foreach_lerp_(
            list(self.average.parameters()), list(self.networks.parameters()), weight
        )
        return loss.detach()

    def averaged(self) -> Any:
        """The pipeline with the averaged networks, for drawing."""
        return replace(self.pipe, **dict(self.average.items()))

    def state(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "networks": self.networks.state_dict(),
            "average": self.average.state_dict(),
            "muon": self.muon.momentum,
            "adam": self.adam.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.networks.load_state_dict(state["networks"])
        self.average.load_state_dict(state["average"])
        for shape, momentum in state["muon"].items():
            self.muon.momentum[shape].copy_(momentum)
        self.adam.load_state_dict(state["adam"])


def train(family: str, run: Path, plan: Plan, save_minutes: float, sheet_minutes: float) -> None:
    """Train until plan.steps, with checkpoints and sample sheets on the way."""
    torch.manual_seed(plan.seed)
    data = emoji.Latents(run / "data", family, plan.size)
    pipe = new_pipeline(family, run)
    if (run / "text.pt").is_file():
        trainable(pipe).load_state_dict(torch.load(run / "text.pt"), strict=False)
    trainer = Trainer(pipe, plan)
    checkpoint = run / "checkpoint.pt"
    if checkpoint.is_file():
        trainer.load(torch.load(checkpoint, map_location="cpu"))
        print(f"going on from step {trainer.steps} of {checkpoint}")
    for pipe in (trainer.pipe, trainer.averaged()):
        place(pipe, plan.size)
    size = sum(p.numel() for p in trainer.networks.parameters())
    print(f"{family}: {size / 1e6:.1f} M parameters, {len(data.names)} names, {plan}", flush=True)

    losses: list[Tensor] = []
    started = saved = drawn = logged = time.time()
    while trainer.steps < plan.steps:
        losses.append(trainer.step(data))
        now, done = time.time(), trainer.steps >= plan.steps
        if trainer.steps % 50 == 0 or done:
            count = len(losses)
            loss, losses = torch.stack(losses).mean().item(), []
            pace, logged = (now - logged) / count, now
            left = pace * (plan.steps - trainer.steps) / 60
            print(
                f"step {trainer.steps:6d}  loss {loss:.4f}  {pace:.3f} s a step  "
                f"{(now - started) / 60:.1f} min run, {left:.1f} min left",
                flush=True,
            )
            if not math.isfinite(loss):
                raise RuntimeError(f"the loss is {loss} at step {trainer.steps}; lower --muon-lr")
        if done or now - saved > 60 * save_minutes:
            save(trainer.state(), checkpoint)
            saved = time.time()
        if done or now - drawn > 60 * sheet_minutes:
            path = run / f"sheets/{plan.size}-{trainer.steps:06d}.png"
            draw_sheet(trainer.averaged(), PROMPTS, plan.size, path, steps=14)
            drawn = time.time()
            print(f"wrote {path}", flush=True)


def draw_sheet(
    pipe: Any, prompts: tuple[str, ...], size: int, path: Path, steps: int | None = None
) -> None:
    """One picture a prompt, all from the same noise, as one image."""
    columns = 6
    with autocast():
        images = pipe(list(prompts), height=size, width=size, seed=0, steps=steps).images
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(sheet([images[i : i + columns] for i in range(0, len(images), columns)]), path)


# ---------------------------------------------------------------- command line


def main() -> None:
    """Parse the command line and run one command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        if name not in ("measure", "sheet"):
            sub.add_argument("--family", choices=("sd3", "lumina"), default="sd3")
            sub.add_argument("--run", type=Path, required=True, help="folder of this training run")
        sub.add_argument("--packages", type=Path, default=Path("node_modules"))
        sub.add_argument("--threads", type=int, default=os.cpu_count())
        return sub

    sub = command("vae", "train the autoencoder")
    sub.add_argument("--steps", type=int, default=12000)
    sub.add_argument("--batch", type=int, default=16)
    sub.add_argument("--lr", type=float, default=2e-3)
    sub.add_argument("--init", type=Path, help="folder of a model whose VAE to start from")

    sub = command("prepare", "train the tokenizers and encode the pictures")
    sub.add_argument("--sizes", type=int, nargs="+", default=[128, 256])
    sub.add_argument(
        "--colours", type=int, default=emoji.SHOWN, help="colours a name, at most %(default)s"
    )

    sub = command("text", "teach the text encoders what the pictures look like")
    sub.add_argument("--steps", type=int, default=1500)
    sub.add_argument("--batch", type=int, default=128)

    sub = command("train", "train the transformer with its text encoders")
    for name, value in asdict(Plan()).items():
        sub.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    sub.add_argument("--save-minutes", type=float, default=3)
    sub.add_argument("--sheet-minutes", type=float, default=10)

    sub = command("export", "write a model in the official folder layout")
    sub.add_argument("--out", type=Path, required=True)
    sub.add_argument("--shift", type=float, default=SCHEDULER.shift)
    sub.add_argument("--default-steps", type=int, default=SCHEDULER.default_steps)
    sub.add_argument("--default-guidance", type=float, default=SCHEDULER.default_guidance)

    sub = command("measure", "print how good a model's pictures are")
    sub.add_argument("--model", type=Path, required=True)
    sub.add_argument("--count", type=int, default=200)
    sub.add_argument("--ras-preset", help="draw with RAS, default: dense")
    sub.add_argument("--steps", type=int, help="default: what the model asks for")
    sub.add_argument("--guidance", type=float, help="default: what the model asks for")

    sub = command("sheet", "draw the fixed prompts with a model, all with seed 0")
    sub.add_argument("--model", required=True)
    sub.add_argument("--out", type=Path, default=Path("sheet.png"))

    args = parser.parse_args()
    fewest = 0 if args.command == "vae" else 1  # a VAE taken over needs none
    at_least(parser, args, threads=1, steps=fewest, batch=1, warmup=1, cooldown=0)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    if args.command == "vae":
        train_vae(args.family, args.run, args.packages, args.steps, args.batch, args.lr, args.init)
    elif args.command == "prepare":
        prepare(args.family, args.run, args.packages, args.sizes, args.colours)
    elif args.command == "text":
        train_text(args.family, args.run, args.steps, args.batch)
    elif args.command == "train":
        plan = Plan(**{name: getattr(args, name) for name in asdict(Plan())})
        train(args.family, args.run, plan, args.save_minutes, args.sheet_minutes)
    elif args.command == "export":
        scheduler = SchedulerConfig(
            shift=args.shift,
            default_steps=args.default_steps,
            default_guidance=args.default_guidance,
        )
        export(args.family, args.run, args.out, scheduler)
    elif args.command == "sheet":
        check_writable(args.out)
        draw_sheet(minidit.load(args.model), PROMPTS, PIXELS, args.out)
        print(f"wrote {args.out}")
    else:
        ras = RASConfig.preset(args.ras_preset) if args.ras_preset else None
        values = measure(args.model, args.packages, args.count, ras, args.steps, args.guidance)
        for name, value in values.items():
            print(f"{name:12s} {value:.3f}")


if __name__ == "__main__":
    run(main)
