"""RASConfig: every choice that Region-Adaptive Sampling leaves open, and the presets."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ras.plan import Step, plan_steps
from ras.select import SCORES, History, Region, select_tokens
from ras.upstream import Upstream
from ras.values import is_count, is_number, require, short


@dataclass(frozen=True)
class RASConfig:
    """Which steps are regional, how many tokens they compute, and which.

    ratio       share of the tokens that is active in a regional step, in (0, 1]; 1 is dense
    fall        the ratio falls linearly by this much from the first to the last regional step, its
                mean staying `ratio`; 0 keeps it constant
    start       dense steps at the beginning: a number of at least 1, or a share in (0, 1) of the
                run; a run that is no longer than that is dense
    end         the last regional step: an index, or where it lies in the run as a share in (0, 1);
                None for the last step of the run. Later steps are dense
    refresh     dense steps in between: their indices, or a number or a share in (0, 1) of the steps
                start..end to spread evenly over them (fewer where the range is too short for it)
    score       a name in ras.SCORES: what the last velocities say of a token
    prefer      "low" or "high": which end of the score is active. The paper finds the main subject
                at the low end of "std" (section 3.3)
    starvation  weight k of the exponent in Eq. 1, at least 0: a token becomes likelier to be active
                by a factor exp(k) in score per step that it was stale for, whatever `prefer` is

    Anything else with methods `plan` and `select` like these can take its place, as Upstream does.
    Raises ValueError for anything outside these ranges.
    """

    ratio: float = 0.5
    fall: float = 0.0
    start: int | float = 0.35
    end: int | float | None = 0.75
    refresh: int | float | tuple[int, ...] = 0.5
    score: str = "error"
    prefer: str = "high"
    starvation: float = 0.0

    def __post_init__(self) -> None:
        def share(value: object) -> bool:
            return is_number(value) and not is_count(value) and 0 < value < 1

        def steps(value: object, least: int) -> bool:
            return share(value) or (is_count(value) and value >= least)

        for name in ("ratio", "fall", "starvation"):
            require(self, name, is_number(getattr(self, name)), "a finite number")
        require(self, "ratio", 0 < self.ratio <= 1, "in (0, 1]")
        low, high = self.ratio - abs(self.fall) / 2, self.ratio + abs(self.fall) / 2
        if not (low > 0 and high <= 1):
            raise ValueError(
                f"fall is {self.fall} around a ratio of {self.ratio}, "
                f"which spans {low:g} to {high:g}; must stay in (0, 1]"
            )
        allowed = "a number of steps of at least 1, or a share in (0, 1)"
        require(self, "start", steps(self.start, 1), allowed)
        first = self.start if is_count(self.start) else 1
        allowed = "None, a step number, or a share in (0, 1)"
        require(self, "end", self.end is None or is_count(self.end) or share(self.end), allowed)
        ok = not is_count(self.end) or self.end >= first
        require(self, "end", ok, f"at least start = {first}")
        if isinstance(self.refresh, list):
            object.__setattr__(self, "refresh", tuple(self.refresh))
        if isinstance(self.refresh, tuple):
            ok = all(is_count(step) and step >= first for step in self.refresh)
            require(self, "refresh", ok, f"step numbers from start = {first} on")
        else:
            allowed = "a number of steps, a share in (0, 1), or step numbers"
            require(self, "refresh", steps(self.refresh, 0), allowed)
        known = isinstance(self.score, str) and self.score in SCORES
        require(self, "score", known, f"one of {', '.join(SCORES)}")
        require(self, "prefer", self.prefer in ("low", "high"), "'low' or 'high'")
        require(self, "starvation", self.starvation >= 0, "a finite number of at least 0")

    def plan(self, steps: int, tokens: int) -> tuple[Step, ...]:
        """What every step of a run does: see `ras.plan`."""
        return plan_steps(self, steps, tokens)

    def select(self, history: History, step: Step) -> Region:
        """The active tokens of the next step; the others hold the velocity that they have."""
        return Region(select_tokens(self, history, step.active), history.velocity)

    def with_ratio(self, ratio: float) -> RASConfig:
        """The same configuration at another share of active tokens."""
        return replace(self, ratio=ratio)

    @staticmethod
    def preset(name: str) -> RASConfig | Upstream:
        """A named configuration: see `PRESETS`. Raises KeyError for an unknown name."""
        if not isinstance(name, str) or name not in PRESETS:
            raise KeyError(f"there is no preset {short(name)}, only {', '.join(PRESETS)}")
        return PRESETS[name]


PRESETS: dict[str, RASConfig | Upstream] = {
    # What measures best on the embedded models with the corrected solver (docs/ras.md).
    "default": RASConfig(),
    # The paper as written: low std is active (3.3), D counts drops and lets long-stale tokens
    # recover (3.4), first 4 of 28 steps dense, refresh at 12 and 20 of 30 (3.5). Neither k nor how
    # far the ratio falls is given.
    "paper": RASConfig(
        ratio=0.5,
        fall=0.25,
        start=4,
        end=None,
        refresh=2,
        score="std",
        prefer="low",
        starvation=1.0,
    ),
    # The two official scripts, as they run: starvation_scale is parsed but never applied (D01).
    "upstream_sd3": Upstream(high_ratio=0.3, scheduler_end_step=28, error_reset_steps=(12, 20)),
    "upstream_lumina": Upstream(skip_num_step=256, skip_num_step_length=4),
}
