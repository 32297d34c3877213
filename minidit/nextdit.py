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

from minidit.parts import MLP, attention, batch_sigma, check_config, check_latents, time_features
from ras.cache import KVCache
from ras.tokens import flat_rows, patchify, put_, take, unpatchify

Rope = tuple[Tensor, Tensor]  # cosines and sines, see `NextDiT._positions`


@dataclass(frozen=True)
class NextDiTConfig:
    """Sizes of a Next-DiT; the fields carry the names of the official transformer/config.json.

    shared_query is ours: False for files whose self- and cross-attention have queries of their own.
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
    shared_query: bool = True

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
        check_config(self)
        if self.hidden_size % (4 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size is {self.hidden_size}, must be a multiple of "
                f"4 * num_attention_heads = {4 * self.num_attention_heads} (2D rotary positions)"
            )
        if self.num_kv_heads is not None and self.num_attention_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads is {self.num_kv_heads}, "
                f"must divide num_attention_heads = {self.num_attention_heads}"
            )
        if self.sample_size < 4:
            raise ValueError(
                f"sample_size is {self.sample_size}, must be at least 4, "
                "or proportional attention has no scale"
            )
        if self.ffn_dim_multiplier is not None and not self.ffn_dim_multiplier > 0:
            raise ValueError(f"ffn_dim_multiplier is {self.ffn_dim_multiplier}, must be above 0")
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps is {self.norm_eps}, must be above 0")


class NextDiT(nn.Module):
    """The velocity of Lumina-Next as a function of noisy latents, noise level and prompt."""

    guided_channels = 3  # guidance leaves the fourth latent channel alone, as the official code does

    def __init__(self, config: NextDiTConfig) -> None:
        super().__init__()
        self.config = c = config
        C, P = c.hidden_size, c.patch_size
        self.patch_embed = nn.Linear(P * P * c.in_channels, C)
        # fills up batches of unequal sizes in the official code; kept so that files load whole
        self.pad_token = nn.Parameter(torch.zeros(C))
        self.time_embed = MLP(256, c.cond_width, c.cond_width)
        self.caption_embed = CaptionEmbed(c)
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.num_layers))
        self.final = FinalLayer(c)

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
        height, width, P = *latents.shape[-2:], self.config.patch_size
        self._check(latents, context, context_mask, active, cache)
        latents, context = (x.to(self.patch_embed.weight.dtype) for x in (latents, context))
        time = 1 - batch_sigma(sigma, latents)  # (B,), from 0 = noise to 1 = image

        # 1. Embed and position all image tokens, keep the active rows.
        x = patchify(latents, P).transpose(2, 3).flatten(2)  # (B, N, in_channels*P*P)
        x = self.patch_embed(x)  # (B, N, C)
        rope = self._positions(height // P, width // P, time, scaling_watershed)
        N = x.shape[1]
        rows = None  # of the self-attention caches
        if active is not None:
            rows = flat_rows(active, N)  # (B, K)
            x, *rope = (take(each, rows) for each in (x, *rope))  # (B, K, C), (B, K, 1, D) twice

        # 2. Every block: active queries attend to all keys and values, fresh or cached.
        mask = context_mask.bool()
        context = context.masked_fill(~mask[:, :, None], 0)  # whatever padding holds, even NaN
        caption = context.sum(1, dtype=torch.float32) / mask.sum(1, keepdim=True).clamp(min=1)
        time_cond = self.time_embed(time_features(time, 256).to(x.dtype))
        cond = F.silu(time_cond + self.caption_embed(caption.to(x.dtype)))  # (B, cond_width)
        # a prompt without text attends to its padding, whose values are zero, instead of to nothing
        mask = (mask | ~mask.any(1, keepdim=True))[:, None, None]  # (B, 1, 1, L)
        scale = self._attention_scale(N) if proportional_attn else None
        for block in self.blocks:
            x = block(x, context, mask, cond, rope, scale, rows, cache)

        # 3. The head runs on active rows; the others are filled in by whoever kept them.
        x = self.final(x, cond)  # (B, K, P*P*out_channels)
        if active is not None:
            x = put_(x.new_zeros(len(x), N, x.shape[2]), rows, x)  # (B, N, P*P*out_channels)
        x = unpatchify(x, height, width, P)  # (B, out_channels, height, width)
        return -x[:, : latents.shape[1]]  # (B, in_channels, height, width)

    def _positions(self, h: int, w: int, time: Tensor, watershed: float) -> Rope:
        """Cosines and sines of every token's rotation, each (B, h*w, 1, D) float32.

        Channels 4i and 4i + 1 turn by row * f(i), 4i + 2 and 4i + 3 by column * f(i), where
        f(i) = 10000 ** (-4i / D). For images larger or smaller than the trained ones by `factor`
        in length, f is divided by it early and its base multiplied by it (NTK) late; the official
        pipeline applies this at every size (diffusers pipeline_lumina.py, embeddings.py).
        """
        c, device = self.config, time.device
        factor = math.sqrt(h * w) * c.patch_size / c.sample_size
        exponent = torch.arange(0, 1, 4 / c.head_dim, device=device)[: c.head_dim // 4]  # (D / 4,)
        linear, ntk = 10000**-exponent / factor, (10000 * factor) ** -exponent
        frequency = torch.where(time[:, None] < watershed, linear, ntk)[:, None, None]
        row, column = (torch.arange(n, device=device, dtype=torch.float32) for n in (h, w))
        row = (row[:, None, None] * frequency).expand(-1, h, w, -1)  # (B, h, w, D / 4)
        column = (column[:, None] * frequency).expand(-1, h, w, -1)
        angle = torch.stack((row, column), dim=4).flatten(3).view(len(time), h * w, 1, -1)
        ...

    def _attention_scale(self, tokens: int) -> float:
        ...
