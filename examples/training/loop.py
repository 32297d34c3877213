"""The loop that every training stage runs in: it goes on where it was interrupted."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class Loop:
    """The numbers of the steps of a stage that are still to be made.

    parts is all that the stage changes, by name: anything with state_dict and load_state_dict. It
    is read from the checkpoint at path, if that is there, and written to it every save_minutes and
    at the end. Steps must take their random numbers from their number alone: then an interrupted
    run makes the very steps of an uninterrupted one.
    """

    def __init__(
        self, path: Path, steps: int, parts: dict[str, Any], save_minutes: float = 3.0
    ) -> None:
        self.path, self.steps, self.parts, self.save_minutes = path, steps, parts, save_minutes
        self.done = self.first = 0  # steps made in all, before this loop
        self._losses: list[Tensor] = []
        if path.is_file():
            state = torch.load(path, map_location="cpu")
            self.done = self.first = state.pop("steps")
            for name, part in parts.items():
                part.load_state_dict(state[name])
            print(f"going on from step {self.done} of {path}", flush=True)

    @property
    def left(self) -> range:
        """The numbers of the steps to come."""
        return range(self.done, self.steps)

    def __iter__(self) -> Iterator[int]:
        started = saved = time.time()
        while self.done < self.steps:
            yield self.done
            self.done += 1
            now, last = time.time(), self.done == self.steps
            if self.done % 50 == 0 or last:
                self._print((now - started) / (self.done - self.first))
            if last or now - saved > 60 * self.save_minutes:
                saved = now
                self.save()

    def log(self, loss: Tensor) -> None:
        """Remember the loss of a step for the next line printed."""
        self._losses.append(loss.detach())

    def save(self) -> None:
        """Write the checkpoint."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        save(state | {"steps": self.done}, self.path)

    def _print(self, pace: float) -> None:
        loss, self._losses = torch.stack(self._losses).mean().item(), []
        left = pace * (self.steps - self.done) / 60
        print(
            f"step {self.done:6d}  loss {loss:.4f}  {pace:.3f} s a step  {left:.1f} min left",
            flush=True,
        )
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {self.done}; lower --muon-lr")


def ahead(make: Callable[[int], Any], numbers: Sequence[int], workers: int) -> Iterator[Any]:
    """make(n) of all the numbers in their order, made by so many processes before they are needed;
    0 makes them here and now."""

    class Made(Dataset):
        def __getitem__(self, number: int) -> Any:
            return make(int(number))

    options = {"prefetch_factor": 8, "multiprocessing_context": "fork"} if workers else {}
    return iter(
        DataLoader(
            Made(), None, sampler=numbers, num_workers=workers, collate_fn=lambda x: x, **options
        )
    )


def save(state: Any, path: Path) -> None:
    """Write a state so that an interruption leaves the old one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, step: int) -> None:
    """Move an average over about the last tenth of a run (Karras et al. 2024), at most over some
    500 steps: those before may have been made on smaller pictures."""
    weight = max(0.002, min(1.0, 8 / (step + 2)))
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), weight)
