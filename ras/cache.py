"""What is kept between steps: keys and values for attention, velocities for stale tokens.

B batch, N image tokens, K active tokens, S cached rows of an attention layer (image and text),
H heads, D head width, C channels, P patch.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from ras.tokens import mask_of, put_

Stored = tuple[Tensor, Tensor, Tensor | float]  # keys, values, their noise level


class KVCache:
    """Keys and values of every attention layer (RAS, section 3.4): `write`, `clear`, `nbytes`.

    A dense step leaves its keys and values here as they are, without a copy. A regional step
    attends to all of them, its own rows fresh. What it sees in the rows of stale tokens:

    extrapolate False  the keys and values of the last time that they were computed; a regional step
                       overwrites its rows in place
    extrapolate True   a line in sigma through the last two dense steps; a regional step leaves what
                       is stored as it is. `sigma` has to be set before every step
    """

    def __init__(self, extrapolate: bool = False) -> None:
        self.extrapolate = extrapolate
        self.sigma: Tensor | float = 0.0  # noise level of the step that writes
        self._layers: dict[Hashable, Stored] = {}
        self._prior: dict[Hashable, Stored] = {}  # of the dense step before, to extrapolate

    def write(
        self, layer: Hashable, k: Tensor, v: Tensor, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Store fresh k, v and return the full keys and values to attend to.

        rows None: k, v (B, S, H, D) are all of them. Otherwise k, v (B, K, H, D) belong to these
        rows (B, K), flat as from `tokens.flat_rows`; all other rows are reused.
        Raises ValueError where rows are given but the layer was never written in full.
        """
        if rows is None:
            if self.extrapolate:
                self._prior[layer] = self._layers.get(layer)
            # contiguous: a slice of a fused projection would keep the whole projection alive
            self._layers[layer] = k.contiguous(), v.contiguous(), self.sigma
            return self[layer]
        if layer not in self._layers:
            raise ValueError(
                f"the cache has no keys and values of layer {layer!r} yet: run a dense step "
                "(active=None) with this cache before a regional one"
            )
        full_k, full_v = self._ahead(layer) if self.extrapolate else self[layer]
        if len(k) != len(full_k):
            raise ValueError(
                f"the cache was filled with a batch of {len(full_k)}, got a batch of {len(k)}"
            )
        put_(full_k, rows, k)
        put_(full_v, rows, v)
        return full_k, full_v

    def _ahead(self, layer: Hashable) -> tuple[Tensor, Tensor]:
        """New keys and values on the line through the last two dense steps, at `sigma`; those of
        the last one where there is no step before it."""
        k, v, last = self._layers[layer]
        if self._prior[layer] is None:
            return k.clone(), v.clone()
        prior_k, prior_v, prior = self._prior[layer]
        weight = (self.sigma - prior) / (last - prior)  # above 1: beyond the last step
        return _line(prior_k, k, weight), _line(prior_v, v, weight)

    def __getitem__(self, layer: Hashable) -> tuple[Tensor, Tensor]:
        """The stored keys and values of a layer, (B, S, H, D) each."""
        k, v, _ = self._layers[layer]
        return k, v

    def __iter__(self):
        return iter(self._layers)

    def clear(self) -> None:
        """Forget everything and free the memory."""
        self._layers.clear()
        self._prior.clear()

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers."""
        stored = [*self._layers.values(), *(s for s in self._prior.values() if s is not None)]
        return sum(k.nbytes + v.nbytes for k, v, _ in stored)


def _line(start: Tensor, end: Tensor, weight: Tensor | float) -> Tensor:
    """start + weight * (end - start), in the dtype of both."""
    return torch.lerp(start, end, torch.as_tensor(weight, dtype=start.dtype, device=start.device))


@dataclass(frozen=True)
class History:
    """What is known of every token after a step; scores and reuse rules read it.

    velocity   (B, N, P*P, C) float32, the step's guided velocity: fresh where active, reused where
               stale
    sigma      0-dim, the noise level of that step; next_sigma that of the step after it
    last       (B, N, P*P, C) the velocity when the token was last active, at noise level
    last_sigma (B, N)
    prior      (B, N, P*P, C) the velocity when it was active the time before, at noise level
    prior_sigma (B, N); equal to last and last_sigma until there is a second time
    age        (B, N) float32, steps since the token was active (0: just now)
    skips      (B, N) float32, steps in which the token was stale, since the run began
    step       number of the step
    seed       of the run, for scores that draw random numbers
    """

    velocity: Tensor
    sigma: Tensor
    next_sigma: Tensor
    last: Tensor
    last_sigma: Tensor
    prior: Tensor
    prior_sigma: Tensor
    age: Tensor
    skips: Tensor
    step: int
    seed: int = 0


def observe(
    history: History | None,
    velocity: Tensor,
    reused: Tensor | None,
    active: Tensor | None,
    sigma: Tensor,
    next_sigma: Tensor,
    seed: int = 0,
) -> History:
    """The history after one more step, from `sigma` to `next_sigma`.

    velocity (B, N, P*P, C): what the model computed; only its active rows are read.
    reused   (B, N, P*P, C): what stale tokens use instead (None when the step was dense).
    active   (B, K) token numbers, or None when the step was dense.
    seed     of the run; read at its first step.
    """
    velocity = velocity.float()
    sigmas = sigma.float().expand(velocity.shape[:2])  # (B, N)
    zero = torch.zeros_like(sigmas)
    if history is None:
        return History(
            velocity, sigma, next_sigma, last=velocity, last_sigma=sigmas, prior=velocity,
            prior_sigma=sigmas, age=zero, skips=zero, step=0, seed=seed,
        )  # fmt: skip
    N = velocity.shape[1]
    fresh = torch.ones_like(sigmas, dtype=torch.bool) if active is None else mask_of(active, N)
    wide, stale = fresh[:, :, None, None], (~fresh).float()  # (B, N, 1, 1), (B, N)
    return History(
        velocity=velocity if active is None else torch.where(wide, velocity, reused),
        sigma=sigma,
        next_sigma=next_sigma,
        last=torch.where(wide, velocity, history.last),
        last_sigma=torch.where(fresh, sigmas, history.last_sigma),
        prior=torch.where(wide, history.last, history.prior),
        prior_sigma=torch.where(fresh, history.last_sigma, history.prior_sigma),
        age=(history.age + 1) * stale,
        skips=history.skips + stale,
        step=history.step + 1,
        seed=history.seed,
    )
