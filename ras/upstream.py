"""microsoft/RAS exactly as its code behaves, defects included, so that it can be compared with.

Facts from its `schedulers/ras_scheduling_flow_match_euler_discrete.py` and
`utils/ras_manager.py` (commit a9c5ec8); docs/ras.md lists what differs from the paper. The official
sets are named by what is dropped; here, as everywhere, a token is active (computed) or stale.

B batch, N tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ras.plan import check_size
from ras.select import SCORES, History, Region
from ras.values import is_count, is_number, require


class OfficialStep(NamedTuple):
    """A step of the official code: how many tokens are stale at the low and the high end of the
    score, None where it selects nothing."""

    regional: bool
    active: int
    low: int | None = None
    high: int | None = None


@dataclass(frozen=True)
class Upstream:
    """The official settings under their official names and defaults: `ras=Upstream(...)`.

    Raises ValueError for values with which the official code crashes.
    """

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
        for name in ("sample_ratio", "high_ratio", "starvation_scale"):
            require(self, name, is_number(getattr(self, name)), "a finite number")
        for name in ("scheduler_start_step", "scheduler_end_step", "skip_num_step"):
            require(self, name, is_count(getattr(self, name)), "an integer")
        require(self, "sample_ratio", 0 < self.sample_ratio <= 1, "in (0, 1]")
        require(self, "metric", self.metric in ("std", "l2norm"), "'std' or 'l2norm'")
        require(self, "high_ratio", 0 < self.high_ratio <= 1, "in (0, 1]")
        start, length = self.scheduler_start_step, self.skip_num_step_length
        require(self, "scheduler_start_step", start >= 1, "at least 1")
        require(self, "scheduler_end_step", self.scheduler_end_step >= start, f"at least {start}")
        resets = self.error_reset_steps
        ok = isinstance(resets, tuple | list) and all(is_count(t) and t >= 0 for t in resets)
        require(self, "error_reset_steps", ok, "step numbers of at least 0")
        object.__setattr__(self, "error_reset_steps", tuple(resets))
        require(self, "skip_num_step_length", is_count(length) and length >= 0, "at least 0")

    def with_ratio(self, ratio: float) -> Upstream:
        """The same settings at another share of active tokens."""
        return replace(self, sample_ratio=ratio)

    def plan(self, steps: int, tokens: int) -> tuple[OfficialStep, ...]:
        """The plan of the official code. Raises ValueError where that code crashes or drops all."""
        check_size(steps, tokens)
        late = [t for t in self.error_reset_steps if t >= steps]
        if late:
            raise ValueError(
                f"error_reset_steps names step {late[0]}, must be below steps = {steps}: take more "
                "steps, or earlier resets"
            )
        dense, plan = OfficialStep(False, tokens), []
        last = None  # the last step that selected
        for t in range(steps):
            regional = self.scheduler_start_step <= t <= self.scheduler_end_step
            if not regional or t in self.error_reset_steps or self.sample_ratio == 1:
                plan.append(dense)
            # the end step is regional but selects nothing, except after step 0
            elif t < self.scheduler_end_step or t == 1:
                low, high = self._stale_bars(t, steps, tokens)
                last = OfficialStep(True, tokens - low - high, low, high)
                plan.append(last)
            elif last is None:
                raise ValueError(
                    f"step {t} is regional but nothing was ever selected: raise scheduler_end_step"
                )
            else:
                plan.append(OfficialStep(True, last.active))
        return tuple(plan)

    def _stale_bars(self, t: int, steps: int, tokens: int) -> tuple[int, int]:
        """How many tokens step t leaves out at the low and at the high end, both rounded down."""
        side = math.isqrt(tokens)
        rows, columns = (side, side) if side * side == tokens else (tokens, 1)
        stale = int((1 - self.sample_ratio) * rows * columns)
        length = self.skip_num_step_length
        if length:
            group = t // length - ((steps + self.scheduler_start_step) // length) // 2
            stale = (stale + self.skip_num_step * group) // 64 * 64
        low, high = int(stale * (1 - self.high_ratio)), int(stale * self.high_ratio)
        if high < 1 or low + high >= tokens:
            advice = "take another ratio or a larger picture"
            if length:
                advice = (
                    f"skip_num_step = {self.skip_num_step} changes that by as many tokens every "
                    f"{length} steps, which suits the 4096 tokens of 1024 px: scale it with the "
                    "number of tokens"
                )
            raise ValueError(
                f"the official settings leave {stale} of {tokens} tokens out at step {t} ({low} "
                f"low, {high} high), which the official code cannot do: at least 1 at the high end "
                f"and at most {tokens - 1} in all; {advice}"
            )
        return low, high

    def select(self, history: History, step: OfficialStep) -> Region:
        """Who is active next. The end step selects nothing: it repeats the last regional step."""
        if step.low is None:
            return history.region
        score = SCORES["l2" if self.metric == "l2norm" else "std"](history)  # (B, N)
        # Eq. 1 as coded: the factor grows with every stale step, whichever end is active
        order = (score * torch.exp(self.starvation_scale * history.skips)).argsort(dim=1)
        active = order[:, step.low : order.shape[1] - step.high]  # (B, K)
        return Region(active.sort(dim=1).values, history.velocity)
