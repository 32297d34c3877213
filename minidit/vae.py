"""AutoencoderKL: pictures to latents and back, the VAE of SD3 and, with other sizes, of SDXL.

A convolutional autoencoder (arXiv 2112.10752) with one attention in the middle of each half.
B batch, C channels, H and W size of the picture, h and w size of the latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidit.parts import check_config


@dataclass(frozen=True)
class VAEConfig:
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    norm_num_groups: int = 32
    act_fn: str = "silu"
    sample_size: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True


class AutoencoderKL(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = c = config
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
        if c.use_quant_conv:
            self.quant_conv = nn.Conv2d(2 * c.latent_channels, 2 * c.latent_channels, 1)
        if c.use_post_quant_conv:
            self.post_quant_conv = nn.Conv2d(c.latent_channels, c.latent_channels, 1)

    def moments(self, image):
        x = self.encoder(image)
        if self.config.use_quant_conv:
            x = self.quant_conv(x)
        mean, logvar = x.chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, latents, tile=None):
        z = latents / self.config.scaling_factor + (self.config.shift_factor or 0.0)
        if self.config.use_post_quant_conv:
            z = self.post_quant_conv(z)
        return self.decoder(z)


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        c, widths = config, config.block_out_channels
        self.conv_in = conv3x3(c.in_channels, widths[0])
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            self.down.append(
                Level(c, widths[max(i - 1, 0)], width, c.layers_per_block,
                      down=i < len(widths) - 1)
            )
        self.mid = Mid(c)
        self.norm_out = norm(c, widths[-1])
        self.conv_out = conv3x3(widths[-1], 2 * c.latent_channels)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        x = self.mid(x)
        return self.conv_out(F.silu(self.norm_out(x), inplace=True))


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        c, widths = config, config.block_out_channels[::-1]
        self.conv_in = conv3x3(c.latent_channels, widths[0])
        self.mid = Mid(c)
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            self.up.append(
                Level(c, widths[max(i - 1, 0)], width, c.layers_per_block + 1,
                      up=i < len(widths) - 1)
            )
        self.norm_out = norm(c, widths[-1])
        self.conv_out = conv3x3(widths[-1], c.out_channels)

    def forward(self, x):
        x = self.mid(self.conv_in(x))
        for level in self.up:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x), inplace=True))


class Level(nn.Module):
    def __init__(self, c, width_in, width, count, down=False, up=False):
        super().__init__()
        self.resnets = nn.ModuleList(
            Resnet(c, width_in if j == 0 else width, width) for j in range(count)
        )
        if down:
            self.downsample = nn.Conv2d(width, width, 3, stride=2)
        if up:
            self.upsample = conv3x3(width, width)

    def forward(self, x):
        for r in self.resnets:
            x = r(x)
        if hasattr(self, "downsample"):
            x = self.downsample(F.pad(x, (0, 1, 0, 1)))
        if hasattr(self, "upsample"):
            x = self.upsample(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class Mid(nn.Module):
    def __init__(self, c):
        super().__init__()
        width = c.block_out_channels[-1]
        self.resnet1 = Resnet(c, width, width)
        self.attn = Attention(c, width)
        self.resnet2 = Resnet(c, width, width)

    def forward(self, x):
        return self.resnet2(self.attn(self.resnet1(x)))


class Resnet(nn.Module):
    def __init__(self, c, width_in, width):
        super().__init__()
        self.norm1 = norm(c, width_in)
        self.conv1 = conv3x3(width_in, width)
        self.norm2 = norm(c, width)
        self.conv2 = conv3x3(width, width)
        self.shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return self.shortcut(x) + h


class Attention(nn.Module):
    def __init__(self, c, width):
        super().__init__()
        self.norm = norm(c, width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        t = self.norm(x).flatten(2).transpose(1, 2)[:, None]
        t = F.scaled_dot_product_attention(self.q(t), self.k(t), self.v(t))
        return x + self.out(t[:, 0]).transpose(1, 2).reshape(x.shape)


def conv3x3(a, b):
    return nn.Conv2d(a, b, 3, padding=1)


def norm(c, width):
    return nn.GroupNorm(c.norm_num_groups, width, eps=1e-6)
