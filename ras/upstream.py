"""microsoft/RAS exactly as its code behaves, defects included, so that it can be compared with.

Facts from its `schedulers/ras_scheduling_flow_match_euler_discrete.py` and
`utils/ras_manager.py` (commit a9c5ec8); docs/ras.md lists what differs from the paper. The official
sets are named by what is dropped; here, as everywhere, a token is active (computed) or stale.

B batch, N tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ras.cache import History
from ras.scores import SCORES
from ras.steps import Step


@dataclass(frozen=True)
class Upstream:
    """The official settings under their official names and defaults."""

    sample_ratio: float = 0.5
    metric: str = "std"
    high_ratio: float = 1.0
    starvation_scale: float = 0.1
    scheduler_start_step: int = 4
    scheduler_end_step: int = 30
    error_reset_steps: tuple[int, ...] = (12, 22)
    skip_num_step: int = 0
    skip_num_step_length: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "error_reset_steps", tuple(self.error_reset_steps))

        def require(ok: bool, name: str, allowed: str) -> None:
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)!r}, must be {allowed}")

        require(0 < self.sample_ratio <= 1, "sample_ratio", "in (0, 1]")
        require(self.metric in ("std", "l2norm"), "metric", "'std' or 'l2norm'")
        require(0 < self.high_ratio <= 1, "high_ratio", "in (0, 1]")
        require(math.isfinite(self.starvation_scale), "starvation_scale", "a finite number")
        require(self.scheduler_start_step >= 1, "scheduler_start_step", "at least 1")
        start = self.scheduler_start_step
        require(self.scheduler_end_step >= start, "scheduler_end_step", f"at least {start}")
        require(all(t >= 0 for t in self.error_reset_steps), "error_reset_steps", "at least 0")
        require(self.skip_num_step_length >= 0, "skip_num_step_length", "at least 0")


def plan_upstream(settings: Upstream, steps: int, tokens: int) -> tuple[Step, ...]:
    """The plan of the official code. Raises ValueError where that code crashes or drops all."""
    s, start, end = settings, settings.scheduler_start_step, settings.scheduler_end_step
    late = [t for t in s.error_reset_steps if t >= steps]
    if late:
        raise ValueError(f"error_reset_steps names step {late[0]}, must be below steps = {steps}")
    if s.sample_ratio == 1:
        return (Step(False, tokens),) * steps
    plan: list[Step] = []
    count = None  # of the last selection
    for t in range(steps):
        regional = start <= t <= end and t not in s.error_reset_steps
        # the end is inclusive for being regional but exclusive for selecting (except after step 0)
        select = regional and (t < end or t == 1)
        if select:
            low, high = _stale_bars(s, t, steps, tokens)
            count = tokens - low - high
        if regional and count is None:
            raise ValueError(f"step {t} is regional but nothing was ever selected: raise the end")
        plan.append(Step(True, count, select) if regional else Step(False, tokens))
    return tuple(plan)


def select_upstream(settings: Upstream, history: History, steps: int) -> Tensor:
    """Active tokens (B, K) for the step after `history`, ascending."""
    tokens = history.velocity.shape[1]
    low, high = _stale_bars(settings, history.step + 1, steps, tokens)
    score = SCORES["l2" if settings.metric == "l2norm" else "std"](history)  # (B, N)
    # Eq. 1 as coded: the factor grows with every stale step, whichever end is active
    order = (score * torch.exp(settings.starvation_scale * history.skips)).argsort(dim=1)
    return order[:, low : tokens - high].sort(dim=1).values


def _stale_bars(settings: Upstream, t: int, steps: int, tokens: int) -> tuple[int, int]:
    """How many tokens step t leaves out at the low and at the high end, both rounded down."""
    s, side = settings, math.isqrt(tokens)
    rows, columns = (side, side) if side * side == tokens else (tokens, 1)
    stale = int((1 - s.sample_ratio) * rows * columns)
    if s.skip_num_step_length:
        length = s.skip_num_step_length
        group = t // length - ((steps + s.scheduler_start_step) // length) // 2
        stale = (stale + s.skip_num_step * group) // 64 * 64
    low, high = int(stale * (1 - s.high_ratio)), int(stale * s.high_ratio)
    if high < 1 or low + high >= tokens:
        raise ValueError(
            f"these settings leave {stale} of {tokens} tokens out at step {t} "
            f"({low} low, {high} high), which the official code cannot do: "
            f"at least 1 at the high end and at most {tokens - 1} in all"
        )
    return low, high
