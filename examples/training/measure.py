"""The stage `measure`: how good a model's pictures are, in numbers.

C latent channels, h and w latent size.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import minidit
from compare import psnr
from minidit.pipeline import to_image
from training.classifier import load_classifier, look, rank
from training.optim import autocast
from training.scenes import (
    COLOURS,
    Background,
    Name,
    Scene,
    Sprites,
    caption,
    compose,
    draw,
    held_out_colour,
    held_out_pair,
    relation,
)  # fmt: skip
from training.vae import encode_images


@dataclass(frozen=True)
class Case:
    """A prompt that training never showed, and a scene that it may mean; words say where."""

    prompt: str
    scene: Scene
    words: str | None = None


def held_out_cases(names: Sequence[Name], count: int, seed: int) -> list[Case]:
    """One thing on its held-out colour, a held-out pair, such a pair with a place, and so on."""
    rng, cases = random.Random(f"cases/{seed}"), []
    names = [name for name in names if name.plural]
    while len(cases) < count:
        kind = len(cases) % 3
        one, other = rng.sample(names, 2)
        if kind == 0:
            background = Background("plain", (held_out_colour(one.text),))
            scene = compose(rng, [one], background)
        else:
            if not held_out_pair(one.text, other.text):
                continue
            scene = compose(rng, [one, other], Background("plain", (rng.choice(list(COLOURS)),)))
        words = relation(*scene.things) if kind == 2 else None
        if kind == 2 and words is None:
            continue
        prompt = f"{one} {words} {other} on {scene.background}" if words else caption(scene)
        cases.append(Case(prompt, scene, words))
    return cases


@torch.no_grad()
def measure(
    model: Path,
    classifier: Path,
    packages: Path,
    device: torch.device,
    count: int,
    seed: int = 1,
    **options,
) -> dict[str, dict[str, float]]:
    """What `count` held-out prompts give, and what real scenes of them give: two columns.

    single, things  share of the pictures' names that are among the five that the classifier sees
                    most clearly, in pictures of one thing and in all
    places          share of the prompts with a place word where the things are so
    background      mean error of the ground's colour, 0 to 255 a channel
    frechet         Frechet distance to the real scenes of `drawn` pictures, by mean and covariance
                    of the VAE latents' averages over quarters; of `real` ones: to other real ones
    diversity       mean SNR in dB of one picture's latents against another's of the same prompt
    vae_psnr        dB, of encoding and decoding the real pictures
    options go to the pipeline. Raises ValueError for a count below 6.
    """
    if count < 6:
        raise ValueError(f"count is {count}, must be at least 6")
    pipe, sprites = minidit.load(model, device), Sprites(packages)
    network = load_classifier(classifier, sprites.names).to(device)
    cases = held_out_cases(sprites.names, count, seed)
    side = pipe.transformer.config.sample_size * pipe.vae.config.downscale
    real = [real_pictures(case, sprites, side, seed) for case in cases]
    latents = [encode_images(pipe.vae, pictures).cpu() for pictures in real]  # (2, C, h, w) each
    values = {"real": {"vae_psnr": vae_psnr(pipe.vae, [pictures[0] for pictures in real])}}
    drawn, images = [], []
    for i, case in enumerate(tqdm(cases, desc="drawing", unit="prompt")):
        with autocast(pipe.device):
            out = pipe(case.prompt, seed=seed + i, num_images=2, **options)
        drawn.append(out.latents.float().cpu())
        images.append(out.images[0])
    numbers = {name: i for i, name in enumerate(sprites.names)}
    pictures = {"real": [Image.fromarray(one[0]) for one in real], "drawn": images}
    reference = features(latents, 1)
    for kind, both in (("real", latents), ("drawn", drawn)):
        seen = [look(network, image) for image in pictures[kind]]
        values.setdefault(kind, {})
        values[kind] |= scores(cases, seen, pictures[kind], numbers)
        values[kind]["frechet"] = frechet(features(both, 0), reference)
        values[kind]["diversity"] = float(np.mean([snr(*pair) for pair in both]))
    return values


@torch.no_grad()
def vae_psnr(vae: nn.Module, pictures: Sequence[np.ndarray]) -> float:
    """Mean PSNR of pictures, uint8 (H, W, 3), that were encoded and decoded, in dB."""
    again = [to_image(vae.decode(encode_images(vae, one[None]))[0]) for one in pictures]
    return float(np.mean([psnr(*pair) for pair in zip(again, pictures, strict=True)]))


def real_pictures(case: Case, sprites: Sprites, side: int, seed: int) -> np.ndarray:
    """Two real pictures of a prompt: uint8 (2, side, side, 3)."""
    rng, scenes = random.Random(f"{case.prompt}/{seed}"), [case.scene]
    names = [thing.name for thing in case.scene.things]
    while len(scenes) < 2:
        scene = compose(rng, names, case.scene.background)
        if case.words is None or relation(*scene.things) == case.words:
            scenes.append(scene)
    return np.stack([draw(scene, sprites, side, side) for scene in scenes])


def scores(
    cases: Sequence[Case], seen: list, images: list[Image.Image], numbers: dict[Name, int]
) -> dict[str, float]:
    """What the classifier saw in one picture of every case."""
    single, found, obeyed, errors = [], [], [], []
    for case, what, image in zip(cases, seen, images, strict=True):
        indices = [numbers[name] for name in case.scene.names]
        hits = [rank(what, i) < 5 for i in indices]
        found += hits
        single += hits if len(hits) == 1 else []
        if case.words:
            (x, y), (u, v) = what.places[indices].tolist()
            right, down = {"right": (1, 0), "left": (-1, 0), "below": (0, 1), "above": (0, -1)}[
                case.words.removeprefix("to the ").removesuffix(" of")
            ]
            obeyed.append(all(hits) and right * (x - u) + down * (y - v) > 0)
        ground = np.array(image.resize(what.ground.shape[::-1], Image.Resampling.BOX))
        ground = ground[what.ground.numpy() >= min(0.99, what.ground.max().item())]  # (cells, 3)
        wanted = COLOURS[case.scene.background.colours[0]]
        errors.append(np.abs(np.median(ground, axis=0) - wanted).mean())
    found = {"single": single, "things": found, "places": obeyed, "background": errors}
    return {name: float(np.mean(what)) for name, what in found.items()}


def snr(one: Tensor, other: Tensor) -> float:
    """dB: how large one is, beside its difference to the other."""
    return 10 * math.log10(one.square().mean().item() / (one - other).square().mean().item())


def features(latents: list[Tensor], which: int) -> np.ndarray:
    """Averages of each channel over the quarters of a picture of every pair: (pairs, 4 * C)."""
    chosen = torch.stack([pair[which] for pair in latents])
    return F.adaptive_avg_pool2d(chosen, 2).flatten(1).double().numpy()


def frechet(one: np.ndarray, other: np.ndarray) -> float:
    """Frechet distance between the Gaussians that fit two sets of features (n, d)."""
    gap = np.square(one.mean(0) - other.mean(0)).sum()
    a, b = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    # the trace of (a b) ** (1 / 2): a b has the eigenvalues of a symmetric, positive matrix
    root = np.sqrt(np.linalg.eigvals(a @ b).real.clip(0)).sum()
    return float(gap + np.trace(a) + np.trace(b) - 2 * root)
