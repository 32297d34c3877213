"""The stage `vae`: an autoencoder from nothing.

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

from minidit.vae import Attention, AutoencoderKL, ResnetBlock
from training import models
from training.loop import Loop, ahead, follow
from training.optim import Optimiser, Plan, autocast
from training.scenes import Sprites, draw, random_scene
from weights.save import write_network

CROP = 64  # pixels: an autoencoder that learns small crops works at every size
SIDES = (128, 192, 256, 384)  # of the pictures that they are cut from


def train_vae(
    run: Path, packages: Path, plan: Plan, device: torch.device, save_minutes: float = 3.0,
    workers: int = 0,
) -> None:  # fmt: skip
    """Train the autoencoder on crops of scenes and write it to the run's folder vae.

    Its encoder starts as the best linear one (`principal`).

    Loss: absolute error and root of the squared error of the pixels, absolute error of their
    differences to the neighbours, which keeps edges sharp, and a little of the usual pull towards a
    unit Gaussian. Also the same errors of pictures of half the size from latents of half the size,
    so that latents, like pictures, look the same large and small, which is what diffusion wants
    (Skorokhodov et al. 2025, arXiv 2502.14831).
    """
    sprites = Sprites(packages)
    torch.manual_seed(plan.seed)
    vae = AutoencoderKL(models.VAE)
    principal(vae, to_pixels(pictures(sprites, 32)))
    vae.to(device, memory_format=torch.channels_last)
    average = copy.deepcopy(vae).requires_grad_(False)
    optimiser = Optimiser(vae.named_parameters())
    parts = {"vae": vae, "average": average, "optimiser": optimiser}
    loop = Loop(run / "vae.pt", plan.steps, parts, save_minutes)

    def chance(step: int) -> random.Random:
        return random.Random(f"vae/{plan.seed}/{step}")

    composed = ahead(lambda step: crops(sprites, plan.batch, chance(step)), loop.left, workers)
    for step, shown in zip(loop, composed, strict=False):
        generator = torch.Generator().manual_seed(chance(step).getrandbits(63))
        images = to_pixels(shown, device)
        with autocast(device):
            mean, logvar = (x.float() for x in vae.moments(images))  # (B, C, h, w) each
            noise = torch.randn(mean.shape, generator=generator).to(device)
            latents = mean + (logvar / 2).exp() * noise  # scale 1, shift 0
            loss = pixel_loss(vae.decode(latents).float(), images)
            half = slice(plan.batch // 2)
            small = vae.decode(F.avg_pool2d(latents[half], 2)).float()
            loss = loss + 0.25 * pixel_loss(small, F.avg_pool2d(images[half], 2))
            loss = loss + 1e-4 * (mean.square() + logvar.exp() - 1 - logvar).mean() / 2
        loss.backward()
        optimiser.step(plan, step)
        follow(average, vae, step)
        loop.log(loss)
    final = scaled(average, sprites)
    final.to(memory_format=torch.contiguous_format)  # which files ask for
    write_network(final, run / "vae", torch.bfloat16)


def pictures(sprites: Sprites, count: int) -> np.ndarray:
    """The same whole scenes every time, uint8 (count, H, W, 3)."""
    rng, side = random.Random("pictures"), models.VAE.sample_size
    scenes = [random_scene(rng, sprites.names) for _ in range(count)]
    return np.stack([draw(scene, sprites, side, side) for scene in scenes])


def pixel_loss(drawn: Tensor, images: Tensor) -> Tensor:
    error = drawn - images  # (B, 3, H, W)
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + error.square().mean().sqrt() + edges / 2


def crops(sprites: Sprites, count: int, rng: random.Random) -> np.ndarray:
    """Crops around things of random scenes, four of each: uint8 (count, CROP, CROP, 3)."""
    chosen = []
    while len(chosen) < count:
        scene, side = random_scene(rng, sprites.names), rng.choice(SIDES)
        image = draw(scene, sprites, side, side)
        for thing in rng.choices(scene.things, k=4):
            middles = (at + rng.uniform(-0.5, 0.5) * thing.size for at in (thing.y, thing.x))
            top, left = (min(max(0, int(at * side) - CROP // 2), side - CROP) for at in middles)
            chosen.append(image[top : top + CROP, left : left + CROP])
    return np.stack(chosen[:count])


@torch.no_grad()
def principal(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Let the encoder begin with the principal components of 8 x 8 pixels (B, 3, H, W).

    That alone keeps some 32 dB of a scene, where an encoder that starts at random takes thousands
    of steps to let the third dimension of colour through. Every residual branch starts as zero. A
    strided convolution puts 2 x 2 pixels side by side; those of the second and the third also turn
    them to their principal components, of which they keep the first ones. The last normalisation
    sees every component twice, y and -y, beside constants that rule its scale, and what comes after
    it takes silu(y) - silu(-y) = y. Channels that this does not need stay random.
    """
    encoder, C = vae.encoder, vae.config.latent_channels
    for module in encoder.modules():
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
        if isinstance(module, Attention):
            nn.init.zeros_(module.out.weight)
            nn.init.zeros_(module.out.bias)
    assign(encoder.conv_in, torch.eye(3)[:, :, None, None], at=1)
    known = 3  # channels, the first ones of the layer at hand
    for level in list(encoder.down)[:-1]:
        if isinstance(level.resnets[0].shortcut, nn.Conv2d):
            assign(level.resnets[0].shortcut, torch.eye(known)[:, :, None, None])
        last = level is encoder.down[-2]
        blocks = F.pixel_unshuffle(pixels, 2)  # (B, 4 * known, h, w)
        kept = C if last else min(4 * known, level.downsample.out_channels - 4)
        flat = blocks.transpose(0, 1).flatten(1)  # (4 * known, samples)
        mean = flat.mean(dim=1)
        variance, directions = torch.linalg.eigh(flat.cov())  # rising
        turn = directions.T.flip(0)[:kept]  # (kept, 4 * known)
        if last:  # deviations become their fourth roots: nearly alike, the telling ones larger
            turn = turn / variance.flip(0)[:kept, None] ** 0.375
        assign(level.downsample, turn.unflatten(1, (known, 2, 2)), -turn @ mean)
        pixels = torch.einsum("kc,bchw->bkhw", turn, blocks - mean[:, None, None])
        known = kept

    shortcut, norm, out = encoder.down[-1].resnets[0].shortcut, encoder.norm_out, encoder.conv_out
    eye, half = torch.eye(C), norm.num_channels // norm.num_groups
    assign(shortcut, torch.cat((eye, -eye, torch.zeros(half - 2 * C, C)))[:, :, None, None])
    constants = 5.0 * (-1.0) ** torch.arange(half - 2 * C)
    shortcut.bias[2 * C : half] = constants
    norm.weight[:half] = ((2 * C + constants.square().sum()) / half).sqrt()
    assign(out, torch.cat((eye, -eye), dim=1)[:, :, None, None], at=1)
    out.weight[C:].zero_()
    out.bias[C:] = -7.0  # of the log variance: little noise to begin with


def assign(conv: nn.Conv2d, weight: Tensor, bias: Tensor | float = 0.0, at: int = 0) -> None:
    """Make the first rows of a convolution this weight (rows, columns, height, width), whose left
    top corner lies at (at, at) of the kernel, and nothing else."""
    rows, columns, height, width = weight.shape
    conv.weight[:rows] = 0
    conv.weight[:rows, :columns, at : at + height, at : at + width] = weight
    conv.bias[:rows] = bias


@torch.no_grad()
def scaled(vae: AutoencoderKL, sprites: Sprites) -> AutoencoderKL:
    """The same autoencoder with latents of mean 0 in every channel and deviation 1 in all together,
    and the channels that say most first: of our Next-DiT's 16 only the first three are guided.

    What a channel says is its deviation beside the noise that the encoder adds to it. Channels keep
    the square root of what their deviations differ by: then the noise of a flow covers the fine
    ones first and the telling ones last, and none so early that it is never learnt. All is folded
    into the encoder's last and the decoder's first convolution, so that pictures stay what they
    were (but for their outermost pixels, which see the mean where they saw zeros).
    """
    images = to_pixels(pictures(sprites, 64)).to(vae.encoder.conv_in.weight).split(1)
    means, logvars = map(torch.cat, zip(*(vae.moments(one) for one in images), strict=True))
    deviation, mean = torch.std_mean(means, dim=(0, 2, 3))  # (C,)
    clearness = deviation / logvars.exp().mean(dim=(0, 2, 3)).sqrt()
    order = clearness.argsort(descending=True)
    scale = (deviation * deviation.mean()).sqrt()  # (C,)
    for what, values in (("deviation", deviation / scale), ("deviation by noise", clearness)):
        print(f"{what} of the channels:", *(f"{x:.2f}" for x in values[order].tolist()))
    final = copy.deepcopy(vae)
    out, into, count = final.encoder.conv_out, final.decoder.conv_in, len(order)
    out.bias[:count] -= mean
    out.bias[:count] /= scale
    out.bias[count:] -= 2 * scale.log()  # of the log variance
    out.weight[:count] /= scale[:, None, None, None]
    into.bias += into.weight.sum(dim=(2, 3)) @ mean
    into.weight *= scale[:, None, None]
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
        return vae.encode(to_pixels(images, device)).float()


def to_pixels(images: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1], channels last in memory."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
