"""Gemma and Gemma 2: the text encoders of Lumina-Next (arXiv 2403.08295) and of Lumina-Image 2.0
(arXiv 2408.00118).

Causal language models used for their states: both Luminas read what enters the last layer. Rotary
positions, several query heads per key-value head, RMSNorms of weight 1 + w and a gated MLP. The
second generation has norms behind attention and MLP as well, bounds attention's logits softly, and
lets every other layer see a window of the last tokens only.

B batch, L text tokens, H query heads, G key-value heads, D head width, C width of the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidit import checks
from minidit.checks import require
from minidit.parts import attention, check_ids


@dataclass(frozen=True)
class GemmaConfig:
    """Sizes of a Gemma; the fields carry the names of the official config.json.

    model_type "gemma2" is the second generation, which alone needs the fields from
    query_pre_attn_scalar on. layer_types says "sliding_attention" or "full_attention" for every
    layer; files without it alternate, beginning with a window.
    """

    model_type: str = "gemma"
    vocab_size: int = 256000
    hidden_size: int = 3072
    intermediate_size: int = 24576
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    head_dim: int = 256
    max_position_embeddings: int = 8192
    hidden_act: str = "gelu_pytorch_tanh"
    hidden_activation: str | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    rope_parameters: Mapping[str, Any] | None = None  # where transformers 5 puts the two above
    attention_bias: bool = False
    query_pre_attn_scalar: int | None = None
    attn_logit_softcapping: float | None = None
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None

    @property
    def second(self) -> bool:
        """Whether this is Gemma 2."""
        return self.model_type == "gemma2"

    @property
    def sliding(self) -> tuple[bool, ...]:
        """For every layer, whether it sees only the last sliding_window tokens."""
        if not self.second:
            return (False,) * self.num_hidden_layers
        if self.layer_types is None:
            return tuple(i % 2 == 0 for i in range(self.num_hidden_layers))
        return tuple(kind == "sliding_attention" for kind in self.layer_types)

    @property
    def theta(self) -> float:
        """Base of the rotary frequencies, from wherever the file has it."""
        return float((self.rope_parameters or {}).get("rope_theta", self.rope_theta))

    def __post_init__(self) -> None:
        checks.config(self)
        checks.multiple(self, "num_attention_heads", "num_key_value_heads")
        require(self, "head_dim", self.head_dim % 2 == 0, "even")
        # "gelu" in Gemma's files is an old mistake: it was trained with the tanh approximation
        act = "hidden_activation" if self.hidden_activation else "hidden_act"
        ok = getattr(self, act) in ("gelu", "gelu_pytorch_tanh")
        require(self, act, ok, "'gelu' or 'gelu_pytorch_tanh'")
        require(self, "rope_scaling", not self.rope_scaling, "null")
        ok = (self.rope_parameters or {}).get("rope_type", "default") == "default"
        require(self, "rope_parameters", ok, "null, or of rope_type 'default'")
        if not self.theta > 0:
            raise ValueError(f"rope_theta is {self.theta}, must be above 0")
        require(self, "attention_bias", not self.attention_bias, "False")
        ok = self.model_type in ("gemma", "gemma2")
        require(self, "model_type", ok, "'gemma' or 'gemma2'")
        if self.second:
            self._check_second()

    def _check_second(self) -> None:
        for name in ("query_pre_attn_scalar", "attn_logit_softcapping", "sliding_window"):
            value = getattr(self, name)
            require(self, name, value is not None and value > 0, "above 0 in a Gemma 2")
        kinds, count = ("sliding_attention", "full_attention"), self.num_hidden_layers
        types = (kinds[0],) * count if self.layer_types is None else self.layer_types
        ok = len(types) == count and {*types} <= {*kinds}
        require(self, "layer_types", ok, f"{count} times {kinds[0]!r} or {kinds[1]!r}")


class GemmaEncoder(nn.Module):
    """Token ids to the states that enter the last layer.

    The last layer and the final norm hold weights, so that files load whole, but are never run.
    """

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.config = c = checks.instance("config", config, GemmaConfig)
        self.token_embed = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.final_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """ids (B, L), mask (B, L) -> second-to-last hidden states (B, L, C), without final norm.

        mask is 1 for text and 0 for padding, on either side; None means text throughout. States of
        padding are finite and mean nothing. Raises ValueError for ids or a mask that do not fit.
        """
        check_ids(ids, self.token_embed, self.config.max_position_embeddings, mask)
        x = self.token_embed(ids)  # (B, L, C)
        # rounded to the type of the weights first, as in training: 45.25 instead of 45.2548...
        x = x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype)
        rope = rotary_table(ids.shape[1], self.config.head_dim, self.config.theta, x)
        mask = torch.ones_like(ids) if mask is None else mask
        visible = {False: causal_mask(mask)}  # (B, 1, L, L)
        if any(self.config.sliding):
            visible[True] = causal_mask(mask, self.config.sliding_window)  # (B, 1, L, L)
        for layer, sliding in zip(self.layers[:-1], self.config.sliding, strict=False):
            x = layer(x, rope, visible[sliding])
        return x


class Layer(nn.Module):
    """Self-attention, then a gated MLP, each on an RMSNorm of its input; in Gemma 2 what they give
    is normed, too."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        C, eps = config.hidden_size, config.rms_norm_eps
        self.norm1 = RMSNorm(C, eps)
        self.attn = SelfAttention(config)
        self.norm2 = RMSNorm(C, eps)
        self.mlp = GatedMLP(C, config.intermediate_size)
        self.post_norm1 = RMSNorm(C, eps) if config.second else nn.Identity()
        self.post_norm2 = RMSNorm(C, eps) if config.second else nn.Identity()

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], visible: Tensor) -> Tensor:
        x = x + self.post_norm1(self.attn(self.norm1(x), rope, visible))
        return x + self.post_norm2(self.mlp(self.norm2(x)))


class SelfAttention(nn.Module):
    """Attention with rotary positions; each key-value head serves H / G query heads in a row."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        H, G = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.cap = D, config.attn_logit_softcapping if config.second else None
        self.scale = (config.query_pre_attn_scalar if config.second else D) ** -0.5
        self.q = nn.Linear(C, H * D, bias=False)
        self.k = nn.Linear(C, G * D, bias=False)
        self.v = nn.Linear(C, G * D, bias=False)
        self.out = nn.Linear(H * D, C, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], visible: Tensor) -> Tensor:
        """x (B, L, C), visible (B, 1, L, L) -> (B, L, C)."""
        q = rotate(self.q(x).unflatten(2, (-1, self.head_dim)), rope)  # (B, L, H, D)
        k = rotate(self.k(x).unflatten(2, (-1, self.head_dim)), rope)  # (B, L, G, D)
        v = self.v(x).unflatten(2, (-1, self.head_dim))  # (B, L, G, D)
        if self.cap is None:
            return self.out(attention(q, k, v, visible, self.scale))
        return self.out(capped_attention(q, k, v, visible, self.scale, self.cap))


class GatedMLP(nn.Module):
    """down(gelu(gate(x)) * up(x)), with the tanh approximation of GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.gate(x), approximate="tanh") * self.up(x))


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight), all in float32 at least, the result in the type of x."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        scale = 1 + self.weight.to(wide)
        return F.rms_norm(x.to(wide), x.shape[-1:], scale, self.eps).to(x.dtype)


def rotary_table(length: int, width: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (L, 1, D) of positions 0..L-1, in the type and on the device of `like`.

    Channel i and channel i + D/2 turn together, by position * theta ** (-2 i / D).
    """
    channel = torch.arange(0, width, 2, dtype=torch.float32, device=like.device)  # (D/2,)
    position = torch.arange(length, dtype=torch.float32, device=like.device)
    angles = torch.outer(position, 1 / theta ** (channel / width)).repeat(1, 2)  # (L, D)
    return angles.cos()[:, None].to(like.dtype), angles.sin()[:, None].to(like.dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of channels of x (B, L, H, D) by the angle of its position."""
    cos, sin = rope
    first, second = x.chunk(2, dim=3)
    return x * cos + torch.cat((-second, first), dim=3) * sin


def capped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, cap: float
) -> Tensor:
    """`attention` whose logits are bounded softly by cap * tanh(logits / cap), before the mask.

    In full, as scaled_dot_product_attention knows no such bound; prompts are short.
    """
    group = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(group, dim=2).transpose(1, 2) for t in (k, v))  # (B, H, L, D)
    logits = q.transpose(1, 2) @ k.mT * scale  # (B, H, L, L)
    logits = (cap * torch.tanh(logits / cap)).masked_fill(~mask, -torch.inf)
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = logits.softmax(dim=3, dtype=wide).to(q.dtype)
    return (weights @ v).transpose(1, 2).flatten(2)  # (B, L, H * D)


def causal_mask(mask: Tensor, window: int | None = None) -> Tensor:
    """Which keys each query attends to, bool (B, 1, L, L): text that is not after it, and with a
    window among the last `window` tokens, the query's own included.

    A query with no text there (padding) attends to itself instead of to nothing, as a softmax over
    nothing is NaN, which no later mask could undo.
    """
    L = mask.shape[1]
    causal = torch.ones(L, L, dtype=torch.bool, device=mask.device).tril()
    if window is not None:
        causal = causal.triu(1 - window)
    visible = mask.bool()[:, None, None, :] & causal  # (B, 1, L, L)
    alone = ~visible.any(dim=3, keepdim=True) & torch.eye(L, dtype=torch.bool, device=mask.device)
    return visible | alone
