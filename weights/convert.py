"""Any layout we read, written as a folder in the diffusers layout.

Tensor by tensor, in the type it is stored in, so that a model larger than the memory can be
converted, and what is loaded from either is the same to the bit.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weights.files import DTYPES, Tensors
from weights.keymap import Recipe, read_into, recipes, write_out
from weights.model import COMPONENTS, FAMILIES, Model, open_model
from weights.networks import KINDS, Part, build, stem
from weights.resolve import resolve

# what config.json needs for other readers, where a single file had none
CONFIG_EXTRAS: dict[str, dict[str, Any]] = {
    "mmdit": {"_class_name": "SD3Transformer2DModel"},
    "nextdit": {"_class_name": "LuminaNextDiT2DModel"},
    "vae": {"_class_name": "AutoencoderKL"},
    "clip": {"architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model"},
    "t5": {"architectures": ["T5EncoderModel"], "model_type": "t5", "tie_word_embeddings": False},
}
CLASSES = {  # of a component in model_index.json, where no config tells
    "tokenizer": "CLIPTokenizer",
    "tokenizer_2": "CLIPTokenizer",
    "tokenizer_3": "T5TokenizerFast",
    "scheduler": "FlowMatchEulerDiscreteScheduler",
    "transformer": "SD3Transformer2DModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModelWithProjection",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "text_encoder_3": "T5EncoderModel",
}
LUMINA_CLASSES = CLASSES | {
    "tokenizer": "GemmaTokenizerFast",
    "transformer": "LuminaNextDiT2DModel",
    "text_encoder": "GemmaModel",
}


def convert(
    source: str | PathLike[str],
    out: str | PathLike[str],
    use_t5: bool = True,
    extra: Sequence[str | PathLike[str]] = (),
    report: Callable[[str], None] = lambda line: None,
) -> Model:
    """Write a model as the folder `out` in the diffusers layout; returns what was read.

    What the source lacks (a single file has no tokenizers) is left out and listed in the model's
    `missing`. `out` appears when all of it is written; what stops the writing leaves nothing.
    Raises FileExistsError if `out` is there, ValueError or FileNotFoundError for the source.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} is there already: name a folder that is not")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {out.absolute().parent} to write into")
    names = [name for name in COMPONENTS if use_t5 or name != "text_encoder_3"]
    model = open_model(resolve(source, names), use_t5, [resolve(place, names) for place in extra])
    parts = {name: part for name, part in model.parts.items() if name not in model.missing}
    if not parts:
        raise FileNotFoundError(f"{model.where} has no weights to convert")
    plans = {name: _plan(part) for name, part in parts.items()}  # checks all before writing any
    partial = out.absolute().with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        for name, part in parts.items():
            report(f"writing {name}")
            (partial / name).mkdir()
            write_json(partial / name / "config.json", _config(part))
            write_tensors(partial / name / f"{stem(name)}.safetensors", plans[name], part.stored)
        for name, folder in model.tokenizers.items():
            (partial / name).mkdir()
            for file in folder.iterdir():
                if file.is_file():
                    shutil.copyfile(file, partial / name / file.name)
        if model.scheduler is not None:
            (partial / "scheduler").mkdir()
            values = {"_class_name": CLASSES["scheduler"], **asdict(model.scheduler)}
            write_json(partial / "scheduler" / "scheduler_config.json", values)
        if model.family is not None:
            write_json(partial / "model_index.json", _index(model))
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return model


Plan = list[tuple[Recipe, Recipe, tuple[int, ...]]]  # read, write, shape of one of our tensors


def _plan(part: Part) -> Plan:
    """How to take every tensor of ours from a part and where to put it in the diffusers layout."""
    if part.kind == "nextdit" and part.layout == "diffusers":
        part = part._replace(config=replace(part.config, shared_query=False))
    module, read = build(part)
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    write = recipes(KINDS[part.kind].tables["diffusers"](part.config, None), shapes)
    return [(read[name], write[name], shape) for name, shape in shapes.items()]


def write_tensors(path: Path, plan: Plan, stored: Tensors) -> None:
    """A .safetensors file, header first, then one tensor of ours after the other."""
    fallback = next(iter(stored.values())).dtype  # for what is in no file: CLIP's identity
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    types = []
    end = 0
    for read, write, _ in plan:
        found = {stored[name].dtype for name in read.names} or {fallback}
        dtype = found.pop() if len(found) == 1 else torch.float32
        if not read.pieces and dtype.itemsize == 1:
            dtype = torch.float16  # torch.eye knows no eight-bit floats
        types.append(dtype)
        size = math.prod(write.shape) * dtype.itemsize
        for name in write.names:
            tag = next(tag for tag, known in DTYPES.items() if known == dtype)
            header[name] = {
                "dtype": tag,
                "shape": list(write.shape),
                "data_offsets": [end, end + size],
            }
            end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for data in _data(plan, types, stored):
            file.write(data)


def _data(plan: Plan, types: list[torch.dtype], stored: Tensors) -> Iterator[memoryview]:
    """The bytes of all written tensors, in the header's order."""
    for (read, write, shape), dtype in zip(plan, types, strict=True):
        value = torch.empty(shape, dtype=dtype)
        read_into(value, read, stored)
        written = write_out(value, write)
        for name in write.names:
            yield _bytes(written[name])


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def write_json(path: Path, values: dict[str, Any]) -> None:
    """A config as the official repositories format it."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _config(part: Part) -> dict[str, Any]:
    """config.json of a part: the one it had, or one made from its sizes."""
    values = dict(part.given) or {**CONFIG_EXTRAS[part.kind], **asdict(part.config)}
    values.pop("shared_query", None)  # ours, not the file format's
    if part.layout == "unprojected":
        values |= {"architectures": ["CLIPTextModelWithProjection"]}
        values |= {"projection_dim": part.config.projection_dim}
    return values


def _index(model: Model) -> dict[str, Any]:
    """model_index.json; it also lists what is needed and missing, so that loading can say so."""
    family = FAMILIES[str(model.family)]
    classes = LUMINA_CLASSES if model.family == "lumina" else CLASSES
    listed = {*family.needs, "scheduler", *model.parts, *model.tokenizers, *model.missing}
    optional = [] if model.family == "lumina" else ["text_encoder_3", "tokenizer_3"]
    values: dict[str, Any] = {"_class_name": family.pipeline}
    for name in (*family.needs, "scheduler", *optional):
        own = name in ("transformer", "vae", "scheduler")
        library = "diffusers" if own else "transformers"
        values[name] = [library, classes[name]] if name in listed else [None, None]
    return values
