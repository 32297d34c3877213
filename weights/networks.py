"""Which networks and families there are, and a network in files before any of its data is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minidit.checks import reason, short
from minidit.scheduler import SchedulerConfig
from weights import common, flux, lumina, lumina2, sd3
from weights.config import config_from
from weights.files import (
    Tensors,
    find_tensors,
    plain,
    read_json,
    read_rows,
    row_chunks,
    weights_name,
)
from weights.keymap import Network, Recipe, recipes

FAMILIES = {
    "sd3": sd3.FAMILY,
    "lumina": lumina.FAMILY,
    "flux": flux.FAMILY,
    "lumina2": lumina2.FAMILY,
}
NETWORKS: dict[str, Network] = {
    **common.NETWORKS,
    **sd3.NETWORKS,
    **lumina.NETWORKS,
    **flux.NETWORKS,
    **lumina2.NETWORKS,
}
# what config.json and model_index.json call a network -> which, in which layout
CLASSES = {
    name: (kind, layout)
    for kind, network in NETWORKS.items()
    for name, layout in network.classes.items()
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
    def family(self) -> str | None:
        """A key of FAMILIES; None where there is no transformer to tell."""
        return family_of(self.parts["transformer"].kind) if "transformer" in self.parts else None


def class_of(name: str) -> tuple[str, str]:
    """Kind and layout of a network's class in the official libraries; "" twice for others."""
    return CLASSES.get(name, ("", ""))


def kinds(component: str) -> set[str]:
    """The networks that can fill a component, in any family."""
    return {class_of(family.components.get(component, ""))[0] for family in FAMILIES.values()}


def family_of(kind: str) -> str | None:
    """The family whose transformer is of this kind, a key of FAMILIES; None for other networks."""
    kinds = {class_of(f.components["transformer"])[0]: name for name, f in FAMILIES.items()}
    return kinds.get(kind)


def read_part(folder: Path, component: str) -> Part:
    """A component folder of the diffusers layout: its config.json and the headers of its files.

    Raises FileNotFoundError or ValueError.
    """
    part = read_config(folder, component)
    return part._replace(stored=find_tensors(folder, weights_name(component)))


def read_config(folder: Path, component: str) -> Part:
    """The same without its files: what config.json says."""
    path = folder / "config.json"
    values = read_json(path)
    architectures = values.get("architectures")
    names = [*architectures] if isinstance(architectures, list) else []
    names = [values.get("_class_name"), *names, values.get("model_type")]
    known = next((CLASSES[n] for n in names if isinstance(n, str) and n in CLASSES), None)
    possible = kinds(component)
    if known is None or known[0] not in possible:
        said = next((n for n in names if n is not None), None)
        allowed = ", ".join(n for n, (kind, _) in CLASSES.items() if kind in possible)
        raise ValueError(f"{path} is for {short(said)}, must be for one of {allowed}")
    kind, layout = known
    config: Any = config_from(NETWORKS[kind].config, values, path)
    if layout == "unprojected":
        config = replace(config, projection_dim=config.hidden_size)
    return Part(kind, layout, config, {}, str(folder), values)


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
    """The network on the meta device, and what to read into it: checked against the headers.

    compare  look into the data whether tensors that should be copies of others are
    Raises ValueError if the files do not fit the network exactly.
    """
    network, config = NETWORKS[part.kind], part.config
    name = network.module.__name__
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    numbers = [n for field, n in values.items() if "layers" in field and type(n) is int]
    depth = math.prod(numbers) * len(values.get("block_out_channels", "1"))
    if depth > len(part.stored):  # before they are all built
        raise ValueError(
            f"{part.where}: the config makes {depth} layers, but the files have only "
            f"{len(part.stored)} tensors"
        )
    try:
        with torch.device("meta"), NoInit():
            module = network.module(config).eval().requires_grad_(False)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(f"{part.where}: its sizes make no {name}: {reason(error)}") from None
    plan = plan_of(part.kind, part.layout, module, part.stored)
    _check(plan, part.stored, network.ignore, f"{part.where} does not fit {name}")
    for recipe in plan.values():
        if compare and not _copied(recipe, part.stored):
            if part.kind == "nextdit":
                return build(part._replace(config=replace(config, two_queries=True)))
            one, other = recipe.names
            raise ValueError(f"{part.where}: {one} and {other} must be the same and are not")
    return module, plan


def plan_of(
    kind: str, layout: str, module: nn.Module, stored: Tensors | None = None
) -> dict[str, Recipe]:
    """What every tensor of a module is in files of a layout."""
    network = NETWORKS[kind]
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    table = network.table(module.config, stored)
    return recipes(table, network.layouts.index(layout), shapes)


def _check(plan: Mapping[str, Recipe], stored: Tensors, ignore: tuple[str, ...], what: str) -> None:
    """Raise one ValueError that lists missing, unexpected, mis-shaped and non-float tensors."""
    wanted = {name: recipe.shape for recipe in plan.values() for name in recipe.names}
    faults: dict[str, list[str]] = {
        "missing": [name for name in wanted if name not in stored],
        "unexpected": [plain(n) for n in stored if n not in wanted and n not in ignore],
        "of another shape": [],
        "not floating point": [],
    }
    for name in [name for name in wanted if name in stored]:
        shape, dtype = stored[name].shape, stored[name].dtype
        if shape != wanted[name]:
            said = f"{name} is {list(shape)} and must be {list(wanted[name])}"
            faults["of another shape"].append(said)
        if not dtype.is_floating_point:
            faults["not floating point"].append(f"{name} is {dtype}")
    said = [
        f"{len(names)} tensors {fault} ({', '.join([*names[:10], *(['...'] * (len(names) > 10))])})"
        for fault, names in faults.items()
        if names
    ]
    if said:
        raise ValueError(f"{what}: {'; '.join(said)}")


def _copied(recipe: Recipe, stored: Tensors) -> bool:
    """Whether the file holds the same numbers in the copy of a tensor, if there is one."""
    for name, start, stop in recipe.pieces if recipe.copy else ():
        for rows in row_chunks(stored[name], start, stop):
            one, other = (read_rows(stored[n], *rows).float() for n in recipe.names)
            if not torch.allclose(one, other, rtol=0, atol=0, equal_nan=True):
                return False
    return True


def fill(
    module: nn.Module,
    plan: Mapping[str, Recipe],
    part: Part,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The module that `build` made of a part, with the part's data on a device.

    It is read a few megabytes at a time and converted on the way, so that loading needs the
    module's own size and little more. dtype None keeps what is stored.
    """
    widest = max((t.dtype for t in part.stored.values()), key=lambda dtype: dtype.itemsize)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        found = {part.stored[n].dtype for n in plan[name].names} if name in plan else set()
        tensor.data = tensor.data.to(dtype or (found.pop() if len(found) == 1 else widest))
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
        _read_into(tensor, plan[name], part.stored)
    return module


def _read_into(out: Tensor, recipe: Recipe, stored: Tensors) -> None:
    if not recipe.pieces:
        out.copy_(torch.eye(*out.shape))
    at = 0
    for name, start, stop in recipe.pieces:
        for first, last in row_chunks(stored[name], start, stop):
            rows = read_rows(stored[name], first, last)
            if not out.is_cpu:  # convert here: not every device knows every stored type
                rows = rows.to(out.dtype)
            target = out[at : at + last - first]
            target.copy_(rows.reshape(target.shape))
            at += last - first
