"""What a run did, step by step, and its pictures.

B batch, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ras.plan import Step
from ras.values import is_count, short


@dataclass
class Trace:
    """One entry a step in every list: noise level, plan, and which tokens were computed.

    sigmas  noise level at the start of the step
    steps   the plan: `.regional`, `.active`
    active  (B, N) bool, row-major tokens, true where the step computed the token
    grid    rows and columns of tokens
    """

    grid: tuple[int, int]
    sigmas: list[float] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    active: list[Tensor] = field(default_factory=list)

    def record(self, sigma: float, step: Step, computed: Tensor) -> None:
        """Add a step that computed these tokens (B, N)."""
        self.sigmas.append(sigma)
        self.steps.append(step)
        self.active.append(computed)

    @property
    def token_steps(self) -> int:
        """Tokens computed per sample, summed over the steps."""
        return sum(step.active for step in self.steps)

    @property
    def share(self) -> float:
        """`token_steps` as a share of the same number of dense steps, in (0, 1]."""
        return self.token_steps / (len(self.steps) * self.grid[0] * self.grid[1])

    def heat(self, sample: int = 0) -> Tensor:
        """Share of the regional steps in which each token was active, (rows, columns) float32.

        Raises ValueError for a sample that there is not.
        """
        count = len(self.active[0]) if self.active else 1
        if not is_count(sample) or not 0 <= sample < count:
            raise ValueError(f"sample is {short(sample)}, must be within 0..{count - 1}")
        maps = [a[sample] for a, s in zip(self.active, self.steps, strict=True) if s.regional]
        if not maps:
            return torch.ones(self.grid)
        return torch.stack(maps).float().mean(dim=0).view(self.grid).cpu()
