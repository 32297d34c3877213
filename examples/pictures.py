"""Small pictures about pictures: heat maps, labels, sheets, files written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

import ras


def heat_image(heat: torch.Tensor, size: tuple[int, int]) -> Image.Image:
    """(rows, columns) in [0, 1] as colours: dark blue never, violet, orange, yellow always."""
    stops = torch.tensor([[13, 8, 80], [126, 3, 168], [224, 100, 98], [240, 249, 33]]).float()
    x = heat.clamp(0, 1) * (len(stops) - 1)
    low = x.floor().long().clamp(max=len(stops) - 2)
    part = (x - low)[..., None]
    colours = stops[low] * (1 - part) + stops[low + 1] * part  # (rows, columns, 3)
    image = Image.fromarray(colours.round().to(torch.uint8).numpy())
    return image.resize(size, Image.Resampling.NEAREST)


def active_map(image: Image.Image, trace: ras.Trace) -> Image.Image:
    """A picture beside the heat map of how often each of its regions was computed."""
    return sheet([[image, heat_image(trace.heat(), image.size)]])


def step_map(trace: ras.Trace, step: int, size: tuple[int, int]) -> Image.Image:
    """The tokens that one step computed, yellow, and the stale ones, dark blue."""
    return heat_image(trace.active[step][0].view(trace.grid).float().cpu(), size)


def labelled(image: Image.Image, text: str) -> Image.Image:
    """The picture with lines of text below it."""
    font = ImageFont.load_default(size=max(10, image.width // 20))
    lines = text.split("\n")
    line_height = round(font.size * 1.35)
    canvas = Image.new("RGB", (image.width, image.height + line_height * len(lines) + 4), "white")
    canvas.paste(image, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for i, line in enumerate(lines):
        draw.text((2, image.height + 2 + i * line_height), line, fill="black", font=font)
    return canvas


def sheet(rows: Sequence[Sequence[Image.Image]], gap: int = 4) -> Image.Image:
    """Pictures in rows, columns as wide as their widest picture."""
    columns = max(len(row) for row in rows)
    widths = [max(row[c].width for row in rows if c < len(row)) for c in range(columns)]
    heights = [max(image.height for image in row) for row in rows]
    total = (sum(widths) + gap * (columns - 1), sum(heights) + gap * (len(rows) - 1))
    canvas = Image.new("RGB", total, "white")
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            canvas.paste(image, (sum(widths[:c]) + gap * c, sum(heights[:r]) + gap * r))
    return canvas


def check_writable(path: Path, endings: Collection[str] | None = None) -> None:
    """Raise ValueError now rather than after minutes of sampling; endings are those that the
    writer knows, Pillow's where not given."""
    if path.suffix.lower() not in (endings or Image.registered_extensions()):
        raise ValueError(f"{path} has no picture's ending, e.g. .png or .jpg")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path} can't be written: {path.parent} must be a writable folder")


def save(image: Image.Image, path: Path, **options) -> None:
    """Write all of the file or nothing."""
    part = path.with_stem(f".{path.stem}.part")
    try:
        image.save(part, **options)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
