"""The stage `vae`: an autoencoder from nothing, and then a better decoder for the same latents.

B batch, C latent channels, h and w latent size, H and W picture size.
"""

from __future__ import annotations

import copy
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidit.vae import AutoencoderKL
from training import models
from training.loop import Loop, follow
from training.optim import Optimiser, Plan, autocast
from training.scenes import Sprites, draw, random_scene
from weights.load import load_component
from weights.save import write_network

CROP = 64  # pixels: an autoencoder that learns small crops works at every size
SIDES = (128, 192, 256, 384)  # of the pictures that they are cut from


def train_vae(
    run: Path, packages: Path, plan: Plan, device: torch.device, frozen: bool = False,
    save_minutes: float = 3.0,
) -> None:  # fmt: skip
    """Train the autoencoder on crops of scenes and write it to the run's folder vae.

    With frozen, which needs that folder, its encoder stays as it is and the decoder learns on:
    pictures get better under a transformer that trains on the latents at the same time.

    Loss: absolute error and root of the squared error of the pixels, absolute error of their
    differences to the neighbours, which keeps edges sharp, and a little of the usual pull towards a
    unit Gaussian. While the encoder learns, also the same errors of pictures of half the size from
    latents of half the size, so that latents, like pictures, look the same large and small, which
    is what diffusion wants (Skorokhodov et al. 2025, arXiv 2502.14831).
    """
    sprites = Sprites(packages)
    torch.manual_seed(plan.seed)
    vae = load_component(run, "vae") if frozen else AutoencoderKL(models.VAE)
    vae.to(device, memory_format=torch.channels_last)
    vae.requires_grad_(not frozen).decoder.requires_grad_(True)
    average = copy.deepcopy(vae).requires_grad_(False)
    optimiser = Optimiser(vae.named_parameters())
    parts = {"vae": vae, "average": average, "optimiser": optimiser}
    loop = Loop(run / ("decoder.pt" if frozen else "vae.pt"), plan.steps, parts, save_minutes)
    for step in loop:
        rng = random.Random(f"vae/{plan.seed}/{step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        images = to_pixels(crops(sprites, plan.batch, rng)).to(device)
        with autocast(device):
            with torch.set_grad_enabled(not frozen):
                mean, logvar = (x.float() for x in vae.moments(images))  # (B, C, h, w) each
            noise = torch.randn(mean.shape, generator=generator).to(device)
            latents = mean + (logvar / 2).exp() * noise  # scale 1, shift 0
            loss = pixel_loss(vae.decode(latents).float(), images)
            if not frozen:
                half = slice(plan.batch // 2)
                small = vae.decode(F.avg_pool2d(latents[half], 2)).float()
                loss = loss + 0.25 * pixel_loss(small, F.avg_pool2d(images[half], 2))
                loss = loss + 1e-4 * (mean.square() + logvar.exp() - 1 - logvar).mean() / 2
        loss.backward()
        optimiser.step(plan, step)
        follow(average, vae, step)
        loop.log(loss)
    final = average if frozen else unit_scaled(average, sprites)
    final.to(memory_format=torch.contiguous_format)  # which files ask for
    write_network(final, run / "vae", torch.bfloat16)


def pixel_loss(drawn: Tensor, images: Tensor) -> Tensor:
    error = drawn - images  # (B, 3, H, W)
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + error.square().mean().sqrt() + edges / 2


def crops(sprites: Sprites, count: int, rng: random.Random) -> np.ndarray:
    """Crops around things of random scenes, two of each: uint8 (count, CROP, CROP, 3)."""
    chosen = []
    while len(chosen) < count:
        scene, side = random_scene(rng, sprites.names), rng.choice(SIDES)
        image = draw(scene, sprites, side, side)
        for thing in rng.choices(scene.things, k=2):
            middles = (at + rng.uniform(-0.5, 0.5) * thing.size for at in (thing.y, thing.x))
            top, left = (min(max(0, int(at * side) - CROP // 2), side - CROP) for at in middles)
            chosen.append(image[top : top + CROP, left : left + CROP])
    return np.stack(chosen[:count])


@torch.no_grad()
def unit_scaled(vae: AutoencoderKL, sprites: Sprites) -> AutoencoderKL:
    """The same autoencoder with latents of mean 0 and deviation 1 in every channel, and the
    channels that say most first: of our Next-DiT's 16 only the first three are guided.

    What a channel says is its deviation beside the noise that the encoder adds to it. All is folded
    into the encoder's last and the decoder's first convolution, so that pictures stay what they
    were (but for their outermost pixels, which see the mean where they saw zeros).
    """
    rng, side, weight = random.Random("scale"), models.VAE.sample_size, vae.encoder.conv_in.weight
    scenes = [random_scene(rng, sprites.names) for _ in range(64)]
    images = (to_pixels(draw(scene, sprites, side, side)[None]).to(weight) for scene in scenes)
    means, logvars = map(torch.cat, zip(*(vae.moments(one) for one in images), strict=True))
    deviation, mean = torch.std_mean(means, dim=(0, 2, 3))  # (C,)
    clearness = deviation / logvars.exp().mean(dim=(0, 2, 3)).sqrt()
    order = clearness.argsort(descending=True)
    for what, values in (("deviation", deviation), ("deviation by noise", clearness)):
        print(f"{what} of the channels:", *(f"{x:.2f}" for x in values[order].tolist()))
    final = copy.deepcopy(vae)
    out, into, count = final.encoder.conv_out, final.decoder.conv_in, len(order)
    out.bias[:count] -= mean
    out.bias[:count] /= deviation
    out.bias[count:] -= 2 * deviation.log()  # of the log variance
    out.weight[:count] /= deviation[:, None, None, None]
    into.bias += into.weight.sum(dim=(2, 3)) @ mean
    into.weight *= deviation[:, None, None]
    both = torch.cat((order, count + order))
    out.weight.copy_(out.weight[both])
    out.bias.copy_(out.bias[both])
    into.weight.copy_(into.weight[:, order])
    return final


@torch.no_grad()
def encode_images(vae: nn.Module, images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 latents (B, C, H/8, W/8) on the network's device."""
    device = next(vae.parameters()).device
    with autocast(device):
        return vae.encode(to_pixels(images).to(device)).float()


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1], channels last in memory."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
