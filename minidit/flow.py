"""Rectified flow: noise levels, and the one sampling loop of every family.

x(sigma) = (1 - sigma) * image + sigma * noise, so d x / d sigma = noise - image = velocity: sigma 1
is pure noise, sigma 0 the image, and sampling integrates the velocity from 1 down to 0.

B batch, N image tokens, K active tokens, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from minidit import checks
from minidit.guidance import Guidance, Guided, Model
from ras import RASConfig, Record, Run, Trace, Upstream
from ras.plan import MOST_STEPS

SHIFTS = (1e-6, 1e6)  # beyond, levels are nothing but 0 and 1, or no numbers
Callback = Callable[[int, float, Tensor, Tensor, "Tensor | None"], None]


@dataclass(frozen=True)
class Known:
    """Latents that are known at every level of a run: those of a picture outside a mask.

    path  at every level, (steps + 1) of (B, C, H, W)
    mask  (B, 1, H, W) bool, true for latents that are not known
    """

    path: Sequence[Tensor]
    mask: Tensor

    def put(self, latents: Tensor, i: int) -> Tensor:
        """The latents, where known those of level i."""
        return torch.where(self.mask, latents, self.path[i])


def flow_sigmas(steps: int, shift: float) -> Tensor:
    """Noise levels of the official scheduler, (steps + 1,) float32 from 1 down to 0.

    shift moves steps towards the noise (`shifted`). As in the official scheduler it acts twice at
    the low end: the last level before 0 is the shifted 1/1000, spacing is linear from 1 to there,
    and every level is shifted again (diffusers scheduling_flow_match_euler_discrete.py,
    set_timesteps). Raises ValueError for steps < 1 or shift <= 0.
    """
    check_schedule(steps, shift)
    lowest = shifted(torch.tensor(1 / 1000, dtype=torch.float32), shift).item()
    levels = shifted(np.linspace(1000, lowest * 1000, steps) / 1000, shift)  # float64, as there
    return torch.from_numpy(np.append(levels, 0.0)).float()


def shifted(s: Any, shift: float) -> Any:
    """Noise levels moved towards 1: shift * s / (1 + (shift - 1) * s) (SD3 paper, Eq. 23)."""
    return shift * s / (1 + (shift - 1) * s)


def check_schedule(steps: int, shift: float) -> None:
    """Raise ValueError unless a run can have that many steps and that shift."""
    checks.integer("steps", steps, 1, MOST_STEPS)
    checks.number("shift", shift, *SHIFTS)


@torch.no_grad()
def denoise(
    model: Model,
    latents: Tensor,
    sigmas: Tensor,
    cond: Mapping[str, Any],
    uncond: Mapping[str, Any] | None = None,
    guidance: float | Guidance = 1.0,
    *,
    ras: RASConfig | Upstream | None = None,
    correct: bool = False,
    known: Known | None = None,
    record: Record | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> tuple[Tensor, Trace | None]:
    """Integrate the velocity along sigmas, with Region-Adaptive Sampling if asked.

    model    model(latents, sigma, **cond) -> velocity (B, C, H, W); with RAS it is also given
             `active` and `cache`
    latents  (B, C, H, W) at noise level sigmas[0]
    sigmas   (steps + 1,) falling noise levels
    cond     the model's conditioning arguments: tensors of B rows, anything else is passed as it
             is; uncond the same for the empty or negative prompt, needed where guidance is not 1
    guidance a scale or a Guidance
    ras      which tokens each step computes; None for all of them
    correct  False takes the Euler steps of the official pipelines. True redoes every step with the
             mean of the velocities at both ends as soon as the second one is known: second order
             at no cost
    known    what is known of the latents at every level: they are put there after every step
    record   where to keep every step's keys, values and latents, for an edit; only of a dense run
    callback callback(step, sigma, latents, velocity, active) after every step: the latents after
             it, active (B, K) token numbers or None for a dense step
    Returns latents at sigmas[-1] in float32, and the trace of the run if `ras` is given.
    Raises ValueError for shapes and settings that do not fit.
    """
    guidance = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
    checks.instance("known", known, Known, None)
    checks.instance("record", record, Record, None)
    for name, value in (("correct", correct), ("progress", progress)):
        checks.flag(name, value)
    if record is not None and ras is not None:
        raise ValueError("record is for dense runs: pass ras=None")
    checks.function("callback", callback)
    check_ras(ras)
    asked = {"skip_layers": ()} if guidance.skip_layers else {}
    if ras is not None or record is not None:
        asked |= {"active": None, "cache": None}
    _check(model, latents, sigmas, cond, uncond, guidance, asked)
    latents, patch = latents.float(), _patch_size(model, latents, ras)
    run = Run(ras, sigmas, latents, patch, correct, record)
    velocity_of = Guided(model, cond, uncond, guidance, run.steps, patch)
    try:
        for i in tqdm(range(run.steps), disable=not progress, desc="denoising", unit="step"):
            active, cache = run.begin(i)  # the tokens to compute, and what they attend to
            velocity = velocity_of(i, latents, run.sigmas[i], active, cache)
            velocity, correction = run.end(i, velocity)  # stale tokens hold the velocity they had
            step = run.levels[i + 1] - run.levels[i]
            latents = latents + correction + step * velocity
            if known is not None:
                latents = known.put(latents, i + 1)
            if record is not None:
                record.end(i, latents)
            if callback is not None:
                callback(i, run.levels[i], latents, velocity, active)
    finally:
        run.close()
    return latents, run.trace if ras else None


def check_ras(ras: Any) -> None:
    """Raise ValueError unless it can say what a step does: a RASConfig, an Upstream, or alike."""
    known = callable(getattr(ras, "plan", None)) and callable(getattr(ras, "select", None))
    if ras is not None and (not known or isinstance(ras, type)):
        raise ValueError(
            f"ras is {checks.short(ras)}, must be a ras.RASConfig, a ras.Upstream or None"
        )


def _patch_size(model: Model, latents: Tensor, ras: Any) -> int:
    """Side of the square of latents that is a token; without RAS any square will do."""
    if ras is None:
        return 1
    patch = model.config.patch_size if hasattr(model, "config") else 2
    if any(side % patch for side in latents.shape[-2:]):
        raise ValueError(
            f"latents are {latents.shape[-2]}x{latents.shape[-1]}, both must be multiples of the "
            f"patch size {patch}"
        )
    return patch


def _check(model, latents, sigmas, cond, uncond, guidance, asked) -> None:
    checks.floating("latents", latents, "B", "C", "H", "W")
    checks.floating("sigmas", sigmas, "steps + 1")
    for name, value in (("cond", cond), ("uncond", uncond)):
        if not isinstance(value, Mapping) and (name == "cond" or value is not None):
            raise ValueError(f"{name} is {checks.short(value)}, must be a dict of arguments")
    try:
        signature(getattr(model, "forward", model)).bind(latents, sigmas[0], **cond, **asked)
    except (TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"model is {checks.short(model)}, which cannot be given latents, sigma, "
            f"{', '.join(map(str, [*cond, *asked]))}: {checks.reason(error)}"
        ) from None
    if len(sigmas) < 2 or sigmas.is_meta:
        raise ValueError(f"sigmas are {checks.short(sigmas)}, must be (steps + 1,), steps >= 1")
    if guidance.scale == 1:
        uncond = cond
    if uncond is None:
        raise ValueError(f"guidance is {guidance.scale}, which needs uncond; pass it or guidance=1")
    for name, rows in cond.items():
        if not isinstance(rows, Tensor):
            continue
        wanted = (len(latents), *rows.shape[1:])
        if tuple(rows.shape) != wanted:
            raise ValueError(f"cond[{name!r}] has shape {tuple(rows.shape)}, must be {wanted}")
        if name not in uncond:
            raise ValueError(f"uncond[{name!r}] is missing, cond has {', '.join(cond)}")
        checks.tensor(f"uncond[{name!r}]", uncond[name], *wanted, like=rows)
