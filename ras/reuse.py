"""Reuse rules: the velocity of a stale token. A new idea is one entry here.

A rule is a function of the `History` before a step and the step's noise level, and returns a
velocity for every token (B, N, P*P, C), of which the stale ones are used.
"""

from __future__ import annotations

from torch import Tensor

from ras.cache import History


def hold(history: History, sigma: Tensor) -> Tensor:
    """The velocity of the last time the token was active (the paper, section 3.2)."""
    return history.last


def extrapolate(history: History, sigma: Tensor, damping: float = 0.7) -> Tensor:
    """Along the line through the last two velocities, as a function of sigma, damped.

    The first-order term of the token's own past, times `damping`: the slope is a difference of two
    noisy predictions, so all of it would be too much. No slope is known before the second time.
    """
    span = history.last_sigma - history.prior_sigma  # (B, N), 0 before the second time
    ahead = damping * (sigma - history.last_sigma) / span.where(span != 0, 1.0)
    return history.last + (history.last - history.prior) * ahead[:, :, None, None]


REUSE = {"hold": hold, "extrapolate": extrapolate}
