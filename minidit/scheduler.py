"""Which noise levels a run visits: the official ones, or those that suit the corrected solver."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minidit import checks
from minidit.checks import require
from minidit.flow import SHIFTS, check_schedule, flow_sigmas, shifted

SOLVERS = ("euler", "corrected")
SPACINGS = ("trained", "even")
ENDS = 1.25  # of the corrected solver; measured best on both embedded models (docs/ras.md)


@dataclass(frozen=True)
class SchedulerConfig:
    """What scheduler/scheduler_config.json says that sampling needs, and what to sample with.

    shift             moves steps towards the noise, above 0
    use_dynamic_shifting  the shift depends on the number of image tokens instead: its logarithm is
                      base_shift at base_image_seq_len of them, max_shift at max_image_seq_len, and
                      on the straight line through both for any other number (FLUX dev)
    spacing           of "euler": "trained" is even down to the lowest level of the training, 1/1000
                      (SD3, Lumina-Next), "even" down to 0 (FLUX, Lumina 2), before shifting
    default_solver    "euler", as the official pipelines sample, or "corrected"
    default_steps     of "euler"; corrected_steps of "corrected"
    corrected_shift   of "corrected", None where it is `shift`, too
    default_guidance  1 is off
    The last six are ours: official files lack them, the embedded models' have some.
    Raises ValueError for values that no run can have.
    """

    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    spacing: str = "trained"
    default_solver: str = "euler"
    default_steps: int = 28
    corrected_steps: int = 14
    corrected_shift: float | None = None
    default_guidance: float = 7.0

    def __post_init__(self) -> None:
        checks.config(self)
        least, most = SHIFTS
        require(self, "shift", least <= self.shift <= most, "above 0, within 1e-6..1e6")
        base = self.base_image_seq_len
        longer = self.max_image_seq_len > base
        require(self, "max_image_seq_len", longer, f"above base_image_seq_len = {base}")
        for name in ("base_shift", "max_shift"):
            require(self, name, abs(getattr(self, name)) < 10, "a logarithm within -10..10")
        for name, known in (("spacing", SPACINGS), ("default_solver", SOLVERS)):
            require(self, name, getattr(self, name) in known, f"one of {', '.join(known)}")
        ok = self.corrected_shift is None or least <= self.corrected_shift <= most
        require(self, "corrected_shift", ok, "above 0, within 1e-6..1e6, or null")
        require(self, "default_guidance", self.default_guidance >= 1, "at least 1, finite")

    def steps(self, solver: str) -> int:
        """How many steps a solver takes where nobody says."""
        checks.choice("solver", solver, SOLVERS)
        return self.default_steps if solver == "euler" else self.corrected_steps

    def sigmas(self, steps: int, solver: str, tokens: int) -> Tensor:
        """Noise levels of a run over `tokens` image tokens, (steps + 1,) float32 from 1 down to 0.

        Raises ValueError for steps < 1 or an unknown solver.
        """
        checks.choice("solver", solver, SOLVERS)
        shift = self.shift_at(tokens)
        if solver == "corrected":
            return spaced_sigmas(steps, self.corrected_shift or shift)
        return flow_sigmas(steps, shift) if self.spacing == "trained" else even_sigmas(steps, shift)

    def shift_at(self, tokens: int) -> float:
        """The shift of a run over so many image tokens (diffusers pipeline_flux.py,
        calculate_shift)."""
        checks.integer("tokens", tokens, 1, 2**31)
        if not self.use_dynamic_shifting:
            return self.shift
        length = self.max_image_seq_len - self.base_image_seq_len
        slope = (self.max_shift - self.base_shift) / length
        line = self.base_shift + slope * (tokens - self.base_image_seq_len)
        shift = torch.tensor(line, dtype=torch.float64).exp().item()  # inf where out of range
        return checks.number("shift", shift, *SHIFTS)

    def shifted(self, levels: Tensor, tokens: int) -> Tensor:
        """Noise levels of a caller's own, moved towards the noise as this scheduler's are."""
        checks.floating("levels", levels, "steps + 1")
        return shifted(levels, self.shift_at(tokens)).clamp(max=1)  # rounding goes beyond it


def even_sigmas(steps: int, shift: float) -> Tensor:
    """Evenly spaced noise levels, then shifted, (steps + 1,) float32 from 1 down to 0 (flux
    sampling.py, get_schedule). Raises ValueError for steps < 1 or shift <= 0."""
    return spaced_sigmas(steps, shift, ends=1.0)


def spaced_sigmas(steps: int, shift: float, ends: float = ENDS) -> Tensor:
    """Noise levels with more steps near both ends, (steps + 1,) float32 from 1 down to 0.

    s ** ends / (s ** ends + (1 - s) ** ends) of evenly spaced s, then shifted: ends 1 is even
    spacing. A solver of second order is off where the path bends most, and it bends at the ends.
    Raises ValueError for steps < 1 or shift <= 0.
    """
    check_schedule(steps, shift)
    s = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    s = s**ends / (s**ends + (1 - s) ** ends)
    return shifted(s, shift).float()
