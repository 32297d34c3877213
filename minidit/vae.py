"""AutoencoderKL: pictures to latents and back; the VAE of SD3 and, with other sizes, of SDXL.

The convolutional autoencoder of latent diffusion (arXiv 2112.10752): residual blocks, halving or
doubling the size between levels, and one attention over all positions in the middle of each half.
Large pictures are decoded in strips of rows (strips.py), with the same result as in one piece.

B batch, C channels, H and W size at hand, h and w size of the latents, G groups of a GroupNorm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidit import checks
from minidit.checks import require
from minidit.parts import attention, fast_layout, silu_
from minidit.strips import decode_in_strips

ONE_PIECE = 128 * 128  # latents of the largest picture decoded in one piece: 1024 x 1024 pixels
STRIP = 64 * 64  # latents in a strip of a larger one
QUERIES = 64 * 64  # attention's queries at a time


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of an AutoencoderKL; the fields carry the names of the official vae/config.json."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (64,)
    down_block_types: tuple[str, ...] | None = None
    up_block_types: tuple[str, ...] | None = None
    layers_per_block: int = 1
    norm_num_groups: int = 32
    act_fn: str = "silu"
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    sample_size: int = 32  # pixels a side of the training pictures
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    force_upcast: bool = True  # float16 overflows: the pipeline then runs the VAE in float32

    @property
    def downscale(self) -> int:
        """Pixels a latent, along each side: 8 for every published VAE."""
        return 2 ** (len(self.block_out_channels) - 1)

    def __post_init__(self) -> None:
        checks.config(self)
        widths, groups = self.block_out_channels, self.norm_num_groups
        ok = widths and all(width >= 1 and width % groups == 0 for width in widths)
        allowed = f"one or more positive multiples of norm_num_groups = {groups}"
        require(self, "block_out_channels", ok, allowed)
        kinds = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
        for name, kind in kinds.items():
            ok = getattr(self, name) in (None, (kind,) * len(widths))
            require(self, name, ok, f"{len(widths)} x {kind!r}")
        require(self, "act_fn", self.act_fn == "silu", "'silu'")
        require(self, "mid_block_add_attention", self.mid_block_add_attention, "True")
        require(self, "scaling_factor", self.scaling_factor != 0, "finite and not 0")


class AutoencoderKL(nn.Module):
    """The autoencoder; latents are scaled and shifted as the diffusion transformers want them."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = c = checks.instance("config", config, VAEConfig)
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
        z = c.latent_channels
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1) if c.use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(z, z, 1) if c.use_post_quant_conv else nn.Identity()

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents, (B, latent_channels, h, w) each, unscaled.

        image (B, in_channels, H, W) in [-1, 1]; the log variance is clamped to [-30, 20].
        Raises ValueError unless config.downscale divides H and W.
        """
        c = self.config
        check_pixels(image, c.in_channels, "image", self.encoder.conv_in.weight)
        height, width = image.shape[-2:]
        if height % c.downscale or width % c.downscale:
            raise ValueError(f"image is {height}x{width}, both must be multiples of {c.downscale}")
        x = self.encoder(self._arranged(image))  # (B, 2 * latent_channels, h, w)
        mean, logvar = self.quant_conv(x).contiguous().chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latents (B, latent_channels, h, w) of an image (B, in_channels, H, W) in [-1, 1].

        The mean of their distribution, or with a generator a sample of it; the generator may live
        on any device. Raises ValueError unless config.downscale divides H and W.
        """
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(
                f"generator is {checks.short(generator)}, must be a torch.Generator or None"
            )
        z, logvar = self.moments(image)
        if generator is not None:
            noise = torch.randn(z.shape, generator=generator, device=generator.device)
            z = z + (logvar / 2).exp() * noise.to(z)
        return (z - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def decode(self, latents: Tensor, tile: int | None = None) -> Tensor:
        """Image (B, out_channels, H, W), unclamped, of scaled latents (B, latent_channels, h, w).

        tile is how many rows of latents to decode at a time; it changes time and memory, not the
        picture. By default pictures of up to 1024 x 1024 pixels are decoded in one piece, larger
        ones in strips of the area of 512 x 512 (tile=h for one piece).

        At the width of the published VAEs one piece holds 640 numbers a pixel at its peak: 2.7 GB
        for 1024 x 1024 in float32, half of it in bfloat16, and what convolutions take for
        themselves. Strips hold 256 a pixel and 640 a pixel of a strip: 5 GB for 2048 x 2048 instead
        of 10.7, for about twice the arithmetic. A batch multiplies all of this.
        Raises ValueError for latents of another shape or type, or a tile below 1.
        """
        c = self.config
        check_pixels(latents, c.latent_channels, "latents", self.decoder.conv_in.weight)
        height, width = latents.shape[-2:]
        if tile is None:
            tile = height if height * width <= ONE_PIECE else max(1, STRIP // width)
        tile = checks.integer("tile", tile, 1)
        # scaled before it is rounded to the dtype of the weights
        z = latents.to(torch.promote_types(latents.dtype, self.decoder.conv_in.weight.dtype))
        z = z / c.scaling_factor + (c.shift_factor or 0.0)
        z = self.post_quant_conv(self._arranged(z))
        strips = -(-height // tile)
        x = self.decoder(z) if strips == 1 else decode_in_strips(self.decoder, z, strips)
        return x.contiguous()

    def _arranged(self, x: Tensor) -> Tensor:
        """x in the dtype of the weights and in the layout that suits it."""
        weight = self.decoder.conv_in.weight
        return x.to(weight.dtype, memory_format=fast_layout(weight))


class Encoder(nn.Module):
    """Picture (B, in_channels, H, W) -> mean and log variance (B, 2 * latent_channels, h, w)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        c, widths = config, config.block_out_channels
        self.conv_in = conv3x3(c.in_channels, widths[0])
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(widths[max(i - 1, 0)], width, c.layers_per_block, c.norm_num_groups)
            level.downsample = Downsample(width) if i < len(widths) - 1 else nn.Identity()
            self.down.append(level)
        self.mid = Middle(widths[-1], c.norm_num_groups)
        self.norm_out = group_norm(widths[-1], c.norm_num_groups)
        self.conv_out = conv3x3(widths[-1], 2 * c.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            for block in level.resnets:
                x = block(x)
            x = level.downsample(x)  # (B, C, H / 2, W / 2), except in the last level
        return self.conv_out(silu_(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Unscaled latents (B, latent_channels, h, w) -> picture (B, out_channels, H, W)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        c, widths = config, config.block_out_channels[::-1]
        self.conv_in = conv3x3(c.latent_channels, widths[0])
        self.mid = Middle(widths[0], c.norm_num_groups)
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(widths[max(i - 1, 0)], width, c.layers_per_block + 1, c.norm_num_groups)
            level.upsample = Upsample(width) if i < len(widths) - 1 else nn.Identity()
            self.up.append(level)
        self.norm_out = group_norm(widths[-1], c.norm_num_groups)
        self.conv_out = conv3x3(widths[-1], c.out_channels)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in self.up:
            for block in level.resnets:
                x = block(x)
            x = level.upsample(x)  # (B, C, 2H, 2W), except in the last level
        return self.conv_out(silu_(self.norm_out(x)))


class Level(nn.Module):
    """The residual blocks of one size; encoder and decoder add what changes the size after it.

    They also run it, because a `forward` would hold on to the large input of the first block.
    """

    def __init__(self, width_in: int, width: int, count: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(width if j else width_in, width, groups) for j in range(count)
        )


class Middle(nn.Module):
    """Residual block, attention, residual block, at the size of the latents."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.resnet1 = ResnetBlock(width, width, groups)
        self.attn = Attention(width, groups)
        self.resnet2 = ResnetBlock(width, width, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.resnet2(self.attn(self.resnet1(x)))


class ResnetBlock(nn.Module):
    """x plus twice (GroupNorm, SiLU, 3x3 convolution) of it."""

    def __init__(self, width_in: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(width_in, groups)
        self.conv1 = conv3x3(width_in, width)
        self.norm2 = group_norm(width, groups)
        self.conv2 = conv3x3(width, width)
        self.shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(silu_(self.norm1(x)))
        h = self.conv2(silu_(self.norm2(h)))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """Single-head self-attention over all positions of (B, C, H, W), added to its input."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(width, groups)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, H*W, C)
        q, k, v = (f(tokens)[:, :, None] for f in (self.q, self.k, self.v))  # (B, H*W, 1, C)
        # a block of queries at a time, for devices where attention writes out its whole matrix
        blocks = [attention(part, k, v) for part in q.split(QUERIES, dim=1)]
        tokens = self.out(torch.cat(blocks, dim=1))  # (B, H*W, C)
        return x + tokens.transpose(1, 2).unflatten(2, x.shape[2:])  # (B, C, H, W)


class Downsample(nn.Conv2d):
    """(B, C, H, W) -> (B, C, H / 2, W / 2). Padding is at the right and the bottom only."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """(B, C, H, W) -> (B, C, 2H, 2W): every position four times, then a 3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def conv3x3(width_in: int, width: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size."""
    return nn.Conv2d(width_in, width, kernel_size=3, padding=1)


def group_norm(width: int, groups: int) -> nn.GroupNorm:
    """GroupNorm with the eps of both published VAEs."""
    return nn.GroupNorm(groups, width, eps=1e-6)


def check_pixels(x: Tensor, channels: int, name: str, like: Tensor) -> None:
    """Raise ValueError unless x is (B, channels, H, W), not empty, floating point, and where the
    weights are."""
    checks.floating(name, x, "batch", channels, "height", "width", like=like)
    if 0 in x.shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, must not be empty")
