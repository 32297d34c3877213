"""The stage `text`: teach the text encoders what captions mean, before there is a transformer.

B batch, N names, L text tokens, C latent channels, Q questions.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import models
from training.latents import Latents
from training.layout import spoken
from training.loop import Loop, ahead, save
from training.optim import Optimiser, Plan, autocast, plain_attention_on
from training.scenes import Background, Name, Scene, Sprites, Thing, caption, draw, relation
from training.vae import encode_images
from training.vocabulary import write_tokenizers

GRID = 8  # side of the thumbnails
# what is asked of a caption's tokens: which thing is named when, and which is said to be where
QUESTIONS = ("first", "second", "third", "left", "right", "above", "below")


def train_text(
    family: str, run: Path, packages: Path, plan: Plan, size: tuple[int, int],
    device: torch.device, save_minutes: float = 3.0, workers: int = 0,
) -> None:  # fmt: skip
    """Teach the text encoders what a caption's picture looks like.

    The official encoders come trained on more text than there is in our captions; a transformer
    that trains together with raw ones finds out very slowly that names matter. So each kind of
    their output learns to predict, by one linear map, a thumbnail of the scene (its latents at
    8 x 8: the background, and what is on which side) and the mean of portraits of its things (what
    they look like, wherever they are). That alone leaves the tokens without their order, so they
    are asked by attention, as a transformer will ask them, which thing is named first or is said to
    be on the left (`Answers`). Nothing but the encoders is kept, in text.pt of the family.
    """
    torch.manual_seed(plan.seed)
    sprites = Sprites(packages)
    if not (run / family / "tokenizer").is_dir():
        write_tokenizers(family, sprites.names, run / family)
    data = Latents(run / "data", *size, sprites.names, device)
    pipe = models.new_pipeline(family, run, device)
    encoders = models.trainable(pipe).train()
    del encoders["transformer"]
    seen = portraits(pipe.vae, sprites)  # (N, 64 * C)
    numbers = {name: i for i, name in enumerate(sprites.names)}
    channels = data.array.shape[1]
    views, tokens = text_views(pipe.encode([""])), text_tokens(pipe.encode([""]))
    size = GRID**2 * channels
    heads = [nn.Linear(view.shape[1], 2 * size) for view in views]
    heads += [Answers(one.shape[2], size) for one, _ in tokens]
    heads = nn.ModuleList(heads).to(device)
    optimiser = Optimiser([*encoders.named_parameters(), *heads.named_parameters()])
    parts = {"encoders": encoders, "heads": heads, "optimiser": optimiser}
    loop = Loop(run / family / "text-checkpoint.pt", plan.steps, parts, save_minutes)

    def choose(step: int) -> tuple[list[int], list[str], Tensor, Tensor]:
        rng = random.Random(f"text/{plan.seed}/{step}")
        slots, scenes = data.choose(plan.batch, rng, models.MOST[family])
        captions = [caption(scene, rng) for scene in scenes]
        asked = [answers(*one, numbers) for one in zip(scenes, captions, strict=True)]
        return slots, captions, shares(scenes, numbers), torch.stack(asked)

    chosen = ahead(choose, loop.left, workers)
    for step, (slots, captions, share, asked) in zip(loop, chosen, strict=False):
        thumbnails = F.adaptive_avg_pool2d(data.tensor[slots].float(), GRID).flatten(1)
        target = torch.cat((thumbnails, share.to(device) @ seen), dim=1)  # (B, 2 * 64 * C)
        told = asked.to(device) @ seen  # (B, Q, 64 * C)
        with autocast(device), plain_attention_on(device):
            cond = pipe.encode(captions)
            views, tokens = text_views(cond), text_tokens(cond)
            drawn = [head(view) for head, view in zip(heads, views, strict=False)]
            said = [head(*one) for head, one in zip(heads[len(views) :], tokens, strict=True)]
        loss = sum(F.mse_loss(one.float(), target) for one in drawn) / len(drawn)
        loss = loss + sum(F.mse_loss(one.float(), told) for one in said) / len(said)
        loss.backward()
        optimiser.step(plan, step)
        loop.log(loss)
    save(encoders.state_dict(), run / family / "text.pt")


class Answers(nn.Module):
    """The portrait of the thing that each of QUESTIONS asks for, by attention to the tokens."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.questions = nn.Parameter(torch.randn(len(QUESTIONS), width))
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.portrait = nn.Linear(width, size)

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """tokens (B, L, width), mask (B, L) -> (B, Q, size)."""
        tokens = F.layer_norm(tokens, tokens.shape[2:])
        questions = self.questions.expand(len(tokens), 1, -1, -1)  # (B, 1, Q, width), one head
        key, value = (one(tokens)[:, None] for one in (self.key, self.value))  # (B, 1, L, width)
        mask = mask if mask is None else mask[:, None, None].bool()  # (B, 1, 1, L)
        found = F.scaled_dot_product_attention(questions, key, value, attn_mask=mask)
        return self.portrait(found[:, 0])


def answers(scene: Scene, text: str, numbers: dict[Name, int]) -> Tensor:
    """Which name answers each of QUESTIONS, of a scene's caption: one-hot rows (Q, N), zero where
    the caption doesn't say."""
    things = spoken(scene.things, text)
    named = dict(zip(QUESTIONS, things, strict=False))
    if len(things) == 2 and (words := relation(*things)) and f" {words} " in text:
        where = words.split()[-2] if " " in words else words
        other = {"left": "right", "right": "left", "above": "below", "below": "above"}[where]
        named |= {where: things[0], other: things[1]}
    table = torch.zeros(len(QUESTIONS), len(numbers))
    for row, question in zip(table, QUESTIONS, strict=True):
        if question in named:
            row[numbers[named[question].name]] = 1
    return table


def portraits(vae: nn.Module, sprites: Sprites) -> Tensor:
    """What each name's thing looks like: latents (N, 64 * C) of a small picture of it on gray."""
    found = []
    for name in sprites.names:
        thing = Thing(name, 0.5, 0.5, 0.9, mirror=False, angle=0.0)
        picture = draw(Scene((thing,), Background("plain", ("gray",))), sprites, 64, 64)
        found.append(encode_images(vae, picture[None]).flatten())
    return torch.stack(found)


def shares(scenes: Sequence[Scene], numbers: dict[Name, int]) -> Tensor:
    """How much of its scene each name is: (B, N), rows that sum to 1."""
    table = torch.zeros(len(scenes), len(numbers))
    for row, scene in zip(table, scenes, strict=True):
        row[[numbers[name] for name in scene.names]] = 1 / len(scene.names)
    return table


def text_views(cond: dict[str, Tensor]) -> list[Tensor]:
    """The conditioning as vectors (B, size): SD3's pooled state and the mean of each window, or
    the mean of Lumina's states."""
    if "pooled" in cond:
        return [cond["pooled"], *(half.mean(dim=1) for half in cond["context"].chunk(2, dim=1))]
    mask = cond["context_mask"][..., None]  # (B, L, 1)
    return [(cond["context"] * mask).sum(dim=1) / mask.sum(dim=1)]


def text_tokens(cond: dict[str, Tensor]) -> list[tuple[Tensor, Tensor | None]]:
    """The conditioning as tokens (B, L, width) and what of them is text (B, L), None for all."""
    if "pooled" in cond:
        return [(half, None) for half in cond["context"].chunk(2, dim=1)]
    return [(cond["context"], cond["context_mask"])]
