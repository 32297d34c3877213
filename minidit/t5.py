"""T5 encoder (v1.1): the third text encoder of Stable Diffusion 3 (arXiv 1910.10683).

A pre-norm transformer without biases: RMSNorm, attention that is neither scaled nor causal and
knows positions only by a learned term per distance, shared by all layers, and a gated MLP.

B batch, L text tokens, H heads, D head width, C width of the network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidit import checks
from minidit.checks import require
from minidit.parts import attention, check_ids


@dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 encoder; the fields carry the names of the official config.json."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"

    def __post_init__(self) -> None:
        checks.config(self)
        ok = self.feed_forward_proj == "gated-gelu"
        require(self, "feed_forward_proj", ok, "'gated-gelu', as in T5 v1.1")
        name, far = "relative_attention_num_buckets", self.relative_attention_max_distance
        ok = 4 <= getattr(self, name) and getattr(self, name) // 4 < far
        allowed = f"at least 4 and less than 4 * relative_attention_max_distance = {4 * far}"
        require(self, name, ok, allowed)


class T5Encoder(nn.Module):
    """Token ids to one state per token."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = c = checks.instance("config", config, T5Config)
        self.token_embed = nn.Embedding(c.vocab_size, c.d_model)
        self.relative_bias = nn.Embedding(c.relative_attention_num_buckets, c.num_heads)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_layers))
        self.final_norm = RMSNorm(c.d_model, c.layer_norm_epsilon)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """ids (B, L) -> final hidden states (B, L, C).

        mask (B, L), 1 for tokens to attend to, is there for completeness: SD3 passes none, so that
        padding is attended to. Raises ValueError for ids or a mask that do not fit.
        """
        check_ids(ids, self.token_embed, mask=mask)
        bias = self._position_bias(ids.shape[1])  # (1, H, L, L)
        if mask is not None:
            # the lowest finite number: a row that may attend to nothing must not become NaN
            lowest = torch.finfo(bias.dtype).min
            bias = bias.masked_fill(~mask.bool()[:, None, None, :], lowest)  # (B, H, L, L)

        # The sum of all layers' outputs outgrows float16 (65504 at most), so it is kept in float32
        # at least. transformers ends up there too: its float16 T5 keeps each block's last matrix in
        # float32, and adding that product promotes the sum. RMSNorm goes back to the weights' type.
        x = self.token_embed(ids)  # (B, L, C)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        for layer in self.layers:
            x = layer(x, bias)
        return self.final_norm(x)

    def _position_bias(self, length: int) -> Tensor:
        """What each head adds to the attention of query row to key column, (1, H, L, L)."""
        c = self.config
        position = torch.arange(length, device=self.relative_bias.weight.device)
        buckets = distance_buckets(
            position[None, :] - position[:, None],
            c.relative_attention_num_buckets,
            c.relative_attention_max_distance,
        )  # (L, L)
        return self.relative_bias(buckets).permute(2, 0, 1)[None]


class Layer(nn.Module):
    """Self-attention, then a gated MLP, each on an RMSNorm of its input."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.attn = SelfAttention(config)
        self.norm2 = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.mlp = GatedMLP(config.d_model, config.d_ff)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), bias)
        return x + self.mlp(self.norm2(x))


class SelfAttention(nn.Module):
    """Attention without 1/sqrt(D): T5 folds that factor into the initial weights of q."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        C, inner = config.d_model, config.num_heads * config.d_kv
        self.heads = config.num_heads
        self.q = nn.Linear(C, inner, bias=False)
        self.k = nn.Linear(C, inner, bias=False)
        self.v = nn.Linear(C, inner, bias=False)
        self.out = nn.Linear(inner, C, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (B, L, C), bias (1 or B, H, L, L) -> (B, L, C)."""
        q, k, v = (
            proj(x).unflatten(2, (self.heads, -1))  # (B, L, H, D)
            for proj in (self.q, self.k, self.v)
        )
        return self.out(attention(q, k, v, mask=bias, scale=1.0))


class GatedMLP(nn.Module):
    """down(gelu(gate(x)) * up(x)), with the tanh approximation of GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.gelu(self.gate(x), approximate="tanh")  # (B, L, hidden)
        if x.dtype == torch.float16:
            # these two products leave the range of float16 in T5-XXL
            return F.linear(gate.float() * self.up(x), self.down.weight.float())
        return self.down(gate * self.up(x))


class RMSNorm(nn.Module):
    """x / rms(x) * weight: the division in the type of x, the result in that of the weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps).to(self.weight.dtype) * self.weight


def distance_buckets(distance: Tensor, buckets: int, max_distance: int) -> Tensor:
    """Bucket of each key position - query position, within 0..buckets-1, same shape.

    The upper half of the buckets is for keys after the query. In either half, short distances have
    a bucket each, longer ones share buckets on a logarithmic scale that ends at max_distance (T5,
    section 2.1; transformers modeling_t5.py, _relative_position_bucket).
    """
    half, exact = buckets // 2, buckets // 4
    after = (distance > 0) * half
    distance = distance.abs()
    # float32 and in this order, as a quotient on the edge of a bucket must round as it does there
    scaled = (distance.float() / exact).log() / math.log(max_distance / exact) * (half - exact)
    shared = (exact + scaled.clamp(min=0).long()).clamp(max=half - 1)
    return after + torch.where(distance < exact, distance, shared)
