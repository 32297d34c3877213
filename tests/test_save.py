"""minidit.save: what it writes is the official layout, and loads again as what was saved."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS
from safetensors import safe_open
from weight_files import same_bits

import minidit
import weights.save
from weights.files import COMPONENTS

PIPES = ("pipe_sd3", "pipe_sd35_medium_no_t5", "pipe_lumina")


def shapes(folder: Path) -> dict[str, list[int]]:
    """Names and shapes of all tensors of a component folder."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_slice(name).get_shape() for name in file.keys()}
    return found


@pytest.mark.parametrize("case", PIPES)
def test_saved_pipelines_load_again_and_keep_the_official_names(case: str, tmp_path: Path) -> None:
    pipe = minidit.load(GOLDENS / case)
    minidit.save(pipe, tmp_path / "out")
    again = minidit.load(tmp_path / "out")
    assert again.scheduler == pipe.scheduler
    for name in COMPONENTS:
        one, other = getattr(pipe, name, None), getattr(again, name, None)
        assert (one is None) == (other is None), name
        if isinstance(one, torch.nn.Module):
            assert same_bits(one, other) and one.config == other.config
            assert shapes(tmp_path / "out" / name) == shapes(GOLDENS / case / name), name
        elif name.startswith("tokenizer") and one is not None:
            assert one.encode("a cat!") == other.encode("a cat!")
    for name in ("transformer", "vae"):  # the class, and every size that the official file has
        official, ours = (
            json.loads((folder / name / "config.json").read_text())
            for folder in (GOLDENS / case, tmp_path / "out")
        )
        for key in {"_class_name", *ours} & official.keys():
            assert ours[key] == official[key], (name, key)
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    official = json.loads((GOLDENS / case / "model_index.json").read_text())
    assert {k for k, v in index.items() if v == [None, None]} == {
        k for k, v in official.items() if v == [None, None] and k in COMPONENTS
    }


def test_networks_are_saved_in_the_type_that_is_asked_for(tmp_path: Path) -> None:
    pipe = minidit.load(GOLDENS / "pipe_lumina")
    minidit.save(pipe, tmp_path / "out", torch.float16)
    again = minidit.load(tmp_path / "out", dtype=torch.float16)
    for name, tensor in pipe.transformer.state_dict().items():
        assert torch.equal(tensor.half(), again.transformer.state_dict()[name])
    size = (tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
    values = sum(t.numel() for t in pipe.transformer.state_dict().values())
    assert size < 2.5 * values


def test_what_cannot_be_saved_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    pipe = minidit.load(GOLDENS / "pipe_lumina")
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="is there already"):
        minidit.save(pipe, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        minidit.save(pipe, tmp_path / "no" / "where")
    with pytest.raises(ValueError, match="a str is none of the networks"):
        minidit.save(type("Pipe", (), {"transformer": "x"}), tmp_path / "a")
    with pytest.raises(ValueError, match="the transformer is on the meta device"):
        minidit.save(minidit.load(GOLDENS / "pipe_lumina", "meta"), tmp_path / "a")
    pipe.tokenizer.folder = tmp_path / "gone"
    with pytest.raises(ValueError, match="the files of tokenizer are not there"):
        minidit.save(pipe, tmp_path / "a")
    pipe.tokenizer.folder = GOLDENS / "pipe_lumina" / "tokenizer"
    pipe.vae = None
    with pytest.raises(ValueError, match="has no vae, which Lumina-Next needs"):
        minidit.save(pipe, tmp_path / "a")
    pipe = minidit.load(GOLDENS / "pipe_lumina")
    monkeypatch.setattr(weights.save, "save_file", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        minidit.save(pipe, tmp_path / "a")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == []
