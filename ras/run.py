"""What lives between the steps of one run: who is active, what stale tokens hold, what is cached.

One rule for every token: it moves along the velocity that it last had, and when it is computed
again it takes back what that got wrong. Euler steps, RAS and the corrected solver are all this.

B batch, N tokens, K active tokens, C channels, P patch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ras.cache import KVCache
from ras.plan import Step
from ras.select import History, Region
from ras.tokens import mask_of, patchify, unpatchify
from ras.trace import Trace

if TYPE_CHECKING:
    from ras.config import RASConfig
    from ras.record import Record
    from ras.upstream import Upstream


class Run:
    """The state of one run: `begin` and `end` for every step, `close` however the run ends."""

    def __init__(
        self,
        config: RASConfig | Upstream | None,
        sigmas: Tensor,
        latents: Tensor,
        patch: int,
        correct: bool = False,
        record: Record | None = None,
    ) -> None:
        """config   None computes every token in every step
        sigmas   (steps + 1,) noise levels
        latents  (B, C, H, W), of which only shape and device are read
        patch    a token is a square of patch x patch
        correct  True for the second-order solver
        record   where a dense run leaves its keys and values, if anywhere
        Raises ValueError where the config does not fit a run of this length and size.
        """
        self.steps, self.size, self.patch = len(sigmas) - 1, latents.shape[-2:], patch
        grid = (self.size[0] // patch, self.size[1] // patch)
        N = grid[0] * grid[1]
        dense = (Step(False, N),) * self.steps
        self.plan = dense if config is None else config.plan(self.steps, N)
        self.config, self.correct, self.record = config, correct, record
        self.levels = sigmas.tolist()  # on the host, read before anything runs on the device
        self.sigmas = sigmas.to(latents.device, torch.float32)
        self.cache, self.trace = KVCache(), Trace(grid)
        self.history: History | None = None
        self.region: Region | None = None  # of the step that has begun, None if it is dense
        self.moved: Tensor | float = 0.0  # by every token since it was computed, (B, N, P*P, C)
        if record is not None:
            record.start(self.levels, latents, correct)

    def begin(self, i: int) -> tuple[Tensor | None, KVCache | None]:
        """Which tokens step i computes, (B, K), None for all; and the cache it works with, if any.

        Keys and values are kept from the dense step before a regional one: nobody reads the others.
        """
        if self.record is not None:
            return None, self.record.cache(i)
        now, *following = self.plan[i : i + 2]
        self.region = self.config.select(self.history, now) if now.regional else None
        if self.region is not None:
            cache = self.cache if self.region.cache is None else self.region.cache
            return self.region.active, cache
        return None, self.cache if any(step.regional for step in following) else None

    def end(self, i: int, velocity: Tensor) -> tuple[Tensor, Tensor | float]:
        """What step i moves the latents along, and what to add to them first, both (B, C, H, W).

        velocity  what the model computed, of which only active tokens are read: stale ones hold
        what they have. A token that is computed has moved somehow since the last time; the mean of
        the velocities at both ends of that stretch says better by an order how it should have (the
        trapezoid rule), and the difference is its correction.
        """
        fresh = patchify(velocity, self.patch)  # (B, N, P*P, C)
        sigma = self.sigmas[i].expand(fresh.shape[:2])  # (B, N)
        if self.region is None:
            computed, along = torch.ones_like(sigma, dtype=torch.bool), fresh  # (B, N)
        else:
            computed = mask_of(self.region.active, fresh.shape[1])  # (B, N)
            along = torch.where(_wide(computed), fresh, self.region.held)  # (B, N, P*P, C)
            velocity = unpatchify(along, *self.size, self.patch)  # (B, C, H, W)
        self.trace.record(self.levels[i], self.plan[i], computed)

        before, moved = self.history, self.moved
        self.history = observe(before, fresh, computed, sigma, self.region)
        step = (self.sigmas[i + 1] - self.sigmas[i]) * along  # (B, N, P*P, C)
        self.moved = step + torch.where(_wide(computed), 0.0, moved)
        if not self.correct or before is None:
            return velocity, 0.0
        better = _wide(sigma - before.sigma) * (before.velocity + fresh) / 2
        correction = torch.where(_wide(computed), better - moved, 0.0)
        return velocity, unpatchify(correction, *self.size, self.patch)

    def close(self) -> None:
        """Free the keys and values."""
        self.cache.clear()


def observe(
    before: History | None, fresh: Tensor, computed: Tensor, sigma: Tensor, region: Region | None
) -> History:
    """The history after one more step.

    before    None at the first step
    fresh     (B, N, P*P, C), the velocity that the model computed
    computed  (B, N) bool, the tokens of which it is read
    sigma     (B, N), the noise level of the step
    region    of the step, None if it was dense
    """
    if before is None:
        size, zero = fresh.flatten(2).norm(dim=2), torch.zeros_like(sigma)  # (B, N)
        return History(fresh, sigma, error=size, age=zero, skips=zero, step=0, region=None)
    change = (fresh - before.velocity).flatten(2).norm(dim=2)  # (B, N)
    stale = (~computed).float()
    return History(
        velocity=torch.where(_wide(computed), fresh, before.velocity),
        sigma=torch.where(computed, sigma, before.sigma),
        error=torch.where(computed, change / (before.sigma - sigma), before.error),
        age=(before.age + 1) * stale,
        skips=before.skips + stale,
        step=before.step + 1,
        region=region or before.region,
    )


def _wide(x: Tensor) -> Tensor:
    """(B, N) -> (B, N, 1, 1)."""
    return x[:, :, None, None]
