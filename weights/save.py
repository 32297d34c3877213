"""Models written as folders in the diffusers layout: what is in memory, or what is in other files.

Files are converted a tensor at a time, in the type they are stored in, so that what is loaded from
either is the same to the bit. Large components become shards with an index.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minidit.scheduler import SchedulerConfig
from weights.files import SCHEDULER, Tensors, weights_name
from weights.keymap import Family, Recipe, write_out
from weights.networks import CLASSES, NETWORKS, Model, build, family_of, plan_of, read_into

MAX_SHARD = 5 * 10**9  # bytes of a file, as of the official libraries' files


def save(pipe: Any, folder: str | PathLike[str], dtype: torch.dtype | None = None) -> None:
    """Write a pipeline as a folder in the official (diffusers) layout, which `load` reads again.

    dtype   what networks are written in; None keeps the types that they have
    Tokenizers are copied from the folders that they were read from. The folder appears when all of
    it is written; what stops the writing leaves nothing.
    Raises FileExistsError if the folder is there, ValueError for a pipeline that cannot be written.
    """
    kind = kind_of(getattr(pipe, "transformer", None))
    family = family_of(kind)
    if family is None:
        raise ValueError(f"the pipeline's transformer is a {kind}, which is none")
    networks, tokenizers = {}, {}
    for name in family.components:
        part = getattr(pipe, name, None)
        if part is None:
            if name not in family.optional:
                raise ValueError(f"the pipeline has no {name}, which {family.title} needs")
        elif isinstance(part, nn.Module):
            if any(tensor.is_meta for tensor in part.state_dict().values()):
                raise ValueError(f"the {name} is on the meta device: it has no data")
            networks[name] = partial(write_network, part, dtype=dtype, cls=family.components[name])
        elif part.folder is None or not part.folder.is_dir():
            raise ValueError(f"the files of {name} are not there: its folder is {part.folder}")
        else:
            tokenizers[name] = part.folder
    _write_folder(Path(folder), family, networks, tokenizers, pipe.scheduler)


def convert(
    model: Model, out: str | PathLike[str], report: Callable[[str], None] = lambda line: None
) -> None:
    """Write a model in any layout as the folder `out` in the diffusers layout.

    What the model lacks (a single file has no tokenizers) is left out. `out` appears when all of it
    is written; what stops the writing leaves nothing. It takes the memory of one shard.
    Raises FileExistsError if `out` is there, ValueError or FileNotFoundError for the model.
    """
    family = model.family
    parts = {name: part for name, part in model.parts.items() if name not in model.missing}
    if not parts:
        raise FileNotFoundError(f"{model.where} has no weights to convert")
    networks = {}
    for name, part in parts.items():
        module, plan = build(part, compare=True)
        networks[name] = partial(
            write_network,
            module,
            cls=family.components[name] if family else None,
            given=part.given,
            read=_reader(module, plan, part.stored),
        )
    tokenizers, missing = model.tokenizers, model.missing
    _write_folder(Path(out), family, networks, tokenizers, model.scheduler, missing, report)


def _write_folder(
    out: Path,
    family: Family | None,
    networks: Mapping[str, Callable[[Path], None]],
    tokenizers: Mapping[str, Path],
    scheduler: SchedulerConfig | None,
    missing: Collection[str] = (),
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """A whole folder, under its name when all of it is written.

    networks    component -> what writes it into a folder
    tokenizers  component -> a folder of files to copy
    missing     components that model_index.json names, too, so that loading can say so
    """
    if out.exists():
        raise FileExistsError(f"{out} is there already: name a folder that is not")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {out.absolute().parent} to write into")
    folder = out.absolute().with_name(f".{out.name}.{os.getpid()}.partial")
    folder.mkdir()
    try:
        for name, write in networks.items():
            report(f"writing {name}")
            write(folder / name)
        for name, source in tokenizers.items():
            (folder / name).mkdir()
            for file in source.iterdir():
                if file.is_file():
                    shutil.copyfile(file, folder / name / file.name)
        if scheduler is not None:
            values = {"_class_name": SCHEDULER, "num_train_timesteps": 1000} | asdict(scheduler)
            write_json(folder / "scheduler" / "scheduler_config.json", values)
        if family is not None:
            index: dict[str, Any] = {"_class_name": family.pipeline}
            for name, cls in family.components.items():
                library = "diffusers" if name in ("transformer", "vae") else "transformers"
                there = name in {*networks, *tokenizers, *missing} or name not in family.optional
                index[name] = [library, cls] if there else [None, None]
            index["scheduler"] = ["diffusers", SCHEDULER]
            write_json(folder / "model_index.json", index)
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _reader(
    module: nn.Module, plan: Mapping[str, Recipe], stored: Tensors
) -> Callable[[str], Tensor]:
    """A function that reads a tensor of a module on the meta device by its name."""
    state = module.state_dict()
    return lambda name: read_into(torch.empty_like(state[name], device="cpu"), plan[name], stored)


def write_network(
    module: nn.Module,
    folder: Path,
    dtype: torch.dtype | None = None,
    cls: str | None = None,
    given: Mapping[str, Any] = {},
    read: Callable[[str], Tensor] | None = None,
) -> None:
    """One component's folder: config.json, and a .safetensors file with the official names, or
    shards of at most MAX_SHARD bytes and their index.

    dtype   None keeps the types that the tensors have
    cls     the class of the official libraries that will read it, where there are several
    given   config.json as it was, where there was one
    read    gives a tensor by its name, where the module is on the meta device
    """
    kind, state = kind_of(module), module.state_dict()
    cls = cls or NETWORKS[kind].classes[0]
    read = read or (lambda name: state[name].to("cpu", dtype))
    write_json(folder / "config.json", _config(kind, module.config, cls, given))
    plan = plan_of(kind, CLASSES[cls][1], module)
    sizes = {
        name: len(recipe.names) * math.prod(recipe.shape) * (dtype or state[name].dtype).itemsize
        for name, recipe in plan.items()
    }
    shards, stem = split(sizes), weights_name(folder.name)
    where: dict[str, str] = {}
    for i, names in enumerate(shards, start=1):
        number = f"-{i:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        tensors: dict[str, Tensor] = {}  # the shard before goes
        for name in names:
            tensors |= write_out(read(name), plan[name])
        save_file(tensors, folder / f"{stem}{number}.safetensors", {"format": "pt"})
        where |= dict.fromkeys(tensors, f"{stem}{number}.safetensors")
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        write_json(folder / f"{stem}.safetensors.index.json", index)


def split(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names in groups of at most MAX_SHARD bytes, in their order; what is larger stands alone."""
    groups: list[list[str]] = [[]]
    room = MAX_SHARD
    for name, size in sizes.items():
        if size > room and groups[-1]:
            groups.append([])
            room = MAX_SHARD
        groups[-1].append(name)
        room -= size
    return groups


def kind_of(module: Any) -> str:
    """The key in NETWORKS of a module; ValueError for others."""
    kinds = [kind for kind, network in NETWORKS.items() if type(module) is network.module]
    if not kinds:
        raise ValueError(f"a {type(module).__name__} is none of the networks known here")
    return kinds[0] if len(kinds) == 1 else module.config.model_type  # Gemma and Gemma 2


def write_json(path: Path, values: dict[str, Any]) -> None:
    """A config as the official repositories format it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _config(kind: str, config: Any, cls: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """config.json: the one that there was, or one made from the sizes."""
    extras = NETWORKS[kind].extras
    values = dict(given) or {**asdict(config), **extras}
    if kind == "vae" and not given:
        levels = len(config.block_out_channels)
        values["down_block_types"] = ["DownEncoderBlock2D"] * levels
        values["up_block_types"] = ["UpDecoderBlock2D"] * levels
    values.pop("two_queries", None)  # the tensors tell
    if kind == "clip":
        values["projection_dim"] = config.projection_dim
    named = {"architectures": [cls]} if "model_type" in extras else {"_class_name": cls}
    return values | named
