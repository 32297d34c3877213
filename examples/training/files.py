"""What training writes: checkpoints, and models in the official folder layout."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

import minidit
from minidit.scheduler import SchedulerConfig
from training import models


def save(state: Any, path: Path) -> None:
    """Write a checkpoint so that an interruption leaves the old one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")


def export(family: str, run: Path, out: Path, scheduler: SchedulerConfig) -> None:
    """Write the averaged networks of a run's checkpoint in the official folder layout."""
    pipe = models.new_pipeline(family, run)
    average = models.trainable(pipe)
    average.load_state_dict(torch.load(run / "checkpoint.pt", map_location="cpu")["average"])
    models.place(pipe, models.PIXELS)
    pipe.scheduler = scheduler
    minidit.save(pipe, out, torch.bfloat16)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"wrote {out}, {size / 1e6:.1f} MB")
