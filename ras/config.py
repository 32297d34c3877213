"""RASConfig: every choice that Region-Adaptive Sampling leaves open, and the presets."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from ras.reuse import REUSE
from ras.scores import SCORES
from ras.upstream import Upstream


@dataclass(frozen=True)
class RASConfig:
    """Which steps are regional, how many tokens they compute, and which.

    ratio       share of the tokens that is active in a regional step, in (0, 1]; 1 is dense
    fall        the ratio falls linearly by this much from the first to the last regional step, its
                mean staying `ratio`; 0 keeps it constant
    start       dense steps at the beginning: a number of at least 1, or a share in (0, 1) of the
                run
    end         last step that may be regional: its index, or a share in (0, 1) of the run that it
                ends, None for the last of the run; later ones are dense
    refresh     dense steps in between: their indices, or a number or a share in (0, 1) of the steps
                start..end to spread evenly over them (fewer where the range is too short for it)
    score       a name in ras.SCORES: what the velocity says of a token
    prefer      "low" or "high": which end of the score is active. The paper finds the main subject
                at the low end of "std" (section 3.3)
    starvation  weight k of the exponent in Eq. 1, at least 0: a token becomes likelier to be active
                by a factor exp(k) in score per stale step, whatever `prefer` is
    starved_by  "age": steps since the token was last active; "skips": all its stale steps so far,
                as in the paper
    max_stale   no token stays stale for more than this many steps in a row; None for no bound
    reuse       a name in ras.REUSE: the velocity of stale tokens
    correct     True: a token that is computed again takes back what its guesses got wrong (see
                ras/correct.py)
    cache       "hold": stale tokens are attended to by the keys and values of the last time that
                they were computed (section 3.4 of the paper); "extrapolate": by a line in sigma
                through those of the last two dense steps, at twice the memory
    seed        of score="random"
    official    settings of microsoft/RAS, made by `RASConfig.upstream(...)`: they reproduce it
                exactly and replace all of the above

    Raises ValueError for anything outside these ranges.
    """

    ratio: float = 0.1
    fall: float = 0.0
    start: int | float = 0.2
    end: int | float | None = None
    refresh: int | float | tuple[int, ...] = 0.5
    score: str = "drift"
    prefer: str = "high"
    starvation: float = 0.0
    starved_by: str = "age"
    max_stale: int | None = None
    reuse: str = "extrapolate"
    correct: bool = False
    cache: str = "hold"
    seed: int = 0
    official: Upstream | None = None

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, allowed: str) -> None:
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)!r}, must be {allowed}")

        for name in ("ratio", "fall", "starvation"):
            require(_is_number(getattr(self, name)), name, "a number")
        require(0 < self.ratio <= 1, "ratio", "in (0, 1]")
        low, high = self.ratio - abs(self.fall) / 2, self.ratio + abs(self.fall) / 2
        if not (low > 0 and high <= 1):
            raise ValueError(
                f"fall is {self.fall} around a ratio of {self.ratio}, "
                f"which spans {low:g} to {high:g}; must stay in (0, 1]"
            )
        shares = [
            x for x in (self.start, self.end, self.refresh) if isinstance(x, float) and 0 < x < 1
        ]
        least = "a number of steps of at least 1, or a share in (0, 1)"
        require((_is_int(self.start) and self.start >= 1) or self.start in shares, "start", least)
        first = self.start if _is_int(self.start) else 1
        ok = self.end is None or _is_int(self.end) or self.end in shares
        require(ok, "end", "None, a step number, or a share in (0, 1)")
        if _is_int(self.end) and self.end < first:
            raise ValueError(f"end is {self.end}, must be at least start = {first}")
        if isinstance(self.refresh, list):
            object.__setattr__(self, "refresh", tuple(self.refresh))
        if isinstance(self.refresh, tuple):
            ok = all(_is_int(step) and step >= first for step in self.refresh)
            require(ok, "refresh", f"step numbers from start = {first} on")
        else:
            ok = (_is_int(self.refresh) and self.refresh >= 0) or self.refresh in shares
            require(ok, "refresh", "a number of steps, a share in (0, 1), or step numbers")
        require(self.score in SCORES, "score", f"one of {', '.join(SCORES)}")
        require(self.prefer in ("low", "high"), "prefer", "'low' or 'high'")
        require(0 <= self.starvation < float("inf"), "starvation", "a finite number of at least 0")
        require(self.starved_by in ("age", "skips"), "starved_by", "'age' or 'skips'")
        bound = self.max_stale
        require(bound is None or (_is_int(bound) and bound >= 1), "max_stale", "None or at least 1")
        require(self.reuse in REUSE, "reuse", f"one of {', '.join(REUSE)}")
        require(isinstance(self.correct, bool), "correct", "True or False")
        require(self.cache in ("hold", "extrapolate"), "cache", "'hold' or 'extrapolate'")
        require(_is_int(self.seed), "seed", "an integer")

    @classmethod
    def preset(cls, name: str) -> RASConfig:
        """A named configuration: see `PRESETS`. Raises KeyError for an unknown name."""
        if name not in PRESETS:
            raise KeyError(f"there is no preset {name!r}, only {', '.join(PRESETS)}")
        return PRESETS[name]

    @classmethod
    def upstream(cls, **settings: Any) -> RASConfig:
        """microsoft/RAS with its own names and defaults, token for token: see `ras.Upstream`.

        Raises ValueError for unknown names and for values with which the official code crashes.
        """
        known = [field.name for field in fields(Upstream)]
        unknown = [name for name in settings if name not in known]
        if unknown:
            raise ValueError(f"upstream has no setting {unknown[0]!r}, only {', '.join(known)}")
        return cls(reuse="hold", official=Upstream(**settings))

    def with_ratio(self, ratio: float) -> RASConfig:
        """The same configuration at another share of active tokens."""
        if self.official is None:
            return replace(self, ratio=ratio)
        return replace(self, official=replace(self.official, sample_ratio=ratio))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_int(value) or isinstance(value, float)


PRESETS = {
    # What measures best on the embedded models (docs/ras.md): the last steps are long in sigma,
    # which makes stale velocities dear, so they are dense.
    "default": RASConfig(ratio=0.05, start=0.12, end=0.85, cache="extrapolate", correct=True),
    # The paper as written: low std is active (3.3), D counts drops and lets long-stale tokens
    # recover (3.4), first 4 of 28 steps dense, refresh at 12 and 20 of 30 (3.5). Neither k nor how
    # far the ratio falls is given.
    "paper": RASConfig(
        ratio=0.5,
        fall=0.25,
        start=4,
        refresh=2,
        score="std",
        prefer="low",
        starvation=1.0,
        starved_by="skips",
        reuse="hold",
    ),  # fmt: skip
    # The two official scripts, as they run: starvation_scale is parsed but never applied (D01).
    "upstream_sd3": RASConfig.upstream(
        high_ratio=0.3, scheduler_end_step=28, error_reset_steps=(12, 20)
    ),
    "upstream_lumina": RASConfig.upstream(skip_num_step=256, skip_num_step_length=4),
}
