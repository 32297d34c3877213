"""Pictures in: reading them and their masks, and putting the drawn part back.

White under the mask is drawn anew, black stays. n pictures, H and W their size in pixels,
h and w the size of their latents.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from minidit import checks
from minidit.flow import Known
from ras import Record


class Source:
    """What a run starts from where that is not noise alone: pictures, or an earlier run.

    pictures  one or n RGB pictures of one size
    masks     as many in grey, None to redraw all
    strength  share of the steps to run, in (0, 1]
    record    of the earlier run, whose path is followed where the masks are black; None for
              pictures, whose path is the straight line to their noise
    """

    def __init__(
        self, image: Any, mask: Any, strength: float | None, n: int, multiple: int
    ) -> None:
        """image  a PIL image or a list of n, or the `Output` of a call with keep; mask likewise
        multiple  of a side in pixels
        Raises ValueError for what does not fit.
        """
        self.record: Record | None = getattr(image, "record", None)
        if hasattr(image, "latents"):
            if self.record is None or not isinstance(image.images, list) or not image.images:
                raise ValueError("image is an Output without record or pictures: draw with keep")
            n, image = max(n, len(image.images)), image.images
        self.pictures = read_pictures(image, n, multiple)
        self.masks = None if mask is None else read_masks(mask, self.pictures)
        if strength is None:
            strength = 0.6 if mask is None else 1.0
        self.strength = checks.number("strength", strength, 0, 1)
        if not self.strength:
            raise ValueError("strength is 0, which draws nothing: must be in (0, 1]")

    def fit(self, height: int | None, width: int | None) -> tuple[int, int]:
        """The pictures' height and width. Raises ValueError where others are asked."""
        w, h = self.pictures[0].size
        for name, side, asked in (("height", h, height), ("width", w, width)):
            if asked is not None and checks.integer(name, asked, 1) != side:
                raise ValueError(f"{name} is {checks.short(asked)}, but image is {w}x{h} pixels")
        return h, w

    def levels(self, levels: Tensor) -> Tensor:
        """The noise levels that are left of a whole run's."""
        return levels[first_step(len(levels) - 1, self.strength) :]

    def tokens(self, pipe: Any, count: int) -> Tensor:
        """Which tokens have latents to draw, (count, rows, columns) bool on the device."""
        P = pipe.transformer.config.patch_size
        latents = latent_masks(self.masks, pipe.vae.config.downscale)[:, 0]  # (n, h, w)
        tokens = latents.unfold(1, P, P).unfold(2, P, P).flatten(3).any(dim=3)
        return self._each(tokens, count).to(pipe.device)

    def start(self, pipe: Any, noise: Tensor, levels: Tensor) -> tuple[Tensor, Known | None]:
        """Latents at levels[0] from noise (B, C, h, w), and what is known of all levels."""
        if self.record is None:
            with pipe.running(pipe.vae) as vae:
                pixels = to_pixels(self.pictures).to(noise.device)
                image = torch.cat([vae.encode(p[None]).float() for p in pixels])  # (n, C, h, w)
            path = straight_path(self._each(image, len(noise)), noise, levels)
        else:
            path = [self._each(x, len(noise)) for x in self.record.path[-len(levels) :]]
        level = levels[0].item()
        latents = level * noise + (1 - level) * path[-1]
        if self.masks is None:
            return latents, None
        mask = latent_masks(self.masks, pipe.vae.config.downscale)
        known = Known(path, self._each(mask, len(noise)).to(noise.device))
        return known.put(latents, 0), known

    def paste(self, images: list[Image.Image] | np.ndarray) -> list[Image.Image] | np.ndarray:
        """Drawn pictures where the masks are white, the given ones where they are black."""
        if self.masks is None:
            return images
        originals, masks = (
            [some[i * len(some) // len(images)] for i in range(len(images))]
            for some in (self.pictures, self.masks)
        )
        if isinstance(images, np.ndarray):
            kept = np.stack([np.asarray(x, np.float32) for x in originals]) / 255
            white = np.stack([np.asarray(x, np.float32) for x in masks])[..., None] / 255
            return white * images + (1 - white) * kept
        return [Image.composite(*three) for three in zip(images, originals, masks, strict=True)]

    def _each(self, x: Tensor, count: int) -> Tensor:
        """Rows repeated so that there are `count`: every picture for the prompts that it serves."""
        return x.repeat_interleave(count // len(x), dim=0)


def read_pictures(value: Any, count: int, multiple: int) -> list[Image.Image]:
    """One picture or several as RGB pictures of the same size, one or `count` of them.

    Turned as their EXIF data says; transparent parts lie on white; 16 bits become 8.
    Raises ValueError for anything else, and for a size that `multiple` does not divide.
    """
    pictures = [to_rgb(picture) for picture in _listed("image", value, count)]
    width, height = size = pictures[0].size
    other = next((picture.size for picture in pictures if picture.size != size), size)
    if other != size:
        raise ValueError(
            f"image has pictures of {width}x{height} and {other[0]}x{other[1]}, all must have one "
            "size"
        )
    if width % multiple or height % multiple:
        fits = [max(1, round(side / multiple)) * multiple for side in size]
        raise ValueError(
            f"image is {width}x{height} pixels, both must be multiples of {multiple}: resize or "
            f"crop it, e.g. to {fits[0]}x{fits[1]}"
        )
    return pictures


def read_masks(value: Any, pictures: list[Image.Image]) -> list[Image.Image]:
    """One mask or one for every picture, as 8-bit grey of the pictures' size.

    White is drawn anew, black and transparent parts stay. Raises ValueError for anything else.
    """
    masks = [to_grey(mask) for mask in _listed("mask", value, len(pictures))]
    for mask in masks:
        if mask.size != pictures[0].size:
            (width, height), (w, h) = mask.size, pictures[0].size
            raise ValueError(f"mask is {width}x{height} pixels, the picture {w}x{h}")
    return masks


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB, turned upright, on white where it is transparent."""
    return _flat(image, "white").convert("RGB")


def to_grey(image: Image.Image) -> Image.Image:
    """A mask of any mode as 8-bit grey, turned upright, on black where it is transparent."""
    return _flat(image, "black").convert("L")


def _flat(image: Image.Image, ground: str) -> Image.Image:
    """A picture of 8 bits without transparency, turned upright."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("a picture of mode F (floating point) has no set range: save it as 8 bit")
    if image.mode.startswith("I"):
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(
                f"a picture of mode {image.mode} has values within {levels.min()}..{levels.max()}, "
                "must be within 0..65535"
            )
        return Image.fromarray((levels / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, ground), image)
    return image


def _listed(name: str, value: Any, count: int) -> list[Image.Image]:
    listed = list(value) if isinstance(value, list | tuple) else [value]
    for picture in listed:
        if not isinstance(picture, Image.Image):
            raise ValueError(f"{name} is {checks.short(picture)}, must be a PIL image or a list")
    if len(listed) not in (1, count):
        wanted = "1" if count == 1 else f"1 or {count}"
        raise ValueError(f"{name} has {len(listed)} pictures, must have {wanted}")
    return listed


def to_pixels(pictures: list[Image.Image]) -> Tensor:
    """RGB pictures as (n, 3, H, W) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return (pixels / 255 * 2 - 1).permute(0, 3, 1, 2)  # diffusers' order of operations


def latent_masks(masks: list[Image.Image], downscale: int) -> Tensor:
    """Which latents to draw, (n, 1, h, w) bool: white (at least 128) in the first pixel of each.

    As in diffusers' pipelines for painting into pictures.
    """
    grey = torch.from_numpy(np.stack([np.asarray(mask) for mask in masks]))  # (n, H, W)
    return (grey >= 128)[:, None, ::downscale, ::downscale]


def first_step(steps: int, strength: float) -> int:
    """Where a run that redraws a picture begins: steps * strength steps are left, rounded up.

    (diffusers pipeline_stable_diffusion_3_img2img.py, get_timesteps)
    """
    return min(int(steps - steps * strength), steps - 1)


def straight_path(image: Tensor, noise: Tensor, levels: Tensor) -> list[Tensor]:
    """Latents of an image (B, C, h, w) at every noise level, on the line to its noise."""
    return [level * noise + (1 - level) * image for level in levels.tolist()]


def drawn_levels(record: Record, noise: Tensor, guidance: float, steps: Any, sigmas: Any) -> Tensor:
    """The noise levels of an earlier run. Raises ValueError where the edit does not suit it."""
    for name, value in (("steps", steps), ("sigmas", sigmas)):
        if value is not None:
            raise ValueError(f"{name} can't be chosen for an edit: they are those of the drawing")
    pictures = len(record.path[0])
    if record.path[0].shape[1:] != noise.shape[1:] or len(noise) % pictures:
        raise ValueError(
            f"the drawing has latents {tuple(record.path[0].shape)}, the edit "
            f"{tuple(noise.shape)}: draw it with this model, and give one prompt a picture"
        )
    if guidance != 1 and not record.guided:
        raise ValueError(f"guidance is {guidance}, but the picture was drawn without")
    return torch.tensor(record.levels)


def check_text_rows(record: Record, tokens: int, length: int) -> None:
    """Raise ValueError unless keys and values of an earlier run suit prompts of `length` tokens.

    Where text and image attend together, the text's rows lie behind those of the image's tokens.
    """
    text = record.rows - tokens
    if text not in (0, length):
        raise ValueError(
            f"the picture was drawn with {text} text tokens, the edit has {length}: both must be "
            "encoded alike"
        )
