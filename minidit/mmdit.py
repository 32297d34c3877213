"""MMDiT: the diffusion transformer of Stable Diffusion 3 (arXiv 2403.03206) and 3.5.

Image and text tokens are two streams with weights of their own that meet in joint attention.
SD3.5 adds qk-norm, and SD3.5-medium a second, image-only attention in its first blocks (MMDiT-X).
Region-Adaptive Sampling is the `active` and `cache` arguments of `MMDiT.forward`.

B batch, N image tokens, K active image tokens (K = N in a dense step), L text tokens,
H heads, D head width, C width of the network, P patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidit import checks
from minidit.checks import require
from minidit.parts import (
    MLP,
    FinalLayer,
    Projections,
    attention,
    batch_sigma,
    check_latents,
    check_prompt,
    layer_norm,
    modulate,
    time_features,
)
from ras.cache import KVCache
from ras.tokens import flat_rows, patchify, put_, take, unpatchify


@dataclass(frozen=True)
class MMDiTConfig:
    """Sizes of an MMDiT; the fields carry the names of the official transformer/config.json."""

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int = 16
    num_layers: int = 24
    num_attention_heads: int = 24
    attention_head_dim: int = 64
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1536
    pooled_projection_dim: int = 2048
    pos_embed_max_size: int = 192
    qk_norm: str | None = None
    dual_attention_layers: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """C, the width of both streams."""
        return self.num_attention_heads * self.attention_head_dim

    def __post_init__(self) -> None:
        checks.config(self)
        width = f"num_attention_heads * attention_head_dim = {self.width}"
        require(self, "caption_projection_dim", self.caption_projection_dim == self.width, width)
        require(self, "qk_norm", self.qk_norm in (None, "rms_norm"), "null or 'rms_norm'")
        bad = [i for i in self.dual_attention_layers if not 0 <= i < self.num_layers]
        if bad:
            raise ValueError(
                f"dual_attention_layers names layer {bad[0]}, "
                f"must be within 0..{self.num_layers - 1}"
            )


class MMDiT(nn.Module):
    """The velocity of SD3 and SD3.5 as a function of noisy latents, noise level and prompt."""

    guided_channels = None  # guidance acts on every latent channel

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = c = checks.instance("config", config, MMDiTConfig)
        C, P = c.width, c.patch_size
        self.patch_embed = nn.Conv2d(c.in_channels, C, kernel_size=P, stride=P)
        # a stored table, not a formula: the official files differ from the sine-cosine one
        self.register_buffer("pos_embed", torch.zeros(1, c.pos_embed_max_size**2, C))
        self.time_embed = MLP(256, C, C)
        self.pooled_embed = MLP(c.pooled_projection_dim, C, C)
        self.context_embed = nn.Linear(c.joint_attention_dim, C)
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.num_layers))
        self.final = FinalLayer(C, P * P * c.out_channels)

    def forward(
        self,
        latents: Tensor,
        sigma: Tensor | float,
        context: Tensor,
        pooled: Tensor,
        *,
        active: Tensor | None = None,
        cache: KVCache | None = None,
        skip_layers: tuple[int, ...] = (),
    ) -> Tensor:
        """Velocity (B, out_channels, height, width) = d latents / d sigma.

        latents (B, in_channels, height, width): any size that P divides and the position table
                covers
        sigma   noise level in [0, 1], 1 = pure noise: a number, or one per sample (B,)
        context (B, L, joint_attention_dim), pooled (B, pooled_projection_dim): the prompt
        active  (B, K) int64, the image tokens to compute (row-major numbers, each at most once);
                None computes all. Needs a cache that a dense step has filled. The velocity of the
                other, stale tokens is zero here: `denoise` puts in what was kept for them.
        cache   keys and values, written here; None for plain dense sampling
        skip_layers  blocks to leave out (skip-layer guidance of SD3.5)
        Raises ValueError for shapes that do not fit.
        """
        self._check(latents, context, pooled, active, cache, skip_layers)
        height, width, P = *latents.shape[-2:], self.config.patch_size
        latents, context, pooled = (x.to(self.pos_embed.dtype) for x in (latents, context, pooled))
        sigma = batch_sigma(sigma, latents)  # (B,)

        # 1. Keep the active rows of all image tokens, embed and position them.
        patches = patchify(latents, P).transpose(2, 3).flatten(2)  # (B, N, in_channels*P*P)
        N, L = patches.shape[1], context.shape[1]
        tokens = torch.arange(N, device=latents.device)[None]  # (1, N)
        rows = joint_rows = None  # rows of the image-only and of the joint caches
        if active is not None:
            tokens, rows = active, flat_rows(active, N)  # (B, K) both
            text_index = torch.arange(N, N + L, device=active.device).expand(len(active), L)
            joint_rows = flat_rows(torch.cat((active, text_index), dim=1), N + L)  # (B, K + L)
            patches = take(patches, rows)  # (B, K, in_channels*P*P)
        # the published convolution, whose windows do not overlap, as the matrix product that it is
        embed = self.patch_embed
        x = F.linear(patches, embed.weight.flatten(1), embed.bias)  # (B, K, C)
        x = x + self._positions(tokens, height // P, width // P)

        # 2. Every block: active queries attend to all keys and values, fresh or cached.
        text = self.context_embed(context)  # (B, L, C)
        time = time_features(1000 * sigma, 256).to(x.dtype)
        cond = F.silu(self.time_embed(time) + self.pooled_embed(pooled))  # (B, C)
        for i, block in enumerate(self.blocks):
            if i not in skip_layers:
                x, text = block(x, text, cond, rows, joint_rows, cache and cache.part(i))

        # 3. The head runs on active rows; the others are filled in by whoever kept them.
        x = self.final(x, cond)  # (B, K, P*P*out_channels)
        if active is not None:
            x = put_(x.new_zeros(len(x), N, x.shape[2]), rows, x)  # (B, N, P*P*out_channels)
        return unpatchify(x, height, width, P)  # (B, out_channels, height, width)

    def _positions(self, tokens: Tensor, h: int, w: int) -> Tensor:
        """Rows of the stored S x S table for tokens (B or 1, K) of the h x w grid in its centre,
        (B or 1, K, C)."""
        S = self.config.pos_embed_max_size
        row, column = tokens // w + (S - h) // 2, tokens % w + (S - w) // 2
        return F.embedding(row * S + column, self.pos_embed[0])

    def _check(self, latents, context, pooled, active, cache, skip_layers) -> None:
        c = self.config
        check_latents(latents, c.in_channels, c.patch_size, active, cache, self.pos_embed)
        height, width = latents.shape[-2:]
        S, P = c.pos_embed_max_size, c.patch_size
        if max(height, width) > S * P:
            raise ValueError(
                f"latents are {height}x{width}, but the position table of this model ends at "
                f"{S * P}x{S * P} ({S * P * 8} pixels a side)"
            )
        check_prompt(context, pooled, latents, c)
        if not isinstance(skip_layers, tuple | list) or not all(
            isinstance(i, Integral) for i in skip_layers
        ):
            raise ValueError(f"skip_layers is {checks.short(skip_layers)}, must be layer numbers")


class Block(nn.Module):
    """One joint block: image and text attend to each other, then each has its own MLP."""

    def __init__(self, config: MMDiTConfig, index: int) -> None:
        super().__init__()
        self.last = index == config.num_layers - 1
        self.dual = index in config.dual_attention_layers
        self.image = Stream(config, chunks=9 if self.dual else 6, dual=self.dual)
        # nothing reads the text after the last block: there it only gives keys and values
        self.context = Stream(config, chunks=2 if self.last else 6, keys_only=self.last)

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        cond: Tensor,
        rows: Tensor | None,
        joint_rows: Tensor | None,
        cache: KVCache | None,
    ) -> tuple[Tensor, Tensor]:
        """x (B, K, C), text (B, L, C), cond (B, C) -> the same x and text, updated."""
        image, context, K = self.image, self.context, x.shape[1]
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, *second = image.modulate(cond)
        t_shift, t_scale, *t_rest = context.modulate(cond)

        normed = layer_norm(x)
        q, k, v = image.attn(modulate(normed, shift, scale))  # (B, K, H, D) each
        t_q, t_k, t_v = context.attn(modulate(layer_norm(text), t_shift, t_scale))  # (B, L, H, D)
        k, v = torch.cat((k, t_k), dim=1), torch.cat((v, t_v), dim=1)  # (B, K + L, H, D)
        if cache is not None:
            k, v = cache.write(k, v, joint_rows)  # (B, N + L, H, D)
        if not self.last:
            q = torch.cat((q, t_q), dim=1)  # (B, K + L, H, D)
        out = attention(q, k, v)  # (B, K + L, C), in the last block (B, K, C)
        x = torch.addcmul(x, gate, image.attn.out(out[:, :K]))

        if self.dual:
            shift2, scale2, gate2 = second
            q, k, v = image.attn2(modulate(normed, shift2, scale2))  # (B, K, H, D) each
            if cache is not None:
                k, v = cache.part("attn2").write(k, v, rows)  # (B, N, H, D)
            x = torch.addcmul(x, gate2, image.attn2.out(attention(q, k, v)))

        x = torch.addcmul(x, gate_mlp, image.mlp(modulate(layer_norm(x), shift_mlp, scale_mlp)))
        if not self.last:
            t_gate, shift_mlp, scale_mlp, gate_mlp = t_rest
            text = torch.addcmul(text, t_gate, context.attn.out(out[:, K:]))
            hidden = modulate(layer_norm(text), shift_mlp, scale_mlp)
            text = torch.addcmul(text, gate_mlp, context.mlp(hidden))
        return x, text


class Stream(nn.Module):
    """The weights of one modality in a block: adaLN modulation, attention(s), MLP."""

    def __init__(
        self, config: MMDiTConfig, chunks: int, dual: bool = False, keys_only: bool = False
    ) -> None:
        super().__init__()
        C, D, qk_norm = config.width, config.attention_head_dim, config.qk_norm is not None
        self.chunks = chunks
        self.modulation = nn.Linear(C, chunks * C)
        self.attn = Projections(C, D, qk_norm, has_out=not keys_only)
        if dual:
            self.attn2 = Projections(C, D, qk_norm)
        if not keys_only:
            self.mlp = MLP(C, 4 * C, C, activation="gelu")

    def modulate(self, cond: Tensor) -> tuple[Tensor, ...]:
        """adaLN: cond (B, C) -> chunks of (B, 1, C): shift, scale, gate of attention, then of MLP,
        then of the second attention; only (shift, scale) in the last block's text stream."""
        return self.modulation(cond)[:, None].chunk(self.chunks, dim=2)
