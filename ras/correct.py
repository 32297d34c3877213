"""The correction: a token that is computed again takes back what its guesses got wrong.

While a token is stale it moves along velocities that were reused. Once it is computed again, its
velocity is known on both sides of that stretch, so the stretch can be integrated anew along a curve
through known points, between them instead of beyond the last, and the difference is added to the
latents. It costs no run of the network. Ours, not the paper's; solvers know the idea as a corrector
that uses the next step's prediction (UniPC, arXiv 2302.04867).

B batch, N tokens, K active tokens, C channels, P patch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ras.cache import History
from ras.tokens import mask_of


class Debt(NamedTuple):
    """How far every token was moved since it was last active, and along which stretch.

    moved  (B, N, P*P, C), the sum of weight * reused velocity over the steps since
    sums   (3, B, N), the sums of weight * distance ** 0, 1 and 2; distance is in sigma from the
           step at which the token was last active
    """

    moved: Tensor
    sums: Tensor


def settle(
    debt: Debt | None,
    history: History,
    fresh: Tensor,
    reused: Tensor | None,
    active: Tensor | None,
    sigma: Tensor,
    weight: Tensor | float,
) -> tuple[Debt, Tensor]:
    """The debt after a step, and what to add to the latents of its active tokens, zero for others.

    history        before the step
    fresh, reused  (B, N, P*P, C), what the model computed and what stale tokens reuse
    active         (B, K) token numbers, None when the step is dense
    weight         by how much a velocity of this step moves the latents: in an Euler step the
                   difference of the noise levels
    """
    gap = sigma - history.last_sigma  # (B, N), below 0
    if debt is None:
        debt = Debt(torch.zeros_like(fresh), gap.new_zeros(3, *gap.shape))
    # Newton's form of the parabola through (prior), last and now: last + slope * d + bend * d * (d
    # - gap) at a distance d; where no prior is known the straight line
    slope = (fresh - history.last) / _wide(gap)
    span = _wide(history.last_sigma - history.prior_sigma)
    known = span != 0
    before = (history.last - history.prior) / span.where(known, 1.0)
    bend = (slope - before) / _wide(sigma - history.prior_sigma) * known
    zeroth, first, second = (_wide(total) for total in debt.sums)
    right = history.last * zeroth + slope * first + bend * (second - _wide(gap) * first)
    if active is None:
        return Debt(torch.zeros_like(fresh), torch.zeros_like(debt.sums)), right - debt.moved
    stale = ~mask_of(active, fresh.shape[1])  # (B, N)
    more = weight * torch.stack((torch.ones_like(gap), gap, gap.square()))
    moved = (debt.moved + weight * reused) * _wide(stale)
    return Debt(moved, (debt.sums + more) * stale), (right - debt.moved) * ~_wide(stale)


def _wide(x: Tensor) -> Tensor:
    """(B, N) -> (B, N, 1, 1)."""
    return x[:, :, None, None]
