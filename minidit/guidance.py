"""Guidance: how the velocities of the prompt and of the negative prompt become one.

B batch, N image tokens, K active tokens, C latent channels, P patch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minidit import checks
from ras import KVCache
from ras.tokens import mask_of, unpatchify

Model = Callable[..., Tensor]


@dataclass(frozen=True)
class Guidance:
    """What guidance does in the steps i = 0 .. n - 1 of a run.

    scale  of classifier-free guidance, u + scale * (c - u), at least 1; 1 leaves the negative
           prompt out and runs half of the network's work

    Skip-layer guidance of SD3.5 adds skip_guidance * (c - s), s being c computed without the blocks
    skip_layers, at the steps with n * skip_start < i < n * skip_stop (diffusers
    pipeline_stable_diffusion_3.py, __call__).

    Lumina-Image 2.0 leaves the negative prompt out from the step on where (i + 1) / n is above
    cfg_trunc_ratio, and with cfg_normalization every row of pixels of a channel gets the norm that
    it has without guidance (diffusers pipeline_lumina2.py, __call__).
    """

    scale: float = 1.0
    skip_layers: tuple[int, ...] = ()
    skip_guidance: float = 2.8
    skip_start: float = 0.01
    skip_stop: float = 0.2
    cfg_trunc_ratio: float = 1.0
    cfg_normalization: bool = False

    def guides(self, step: int, steps: int) -> bool:
        """Whether a step runs the negative prompt, too."""
        return self.scale != 1 and (step + 1) / steps <= self.cfg_trunc_ratio

    def skips(self, step: int, steps: int) -> bool:
        """Whether a step has skip-layer guidance."""
        within = steps * self.skip_start < step < steps * self.skip_stop
        return bool(self.skip_layers) and within

    def __post_init__(self) -> None:
        scale = checks.number("guidance", self.scale, 1, also=" (1 is off)")
        object.__setattr__(self, "scale", scale)
        object.__setattr__(
            self, "skip_guidance", checks.number("skip_guidance", self.skip_guidance, 0)
        )
        checks.number("skip_start", self.skip_start, 0, 1)
        checks.number("skip_stop", self.skip_stop, 0, 1)
        checks.number("cfg_trunc_ratio", self.cfg_trunc_ratio, 0, 1)
        checks.flag("cfg_normalization", self.cfg_normalization)
        if not isinstance(self.skip_layers, tuple | list):
            raise ValueError(f"skip_layers is {checks.short(self.skip_layers)}, must be a list")
        if self.skip_layers and self.scale == 1:
            raise ValueError("skip_layers needs guidance, which is 1, off")


class Guided:
    """A model under guidance, for the steps of one run.

    The halves, negative prompt first, run as one batch and compute the same active tokens.
    """

    def __init__(
        self,
        model: Model,
        cond: Mapping[str, Any],
        uncond: Mapping[str, Any] | None,
        guidance: Guidance,
        steps: int,
        patch: int,
    ) -> None:
        """cond, uncond: see `denoise`; patch is the side of a token, in latents."""
        self.model, self.guidance, self.steps, self.patch = model, guidance, steps, patch
        both = dict(cond)
        if guidance.scale != 1:
            for name, rows in cond.items():
                both[name] = torch.cat((uncond[name], rows)) if isinstance(rows, Tensor) else rows
        if hasattr(model, "prepare"):  # what no step can change
            both = model.prepare(**both)
        self.both = self.prompt = both
        if guidance.scale != 1:
            self.prompt = {
                name: rows.chunk(2)[1] if isinstance(rows, Tensor) else rows
                for name, rows in both.items()
            }
        self.last: Tensor | None = None  # velocities of both halves, of stale tokens the last ones

    def __call__(
        self, i: int, latents: Tensor, sigma: Tensor, active: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        """The velocity of step i, (B, C, H, W) in float32; that of stale tokens means nothing.

        latents (B, C, H, W) at a noise level, active (B, K) or None for all tokens, with the cache.
        """
        how = self.guidance
        if not how.guides(i, self.steps):
            if cache is not None and i and how.guides(i - 1, self.steps):
                cache.keep(slice(-len(latents), None))  # the negative prompt has no part any more
            return self._velocity(latents, sigma, self.prompt, active, cache)
        twice = None if active is None else active.repeat(2, 1)  # (2B, K)
        both = self._velocity(latents.repeat(2, 1, 1, 1), sigma, self.both, twice, cache)
        if how.cfg_normalization:
            both = self._complete(both, twice)
        uncond, cond = both.chunk(2)  # (B, C, H, W) each
        merged = uncond + how.scale * (cond - uncond)
        channels = getattr(self.model, "guided_channels", None)
        if channels is not None:  # Lumina-Next guides only the first three of its four channels
            merged = torch.cat((merged[:, :channels], cond[:, channels:]), dim=1)
        if how.cfg_normalization:
            before, after = (x.norm(dim=3, keepdim=True) for x in (merged, cond))  # (B, C, H, 1)
            merged = merged * (after / before.clamp(min=1e-12))
        if how.skips(i, self.steps):
            apart = None if cache is None else cache.part("skipped layers")
            # where nothing is kept yet, this pass has to compute every token
            rows = active if apart is not None and apart.nbytes else None
            without = {**self.prompt, "skip_layers": how.skip_layers}
            skipped = self._velocity(latents, sigma, without, rows, apart)
            merged = merged + how.skip_guidance * (cond - skipped)
        return merged

    def _velocity(
        self,
        latents: Tensor,
        sigma: Tensor,
        cond: Mapping[str, Any],
        active: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:
        region = {} if cache is None else {"active": active, "cache": cache}
        return self.model(latents, sigma, **cond, **region).float()

    def _complete(self, both: Tensor, active: Tensor | None) -> Tensor:
        """The velocities of both halves, (2B, C, H, W), with those that stale tokens last had:
        norms of whole rows need them. active (2B, K), or None where there are no stale tokens.
        In an edit stale tokens never had any: their velocity is zero and counts in no norm."""
        if active is not None and self.last is not None:
            (height, width), P = both.shape[-2:], self.patch
            computed = mask_of(active, height * width // P**2)  # (2B, N)
            pixels = computed[:, :, None].expand(-1, -1, P * P)  # (2B, N, P*P)
            both = torch.where(unpatchify(pixels, height, width, P), both, self.last)
        self.last = both
        return both
