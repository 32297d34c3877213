"""The stage `train`: the transformer learns the velocity of a rectified flow.

B batch, C latent channels, h and w latent size.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minidit.flow import shifted
from pictures import save as save_image
from pictures import sheet
from training import models
from training.latents import Latents
from training.loop import Loop, follow
from training.optim import Optimiser, PlainAttention, Plan, autocast
from training.scenes import Sprites, caption

SHIFT = 3.0  # of training's noise levels, towards noise: where the caption decides
EMPTY = 0.1  # share of captions left empty, for guidance
RENEWALS = 50  # steps between renewals of the data files


class Trainer:
    """The networks, their running average and the optimiser: `parts` is all that a run keeps."""

    def __init__(self, family: str, pipe: Any, plan: Plan, joint: bool = False) -> None:
        self.pipe, self.plan, self.device = pipe, plan, pipe.device
        self.most, self.joint = models.MOST[family], joint
        self.networks = models.trainable(pipe).train()
        for name, network in self.networks.items():
            if name.startswith("text") and not joint:
                network.requires_grad_(False)
        self.average = copy.deepcopy(self.networks).requires_grad_(False).eval()
        self.optimiser = Optimiser(self.networks.named_parameters())
        self.parts = {"networks": self.networks, "average": self.average}
        self.parts["optimiser"] = self.optimiser

    def step(self, step: int, data: Sequence[Latents]) -> Tensor:
        """One update on scenes of one of the sizes; returns its loss."""
        batch = self.plan.batch
        rng = random.Random(f"train/{self.plan.seed}/{step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        pictures, scenes = rng.choice(data).batch(batch, rng, self.most)
        captions = ["" if rng.random() < EMPTY else caption(scene, rng) for scene in scenes]

        clean = torch.from_numpy(pictures)  # (B, C, h, w)
        noise = torch.randn(clean.shape, generator=generator)
        sigma = noise_levels(batch, generator)
        noisy = torch.lerp(clean, noise, sigma[:, None, None, None])
        noisy, sigma, target = (x.to(self.device) for x in (noisy, sigma, noise - clean))
        with autocast(self.device), PlainAttention():
            with torch.set_grad_enabled(self.joint):
                cond = self.pipe.encode(captions)
            velocity = self.pipe.transformer(noisy, sigma, **cond)
        loss = F.mse_loss(velocity.float(), target)
        loss.backward()
        self.optimiser.step(self.plan, step)
        follow(self.average, self.networks, step)
        return loss

    def averaged(self) -> Any:
        """The pipeline with the averaged networks, for drawing."""
        return replace(self.pipe, **dict(self.average.items()))


def noise_levels(count: int, generator: torch.Generator) -> Tensor:
    """(count,) in (0, 1): logit-normal as SD3's, moved towards noise."""
    return shifted(torch.randn(count, generator=generator).sigmoid(), SHIFT)


def train(
    family: str, run: Path, packages: Path, plan: Plan, sizes: Sequence[tuple[int, int]],
    renew: int, device: torch.device, joint: bool = False, save_minutes: float = 3.0,
    sheet_minutes: float = 20.0, prompts: Sequence[str] = (),
) -> None:  # fmt: skip
    """Train until plan.steps, on all sizes alike; a sheet of the prompts is drawn now and then.

    `renew` scenes of the files are new each step; 0 leaves the files alone, which a second training
    run on the same files must.
    """
    torch.manual_seed(plan.seed)
    sprites = Sprites(packages)
    data = [Latents(run / "data", *size, sprites.names) for size in sizes]
    pipe = models.new_pipeline(family, run, device)
    text = run / family / "text.pt"
    if text.is_file():
        models.trainable(pipe).load_state_dict(torch.load(text), strict=False)
    trainer = Trainer(family, pipe, plan, joint)
    loop = Loop(run / family / "checkpoint.pt", plan.steps, trainer.parts, save_minutes)
    for one in (trainer.pipe, trainer.averaged()):
        models.place(one, sizes[0][0])
    count = sum(p.numel() for p in trainer.networks.parameters())
    print(f"{family}: {count / 1e6:.1f} M parameters, {sizes}, {plan}", flush=True)
    drawn = time.time()
    for step in loop:
        if renew and (step % RENEWALS == 0 or step == loop.first):
            for one in data:
                one.renew(pipe.vae, sprites, step // RENEWALS * RENEWALS * renew // len(data))
        loop.log(trainer.step(step, data))
        if prompts and (step + 1 == plan.steps or time.time() - drawn > 60 * sheet_minutes):
            height, width = sizes[0]
            path = run / family / f"sheets/{height}x{width}-{step + 1:06d}.png"
            draw_sheet(trainer.averaged(), prompts, path, steps=14, height=height, width=width)
            drawn = time.time()
            print(f"wrote {path}", flush=True)


def draw_sheet(
    pipe: Any, prompts: Sequence[str], path: Path, steps: int | None = None, **size: int
) -> None:
    """One picture a prompt, all with seed 0, as one image of six columns."""
    with autocast(pipe.device):
        images = [pipe(prompt, seed=0, steps=steps, **size).images[0] for prompt in prompts]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(sheet([images[i : i + 6] for i in range(0, len(images), 6)]), path)
