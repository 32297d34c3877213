"""The plan: which steps are dense, which regional, and how many tokens each computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ras.values import is_count, short

if TYPE_CHECKING:
    from ras.config import RASConfig
    from ras.upstream import Upstream

MOST_STEPS = 10_000


class Step(NamedTuple):
    """What a step does: whether it is `regional` or dense, and how many tokens are `active`."""

    regional: bool
    active: int


def plan(config: RASConfig | Upstream, steps: int, tokens: int) -> tuple[Step, ...]:
    """Every step of a run of `steps` steps over `tokens` image tokens, known before the first one.

    Raises ValueError where the config does not fit a run of this length and size.
    """
    if not callable(getattr(config, "plan", None)) or isinstance(config, type):
        raise ValueError(f"config is {short(config)}, must be a ras.RASConfig or alike")
    return config.plan(steps, tokens)


def check_size(steps: int, tokens: int) -> None:
    """Raise ValueError unless a run can have so many steps and image tokens."""
    for name, value in (("steps", steps), ("tokens", tokens)):
        if not is_count(value) or value < 1:
            raise ValueError(f"{name} is {short(value)}, must be an integer of at least 1")
    if steps > MOST_STEPS:
        raise ValueError(f"steps is {steps}, must be at most {MOST_STEPS}")


def plan_steps(config: RASConfig, steps: int, tokens: int) -> tuple[Step, ...]:
    """The plan of a RASConfig.

    Dense are the first `start` steps, the refresh steps and everything after `end`; the others are
    regional with round(ratio * tokens) active tokens, at least 1. All tokens active means dense,
    and so is a run that is too short for a regional step.
    """
    check_size(steps, tokens)
    start = max(1, _steps(config.start, steps))
    end = steps - 1 if config.end is None else config.end
    if not is_count(end):
        end = max(start, round(end * steps) - 1)
    if config.ratio == 1 or start >= steps:
        return (Step(False, tokens),) * steps
    if not start <= end < steps:
        raise ValueError(f"end is {end}, must be within {start}..{steps - 1} in this run")
    refresh = refresh_steps(config.refresh, start, end)
    regional = [t for t in range(start, end + 1) if t not in refresh]
    counts = dict(zip(regional, _counts(config, len(regional), tokens), strict=True))
    return tuple(Step(counts.get(t, tokens) < tokens, counts.get(t, tokens)) for t in range(steps))


def refresh_steps(refresh: int | float | tuple[int, ...], start: int, end: int) -> tuple[int, ...]:
    """The dense steps within start..end. A number r is spread so that r + 1 regional stretches
    remain, equal or longer by one (28 steps, start 4, r = 2: steps 12 and 20, as upstream). The
    share 1/2 of an even range is every other step of it, the last one too."""
    if isinstance(refresh, tuple):
        outside = [t for t in refresh if not start <= t <= end]
        if outside:
            raise ValueError(f"refresh names step {outside[0]}, must be within {start}..{end}")
        return refresh
    length = end - start + 1
    if refresh == 0.5 and length % 2 == 0:
        return tuple(range(start + 1, end + 1, 2))
    count = min(_steps(refresh, length), (length - 1) // 2)  # regional steps on both sides
    regional, stretches = length - count, count + 1
    return tuple(start + i - (-(i + 1) * regional // stretches) for i in range(count))


def _steps(value: int | float, length: int) -> int:
    """A number of steps, or a share of `length` as one."""
    return int(value) if is_count(value) else round(value * length)


def _counts(config: RASConfig, regional: int, tokens: int) -> list[int]:
    """Active tokens of each regional step: the ratio, falling linearly around its mean."""
    counts = []
    for i in range(regional):
        position = i / (regional - 1) - 0.5 if regional > 1 else 0.0  # -1/2 .. 1/2
        ratio = config.ratio - config.fall * position
        counts.append(min(tokens, max(1, round(ratio * tokens))))
    return counts
