"""The stage `classifier`: which names are in a picture, and where.

B batch, N names, H and W picture size.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from training.loop import Loop, ahead, follow, save
from training.optim import Optimiser, Plan, autocast
from training.scenes import Name, Scene, Sprites, draw, random_scene
from training.vae import to_pixels

SIDE = 128  # pixels, the shorter side of what it sees
WIDTH, DEPTH = 160, 5


class Classifier(nn.Module):
    """Pictures (B, 3, H, W) in [-1, 1], sides multiples of 8, -> logits of every 8 x 8 pixel cell,
    (B, 1 + N, H / 8, W / 8): first for ground, then for each name. A small ConvNeXt."""

    def __init__(self, names: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH // 2, 4, stride=4)
        self.layers = nn.Sequential(
            ConvBlock(WIDTH // 2), ConvBlock(WIDTH // 2),
            nn.Conv2d(WIDTH // 2, WIDTH, 2, stride=2),
            *(ConvBlock(WIDTH) for _ in range(DEPTH)),
        )  # fmt: skip
        self.head = nn.Conv2d(WIDTH, 1 + names, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(self.patches(images)))


class ConvBlock(nn.Module):
    """Depthwise 7 x 7, then an MLP over channels, as a residual (ConvNeXt, arXiv 2201.03545)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.GroupNorm(1, width)
        self.widen, self.narrow = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(3 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.gelu(self.widen(self.norm(self.mix(x)))))


def labels(scene: Scene, names: dict[Name, int], height: int, width: int) -> np.ndarray:
    """What every cell shows: 0 ground, 1 + number of the name, or -1 where it is not clear."""
    side = min(height, width) // 8
    y, x = (np.mgrid[: height // 8, : width // 8] + 0.5) / side
    cells = np.zeros(y.shape, dtype=np.int64)
    away = [np.hypot(x - one.x, y - one.y) / one.size for one in scene.things]
    for one, distance in zip(scene.things, away, strict=True):
        cells[distance < 0.6] = -1
        cells[distance < 0.3] = 1 + names[one.name]
    return cells


def train_classifier(
    run: Path, packages: Path, plan: Plan, device: torch.device, save_minutes: float = 3.0,
    workers: int = 0,
) -> None:  # fmt: skip
    """Train it on scenes as training shows them, and write it to classifier.pt of the run."""
    torch.manual_seed(plan.seed)
    sprites = Sprites(packages)
    numbers = {name: i for i, name in enumerate(sprites.names)}
    network = Classifier(len(numbers)).to(device, memory_format=torch.channels_last)
    average = copy.deepcopy(network).requires_grad_(False)
    optimiser = Optimiser(network.named_parameters())
    parts = {"network": network, "average": average, "optimiser": optimiser}
    loop = Loop(run / "classifier-checkpoint.pt", plan.steps, parts, save_minutes)

    def compose(step: int) -> tuple[np.ndarray, np.ndarray]:
        rng = random.Random(f"classifier/{plan.seed}/{step}")
        scenes = [random_scene(rng, sprites.names) for _ in range(plan.batch)]
        pictures = np.stack([draw(scene, sprites, SIDE, SIDE) for scene in scenes])
        return pictures, np.stack([labels(scene, numbers, SIDE, SIDE) for scene in scenes])

    composed = ahead(compose, loop.left, workers)
    for step, (pictures, cells) in zip(loop, composed, strict=False):
        target = torch.from_numpy(cells)  # (B, 16, 16)
        with autocast(device):
            logits = network(to_pixels(pictures, device))  # (B, 1 + N, 16, 16)
        loss = F.cross_entropy(logits.float(), target.to(device), ignore_index=-1)
        loss.backward()
        optimiser.step(plan, step)
        follow(average, network, step)
        loop.log(loss)
    save(average.state_dict(), run / "classifier.pt")


@dataclass(frozen=True)
class Seen:
    """What the classifier sees in a picture: scores (N,) in [0, 1] and places (N, 2) of the names,
    x and y in fractions of the shorter side; ground, (H / 8, W / 8), how much each cell is none."""

    scores: Tensor
    places: Tensor
    ground: Tensor


@torch.no_grad()
def look(network: Classifier, image: Image.Image) -> Seen:
    """Look at a picture of any size, made smaller until its shorter side is SIDE."""
    factor = SIDE / min(image.size)
    width, height = (round(length * factor / 8) * 8 for length in image.size)
    small = image.resize((width, height), Image.Resampling.LANCZOS)
    device = network.head.weight.device
    logits = network(to_pixels(np.array(small)[None], device))[0].float().cpu()
    shares = logits.softmax(dim=0)  # (1 + N, h, w)
    named = shares[1:].flatten(1)  # (N, h * w)
    y, x = torch.meshgrid(*(torch.arange(n) + 0.5 for n in shares.shape[1:]), indexing="ij")
    cells = torch.stack((x.flatten(), y.flatten()), dim=1) * 8 / SIDE  # (h * w, 2)
    places = named @ cells / named.sum(dim=1, keepdim=True).clamp(min=1e-6)
    return Seen(named.amax(dim=1), places, shares[0])


def rank(seen: Seen, name: int) -> int:
    """How many names are seen more clearly than this one."""
    return int((seen.scores > seen.scores[name]).sum())


def load_classifier(path: Path, names: Sequence[Name]) -> Classifier:
    """Raises FileNotFoundError, which names the command, if there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; make it with `python examples/train.py classifier`")
    network = Classifier(len(names))
    network.load_state_dict(torch.load(path, map_location="cpu"))
    return network.eval()
