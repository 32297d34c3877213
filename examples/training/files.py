"""What training writes: checkpoints, and models in the official folder layout."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minidit.scheduler import SchedulerConfig
from training import models
from weights.keymap import recipes, write_out
from weights.model import FAMILIES
from weights.networks import KINDS

OFFICIAL = {  # our networks -> what the official config.json says besides the sizes
    "mmdit": {"_class_name": "SD3Transformer2DModel"},
    "nextdit": {"_class_name": "LuminaNextDiT2DModel"},
    "vae": {
        "_class_name": "AutoencoderKL",
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "clip": {"architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model"},
    "t5": {"architectures": ["T5EncoderModel"], "model_type": "t5", "is_encoder_decoder": False},
    "gemma": {"architectures": ["GemmaModel"], "model_type": "gemma"},
}


def save(state: Any, path: Path) -> None:
    """Write a checkpoint so that an interruption leaves the old one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")


def write_network(module: nn.Module, folder: Path) -> None:
    """One network as config.json and a bfloat16 safetensors file with the official names."""
    kind = next(name for name, kind in KINDS.items() if isinstance(module, kind.network))
    state = module.state_dict()
    table = KINDS[kind].tables["diffusers"](module.config, None)
    plan = recipes(table, {name: tuple(value.shape) for name, value in state.items()})
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        tensors |= write_out(value.contiguous().bfloat16(), plan[name])
    config = asdict(module.config) | OFFICIAL[kind]
    config.pop("shared_query", None)  # ours: the loader reads it off the tensors
    write_json(folder / "config.json", config)
    stem = "diffusion_pytorch_model" if kind in ("mmdit", "nextdit", "vae") else "model"
    tensors = {name: value.clone().contiguous() for name, value in tensors.items()}
    save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})


def export(family: str, run: Path, out: Path, scheduler: SchedulerConfig) -> None:
    """Write the averaged networks of a run's checkpoint in the official folder layout."""
    pipe = models.new_pipeline(family, run)
    average = models.trainable(pipe)
    average.load_state_dict(torch.load(run / "checkpoint.pt", map_location="cpu")["average"])
    models.place(pipe, models.PIXELS)
    for name, module in average.items():
        write_network(module, out / name)
    for name in ("vae", "tokenizer", "tokenizer_2", "tokenizer_3"):
        if (run / name).is_dir():
            shutil.copytree(run / name, out / name, dirs_exist_ok=True)
    values = {"_class_name": "FlowMatchEulerDiscreteScheduler", **asdict(scheduler)}
    write_json(out / "scheduler/scheduler_config.json", values)
    index = {"_class_name": FAMILIES[family].pipeline}
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    for name in sorted(path.name for path in out.iterdir() if path.is_dir()):
        values = name.startswith(("text", "tokenizer"))
        config = out / name / ("tokenizer_config.json" if "tokenizer" in name else "config.json")
        if config.is_file():
            given = json.loads(config.read_text("utf-8"))
            kind = given.get("_class_name") or given.get("tokenizer_class")
            library = "transformers" if values else "diffusers"
            index[name] = [library, kind or given["architectures"][0]]
    write_json(out / "model_index.json", index)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"wrote {out}, {size / 1e6:.1f} MB")
