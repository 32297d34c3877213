"""One step of a plan."""

from __future__ import annotations

from typing import NamedTuple


class Step(NamedTuple):
    """What a step does: `regional` or dense, how many tokens are `active`, and whether it selects
    them anew (`select`; only upstream has regional steps that keep the set before)."""

    regional: bool
    active: int
    select: bool = False
