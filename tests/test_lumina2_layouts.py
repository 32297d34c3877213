"""Lumina-Image 2.0 in both published layouts: tiny models to the bit."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from weight_files import GOLDENS, Tensors, manifests, same_bits, write_header

import minidit
from minidit.scheduler import SchedulerConfig
from weights.__main__ import main
from weights.load import load_component, load_parts, open_model

FOLDER = GOLDENS / "pipe_lumina2"
OFFICIAL = SchedulerConfig(shift=6.0, spacing="even", default_steps=30, default_guidance=4.0)


def to_alpha(tensors: Tensors) -> Tensors:
    """The transformer from the diffusers to Alpha-VLLM's names and forms."""
    out: Tensors = {}
    for key, tensor in tensors.items():
        for old, new in (
            (r"^time_caption_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
            (r"^time_caption_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
            (r"^time_caption_embed.caption_embedder", "cap_embedder"),
            (r"^norm_out.linear_1", "final_layer.adaLN_modulation.1"),
            (r"^norm_out.linear_2", "final_layer.linear"),
            (r"attn.norm_([qk])", r"attention.\1_norm"),
            (r"attn.to_out.0", "attention.out"),
            (r"feed_forward.linear_", "feed_forward.w"),
            (r"\.norm1.linear", ".adaLN_modulation.1"),
            (r"\.norm1(.norm)?\.weight", ".attention_norm1.weight"),
            (r"\.norm2", ".attention_norm2"),
        ):
            key = re.sub(old, new, key)
        out[key] = tensor
    for key in [key for key in out if key.endswith("attn.to_q.weight")]:
        block = key.removesuffix("attn.to_q.weight")
        rows = [out.pop(f"{block}attn.to_{x}.weight") for x in "qkv"]
        out[f"{block}attention.qkv.weight"] = torch.cat(rows)
    out["norm_final.weight"] = torch.ones(len(tensors["x_embedder.weight"]))  # nothing uses it
    return out


@pytest.fixture
def tensors() -> Tensors:
    return load_file(FOLDER / "transformer" / "diffusion_pytorch_model.safetensors")


def write_original(folder: Path, tensors: Tensors, end: str = "safetensors") -> Path:
    """The single file, with the other parts of the model beside it."""
    path = folder / f"consolidated.00-of-01.{end}"
    tensors = to_alpha(tensors)
    save_file(tensors, path) if end == "safetensors" else torch.save(tensors, path)
    for name in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(FOLDER / name, folder / name)
    return path


def test_names_are_those_of_the_official_file(tensors) -> None:
    """Ours for three layers and two refiners against the official 26 and two."""
    official = manifests()["lumina_image_2_original"]["files"]["consolidated.00-of-01.safetensors"]
    few = {name for name in official if not re.match(r"layers\.([3-9]|\d\d)", name)}
    assert to_alpha(tensors).keys() == few


@pytest.mark.parametrize("end", ["safetensors", "pth"])
def test_the_original_file_is_the_folder(end, tensors, tmp_path) -> None:
    path = write_original(tmp_path, tensors, end)
    for place in (path, tmp_path):  # the file, and the folder that it is in
        family, parts = load_parts(place)
        assert family == "lumina2" and parts["scheduler"] == OFFICIAL
        _, expected = load_parts(FOLDER)
        for name in ("transformer", "vae", "text_encoder"):
            assert same_bits(parts[name], expected[name]), name
        # positions in the tiny folder end earlier: sizes tell nothing of that
        config = replace(parts["transformer"].config, axes_lens=(300, 64, 64), sample_size=8)
        assert config == replace(expected["transformer"].config, multiple_of=config.multiple_of)


def test_layers_are_counted(tensors, tmp_path) -> None:
    few = {k: v for k, v in to_alpha(tensors).items() if not re.search(r"refiner\.1|layers\.2", k)}
    save_file(few, tmp_path / "few.safetensors")
    config = load_component(tmp_path / "few.safetensors", "transformer").config
    assert (config.num_refiner_layers, config.num_layers) == (1, 2)


def test_files_without_the_unused_norm_or_behind_a_prefix(tensors, tmp_path) -> None:
    """As others have published them again."""
    bare = {k: v for k, v in to_alpha(tensors).items() if k != "norm_final.weight"}
    save_file(bare, tmp_path / "bare.safetensors")
    behind = {"model.diffusion_model." + key: tensor for key, tensor in bare.items()}
    save_file(behind, tmp_path / "behind.safetensors")
    expected = load_component(FOLDER, "transformer")
    for file in ("bare.safetensors", "behind.safetensors"):
        assert same_bits(load_component(tmp_path / file, "transformer"), expected)


def test_the_original_file_converts_to_what_diffusers_writes(tensors, tmp_path, capsys) -> None:
    path = write_original(tmp_path, tensors)
    assert main(["inspect", str(path)]) == 0
    said = capsys.readouterr().out
    assert "Lumina-Image 2.0, single file" in said and "nothing is missing" in said
    assert main(["convert", str(path), str(tmp_path / "out")]) == 0
    written = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(written[key].equal(tensors[key]) for key in tensors)
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    official = json.loads((FOLDER / "model_index.json").read_text())
    assert {**official, "_diffusers_version": 0} == {**index, "_diffusers_version": 0}
    assert minidit.load(tmp_path / "out").scheduler == OFFICIAL


def test_a_saved_pipeline_is_read_again(tmp_path) -> None:
    pipe = minidit.load(FOLDER)
    minidit.save(pipe, tmp_path / "out")
    again = minidit.load(tmp_path / "out")
    for name in ("transformer", "vae", "text_encoder"):
        assert same_bits(getattr(again, name), getattr(pipe, name))
        assert getattr(again, name).config == getattr(pipe, name).config
    config = json.loads((tmp_path / "out" / "text_encoder" / "config.json").read_text())
    assert config["architectures"] == ["Gemma2Model"] and config["model_type"] == "gemma2"
    assert again.scheduler == pipe.scheduler == OFFICIAL


def test_a_gemma_of_the_first_generation_is_refused(tmp_path) -> None:
    shutil.copytree(FOLDER, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "text_encoder")
    shutil.copytree(GOLDENS / "pipe_lumina" / "text_encoder", tmp_path / "model" / "text_encoder")
    with pytest.raises(ValueError, match="text_encoder is a gemma, but its transformer needs a ge"):
        open_model(tmp_path / "model")


def test_a_strange_mlp_is_named(tensors, tmp_path) -> None:
    header = {name: ["BF16", *t.shape] for name, t in to_alpha(tensors).items()}
    header["layers.0.feed_forward.w1.weight"] = ["BF16", 33, 48]
    write_header(tmp_path / "m.safetensors", header)
    with pytest.raises(ValueError, match="the MLP is 33 wide, which does not follow from a width"):
        open_model(tmp_path / "m.safetensors")
