"""How near two pictures are."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image


def psnr(image: Image.Image, reference: Image.Image) -> float:
    """Peak signal-to-noise ratio of two pictures of one size, in decibels."""
    difference = np.asarray(image, dtype=float) - np.asarray(reference, dtype=float)
    mse = np.square(difference).mean()
    return 10 * math.log10(255**2 / mse) if mse else math.inf
