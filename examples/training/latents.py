"""The stage `scenes`: pictures composed and encoded ahead, in files that training reads from; and
their captions, encoded when training begins.

C latent channels, h and w latent size, L text tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from training.loop import ahead
from training.optim import autocast
from training.scenes import Name, Scene, Sprites, caption, draw, random_scene
from training.vae import encode_images

CAPTIONS = 3  # of each scene
LENGTH = 48  # text tokens, room for the longest caption


class Latents:
    """Latents of scenes of one size, float16 (count, C, h, w): `array`, a memory-mapped file, and
    `tensor`, the same memory, or a copy on a GPU.

    Scene number n is a function of n, so a file keeps of it the latents and the number alone. Slot
    i begins with scene i; `renew` gives slots new scenes, the oldest first, while training goes on.
    Raises FileNotFoundError, which names the command to run, if there is no file.
    """

    def __init__(
        self, folder: Path, height: int, width: int, names: Sequence[Name],
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        path = latents_path(folder, height, width)
        if not path.is_file():
            raise FileNotFoundError(f"no {path}; make it with `python examples/train.py scenes`")
        self.size, self.names = (height, width), names
        self.array = np.load(path, mmap_mode="r+")
        self.tensor = torch.from_numpy(self.array).to(device)
        self.numbers = np.load(numbers_path(path), mmap_mode="r+")  # -1: nothing there yet

    def __len__(self) -> int:
        return len(self.array)

    @property
    def aspect(self) -> float:
        """Width by height."""
        return self.size[1] / self.size[0]

    def scene(self, number: int) -> Scene:
        rng = random.Random(f"scene/{number}")
        return random_scene(rng, self.names, aspect=self.aspect)

    def choose(
        self, count: int, rng: random.Random, most: int = 3
    ) -> tuple[list[int], list[Scene]]:
        """Slots of `count` random scenes of at most `most` things, and these scenes."""
        if self.numbers.max() < 0:
            raise ValueError(f"no {self.size[1]}x{self.size[0]} scene is encoded yet: run `scenes`")
        slots, scenes = [], []
        while len(slots) < count:
            slot = rng.randrange(len(self.array))
            number = int(self.numbers[slot])
            scene = self.scene(number)
            if number >= 0 and len(scene.things) <= most:
                slots.append(slot)
                scenes.append(scene)
        return slots, scenes

    def renew(
        self, vae: nn.Module, sprites: Sprites, renewals: int, progress: bool = False,
        workers: int = 0,
    ) -> np.ndarray:  # fmt: skip
        """Make the file what it is after `renewals` renewals, from whatever it is now; returns the
        slots that this changed.

        An interrupted run may have renewed more than its last checkpoint knows: this goes back.
        """
        count = len(self.array)
        expected = np.arange(count) + count * ((renewals + count - 1 - np.arange(count)) // count)
        slots = np.flatnonzero(self.numbers != expected)
        title = "encoding {} x {}".format(*self.size)

        def compose(slot: int) -> np.ndarray:
            return draw(self.scene(int(expected[slot])), sprites, *self.size)

        pictures = ahead(compose, slots.tolist(), workers)
        many = 1 if next(vae.parameters()).device.type == "cpu" else 64
        for start in tqdm(range(0, len(slots), many), title, disable=not progress):
            some = slots[start : start + many]
            images = np.stack([next(pictures) for _ in some])
            self.numbers[some] = -1
            latents = encode_images(vae, images)
            self.array[some] = latents.cpu().numpy()
            if self.tensor.device.type != "cpu":
                self.tensor[torch.from_numpy(some)] = latents.half()
            self.numbers[some] = expected[some]
        return slots


def scene_caption(scene: Scene, number: int, k: int) -> str:
    """Caption k, of CAPTIONS, of the scene of a number."""
    return caption(scene, random.Random(f"caption/{number}/{k}"))


class Texts:
    """What frozen text encoders make of CAPTIONS captions of every scene of a file, and of no text.

    Encoded once, so that a step of training only looks up: on a GPU the tokenizers would take
    longer than all the rest of it. Raises ValueError for a caption of more than LENGTH tokens.
    """

    def __init__(self, pipe: Any, data: Latents) -> None:
        self.pipe, self.data = pipe, data
        empty = self._encoded([""])
        count = CAPTIONS * len(data) + 1  # the last one is the empty one
        self.rows = {name: x.repeat(count, *[1] * (x.ndim - 1)) for name, x in empty.items()}
        self.renew(np.flatnonzero(data.numbers >= 0))

    def renew(self, slots: np.ndarray) -> None:
        """Encode the captions of these slots anew."""
        for some in np.array_split(slots, -(-len(slots) // 128)) if len(slots) else ():
            texts = [
                scene_caption(self.data.scene(number), number, k)
                for number in self.data.numbers[some].tolist()
                for k in range(CAPTIONS)
            ]
            rows = (CAPTIONS * some[:, None] + np.arange(CAPTIONS)).ravel()
            for name, x in self._encoded(texts).items():
                self.rows[name][torch.from_numpy(rows)] = x

    def of(self, rows: Tensor) -> dict[str, Tensor]:
        """The conditioning of captions by their numbers (B,): CAPTIONS * slot + 0 .. CAPTIONS - 1,
        or -1 for no text."""
        found = {name: x[rows] for name, x in self.rows.items()}
        return {n: x.float() if x.is_floating_point() else x for n, x in found.items()}

    @torch.no_grad()
    def _encoded(self, texts: list[str]) -> dict[str, Tensor]:
        """The conditioning of texts in half precision, with room for LENGTH tokens where the number
        of tokens is that of the longest text."""
        with autocast(self.pipe.device):
            cond = self.pipe.encode(texts)
        if "context_mask" in cond:
            short = LENGTH - cond["context_mask"].shape[1]
            if short < 0:
                raise ValueError(f"a caption has {LENGTH - short} tokens, must be at most {LENGTH}")
            cond["context"] = F.pad(cond["context"], (0, 0, 0, short))
            cond["context_mask"] = F.pad(cond["context_mask"], (0, short))
        return {name: x.half() if x.is_floating_point() else x for name, x in cond.items()}


def prepare(
    folder: Path, vae: nn.Module, sprites: Sprites, sizes: Sequence[tuple[int, int]], count: int,
    workers: int = 0,
) -> None:  # fmt: skip
    """Compose and encode `count` scenes of each size; goes on where it was interrupted."""
    check_sizes(sizes)
    folder.mkdir(parents=True, exist_ok=True)
    for height, width in sizes:
        path = latents_path(folder, height, width)
        if not path.is_file():
            shape = (count, vae.config.latent_channels, height // 8, width // 8)
            numbers = np.full(count, -1)
            np.save(numbers_path(path), numbers)
            np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
        Latents(folder, height, width, sprites.names).renew(vae, sprites, 0, True, workers)


def check_sizes(sizes: Sequence[tuple[int, int]]) -> None:
    """Raise ValueError unless patches of 16 pixels divide every side."""
    for height, width in sizes:
        if min(height, width) < 64 or height % 16 or width % 16:
            raise ValueError(f"size is {width}x{height}, sides must be multiples of 16 from 64")


def latents_path(folder: Path, height: int, width: int) -> Path:
    return folder / f"{height}x{width}.npy"


def numbers_path(path: Path) -> Path:
    return path.with_suffix(".numbers.npy")
