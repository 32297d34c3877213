"""Small pictures about pictures: heat maps, labels, sheets; files written whole or not at all."""

from __future__ import annotations

import io
import os
from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

import ras


def heat_image(heat: torch.Tensor, size: tuple[int, int]) -> Image.Image:
    """(rows, columns) in [0, 1] as colours: dark blue never, violet, orange, yellow always."""
    stops = np.array([[13, 8, 80], [126, 3, 168], [224, 100, 98], [240, 249, 33]])
    places = np.linspace(0, 1, len(stops))
    colours = [np.interp(heat, places, channel) for channel in stops.T]  # (rows, columns) each
    image = Image.fromarray(np.stack(colours, axis=2).round().astype(np.uint8))
    return image.resize(size, Image.Resampling.NEAREST)


def step_map(trace: ras.Trace, step: int, size: tuple[int, int]) -> Image.Image:
    """The tokens that one step computed, yellow, and the stale ones, dark blue."""
    return heat_image(trace.active[step][0].view(trace.grid).float().cpu(), size)


def labelled(image: Image.Image, text: str) -> Image.Image:
    """The picture with lines of text below it."""
    font = ImageFont.load_default(size=max(10, image.width // 20))
    place = (2, image.height + 2)
    bottom = ImageDraw.Draw(image).textbbox(place, text, font)[3]
    canvas = Image.new("RGB", (image.width, round(bottom) + 4), "white")
    canvas.paste(image)
    ImageDraw.Draw(canvas).text(place, text, "black", font)
    return canvas


def sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Pictures in rows, columns as wide as their widest picture, with a gap between them."""
    gap = 4
    widths = [max(image.width for image in column if image) + gap for column in zip_longest(*rows)]
    heights = [max(image.height for image in row) + gap for row in rows]
    canvas = Image.new("RGB", (sum(widths) - gap, sum(heights) - gap), "white")
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            canvas.paste(image, (sum(widths[:c]), sum(heights[:r])))
    return canvas


def check_outputs(*paths: Path | None) -> None:
    """Raise ValueError now rather than after minutes of sampling: each path that is not None must
    be a picture that Pillow can write, in a folder that is there, and no two the same."""
    seen = set()
    for path in paths:
        if path is None:
            continue
        check_writable(path)
        if path.resolve() in seen:
            raise ValueError(f"{path} is named for two outputs, must be different files")
        seen.add(path.resolve())


def check_writable(path: Path, endings: Collection[str] | None = None) -> None:
    """Raise ValueError unless a picture can be written there; endings are those that the writer
    knows, where not given those of the formats in which Pillow writes a picture in colour."""
    ending = path.suffix.lower()
    if not (pillow_writes(ending) if endings is None else ending in endings):
        known = f"one of {', '.join(sorted(endings))}" if endings else "e.g. .png or .jpg"
        raise ValueError(f"{path} has no picture's ending that can be written, {known}")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path} can't be written: {path.parent} must be a writable folder")


def check_plot(path: Path | None) -> None:
    """Raise ValueError unless path is None or matplotlib is there and can write a plot to it."""
    if path is None:
        return
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ValueError('--plot needs matplotlib: pip install -e ".[plots]"') from None
    check_writable(path, {f".{kind}" for kind in FigureCanvasBase.filetypes})


def pillow_writes(ending: str) -> bool:
    """Whether Pillow can write a picture in colour of that ending: it says so by doing it."""
    kind = Image.registered_extensions().get(ending)
    try:
        Image.new("RGB", (16, 16)).save(io.BytesIO(), kind or "unknown")
    except Exception:  # each format has errors of its own for what it can't do
        return False
    return True


def save(
    image: Image.Image, path: Path, text: Mapping[str, object] | None = None, **options
) -> None:
    """Write all of the file or nothing; `text` goes into the metadata of a PNG."""
    if text and path.suffix.lower() == ".png":
        options["pnginfo"] = PngInfo()
        for key, value in text.items():
            clean = str(value).encode("utf-8", "replace").decode()  # no lone surrogates
            options["pnginfo"].add_text(key, clean)
    part = path.with_stem(f".{path.stem}.part")
    try:
        image.save(part, **options)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
