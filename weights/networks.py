"""Which networks there are, and what a part of a model is before any of its data is read."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import nn

from minidit.clip import CLIPConfig, CLIPTextEncoder
from minidit.gemma import GemmaConfig, GemmaEncoder
from minidit.mmdit import MMDiT, MMDiTConfig
from minidit.nextdit import NextDiT, NextDiTConfig
from minidit.t5 import T5Config, T5Encoder
from minidit.vae import AutoencoderKL, VAEConfig
from weights import lumina, sd3
from weights.files import Tensors, find_tensors, read_json
from weights.keymap import Recipe, Table, check, recipes


class Kind(NamedTuple):
    """A network: its classes, its key map in every layout, names that files hold for nothing."""

    network: type[nn.Module]
    config: type
    tables: Mapping[str, Callable[[Any, Tensors | None], Table]]
    unused: tuple[str, ...] = ()


KINDS = {
    "mmdit": Kind(
        MMDiT, MMDiTConfig, {"diffusers": sd3.mmdit_diffusers, "original": sd3.mmdit_original}
    ),
    "nextdit": Kind(
        NextDiT,
        NextDiTConfig,
        {"diffusers": lumina.nextdit_diffusers, "original": lumina.nextdit_original},
    ),
    "vae": Kind(
        AutoencoderKL, VAEConfig, {"diffusers": sd3.vae_diffusers, "original": sd3.vae_original}
    ),
    "clip": Kind(
        CLIPTextEncoder,
        CLIPConfig,
        {"diffusers": sd3.clip, "unprojected": sd3.clip_unprojected},
        unused=("text_model.embeddings.position_ids",),
    ),
    "t5": Kind(T5Encoder, T5Config, {"diffusers": sd3.t5}),
    "gemma": Kind(
        GemmaEncoder,
        GemmaConfig,
        {"diffusers": lumina.gemma},
        unused=("lm_head.weight",),  # the embedding once more
    ),
}
# what config.json says a folder holds -> which network, in which layout
CLASSES = {
    "SD3Transformer2DModel": ("mmdit", "diffusers"),
    "LuminaNextDiT2DModel": ("nextdit", "diffusers"),
    "AutoencoderKL": ("vae", "diffusers"),
    "CLIPTextModelWithProjection": ("clip", "diffusers"),
    "CLIPTextModel": ("clip", "unprojected"),
    "clip_text_model": ("clip", "diffusers"),
    "T5EncoderModel": ("t5", "diffusers"),
    "t5": ("t5", "diffusers"),
    "GemmaModel": ("gemma", "diffusers"),
    "GemmaForCausalLM": ("gemma", "diffusers"),
    "gemma": ("gemma", "diffusers"),
}
ROLES = {  # component -> the networks that can fill it
    "transformer": ("mmdit", "nextdit"),
    "vae": ("vae",),
    "text_encoder": ("clip", "gemma"),
    "text_encoder_2": ("clip",),
    "text_encoder_3": ("t5",),
}


class Part(NamedTuple):
    """A network in files: which, how its tensors are named, its config, its tensors' headers."""

    kind: str
    layout: str
    config: Any
    stored: Tensors
    where: str  # for messages
    given: Mapping[str, Any] = {}  # config.json as it is, where there is one


def stem(name: str) -> str:
    """What the weight files of a component folder are called."""
    return "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"


def read_part(folder: Path, name: str) -> Part:
    """A component folder of the diffusers layout: its config.json and the headers of its files.

    Raises FileNotFoundError or ValueError.
    """
    return read_config(folder, name)._replace(stored=find_tensors(folder, stem(name)))


def read_config(folder: Path, name: str) -> Part:
    """The same without its files: what config.json says."""
    path = folder / "config.json"
    values = read_json(path)
    architectures = values.get("architectures")
    names = [*architectures] if isinstance(architectures, list) else []
    names = [values.get("_class_name"), *names, values.get("model_type")]
    known = next((CLASSES[n] for n in names if isinstance(n, str) and n in CLASSES), None)
    if known is None or known[0] not in ROLES[name]:
        said = next((n for n in names if n is not None), None)
        allowed = [n for n, (kind, _) in CLASSES.items() if kind in ROLES[name]]
        raise ValueError(f"{path} is for {_show(said)}, must be for one of {', '.join(allowed)}")
    kind, layout = known
    config: Any = config_from_json(KINDS[kind].config, path)
    if layout == "unprojected":
        config = replace(config, projection_dim=config.hidden_size)
    return Part(kind, layout, config, {}, str(folder), values)


def build(part: Part) -> tuple[nn.Module, dict[str, Recipe]]:
    """The network on the meta device, and what to read into it: checked against the headers.

    Raises ValueError if the files do not fit the network exactly.
    """
    kind = KINDS[part.kind]
    _check_depth(part)
    try:
        with torch.device("meta"):
            module = kind.network(part.config).eval().requires_grad_(False)
    except (RuntimeError, TypeError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{part.where}: its sizes make no {kind.network.__name__}: {reason}"
        ) from None
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    plan = recipes(kind.tables[part.layout](part.config, part.stored), shapes)
    check(plan, part.stored, kind.unused, f"{part.where} does not fit {kind.network.__name__}")
    return module, plan


def _check_depth(part: Part) -> None:
    """Refuse a config with more layers than the files have tensors, before they are all built."""
    depth = 1
    for field in fields(part.config):
        value = getattr(part.config, field.name)
        if "layers" in field.name and isinstance(value, int):
            depth *= value
        elif field.name == "block_out_channels":
            depth *= len(value)
    if depth > len(part.stored):
        raise ValueError(
            f"{part.where}: the config makes {depth} layers, but the files have only "
            f"{len(part.stored)} tensors"
        )


C = TypeVar("C")


def config_from_json(cls: type[C], path: str | Path) -> C:
    """A config dataclass from a JSON file; keys without a field are ignored.

    Raises FileNotFoundError, or ValueError with the key and its value where a type does not fit.
    """
    path = Path(path)
    values = read_json(path)
    hints = get_type_hints(cls)
    found = {}
    for field in fields(cls):  # type: ignore[arg-type]
        if field.name in values:
            value, hint = values[field.name], hints[field.name]
            if not _fits(value, hint):
                raise ValueError(f"{path}: {field.name} is {_show(value)}, must be {_say(hint)}")
            found[field.name] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value can be what an annotation asks for."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if origin is tuple:
        return isinstance(value, list) and all(_fits(v, get_args(hint)[0]) for v in value)
    if origin is not None:  # Mapping[str, Any]
        return isinstance(value, dict)
    if hint is type(None):
        return value is None
    if hint is int:
        return type(value) is int and abs(value) < 2**31
    if hint is float:
        return type(value) in (int, float) and abs(value) < 1e30  # not infinite, not NaN
    return type(value) is hint


def _say(hint: Any) -> str:
    """An annotation in words."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_say(option) for option in get_args(hint))
    if origin is tuple:
        return f"a list, each {_say(get_args(hint)[0])}"
    if origin is not None:
        return "an object"
    words = {int: "an integer below 2**31", float: "a finite number", bool: "true or false"}
    return words.get(hint) or {str: "a string", type(None): "null"}[hint]


def _show(value: Any) -> str:
    """A JSON value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
