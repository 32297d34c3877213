"""Unified Next-DiT: the diffusion transformer of Lumina-Image 2.0 (arXiv 2503.21758).

Text and image tokens are one sequence with one set of weights, told apart by three-axis rotary
positions. Before they meet, the image runs through noise refiners and the text through context
refiners; the latter see neither noise level nor image, so `Lumina2.prepare` runs them once for all
steps. The official code runs time from 0 = noise to 1 = image and predicts image - noise; both are
turned round here, so that callers see a noise level and a velocity as in `MMDiT`.
Region-Adaptive Sampling is `active` and `cache` of `Lumina2.forward`.

B batch, N image tokens, K active image tokens (K = N in a dense step), L text tokens, M tokens of a
sequence (K, L or K + L), H heads, G key-value heads, D head width, C width of the network, P patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidit import checks
from minidit.checks import require
from minidit.parts import (
    MLP,
    GatedMLP,
    RMSNorm,
    Rope,
    ScaledHead,
    attention,
    axis_turns,
    batch_sigma,
    check_axes,
    check_latents,
    check_lumina,
    check_text,
    rotate,
    time_features,
)
from ras.cache import KVCache
from ras.tokens import flat_rows, patchify, put_, take, unpatchify


@dataclass(frozen=True)
class Lumina2Config:
    """Sizes of Lumina-Image 2.0; the fields carry the names of the official config.json.

    axes_dim_rope splits a head's channels between text position, row and column; axes_lens says how
    many positions of each the model was made for.
    """

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    out_channels: int | None = None
    hidden_size: int = 2304
    num_layers: int = 26
    num_refiner_layers: int = 2
    num_attention_heads: int = 24
    num_kv_heads: int | None = 8
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    axes_dim_rope: tuple[int, ...] = (32, 32, 32)
    axes_lens: tuple[int, ...] = (300, 512, 512)
    cap_feat_dim: int = 2304

    @property
    def head_dim(self) -> int:
        """D."""
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_width(self) -> int:
        """G * D, the width of keys and of values."""
        return (self.num_kv_heads or self.num_attention_heads) * self.head_dim

    @property
    def cond_width(self) -> int:
        """Width of the embedding of time."""
        return min(self.hidden_size, 1024)

    @property
    def mlp_width(self) -> int:
        """Four widths, rounded up; not 8/3 of them as in Lumina-Next."""
        width = int((self.ffn_dim_multiplier or 1) * 4 * self.hidden_size)
        return -(-width // self.multiple_of) * self.multiple_of

    def __post_init__(self) -> None:
        checks.config(self)
        ok = self.out_channels in (None, self.in_channels)
        require(self, "out_channels", ok, f"null or in_channels = {self.in_channels}")
        checks.multiple(self, "hidden_size", "num_attention_heads")
        check_lumina(self)
        check_axes(self, "axes_dim_rope", "head_dim")
        ok = len(self.axes_lens) == 3 and min(self.axes_lens) >= 1
        require(self, "axes_lens", ok, "three numbers of at least 1")


class Lumina2(nn.Module):
    """The velocity of Lumina-Image 2.0 as a function of noisy latents, noise level and prompt."""

    guided_channels = None  # guidance acts on every latent channel

    def __init__(self, config: Lumina2Config) -> None:
        super().__init__()
        self.config = c = checks.instance("config", config, Lumina2Config)
        C, P, depth = c.hidden_size, c.patch_size, c.num_refiner_layers
        self.patch_embed = nn.Linear(P * P * c.in_channels, C)
        self.time_embed = MLP(256, c.cond_width, c.cond_width)
        self.context_norm = RMSNorm(c.cap_feat_dim, c.norm_eps)
        self.context_embed = nn.Linear(c.cap_feat_dim, C)
        self.context_refiner = nn.ModuleList(Block(c, modulated=False) for _ in range(depth))
        self.noise_refiner = nn.ModuleList(Block(c) for _ in range(depth))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.final = ScaledHead(C, c.cond_width, P * P * c.in_channels)

    def forward(
        self,
        latents: Tensor,
        sigma: Tensor | float,
        context: Tensor,
        context_mask: Tensor,
        *,
        active: Tensor | None = None,
        cache: KVCache | None = None,
        refined: bool = False,
    ) -> Tensor:
        """Velocity (B, in_channels, height, width) = d latents / d sigma.

        latents (B, in_channels, height, width): any size that P divides and axes_lens covers
        sigma   noise level in [0, 1], 1 = pure noise: a number, or one per sample (B,)
        context (B, L, cap_feat_dim): the prompt; context_mask (B, L), bool or 0 and 1, says which
                of its tokens are text, padding may be on either side
        active  (B, K) int64, the image tokens to compute (row-major numbers, each at most once);
                None computes all. Needs a cache that a dense step has filled. The velocity of the
                other, stale tokens is zero here: `denoise` puts in what was kept for them.
        cache   keys and values, written here; None for plain dense sampling
        refined says that context comes from `prepare`, which spares each step the context refiners
        Raises ValueError for shapes that do not fit.
        """
        self._check(latents, context, context_mask, active, cache, refined)
        height, width, P = *latents.shape[-2:], self.config.patch_size
        latents = latents.to(self.patch_embed.weight.dtype)
        time = 1 - batch_sigma(sigma, latents)  # (B,), from 0 = noise to 1 = image
        cond = F.silu(self.time_embed(time_features(time, 256).to(latents.dtype)))  # (B, cond_w.)
        if not refined:
            context = self.prepare(context, context_mask)["context"]  # (B, L, C)

        # 1. Keep the active rows of all image tokens, embed, position and refine them.
        patches = patchify(latents, P).flatten(2)  # (B, N, P*P*in_channels)
        N, L = patches.shape[1], context.shape[1]
        tokens = torch.arange(N, device=latents.device)[None]  # (1, N)
        rows = joint_rows = None  # rows of the image's and of the joint sequence's caches
        if active is not None:
            tokens, rows = active, flat_rows(active, N)  # (B, K) both
            text_index = torch.arange(N, N + L, device=active.device).expand(len(active), L)
            joint_rows = flat_rows(torch.cat((active, text_index), dim=1), N + L)  # (B, K + L)
            patches = take(patches, rows)  # (B, K, P*P*in_channels)
        x = self.patch_embed(patches)  # (B, K, C)
        image_place = image_places(tokens, width // P, context_mask)  # (B, K, 3)
        rope = self._rotations(image_place)
        for i, block in enumerate(self.noise_refiner):
            x = block(x, rope, None, cond, rows, cache and cache.part(("refiner", i)))

        # 2. Every block: active queries attend to all keys and values, fresh or cached. The text,
        # behind the image, is always fresh; attention does not see the order, only positions.
        K = x.shape[1]
        x = torch.cat((x, context), dim=1)  # (B, K + L, C)
        rope = self._rotations(torch.cat((image_place, text_places(context_mask)), dim=1))
        mask = F.pad(context_mask.bool(), (N, 0), value=True)[:, None, None]  # (B, 1, 1, N + L)
        for i, block in enumerate(self.blocks):
            x = block(x, rope, mask, cond, joint_rows, cache and cache.part(i))

        # 3. The head runs on active rows; the others are filled in by whoever kept them.
        x = self.final(x[:, :K], cond)  # (B, K, P*P*in_channels)
        if active is not None:
            x = put_(x.new_zeros(len(x), N, x.shape[2]), rows, x)  # (B, N, P*P*in_channels)
        return -unpatchify(x, height, width, P)  # (B, in_channels, height, width)

    def prepare(
        self, context: Tensor, context_mask: Tensor, refined: bool = False
    ) -> dict[str, Any]:
        """The same conditioning after the context refiners, whose work no step can change.

        context (B, L, cap_feat_dim), context_mask (B, L) -> arguments for `forward` in place of
        these; `denoise` does it before its first step. Refined ones are left as they are.
        """
        if checks.flag("refined", refined):
            return {"context": context, "context_mask": context_mask, "refined": True}
        checks.tensor("context", context, "batch", "tokens", self.config.cap_feat_dim)
        like = self.patch_embed.weight
        check_text(context, context_mask, len(context), self.config.cap_feat_dim, like)
        mask = context_mask.bool()
        x = context.to(self.patch_embed.weight.dtype)
        x = x.masked_fill(~mask[:, :, None], 0)  # whatever padding holds, even NaN
        x = self.context_embed(self.context_norm(x))  # (B, L, C)
        rope = self._rotations(text_places(mask))
        # a prompt without text attends to its padding instead of to nothing; no image sees it
        keys = (mask | ~mask.any(1, keepdim=True))[:, None, None]  # (B, 1, 1, L)
        for block in self.context_refiner:
            x = block(x, rope, keys)
        return {"context": x, "context_mask": context_mask, "refined": True}

    def _rotations(self, place: Tensor) -> Rope:
        """What turns the heads of tokens at these places (B, M, 3)."""
        return axis_turns(place, self.config.axes_dim_rope)

    def _check(self, latents, context, context_mask, active, cache, refined) -> None:
        c = self.config
        like = self.patch_embed.weight
        check_latents(latents, c.in_channels, c.patch_size, active, cache, like)
        height, width = latents.shape[-2:]
        tall, wide = (length * c.patch_size for length in c.axes_lens[1:])
        if height > tall or width > wide:
            raise ValueError(
                f"latents are {height}x{width}, but the positions of this model end at "
                f"{tall}x{wide} (axes_lens)"
            )
        text_width = c.hidden_size if checks.flag("refined", refined) else c.cap_feat_dim
        check_text(context, context_mask, len(latents), text_width, like)


def text_places(context_mask: Tensor) -> Tensor:
    """Positions (B, L, 3) of text tokens on the three axes: (0, 0, 0), (1, 0, 0) .. and so on,
    counting real tokens (B, L) only; what padding gets means nothing."""
    return F.pad(context_mask.long().cumsum(1)[:, :, None] - 1, (0, 2))


def image_places(tokens: Tensor, w: int, context_mask: Tensor) -> Tensor:
    """Positions (B, K, 3) of image tokens (B or 1, K) in a grid w wide: (n, row, column), behind
    the n tokens of their sample's text."""
    n = context_mask.long().sum(1, keepdim=True)  # (B, 1)
    return torch.stack(torch.broadcast_tensors(n, tokens // w, tokens % w), dim=2)


class Block(nn.Module):
    """Self-attention, then an MLP, each with a norm before and after it. Context refiners have no
    modulation."""

    def __init__(self, config: Lumina2Config, modulated: bool = True) -> None:
        super().__init__()
        C, eps = config.hidden_size, config.norm_eps
        self.modulation = nn.Linear(config.cond_width, 4 * C) if modulated else None
        self.attn_norm1 = RMSNorm(C, eps)
        self.attn = Attention(config)
        self.attn_norm2 = RMSNorm(C, eps)
        self.ffn_norm1 = RMSNorm(C, eps)
        self.mlp = GatedMLP(C, config.mlp_width)
        self.ffn_norm2 = RMSNorm(C, eps)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        mask: Tensor | None,
        cond: Tensor | None = None,
        rows: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """x (B, M, C), mask (B, 1, 1, keys), cond (B, cond_width), rows (B, M) of the cache -> x.

        mask None: all keys are seen; rows None: x is the whole sequence.
        """
        scale_attn = gate_attn = scale_mlp = gate_mlp = 1.0
        if self.modulation is not None:
            chunks = self.modulation(cond)[:, None].chunk(4, dim=2)  # (B, 1, C) each
            scale_attn, scale_mlp = 1 + chunks[0], 1 + chunks[2]
            gate_attn, gate_mlp = chunks[1].tanh(), chunks[3].tanh()
        out = self.attn(self.attn_norm1(x, scale_attn), rope, mask, rows, cache)
        x = x + self.attn_norm2(out, gate_attn)
        out = self.mlp(self.ffn_norm1(x, scale_mlp))
        return x + self.ffn_norm2(out, gate_mlp)


class Attention(nn.Module):
    """Self-attention of one sequence with normed, rotated queries and keys."""

    def __init__(self, config: Lumina2Config) -> None:
        super().__init__()
        C, kv, D = config.hidden_size, config.kv_width, config.head_dim
        self.head_dim = D
        self.q, self.q_norm = nn.Linear(C, C, bias=False), RMSNorm(D, config.norm_eps)
        self.k, self.k_norm = nn.Linear(C, kv, bias=False), RMSNorm(D, config.norm_eps)
        self.v = nn.Linear(C, kv, bias=False)
        self.out = nn.Linear(C, C, bias=False)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        mask: Tensor | None,
        rows: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:
        """x (B, M, C) -> (B, M, C); with a cache, its rows are all that is attended to."""
        q = rotate(self.q_norm(self._heads(self.q(x))), rope)  # (B, M, H, D)
        k = rotate(self.k_norm(self._heads(self.k(x))), rope)  # (B, M, G, D)
        v = self._heads(self.v(x))  # (B, M, G, D)
        if cache is not None:
            k, v = cache.write(k, v, rows)  # (B, N or N + L, G, D)
        return self.out(attention(q, k, v, mask=mask))

    def _heads(self, x: Tensor) -> Tensor:
        """(B, M, heads * D) -> (B, M, heads, D)."""
        return x.unflatten(2, (-1, self.head_dim))
