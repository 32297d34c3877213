"""Sound models in every layout, and what loading a damaged one comes to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from weight_files import (
    LUMINA,
    lumina_tensors,
    sd3_tensors,
    to_sai,
    write_component,
    write_folder,
    write_lumina_t2x,
    write_single,
    write_tokenizers,
)

from weights.load import load_parts

LAYOUTS = ("folder", "shards", "single", "separate", "lumina folder", "lumina", "lumina pth")


def write_layouts(root: Path) -> dict[str, Path]:
    """A whole tiny model in every layout: what to load of each."""
    sd3, lumina = sd3_tensors(), lumina_tensors()
    paths = {"folder": write_folder(root / "folder", "sd3", sd3)}

    paths["shards"] = root / "shards"
    shutil.copytree(paths["folder"], paths["shards"])
    t5 = paths["shards"] / "text_encoder_3"
    (t5 / "model.safetensors").unlink()
    names = sorted(sd3["text_encoder_3"])
    where = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        tensors = sd3["text_encoder_3"]
        save_file({name: tensors[name] for name in names if where[name] == file}, t5 / file)
    (t5 / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))

    (root / "single").mkdir()
    paths["single"] = write_single(root / "single" / "all.safetensors", sd3)
    write_tokenizers(root / "single", "sd3")

    (root / "separate").mkdir()
    core = {name: sd3[name] for name in ("transformer", "vae")}
    paths["separate"] = write_single(root / "separate" / "core.safetensors", core)
    for name, file in {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}.items():
        save_file(to_sai(name, sd3[name]), root / "separate" / f"{file}.safetensors")
    save_file(
        to_sai("text_encoder_3", sd3["text_encoder_3"]), root / "separate" / "t5xxl.safetensors"
    )
    write_tokenizers(root / "separate", "sd3")

    paths["lumina folder"] = write_folder(root / "lumina folder", "lumina", lumina)
    for layout, end in {"lumina": "safetensors", "lumina pth": "pth"}.items():
        paths[layout] = write_lumina_t2x(root / layout, lumina["transformer"], end)
        for name in ("vae", "text_encoder"):
            write_component(root / layout / name, name, *LUMINA[name], lumina[name])
        write_tokenizers(root / layout, "lumina")
    return paths


def shapes_of(path: Path) -> dict[str, dict]:
    """Of every network."""
    parts = load_parts(path)[1]
    return {
        name: {key: tensor.shape for key, tensor in part.state_dict().items()}
        for name, part in parts.items()
        if isinstance(part, torch.nn.Module)
    }


FINE = ("sound", "refused")


def verdict(path: Path, expected: dict[str, dict]) -> str:
    """What loading it comes to: "sound" (the sound model's shape), "refused" (in a sentence), or
    else what is wrong with that."""
    try:
        found = shapes_of(path)
    except (ValueError, FileNotFoundError) as error:
        return "refused" if refusal(error) else f"no plain sentence: {error!r}"
    for name, shape in found.items():
        if shape != expected.get(name):
            return f"{name} is {shape}"
    lacking = expected.keys() - found.keys() - {"text_encoder_3"}
    return f"loaded without {lacking}" if lacking else "sound"


def refusal(error: BaseException) -> bool:
    """Whether an exception says in one sentence what is wrong with a file."""
    message = str(error)
    plain = type(error) in (ValueError, FileNotFoundError)
    return plain and 20 < len(message) < 4000 and message.isprintable()
