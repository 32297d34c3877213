"""Other people's rules, bounds and controls, through the interface of `ras` alone.

A rule is a function of a RASConfig, which says what is dense and who is active, and of the Drawing;
what it returns is passed as `ras=`. METHODS in evaluate.py lists them. The papers keep features
from inside the network; here, as in all of RAS, it is the guided velocity that is kept.

TeaCache    arXiv 2411.19108: how much the network's input changes says which steps to compute
MagCache    arXiv 2506.09045: how the size of its output changes says so
TaylorSeer  arXiv 2503.06923: what is held follows a Taylor series of finite differences
FoCa        arXiv 2508.16211: the same idea, written as a solver's forecast and correction

B batch, N tokens, K active tokens, C channels, P patch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from minidit import Pipeline
from ras import History, RASConfig, Region, Step
from ras.tokens import patchify


class Path(NamedTuple):
    """What a dense run did in its steps.

    sigmas    (steps,)
    after     (steps, B, N, P*P, C), the latents after the step: the next step's input
    velocity  (steps, B, N, P*P, C)
    """

    sigmas: Tensor
    after: Tensor
    velocity: Tensor


def dense_path(
    pipe: Pipeline,
    prompts: Sequence[str],
    seed: int,
    steps: int,
    solver: str,
    size: int | None = None,
) -> Path:
    """A dense run of these prompts, `size` pixels a side."""
    seen, patch = [], pipe.transformer.config.patch_size
    pipe(
        prompts, seed=seed, steps=steps, solver=solver, height=size, width=size, output="latent",
        callback=lambda i, sigma, *tensors: seen.append((sigma, *tensors[:2])),
    )  # fmt: skip
    sigmas, after, velocity = zip(*seen, strict=True)
    tokens = (torch.stack([patchify(x, patch) for x in some]) for some in (after, velocity))
    return Path(torch.tensor(sigmas), *tokens)


class Drawing(NamedTuple):
    """The run that a rule is made for. `calibrate(steps, solver)` is a Path of other pictures."""

    pipe: Pipeline
    prompts: Sequence[str]
    seed: int
    steps: int
    solver: str
    size: int | None
    calibrate: Callable[[int, str], Path]


# ---------------------------------------------------------------- which steps


def gated(config: RASConfig, steps: int, error: Callable[[int, int], float]) -> RASConfig:
    """The config with its `refresh` dense steps where holding is thought to hurt.

    error(i, last) is what holding the velocity of step `last` in step i is thought to cost. A step
    is dense where the sum of it since the last dense step exceeds a limit: the one that makes as
    many steps dense as the config asks for, or the next fewer.
    """

    def dense(limit: float) -> tuple[int, ...]:
        found, last, total = [], config.start - 1, 0.0
        for i in range(config.start, steps):
            total += error(i, last)
            if total > limit:
                last, total = i, 0.0
                found.append(i)
        return tuple(found)

    low, high = 0.0, 1.0
    while len(dense(high)) > config.refresh:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if len(dense(middle)) > config.refresh else (low, middle)
    return replace(config, refresh=dense(high))


def tea_cache(config: RASConfig, drawing: Drawing) -> RASConfig:
    """TeaCache: a polynomial of the input's relative change foretells the output's, which adds up.

    There the input is what the first block's modulation makes of it, and is that of the picture
    that is drawn; here it is the latents, and all is of the calibration.
    """
    path = drawing.calibrate(drawing.steps, drawing.solver)
    inputs, outputs = (relative_change(x).tolist() for x in (path.after[:-1], path.velocity[1:]))
    foretold = np.poly1d(np.polyfit(inputs, outputs, 4))
    # inputs[0] is how the input of step 2 differs from that of step 1
    return gated(config, drawing.steps, lambda i, last: max(0.0, foretold(inputs[i - 2])))


def relative_change(x: Tensor) -> Tensor:
    """Mean of |x[i + 1] - x[i]| over that of |x[i]|: (steps, ...) -> (steps - 1,)."""
    change, before = (y.abs().flatten(1).mean(dim=1) for y in (x.diff(dim=0), x[:-1]))
    return change / before


def mag_cache(config: RASConfig, drawing: Drawing) -> RASConfig:
    """MagCache: holding costs as much as the mean length of the output differs from 1, in shares.

    There the lengths are of the blocks' residual; its limit of skips in a row is left out.
    """
    size = mean_length(drawing)
    return gated(config, drawing.steps, lambda i, last: abs(1 - size[i] / size[last]).item())


def mean_length(drawing: Drawing) -> Tensor:
    """Of the tokens' velocities in every step of the calibration, (steps,)."""
    velocity = drawing.calibrate(drawing.steps, drawing.solver).velocity  # (steps, B, N, P*P, C)
    return velocity.flatten(3).norm(dim=3).mean(dim=(1, 2))


# ---------------------------------------------------------------- what is held


class Scaled:
    """The steps of MagCache, and what is held has the length that the calibration had there."""

    def __init__(self, config: RASConfig, drawing: Drawing) -> None:
        self.config, self.size = mag_cache(config, drawing), mean_length(drawing)
        self.plan = self.config.plan

    def select(self, history: History, step: Step) -> Region:
        last = (history.step - history.age).long()  # (B, N), when the token was computed
        ratio = self.size[history.step + 1] / self.size[last]  # (B, N)
        held = history.velocity * ratio[:, :, None, None]
        return self.config.select(history, step)._replace(held=held)


class Forecast:
    """What is held is the polynomial through the last velocities of a token, at the coming level.

    order 1 is a line, TaylorSeer's first order; order 2 a parabola. There the variable is the
    number of the step, here the noise level.
    """

    def __init__(self, config: RASConfig, drawing: Drawing, order: int) -> None:
        self.config, self.order, self.drawing = config, order, drawing

    def plan(self, steps: int, tokens: int) -> tuple[Step, ...]:
        self.sigmas = self.drawing.pipe.scheduler.sigmas(steps, self.drawing.solver, tokens)
        self.past: list[tuple[Tensor, Tensor]] = []  # noise level and velocity, the last one first
        first, *others = self.config.plan(steps, tokens)
        return first, *(Step(True, step.active) for step in others)  # regional, to see every step

    def select(self, history: History, step: Step) -> Region:
        self.remember(history)
        now, held = self.sigmas[history.step + 1], 0.0
        for i, (sigma, velocity) in enumerate(self.past):  # Lagrange's formula
            others = [s for j, (s, _) in enumerate(self.past) if j != i]
            held = held + velocity * prod((now - s) / (sigma - s) for s in others)
        return self.config.select(history, step)._replace(held=held)

    def remember(self, history: History) -> None:
        """Put what was computed in the last step before what is known. The first steps are dense,
        and more than `order`."""
        new = [(history.sigma[:, :, None, None], history.velocity), *self.past]
        if len(self.past) <= self.order:
            self.past = new
            return
        fresh = (history.age == 0)[:, :, None, None]
        pairs = zip(new, self.past, strict=False)
        self.past = [tuple(map(partial(torch.where, fresh), *pair)) for pair in pairs]


line, parabola = (partial(Forecast, order=order) for order in (1, 2))


# ---------------------------------------------------------------- which tokens


class Once:
    """The tokens of the first regional step stay active in all of them."""

    def __init__(self, config: RASConfig, drawing: Drawing) -> None:
        self.config, self.plan = config, config.plan

    def select(self, history: History, step: Step) -> Region:
        if history.region is None:
            return self.config.select(history, step)
        return history.region._replace(held=history.velocity)


class Oracle:
    """Active are the tokens whose held velocity is furthest from what the dense run has there: a
    bound, as it has to know that run."""

    def __init__(self, config: RASConfig, drawing: Drawing) -> None:
        self.plan, self.path = config.plan, dense_path(*drawing[:-1])

    def select(self, history: History, step: Step) -> Region:
        away = self.path.velocity[history.step + 1] - history.velocity  # (B, N, P*P, C)
        order = away.flatten(2).norm(dim=2).argsort(dim=1, descending=True)  # (B, N)
        return Region(order[:, : step.active].sort(dim=1).values, history.velocity)


class FreshKeys(nn.Module):
    """A network whose active tokens attend to keys and values of this step, those of stale tokens,
    too: a bound, as it computes every token, of which `denoise` reads the active ones."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        for name in ("config", "guided_channels", "prepare"):  # what `denoise` asks of a network
            if hasattr(network, name):
                setattr(self, name, getattr(network, name))

    def forward(self, latents: Tensor, sigma: Tensor, *, active=None, cache=None, **cond) -> Tensor:
        return self.network(latents, sigma, **cond)
