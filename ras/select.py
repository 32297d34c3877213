"""Who is active next: score, starvation, staleness bound (Eq. 1 and section 3.3 of the paper).

B batch, N tokens, K active tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ras.cache import History
from ras.config import RASConfig
from ras.plan import forced_count
from ras.scores import SCORES
from ras.upstream import select_upstream


def select(config: RASConfig, history: History, count: int, steps: int) -> Tensor:
    """The `count` tokens of highest priority for the step after `history`: (B, K) int64, ascending.

    steps is the length of the run (only upstream's rule depends on it). Nothing is read back from
    the device: the count comes from the plan.
    """
    if config.official is not None:
        return select_upstream(config.official, history, steps)
    rank = priority(config, history)  # (B, N)
    if config.max_stale is not None:
        # The longest-stale tokens come first, the more important ones first among equals. Each
        # step moves every waiting token up by `forced` places, so none waits longer than the bound.
        forced = forced_count(config.max_stale, rank.shape[1])
        by_rank = rank.argsort(dim=1, descending=True)
        by_age = history.age.gather(1, by_rank).argsort(dim=1, descending=True, stable=True)
        due = by_rank.gather(1, by_age[:, :forced])  # (B, forced)
        rank = rank.scatter(1, due, torch.inf)
    # stable: equal tokens are taken in row-major order on every device
    best = rank.argsort(dim=1, descending=True, stable=True)[:, :count]  # (B, K)
    # ascending rows make the gathers of the forward pass walk through memory in order
    return best.sort(dim=1).values


def priority(config: RASConfig, history: History) -> Tensor:
    """How much each token asks to be active, (B, N) float32, the highest first.

    The logarithm of Eq. 1, R = score * exp(k * D), with the sign that makes D always raise the
    priority: logs neither overflow nor underflow, and no sort direction hides in the sign.
    """
    log_score = SCORES[config.score](history).float().clamp_min(1e-30).log()
    preferred = -log_score if config.prefer == "low" else log_score
    stale = history.age if config.starved_by == "age" else history.skips
    return preferred + config.starvation * stale
