"""The layout of a scene, written into the noise that the transformer starts from.

A rectified flow may pair noise with data as it likes, as long as the noise by itself is Gaussian
(multisample and optimal-transport flow matching, arXiv 2304.14772, 2302.00482). With independent
noise nothing near pure noise says where a thing is going to be, and the best velocity there is a
mean over all places: a blur, from which a small network finds its way to one place late or not at
all. So we make the layout (place, size, mirror image, direction from one thing to the other) a
function of the noise: CODES numbers of the noise are the layout's quantiles as a Gaussian has them.
Whatever else is random in a picture stays free, and so does all noise below `SIGMA`, where the
picture can be seen, so that editing a given picture needs no noise that fits it.

A number of the noise is its component along one direction: one latent channel's squares of a
chessboard, white less black. A picture has next to nothing there, so a number is legible where its
own picture begins to show.

B batch, C latent channels, h and w latent size.
"""

from __future__ import annotations

import math
import random
from bisect import bisect
from functools import cache
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor

from training.scenes import (
    MARGIN,
    SIZES,
    TURN,
    Background,
    Name,
    Scene,
    Thing,
    compose,
    said_place,
    sides_of,
    spoken,
)

SIGMA = 0.8  # noise says where things are above this level
CODES = 8
FREE = math.nan


def layout_codes(scene: Scene, text: str, aspect: float, rng: random.Random) -> list[float]:
    """CODES numbers that stand for the scene's layout, FREE where nothing is said.

    Over all scenes that a caption may mean, each number is standard normal and independent of the
    others, nearly. Three things say nothing: that none overlaps the others leaves them too little
    freedom. rng draws what the layout leaves open.

    one thing     0 x, 1 y, 2 size, 3 mirror image, 7 turn
    two things    0 x, 1 y of the middle between them, 2 distance, 3 and 6 mirror images of the left
                  and of the right one, 4 and 5 direction, 7 which is named first; the last three
                  only where the caption does not say who is where
    """
    codes = [FREE] * CODES
    if len(scene.things) == 1:
        thing = scene.things[0]
        codes[:2] = place([thing], aspect, rng)
        codes[2] = quantile(thing.size, *SIZES[1], rng)
        codes[3] = signed(thing.mirror, rng)
        codes[7] = quantile(thing.angle, -TURN, TURN, rng)
    elif len(scene.things) == 2:
        left, right = sorted(scene.things, key=lambda thing: thing.x)
        codes[:2] = place([left, right], aspect, rng)
        codes[3], codes[6] = signed(left.mirror, rng), signed(right.mirror, rng)
        pairs, (angle, distance) = directions(aspect), direction_of(left, right)
        rank = bisect(pairs, (angle, distance))
        near = sorted(pair[1] for pair in pairs[max(0, rank - 150) : rank + 150])
        codes[2] = quantile(bisect(near, distance) + 0.5, 0, len(near) + 1, rng)
        first, second = spoken(scene.things, text)
        if not said_place(first, second, text):
            turn = 2 * math.pi * rank / len(pairs)  # half a turn of the pair is a whole one here
            length = math.sqrt(-2 * math.log(1 - rng.random()))  # of a Gaussian in the plane
            codes[4], codes[5] = -length * math.cos(turn), -length * math.sin(turn)
            if first.name != second.name:
                codes[7] = signed(first is left, rng)
    return codes


def place(things: list[Thing], aspect: float, rng: random.Random) -> list[float]:
    """Where things are that keep their distances, in x and in y: quantiles of what they can move
    by, as `compose` keeps them from the edges."""
    found = []
    for axis, side in zip("xy", sides_of(aspect), strict=True):
        at = [(getattr(thing, axis), MARGIN * thing.size) for thing in things]
        low = max(margin - middle for middle, margin in at)
        high = min(side - margin - middle for middle, margin in at)
        found.append(quantile(0.0, low, high, rng))
    return found


def quantile(value: float, low: float, high: float, rng: random.Random) -> float:
    """The number below which a Gaussian is as often as a uniform value of low to high is below
    this one; any, where there is no room between low and high."""
    share = (value - low) / (high - low) if high - low > 1e-6 else rng.random()
    return NormalDist().inv_cdf(min(max(share, 1e-4), 1 - 1e-4))


def signed(yes: bool, rng: random.Random) -> float:
    """A Gaussian number that is positive for yes."""
    return abs(rng.gauss(0, 1)) * (1 if yes else -1)


@cache
def directions(aspect: float, count: int = 20_000) -> list[tuple[float, float]]:
    """`direction_of` many scenes of two things, sorted: which are how frequent."""
    rng, name, plain = random.Random(5), Name("x", "xs"), Background("plain", ("white",))
    scenes = (compose(rng, [name, name], plain, aspect).things for _ in range(count))
    return sorted(direction_of(*sorted(pair, key=lambda thing: thing.x)) for pair in scenes)


def direction_of(left: Thing, right: Thing) -> tuple[float, float]:
    """Angle, from -pi / 2 to pi / 2, and distance from one thing to one on its right."""
    x, y = right.x - left.x, right.y - left.y
    return math.atan2(y, x), math.hypot(x, y)


def write_layout(noise: Tensor, codes: Tensor, sigma: Tensor) -> Tensor:
    """The noise (B, C, h, w) with codes (B, CODES) in it, except FREE ones and where the noise
    level, sigma (B,), is not above SIGMA."""
    said = (sigma[:, None] > SIGMA) & ~codes.isnan()
    change = torch.where(said, codes - read_layout(noise), 0.0)  # (B, CODES)
    change = F.pad(change, (0, noise.shape[1] - CODES))  # (B, C)
    return noise + change[:, :, None, None] * direction(noise)


def read_layout(noise: Tensor) -> Tensor:
    """The CODES numbers (B, CODES) in noise (B, C, h, w)."""
    return (noise[:, :CODES] * direction(noise)).sum((2, 3))


def direction(noise: Tensor) -> Tensor:
    """The chessboard (h, w), of length 1, for noise (.., h, w)."""
    h, w = noise.shape[-2:]
    rows, columns = (torch.arange(n, device=noise.device) for n in (h, w))
    black = (rows[:, None] + columns) % 2  # (h, w)
    return (1 - 2 * black).to(noise.dtype) / math.sqrt(h * w)
