"""The stage `export`: a model in the official folder layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import minidit
from minidit.scheduler import SchedulerConfig
from training import models


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")


def export(family: str, run: Path, out: Path, scheduler: SchedulerConfig) -> None:
    """Write the averaged networks of a run's checkpoint as a whole model."""
    pipe = models.new_pipeline(family, run, torch.device("cpu"))
    state = torch.load(run / family / "checkpoint.pt", map_location="cpu")
    models.trainable(pipe).load_state_dict(state["average"])
    models.place(pipe, models.PIXELS[family])
    pipe.scheduler = scheduler
    minidit.save(pipe, out, torch.bfloat16)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"wrote {out}, {size / 1e6:.1f} MB")
