"""Scores: what the velocity just predicted says of every token. A new idea is one entry here.

A score is a function of the `History` after a step and returns one positive number a token (B, N).
Only its order within a sample matters, and ratios once starvation is added (select.py).

B batch, N tokens, C channels, P patch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ras.cache import History


def std(history: History) -> Tensor:
    """Mean over the patch of the standard deviation over channels (Eq. 1 of the paper)."""
    return history.velocity.std(dim=3).mean(dim=2)  # (B, N)


def l2(history: History) -> Tensor:
    """Mean over the patch of the length of the channel vector (upstream's "l2norm")."""
    return history.velocity.norm(dim=3).mean(dim=2)  # (B, N)


def random(history: History) -> Tensor:
    """Uniform noise, the same for every sample of a batch: the control of every comparison."""
    generator = torch.Generator().manual_seed(hash((history.seed, history.step)))
    noise = torch.rand(history.velocity.shape[1], generator=generator)
    return noise.to(history.velocity.device).expand(history.velocity.shape[:2])  # (B, N)


def drift(history: History) -> Tensor:
    """The error to expect from holding: how fast the token's velocity changed per unit of sigma
    between the last two times that it was active, times the sigma it will have been stale for.

    Ours, not the paper's: what a stale token loses is the change of its velocity since, and that is
    its rate of change times the distance. Starvation comes for free: the distance grows.
    """
    change = (history.last - history.prior).flatten(2).norm(dim=2)  # (B, N)
    span = history.prior_sigma - history.last_sigma
    # before the second time no rate is known: the velocity itself stands in for it
    rate = torch.where(span > 0, change / span.clamp_min(1e-6), history.last.flatten(2).norm(dim=2))
    return rate * (history.last_sigma - history.next_sigma)


SCORES = {"std": std, "l2": l2, "drift": drift, "random": random}
