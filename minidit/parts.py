"""The few pieces that several networks share, and their checks at the door.

B batch, N image tokens, K query tokens, L text tokens, H heads, G key-value heads,
D head width, C channels, P patch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidit import checks
from minidit.checks import require

Rope = tuple[Tensor, Tensor]  # cosines and sines, see `turns`


class MLP(nn.Module):
    """Linear, activation ("silu", or the tanh approximation of "gelu"), Linear."""

    def __init__(self, width: int, hidden: int, out: int, activation: str = "silu") -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, out)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = F.silu(x) if self.activation == "silu" else F.gelu(x, approximate="tanh")
        return self.fc2(x)


class GatedMLP(nn.Module):
    """w2(silu(w1(x)) * w3(x))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # in place, as these are by far the largest tensors of the network
        return self.w2(F.silu(self.w1(x), inplace=True).mul_(self.w3(x)))


class RMSNorm(nn.Module):
    """x / rms(x) * weight, times a modulation that the weight takes along.

    Only the sum of squares is in float32, which makes it several times faster than nn.RMSNorm in
    half precision on CPUs.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, modulation: Tensor | float = 1.0) -> Tensor:
        """x (..., width), modulation (B, 1, width) for x (B, tokens, width) -> shape, type of x."""
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)  # (..., 1)
        inverse = (norm.square() / x.shape[-1] + self.eps).rsqrt().to(x.dtype)
        return x * inverse * (self.weight * modulation)


class ScaledHead(nn.Module):
    """adaLN without a shift, and the linear head: x (B, K, width), cond (B, cond_width) ->
    (B, K, out)."""

    def __init__(self, width: int, cond_width: int, out: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(cond_width, width)
        self.linear = nn.Linear(width, out)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        scale = self.modulation(cond)[:, None]  # (B, 1, width)
        return self.linear(layer_norm(x) * (1 + scale))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None,
              scale: float | None = None) -> Tensor:  # fmt: skip
    """Softmax attention: q (B, K, H, D), k and v (B, N, G, D) -> (B, K, H*D).

    With G < H every key-value head serves H / G query heads in a row. mask, bool, broadcasts to
    (B, H, K, N): the keys that each query sees.
    """
    group = q.shape[2] // k.shape[2]
    if group > 1 and mask is not None:  # for both at once GPUs have only a slow kernel
        k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))  # (B, N, H, D)
        group = 1
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, tokens, D)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=group > 1)
    return out.transpose(1, 2).flatten(2)  # (B, K, H*D)


class Projections(nn.Module):
    """Tokens to queries, keys and values, q and k normed per head if asked, and the way back."""

    def __init__(
        self, width: int, head_dim: int, qk_norm: bool = True, has_out: bool = True
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        if has_out:
            self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, K, C) -> q, k, v, each (B, K, H, D)."""
        q, k, v = self.qkv(x).unflatten(2, (3, -1, self.head_dim)).unbind(2)
        return self.q_norm(q), self.k_norm(k), v


class FinalLayer(nn.Module):
    """adaLN and the linear head: (B, K, C) -> (B, K, patch values)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, out)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        shift, scale = self.modulation(cond)[:, None].chunk(2, dim=2)
        return self.linear(modulate(layer_norm(x), shift, scale))


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over channels without weights, eps 1e-6."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift, in one pass over x."""
    return torch.addcmul(shift, x, 1 + scale)


def turns(angle: Tensor) -> Rope:
    """Angles (B, K, 1, D/2), one a pair of adjacent channels -> what `rotate` needs: cosines and
    sines (B, K, 1, D), the sines negative at even channels."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((cos, cos), dim=4).flatten(3), torch.stack((-sin, sin), dim=4).flatten(3)


def axis_turns(places: Tensor, widths: tuple[int, ...]) -> Rope:
    """What turns the heads of tokens at places (B, M, axes) on several axes (flux/math.py, rope).

    Each axis has channels of its own, widths[i] of them: channels 2j and 2j + 1 of an axis of d
    turn by place * 10000 ** (-2j / d).
    """
    angles = []
    for at, d in zip(places.unbind(2), widths, strict=True):
        frequency = 10000.0 ** (torch.arange(0, d, 2, device=places.device) / -d)  # (d / 2,)
        angles.append(at[:, :, None] * frequency)  # (B, M, d / 2)
    return turns(torch.cat(angles, dim=2)[:, :, None])


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotary positions: turn adjacent channels of x (B, K, H, D) pair by pair, in float32."""
    cos, sin = rope  # (B or 1, K, 1, D) each
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    swapped = wide.unflatten(3, (-1, 2)).flip(4).flatten(3)  # (B, K, H, D)
    return (wide * cos).addcmul_(swapped, sin).to(x.dtype)


def time_features(t: Tensor, width: int) -> Tensor:
    """Sinusoidal features (B, width) of times (B,): cosines, then sines, in float32.

    Frequencies 10000 ** (-i / (width / 2)), as in DiT and in both official models.
    """
    half = width // 2
    exponent = -math.log(10000) * torch.arange(half, device=t.device, dtype=torch.float32) / half
    angles = t.float()[:, None] * exponent.exp()  # (B, width / 2)
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def silu_(x: Tensor) -> Tensor:
    """SiLU in place: at full size every tensor counts, and nobody else needs the norm's output."""
    return F.silu(x, inplace=True)


def fast_layout(x: Tensor) -> torch.memory_format:
    """Channels last for 16 bits on a CPU: convolutions are twice as fast that way.

    Not for float32, which gains a fifth at most and loses a digit: GroupNorm sums less exactly.
    """
    fast = x.device.type == "cpu" and x.itemsize == 2
    return torch.channels_last if fast else torch.contiguous_format


def batch_sigma(sigma: Tensor | float, latents: Tensor, name: str = "sigma") -> Tensor:
    """The noise level (or what `name` says) as float32, one per sample (B,); raises ValueError for
    any other shape."""
    B = len(latents)
    if not isinstance(sigma, Tensor):
        sigma = torch.tensor(checks.number(name, sigma, -math.inf), device=latents.device)
    if sigma.numel() != 1 and sigma.shape != (B,):
        raise ValueError(f"{name} has shape {tuple(sigma.shape)}, must be a number or ({B},)")
    if sigma.is_complex() or sigma.is_meta != latents.is_meta or sigma.layout != torch.strided:
        raise ValueError(f"{name} is {checks.short(sigma)}, must be a number or ({B},)")
    return sigma.to(latents.device, torch.float32).reshape(-1).expand(B)


def check_latents(
    latents: Tensor, channels: int, patch: int, active: Tensor | None, cache: Any, like: Tensor
) -> None:
    """Raise ValueError unless latents, active tokens and cache fit together; `like` is a weight of
    the network, whose device they must be on."""
    checks.floating("latents", latents, "batch", channels, "height", "width", like=like)
    height, width = latents.shape[-2:]
    if height % patch or width % patch or 0 in latents.shape:
        raise ValueError(f"latents are {height}x{width}, both must be multiples of {patch}")
    if cache is not None and not callable(getattr(cache, "part", None)):
        raise ValueError(f"cache is {checks.short(cache)}, must be a ras.KVCache or None")
    if active is None:
        return
    tokens = (height // patch) * (width // patch)
    if cache is None:
        raise ValueError("active tokens need a cache that a dense step has filled: pass cache=")
    checks.tensor("active", active, len(latents), "count", like=like)
    if active.dtype != torch.int64:
        raise ValueError(f"active is {active.dtype}, must be int64")
    if not 1 <= active.shape[1] <= tokens:
        raise ValueError(f"active names {active.shape[1]} tokens, must be 1..{tokens}")


def check_prompt(context: Tensor, pooled: Tensor, latents: Tensor, config: Any) -> None:
    """Raise ValueError unless context is (B, L, joint_attention_dim) and pooled (B,
    pooled_projection_dim), as latents (B, ...) are."""
    wide, narrow, B = config.joint_attention_dim, config.pooled_projection_dim, len(latents)
    checks.floating("context", context, B, "tokens", wide, like=latents)
    checks.floating("pooled", pooled, B, narrow, like=latents)


def check_text(context: Tensor, context_mask: Tensor, batch: int, width: int, like: Tensor) -> None:
    """Raise ValueError unless context is (batch, L, width), not empty, and its mask (batch, L)."""
    checks.floating("context", context, batch, "tokens", width, like=like)
    if not context.shape[1]:
        raise ValueError(f"context has shape {tuple(context.shape)}, must have at least 1 token")
    checks.tensor("context_mask", context_mask, *context.shape[:2], like=like)


def check_lumina(config: Any) -> None:
    """Raise ValueError unless heads, MLP and norms of a Lumina's config are possible."""
    G, H, factor = config.num_kv_heads, config.num_attention_heads, config.ffn_dim_multiplier
    require(
        config, "num_kv_heads", G is None or H % G == 0, f"a divisor of num_attention_heads = {H}"
    )
    require(config, "ffn_dim_multiplier", factor is None or factor > 0, "above 0")
    require(config, "norm_eps", config.norm_eps > 0, "above 0")


def check_axes(config: Any, name: str, head: str) -> None:
    """Raise ValueError unless a config splits the width of its heads between three axes."""
    widths, width = getattr(config, name), getattr(config, head)
    ok = len(widths) == 3 and all(d >= 2 and d % 2 == 0 for d in widths) and sum(widths) == width
    require(config, name, ok, f"three even numbers that add up to {head} = {width}")


def check_ids(
    ids: Tensor, table: nn.Embedding, max_length: int | None = None, mask: Tensor | None = None
) -> None:
    """Raise ValueError unless ids are integers (B, L), 1 <= L <= max_length, and in the table.

    The range is checked because a lookup out of range ends a CUDA process. A mask must be (B, L).
    """
    checks.tensor("ids", ids, "batch", "tokens", like=table.weight)
    if ids.dtype not in (torch.int32, torch.int64) or not ids.numel():
        raise ValueError(f"ids are {ids.dtype} {tuple(ids.shape)}, must be int64 and not empty")
    if max_length is not None and ids.shape[1] > max_length:
        raise ValueError(f"ids have {ids.shape[1]} tokens, must be at most {max_length}")
    low, high = ids.aminmax()
    if low < 0 or high >= table.num_embeddings:
        raise ValueError(
            f"ids are within {int(low)}..{int(high)}, must be within 0..{table.num_embeddings - 1}"
        )
    if mask is not None:
        checks.tensor("mask", mask, *ids.shape, like=ids)
