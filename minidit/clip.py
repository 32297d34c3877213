"""CLIP text encoder: the two of Stable Diffusion 3, CLIP-L and OpenCLIP-G (arXiv 2103.00020).

A causal pre-norm transformer. SD3 wants two things of it: the states that enter the last layer, one
per token, and the state at the end-of-text token, normed and projected, as a summary of the prompt.

B batch, L text tokens, H heads, D head width, C width of the network, P width of the projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidit import checks
from minidit.checks import require
from minidit.parts import check_ids

LEGACY_EOS = 2  # a wrong end-of-text id that most published CLIP configs carry, SD3's included


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of a CLIP text encoder; the fields carry the names of the official config.json."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    def __post_init__(self) -> None:
        checks.config(self)
        checks.multiple(self, "hidden_size", "num_attention_heads")
        known = self.hidden_act in ACTIVATIONS
        require(self, "hidden_act", known, f"one of {', '.join(ACTIVATIONS)}")


class CLIPTextEncoder(nn.Module):
    """Token ids to a state per token and a pooled one per prompt."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = c = checks.instance("config", config, CLIPConfig)
        self.token_embed = nn.Embedding(c.vocab_size, c.hidden_size)
        self.pos_embed = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.final_norm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.projection = nn.Linear(c.hidden_size, c.projection_dim, bias=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, L) -> penultimate hidden states (B, L, C), pooled and projected state (B, P).

        Penultimate is the input of the last layer, without the final norm. There is no padding
        mask: whatever follows the end-of-text token is encoded like text. Raises ValueError for ids
        of another shape, type or range, or more of them than max_position_embeddings.
        """
        check_ids(ids, self.token_embed, self.config.max_position_embeddings)
        x = self.token_embed(ids) + self.pos_embed.weight[: ids.shape[1]]  # (B, L, C)
        for layer in self.layers:
            penultimate, x = x, layer(x)
        end = x[torch.arange(len(x), device=x.device), self._end_of_text(ids)]  # (B, C)
        return penultimate, self.projection(self.final_norm(end))

    def _end_of_text(self, ids: Tensor) -> Tensor:
        """Position (B,) of the first end-of-text token.

        Under the legacy id that is the largest id of the row, as in OpenAI's code; otherwise the
        first id that matches (transformers modeling_clip.py, CLIPTextTransformer.forward).
        """
        if self.config.eos_token_id == LEGACY_EOS:
            return ids.argmax(dim=1)
        return (ids == self.config.eos_token_id).int().argmax(dim=1)


class Layer(nn.Module):
    """Causal self-attention, then an MLP, each on a LayerNorm of its input."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        C, eps = config.hidden_size, config.layer_norm_eps
        self.norm1 = nn.LayerNorm(C, eps=eps)
        self.attn = CausalAttention(C, config.num_attention_heads)
        self.norm2 = nn.LayerNorm(C, eps=eps)
        self.mlp = MLP(C, config.intermediate_size, config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CausalAttention(nn.Module):
    """Every token attends to itself and to the tokens before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, H, L, D)
            for proj in (self.q, self.k, self.v)
        )
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(x.transpose(1, 2).flatten(2))  # (B, L, C)


class MLP(nn.Module):
    """Linear, activation, Linear."""

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), OpenAI's fast stand-in for GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}
