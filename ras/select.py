"""Who is active next: what is known of every token, scores of it, and the choice (Eq. 1).

A score is a function of the `History` and returns one positive number a token, (B, N). Without
starvation only the ranking counts; with it, ratios count too. A new idea is one entry in `SCORES`.

B batch, N tokens (row-major over the grid of patches), K active tokens, C channels, P patch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ras.values import short

if TYPE_CHECKING:
    from ras.cache import KVCache
    from ras.config import RASConfig
    from ras.record import Recalled


class Region(NamedTuple):
    """What a regional step is about: who is computed, and what the others move along.

    active  (B, K) int64, token numbers, ascending
    held    (B, N, P*P, C), of which the stale tokens' rows are used, or one number for all
    cache   what the active tokens attend to, None for what the run itself has kept
    """

    active: Tensor
    held: Tensor | float
    cache: KVCache | Recalled | None = None


class History(NamedTuple):
    """All that a selection rule may read: what is known of every token after a step.

    velocity  (B, N, P*P, C) float32, guided, of the last time that the token was computed
    sigma     (B, N) float32, the noise level of that time
    error     (B, N) float32, how much its velocity changed from the time before to that one, per
              unit of sigma: what holding it costs. Before the second time the velocity's own size
    age       (B, N) float32, steps since it was computed: 0 is just now
    skips     (B, N) float32, steps that it was stale for since the run began
    step      number of the step
    region    of the last regional step, None before the first
    """

    velocity: Tensor
    sigma: Tensor
    error: Tensor
    age: Tensor
    skips: Tensor
    step: int
    region: Region | None


def std(history: History) -> Tensor:
    """Mean over the patch of the standard deviation over channels (Eq. 1 of the paper)."""
    return history.velocity.std(dim=3).mean(dim=2)  # (B, N)


def l2(history: History) -> Tensor:
    """Mean over the patch of the length of the channel vector (upstream's "l2norm")."""
    return history.velocity.norm(dim=3).mean(dim=2)  # (B, N)


def error(history: History) -> Tensor:
    """How fast the token's velocity changed when it was last computed: what holding it will cost.

    Ours: half of it, times the stretch of sigma, is the correction that the token took then.
    """
    return history.error


def random(history: History) -> Tensor:
    """Uniform noise that depends on the step alone: the control of every comparison."""
    generator = torch.Generator().manual_seed(history.step)
    noise = torch.rand(history.age.shape[1], generator=generator)
    return noise.to(history.age.device).expand(history.age.shape)  # (B, N)


SCORES = {"std": std, "l2": l2, "error": error, "random": random}


def priority(config: RASConfig, history: History) -> Tensor:
    """How much each token asks to be active, (B, N) float32, the highest first.

    The logarithm of Eq. 1, R = score * exp(k * D), with the sign that makes D always raise the
    priority: logs neither overflow nor underflow, and no sort direction hides in the sign.
    Raises ValueError where a score is not one floating-point number a token.
    """
    score = SCORES[config.score](history)
    wanted = tuple(history.age.shape)
    if not isinstance(score, Tensor) or not score.is_floating_point() or score.shape != wanted:
        got = f"{score.dtype} {tuple(score.shape)}" if isinstance(score, Tensor) else short(score)
        raise ValueError(
            f"score {config.score!r} returned {got:.80}, must be a floating-point tensor {wanted}: "
            "one number a token"
        )
    log_score = score.float().clamp_min(1e-30).log()
    preferred = -log_score if config.prefer == "low" else log_score
    return preferred + config.starvation * history.skips


def select_tokens(config: RASConfig, history: History, count: int) -> Tensor:
    """The `count` tokens of highest priority for the step after `history`: (B, K), ascending.

    Nothing is read back from the device: the count comes from the plan.
    """
    # stable: equal tokens are taken in row-major order on every device
    best = priority(config, history).argsort(dim=1, descending=True, stable=True)[:, :count]
    # ascending rows make the gathers of the forward pass walk through memory in order
    return best.sort(dim=1).values  # (B, K)
