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
    """What active tokens attend to (RAS, section 3.4): `write`, `apart`, `keep`, `to`,
    `clear`, `nbytes`.

    A dense step leaves its keys and values here as they are, without a copy. A regional step
    overwrites its rows in place and attends to all: those of stale tokens are of the last time that
    they were computed, bit for bit.
    """

    def __init__(self) -> None:
        self._layers: dict[Hashable, tuple[Tensor, Tensor]] = {}
        self._apart: dict[Hashable, KVCache] = {}

    def write(
        self, layer: Hashable, k: Tensor, v: Tensor, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Store fresh k, v and return the full keys and values to attend to, (B, S, H, D) each.

        rows None: k, v (B, S, H, D) are all of them. Otherwise k, v (B, K, H, D) belong to these
        rows (B, K), flat as from `tokens.flat_rows`.
        Raises ValueError where rows are given but the layer was never written in full.
        """
        if rows is None:
            # contiguous: a slice of a fused projection would keep the whole projection alive
            self._layers[layer] = k.contiguous(), v.contiguous()
            return self[layer]
        if layer not in self._layers:
            raise ValueError(
                f"the cache has no keys and values of layer {layer!r} yet: run a dense step "
                "(active=None) with this cache before a regional one"
            )
        full_k, full_v = self[layer]
        if len(k) != len(full_k):
            raise ValueError(
                f"the cache was filled with a batch of {len(full_k)}, got a batch of {len(k)}"
            )
        return put_(full_k, rows, k), put_(full_v, rows, v)

    def __getitem__(self, layer: Hashable) -> tuple[Tensor, Tensor]:
        """The stored keys and values of a layer, (B, S, H, D) each."""
        return self._layers[layer]

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._layers)

    def apart(self, name: Hashable) -> KVCache:
        """The cache of one more pass over the same tokens in every step, empty at first."""
        return self._apart.setdefault(name, KVCache())

    def keep(self, samples: slice) -> None:
        """Go on with these samples of the batch alone, as views of what is there."""
        self._layers = {layer: (k[samples], v[samples]) for layer, (k, v) in self._layers.items()}

    def to(self, device: torch.device | str) -> None:
        """Move all layers to a device."""
        self._layers = {i: (k.to(device), v.to(device)) for i, (k, v) in self._layers.items()}
        for cache in self._apart.values():
            cache.to(device)

    def clear(self) -> None:
        """Forget everything and free the memory."""
        self._layers.clear()
        self._apart.clear()

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers."""
        own = sum(k.nbytes + v.nbytes for k, v in self._layers.values())
        return own + sum(cache.nbytes for cache in self._apart.values())
