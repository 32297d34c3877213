"""The VAE's decoder a strip of rows at a time: less memory, the same picture.

GroupNorm needs the statistics of the whole picture: a block is run once for each of its norms to
gather them, and once more for its output. Only the outputs are kept whole; enlarging, which makes
the largest tensors, is repeated in the strips of the block that follows.

B batch, C channels, H and W size at hand, G groups of a GroupNorm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from minidit.parts import fast_layout, silu_

HALO = 2  # extra rows read above and below a strip, so that its edge is exact: two 3x3
# convolutions reach that far, and so do three of which the first follows a doubling
Norm = Callable[[Tensor], Tensor]


def decode_in_strips(decoder: nn.Module, z: Tensor, strips: int) -> Tensor:
    """`Decoder.forward` in a number of strips: z (B, C, h, w) -> (B, out_channels, H, W)."""
    x = decoder.mid(decoder.conv_in(z))  # whole: every position attends to every other
    enlarge: nn.Module = nn.Identity()
    for level in decoder.up:
        for block in level.resnets:
            x = block_in_strips(block, enlarge, x, strips)
            enlarge = nn.Identity()
        enlarge = level.upsample
    norm = whole_norm(decoder.norm_out, in_strips(nn.Identity(), x, strips))
    return join(in_strips(lambda s: decoder.conv_out(silu_(norm(s))), x, strips), x)


def block_in_strips(block: nn.Module, enlarge: nn.Module, x: Tensor, strips: int) -> Tensor:
    """`ResnetBlock.forward` of enlarge(x)."""
    norm1 = whole_norm(block.norm1, in_strips(enlarge, x, strips))

    def first_half(s: Tensor) -> Tensor:
        return block.conv1(silu_(norm1(s)))

    norm2 = whole_norm(block.norm2, in_strips(lambda s: first_half(enlarge(s)), x, strips))

    def whole(s: Tensor) -> Tensor:
        s = enlarge(s)
        h = block.conv2(silu_(norm2(first_half(s))))
        return block.shortcut(s) + h

    return join(in_strips(whole, x, strips), x)


def in_strips(f: Callable[[Tensor], Tensor], x: Tensor, strips: int) -> Iterator[Tensor]:
    """f(x) in strips of rows from top to bottom; f sees HALO more rows of x on either side."""
    height = x.shape[2]
    rows = math.ceil(height / strips)
    for top in range(0, height, rows):
        start, stop = max(top - HALO, 0), min(top + rows + HALO, height)
        y = f(x[:, :, start:stop])
        scale = y.shape[2] // (stop - start)  # 2 where f doubles the size
        yield y.narrow(2, (top - start) * scale, min(rows, height - top) * scale)


def join(pieces: Iterator[Tensor], x: Tensor) -> Tensor:
    """The strips of something made of x one below the other, (B, C, H, W)."""
    top, out = 0, None
    for piece in pieces:
        if out is None:  # not torch.cat, which would hold everything twice
            B, C, _, width = piece.shape
            shape = (B, C, x.shape[2] * (width // x.shape[3]), width)
            out = torch.empty(
                shape, dtype=piece.dtype, device=piece.device, memory_format=fast_layout(piece)
            )
        out[:, :, top : top + piece.shape[2]] = piece
        top += piece.shape[2]
    return out


def whole_norm(norm: nn.GroupNorm, pieces: Iterator[Tensor]) -> Norm:
    """`norm` for any part of a picture, with the statistics of the whole, given as strips."""
    means, variances, rows = [], [], []
    for piece in pieces:
        x = exact(piece)
        mean = x.mean(dim=(2, 3), keepdim=True)  # (B, C, 1, 1)
        means.append(mean)
        variances.append((x - mean).square_().mean(dim=(2, 3), keepdim=True))
        rows.append(x.shape[2])

    def pooled(values: list[Tensor]) -> Tensor:
        """The mean over strips and over the channels of a group, for every channel."""
        mean = sum(v * (n / sum(rows)) for v, n in zip(values, rows, strict=True))
        groups = mean.unflatten(1, (norm.num_groups, -1))  # (B, G, C / G, 1, 1)
        return groups.mean(dim=2, keepdim=True).expand_as(groups).flatten(1, 2)  # (B, C, 1, 1)

    mean = pooled(means)
    variance = pooled([v + (m - mean) ** 2 for v, m in zip(variances, means, strict=True)])
    scale = (variance + norm.eps).rsqrt() * norm.weight[:, None, None]
    shift = norm.bias[:, None, None] - mean * scale
    return lambda x: torch.addcmul(shift, exact(x), scale).to(x.dtype)


def exact(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
