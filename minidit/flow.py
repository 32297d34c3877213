"""Rectified flow: noise levels, guidance, and the one sampling loop of both families.

x(sigma) = (1 - sigma) * image + sigma * noise, so d x / d sigma = noise - image = velocity: sigma 1
is pure noise, sigma 0 the image, and sampling integrates the velocity from 1 down to 0.

B batch, N image tokens, K active tokens, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ras import REUSE, KVCache, RASConfig, Trace, observe, select, settle
from ras import plan as make_plan
from ras.tokens import patchify, unpatchify

Callback = Callable[[int, float, Tensor, Tensor, "Tensor | None"], None]


@dataclass(frozen=True)
class SchedulerConfig:
    """What scheduler/scheduler_config.json says that sampling needs, and what to sample with.

    default_steps and default_guidance are ours: official files lack them, the embedded models'
    have them.
    """

    shift: float = 1.0
    num_train_timesteps: int = 1000
    default_steps: int = 28
    default_guidance: float = 7.0

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"shift is {self.shift}, must be above 0")
        if self.num_train_timesteps < 1 or self.default_steps < 1:
            raise ValueError("num_train_timesteps and default_steps must be at least 1")


def flow_sigmas(steps: int, shift: float, num_train_timesteps: int = 1000) -> Tensor:
    """Noise levels of a run, (steps + 1,) float32 from 1 down to 0.

    shift moves steps towards the noise: s -> shift * s / (1 + (shift - 1) * s). As in the official
    scheduler it acts twice at the low end: the last level before 0 is the shifted 1/1000, spacing
    is linear from 1 to there, and every level is shifted again (diffusers
    scheduling_flow_match_euler_discrete.py, set_timesteps). Raises ValueError for steps < 1 or
    shift <= 0.
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps is {steps!r}, must be an integer of at least 1")
    if not shift > 0:
        raise ValueError(f"shift is {shift!r}, must be above 0")

    def shifted(s: Any) -> Any:
        return shift * s / (1 + (shift - 1) * s)

    T = num_train_timesteps
    lowest = shifted(torch.tensor(1 / T, dtype=torch.float32)).item()
    levels = shifted(np.linspace(T, lowest * T, steps) / T)  # float64, as the official scheduler
    return torch.from_numpy(np.append(levels, 0.0)).float()


@torch.no_grad()
def denoise(
    model: Callable[..., Tensor],
    latents: Tensor,
    sigmas: Tensor,
    cond: Mapping[str, Any],
    uncond: Mapping[str, Any] | None = None,
    guidance: float = 1.0,
    *,
    ras: RASConfig | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    order: int = 1,
) -> tuple[Tensor, Trace | None]:
    """Integrate the velocity along sigmas, and with RAS if asked.

    model    model(latents, sigma, **cond) -> velocity (B, C, H, W); with RAS it is also given
             `active` and `cache`
    latents  (B, C, H, W) at noise level sigmas[0]
    sigmas   (steps + 1,) falling noise levels
    cond     the model's conditioning arguments: tensors of B rows, anything else is passed as it
             is; uncond the same for the empty or negative prompt, needed where guidance is not 1
    callback callback(step, sigma, latents, velocity, active) after every step: the latents after
             it, active (B, K) token numbers or None for a dense step
    order    1 for Euler steps, as the official pipelines take; 2 for Adams-Bashforth steps, which
             follow the flow much more closely at no cost
    Returns latents at sigmas[-1] in float32, and the trace of the run if `ras` is given.
    Raises ValueError for shapes and settings that do not fit.
    """
    _check(latents, sigmas, cond, uncond, guidance, order)
    steps, (_, _, height, width) = len(sigmas) - 1, latents.shape
    levels = sigmas.tolist()  # read back once, before anything runs on the device
    sigmas = sigmas.to(latents.device, torch.float32)
    latents = latents.float()
    if guidance != 1:  # both halves of the guidance run as one batch
        cond = {
            name: torch.cat((uncond[name], rows)) if isinstance(rows, Tensor) else rows
            for name, rows in cond.items()
        }
    patch = model.config.patch_size if hasattr(model, "config") else 2
    grid = (height // patch, width // patch)
    plan = make_plan(ras, steps, grid[0] * grid[1]) if ras else ()
    trace = Trace(grid) if ras else None
    kv = KVCache(extrapolate=ras is not None and ras.cache == "extrapolate")
    ahead = 2 if kv.extrapolate else 1  # dense steps as long as this before a regional one are kept
    weights = velocity_weights(levels, order)
    history = kept = chosen = debt = previous = None
    try:
        for i in tqdm(range(steps), disable=not progress, desc="denoising", unit="step"):
            region: dict[str, Any] = {}
            if plan:
                step = plan[i]
                if step.select:  # who is active now, and what the others will reuse
                    chosen, kept = select(ras, history, step.active, steps), history  # (B, K)
                if any(s.regional for s in plan[i : i + 1 + ahead]):
                    region = {"active": chosen if step.regional else None, "cache": kv}
                    kv.sigma = sigmas[i]
            velocity = guided_velocity(model, latents, sigmas[i], cond, guidance, **region)
            active = region.get("active")
            if plan:
                reused = None if active is None else REUSE[ras.reuse](kept, sigmas[i])
                fresh = patchify(velocity, patch)  # (B, N, P*P, C)
                if ras.correct and history is not None:
                    debt, correction = settle(
                        debt, history, fresh, reused, active, sigmas[i], sum(weights[i])
                    )
                    latents = latents + unpatchify(correction, height, width, patch)
                history = observe(
                    history, fresh, reused, active, sigmas[i], sigmas[i + 1], ras.seed
                )
                velocity = unpatchify(history.velocity, height, width, patch)  # (B, C, H, W)
                trace.record(levels[i], step, active, latents)
            latents = latents + weights[i][0] * velocity  # the Euler step
            if previous is not None:  # and what makes it one of second order
                latents = latents + weights[i - 1][1] * previous
            previous = velocity if order == 2 else None
            if callback is not None:
                callback(i, levels[i], latents, velocity, active)
    finally:
        kv.clear()
    return latents, trace


def velocity_weights(levels: list[float], order: int) -> list[tuple[float, float]]:
    """How much the velocity of each step moves the latents in that step, and in the next one.

    Euler steps: the difference h of the noise levels, and 0. Adams-Bashforth steps of second order
    move by h * (v + (v - previous) * h / (2 * previous h)), the first one by h * v.
    """
    lengths = [after - now for now, after in pairwise(levels)]
    if order == 1:
        return [(h, 0.0) for h in lengths]
    slopes = [0.0, *(h * h / (2 * before) for before, h in pairwise(lengths)), 0.0]
    return [
        (h + own, -following) for h, (own, following) in zip(lengths, pairwise(slopes), strict=True)
    ]


def guided_velocity(
    model: Callable[..., Tensor],
    latents: Tensor,
    sigma: Tensor,
    cond: Mapping[str, Any],
    guidance: float,
    active: Tensor | None = None,
    cache: KVCache | None = None,
) -> Tensor:
    """Velocity (B, C, H, W) float32 under classifier-free guidance: u + guidance * (c - u).

    cond holds the unconditional rows, then the conditional ones (2B); with guidance 1 only the
    conditional ones (B). Both halves compute the same active tokens (B, K).
    """
    region = {} if cache is None else {"active": active, "cache": cache}
    if guidance == 1:
        return model(latents, sigma, **cond, **region).float()
    if active is not None:
        region["active"] = active.repeat(2, 1)  # (2B, K)
    both = model(latents.repeat(2, 1, 1, 1), sigma, **cond, **region).float()
    uncond_velocity, velocity = both.chunk(2)
    guided = uncond_velocity + guidance * (velocity - uncond_velocity)
    channels = getattr(model, "guided_channels", None)
    if channels is not None:  # Lumina guides only the first three of its four channels
        guided = torch.cat((guided[:, :channels], velocity[:, channels:]), dim=1)
    return guided


def _check(latents, sigmas, cond, uncond, guidance, order) -> None:
    if order not in (1, 2):
        raise ValueError(f"order is {order!r}, must be 1 (Euler) or 2 (Adams-Bashforth)")
    if latents.ndim != 4:
        raise ValueError(f"latents have shape {tuple(latents.shape)}, must be (B, C, H, W)")
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(
            f"sigmas have shape {tuple(sigmas.shape)}, must be (steps + 1,) with steps >= 1"
        )
    if not guidance >= 1:
        raise ValueError(f"guidance is {guidance}, must be at least 1 (1 is no guidance)")
    if guidance != 1 and uncond is None:
        raise ValueError(f"guidance is {guidance}, which needs uncond; pass it or guidance=1")
    for name, rows in cond.items():
        if not isinstance(rows, Tensor):
            continue
        wanted = (len(latents), *rows.shape[1:])
        if tuple(rows.shape) != wanted:
            raise ValueError(f"cond[{name!r}] has shape {tuple(rows.shape)}, must be {wanted}")
        if guidance == 1:
            continue
        if name not in uncond:
            raise ValueError(f"uncond[{name!r}] is missing, cond has {', '.join(cond)}")
        if uncond[name].shape != rows.shape:
            raise ValueError(
                f"uncond[{name!r}] has shape {tuple(uncond[name].shape)}, must be {wanted}"
            )
