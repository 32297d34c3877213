"""Damaged files: a ValueError or FileNotFoundError with one sentence, or the right model.

Every layout of tiny models is damaged in bytes, headers and configs. What can still be loaded must
have the sound model's names and shapes: damage inside the numbers themselves cannot be seen.
fuzz.py does the same to as many files as one likes.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random

import corrupt
import pytest
import torch
from damaged import FINE, LAYOUTS, shapes_of, verdict, write_layouts
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from weights.files import read_header
from weights.load import load_component, open_model
from weights.save import convert

each_layout = pytest.mark.parametrize("layout", LAYOUTS)


class Sound(dict[str, Path]):
    """Where to load each layout's sound model from, and the shapes it then has."""

    shapes: dict[str, dict]

    def __repr__(self) -> str:  # what hypothesis prints with a failing example
        return "<sound models>"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    """A whole tiny model in every layout."""
    paths = Sound(write_layouts(tmp_path_factory.mktemp("sound")))
    paths.shapes = {layout: shapes_of(path) for layout, path in paths.items()}
    return paths


def copied(path: Path, to: Path) -> tuple[Path, Path]:
    """A fresh copy of a layout's folder: the folder, and what to load in it."""
    root = path if path.is_dir() else path.parent
    shutil.rmtree(to / "copy", ignore_errors=True)
    shutil.copytree(root, to / "copy")
    return to / "copy", to / "copy" if path.is_dir() else to / "copy" / path.name


def files(folder: Path, pattern: str = "*") -> list[Path]:
    """Files and folders of a model but for its tokenizers."""
    return sorted(p for p in folder.rglob(pattern) if "tokenizer" not in p.parent.name)


@each_layout
def test_sound_files_load(layout: str, sound: Sound, tmp_path: Path) -> None:
    assert verdict(copied(sound[layout], tmp_path)[1], sound.shapes[layout]) == "sound"


@each_layout
@given(rng=st.randoms())
def test_damaged_bytes(layout: str, sound: Sound, tmp_path: Path, rng: Random) -> None:
    folder, path = copied(sound[layout], tmp_path)
    file = rng.choice([place for place in files(folder) if place.is_file()])
    file.write_bytes(corrupt.damage_bytes(file.read_bytes(), rng))
    assert verdict(path, sound.shapes[layout]) in FINE


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "lumina pth"])
@given(rng=st.randoms())
def test_damaged_headers(layout: str, sound: Sound, tmp_path: Path, rng: Random) -> None:
    folder, path = copied(sound[layout], tmp_path)
    file = rng.choice(files(folder, "*.safetensors"))
    file.write_bytes(corrupt.damage_header(file.read_bytes(), rng))
    result = verdict(path, sound.shapes[layout])
    assert result in FINE
    if result == "sound":  # then the library reads the same in it
        assert load_file(file).keys() == read_header(file).keys()


@pytest.mark.parametrize("layout", ["folder", "shards", "lumina folder"])
@given(rng=st.randoms())
def test_damaged_json(layout: str, sound: Sound, tmp_path: Path, rng: Random) -> None:
    folder, path = copied(sound[layout], tmp_path)
    file = rng.choice(files(folder, "*.json"))
    file.write_bytes(corrupt.damage_json_file(file.read_bytes(), rng))
    assert verdict(path, sound.shapes[layout]) in FINE


@each_layout
@given(rng=st.randoms())
def test_missing_renamed_and_swapped_files(
    layout: str, sound: Sound, tmp_path: Path, rng: Random
) -> None:
    folder, path = copied(sound[layout], tmp_path)
    corrupt.damage_places(files(folder), rng)
    assert verdict(path, sound.shapes[layout]) in FINE


@given(rng=st.randoms())
def test_damaged_pickles(sound: Sound, tmp_path: Path, rng: Random) -> None:
    folder, path = copied(sound["lumina pth"], tmp_path)
    file = rng.choice([path, folder / "model_args.pth"])
    way = rng.choice([corrupt.damage_pickle, corrupt.damage_zip])
    file.write_bytes(way(file.read_bytes(), rng))
    assert verdict(path, sound.shapes["lumina pth"]) in FINE


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


@given(rng=st.randoms())
def test_convert_of_damaged_files_leaves_nothing(sound, tmp_path: Path, rng: Random) -> None:
    folder, path = copied(sound["single"], tmp_path)
    path.write_bytes(corrupt.damage_header(path.read_bytes(), rng))
    out = tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    try:
        convert(open_model(path), out)
    except (ValueError, FileNotFoundError):
        assert {p.name for p in tmp_path.iterdir()} == {"copy"}
    else:
        assert open_model(out).parts.keys() == open_model(path).parts.keys()
