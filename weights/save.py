"""Models written as folders in the diffusers layout: what is in memory, or what is in other files.

From files it goes tensor by tensor, in the type it is stored in, so that a model larger than the
memory can be converted, and what is loaded from either is the same to the bit.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minidit.scheduler import SchedulerConfig
from weights.files import DTYPES, weights_name
from weights.keymap import Family, Recipe, write_out
from weights.networks import (
    CLASSES,
    FAMILIES,
    NETWORKS,
    Model,
    Part,
    build,
    family_of,
    plan_of,
    read_into,
)

TAGS = {dtype: tag for tag, dtype in DTYPES.items()}


class Output(NamedTuple):
    """A network to write: config.json, and for every tensor of ours what to make of it."""

    config: dict[str, Any]
    plan: Mapping[str, Recipe]
    dtypes: Mapping[str, torch.dtype]
    read: Callable[[str], Tensor]  # name of ours -> the tensor, in its dtype, on the CPU


def save(pipe: Any, folder: str | PathLike[str], dtype: torch.dtype | None = None) -> None:
    """Write a pipeline as a folder in the official (diffusers) layout, which `load` reads again.

    dtype   what networks are written in; None keeps the types that they have
    Tokenizers are copied from the folders that they were read from. The folder appears when all of
    it is written; what stops the writing leaves nothing.
    Raises FileExistsError if the folder is there, ValueError for a pipeline that cannot be written.
    """
    kind = kind_of(getattr(pipe, "transformer", None))
    family = FAMILIES[family_of(kind) or ""]
    outputs, tokenizers = {}, {}
    for name, cls in family.components.items():
        part = getattr(pipe, name, None)
        if part is None:
            if name not in family.optional:
                raise ValueError(f"the pipeline has no {name}, which {family.title} needs")
        elif isinstance(part, nn.Module):
            outputs[name] = from_module(part, cls, dtype)
        elif part.folder is None or not part.folder.is_dir():
            raise ValueError(f"the files of {name} are not there: its folder is {part.folder}")
        else:
            tokenizers[name] = part.folder
    with new_folder(folder) as partial:
        _write(partial, family, outputs, tokenizers, pipe.scheduler, {*outputs, *tokenizers})


def convert(
    model: Model, out: str | PathLike[str], report: Callable[[str], None] = lambda line: None
) -> None:
    """Write a model in any layout as the folder `out` in the diffusers layout.

    What the model lacks (a single file has no tokenizers) is left out. `out` appears when all of it
    is written; what stops the writing leaves nothing.
    Raises FileExistsError if `out` is there, ValueError or FileNotFoundError for the model.
    """
    family = FAMILIES.get(model.family or "")
    outputs = {
        name: from_part(part, family.components[name] if family else None)
        for name, part in model.parts.items()
        if name not in model.missing
    }
    if not outputs:
        raise FileNotFoundError(f"{model.where} has no weights to convert")
    with new_folder(out) as partial:
        # what is needed and missing is listed, too, so that loading can say so
        needed = {*outputs, *model.tokenizers, *model.missing}
        _write(partial, family, outputs, model.tokenizers, model.scheduler, needed, report)


@contextmanager
def new_folder(out: str | PathLike[str]) -> Iterator[Path]:
    """A folder to write in, which gets its name at the end, and goes where there is an error."""
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} is there already: name a folder that is not")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {out.absolute().parent} to write into")
    partial = out.absolute().with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        yield partial
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write(
    folder: Path,
    family: Family | None,
    outputs: Mapping[str, Output],
    tokenizers: Mapping[str, Path],
    scheduler: SchedulerConfig | None,
    listed: set[str],
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Everything of a model; listed are the components that model_index.json names."""
    for name, output in outputs.items():
        report(f"writing {name}")
        write_network(output, folder / name, weights_name(name))
    for name, source in tokenizers.items():
        (folder / name).mkdir()
        for file in source.iterdir():
            if file.is_file():
                shutil.copyfile(file, folder / name / file.name)
    if scheduler is not None:
        (folder / "scheduler").mkdir()
        values = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
        write_json(folder / "scheduler" / "scheduler_config.json", values | asdict(scheduler))
    if family is not None:
        index: dict[str, Any] = {"_class_name": family.pipeline}
        for name, cls in family.components.items():
            library = "diffusers" if name in ("transformer", "vae") else "transformers"
            there = name in listed or name not in family.optional
            index[name] = [library, cls] if there else [None, None]
        index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
        write_json(folder / "model_index.json", index)


def kind_of(module: Any) -> str:
    """The key in NETWORKS of a module; ValueError for others."""
    kinds = [kind for kind, network in NETWORKS.items() if type(module) is network.module]
    if not kinds:
        raise ValueError(f"a {type(module).__name__} is none of the networks known here")
    return kinds[0] if len(kinds) == 1 else module.config.model_type  # Gemma and Gemma 2


def from_module(
    module: nn.Module, cls: str | None = None, dtype: torch.dtype | None = None
) -> Output:
    """A network in memory, to be written as a class of the official libraries in a dtype."""
    kind = kind_of(module)
    cls = cls or next(iter(NETWORKS[kind].classes))
    state = module.state_dict()
    if any(tensor.is_meta for tensor in state.values()):
        raise ValueError(f"the {type(module).__name__} is on the meta device: it has no data")
    return Output(
        _config(kind, module.config, cls, {}),
        plan_of(kind, CLASSES[cls][1], module),
        {name: dtype or tensor.dtype for name, tensor in state.items()},
        lambda name: state[name].to("cpu", dtype),
    )


def from_part(part: Part, cls: str | None = None) -> Output:
    """A network in files, to be written as a class of the official libraries."""
    cls = cls or next(iter(NETWORKS[part.kind].classes))
    module, plan = build(part, compare=True)
    fallback = next(iter(part.stored.values())).dtype  # for what is in no file: CLIP's identity
    dtypes = {}
    for name, recipe in plan.items():
        found = {part.stored[theirs].dtype for theirs in recipe.names} or {fallback}
        dtypes[name] = found.pop() if len(found) == 1 else torch.float32
        if not recipe.pieces and dtypes[name].itemsize == 1:
            dtypes[name] = torch.float16  # torch.eye knows no eight-bit floats
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}

    def read(name: str) -> Tensor:
        value = torch.empty(shapes[name], dtype=dtypes[name])
        read_into(value, plan[name], part.stored)
        return value

    config = _config(part.kind, module.config, cls, part.given)
    return Output(config, plan_of(part.kind, CLASSES[cls][1], module), dtypes, read)


def write_network(output: Output, folder: Path, name: str) -> None:
    """A component folder: config.json, and a .safetensors file, header first, then one tensor of
    ours after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", output.config)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for ours, recipe in output.plan.items():
        dtype = output.dtypes[ours]
        size = math.prod(recipe.shape) * dtype.itemsize
        for theirs in recipe.names:
            place = {"shape": list(recipe.shape), "data_offsets": [end, end + size]}
            header[theirs] = {"dtype": TAGS[dtype], **place}
            end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    with open(folder / f"{name}.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for ours, recipe in output.plan.items():
            written = write_out(output.read(ours), recipe)
            for theirs in recipe.names:
                data = written[theirs].contiguous().flatten()
                file.write(data.view(torch.uint8).numpy().data)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """A config as the official repositories format it."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _config(kind: str, config: Any, cls: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """config.json: the one that there was, or one made from the sizes."""
    extras = NETWORKS[kind].extras
    values = dict(given)
    if not given:
        values = {**asdict(config), **extras}
        if kind == "vae":
            levels = len(config.block_out_channels)
            values["down_block_types"] = ["DownEncoderBlock2D"] * levels
            values["up_block_types"] = ["UpDecoderBlock2D"] * levels
    values.pop("two_queries", None)  # the tensors tell
    if kind == "clip":
        values["projection_dim"] = config.projection_dim
    named = {"architectures": [cls]} if "model_type" in extras else {"_class_name": cls}
    return values | named
