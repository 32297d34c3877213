"""Parts of a model, loaded strictly: every tensor of a file has its place, every place its tensor.

Names and shapes are checked against the headers before any data is read. A module is built without
memory, then filled from the files a few megabytes at a time, converting on the way, so that loading
needs the module's own size and little more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minidit.scheduler import SchedulerConfig
from minidit.tokenizers import CLIPTokenizer, GemmaTokenizer, T5Tokenizer
from weights.files import row_chunks
from weights.keymap import read_into, same_values
from weights.model import (
    COMPONENTS,
    TOKENIZER_FILES,
    find_tokenizer,
    open_model,
    read_scheduler,
    require,
)
from weights.networks import ROLES, Part, build, config_from_json, read_part
from weights.resolve import resolve

__all__ = ["COMPONENTS", "config_from_json", "load_component", "load_module", "load_parts"]


def load_parts(
    path: str | PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    use_t5: bool = True,
    extra: Sequence[str | PathLike[str]] = (),
) -> tuple[str, dict[str, Any]]:
    """A whole model: its family, "sd3" or "lumina", and its components by name.

    path    folder, single file or hub id; see `weights.resolve`
    device  "meta" checks every name and shape of the files and reads no data
    use_t5  False leaves SD3's third text encoder out; then it is None, as where there is none
    extra   files or folders with what is missing, where it is not beside a single file
    Raises ValueError or FileNotFoundError, before any data is read if a file is missing or unsound.
    """
    device, dtype = check_target(device, dtype)
    names = [name for name in COMPONENTS if use_t5 or name != "text_encoder_3"]
    model = open_model(resolve(path, names), use_t5, [resolve(place, names) for place in extra])
    require(model)
    for part in model.parts.values():
        build(part)
    loaded: dict[str, Any] = {"scheduler": model.scheduler}
    for name, folder in model.tokenizers.items():
        loaded[name] = load_tokenizer(folder)
    for name, part in model.parts.items():
        loaded[name] = load_module(part, device, dtype)
    if model.family == "sd3":
        loaded = {"text_encoder_3": None, "tokenizer_3": None, **loaded}
    return str(model.family), loaded


def load_component(
    path: str | PathLike[str],
    name: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Any:
    """One part of a model: a module in eval mode, a tokenizer or the scheduler's config.

    path    as for `load_parts`; a folder may also hold just the one component's subfolder
    name    one of COMPONENTS
    dtype   what the weights are converted to, whatever floating type they are stored in
    Raises KeyError for another name, FileNotFoundError for missing files, ValueError for the rest.
    """
    if name not in COMPONENTS:
        raise KeyError(f"there is no component {name!r}, there are {', '.join(COMPONENTS)}")
    device, dtype = check_target(device, dtype)
    local = resolve(path, [name])
    folder = local / name
    if local.is_dir() and folder.is_dir():
        if name == "scheduler":
            return read_scheduler(folder, SchedulerConfig())
        if name in ROLES:
            return load_module(read_part(folder, name), device, dtype)
        return load_tokenizer(find_tokenizer(folder, name))
    model = open_model(local)
    if name in model.parts:
        return load_module(model.parts[name], device, dtype)
    if name in model.tokenizers:
        return load_tokenizer(model.tokenizers[name])
    if name == "scheduler" and model.scheduler:
        return model.scheduler
    raise FileNotFoundError(model.missing.get(name) or f"there is no {name} in {local}")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder: its files tell which."""
    classes: tuple[Any, ...] = (CLIPTokenizer, T5Tokenizer, GemmaTokenizer)
    kinds = zip(TOKENIZER_FILES, classes, strict=True)
    return next(kind for file, kind in kinds if (folder / file).is_file()).from_folder(folder)


def load_module(
    part: Part, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The network of a part on a device, in eval mode and without gradients.

    Raises ValueError if the files do not fit the network exactly, before any data is read.
    """
    device, dtype = check_target(device, dtype)
    if part.kind == "nextdit" and part.layout == "diffusers":
        part = _share_query(part, read=device.type != "meta")
    module, plan = build(part)
    module.to(dtype)
    if device.type == "meta":
        return module
    try:
        module.to_empty(device=device)
    except (RuntimeError, MemoryError) as error:
        size = sum(math.prod(t.shape) for t in module.state_dict().values()) * dtype.itemsize
        raise MemoryError(
            f"{part.where} needs {size / 1e9:.1f} GB on {device} in {dtype}, which could not be "
            f"had: try a smaller dtype, or keep parts off the device with offload ({error})"
        ) from None
    for name, tensor in module.state_dict().items():
        read_into(tensor, plan[name], part.stored)
    return module


def _share_query(part: Part, read: bool) -> Part:
    """Keep one query a layer where both stored ones are the same, as in the official files.

    Without reading data that cannot be known, and both are kept.
    """
    apart = part._replace(config=replace(part.config, shared_query=False))
    if not read:
        return apart
    build(apart)  # so that every pair is known to be there, with the same shape
    for name, first in part.stored.items():
        if ".attn1.to_q." not in name and ".attn1.norm_q." not in name:
            continue
        second = part.stored[name.replace(".attn1.", ".attn2.")]
        for start, stop in row_chunks(first, 0, first.shape[0]):
            if not same_values(first, second, start, stop):
                return apart
    return part._replace(config=replace(part.config, shared_query=True))


def check_target(
    device: str | torch.device, dtype: torch.dtype
) -> tuple[torch.device, torch.dtype]:
    """device and dtype as torch objects; ValueError for what cannot hold a model."""
    allowed = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if dtype not in allowed:
        raise ValueError(f"dtype is {dtype!r}, must be one of {', '.join(map(str, allowed))}")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or ["unknown"])[0]
        raise ValueError(f"device {str(device)!r} is not available here: {reason}") from None
    return device, dtype
