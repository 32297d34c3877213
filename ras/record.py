"""What a drawing leaves behind for edits of its picture: latents, keys and values of every step.

B batch, N image tokens, S cached rows of a layer, K active tokens, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from ras.cache import KVCache
from ras.tokens import put_
from ras.values import is_count, short


class Record:
    """Keys, values and latents of every step of one dense run: `denoise(..., record=Record())`.

    every   keep the keys and values of every so many steps, and of the last one; those of a step
            between are read off a line in sigma
    device  where to keep them, e.g. "cpu"; None leaves them where they are

    A kept step takes layers * 2 * rows * width numbers for every picture, twice that under
    guidance; rows are image tokens, and where text and image attend together text tokens, too.
    SD3-medium at 1024 px in 16 bits: 1.2 GB a step. `nbytes` says how much it is.
    """

    def __init__(self, every: int = 1, device: torch.device | str | None = None) -> None:
        if not is_count(every) or every < 1:
            raise ValueError(f"every is {short(every)}, must be an integer of at least 1")
        self.every, self.device = every, device
        self.levels: list[float] = []  # (steps + 1,) of the run
        self.path: list[Tensor] = []  # latents at every level, (B, C, H, W) each
        self.caches: dict[int, KVCache] = {}  # of the steps that are kept
        self.correct = False  # whether the run's solver was the corrected one

    def start(self, levels: list[float], latents: Tensor, correct: bool) -> None:
        """Begin anew: a run of these levels from these latents."""
        self.levels, self.path, self.caches, self.correct = levels, [latents], {}, correct

    def cache(self, step: int) -> KVCache | None:
        """What a step of the run leaves its keys and values in; None if it is not kept."""
        if step % self.every and step != len(self.levels) - 2:
            return None
        return self.caches.setdefault(step, KVCache())

    def end(self, step: int, latents: Tensor) -> None:
        """Keep the latents that a step of the run led to."""
        self.path.append(latents)
        if step in self.caches and self.device is not None:
            self.caches[step].to(self.device)

    def recall(self, step: int, batch: int) -> Recalled:
        """The keys and values of a step, as the cache of a regional step at the same level.

        batch  samples of that step: every recorded picture serves as many of them in a row
        """
        pictures = len(self.path[0])
        if step in self.caches:
            return Recalled(pictures, batch, self.caches[step])
        before = step - step % self.every
        after = min(before + self.every, len(self.levels) - 2)
        start, end = self.levels[before], self.levels[after]
        weight = (self.levels[step] - start) / (end - start)
        return Recalled(pictures, batch, self.caches[before], self.caches[after], weight)

    @property
    def guided(self) -> bool:
        """Whether it has both halves of a guided run."""
        return len(self._keys) > len(self.path[0])

    @property
    def rows(self) -> int:
        """S, cached rows of the first layer."""
        return self._keys.shape[1]

    @property
    def _keys(self) -> Tensor:
        """Of the first layer in the first step."""
        return next(iter(self.caches[0])).k

    @property
    def nbytes(self) -> int:
        """Bytes of all steps together."""
        caches = sum(cache.nbytes for cache in self.caches.values())
        return caches + sum(latents.nbytes for latents in self.path)


class Recalled:
    """A KVCache of one step that gives what was recorded and leaves the record as it is.

    pictures  in the record, and batch those of the step: a multiple
    before    the step's own keys and values, or with `after` those of kept steps around it, between
              which it lies at `weight`
    """

    def __init__(
        self,
        pictures: int,
        batch: int,
        before: KVCache,
        after: KVCache | None = None,
        weight: float = 0.0,
    ) -> None:
        self.pictures, self.batch = pictures, batch
        self.before, self.after, self.weight = before, after, weight

    def part(self, name: Hashable) -> Recalled:
        """What was recorded of a layer, or of one more pass: see `KVCache.part`."""
        after = None if self.after is None else self.after.part(name)
        if after is not None and not after.nbytes:  # the later step had no such pass
            after = None
        return Recalled(self.pictures, self.batch, self.before.part(name), after, self.weight)

    def write(self, k: Tensor, v: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """The recorded keys and values of a layer, with k, v (B, K, H, D) in these rows (B, K)."""
        if rows is None:
            return k, v
        full_k, full_v = self._copy("k", k), self._copy("v", v)
        return put_(full_k, rows, k), put_(full_v, rows, v)

    def keep(self, samples: slice) -> None:
        """Nothing: what a step without guidance does not need is left out as it reads."""

    @property
    def nbytes(self) -> int:
        """Bytes of the recorded step; 0 if it had no such pass."""
        return self.before.nbytes

    def _copy(self, what: str, fresh: Tensor) -> Tensor:
        """A copy of the recorded keys "k" or values "v", (B, S, H, D), on fresh's device."""
        wanted = len(fresh) // self.batch * self.pictures  # without guidance the second half alone
        recorded = getattr(self.before, what)
        if recorded is None:
            raise ValueError("the edit runs a layer that the drawing skipped: skip the same layers")
        if len(recorded) < wanted:
            raise ValueError("the edit guides a step that the drawing did not: guide it alike")
        recorded = recorded[-wanted:].to(fresh.device)
        later = getattr(self.after, what, None)
        if later is not None and len(later) >= wanted:  # guided alike
            recorded = torch.lerp(recorded, later[-wanted:].to(fresh.device), self.weight)
        return recorded.repeat_interleave(self.batch // self.pictures, dim=0)
