"""The training data: Fluent Emoji 3D on coloured backgrounds, captioned with their names.

The pictures (Microsoft's, MIT licence) and the names come from two npm packages:

    npm install @lobehub/fluent-emoji-3d@1.1.0 unicode-emoji-json@0.9.0

A caption reads "red apple on a sky blue background". Every name meets every colour, except for one
colour a name that training never shows: those held-out pairings are what `evaluate` asks for.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

PACKAGES = "npm install @lobehub/fluent-emoji-3d@1.1.0 unicode-emoji-json@0.9.0"

# how often training shows a name of the group, relative to the others
GROUPS = {
    "Smileys & Emotion": 1.5,
    "Animals & Nature": 2.0,
    "Food & Drink": 2.0,
    "Travel & Places": 1.0,
    "Objects": 0.75,
    "Activities": 1.0,
}

Colour = tuple[int, int, int]
COLOURS: dict[str, Colour] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "red": (229, 57, 53),
    "orange": (251, 140, 0),
    "yellow": (253, 216, 53),
    "green": (46, 125, 50),
    "lime green": (139, 220, 50),
    "teal": (0, 128, 128),
    "sky blue": (135, 206, 235),
    "blue": (30, 90, 230),
    "navy blue": (10, 20, 90),
    "purple": (106, 50, 190),
    "lavender": (190, 175, 250),
    "pink": (255, 150, 190),
    "magenta": (225, 20, 170),
    "brown": (121, 72, 50),
    "beige": (235, 220, 185),
}

SHOWN = len(COLOURS) - 1  # colours that training shows a name on: one is held out


@dataclass(frozen=True)
class Emoji:
    """One picture of the data set: its name, its group, and the file with its transparent image."""

    name: str
    group: str
    path: Path


def find_emoji(modules: Path) -> list[Emoji]:
    """Every emoji of GROUPS that has both a picture and a name, in Unicode's order.

    modules is the node_modules folder that the npm command above makes. Raises FileNotFoundError,
    which names that command, if one of the packages is not there.
    """
    pictures = Path(modules) / "@lobehub/fluent-emoji-3d/assets"
    names = Path(modules) / "unicode-emoji-json/data-by-emoji.json"
    if not pictures.is_dir() or not names.is_file():
        raise FileNotFoundError(f"no emoji packages in {modules}; run `{PACKAGES}` beside it")
    # file names spell the code points; only some carry the variation selector fe0f
    files = {path.stem.replace("-fe0f", ""): path for path in sorted(pictures.glob("*.webp"))}
    found = []
    for text, entry in json.loads(names.read_text("utf-8")).items():
        code = "-".join(f"{ord(letter):04x}" for letter in text if letter != "\ufe0f")
        if entry["group"] in GROUPS and code in files:
            name = entry["name"].replace("’", "'").replace("“", '"').replace("”", '"')
            found.append(Emoji(name, entry["group"], files[code]))
    return found


def read(emoji: Emoji, size: int) -> np.ndarray:
    """The picture at a size, premultiplied with its transparency: uint8 (size, size, 4)."""
    image = Image.open(emoji.path).convert("RGBa")  # premultiplied, so that resizing is clean
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))


def compose(picture: np.ndarray, colours: Sequence[Colour] = tuple(COLOURS.values())) -> np.ndarray:
    """A picture of `read` on every background colour: uint8 (colours, height, width, 3)."""
    pixels = picture.astype(np.float32)
    backgrounds = np.array(colours, dtype=np.float32)[:, None, None]  # (colours, 1, 1, 3)
    mixed = pixels[..., :3] + (1 - pixels[..., 3:] / 255) * backgrounds
    return mixed.round().clip(0, 255).astype(np.uint8)


def crops(pictures: list[np.ndarray], count: int, size: int, rng: random.Random) -> np.ndarray:
    """Random crops of random pictures on random colours: uint8 (count, size, size, 3)."""
    chosen = []
    for picture in rng.choices(pictures, k=count):
        top, left = (rng.randint(0, side - size) for side in picture.shape[:2])
        part = picture[top : top + size, left : left + size]
        chosen.append(compose(part, [rng.choice(list(COLOURS.values()))])[0])
    return np.stack(chosen)


def caption(name: str, colour: str, rng: random.Random | None = None) -> str:
    """What a user might type for this picture.

    Without rng the plain form "NAME on a COLOUR background". With rng also, now and then, an
    article in front, or a capital first; and for a white background, half the time, the name alone.
    """
    article = "an" if colour == "orange" else "a"
    text = f"{name} on {article} {colour} background"
    if rng is None:
        return text
    if colour == "white" and rng.random() < 0.5:
        text = name
    if rng.random() < 0.15:
        text = f"{'an' if name[0] in 'aeiou' else 'a'} {text}"
    if rng.random() < 0.1:
        text = text[0].upper() + text[1:]
    return text


def held_out(index: int) -> int:
    """The one colour number that training never shows name number `index` on; never white."""
    return 1 + 7 * index % (len(COLOURS) - 1)


def shown(index: int, count: int = SHOWN) -> list[int]:
    """`count` colour numbers that training shows name number `index` on, evenly spread."""
    colours = [j for j in range(len(COLOURS)) if j != held_out(index)]
    return [colours[(5 * index + 3 * k) % len(colours)] for k in range(count)]


class Latents:
    """Latents of every emoji on some colours, memory-mapped, as `prepare` wrote them.

    names, groups: one per emoji. array: float16 (emoji, colours, channels, height, width), with the
    colours of emoji number i in the order of shown(i).
    """

    def __init__(self, folder: Path, family: str, size: int) -> None:
        path = Path(folder) / f"{family}-{size}.npy"
        if not path.is_file():
            raise FileNotFoundError(f"no {path}; make it with `python examples/train.py prepare`")
        index = json.loads((Path(folder) / "emoji.json").read_text("utf-8"))
        self.names: list[str] = index["names"]
        self.groups: list[str] = index["groups"]
        self.array = np.load(path, mmap_mode="r")
        self.weights = [GROUPS[group] for group in self.groups]

    def batch(self, count: int, rng: random.Random) -> tuple[np.ndarray, list[str]]:
        """`count` random training pairings: float32 (count, channels, height, width), captions."""
        colours, pictures, captions = list(COLOURS), [], []
        for i in rng.choices(range(len(self.names)), self.weights, k=count):
            k = rng.randrange(self.array.shape[1])
            pictures.append(self.array[i, k])
            captions.append(caption(self.names[i], colours[shown(i)[k]], rng))
        return np.stack(pictures).astype(np.float32), captions
