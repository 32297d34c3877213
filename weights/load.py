"""Models found in folders and files, and loaded strictly: every tensor of a file has its place, and
every place its tensor.

Two layouts are published: a folder with one subfolder per component (the diffusers layout), and
single files in their authors' own names, with encoders and tokenizers beside them. What is there is
found from names and headers, and all of it is checked before any data is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from minidit import checks
from minidit.checks import short
from minidit.scheduler import SchedulerConfig
from weights import lumina, sd3
from weights.common import is_clip_l
from weights.files import (
    COMPONENTS,
    FOREIGN,
    SCHEDULER,
    find_tensors,
    plain,
    read_header,
    read_json,
    read_torch,
    weights_name,
)
from weights.keymap import Family
from weights.networks import (
    CLASSES,
    FAMILIES,
    Model,
    Part,
    build,
    config_from,
    family_of,
    fill,
    kind_in,
    read_config,
    sized_part,
)
from weights.resolve import resolve
from weights.tokenizers import FILES, check_fits, main_file, read_tokenizer

Place = str | PathLike[str]
PREFIXES = (  # of the components in one file
    "model.diffusion_model.",
    "first_stage_model.",
    "text_encoders.clip_l.transformer.",
    "text_encoders.clip_g.transformer.",
    "text_encoders.t5xxl.transformer.",
)
OURS = ("default_", "corrected_", "spacing")  # fields of SchedulerConfig that only we write
FIXED = {  # options of the scheduler that are not for choosing here; False is off
    "num_train_timesteps": 1000,
    "time_shift_type": "exponential",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "shift_terminal": False,
}


def load_parts(
    path: Place,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    use_t5: bool = True,
    extra: Sequence[Place] = (),
) -> tuple[str, dict[str, Any]]:
    """A whole model: the name of its family, and its components by name.

    path    folder, single file or hub id; see `weights.resolve`
    device  "meta" checks every name and shape of the files and reads no data
    use_t5  False leaves SD3's third text encoder out; then it is None, as where there is none
    extra   files or folders with what is missing, where it is not beside a single file
    Raises ValueError or FileNotFoundError, before any data is read if a file is missing or unsound.
    """
    device, dtype = check_target(device, dtype)
    model = open_model(path, use_t5, extra)
    family = require(model)
    built = {name: build(part, device.type != "meta") for name, part in model.parts.items()}
    loaded: dict[str, Any] = dict.fromkeys(family.optional)
    loaded["scheduler"] = model.scheduler
    for name, folder in model.tokenizers.items():
        loaded[name] = read_tokenizer(folder)
        if encoder := model.parts.get(name.replace("tokenizer", "text_encoder")):
            check_fits(loaded[name], encoder.config)
    for name, (module, plan) in built.items():
        loaded[name] = fill(module, plan, model.parts[name], device, dtype)
    return family.name, loaded


def load_component(
    path: Place,
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
    if not isinstance(name, str) or name not in COMPONENTS:
        raise KeyError(f"there is no component {short(name)}, there are {', '.join(COMPONENTS)}")
    device, dtype = check_target(device, dtype)
    local = resolve(path, [name])
    if (local / name).is_dir():
        model, beside = Model(local, ""), local / "transformer"
        if name == "scheduler" and (beside / "config.json").is_file():  # tells the defaults
            model.parts["transformer"] = read_config(beside, "transformer")
        _look_in(local, model, name)
    else:
        model = open_model(local)
    if name in model.missing:
        raise FileNotFoundError(model.missing[name])
    if part := model.parts.get(name):
        return fill(*build(part, device.type != "meta"), part, device, dtype)
    if folder := model.tokenizers.get(name):
        return read_tokenizer(folder)
    if name == "scheduler" and model.scheduler:
        return model.scheduler
    raise FileNotFoundError(f"there is no {name} in {local}")


def check_target(
    device: str | torch.device, dtype: torch.dtype
) -> tuple[torch.device, torch.dtype]:
    """device and dtype as torch objects; ValueError for what cannot hold a model."""
    allowed = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if not isinstance(dtype, torch.dtype) or dtype not in allowed:
        raise ValueError(f"dtype is {short(dtype)}, must be one of {', '.join(map(str, allowed))}")
    return checks.device(device), dtype


def open_model(
    path: Place, use_t5: bool = True, extra: Sequence[Place] = (), weights: bool = True
) -> Model:
    """Find the parts of a model at a path or a hub id, from names and headers alone.

    use_t5   False leaves T5's weights out of SD3
    extra    more files or folders to look in for what is not beside the model
    weights  False leaves them on the hub
    Raises FileNotFoundError or ValueError if there is nothing that can be understood; what is only
    missing is listed in the model.
    """
    if not isinstance(extra, list | tuple):
        raise ValueError(f"extra is {short(extra)}, must be a list of files or folders")
    names = [name for name in COMPONENTS if use_t5 or name != "text_encoder_3"]
    path, *others = (resolve(place, names, weights) for place in (path, *extra))
    if not path.is_file() and not path.is_dir():
        raise ValueError(f"{path} is neither a file nor a folder")
    file = path if path.is_file() else _one_file(path)
    if file is None and others:
        raise ValueError(f"{path} is in the diffusers layout: {others[0]} cannot be added to it")
    model = Model(file or path, "single file" if file else "folder in the diffusers layout")
    for place in [file, *others]:
        if place is not None and place.is_file():
            _add_file(model, place)
    if not use_t5:
        model.parts.pop("text_encoder_3", None)
    folders = [place for place in others if place.is_dir()] + [file.parent if file else path]
    listed = None if file else _listed(path)
    for name in names:
        if name not in model.parts and (model.family or not file):
            _find(model, name, folders, listed)
    if file and model.family:
        model.missing.pop("scheduler", None)
        model.scheduler = model.scheduler or default_scheduler(model)
    _check_together(model)
    return model


def require(model: Model) -> Family:
    """The family of a whole model; else one FileNotFoundError that lists all that it lacks to run,
    and where to get it."""
    if model.family is None:
        if "transformer" in model.missing:
            raise FileNotFoundError(model.missing["transformer"])
        have = ", ".join([*model.parts, *model.tokenizers]) or "no component"
        raise FileNotFoundError(f"{model.where} has no transformer, only {have}")
    if not model.missing:
        return model.family
    lacks = "; ".join(f"{name} ({why})" for name, why in model.missing.items())
    message = f"{model.where} cannot run yet, it lacks {lacks}"
    if model.where.is_file():
        what = " ".join(f"'{name}/*'" for name in model.missing)
        message += (
            f"; one way to get them: hf download {model.family.repo} --include {what} "
            f"--exclude '*.fp16*' --local-dir {model.where.parent}"
        )
    raise FileNotFoundError(message)


def _find(model: Model, name: str, folders: list[Path], listed: list[str] | None) -> None:
    """Add a component to a model from the first of the folders that has it, or say it is missing.

    listed are the components that a folder in the diffusers layout should have.
    """
    family = model.family
    known = [*family.components, "scheduler"] if family else COMPONENTS
    try:
        look = name in (known if listed is None else listed)
        if look and any(_look_in(folder, model, name) for folder in folders):
            return
        needed = family is not None and name in known and name not in family.optional
        if name == "tokenizer_3":  # T5 is optional, but not without its tokenizer
            needed = needed or "text_encoder_3" in model.parts
        if needed or name in (listed or ()):
            raise FileNotFoundError(_what_to_add(model, name))
    except FileNotFoundError as error:
        model.missing[name] = str(error)


def _listed(folder: Path) -> list[str]:
    """The components that a folder should have: by model_index.json, or else those it has."""
    index = folder / "model_index.json"
    if not index.is_file():
        return [name for name in COMPONENTS if (folder / name).is_dir()]
    values = read_json(index)
    for name in COMPONENTS:
        value = values.get(name)
        if value is not None and not (isinstance(value, list) and len(value) == 2):
            raise ValueError(f"{index}: {name} is {short(value)}, must be a [library, class] pair")
    return [name for name in COMPONENTS if values.get(name) not in (None, [None, None])]


def _one_file(folder: Path) -> Path | None:
    """The model file of a folder, or None if the folder is in the diffusers layout."""
    if (folder / "model_index.json").is_file() or (folder / "transformer").is_dir():
        return None
    for name in lumina.FILES:
        if (folder / name).is_file():
            return folder / name
    names = sorted(p.name for p in folder.iterdir() if p.suffix == ".safetensors")
    if names and (folder / "config.json").is_file():
        raise ValueError(f"{folder} is one component: give the folder that it is in")
    others = {n for family in FAMILIES for files in family.beside.values() for n in files}
    models = [name for name in names if name not in others] or names
    if len(models) > 1:
        raise ValueError(f"{folder} has several models, name one: {', '.join(map(plain, models))}")
    if models:
        return folder / models[0]
    if any((folder / name).is_dir() for name in COMPONENTS):
        return None
    raise FileNotFoundError(
        f"{folder} has no model: neither model_index.json nor component folders nor "
        "a .safetensors file"
    )


def read_parts(path: Path) -> list[Part]:
    """The networks in a file, told by their tensors' names and shapes; ValueError for others."""
    if what := FOREIGN.get(path.suffix):
        raise ValueError(f"{path} is {what}: use the model's .safetensors file instead")
    stored = read_torch(path) if path.suffix in (".pth", ".pt") else read_header(path)
    shares: dict[str, dict[str, Any]] = {}
    for key, tensor in stored.items():
        prefix = next(filter(key.startswith, PREFIXES), "")
        shares.setdefault(prefix, {})[key.removeprefix(prefix)] = tensor
    if not shares.keys() - {""}:
        return [sized_part(stored, str(path))]
    if "" in shares:
        key = plain(next(iter(shares[""])))
        raise ValueError(f"{path} has the tensor {key}, which belongs to no known component")
    return [sized_part(share, f"{path} ({prefix}*)") for prefix, share in shares.items()]


def _add_file(model: Model, path: Path, only: str | None = None) -> None:
    """Add the networks of a file to a model; `only` is the component that it must hold."""
    # the transformer first: what the others are depends on the family
    for part in sorted(read_parts(path), key=lambda part: family_of(part.kind) is None):
        family = model.family or family_of(part.kind) or sd3.FAMILY
        names = [name for name in family.components if kind_in(family, name) == part.kind]
        if len(names) > 1:  # SD3's CLIPs
            names = names[:1] if is_clip_l(part.stored) else names[1:]
        if not names:
            raise ValueError(f"{part.where} is a {part.kind}, which {family.title} has not")
        if only is not None and names != [only]:
            raise ValueError(f"{path} holds {names[0]}, must hold {only}")
        if names[0] in model.parts:
            other = model.parts[names[0]].where
            raise ValueError(f"{names[0]} is in {other} and again in {part.where}")
        model.parts[names[0]] = part


def _look_in(folder: Path, model: Model, name: str) -> bool:
    """Add a component that a folder has to a model; FileNotFoundError if it has a part of it."""
    here, family = folder / name, model.family
    if not here.is_dir():
        for file in family.beside.get(name, ()) if family else ():
            for path in (folder / file, folder / "text_encoders" / file):
                if path.is_file():
                    _add_file(model, path, only=name)
                    return True
        return False
    if name == "scheduler":
        model.scheduler = read_scheduler(here, default_scheduler(model))
    elif name.startswith("tokenizer"):
        main_file(here, family.components.get(name, "") if family else "")
        model.tokenizers[name] = here
    else:
        part = model.parts[name] = read_config(here, name)  # stays where the weights are missing
        model.parts[name] = part._replace(stored=find_tensors(here, weights_name(name)))
    return True


def _what_to_add(model: Model, name: str) -> str:
    """What would bring a component that is missing."""
    family = model.family
    if family is None or not model.where.is_file():
        return f"there is no folder {name} in {model.where}"
    what = f"a folder {name}"
    if name in family.beside:
        what = f"{family.beside[name][0]} or {what}"
    if name.startswith("tokenizer"):
        what += f" with the small files {', '.join(FILES[family.components[name]])}"
    return f"{what} beside {model.where.name}"


def read_scheduler(folder: Path, fallback: SchedulerConfig) -> SchedulerConfig:
    """A scheduler folder's config; what only our files have comes from the fallback otherwise.

    Raises ValueError for another noise schedule than those known here.
    """
    path = folder / "scheduler_config.json"
    values = read_json(path)
    kind = values.get("_class_name", SCHEDULER)
    if kind != SCHEDULER:
        raise ValueError(f"{path} is for {short(kind)}, must be for {SCHEDULER}")
    for option, fixed in FIXED.items():
        value = values.get(option, fixed)
        if value != fixed and (value or fixed):
            allowed = repr(fixed) if fixed else "off"
            raise ValueError(f"{path}: {option} is {short(value)}, must be {allowed}")
    ours = {name: value for name, value in vars(fallback).items() if name.startswith(OURS)}
    return config_from(SchedulerConfig, ours | values, path)


def default_scheduler(model: Model) -> SchedulerConfig:
    """What to sample with where no file says it."""
    if model.family is None:
        return SchedulerConfig()
    where = model.where
    cached = where.parent.name == "snapshots"  # in the hub's cache the folder is a commit
    name = (where.parent.parent if cached else where).name
    return model.family.scheduler(model.parts["transformer"].config, name)


def _check_together(model: Model) -> None:
    """Complete what files without a config leave open, and raise ValueError where parts are of
    different models: their kinds and widths must meet."""
    family = model.family
    if family is None:
        if any(part.layout == "original" and part.kind == "vae" for part in model.parts.values()):
            raise ValueError(
                f"{model.where} is a VAE alone, which does not say its scale: name the model"
            )
        return
    for name in [*model.parts, *model.tokenizers]:
        if name not in family.components:
            raise ValueError(f"{model.where} has a {name}, which {family.title} has not")
    for name, part in model.parts.items():
        kind, layout = CLASSES[family.components[name]]
        if part.kind != kind:
            raise ValueError(
                f"{model.where}: its {name} is a {part.kind}, but its transformer needs a {kind}"
            )
        if kind == "vae" and part.layout == "original":
            if not family.latents:
                raise ValueError(f"{part.where} does not say its scale: use a folder vae instead")
            model.parts[name] = part._replace(config=replace(part.config, **family.latents))
        if kind == "clip" and layout == "unprojected" and part.layout == "diffusers":
            stored = {k: t for k, t in part.stored.items() if k != "text_projection.weight"}
            config = replace(part.config, projection_dim=part.config.hidden_size)
            model.parts[name] = part._replace(layout=layout, config=config, stored=stored)
    for field, sources in family.widths.items():
        if all(name in model.parts for name, _ in sources):
            width = sum(getattr(model.parts[name].config, source) for name, source in sources)
            wanted = getattr(model.parts["transformer"].config, field)
            if width != wanted:
                names = " with ".join(name for name, _ in sources)
                raise ValueError(
                    f"{model.where}: the transformer's {field} is {wanted}, but {names} gives "
                    f"{width}: they are not parts of one model"
                )
