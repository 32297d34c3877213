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
from training.loop import Loop, ahead, save
from training.optim import Optimiser, Plan, autocast, plain_attention_on
from training.scenes import (
    Background,
    Name,
    Scene,
    Sprites,
    Thing,
    caption,
    draw,
    relation,
    said_place,
    spoken,
)
from training.vae import encode_images
from training.vocabulary import write_tokenizers

GRID = 8  # side of the thumbnails
# what is asked of a caption's tokens: which thing is named when, and which is said to be where
QUESTIONS = ("first", "second", "third", "to the left of", "to the right of", "above", "below")


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
    cond, size = pipe.encode([""]), GRID**2 * channels
    draw_heads = nn.ModuleList(nn.Linear(view.shape[1], 2 * size) for view in text_views(cond))
    tell_heads = nn.ModuleList(Answers(tokens.shape[2], size) for tokens, _ in text_tokens(cond))
    heads = nn.ModuleList((draw_heads, tell_heads)).to(device)
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
        told = asked.to(device) @ seen  # (B, Q, 64 * C), zero where the caption says nothing
        said_so = asked.sum(2, keepdim=True).to(device)  # (B, Q, 1)
        with autocast(device), plain_attention_on(device):
            cond = pipe.encode(captions)
            drawn = [head(x) for head, x in zip(draw_heads, text_views(cond), strict=True)]
            said = [head(*x) for head, x in zip(tell_heads, text_tokens(cond), strict=True)]
            said = [answer * said_so for answer in said]
        # of the answers' errors the mean over the questions that have one
        loss = mean_error(drawn, target) + mean_error(said, told) / said_so.mean()
        loss.backward()
        optimiser.step(plan, step)
        loop.log(loss)
    save(encoders.state_dict(), run / family / "text.pt")


def mean_error(found: Sequence[Tensor], target: Tensor) -> Tensor:
    """The mean of the squared errors of several tensors."""
    return sum(F.mse_loss(one.float(), target) for one in found) / len(found)


class Answers(nn.Module):
    """The portrait of the thing that each of QUESTIONS asks for, by attention to the tokens."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.questions = nn.Parameter(torch.randn(len(QUESTIONS), width))
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.portrait = nn.Linear(width, size)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens (B, L, width), mask (B, L) -> (B, Q, size)."""
        tokens = F.layer_norm(tokens, tokens.shape[2:])
        questions = self.questions.expand(len(tokens), 1, -1, -1)  # (B, 1, Q, width), one head
        key, value = (one(tokens)[:, None] for one in (self.key, self.value))  # (B, 1, L, width)
        mask = mask[:, None, None].bool()  # (B, 1, 1, L)
        found = F.scaled_dot_product_attention(questions, key, value, attn_mask=mask)
        return self.portrait(found[:, 0])


def answers(scene: Scene, text: str, numbers: dict[Name, int]) -> Tensor:
    """Which name answers each of QUESTIONS, of a scene's caption: one-hot rows (Q, N), zero where
    the caption doesn't say."""
    things = spoken(scene.things, text)
    named = dict(zip(QUESTIONS, things, strict=False))
    if len(things) == 2 and (words := said_place(*things, text)):
        named |= {words: things[0], relation(*things[::-1]): things[1]}
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
    """The conditioning as vectors (B, size): SD3's pooled state, and means of `text_tokens`."""
    pooled = [cond["pooled"]] if "pooled" in cond else []
    means = [(x * m[..., None]).sum(1) / m.sum(1, keepdim=True) for x, m in text_tokens(cond)]
    return pooled + means


def text_tokens(cond: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The conditioning as tokens (B, L, width), of SD3 its two windows, and which of them are read,
    (B, L)."""
    if "pooled" in cond:
        halves = cond["context"].chunk(2, dim=1)
        return [(half, half.new_ones(half.shape[:2])) for half in halves]
    return [(cond["context"], cond["context_mask"])]
