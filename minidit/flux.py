"""FLUX.1, dev and schnell: the diffusion transformer of Black Forest Labs (their flux/model.py).

In the double blocks image and text are two streams with weights of their own that meet in joint
attention, as in SD3; in the single blocks they are one sequence, and attention and MLP work side by
side on the same input. Positions are rotary, dev takes its guidance scale as an input.
Region-Adaptive Sampling is the `active` and `cache` arguments of `Flux.forward`.

B batch, N image tokens, K active image tokens (K = N in a dense step), L text tokens,
H heads, D head width, C width of the network, P patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidit import checks
from minidit.checks import require
from minidit.parts import (
    MLP,
    FinalLayer,
    Projections,
    Rope,
    attention,
    axis_turns,
    batch_sigma,
    check_axes,
    check_latents,
    check_prompt,
    layer_norm,
    modulate,
    rotate,
    time_features,
)
from ras.cache import KVCache
from ras.tokens import flat_rows, patchify, put_, take, unpatchify


@dataclass(frozen=True)
class FluxConfig:
    """Sizes of a FLUX.1; the fields carry the names of the official transformer/config.json, where
    in_channels are those of a token, a patch of 2 x 2 latents.
    """

    in_channels: int = 64
    num_layers: int = 19
    num_single_layers: int = 38
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    patch_size: ClassVar[int] = 2  # the files say 1, as their networks are given packed tokens
    sample_size: ClassVar[int] = 128  # latents a side, in no file: 1024 pixels

    @property
    def width(self) -> int:
        """C, the width of both streams."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def latent_channels(self) -> int:
        """Channels of the latents, in and out."""
        return self.in_channels // self.patch_size**2

    def __post_init__(self) -> None:
        checks.config(self)
        require(self, "in_channels", self.in_channels % self.patch_size**2 == 0, "a multiple of 4")
        check_axes(self, "axes_dims_rope", "attention_head_dim")


class Flux(nn.Module):
    """The velocity of FLUX.1 as a function of noisy latents, noise level and prompt."""

    guided_channels = None  # guidance acts on every latent channel

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.config = c = checks.instance("config", config, FluxConfig)
        C = c.width
        self.patch_embed = nn.Linear(c.in_channels, C)
        self.context_embed = nn.Linear(c.joint_attention_dim, C)
        self.time_embed = MLP(256, C, C)
        self.pooled_embed = MLP(c.pooled_projection_dim, C, C)
        if c.guidance_embeds:
            self.guidance_embed = MLP(256, C, C)
        self.double_blocks = nn.ModuleList(DoubleBlock(c) for _ in range(c.num_layers))
        self.single_blocks = nn.ModuleList(SingleBlock(c) for _ in range(c.num_single_layers))
        self.final = FinalLayer(C, c.in_channels)

    def forward(
        self,
        latents: Tensor,
        sigma: Tensor | float,
        context: Tensor,
        pooled: Tensor,
        guidance: Tensor | float | None = None,
        *,
        active: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Velocity (B, latent_channels, height, width) = d latents / d sigma.

        latents  (B, latent_channels, height, width): any even size
        sigma    noise level in [0, 1], 1 = pure noise: a number, or one per sample (B,)
        context  (B, L, joint_attention_dim), pooled (B, pooled_projection_dim): the prompt
        guidance the scale that dev was distilled with, a number or (B,); 1 is a scale as any other.
                 None, and only that, for schnell, which has no such input
        active   (B, K) int64, the image tokens to compute (row-major numbers, each at most once);
                 None computes all. Needs a cache that a dense step has filled. The velocity of the
                 other, stale tokens is zero here: `denoise` puts in what was kept for them.
        cache    keys and values, written here; None for plain dense sampling
        Raises ValueError for shapes that do not fit.
        """
        self._check(latents, context, pooled, guidance, active, cache)
        height, width, P = *latents.shape[-2:], self.config.patch_size
        dtype = self.patch_embed.weight.dtype
        latents, context, pooled = (x.to(dtype) for x in (latents, context, pooled))

        # 1. Keep the active rows of all image tokens, embed and position them; keep all text.
        patches = patchify(latents, P).transpose(2, 3).flatten(2)  # (B, N, latent_channels*P*P)
        N, L = patches.shape[1], context.shape[1]
        tokens = torch.arange(N, device=latents.device)[None]  # (1, N)
        rows = joint_rows = (
            None  # of the image tokens, and of the cache: image rows, then text rows
        )
        if active is not None:
            tokens, rows = active, flat_rows(active, N)  # (B, K) both
            text_index = torch.arange(N, N + L, device=active.device).expand(len(active), L)
            joint_rows = flat_rows(torch.cat((active, text_index), dim=1), N + L)  # (B, K + L)
            patches = take(patches, rows)  # (B, K, latent_channels*P*P)
        x, text = self.patch_embed(patches), self.context_embed(context)  # (B, K, C), (B, L, C)
        rope = self._rotations(tokens, L, width // P)
        cond = F.silu(self._condition(batch_sigma(sigma, latents), guidance, pooled))  # (B, C)

        # 2. Double blocks: active queries attend to all keys and values, fresh or cached.
        for i, block in enumerate(self.double_blocks):
            x, text = block(x, text, cond, rope, joint_rows, cache and cache.part(("double", i)))

        # 3. Single blocks: the same, with active image rows and all text rows as one sequence.
        K = x.shape[1]
        x = torch.cat((x, text), dim=1)  # (B, K + L, C)
        for i, block in enumerate(self.single_blocks):
            x = block(x, cond, rope, joint_rows, cache and cache.part(("single", i)))

        # 4. The head runs on active rows; the others are filled in by whoever kept them.
        x = self.final(x[:, :K], cond)  # (B, K, latent_channels*P*P)
        if active is not None:
            x = put_(x.new_zeros(len(x), N, x.shape[2]), rows, x)  # (B, N, latent_channels*P*P)
        x = x.unflatten(2, (-1, P * P)).transpose(2, 3)  # (B, N, P*P, latent_channels)
        return unpatchify(x, height, width, P)  # (B, latent_channels, height, width)

    def _condition(self, sigma: Tensor, guidance: Tensor | float | None, pooled: Tensor) -> Tensor:
        """What modulates every block: noise level, prompt and, in dev, guidance, (B, C)."""

        def features(value: Tensor) -> Tensor:  # (B,) float32 -> (B, 256)
            return time_features(1000 * value, 256).to(pooled.dtype)

        cond = self.time_embed(features(sigma)) + self.pooled_embed(pooled)
        if self.config.guidance_embeds:
            scale = batch_sigma(guidance, pooled, "guidance")
            cond = cond + self.guidance_embed(features(scale))
        return cond

    def _rotations(self, tokens: Tensor, text: int, w: int) -> Rope:
        """Rotary positions (B or 1, K + text, 1, D) of the tokens (B or 1, K) of a grid w tokens
        wide, and of text behind them, in float32.

        Image tokens stand at (0, row, column), text at (0, 0, 0), so that it is not turned.
        """
        place = torch.stack((torch.zeros_like(tokens), tokens // w, tokens % w), dim=2)  # (B, K, 3)
        place = F.pad(place, (0, 0, 0, text)).float()  # (B or 1, K + text, 3)
        return axis_turns(place, self.config.axes_dims_rope)

    def _check(self, latents, context, pooled, guidance, active, cache) -> None:
        c = self.config
        like = self.patch_embed.weight
        check_latents(latents, c.latent_channels, c.patch_size, active, cache, like)
        check_prompt(context, pooled, latents, c)
        if c.guidance_embeds and guidance is None:
            raise ValueError(
                "guidance is None, must be a number: this model (FLUX dev) is given it"
            )
        if not c.guidance_embeds and guidance is not None:
            raise ValueError(
                f"guidance is {checks.short(guidance)}, must be None: this model (schnell) has none"
            )


class DoubleBlock(nn.Module):
    """Image and text attend to each other, then each has its own MLP; both go on to the end."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.image, self.context = Stream(config), Stream(config)

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        cond: Tensor,
        rope: Rope,
        rows: Tensor | None,
        cache: KVCache | None,
    ) -> tuple[Tensor, Tensor]:
        """x (B, K, C), text (B, L, C), cond (B, C) -> the same x and text, updated."""
        image, context, K = self.image, self.context, x.shape[1]
        shift, scale, *rest = image.modulate(cond)
        t_shift, t_scale, *t_rest = context.modulate(cond)
        heads = image.attn(modulate(layer_norm(x), shift, scale))  # q, k, v (B, K, H, D)
        t_heads = context.attn(modulate(layer_norm(text), t_shift, t_scale))  # (B, L, H, D)
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(heads, t_heads, strict=True))
        out = attend(q, k, v, rope, rows, cache)  # (B, K + L, C)
        return image.update(x, out[:, :K], *rest), clip(context.update(text, out[:, K:], *t_rest))


class Stream(nn.Module):
    """The weights of one modality in a double block: adaLN modulation, attention, MLP."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        C = config.width
        self.modulation = nn.Linear(C, 6 * C)
        self.attn = Projections(C, config.attention_head_dim)
        self.mlp = MLP(C, 4 * C, C, activation="gelu")

    def modulate(self, cond: Tensor) -> tuple[Tensor, ...]:
        """adaLN: cond (B, C) -> shift, scale, gate of attention, then of the MLP: (B, 1, C)."""
        return self.modulation(cond)[:, None].chunk(6, dim=2)

    def update(
        self, x: Tensor, attended: Tensor, gate: Tensor, shift: Tensor, scale: Tensor,
        gate_mlp: Tensor,
    ) -> Tensor:  # fmt: skip
        """Tokens and what they attended to, (B, tokens, C) each -> the tokens after the block."""
        x = torch.addcmul(x, gate, self.attn.out(attended))
        return torch.addcmul(x, gate_mlp, self.mlp(modulate(layer_norm(x), shift, scale)))


class SingleBlock(nn.Module):
    """Attention and MLP side by side, on image and text tokens as one sequence."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        C = config.width
        self.modulation = nn.Linear(C, 3 * C)
        self.attn = Projections(C, config.attention_head_dim, has_out=False)
        self.mlp = nn.Linear(C, 4 * C)
        self.out = nn.Linear(C + 4 * C, C)  # of both

    def forward(
        self,
        x: Tensor,
        cond: Tensor,
        rope: Rope,
        rows: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:
        """x (B, K + L, C), cond (B, C) -> x, updated."""
        shift, scale, gate = self.modulation(cond)[:, None].chunk(3, dim=2)
        normed = modulate(layer_norm(x), shift, scale)  # (B, K + L, C)
        attended = attend(*self.attn(normed), rope, rows, cache)  # (B, K + L, C)
        hidden = F.gelu(self.mlp(normed), approximate="tanh")  # (B, K + L, 4C)
        return clip(torch.addcmul(x, gate, self.out(torch.cat((attended, hidden), dim=2))))


def attend(
    q: Tensor, k: Tensor, v: Tensor, rope: Rope, rows: Tensor | None, cache: KVCache | None
) -> Tensor:
    """Attention of both kinds of blocks: q, k, v (B, K + L, H, D) of the active image tokens and of
    all text tokens attend to those of all tokens, fresh or cached -> (B, K + L, C)."""
    q, k = rotate(q, rope), rotate(k, rope)  # cached keys are rotated: places do not change
    if cache is not None:
        k, v = cache.write(k, v, rows)  # (B, N + L, H, D)
    return attention(q, k, v)


def clip(x: Tensor) -> Tensor:
    """Into the range of float16, which the residual streams of the official weights leave."""
    return x.clamp(-65504, 65504) if x.dtype == torch.float16 else x
