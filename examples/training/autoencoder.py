"""Train the VAE, and turn the pictures into latents with it.

B batch, C latent channels, h and w latent size, H and W picture size.
"""

from __future__ import annotations

import copy
import math
import os
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from minidit.vae import AutoencoderKL
from training import emoji, models
from training.files import save, write_json
from training.optim import autocast
from training.vocabulary import write_tokenizers
from weights.load import load_component
from weights.save import write_network


def train_vae(
    family: str, run: Path, packages: Path, steps: int, batch: int, lr: float,
    init: Path | None = None, save_every: int = 100, seed: int = 0,
) -> None:  # fmt: skip
    """Train the autoencoder on crops, and write it with the scale that its latents need.

    Loss: absolute and squared error of the pixels, absolute error of their differences to the
    neighbours, which keeps edges sharp, and a little of the usual pull towards a unit Gaussian.
    init is a folder with a vae, of any number of latent channels, to take over what fits.
    """
    found = emoji.find_emoji(packages)
    pictures = [emoji.read(e, models.PIXELS) for e in found]
    torch.manual_seed(seed)
    vae = AutoencoderKL(models.VAE).to(memory_format=torch.channels_last)
    if init is not None:
        given, state = load_component(init, "vae").state_dict(), vae.state_dict()
        state |= {n: t for n, t in given.items() if n in state and t.shape == state[n].shape}
        vae.load_state_dict(state)
    average = copy.deepcopy(vae).requires_grad_(False)
    adam = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0)
    done, checkpoint = 0, run / "vae.pt"
    if checkpoint.is_file():
        state = torch.load(checkpoint, map_location="cpu")
        vae.load_state_dict(state["vae"])
        average.load_state_dict(state["average"])
        adam.load_state_dict(state["adam"])
        done = state["steps"]
    started, logged = time.time(), []
    for step in range(done, steps):
        rng = random.Random(f"{seed}/{step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        images = to_pixels(emoji.crops(pictures, batch, 64 if step < steps // 2 else 96, rng))
        with autocast():
            mean, logvar = vae.moments(images)  # (B, C, h, w) each
            mean, logvar = mean.float(), logvar.float()
            noise = torch.randn(mean.shape, generator=generator)
            drawn = vae.decode(mean + (logvar / 2).exp() * noise).float()
        error = drawn - images  # (B, 3, H, W)
        kl = (mean.square() + logvar.exp() - 1 - logvar).mean() / 2
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        loss = error.abs().mean() + error.square().mean() + edges / 2 + 1e-4 * kl
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for group in adam.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * min(1, 2 * (steps - step) / steps)
        adam.step()
        adam.zero_grad()
        weight = max(0.002, 1 / (step + 1))
        torch._foreach_lerp_(list(average.parameters()), list(vae.parameters()), weight)
        logged.append(error.detach().square().mean())
        if (step + 1) % save_every == 0 or step + 1 == steps:
            psnr = 10 * math.log10(4 / torch.stack(logged).mean().item())
            pace = (time.time() - started) / (step + 1 - done)
            left, logged = pace * (steps - step - 1) / 60, []
            print(f"step {step + 1:6d}  {psnr:.2f} dB on crops  {left:.1f} min left", flush=True)
            state = {"vae": vae.state_dict(), "average": average.state_dict()}
            save(state | {"adam": adam.state_dict(), "steps": step + 1}, checkpoint)

    # what the transformer sees shall have mean 0 (where the family allows a shift) and deviation 1
    images = emoji.crops(pictures, 32, models.PIXELS, random.Random("scale"))
    latents = torch.cat([encode_images(average, part[None]) for part in images])  # (B, C, h, w)
    shift = latents.mean().item() if family == "sd3" else 0.0
    scale = 1 / (latents - shift).square().mean().sqrt().item()
    config = replace(average.config, scaling_factor=round(scale, 4))
    if family == "sd3":
        config = replace(config, shift_factor=round(shift, 4))
    final = AutoencoderKL(config)
    final.load_state_dict(average.state_dict())
    write_network(final, run / "vae", torch.bfloat16)


def prepare(family: str, run: Path, packages: Path, sizes: list[int], colours: int) -> None:
    """Tokenizers, and the latents of every name on `colours` colours, at each size in pixels.

    Raises ValueError, before anything is written, for a size that is no multiple of 16 up to 256
    and for a number of colours outside 1..17.
    """
    wrong = [size for size in sizes if size % 16 or not 0 < size <= models.PIXELS]
    if wrong:
        raise ValueError(f"size is {wrong[0]}, must be a multiple of 16 up to {models.PIXELS}")
    if not 1 <= colours <= emoji.SHOWN:
        raise ValueError(f"colours is {colours}, must be within 1..{emoji.SHOWN}")
    vae = load_component(run, "vae")
    found = emoji.find_emoji(packages)
    names, groups = [e.name for e in found], [e.group for e in found]
    folder = run / "data"
    write_json(folder / "emoji.json", {"names": names, "groups": groups})
    write_tokenizers(family, names, run)
    for size in sizes:
        path, part = folder / f"{family}-{size}.npy", folder / f"{family}-{size}.part"
        if path.is_file():
            continue
        shape = (len(found), colours, vae.config.latent_channels, size // 8, size // 8)
        array = np.lib.format.open_memmap(part, mode="w+", dtype=np.float16, shape=shape)
        values = list(emoji.COLOURS.values())
        for i, one in enumerate(tqdm(found, desc=f"encoding {size} px", unit="name")):
            backgrounds = [values[j] for j in emoji.shown(i, colours)]
            images = emoji.compose(emoji.read(one, size), backgrounds)
            array[i] = encode_images(vae, images).numpy()
        array.flush()
        del array
        os.replace(part, path)


@torch.no_grad()
def encode_images(vae: nn.Module, images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 latents (B, C, H/8, W/8), computed in bfloat16."""
    with autocast():
        return vae.encode(to_pixels(images)).float()


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1], channels last in memory."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
