"""Damage to files, drawn from a random generator: for test_fuzz.py (hypothesis gives one) and
fuzz.py (which seeds one a file)."""

from __future__ import annotations

import copy
import json
import shutil
import zipfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

import torch

NUMBERS = (
    0, -1, 1, 2, 3, 64, 77, 2**31 - 1, 2**31, 2**48, 2**63, 10**30, 10**400, 0.5, -0.0, 1e-300,
    1e308, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
TEXTS = (
    "", "x", "F16", "F8_E4M3", "C64", "\n", "\x1b[31m", "\0", "\ud800", "a\u2028b", "é猫🧑",
    "<pad>", "../x.safetensors", "model.safetensors", "x" * 5000, "y\n" * 300, "%s {0} \\",
)  # fmt: skip


def fresh(rng: Random, depth: int = 0) -> Any:
    """Any JSON value."""
    kind = rng.randrange(6 if depth < 3 else 4)
    if kind < 2:
        return rng.choice(NUMBERS)
    if kind == 2:
        return rng.choice(TEXTS)
    if kind == 3:
        return rng.choice([None, True, False])
    inner = [fresh(rng, depth + 1) for _ in range(rng.randrange(4))]
    return inner if kind == 4 else {rng.choice([*TEXTS, "content"]): each for each in inner}


def damage_json(value: Any, rng: Random) -> Any:
    """A JSON value with one place in it replaced, removed, renamed, doubled or nested."""
    value = copy.deepcopy(value)
    place: Any = None
    key: Any = None
    while isinstance(value if place is None else place[key], dict | list):
        inner = value if place is None else place[key]
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        if not keys or (place is not None and rng.randrange(4) == 0):
            break
        place, key = inner, rng.choice(keys)
    if place is None:
        return fresh(rng)
    action = rng.choice(["replace", "replace", "remove", "rename", "swap", "nest", "add"])
    other = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
    if action == "remove":
        del place[key]
    elif action == "rename" and isinstance(place, dict):
        place[rng.choice([f"{key}x", key[:-1], "", *TEXTS])] = place.pop(key)
    elif action == "swap":
        place[key], place[other] = place[other], place[key]
    elif action == "nest":
        for _ in range(rng.choice([1, 30, 200])):
            place[key] = rng.choice([[place[key]], {"a": place[key]}])
    elif action == "add" and isinstance(place, dict):
        place[rng.choice(TEXTS)] = place[key]
    else:
        place[key] = fresh(rng)
    return value


def damage_json_file(raw: bytes, rng: Random) -> bytes:
    """A JSON file, damaged once or twice."""
    value = json.loads(raw)
    for _ in range(rng.randint(1, 2)):
        value = damage_json(value, rng)
    return json.dumps(value).encode()


def split(raw: bytes) -> tuple[dict, bytes]:
    """Header and data of a safetensors file."""
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def damage_header(raw: bytes, rng: Random) -> bytes:
    """A safetensors file with a damaged header of the right length."""
    header, data = split(raw)
    for _ in range(rng.randint(1, 2)):
        header = damage_json(header, rng)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def damage_bytes(raw: bytes, rng: Random) -> bytes:
    """A file with bytes flipped, cut off, added or overwritten; headers are where it hurts."""
    out = bytearray(raw)
    action = rng.choice(["flip", "header", "tail", "cut", "grow", "overwrite", "empty"])
    noise = bytes(rng.randrange(256) for _ in range(rng.randint(1, 20)))
    if action in ("flip", "header", "tail") and raw:
        start = max(0, len(raw) - 2000) if action == "tail" else 0  # a zip's directory
        end = min(len(raw), 6000) if action == "header" else len(raw)
        for _ in range(rng.randint(1, 4)):
            out[rng.randrange(start, end)] ^= rng.randint(1, 255)
    elif action == "cut" and raw:
        del out[rng.randrange(len(raw)) :]
    elif action == "grow":
        out += noise
    elif action == "overwrite":
        at = rng.randint(0, min(len(out), 200))
        out[at : at + len(noise)] = noise
    else:
        out.clear()
    return bytes(out)


def damage_text(raw: bytes, rng: Random) -> bytes:
    """A file of lines with one of them removed, doubled, changed or moved."""
    lines = raw.split(b"\n")
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    action = rng.choice(["remove", "double", "move", "change"])
    if action == "remove":
        del lines[at]
    elif action == "double":
        lines.insert(other, lines[at])
    elif action == "move":
        lines[at], lines[other] = lines[other], lines[at]
    else:
        lines[at] = rng.choice(TEXTS).encode(errors="surrogatepass")
    return b"\n".join(lines)


def damage_pickle(raw: bytes, rng: Random) -> bytes:
    """A file of torch.save that holds something else, at one name or as a whole."""
    state: Any = torch.load(BytesIO(raw), weights_only=False)
    if isinstance(state, dict):
        name = rng.choice(sorted(state))
        tensor = state[name]
        state[name] = rng.choice(
            [
                lambda: fresh(rng),
                lambda: [tensor],
                lambda: torch.zeros(1).expand(*tensor.shape),  # one value that claims to be many
                lambda: tensor.unsqueeze(0),
                lambda: tensor.int(),
                lambda: tensor.to_sparse(),
                lambda: tensor.to(torch.complex64),
                lambda: tensor[:0],
                lambda: torch.nn.Parameter(tensor),
            ]
        )()
        state = rng.choice([state, state, state, {"model": state}, list(state.values())])
    else:
        state.image_size = fresh(rng)
        state = rng.choice([state, fresh(rng)])
    out = BytesIO()
    torch.save(state, out)
    return out.getvalue()


def damage_zip(raw: bytes, rng: Random) -> bytes:
    """A zip file with a part left out, doubled, packed or damaged."""
    with zipfile.ZipFile(BytesIO(raw)) as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    name = rng.choice(sorted(parts))
    action = rng.choice(["remove", "rename", "pack", "damage"])
    packed = zipfile.ZIP_DEFLATED if action == "pack" else zipfile.ZIP_STORED
    if action == "remove":
        del parts[name]
    elif action == "rename":
        parts[rng.choice(["x", name + "x", "../x"])] = parts.pop(name)
    elif action == "damage":
        parts[name] = damage_bytes(parts[name], rng)
    out = BytesIO()
    with zipfile.ZipFile(out, "w", packed) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return out.getvalue()


def damage(raw: bytes, path: Path, rng: Random) -> bytes:
    """A file of any kind, damaged in a way that suits its kind or in its bytes."""
    ways = [damage_bytes]
    if path.suffix == ".json":
        ways += [damage_json_file] * 3
    elif path.suffix == ".safetensors":
        ways += [damage_header] * 2
    elif path.suffix == ".pth":
        ways += [damage_pickle, damage_zip]
    elif path.suffix == ".txt":
        ways += [damage_text]
    return rng.choice(ways)(raw, rng)


def damage_places(places: Sequence[Path], rng: Random) -> None:
    """Remove, rename or replace one of the files and folders."""
    place, other = rng.choice(places), rng.choice(places)
    action = rng.choice(["remove", "rename", "folder instead", "another's content"])
    if action == "remove":
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    elif action == "rename":
        place.rename(place.with_name("x" + place.name))
    elif action == "folder instead" and place.is_file():
        place.unlink()
        place.mkdir()
    elif place.is_file() and other.is_file():
        place.write_bytes(other.read_bytes())
