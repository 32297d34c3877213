"""How good a trained model's pictures are, in numbers.

C latent channels.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import minidit
from minidit.pipeline import to_image
from ras import RASConfig
from training import emoji
from training.autoencoder import to_pixels
from training.models import PIXELS
from training.optim import autocast


@torch.no_grad()
def measure(
    model: Path, packages: Path, count: int, ras: RASConfig | None = None,
    steps: int | None = None, guidance: float | None = None, batch: int = 20, seed: int = 1,
) -> dict[str, float]:  # fmt: skip
    """How good a model's pictures are, on pairings of name and colour that it never saw, drawn
    with RAS or without.

    vae_psnr     dB, of encoding and decoding the real pictures
    top1, top5   share of pictures whose nearest real one on that colour, among all names, is of the
                 name that was asked for, or is so for one of the nearest five; at 64 x 64 pixels
    background   mean absolute error of the corners, 0 to 255 a channel
    frechet      Frechet distance between drawn and real pictures, by mean and covariance of the VAE
                 latents' averages over quarters
    Raises ValueError for a count that is not within 2 and the number of names.
    """
    pipe = minidit.load(model)
    found = emoji.find_emoji(packages)
    if not 2 <= count <= len(found):
        raise ValueError(f"count is {count}, must be within 2..{len(found)}")
    small = [emoji.read(one, 64) for one in found]
    colours = list(emoji.COLOURS.items())
    numbers = random.Random(seed).sample(range(len(found)), count)
    ranks, errors, psnr, drawn, real = [], [], [], [], []
    for start in tqdm(range(0, count, batch), desc="drawing", unit="batch"):
        part = numbers[start : start + batch]
        pairs = [(i, *colours[emoji.held_out(i)]) for i in part]
        prompts = [emoji.caption(found[i].name, colour) for i, colour, _ in pairs]
        with autocast():
            out = pipe(prompts, steps=steps, guidance=guidance, seed=seed + start, ras=ras)
        drawn.append(out.latents)
        for (i, _, value), image in zip(pairs, out.images, strict=True):
            rivals = np.stack([emoji.compose(picture, [value])[0] for picture in small])
            thumb = np.asarray(image.resize((64, 64), Image.Resampling.LANCZOS))
            gaps = np.square(rivals.astype(np.float32) - thumb).mean(axis=(1, 2, 3))  # (names,)
            ranks.append((gaps < gaps[i]).sum())
            pixels = np.asarray(image, dtype=np.float32)
            corners = np.stack([pixels[y, x] for y in (2, -3) for x in (2, -3)])  # (4, 3)
            errors.append(np.abs(corners - value).mean())
            picture = emoji.compose(emoji.read(found[i], PIXELS), [value])
            real.append(pipe.vae.encode(to_pixels(picture)))
            again = np.asarray(to_image(pipe.vae.decode(real[-1])[0]), dtype=np.float32)
            psnr.append(10 * math.log10(255**2 / np.square(again - picture[0]).mean()))
    return {
        "vae_psnr": float(np.mean(psnr)),
        "top1": float(np.mean([rank < 1 for rank in ranks])),
        "top5": float(np.mean([rank < 5 for rank in ranks])),
        "background": float(np.mean(errors)),
        "frechet": frechet(features(torch.cat(drawn)), features(torch.cat(real))),
    }


def features(latents: Tensor) -> np.ndarray:
    """Averages of each channel over the quarters of a picture: (pictures, 4 * C)."""
    return F.adaptive_avg_pool2d(latents.float(), 2).flatten(1).double().numpy()


def frechet(one: np.ndarray, other: np.ndarray) -> float:
    """Frechet distance between the Gaussians that fit two sets of features (n, d)."""
    gap = np.square(one.mean(0) - other.mean(0)).sum()
    a, b = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    # the trace of (a b) ** (1 / 2): a b has the eigenvalues of a symmetric, positive matrix
    root = np.sqrt(np.linalg.eigvals(a @ b).real.clip(0)).sum()
    return float(gap + np.trace(a) + np.trace(b) - 2 * root)
