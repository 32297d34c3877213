"""Next-DiT: the diffusion transformer of Lumina-Next (arXiv 2406.18583).

Image tokens attend to each other under 2D rotary positions and, with the same queries, to the text;
keys and values have fewer heads than queries. The official code runs time from 0 = noise to
1 = image and predicts image - noise; both are turned round here, so that callers see a noise level
and a velocity as in `MMDiT`. Region-Adaptive Sampling is `active` and `cache` of `NextDiT.forward`.

B batch, N image tokens, K active image tokens (K = N in a dense step), L text tokens,
H heads, G key-value heads, D head width, C width of the network, P patch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    batch_sigma,
    check_latents,
    check_lumina,
    check_text,
    rotate,
    time_features,
    turns,
)
from ras.cache import KVCache
from ras.tokens import flat_rows, patchify, put_, take, unpatchify


@dataclass(frozen=True)
class NextDiTConfig:
    """Sizes of a Next-DiT; the fields carry the names of the official transformer/config.json.

    two_queries is ours: whether the text has a query of its own, as it has in no published model.
    """

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 2304
    num_layers: int = 24
    num_attention_heads: int = 32
    num_kv_heads: int | None = 8
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    learn_sigma: bool = True
    qk_norm: bool = True
    cross_attention_dim: int = 2048
    two_queries: bool = False

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
        """Width of the embedding of time and prompt."""
        return min(self.hidden_size, 1024)

    @property
    def mlp_width(self) -> int:
        """8/3 of the width, as three matrices then weigh what two of 4 widths do; rounded up."""
        width = int(8 * self.hidden_size / 3)
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return -(-width // self.multiple_of) * self.multiple_of

    @property
    def out_channels(self) -> int:
        """Channels of the head; with learn_sigma its second half is a variance nobody reads."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    def __post_init__(self) -> None:
        checks.config(self)
        unit = 4 * self.num_attention_heads
        allowed = f"a multiple of 4 * num_attention_heads = {unit} (2D rotary positions)"
        require(self, "hidden_size", self.hidden_size % unit == 0, allowed)
        allowed = "at least 4, or proportional attention has no scale"
        require(self, "sample_size", self.sample_size >= 4, allowed)
        check_lumina(self)


class NextDiT(nn.Module):
    """The velocity of Lumina-Next as a function of noisy latents, noise level and prompt."""

    def __init__(self, config: NextDiTConfig) -> None:
        super().__init__()
        self.config = c = checks.instance("config", config, NextDiTConfig)
        # as in the official code, guidance leaves the fourth channel of SDXL's latents
        self.guided_channels = 3 if c.in_channels == 4 else None
        C, P = c.hidden_size, c.patch_size
        self.patch_embed = nn.Linear(P * P * c.in_channels, C)
        # fills up batches of unequal sizes in the official code; kept so that files load whole
        self.pad_token = nn.Parameter(torch.zeros(C))
        self.time_embed = MLP(256, c.cond_width, c.cond_width)
        self.caption_embed = CaptionEmbed(c)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.final = ScaledHead(C, c.cond_width, P * P * c.out_channels)

    def forward(
        self,
        latents: Tensor,
        sigma: Tensor | float,
        context: Tensor,
        context_mask: Tensor,
        *,
        active: Tensor | None = None,
        cache: KVCache | None = None,
        scaling_watershed: float = 1.0,
        proportional_attn: bool = True,
    ) -> Tensor:
        """Velocity (B, in_channels, height, width) = d latents / d sigma.

        latents (B, in_channels, height, width): any size that P divides
        sigma   noise level in [0, 1], 1 = pure noise: a number, or one per sample (B,)
        context (B, L, cross_attention_dim): the prompt; context_mask (B, L), bool or 0 and 1, says
                which of its tokens are text, padding may be on either side
        active  (B, K) int64, the image tokens to compute (row-major numbers, each at most once);
                None computes all. Needs a cache that a dense step has filled. The velocity of the
                other, stale tokens is zero here: `denoise` puts in what was kept for them.
        cache   keys and values, written here; None for plain dense sampling
        scaling_watershed  for sizes other than the trained one: rotary positions are scaled
                linearly while 1 - sigma is below this time, by NTK from there on
        proportional_attn  for the same: sharpen self-attention as tokens become more
        Raises ValueError for shapes that do not fit.
        """
        c, P, like = self.config, self.config.patch_size, self.patch_embed.weight
        check_latents(latents, c.in_channels, P, active, cache, like)
        check_text(context, context_mask, len(latents), c.cross_attention_dim, like)
        watershed = checks.number("scaling_watershed", scaling_watershed, -math.inf)
        checks.flag("proportional_attn", proportional_attn)
        height, width = latents.shape[-2:]
        latents, context = (x.to(like.dtype) for x in (latents, context))
        time = 1 - batch_sigma(sigma, latents)  # (B,), from 0 = noise to 1 = image

        # 1. Keep the active rows of all image tokens, embed and position them.
        patches = patchify(latents, P).transpose(2, 3).flatten(2)  # (B, N, in_channels*P*P)
        N = patches.shape[1]
        rows, tokens = None, torch.arange(N, device=latents.device)[None]  # (1, N)
        if active is not None:
            rows, tokens = flat_rows(active, N), active  # (B, K) both
            patches = take(patches, rows)  # (B, K, in_channels*P*P)
        x = self.patch_embed(patches)  # (B, K, C)
        rope = self._rotations(tokens, height // P, width // P, time, watershed)

        # 2. Every block: active queries attend to all keys and values, fresh or cached.
        mask = context_mask.bool()
        context = context.masked_fill(~mask[:, :, None], 0)  # whatever padding holds, even NaN
        caption = context.sum(1, dtype=torch.float32) / mask.sum(1, keepdim=True).clamp(min=1)
        time_cond = self.time_embed(time_features(time, 256).to(x.dtype))
        cond = F.silu(time_cond + self.caption_embed(caption.to(x.dtype)))  # (B, cond_width)
        # a prompt without text attends to its padding, whose values are zero, instead of to nothing
        mask = (mask | ~mask.any(1, keepdim=True))[:, None, None]  # (B, 1, 1, L)
        scale = self._attention_scale(N) if proportional_attn else None
        for i, block in enumerate(self.blocks):
            x = block(x, context, mask, cond, rope, scale, rows, cache and cache.part(i))

        # 3. The head runs on active rows; the others are filled in by whoever kept them.
        x = self.final(x, cond)  # (B, K, P*P*out_channels)
        if active is not None:
            x = put_(x.new_zeros(len(x), N, x.shape[2]), rows, x)  # (B, N, P*P*out_channels)
        x = unpatchify(x, height, width, P)  # (B, out_channels, height, width)
        return -x[:, : latents.shape[1]]  # (B, in_channels, height, width)

    def _rotations(self, tokens: Tensor, h: int, w: int, time: Tensor, watershed: float) -> Rope:
        """What turns the heads of tokens (B or 1, K).

        Channels 4i and 4i + 1 turn by row * f(i), channels 4i + 2 and 4i + 3 by column * f(i), with
        f(i) = 10000 ** (-4i / D). At `factor` times the trained size, early steps divide f by it,
        late ones multiply its base by it (NTK); the official pipeline does so below the trained
        size, too (diffusers pipeline_lumina.py and embeddings.py).
        """
        c = self.config
        factor = math.sqrt(h * w) * c.patch_size / c.sample_size
        exponent = torch.arange(c.head_dim // 4, device=time.device) * (-4 / c.head_dim)  # (D/4,)
        linear, ntk = 10000.0**exponent / factor, (10000.0 * factor) ** exponent
        f = torch.where(time[:, None] < watershed, linear, ntk)[:, None, :, None]  # (B, 1, D/4, 1)
        place = torch.stack((tokens // w, tokens % w), dim=2)  # (B or 1, K, 2): row, column
        angle = (place[:, :, None] * f).flatten(2)[:, :, None]  # (B, K, 1, D/2), one a channel pair
        return turns(angle)

    def _attention_scale(self, tokens: int) -> float:
        """Proportional attention: 1 / sqrt(D) at the trained number of tokens, sharper above it.

        The official pipeline always counts tokens of 16 x 16 pixels, 8 for each latent.
        """
        trained = (self.config.sample_size * 8 // 16) ** 2
        return math.sqrt(math.log(tokens, trained) / self.config.head_dim)


class CaptionEmbed(nn.Module):
    """The mean of the prompt's tokens, normed and projected: (B, text width) -> (B, cond_width)."""

    def __init__(self, config: NextDiTConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.cross_attention_dim)
        self.linear = nn.Linear(config.cross_attention_dim, config.cond_width)

    def forward(self, caption: Tensor) -> Tensor:
        return self.linear(self.norm(caption))


class Block(nn.Module):
    """Attention to image and text, then an MLP, each with a norm before and after it."""

    def __init__(self, config: NextDiTConfig) -> None:
        super().__init__()
        C, eps = config.hidden_size, config.norm_eps
        self.modulation = nn.Linear(config.cond_width, 4 * C)
        self.attn_norm1 = RMSNorm(C, eps)
        self.attn = Attention(config)
        self.attn_norm2 = RMSNorm(C, eps)
        self.ffn_norm1 = RMSNorm(C, eps)
        self.mlp = GatedMLP(C, config.mlp_width)
        self.ffn_norm2 = RMSNorm(C, eps)
        self.context_norm = RMSNorm(config.cross_attention_dim, eps)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        mask: Tensor,
        cond: Tensor,
        rope: Rope,
        scale: float | None,
        rows: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:
        """x (B, K, C), context (B, L, text width), mask (B, 1, 1, L), cond (B, cond_width) -> x."""
        modulation = self.modulation(cond)[:, None]  # (B, 1, 4C)
        scale_attn, gate_attn, scale_mlp, gate_mlp = modulation.chunk(4, dim=2)  # (B, 1, C) each
        text = self.context_norm(context)  # (B, L, text width)
        out = self.attn(self.attn_norm1(x, 1 + scale_attn), text, mask, rope, scale, rows, cache)
        x = x + self.attn_norm2(out, gate_attn.tanh())
        out = self.mlp(self.ffn_norm1(x, 1 + scale_mlp))
        return x + self.ffn_norm2(out, gate_mlp.tanh())


class Attention(nn.Module):
    """Self-attention plus, under a gate per head, cross-attention to the text."""

    def __init__(self, config: NextDiTConfig) -> None:
        super().__init__()
        C, kv, text = config.hidden_size, config.kv_width, config.cross_attention_dim
        self.head_dim = config.head_dim

        def norm(width: int) -> nn.Module:  # over all heads together
            return nn.LayerNorm(width) if config.qk_norm else nn.Identity()

        self.q, self.q_norm = nn.Linear(C, C, bias=False), norm(C)
        self.k, self.k_norm = nn.Linear(C, kv, bias=False), norm(kv)
        self.v = nn.Linear(C, kv, bias=False)
        self.two_queries = config.two_queries
        if self.two_queries:
            self.context_q, self.context_q_norm = nn.Linear(C, C, bias=False), norm(C)
        self.context_k, self.context_k_norm = nn.Linear(text, kv, bias=False), norm(kv)
        self.context_v = nn.Linear(text, kv, bias=False)
        self.gate = nn.Parameter(torch.zeros(config.num_attention_heads))
        self.out = nn.Linear(C, C, bias=False)

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        mask: Tensor,
        rope: Rope,
        scale: float | None,
        rows: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:
        """x (B, K, C), text (B, L, text width), mask (B, 1, 1, L) -> (B, K, C)."""
        q = rotate(self._heads(self.q_norm(self.q(x))), rope)  # (B, K, H, D)
        k = rotate(self._heads(self.k_norm(self.k(x))), rope)  # (B, K, G, D)
        v = self._heads(self.v(x))  # (B, K, G, D)
        if cache is not None:
            k, v = cache.write(k, v, rows)  # (B, N, G, D)
        image_out = attention(q, k, v, scale=scale)  # (B, K, C)

        if self.two_queries:
            q = rotate(self._heads(self.context_q_norm(self.context_q(x))), rope)  # (B, K, H, D)
        k = self._heads(self.context_k_norm(self.context_k(text)))  # (B, L, G, D)
        v = self._heads(self.context_v(text))  # (B, L, G, D)
        text_out = attention(q, k, v, mask=mask)  # (B, K, C)
        gate = self.gate.tanh().repeat_interleave(self.head_dim)  # (C,)
        return self.out(torch.addcmul(image_out, gate, text_out))

    def _heads(self, x: Tensor) -> Tensor:
        """(B, tokens, heads * D) -> (B, tokens, heads, D)."""
        return x.unflatten(2, (-1, self.head_dim))
