"""Which networks and families there are, and a network in files before any of its data is read."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minidit.checks import reason, short
from minidit.scheduler import SchedulerConfig
from weights import common, flux, lumina, lumina2, sd3
from weights.files import Tensors, plain, read_json, read_rows
from weights.keymap import Family, Network, Recipe, recipes

FAMILIES = (sd3.FAMILY, lumina.FAMILY, flux.FAMILY, lumina2.FAMILY)
NETWORKS: dict[str, Network] = common.NETWORKS | {
    "mmdit": sd3.NETWORK,
    "nextdit": lumina.NETWORK,
    "flux": flux.NETWORK,
    "lumina2": lumina2.NETWORK,
}
# what config.json and model_index.json call a network -> which, in which layout
CLASSES = {
    name: (kind, "unprojected" if name == "CLIPTextModel" else "diffusers")
    for kind, network in NETWORKS.items()
    for name in network.classes
}


class Part(NamedTuple):
    """A network in files: which, how its tensors are named, its config, its tensors' headers."""

    kind: str  # a key of NETWORKS
    layout: str
    config: Any
    stored: Tensors
    where: str  # for messages
    given: Mapping[str, Any] = {}  # config.json as it is, where there is one


@dataclass
class Model:
    """The parts of a model in files, and for those that were not found, what is wrong.

    parts include those whose weights are missing: their headers are empty.
    """

    where: Path
    layout: str
    parts: dict[str, Part] = field(default_factory=dict)
    tokenizers: dict[str, Path] = field(default_factory=dict)
    scheduler: SchedulerConfig | None = None
    missing: dict[str, str] = field(default_factory=dict)  # component -> one sentence

    @property
    def family(self) -> Family | None:
        """None where there is no transformer to tell."""
        return family_of(self.parts["transformer"].kind) if "transformer" in self.parts else None


def kind_in(family: Family, component: str) -> str:
    """The network that a component is in a family; "" for no network."""
    return CLASSES.get(family.components.get(component, ""), ("", ""))[0]


def family_of(kind: str) -> Family | None:
    """The family whose transformer is of this kind; None for other networks."""
    return next((f for f in FAMILIES if kind_in(f, "transformer") == kind), None)


def read_config(folder: Path, component: str) -> Part:
    """A component folder of the diffusers layout: what its config.json says, without its tensors.

    Raises FileNotFoundError or ValueError.
    """
    path = folder / "config.json"
    values = read_json(path)
    listed = values.get("architectures")
    names = [values.get("_class_name"), *(listed if isinstance(listed, list) else [])]
    names = [n for n in (*names, values.get("model_type")) if n is not None]
    kinds = {kind_in(family, component) for family in FAMILIES}
    possible = {n: known for n, known in CLASSES.items() if known[0] in kinds}
    name = next((n for n in names if isinstance(n, str) and n in CLASSES), "")
    if name not in possible:
        said = short(names[0] if names else None)
        raise ValueError(f"{path} is for {said}, must be for one of {', '.join(possible)}")
    kind, layout = possible[name]
    config: Any = config_from(NETWORKS[kind].config, values, path)
    if layout == "unprojected":
        config = replace(config, projection_dim=config.hidden_size)
    return Part(kind, layout, config, {}, str(folder), values)


def config_from(cls: type, values: Mapping[str, Any], path: Path) -> Any:
    """A config dataclass from what a JSON file holds; keys without a field are ignored.

    Raises ValueError with the file, the key and its value where a type does not fit.
    """
    found = {f.name: values[f.name] for f in fields(cls) if f.name in values}
    try:
        return cls(**found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def sized_part(stored: Tensors, where: str) -> Part:
    """A network in a file without a config: which it is, and its sizes, are in names and shapes.

    Raises ValueError.
    """
    for kind, network in NETWORKS.items():
        if network.sizes and network.sign in stored:
            try:
                return Part(kind, *network.sizes(stored), stored, where)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
    names = ", ".join(plain(name) for name in sorted(stored)[:3])
    raise ValueError(f"{where} is in no layout known here: its tensors are called {names}, ...")


class NoInit(TorchFunctionMode):
    """Leaves out initial values: normal_ on the meta device would import torch._dynamo, which takes
    seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def build(part: Part, compare: bool = False) -> tuple[nn.Module, dict[str, Recipe]]:
    """The network on the meta device, in the types that are stored, and what to read into it:
    checked against the headers.

    compare  look into the data whether tensors that should be copies of others are
    Raises ValueError if the files do not fit the network exactly.
    """
    network, config, stored = NETWORKS[part.kind], part.config, part.stored
    name = network.module.__name__
    numbers = [n for field, n in vars(config).items() if "layers" in field and type(n) is int]
    depth = math.prod(numbers) * len(getattr(config, "block_out_channels", "1"))
    if depth > len(stored):  # before they are all built
        raise ValueError(
            f"{part.where}: the config makes {depth} layers, but the files have only "
            f"{len(stored)} tensors"
        )
    try:
        with torch.device("meta"), NoInit():
            module = network.module(config).eval().requires_grad_(False)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(f"{part.where}: its sizes make no {name}: {reason(error)}") from None
    plan = plan_of(part.kind, part.layout, module, stored)
    _check(plan, stored, network, f"{part.where} does not fit {name}")
    for recipe in plan.values():
        if compare and recipe.copy and not _copied(recipe, stored):
            if part.kind == "nextdit":
                return build(part._replace(config=replace(config, two_queries=True)))
            names = " and ".join(recipe.names)
            raise ValueError(f"{part.where}: {names} must be the same and are not")
    widest = max((t.dtype for t in stored.values()), key=lambda dtype: dtype.itemsize)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        dtypes = {stored[n].dtype for n in plan[name].names}
        tensor.data = tensor.data.to(dtypes.pop() if len(dtypes) == 1 else widest)
    return module, plan


def plan_of(
    kind: str, layout: str, module: nn.Module, names: Collection[str] = ()
) -> dict[str, Recipe]:
    """What every tensor of a module is in files of a layout, or in one that has these names."""
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    table = NETWORKS[kind].table(module.config, names)
    return recipes(table, int(layout != "diffusers"), shapes)


def _check(plan: Mapping[str, Recipe], stored: Tensors, network: Network, what: str) -> None:
    """Raise one ValueError that lists missing, unexpected, mis-shaped and non-float tensors."""

    def fits(found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
        conv = network.convs and len(shape) == 2 and found == (*shape, 1, 1)
        return found == shape or conv

    wanted = {name: recipe.shape for recipe in plan.values() for name in recipe.names}
    there = {name: shape for name, shape in wanted.items() if name in stored}
    faults = {
        "missing": [name for name in wanted if name not in stored],
        "unexpected": [plain(n) for n in stored if n not in wanted and n not in network.ignore],
        "of another shape": [
            f"{name} is {list(stored[name].shape)} and must be {list(shape)}"
            for name, shape in there.items()
            if not fits(stored[name].shape, shape)
        ],
        "not floating point": [
            f"{name} is {stored[name].dtype}"
            for name in there
            if not stored[name].dtype.is_floating_point
        ],
    }
    said = [
        f"{len(names)} tensors {fault} ({', '.join(names[:10] + ['...'] * (len(names) > 10))})"
        for fault, names in faults.items()
        if names
    ]
    if said:
        raise ValueError(f"{what}: {'; '.join(said)}")


def _copied(recipe: Recipe, stored: Tensors) -> bool:
    """Whether the file holds the same numbers in a tensor and in its copy."""
    both = (read_rows(stored[name], 0, recipe.shape[0]) for name in recipe.names)
    return all(
        torch.allclose(one.float(), other.float(), rtol=0, atol=0, equal_nan=True)
        for one, other in zip(*both, strict=True)
    )


def fill(
    module: nn.Module,
    plan: Mapping[str, Recipe],
    part: Part,
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    """The module that `build` made of a part, with the part's data on a device.

    It is read a few megabytes at a time and converted on the way, so that loading needs the
    module's own size and little more.
    """
    module.to(dtype)
    if device.type == "meta":
        return module
    try:
        module.to_empty(device=device)
    except (RuntimeError, MemoryError) as error:
        size = sum(tensor.nbytes for tensor in module.state_dict().values())
        raise MemoryError(
            f"{part.where} needs {size / 1e9:.1f} GB on {device}, which could not be had: try a "
            f"smaller dtype, or keep parts off the device with offload ({reason(error)})"
        ) from None
    for name, tensor in module.state_dict().items():
        read_into(tensor, plan[name], part.stored)
    return module


def read_into(out: Tensor, recipe: Recipe, stored: Tensors) -> Tensor:
    """A tensor of ours, with the data that its recipe names."""
    if not recipe.pieces:
        out.copy_(torch.eye(*out.shape))
    at = 0
    for name, start, stop in recipe.pieces:
        for rows in read_rows(stored[name], start, stop):
            if not out.is_cpu:  # convert here: not every device knows every stored type
                rows = rows.to(out.dtype)
            target = out[at : at + len(rows)]
            target.copy_(rows.reshape(target.shape))
            at += len(rows)
    return out
