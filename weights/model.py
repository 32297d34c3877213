"""What is in a folder or a file: the parts of a model, found and named, before any data is read.

Three layouts are published: a folder with one subfolder per component (the diffusers layout), the
single files of Stability AI with their separate text encoders, and the files of Lumina-T2X.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from minidit.scheduler import SchedulerConfig
from weights import lumina, sd3
from weights.files import Tensors, read_header, read_json, read_namespace, read_torch
from weights.networks import ROLES, Part, config_from_json, read_config, read_part

COMPONENTS = (
    "transformer",
    "vae",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "tokenizer",
    "tokenizer_2",
    "tokenizer_3",
    "scheduler",
)
TOKENIZER_FILES = {  # what tells a tokenizer's kind -> what else it reads
    "vocab.json": ("merges.txt", "tokenizer_config.json", "special_tokens_map.json"),
    "spiece.model": ("tokenizer_config.json",),
    "tokenizer.model": ("tokenizer_config.json",),
}


class Family(NamedTuple):
    """What a model of a family consists of, and what holds where its files do not say."""

    title: str
    pipeline: str  # as model_index.json calls it
    repo: str  # on the hub: has every component as a folder
    needs: tuple[str, ...]
    shift: float  # of the noise schedule
    steps: int  # to sample with, and the guidance: the official pipelines' defaults
    guidance: float


FAMILIES = {
    "sd3": Family(
        title="Stable Diffusion 3",
        pipeline="StableDiffusion3Pipeline",
        repo="stabilityai/stable-diffusion-3-medium-diffusers",
        needs=("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
        shift=3.0,
        steps=28,
        guidance=7.0,
    ),
    "lumina": Family(
        title="Lumina-Next",
        pipeline="LuminaPipeline",
        repo="Alpha-VLLM/Lumina-Next-SFT-diffusers",
        needs=("transformer", "vae", "text_encoder", "tokenizer"),
        shift=1.0,
        steps=30,
        guidance=4.0,
    ),
}
# Stability AI's encoder files, looked for beside a single file; the first that is there is taken
ENCODER_FILES = {
    "text_encoder": ("clip_l.safetensors",),
    "text_encoder_2": ("clip_g.safetensors",),
    "text_encoder_3": (
        "t5xxl_fp16.safetensors",
        "t5xxl.safetensors",
        "t5xxl_fp8_e4m3fn.safetensors",
    ),
}


@dataclass
class Model:
    """The parts of a model that were found, and for those that were not, what is wrong."""

    where: Path
    layout: str
    parts: dict[str, Part] = field(default_factory=dict)  # also those of which only the config is
    tokenizers: dict[str, Path] = field(default_factory=dict)
    scheduler: SchedulerConfig | None = None
    missing: dict[str, str] = field(default_factory=dict)  # component -> one sentence

    @property
    def family(self) -> str | None:
        """ "sd3" or "lumina"; None where there is no transformer to tell."""
        kinds = {"mmdit": "sd3", "nextdit": "lumina"}
        return kinds[self.parts["transformer"].kind] if "transformer" in self.parts else None


def open_model(path: Path, use_t5: bool = True, extra: Sequence[Path] = ()) -> Model:
    """Find the parts of a model in a local folder or file, from names and headers alone.

    use_t5  False leaves T5's weights out of SD3
    extra   more files or folders to look in for what is not beside the model
    Raises FileNotFoundError or ValueError if there is nothing that can be understood; what is only
    missing is listed in the model.
    """
    if not path.is_file() and not path.is_dir():
        raise ValueError(f"{path} is neither a file nor a folder")
    file = path if path.is_file() else _one_file(path)
    if file is None and extra:
        raise ValueError(f"{path} is in the diffusers layout: {extra[0]} cannot be added to it")
    model = _open_folder(path, use_t5) if file is None else _open_file(file, use_t5, extra)
    _check_together(model)
    return model


def _open_folder(folder: Path, use_t5: bool) -> Model:
    """The diffusers layout."""
    listed = _listed(folder)
    model = Model(folder, "folder in the diffusers layout")
    for name in COMPONENTS:
        if name not in listed or (name == "text_encoder_3" and not use_t5):
            continue
        try:
            if name in ROLES:
                model.parts[name] = read_config(folder / name, name)
                model.parts[name] = read_part(folder / name, name)
            elif name == "scheduler":
                family = FAMILIES.get(model.family or "")
                fallback = default_scheduler(family, folder) if family else SchedulerConfig()
                model.scheduler = read_scheduler(folder / name, fallback)
            else:
                model.tokenizers[name] = find_tokenizer(folder / name, name, model.family)
        except FileNotFoundError as error:
            model.missing[name] = str(error)
    family = FAMILIES.get(model.family or "")
    if family:
        for name in (*_wanted(model, family), "scheduler"):
            if name not in listed:
                model.missing[name] = f"there is no folder {name} in {folder}"
    return model


def _wanted(model: Model, family: Family) -> tuple[str, ...]:
    """The components that a model needs; T5 is optional, but not without its tokenizer."""
    return (*family.needs, *(["tokenizer_3"] if "text_encoder_3" in model.parts else []))


def _listed(folder: Path) -> list[str]:
    """The components that a folder should have: by model_index.json, or else those it has."""
    index = folder / "model_index.json"
    if not index.is_file():
        return [name for name in COMPONENTS if (folder / name).is_dir()]
    values = read_json(index)
    for name in COMPONENTS:
        value = values.get(name)
        if value is not None and not (isinstance(value, list) and len(value) == 2):
            raise ValueError(f"{index}: {name} is {value!r:.80}, must be a [library, class] pair")
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
    encoders = {name for files in ENCODER_FILES.values() for name in files}
    models = [name for name in names if name not in encoders] or names
    if len(models) > 1:
        raise ValueError(f"{folder} has several models, name one: {', '.join(models)}")
    if models:
        return folder / models[0]
    if any((folder / name).is_dir() for name in COMPONENTS):
        return None
    raise FileNotFoundError(
        f"{folder} has no model: neither model_index.json nor component folders nor "
        "a .safetensors file"
    )


def _open_file(path: Path, use_t5: bool, extra: Sequence[Path]) -> Model:
    """A single file, with what was named besides and what lies beside it."""
    layout, parts = read_parts(path)
    model = Model(path, layout, parts)
    for place in extra:
        if place.is_file():
            _add(model, read_parts(place)[1], place)
        elif not place.is_dir():
            raise FileNotFoundError(f"there is no file or folder {place}")
    if not use_t5:
        model.parts.pop("text_encoder_3", None)
    if model.family is None:
        return model
    family = FAMILIES[model.family]
    for folder in (*(place for place in extra if place.is_dir()), path.parent):
        _look_in(folder, model, family, use_t5)
    model.scheduler = model.scheduler or default_scheduler(family, path)
    for name in _wanted(model, family):
        if name not in model.parts and name not in model.tokenizers:
            model.missing[name] = _what_to_add(name, model)
    return model


def _what_to_add(name: str, model: Model) -> str:
    """What would bring a component that is not in a single file."""
    files = ENCODER_FILES.get(name, ()) if model.family == "sd3" else ()
    if files:
        return f"{files[0]} or a folder {name} beside {model.where.name}"
    if name.startswith("tokenizer"):
        main = main_file(name, str(model.family))
        small = ", ".join((main, *TOKENIZER_FILES[main]))
        return f"a folder {name} with the small files {small} beside {model.where.name}"
    return f"a folder {name} beside {model.where.name}"


def _look_in(folder: Path, model: Model, family: Family, use_t5: bool) -> None:
    """Add what a folder has of the components that a file lacks."""
    optional = ("text_encoder_3", "tokenizer_3") if family is FAMILIES["sd3"] else ()
    for name in (*family.needs, *optional, "scheduler"):
        here = folder / name
        if name == "scheduler":
            if model.scheduler is None and (here / "scheduler_config.json").is_file():
                model.scheduler = read_scheduler(here, default_scheduler(family, model.where))
        elif name.startswith("tokenizer"):
            if name not in model.tokenizers and here.is_dir():
                model.tokenizers[name] = find_tokenizer(here, name, model.family)
        elif name in model.parts or (name == "text_encoder_3" and not use_t5):
            continue
        elif (here / "config.json").is_file():
            model.parts[name] = read_part(here, name)
        elif family is FAMILIES["sd3"]:
            places = (folder, folder / "text_encoders")
            files = [p / file for file in ENCODER_FILES.get(name, ()) for p in places]
            for file in [file for file in files if file.is_file()][:1]:
                parts = read_parts(file)[1]
                if name not in parts:
                    raise ValueError(f"{file} holds {', '.join(parts)}, must hold {name}")
                _add(model, {name: parts[name]}, file)


def _add(model: Model, parts: Mapping[str, Part], place: Path) -> None:
    for name, part in parts.items():
        if name in model.parts:
            raise ValueError(f"{name} is in {model.parts[name].where} and again in {place}")
        model.parts[name] = part


def read_parts(path: Path) -> tuple[str, dict[str, Part]]:
    """What a file is, in words, and the parts in it, told by its tensors' names and shapes."""
    stored = read_torch(path) if path.suffix in (".pth", ".pt") else read_header(path)
    if any(name.startswith(sd3.PREFIXES["transformer"]) for name in stored):
        return "single file of Stability AI", _split(path, stored)
    if "text_model.embeddings.token_embedding.weight" in stored:
        name = sd3.clip_role(stored)
        return "CLIP text encoder", {name: _sd3_part(name, stored, path)}
    if "encoder.final_layer_norm.weight" in stored:
        return "T5 text encoder", {"text_encoder_3": _sd3_part("text_encoder_3", stored, path)}
    if "layers.0.attention.wq.weight" in stored:
        args = path.with_name("model_args.pth")
        try:
            config = lumina.nextdit_config(stored, read_namespace(args) if args.is_file() else {})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        part = Part("nextdit", "original", config, stored, str(path))
        return "file of Lumina-T2X", {"transformer": part}
    names = ", ".join(sorted(stored)[:3])
    raise ValueError(f"{path} is in no layout known here: its tensors are called {names}, ...")


def _split(path: Path, stored: Tensors) -> dict[str, Part]:
    """A single file of Stability AI taken apart by its prefixes."""
    shares: dict[str, dict[str, Any]] = {}
    for key, tensor in stored.items():
        name = next((n for n, prefix in sd3.PREFIXES.items() if key.startswith(prefix)), None)
        if name is None:
            raise ValueError(f"{path} has the tensor {key}, which belongs to no known component")
        shares.setdefault(name, {})[key.removeprefix(sd3.PREFIXES[name])] = tensor
    return {name: _sd3_part(name, share, path) for name, share in shares.items()}


def _sd3_part(name: str, stored: Tensors, path: Path) -> Part:
    """A component of SD3 without a config file: its sizes are read from the shapes."""
    try:
        kind, layout, config = sd3.CONFIGS[name](stored)
    except ValueError as error:
        raise ValueError(f"{path}: {name}: {error}") from None
    return Part(kind, layout, config, stored, f"{path} ({name})")


def find_tokenizer(folder: Path, name: str, family: str | None = None) -> Path:
    """The folder itself if it has a tokenizer's main file; FileNotFoundError if not."""
    files = [main_file(name, family)] if family else [*TOKENIZER_FILES]
    if not any((folder / file).is_file() for file in files):
        raise FileNotFoundError(f"there is no {' or '.join(files)} in {folder}")
    return folder


def main_file(name: str, family: str) -> str:
    """The file that a family's tokenizer of this name cannot do without."""
    if family == "lumina":
        return "tokenizer.model"
    return "spiece.model" if name == "tokenizer_3" else "vocab.json"


def read_scheduler(folder: Path, fallback: SchedulerConfig) -> SchedulerConfig:
    """A scheduler folder's config; the fallback has steps and guidance, if the file does not.

    Raises ValueError for another noise schedule than SD3's.
    """
    path = folder / "scheduler_config.json"
    values = read_json(path)
    kind = values.get("_class_name", "FlowMatchEulerDiscreteScheduler")
    if kind != "FlowMatchEulerDiscreteScheduler":
        raise ValueError(f"{path} is for {kind!r:.80}, must be for FlowMatchEulerDiscreteScheduler")
    for option in (
        "use_dynamic_shifting",
        "use_karras_sigmas",
        "use_exponential_sigmas",
        "use_beta_sigmas",
        "invert_sigmas",
        "stochastic_sampling",
        "shift_terminal",
    ):
        if values.get(option):
            raise ValueError(f"{path}: {option} is {values[option]!r:.80}, must be off")
    config = config_from_json(SchedulerConfig, path)
    ours = ("default_steps", "default_guidance")
    return replace(config, **{k: getattr(fallback, k) for k in ours if k not in values})


def default_scheduler(family: Family, where: Path) -> SchedulerConfig:
    """What to sample with where no file says it.

    Nothing inside the files tells SD3.5-large-turbo from SD3.5-large, so its two numbers, and
    nothing else, go by the name of the file, folder or hub repository.
    """
    cached = where.parent.name == "snapshots"  # in the hub's cache the folder is a commit
    if "turbo" in (where.parent.parent if cached else where).name.lower():
        return SchedulerConfig(family.shift, default_steps=4, default_guidance=1.0)
    steps, guidance = family.steps, family.guidance
    return SchedulerConfig(family.shift, default_steps=steps, default_guidance=guidance)


def require(model: Model) -> None:
    """Raise one FileNotFoundError that lists all that a model lacks to run, and where to get it."""
    if model.family is None:
        if "transformer" in model.missing:
            raise FileNotFoundError(model.missing["transformer"])
        have = ", ".join([*model.parts, *model.tokenizers]) or "no component"
        raise FileNotFoundError(f"{model.where} has no transformer, only {have}")
    if not model.missing:
        return
    lacks = "; ".join(f"{name} ({why})" for name, why in model.missing.items())
    message = f"{model.where} cannot run yet, it lacks {lacks}"
    if model.where.is_file():
        what = " ".join(f"'{name}/*'" for name in model.missing)
        message += (
            f"; one way to get them: hf download {FAMILIES[model.family].repo} --include {what} "
            f"--exclude '*.fp16*' --local-dir {model.where.parent}"
        )
    raise FileNotFoundError(message)


def _check_together(model: Model) -> None:
    """Raise ValueError where parts are of different models: their kinds and widths must meet."""
    if model.family is None:
        return
    configs = {name: part.config for name, part in model.parts.items()}
    encoder = model.parts.get("text_encoder")
    kind = {"sd3": "clip", "lumina": "gemma"}[model.family]
    if encoder and encoder.kind != kind:
        raise ValueError(
            f"{model.where}: its text_encoder is a {encoder.kind}, "
            f"but its transformer needs a {kind}"
        )

    def size(name: str, field: str) -> int | None:
        return getattr(configs[name], field) if name in configs else None

    given = [("in_channels", "vae", size("vae", "latent_channels"))]
    if model.family == "lumina":
        given.append(("cross_attention_dim", "text_encoder", size("text_encoder", "hidden_size")))
    else:
        given.append(("joint_attention_dim", "text_encoder_3", size("text_encoder_3", "d_model")))
        one, two = (size(name, "projection_dim") for name in ("text_encoder", "text_encoder_2"))
        both = one + two if one and two else None
        given.append(("pooled_projection_dim", "text_encoder with text_encoder_2", both))
    for field_name, name, width in given:
        wanted = getattr(configs["transformer"], field_name)
        if width not in (None, wanted):
            raise ValueError(
                f"{model.where}: the transformer's {field_name} is {wanted}, but {name} gives "
                f"{width}: they are not parts of one model"
            )
