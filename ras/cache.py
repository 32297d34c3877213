"""Keys and values of every attention layer, kept between the steps of a run.

B batch, N image tokens, L text tokens, K active tokens, S cached rows of a layer (N, or N + L where
text and image attend together), H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import torch
from torch import Tensor

from ras.tokens import put_


class KVCache:
    """What active tokens attend to (RAS, section 3.4): `part`, `write`, `keep`, `to`, `clear`,
    `nbytes`.

    A network's cache has a part for every attention layer, and that has the layer's keys and values
    `k` and `v`, (B, S, H, D) each, None at first. A dense step leaves them there as they are,
    without a copy. A regional step overwrites its rows in place and attends to all: those of stale
    tokens are of the last time that they were computed, bit for bit.
    """

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self._parts: dict[Hashable, KVCache] = {}

    def part(self, name: Hashable) -> KVCache:
        """The cache of a layer, or of one more pass over the same tokens in every step."""
        if name not in self._parts:
            self._parts[name] = KVCache()
        return self._parts[name]

    def write(self, k: Tensor, v: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Store a layer's fresh k, v and return the full keys and values to attend to, (B, S, H, D)
        each.

        rows None: k, v (B, S, H, D) are all of them. Otherwise k, v (B, K, H, D) belong to these
        rows (B, K), flat as from `tokens.flat_rows`.
        Raises ValueError where rows are given but the layer was never written in full.
        """
        if rows is None:
            # contiguous: a slice of a fused projection would keep the whole projection alive
            self.k, self.v = k.contiguous(), v.contiguous()
            return self.k, self.v
        if self.k is None:
            raise ValueError(
                "the cache has no keys and values of this layer yet: run a dense step "
                "(active=None) with this cache before a regional one"
            )
        if len(k) != len(self.k):
            raise ValueError(
                f"the cache was filled with a batch of {len(self.k)}, got a batch of {len(k)}"
            )
        return put_(self.k, rows, k), put_(self.v, rows, v)

    def __iter__(self) -> Iterator[KVCache]:
        """This cache and all parts of it that have keys and values, as they were made."""
        if self.k is not None:
            yield self
        for part in self._parts.values():
            yield from part

    def keep(self, samples: slice) -> None:
        """Go on with these samples of the batch alone, as views of what is there."""
        for layer in self:
            layer.k, layer.v = layer.k[samples], layer.v[samples]

    def to(self, device: torch.device | str) -> None:
        """Move all layers to a device."""
        for layer in self:
            layer.k, layer.v = layer.k.to(device), layer.v.to(device)

    def clear(self) -> None:
        """Forget everything and free the memory."""
        self.k = self.v = None
        self._parts.clear()

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return sum(layer.k.nbytes + layer.v.nbytes for layer in self)
