"""Damaged files: a ValueError or FileNotFoundError with one sentence, or the right model.

Every layout of tiny models is damaged in bytes, headers and configs. What can still be loaded must
have the sound model's names and shapes: damage inside the numbers themselves cannot be seen.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from weight_files import (
    LUMINA,
    lumina_tensors,
    sd3_tensors,
    to_sai,
    write_component,
    write_folder,
    write_lumina_t2x,
    write_single,
    write_tokenizers,
)

from weights.files import read_header
from weights.load import load_component, load_parts, open_model
from weights.save import convert

LAYOUTS = ("folder", "shards", "single", "separate", "lumina folder", "lumina", "lumina pth")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=4,
)
NUMBERS = st.sampled_from([0, -1, 1, 2, 3, 64, 2**31 - 1, 2**31, 2**63, 10**30, 0.5, float("inf")])


class Sound(dict[str, Path]):
    """Where to load each layout's sound model from, and the shapes it then has."""

    shapes: dict[str, dict]

    def __repr__(self) -> str:  # what hypothesis prints with a failing example
        return "<sound models>"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    """A whole tiny model in every layout."""
    root = tmp_path_factory.mktemp("sound")
    sd3, lumina = sd3_tensors(), lumina_tensors()
    paths = Sound(folder=write_folder(root / "folder", "sd3", sd3))

    paths["shards"] = root / "shards"
    shutil.copytree(paths["folder"], paths["shards"])
    t5 = paths["shards"] / "text_encoder_3"
    (t5 / "model.safetensors").unlink()
    names = sorted(sd3["text_encoder_3"])
    where = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        tensors = sd3["text_encoder_3"]
        save_file({name: tensors[name] for name in names if where[name] == file}, t5 / file)
    (t5 / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))

    (root / "single").mkdir()
    paths["single"] = write_single(root / "single" / "all.safetensors", sd3)
    write_tokenizers(root / "single", "sd3")

    (root / "separate").mkdir()
    core = {name: sd3[name] for name in ("transformer", "vae")}
    paths["separate"] = write_single(root / "separate" / "core.safetensors", core)
    for name, file in {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}.items():
        save_file(to_sai(name, sd3[name]), root / "separate" / f"{file}.safetensors")
    save_file(
        to_sai("text_encoder_3", sd3["text_encoder_3"]), root / "separate" / "t5xxl.safetensors"
    )
    write_tokenizers(root / "separate", "sd3")

    paths["lumina folder"] = write_folder(root / "lumina folder", "lumina", lumina)
    for layout, end in {"lumina": "safetensors", "lumina pth": "pth"}.items():
        paths[layout] = write_lumina_t2x(root / layout, lumina["transformer"], end)
        for name in ("vae", "text_encoder"):
            write_component(root / layout / name, name, *LUMINA[name], lumina[name])
        write_tokenizers(root / layout, "lumina")
    paths.shapes = {layout: shapes_of(path) for layout, path in paths.items()}
    return paths


def shapes_of(path: Path) -> dict[str, dict]:
    """Of every network."""
    parts = load_parts(path)[1]
    return {
        name: {key: tensor.shape for key, tensor in part.state_dict().items()}
        for name, part in parts.items()
        if isinstance(part, torch.nn.Module)
    }


def copied(path: Path, to: Path) -> tuple[Path, Path]:
    """A fresh copy of a layout's folder: the folder, and what to load in it."""
    root = path if path.is_dir() else path.parent
    shutil.rmtree(to / "copy", ignore_errors=True)
    shutil.copytree(root, to / "copy")
    return to / "copy", to / "copy" if path.is_dir() else to / "copy" / path.name


FINE = ("sound", "refused")


def verdict(path: Path, expected: dict[str, dict]) -> str:
    """What loading it comes to: "sound" (the sound model's shape), "refused" (in a sentence), or
    else what is wrong with that."""
    try:
        found = shapes_of(path)
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
        plain = type(error) in (ValueError, FileNotFoundError)
        sentence = 20 < len(message) < 4000 and "\n" not in message
        return "refused" if plain and sentence else f"no plain sentence: {error!r}"
    for name, shape in found.items():
        if shape != expected.get(name):
            return f"{name} is {shape}"
    lacking = expected.keys() - found.keys() - {"text_encoder_3"}
    return f"loaded without {lacking}" if lacking else "sound"


def change_json(data: st.DataObject, value: Any, fresh: st.SearchStrategy) -> Any:
    """A JSON value with one place in it replaced, removed, renamed or doubled."""
    value = copy.deepcopy(value)
    place, key = None, None
    while isinstance(value if place is None else place[key], dict | list):
        inner = value if place is None else place[key]
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        if not keys or (place is not None and data.draw(st.integers(0, 3)) == 0):
            break
        place, key = inner, data.draw(st.sampled_from(keys))
    if place is None:
        return data.draw(fresh)
    action = data.draw(st.sampled_from(["replace", "remove", "rename", "swap"]))
    other = data.draw(
        st.sampled_from(list(place) if isinstance(place, dict) else range(len(place)))
    )
    if action == "remove":
        del place[key]
    elif action == "rename" and isinstance(place, dict):
        place[data.draw(st.sampled_from([str(key) + "x", str(key)[:-1], ""]))] = place.pop(key)
    elif action == "swap":
        place[key], place[other] = place[other], place[key]
    else:
        place[key] = data.draw(fresh)
    return value


def split(raw: bytes) -> tuple[dict, bytes]:
    """Header and data of a safetensors file."""
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sound_files_load(layout: str, sound: Sound, tmp_path: Path) -> None:
    assert verdict(copied(sound[layout], tmp_path)[1], sound.shapes[layout]) == "sound"


@pytest.mark.parametrize("layout", LAYOUTS)
@given(data=st.data())
def test_damaged_bytes(layout: str, sound: Sound, tmp_path: Path, data: st.DataObject) -> None:
    folder, path = copied(sound[layout], tmp_path)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and "tokenizer" not in p.parent.name)
    file = data.draw(st.sampled_from(files))
    raw = bytearray(file.read_bytes())
    action = data.draw(st.sampled_from(["flip", "header", "cut", "grow", "overwrite", "empty"]))
    if action in ("flip", "header"):  # headers and pickles are where it hurts
        end = min(len(raw), 6000) if action == "header" else len(raw)
        for at in data.draw(st.lists(st.integers(0, end - 1), min_size=1, max_size=4)):
            raw[at] ^= data.draw(st.integers(1, 255))
    elif action == "cut":
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    elif action == "grow":
        raw += data.draw(st.binary(min_size=1, max_size=20))
    elif action == "overwrite":
        new = data.draw(st.binary(min_size=1, max_size=20))
        at = data.draw(st.integers(0, min(len(raw), 200)))
        raw[at : at + len(new)] = new
    else:
        raw.clear()
    file.write_bytes(raw)
    assert verdict(path, sound.shapes[layout]) in FINE


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "lumina pth"])
@given(data=st.data())
def test_damaged_headers(layout: str, sound: Sound, tmp_path: Path, data: st.DataObject) -> None:
    folder, path = copied(sound[layout], tmp_path)
    file = data.draw(st.sampled_from(sorted(folder.rglob("*.safetensors"))))
    header, rest = split(file.read_bytes())
    fresh = (
        NUMBERS | JSON | st.sampled_from(["F32", "F16", "BF16", "I16", "F8_E4M3", [0, 0], [2, 2]])
    )
    for _ in range(data.draw(st.integers(1, 2))):
        header = change_json(data, header, fresh)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + rest)
    result = verdict(path, sound.shapes[layout])
    assert result in FINE
    if result == "sound":  # then the library reads the same in it
        assert load_file(file).keys() == read_header(file).keys()


@pytest.mark.parametrize("layout", ["folder", "shards", "lumina folder"])
@given(data=st.data())
def test_damaged_json(layout: str, sound: Sound, tmp_path: Path, data: st.DataObject) -> None:
    folder, path = copied(sound[layout], tmp_path)
    file = data.draw(
        st.sampled_from(
            sorted(p for p in folder.rglob("*.json") if "tokenizer" not in p.parent.name)
        )
    )
    value = json.loads(file.read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        value = change_json(data, value, NUMBERS | JSON)
    file.write_text(json.dumps(value))
    assert verdict(path, sound.shapes[layout]) in FINE


@pytest.mark.parametrize("layout", LAYOUTS)
@given(data=st.data())
def test_missing_renamed_and_swapped_files(
    layout: str, sound: Sound, tmp_path: Path, data: st.DataObject
) -> None:
    folder, path = copied(sound[layout], tmp_path)
    places = sorted(p for p in folder.rglob("*") if "tokenizer" not in p.parent.name)
    place, other = (data.draw(st.sampled_from(places)) for _ in range(2))
    action = data.draw(st.sampled_from(["remove", "rename", "folder instead", "another's content"]))
    if action == "remove":
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    elif action == "rename":
        place.rename(place.with_name("x" + place.name))
    elif action == "folder instead" and place.is_file():
        place.unlink()
        place.mkdir()
    elif place.is_file() and other.is_file():
        place.write_bytes(other.read_bytes())
    assert verdict(path, sound.shapes[layout]) in FINE


@given(data=st.data())
def test_damaged_pickles(sound: Sound, tmp_path: Path, data: st.DataObject) -> None:
    folder, path = copied(sound["lumina pth"], tmp_path)
    state = torch.load(path)
    name = data.draw(st.sampled_from(sorted(state)))
    state[name] = data.draw(
        st.sampled_from(
            [
                None,
                3,
                "text",
                [state[name]],
                torch.zeros(1).expand(*state[name].shape),  # one value that claims to be many
                state[name].unsqueeze(0),
                state[name].int(),
                state[name].to_sparse(),
                torch.nn.Parameter(state[name]),
            ]
        )
    )
    torch.save(data.draw(st.sampled_from([state, {"model": state}, list(state.values())])), path)
    assert verdict(path, sound.shapes["lumina pth"]) in FINE
    args = data.draw(JSON)
    torch.save(args, folder / "model_args.pth")
    assert verdict(path, sound.shapes["lumina pth"]) == "refused"


def test_pickles_run_no_code(sound: Sound, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    _, path = copied(sound["lumina pth"], tmp_path)
    for target in (path, path.with_name("model_args.pth")):
        torch.save({"x": Trap()}, target)
        with pytest.raises(ValueError, match="cannot be read by torch.load"):
            load_component(path, "transformer")
    assert not (tmp_path / "sprung").exists()


@given(data=st.data())
def test_convert_of_damaged_files_leaves_nothing(
    sound, tmp_path: Path, data: st.DataObject
) -> None:
    folder, path = copied(sound["single"], tmp_path)
    header, rest = split(path.read_bytes())
    header = change_json(data, header, NUMBERS | JSON)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + rest)
    out = tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    try:
        convert(open_model(path), out)
    except (ValueError, FileNotFoundError):
        assert {p.name for p in tmp_path.iterdir()} == {"copy"}
    else:
        assert open_model(out).parts.keys() == open_model(path).parts.keys()
