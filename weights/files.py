"""Files: JSON, and tensors by their headers first, then data row by row.

The safetensors library checks headers. The data is read plainly: the pages of a memory-mapped file
count as memory of the process, and mapping a 16 GB file can fail outright on a small machine, so
this is what keeps the peak at the model's own size.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minidit.checks import reason, short

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
T5_FILES = ("t5xxl_fp16.safetensors", "t5xxl.safetensors", "t5xxl_fp8_e4m3fn.safetensors")
SCHEDULER = "FlowMatchEulerDiscreteScheduler"  # as model_index.json calls it
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CHUNK = 2**20  # values read at a time
MAX_JSON = 10**7  # bytes of a header, a config or a vocabulary; official ones are below 1.1 MB
MAX_BRACKETS = 10**5  # of a JSON file; official ones have below 5,100
MAX_DEPTH = 50  # of JSON; official files nest four deep
FOREIGN = {  # what is not read, by its ending
    ".gguf": "a GGUF file, quantised for other programs",
    ".ckpt": "a pickled checkpoint, which may run any code",
    ".bin": "a pickled file, which may run any code",
    ".msgpack": "a file of Flax",
    ".onnx": "an ONNX graph",
}


class Stored(NamedTuple):
    """One tensor as a file's header describes it: nothing of its data has been read."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    data: Tensor | None = None  # the mapped tensor, for a .pth file

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


Tensors = Mapping[str, Stored]


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a .safetensors file, from its header alone.

    Raises FileNotFoundError, or ValueError where the file is not sound safetensors.
    """
    size = file_size(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, MAX_JSON):
        raise ValueError(
            f"{path} is no whole safetensors file: its header claims {length} bytes, of which at "
            f"most {max(0, min(size - 8, MAX_JSON))} can be (the file has {size})"
        )
    tensors: dict[str, Stored] = {}
    offset = 8 + length
    try:
        with safe_open(path, "numpy") as header:
            for name in header.offset_keys():
                entry = header.get_slice(name)
                dtype = DTYPES.get(entry.get_dtype())
                if dtype is None:
                    raise ValueError(f"it stores {plain(name)} as {entry.get_dtype()}")
                tensors[name] = Stored(path, dtype, tuple(entry.get_shape()), offset)
                offset += tensors[name].size
    except (SafetensorError, ValueError, OverflowError, OSError, MemoryError) as error:
        raise ValueError(f"{path} is no sound safetensors file: {reason(error)}") from None
    return tensors


def read_rows(t: Stored, start: int, stop: int) -> Iterator[Tensor]:
    """Rows start..stop of a stored tensor along its first dimension, as stored: a few megabytes at
    a time, as many rows as of any other tensor of this shape."""
    rows = max(1, CHUNK // max(1, math.prod(t.shape[1:])))
    if t.data is not None:
        yield from t.data[start:stop].split(rows)
        return
    width = t.size // t.shape[0]  # bytes of a row
    with open(t.file, "rb") as file:
        file.seek(t.offset + start * width)
        for first in range(start, stop, rows):
            buffer = bytearray(min(rows, stop - first) * width)
            if file.readinto(buffer) != len(buffer):
                raise ValueError(f"{t.file} ends before its tensors do: it was changed meanwhile")
            yield torch.frombuffer(buffer, dtype=t.dtype).reshape(-1, *t.shape[1:])


def read_torch(path: Path) -> dict[str, Stored]:
    """The tensors of a .pth file, mapped and not read; its pickle may hold nothing else.

    Raises FileNotFoundError or ValueError.
    """
    state = _unpickle(path)
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.is_contiguous()
        for name, tensor in state.items()
    ):
        raise ValueError(f"{path} must hold a dict of tensors and nothing else")
    stored = {n: Stored(path, t.dtype, tuple(t.shape), 0, t.detach()) for n, t in state.items()}
    if sum(tensor.size for tensor in stored.values()) > file_size(path):
        raise ValueError(f"{path} claims more data than it has")
    return stored


def read_namespace(path: Path) -> dict[str, Any]:
    """The fields of an argparse.Namespace saved by torch, such as Lumina's model_args.pth."""
    value = _unpickle(path)
    if not isinstance(value, argparse.Namespace):
        raise ValueError(f"{path} holds a {type(value).__name__}, must hold an argparse.Namespace")
    return vars(value)


def _unpickle(path: Path) -> Any:
    """A file of torch.save; only tensors, plain values and argparse.Namespace are let in."""
    size = file_size(path)
    try:
        with zipfile.ZipFile(path) as archive:  # torch would unpack what is compressed
            claimed = sum(entry.file_size for entry in archive.infolist())
        if claimed > size:
            raise ValueError(f"its parts claim {claimed} bytes, the file has {size}")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # neither has an error of its own for damaged files
        raise ValueError(f"{path} cannot be read by torch.load: {reason(error)}") from None


def shape_of(stored: Tensors, name: str, dims: int) -> tuple[int, ...]:
    """The shape of a tensor that sizes are read from; ValueError without it, or if it has another
    number of dimensions or a zero."""
    shape = stored[name].shape if name in stored else None
    if shape is None or len(shape) != dims or 0 in shape:
        is_ = "missing" if shape is None else f"of shape {list(shape)}"
        raise ValueError(f"{name} is {is_}, must have {dims} dimensions: sizes are read from it")
    return shape


def count(stored: Tensors, prefix: str) -> int:
    """How many different numbers follow a prefix: how many layers there are."""
    return len({name[len(prefix) :].split(".")[0] for name in stored if name.startswith(prefix)})


def multiple_of(mlp: int, hidden: int, width: int) -> int:
    """The largest number that rounding `hidden` up to a multiple of gives the width of the MLP."""
    for multiple in (256, 128, 64, 32, 16, 8, 4, 2, 1):
        if -(-hidden // multiple) * multiple == mlp:
            return multiple
    raise ValueError(f"the MLP is {mlp} wide, which does not follow from a width of {width}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; ValueError or FileNotFoundError says what is wrong."""
    data = read_bytes(path, MAX_JSON)
    try:
        if data.count(b"{") + data.count(b"[") > MAX_BRACKETS:
            raise ValueError(f"more than {MAX_BRACKETS} lists and objects")
        value = json.loads(data.decode("utf-8"))
        level = [value]
        for _ in range(MAX_DEPTH):
            level = [inner for outer in level for inner in _inside(outer)]
        if level:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        if b"\\u" in data:
            json.dumps(value, ensure_ascii=False).encode()  # lone surrogates are no text
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} does not hold JSON: {reason(error)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, must be an object")
    return value


def _inside(value: Any) -> list[Any]:
    return [*value.values()] if isinstance(value, dict) else value if type(value) is list else []


def plain(name: str) -> str:
    """A name out of a file for a message: as it is, if that is short and printable."""
    return name if 0 < len(name) <= 200 and name.isprintable() else short(name)


def file_size(path: Path) -> int:
    """Bytes of a file; FileNotFoundError or ValueError where it cannot be read."""
    try:
        if path.is_file():
            return path.stat().st_size
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {short(str(path))}: {reason(error)}") from None
    raise FileNotFoundError(f"there is no file {path}")


def read_bytes(path: Path, most: int) -> bytes:
    """All of a file; ValueError or FileNotFoundError if it is larger than `most` or not there."""
    size = file_size(path)
    if size > most:
        raise ValueError(f"{path} has {size} bytes, a file of its kind has at most {most}")
    return path.read_bytes()


def weights_name(component: str) -> str:
    """What the weight files of a component folder are called, without their endings."""
    return "model" if component.startswith("text_encoder") else "diffusion_pytorch_model"


def find_tensors(folder: Path, name: str) -> dict[str, Stored]:
    """The tensors of one component folder, wherever its published layout put them.

    In this order: one file, shards with an index, shards without; then the same with a variant,
    such as .fp16, where there is no plain one. Raises FileNotFoundError or ValueError.
    """
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    form = re.compile(
        rf"{name}(?:(\.\w+)?(-\d+-of-\d+)?\.safetensors|\.safetensors\.index(\.\w+)?\.json)"
    )
    variants: dict[str, list[str]] = {}
    for file in there:
        if match := form.fullmatch(file):
            variants.setdefault(match[1] or match[3] or "", []).append(file)
    if not variants:
        for file in there:
            if Path(file).suffix in (*FOREIGN, ".pth", ".pt"):
                raise FileNotFoundError(
                    f"{folder} has only {plain(file)}: convert it to safetensors or fetch the "
                    ".safetensors file"
                )
        raise FileNotFoundError(f"there is no {name}.safetensors in {folder}")
    variant, files = min(variants.items())
    whole, index = f"{name}{variant}.safetensors", f"{name}.safetensors.index{variant}.json"
    if whole in files:
        return read_header(folder / whole)
    return _read_shards(folder, files, folder / index if index in files else None)


def _read_shards(folder: Path, shards: list[str], index: Path | None) -> dict[str, Stored]:
    """The tensors of all shards together: each in one alone, the one that the index says. Without
    an index the shards are those that their own names count."""
    said: dict[str, str] = {}
    if index is not None:
        said = read_json(index).get("weight_map")
        if not isinstance(said, dict) or not all(type(file) is str for file in said.values()):
            raise ValueError(f"{index} has no weight_map of tensor names to file names")
        shards = sorted(set(said.values()))
    else:
        counts = sorted({int(Path(shard).stem.rsplit("-", 1)[1]) for shard in shards})
        if counts != [len(shards)]:
            raise FileNotFoundError(
                f"{folder} has {len(shards)} of the {' or '.join(map(str, counts))} shards that "
                "their names count: fetch the others"
            )
    found: dict[str, Stored] = {}
    for shard in shards:
        if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", shard):
            raise ValueError(f"{index} names the shard {plain(shard)}, which is no file name")
        for name, tensor in read_header(folder / shard).items():
            if name in found:
                place = found[name].file.name
                raise ValueError(f"{plain(name)} is in two shards of {folder}: {place} and {shard}")
            found[name] = tensor
    places = {name: tensor.file.name for name, tensor in found.items()}
    for name in sorted(said.keys() | places.keys()) if index else ():
        listed, real = (where.get(name, "no file") for where in (said, places))
        if listed != real:
            raise ValueError(f"{index} says that {plain(name)} is in {listed}, but it is in {real}")
    return found
