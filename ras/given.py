"""Given: the region is known beforehand, as in an edit under a mask.

B batch, N tokens (row-major over rows x columns), K active tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real

import torch
from torch import Tensor

from ras.plan import Step, check_size
from ras.record import Record
from ras.select import History, Region
from ras.values import is_count, require

EVERY = 3  # measured (docs/edit.md)


@dataclass(frozen=True)
class Given:
    """The tokens under a mask are active, and a ring of tokens around them: `ras=Given()`.

    ring   width of the ring in tokens, at least 0. Its tokens are known, too, but their keys and
           values are what the drawn ones attend to most
    every  a dense step first, and then every so many steps, for the keys and values of the other
           tokens. None takes them from the record of the drawing, without any dense step, and
           where there is none is 3

    The pipeline adds the rest (`at`):
    mask    (B, rows, columns) bool, tokens to draw, on the device of the latents
    record  keys and values of the other tokens at every noise level, of the run that is edited
    first   the record's step that is the first of this run

    Raises ValueError for anything outside these ranges.
    """

    ring: float = 1
    every: int | None = None
    mask: Tensor | None = None
    record: Record | None = None
    first: int = 0

    def __post_init__(self) -> None:
        real = isinstance(self.ring, Real) and not isinstance(self.ring, bool)
        require(self, "ring", real and self.ring >= 0, "a number of at least 0")
        ok = self.every is None or (is_count(self.every) and self.every >= 1)
        require(self, "every", ok, "None or an integer of at least 1")
        for name, kind in (("mask", Tensor), ("record", Record)):
            ok = isinstance(getattr(self, name), kind | None)
            require(self, name, ok, f"a {kind.__name__} or None")
        first = is_count(self.first) and self.first >= 0
        require(self, "first", first, "an integer of at least 0")

    def at(self, mask: Tensor, record: Record | None = None, first: int = 0) -> Given:
        """The same for a mask, and for a record from this step on."""
        record = record if self.every is None else None
        return replace(self, mask=mask, record=record, first=first)

    def plan(self, steps: int, tokens: int) -> tuple[Step, ...]:
        """As many active tokens in every regional step as the largest mask of the batch has with
        its ring; the others' rings are wider. Read from the device here, before the run."""
        check_size(steps, tokens)
        if self.mask is None:
            raise ValueError("ras.Given needs a mask: pass mask=, or another ras=")
        if self.mask[0].numel() != tokens:
            raise ValueError(f"the mask has {self.mask[0].numel()} tokens, must have {tokens}")
        active = max(1, int((self.distance <= self.ring).sum(dim=1).amax()))
        dense = range(0, steps, self.every or EVERY) if self.record is None else ()
        regional = (Step(active < tokens, active), Step(False, tokens))
        return tuple(regional[t in dense] for t in range(steps))

    def select(self, history: History | None, step: Step) -> Region:
        """The nearest tokens to the mask. What the others hold is put on the known path."""
        active = self.order[:, : step.active].sort(dim=1).values  # (B, K)
        if self.record is None:
            return Region(active, 0.0)
        i = 0 if history is None else history.step + 1
        return Region(active, 0.0, self.record.recall(self.first + i, len(active)))

    @cached_property
    def distance(self) -> Tensor:
        """From every token to the nearest one under the mask, in tokens, (B, N) float32."""
        far = torch.where(self.mask, 0.0, float("inf"))  # (B, rows, columns)
        for _ in range(2):  # squares along the columns, then along the rows
            place = torch.arange(far.shape[2], device=far.device)
            squares = (place[:, None] - place) ** 2
            far = (far[:, :, None] + squares).amin(dim=3).transpose(1, 2)
        return far.flatten(1).sqrt()

    @cached_property
    def order(self) -> Tensor:
        """The tokens by their distance, the nearest first, (B, N)."""
        return self.distance.argsort(dim=1, stable=True)
