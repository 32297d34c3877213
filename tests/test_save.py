"""minidit.save: what it writes is the official layout, and loads again as what was saved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS
from safetensors import safe_open
from safetensors.torch import load_file
from weight_files import T5, same_bits, stored, write_config, write_header

import minidit
import weights.save
from weights.files import COMPONENTS
from weights.load import open_model
from weights.save import convert

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


def test_a_home_folder_may_be_a_tilde(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    minidit.save(minidit.load(GOLDENS / "pipe_lumina"), "~/mine")
    assert minidit.load("~/mine").family == "lumina" and (tmp_path / "mine").is_dir()
    with pytest.raises(ValueError, match="folder is '~nobody-of-that-name/mine': "):
        minidit.save(minidit.load(GOLDENS / "pipe_lumina"), "~nobody-of-that-name/mine")


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


@pytest.mark.parametrize("case", ["pipe_sd3", "pipe_lumina"])
def test_large_networks_become_shards_with_an_index(case: str, tmp_path: Path, monkeypatch) -> None:
    """As the official libraries write them; from memory and from files alike."""
    pipe = minidit.load(GOLDENS / case)
    monkeypatch.setattr(weights.save, "MAX_SHARD", most := 100_000)
    minidit.save(pipe, tmp_path / "saved")
    convert(open_model(GOLDENS / case), tmp_path / "converted")
    for folder in (tmp_path / "saved", tmp_path / "converted"):
        sharded = 0
        for name in ("transformer", "vae", "text_encoder"):
            stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
            files = sorted((folder / name).glob("*.safetensors"))
            index = folder / name / f"{stem}.safetensors.index.json"
            assert index.is_file() == (len(files) > 1)
            if len(files) == 1:
                assert files[0].name == f"{stem}.safetensors"
                continue
            sharded += 1
            assert [file.name for file in files] == [
                f"{stem}-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
            ]
            values, total = json.loads(index.read_text()), 0
            for file in files:
                tensors = load_file(file)
                size = sum(tensor.nbytes for tensor in tensors.values())
                assert size <= most or len(tensors) <= 3  # one of ours: q, k and v at most
                assert {values["weight_map"][key] for key in tensors} == {file.name}
                total += size
            assert values["metadata"] == {"total_size": total}
        assert sharded
        again = minidit.load(folder)
        assert same_bits(again.transformer, pipe.transformer) and same_bits(again.vae, pipe.vae)
        assert same_bits(again.text_encoder, pipe.text_encoder)


def test_groups_of_a_size(monkeypatch) -> None:
    monkeypatch.setattr(weights.save, "MAX_SHARD", 10)
    sizes = {"a": 4, "b": 6, "c": 1, "large": 25, "d": 3, "e": 0, "f": 7}
    assert weights.save.split(sizes) == [["a", "b"], ["c"], ["large"], ["d", "e", "f"]]
    assert weights.save.split({"large": 25, "a": 1}) == [["large"], ["a"]]
    assert weights.save.split({"a": 1}) == [["a"]]


PEAK = """
import resource, sys
import weights.save
from weights.load import open_model
peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
weights.save.MAX_SHARD = int(sys.argv[3])
model = open_model(sys.argv[1])
weights.save.build(model.parts["text_encoder_3"])
before = peak()
weights.save.convert(model, sys.argv[2])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="measures with the resource module")
def test_converting_needs_little_more_than_a_shard(tmp_path: Path) -> None:
    config = replace(T5, vocab_size=4000, d_model=1024, d_ff=4096, num_layers=6)
    write_config(tmp_path / "in" / "text_encoder_3", "t5", config)
    shapes = {name: ["F16", *r.shape] for r in stored("t5", config) for name in r.names}
    write_header(tmp_path / "in" / "text_encoder_3" / "model.safetensors", shapes)
    shard = 2 * 10**7
    command = [sys.executable, "-c", PEAK, str(tmp_path / "in"), str(tmp_path / "out"), str(shard)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    written = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*.safetensors"))
    assert written > 8 * shard and int(done.stdout) < 3 * shard
