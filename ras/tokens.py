"""Between pixels and tokens, and between all tokens and some: the only index arithmetic there is.

B batch, N tokens (row-major over the grid of patches), K chosen tokens, C channels, P patch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def patchify(pixels: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, N, P*P, C): the pixels of every patch, row-major, channels last."""
    B, C, H, W = pixels.shape
    x = pixels.reshape(B, C, H // patch, patch, W // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, patch * patch, C)


def unpatchify(tokens: Tensor, height: int, width: int, patch: int) -> Tensor:
    """(B, N, ...) of P*P*C numbers a token -> (B, C, height, width): undoes `patchify`."""
    B, h, w = tokens.shape[0], height // patch, width // patch
    x = tokens.reshape(B, h, w, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, height, width)


def flat_rows(index: Tensor, size: int) -> Tensor:
    """Per-sample token numbers (B, K) -> row numbers (B, K) in a (B * size, ...) matrix.

    Whole rows of a flattened matrix are what index_select and index_copy_ move fastest, so the
    offset of each sample is added once and the result used by every layer.
    """
    offset = torch.arange(index.shape[0], device=index.device) * size  # (B,)
    return index + offset[:, None]


def take(x: Tensor, rows: Tensor) -> Tensor:
    """The chosen rows: x (B, N, ...), rows (B, K) from `flat_rows` -> (B, K, ...)."""
    return x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape)


def put_(x: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """Overwrite the chosen rows of x (B, N, ...) in place with values (B, K, ...); returns x."""
    x.view(-1, *x.shape[2:]).index_copy_(0, rows.flatten(), values.flatten(0, 1))
    return x


def mask_of(index: Tensor, size: int) -> Tensor:
    """Token numbers (B, K) -> (B, size) bool, true at those tokens."""
    mask = torch.zeros(index.shape[0], size, dtype=torch.bool, device=index.device)
    return mask.scatter_(1, index, True)
