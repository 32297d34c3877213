"""The training data: scenes of one to three things on a background, and what to say of them.

The things are Fluent Emoji 3D (Microsoft's, MIT licence), with the names of names.txt:

    npm install @lobehub/fluent-emoji-3d@1.1.0 unicode-emoji-json@0.9.0

A scene is a function of a random state alone: what, where, how large, how turned, on what. `draw`
makes the picture of it at any size and shape, `caption` a sentence. Some combinations never occur
in training: every name has a colour that it is never seen on, and of the pairs of names one in
twenty is never seen together. `held_out` tells; `measure` asks for them.

Lengths are fractions of the shorter side of the picture. H and W picture size in pixels.
"""

from __future__ import annotations

import json
import math
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

PACKAGES = "npm install @lobehub/fluent-emoji-3d@1.1.0 unicode-emoji-json@0.9.0"

COLOURS = {
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
TEXTURES = ("striped", "dotted", "checkered")
# how many things, how many of them of one name, how often
GROUPS = {(1, 1): 0.4, (2, 1): 0.38, (2, 2): 0.1, (3, 1): 0.08, (3, 3): 0.04}
SIZES = {1: (0.6, 0.75), 2: (0.42, 0.5), 3: (0.34, 0.4)}  # smallest and largest thing
TURN = 5.0  # degrees either way
MARGIN = 0.53  # from a thing's centre to the edge of the picture, at least, by its size
NUMBERS = {2: "two", 3: "three"}


# ---------------------------------------------------------------- names


@dataclass(frozen=True)
class Name:
    """What a thing is called; plural is "" for a name that takes no article and no number."""

    text: str
    plural: str

    def __str__(self) -> str:
        """The name with its article."""
        return f"{article(self.text)} {self.text}" if self.plural else self.text


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" and not word.startswith("uni") else "a"


def read_names() -> list[Name]:
    """The names of names.txt, in its order."""
    lines = Path(__file__).with_name("names.txt").read_text("utf-8").splitlines()
    found = []
    for line in lines:
        text, bar, plural = line.partition("|")
        if text and not text.startswith("#"):
            found.append(Name(text, plural if bar else plural_of(text)))
    return found


def plural_of(text: str) -> str:
    if text.endswith("y") and text[-2] not in "aeiou":
        return text[:-1] + "ies"
    return text + ("es" if text.endswith(("s", "x", "ch", "sh")) else "s")


class Sprites:
    """The pictures of the names: premultiplied with their transparency, cut to what is visible.

    modules is the node_modules folder that the npm command above makes. Raises FileNotFoundError,
    which names that command, if one of the packages is not there, KeyError for a name without a
    picture.
    """

    def __init__(self, modules: Path, names: Sequence[Name] | None = None) -> None:
        folder = Path(modules) / "@lobehub/fluent-emoji-3d/assets"
        index = Path(modules) / "unicode-emoji-json/data-by-emoji.json"
        if not folder.is_dir() or not index.is_file():
            raise FileNotFoundError(f"no emoji packages in {modules}; run `{PACKAGES}` beside it")
        # file names spell the code points; only some carry the variation selector fe0f
        files = {path.stem.replace("-fe0f", ""): path for path in folder.glob("*.webp")}
        self.paths: dict[str, Path] = {}
        for text, entry in json.loads(index.read_text("utf-8")).items():
            code = "-".join(f"{ord(letter):04x}" for letter in text if letter != "\ufe0f")
            if code in files:
                self.paths[entry["name"].replace("’", "'")] = files[code]
        self.names = list(names or read_names())
        missing = [name.text for name in self.names if name.text not in self.paths]
        if missing:
            raise KeyError(f"no picture of {missing} in {folder}")
        self._images: dict[str, Image.Image] = {}

    def __getitem__(self, name: str) -> Image.Image:
        if name not in self._images:
            image = Image.open(self.paths[name]).convert("RGBa")  # so that resizing is clean
            self._images[name] = image.crop(image.getchannel(3).getbbox())
        return self._images[name]


# ---------------------------------------------------------------- what there is


@dataclass(frozen=True)
class Thing:
    """x and y are the centre, size the longer side, angle is in degrees."""

    name: Name
    x: float
    y: float
    size: float
    mirror: bool
    angle: float


@dataclass(frozen=True)
class Background:
    """kind "plain", "gradient" (of two colours) or one of TEXTURES (of two shades of one colour).

    angle (radians) is the direction of a gradient or of stripes, period the width of two stripes.
    """

    kind: str
    colours: tuple[str, ...]
    angle: float = 0.0
    period: float = 0.15

    def __str__(self) -> str:
        text = " to ".join(self.colours)
        kind = "" if self.kind == "plain" else f" {self.kind}"
        return f"{article(text)} {text}{kind} background"


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: Background

    @cached_property
    def names(self) -> list[Name]:
        """Every name once, in the order of the things."""
        return list(dict.fromkeys(thing.name for thing in self.things))

    @property
    def held_out(self) -> bool:
        """Whether training never shows it: for a name with a colour, or two names together."""
        texts = [name.text for name in self.names]
        colours = self.background.colours
        return any(held_out_colour(text) in colours for text in texts) or any(
            held_out_pair(*pair) for pair in combinations(texts, 2)
        )


def held_out_colour(name: str) -> str:
    """The one colour that training never shows a name on; never white."""
    return list(COLOURS)[1 + zlib.crc32(name.encode()) % (len(COLOURS) - 1)]


def held_out_pair(one: str, other: str) -> bool:
    """Whether training never shows two names together: true for one pair in twenty."""
    return zlib.crc32("/".join(sorted((one, other))).encode()) % 20 == 0


def random_scene(
    rng: random.Random, names: Sequence[Name], most: int = 3, aspect: float = 1.0
) -> Scene:
    """A scene that training may show, of at most `most` things; aspect is width by height."""
    groups = {group: often for group, often in GROUPS.items() if group[0] <= most}
    while True:
        count, same = rng.choices(list(groups), list(groups.values()))[0]
        chosen = rng.sample(names, count if same == 1 else 1)
        if same > 1 and not chosen[0].plural:
            continue
        scene = compose(rng, chosen * same, random_background(rng), aspect)
        if not scene.held_out:
            return scene


def random_background(rng: random.Random) -> Background:
    """Plain in 70 %, a gradient in 15 %, a texture in 15 %."""
    kind = rng.choices(("plain", "gradient", "texture"), (70, 15, 15))[0]
    if kind == "plain":
        return Background(kind, (rng.choice(list(COLOURS)),))
    angle = rng.randrange(8) * math.pi / 4
    if kind == "gradient":
        return Background(kind, tuple(rng.sample(list(COLOURS), 2)), angle)
    colour = (rng.choice(list(COLOURS)),)
    return Background(rng.choice(TEXTURES), colour, angle, rng.uniform(0.12, 0.25))


def compose(
    rng: random.Random, names: Sequence[Name], background: Background, aspect: float = 1.0
) -> Scene:
    """Give every name a place, a size and a turn, so that things overlap little and all is seen."""
    low, high = SIZES[len(names)]
    sides, shrink = sides_of(aspect), 1.0
    while True:
        things: list[Thing] = []
        for name in names:
            size = rng.uniform(low, max(low, high * shrink))
            x, y = (rng.uniform(MARGIN * size, side - MARGIN * size) for side in sides)
            mirror, angle = rng.random() < 0.5, rng.uniform(-TURN, TURN)
            things.append(Thing(name, x, y, size, mirror, angle))
        if all(apart(*pair) for pair in combinations(things, 2)):
            return Scene(tuple(things), background)
        shrink = max(0.0, shrink - 0.01)  # small things find room at last


def sides_of(aspect: float) -> tuple[float, float]:
    """Width and height of a picture; the shorter one is 1."""
    return max(aspect, 1.0), max(1 / aspect, 1.0)


def apart(one: Thing, other: Thing) -> bool:
    """Whether two things overlap at most a little, whatever their shape."""
    return math.hypot(one.x - other.x, one.y - other.y) > 0.47 * (one.size + other.size)


# ---------------------------------------------------------------- what to say of it


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """What a user might type for this scene.

    Without rng the plain form: "a fox and a red apple on a teal background", "two pizzas on ...".
    With rng also other orders of the things; where two are clearly beside or above each other half
    the time "a fox to the left of a red apple"; now and then one name without its article, or a
    capital first; and half of the plain white backgrounds go unsaid.
    """
    names = scene.names
    if len(names) < len(scene.things):
        text = f"{NUMBERS[len(scene.things)]} {names[0].plural}"
    elif len(names) == 1:
        text = str(names[0]) if rng is None or rng.random() < 0.7 else names[0].text
    else:
        things = list(scene.things)
        if rng is not None:
            rng.shuffle(things)
        words = relation(*things) if len(things) == 2 and rng and rng.random() < 0.5 else None
        said = [str(thing.name) for thing in things]
        text = f" {words} ".join(said) if words else ", ".join(said[:-1]) + f" and {said[-1]}"
    quiet = scene.background == Background("plain", ("white",)) and rng and rng.random() < 0.5
    text = text if quiet else f"{text} on {scene.background}"
    return text[0].upper() + text[1:] if rng and rng.random() < 0.1 else text


def relation(one: Thing, other: Thing) -> str | None:
    """Where one thing is, seen from the other, if that is clear."""
    right, down = one.x - other.x, one.y - other.y
    if abs(right) > 1.5 * abs(down):
        return "to the right of" if right > 0 else "to the left of"
    if abs(down) > 1.5 * abs(right):
        return "below" if down > 0 else "above"
    return None


def spoken(things: tuple[Thing, ...], text: str) -> list[Thing]:
    """The things in the order in which the text names them; a name may begin with another."""
    text = text.lower()
    return sorted(things, key=lambda one: (text.find(one.name.text.lower()), -len(one.name.text)))


def said_place(one: Thing, other: Thing, text: str) -> str | None:
    """Where one thing is, seen from the other, if the text says it."""
    words = relation(one, other)
    return words if words and f" {words} " in text else None


# ---------------------------------------------------------------- what it looks like


def draw(scene: Scene, sprites: Sprites, height: int, width: int) -> np.ndarray:
    """The picture: uint8 (height, width, 3)."""
    side = min(height, width)
    y, x = np.mgrid[:height, :width].astype(np.float32) + 0.5
    image = paint(scene.background, x, y, side)  # (H, W, 3)
    placed = [place(thing, sprites[thing.name.text], side) for thing in scene.things]
    for picture, left, top in placed:
        ground, dark = shadow(picture[..., 3], left, top, x, y)
        image[ground] *= 1 - dark[..., None]
    for picture, left, top in sorted(placed, key=lambda one: one[2] + len(one[0])):
        rows, columns = picture.shape[:2]
        up, before = max(0, -top), max(0, -left)
        picture = picture[up : height - top, before : width - left]
        part = image[top + up : top + rows, left + before : left + columns]
        part *= 1 - picture[..., 3:] / 255
        part += picture[..., :3]
    return np.rint(image, out=image).clip(0, 255, out=image).astype(np.uint8)


def place(thing: Thing, sprite: Image.Image, side: int) -> tuple[np.ndarray, int, int]:
    """Its picture (rows, columns, 4) in float32, premultiplied, and its left and top in pixels."""
    factor = thing.size * side / max(sprite.size)
    size = tuple(max(1, round(length * factor)) for length in sprite.size)
    image = sprite.resize(size, Image.Resampling.LANCZOS, reducing_gap=3)
    if thing.mirror:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.rotate(thing.angle, Image.Resampling.BICUBIC, expand=True)
    left, top = (
        round(at * side - length / 2)
        for at, length in zip((thing.x, thing.y), image.size, strict=True)
    )
    return np.asarray(image, dtype=np.float32), left, top


def shadow(
    alpha: np.ndarray, left: int, top: int, x: np.ndarray, y: np.ndarray
) -> tuple[tuple[slice, slice], np.ndarray]:
    """Where a thing makes the ground darker, rows and columns of x and y (H, W), and how much: 0
    to 0.45. It is an ellipse under the foot, which is soft and ends where it is below 1 in 1000."""
    rows, columns = np.nonzero(alpha > 128)
    bottom, length = rows.max(), max(alpha.shape)
    foot = columns[rows > bottom - 0.12 * length]
    centre, half = left + (foot.min() + foot.max()) / 2, (foot.max() - foot.min()) / 2
    middle = top + bottom - 0.01 * length
    a, b = 0.85 * half + 0.09 * length, 0.12 * half + 0.05 * length
    ground = tuple(
        slice(max(0, int(at - 2.3 * axis)), max(0, int(at + 2.3 * axis) + 1))
        for at, axis in ((middle, b), (centre, a))
    )
    away = ((x[ground] - centre) / a) ** 2 + ((y[ground] - middle) / b) ** 2
    return ground, 0.45 * np.exp(-1.2 * away)


def paint(background: Background, x: np.ndarray, y: np.ndarray, side: int) -> np.ndarray:
    """The background at pixels x, y (H, W): float32 (H, W, 3)."""
    first = np.array(COLOURS[background.colours[0]], dtype=np.float32)
    if background.kind == "plain":
        return np.broadcast_to(first, (*x.shape, 3)).copy()
    cos, sin = math.cos(background.angle), math.sin(background.angle)
    along, across = x * cos + y * sin, y * cos - x * sin  # pixels
    if background.kind == "gradient":
        second = np.array(COLOURS[background.colours[1]], dtype=np.float32)
        share = (along - along.min()) / (along.max() - along.min())
    else:
        dark = first.mean() < 110
        second = first + 0.25 * (255 - first) if dark else 0.82 * first
        period = background.period * side
        u, v = (2 * math.pi * axis / period for axis in (along, across))
        wave = {
            "striped": np.sin(u),
            "checkered": 2 * np.sin(u / 2) * np.sin(v / 2),
            "dotted": np.cos(u) + np.cos(v) - 1.0,
        }[background.kind]
        share = (0.5 + wave * period / (2 * math.pi) / 1.5).clip(0, 1)  # edges soft over 1.5 px
    return first + share[..., None].astype(np.float32) * (second - first)
