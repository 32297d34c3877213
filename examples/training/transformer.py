"""The stage `train`: the transformer learns the velocity of a rectified flow.

B batch, C latent channels, h and w latent size.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cli import compile_blocks
from minidit.flow import shifted
from pictures import save as save_image
from pictures import sheet
from training import models
from training.latents import CAPTIONS, Latents, Texts, scene_caption
from training.layout import SIGMA, layout_codes, write_layout
from training.loop import Loop, ahead, follow
from training.optim import Optimiser, Plan, Recorded, autocast, plain_attention_on, sent
from training.scenes import Sprites

SHIFT = 3.0  # of training's noise levels, towards noise: where the caption decides
LAYOUT = 0.4  # share of them that lie evenly where the noise says the layout
EMPTY = 0.1  # share of captions left empty, for guidance
RENEWALS = 50  # steps between renewals of the data files


@dataclass(frozen=True)
class Choice:
    """What a step is made on: slots of one of the files, a caption of each (`Texts.of`), what the
    noise says of each (`layout_codes`), and the seed of the noise."""

    which: int
    slots: list[int]
    captions: list[int]
    codes: list[list[float]]
    seed: int


class Trainer:
    """The networks, their running average and the optimiser: `parts` is all that a run keeps."""

    def __init__(self, family: str, pipe: Any, plan: Plan) -> None:
        self.pipe, self.plan, self.device = pipe, plan, pipe.device
        self.most = models.MOST[family]
        self.networks = models.trainable(pipe).train()
        for name, network in self.networks.items():
            if name.startswith("text"):
                network.requires_grad_(False)
        self.average = copy.deepcopy(self.networks).requires_grad_(False).eval()
        self.optimiser = Optimiser(self.networks.named_parameters())
        self.parts = {"networks": self.networks, "average": self.average}
        self.parts["optimiser"] = self.optimiser
        self.gradients = self.backward
        if self.device.type == "cuda":
            self.gradients = Recorded(self.backward, self.pipe.transformer.parameters())

    def choose(self, step: int, data: Sequence[Latents]) -> Choice:
        """What a step is made on: scenes of one of the files, a caption and the layout of each."""
        rng = random.Random(f"train/{self.plan.seed}/{step}")
        which = rng.choices(range(len(data)), [len(file) for file in data])[0]
        file = data[which]
        slots, scenes = file.choose(self.plan.batch, rng, self.most)
        captions, codes = [], []
        for slot, scene in zip(slots, scenes, strict=True):
            k, empty = rng.randrange(CAPTIONS), rng.random() < EMPTY
            captions.append(-1 if empty else CAPTIONS * slot + k)
            text = "" if empty else scene_caption(scene, int(file.numbers[slot]), k)
            codes.append(layout_codes(scene, text, file.aspect, rng))
        return Choice(which, slots, captions, codes, rng.getrandbits(63))

    def step(
        self, step: int, choice: Choice, data: Sequence[Latents], texts: Sequence[Texts]
    ) -> Tensor:
        """One update; returns its loss."""
        generator = torch.Generator(self.device).manual_seed(choice.seed)
        clean = data[choice.which].tensor[sent(choice.slots, self.device)].float()  # (B, C, h, w)
        noise = torch.randn(clean.shape, generator=generator, device=self.device)
        sigma = noise_levels(len(clean), generator)
        noise = write_layout(noise, sent(choice.codes, self.device), sigma)
        noisy = torch.lerp(clean, noise, sigma[:, None, None, None])
        cond = texts[choice.which].of(sent(choice.captions, self.device))
        loss = self.gradients(velocity=noise - clean, latents=noisy, sigma=sigma, **cond)
        self.optimiser.step(self.plan, step)
        follow(self.average, self.networks, step)
        return loss

    def backward(self, velocity: Tensor, **inputs: Tensor) -> Tensor:
        """Leaves the gradients of the velocity's mean squared error, which it returns."""
        with autocast(self.device), plain_attention_on(self.device):
            found = self.pipe.transformer(**inputs)
        loss = F.mse_loss(found.float(), velocity)
        loss.backward()
        return loss.detach()

    def compile(self) -> None:
        """Compile the transformer's blocks, which are alike: one of them is compiled for all."""
        network = self.pipe.transformer
        compile_blocks(network, dynamic=False)
        # under autocast it would give the first block, and that one alone, half precision
        network.patch_embed.register_forward_hook(lambda _, given, made: made.float())

    def averaged(self) -> Any:
        """The pipeline with the averaged networks, for drawing."""
        return replace(self.pipe, **dict(self.average.items()))


def noise_levels(count: int, generator: torch.Generator) -> Tensor:
    """(count,) in (0, 1): logit-normal as SD3's, moved towards noise, and the first of them
    evenly above SIGMA."""
    normal = torch.randn(count, generator=generator, device=generator.device)
    evenly = SIGMA + (1 - SIGMA) * torch.rand(count, generator=generator, device=generator.device)
    first = torch.arange(count, device=generator.device) < LAYOUT * count
    return torch.where(first, evenly, shifted(normal.sigmoid(), SHIFT))


def train(
    family: str, run: Path, packages: Path, plan: Plan, sizes: Sequence[tuple[int, int]],
    renew: int, device: torch.device, save_minutes: float = 3.0, sheet_minutes: float = 20.0,
    prompts: Sequence[str] = (), workers: int = 0, compiled: bool = False,
) -> None:  # fmt: skip
    """Train until plan.steps, on all sizes alike; a sheet of the prompts is drawn now and then.

    `renew` scenes of the files are new each step; 0 leaves the files alone, which a second training
    run on the same files must, and a run whose steps are chosen ahead by `workers` processes.
    Raises ValueError for renew beside workers.
    """
    if renew and workers:
        raise ValueError(f"renew is {renew}, must be 0 with workers, which choose scenes ahead")
    torch.manual_seed(plan.seed)
    sprites = Sprites(packages)
    data = [Latents(run / "data", *size, sprites.names, device) for size in sizes]
    pipe = models.new_pipeline(family, run, device)
    text = run / family / "text.pt"
    if text.is_file():
        models.trainable(pipe).load_state_dict(torch.load(text, map_location="cpu"), strict=False)
    trainer = Trainer(family, pipe, plan)
    loop = Loop(run / family / "checkpoint.pt", plan.steps, trainer.parts, save_minutes)
    for one in (trainer.pipe, trainer.averaged()):
        models.place(one, sizes[0][0])
    if compiled:
        trainer.compile()
    count = sum(p.numel() for p in trainer.networks.parameters())
    print(f"{family}: {count / 1e6:.1f} M parameters, {sizes}, {plan}", flush=True)

    def renewed(step: int) -> None:
        for one, of in zip(data, texts, strict=True):
            renewals = step // RENEWALS * RENEWALS * renew // len(data)
            of.renew(one.renew(pipe.vae, sprites, renewals))

    texts = [Texts(pipe, one) for one in data]
    if renew:
        renewed(loop.first)
    drawn = time.time()
    chosen = ahead(lambda step: trainer.choose(step, data), loop.left, workers)
    for step, choice in zip(loop, chosen, strict=False):
        loop.log(trainer.step(step, choice, data, texts))
        if renew and (step + 1) % RENEWALS == 0 and step + 1 < plan.steps:
            renewed(step + 1)
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
