"""The plan: which steps are dense, which regional, and how many tokens each computes."""

from __future__ import annotations

from ras.config import RASConfig
from ras.steps import Step
from ras.upstream import plan_upstream


def plan(config: RASConfig, steps: int, tokens: int) -> tuple[Step, ...]:
    """Every step of a run of `steps` steps over `tokens` image tokens, known before the first one.

    Dense are the first `start` steps, the refresh steps and everything after `end`; the others are
    regional with round(ratio * tokens) active tokens, at least 1; all tokens active means dense.
    Raises ValueError where the config does not fit a run of this length.
    """
    if steps < 1 or tokens < 1:
        raise ValueError(f"steps is {steps} and tokens {tokens}, both must be at least 1")
    if config.official is not None:
        return plan_upstream(config.official, steps, tokens)
    if config.ratio == 1:
        return (Step(False, tokens),) * steps
    start = max(1, _steps(config.start, steps))
    if start >= steps:
        raise ValueError(
            f"start is {config.start}, must leave a regional step of the {steps} in the run"
        )
    end = steps - 1 if config.end is None else config.end
    if isinstance(end, float):
        end = max(start, round(end * steps) - 1)
    if not start <= end < steps:
        raise ValueError(f"end is {end}, must be within {start}..{steps - 1} in this run")
    refresh = refresh_steps(config.refresh, start, end)
    regional = [t for t in range(start, end + 1) if t not in refresh]
    counts = dict(zip(regional, _counts(config, len(regional), tokens), strict=True))
    if config.max_stale is not None and counts:
        _check_bound(config.max_stale, min(counts.values()), tokens)
    return tuple(
        Step(True, counts[t], True) if counts.get(t, tokens) < tokens else Step(False, tokens)
        for t in range(steps)
    )


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
    return value if isinstance(value, int) else round(value * length)


def _counts(config: RASConfig, regional: int, tokens: int) -> list[int]:
    """Active tokens of each regional step: the ratio, falling linearly around its mean."""
    counts = []
    for i in range(regional):
        position = i / (regional - 1) - 0.5 if regional > 1 else 0.0  # -1/2 .. 1/2
        ratio = config.ratio - config.fall * position
        counts.append(min(tokens, max(1, round(ratio * tokens))))
    return counts


def _check_bound(max_stale: int, fewest: int, tokens: int) -> None:
    needed = forced_count(max_stale, tokens)
    if fewest < needed:
        raise ValueError(
            f"max_stale is {max_stale}, which needs at least {needed} of {tokens} tokens active in "
            f"every regional step, but one has only {fewest}: raise max_stale or the ratio"
        )


def forced_count(max_stale: int, tokens: int) -> int:
    """How many of the longest-stale tokens a step must compute so that none is ever stale for more
    than max_stale steps in a row: ceil(tokens / (max_stale + 1))."""
    return -(-tokens // (max_stale + 1))
