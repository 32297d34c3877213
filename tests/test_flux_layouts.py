"""FLUX.1 in both published layouts: tiny models to the bit."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from weight_files import (
    CLASS,
    CLIP_L,
    GOLDENS,
    T5,
    VAE,
    Tensors,
    manifests,
    random_tensors,
    same_bits,
    to_sai,
    write_header,
)

import minidit
from minidit.flux import FluxConfig
from minidit.scheduler import SchedulerConfig
from weights.__main__ import main
from weights.flux import FAMILY
from weights.load import load_component, load_parts

FLUX = FluxConfig(
    in_channels=64, num_layers=2, num_single_layers=2, num_attention_heads=2,
    attention_head_dim=32, joint_attention_dim=192, pooled_projection_dim=64, guidance_embeds=True,
    axes_dims_rope=(4, 14, 14),
)  # fmt: skip
PARTS = {
    "transformer": ("flux", FLUX),
    "vae": ("vae", replace(VAE, scaling_factor=0.3611, shift_factor=0.1159)),
    "text_encoder": ("clip", CLIP_L),
    "text_encoder_2": ("t5", T5),
}
FILES = {  # of the single file's layout
    "transformer": "flux1-dev.safetensors",
    "vae": "ae.safetensors",
    "text_encoder": "clip_l.safetensors",
    "text_encoder_2": "t5xxl_fp16.safetensors",
}
TOKENIZERS = {"tokenizer": "tok_clip_pad_bang", "tokenizer_2": "tok_t5_tiny"}
SCHEDULER = {  # dev's, as it is published
    "_class_name": "FlowMatchEulerDiscreteScheduler", "base_image_seq_len": 256, "base_shift": 0.5,
    "max_image_seq_len": 4096, "max_shift": 1.15, "num_train_timesteps": 1000, "shift": 3.0,
    "use_dynamic_shifting": True,
}  # fmt: skip
DEV = SchedulerConfig(
    shift=3.0, use_dynamic_shifting=True, spacing="even", default_steps=28, default_guidance=3.5
)


def flux_tensors() -> dict[str, Tensors]:
    """A tiny FLUX dev; its CLIP has no projection."""
    parts = {
        name: random_tensors(kind, config, seed, torch.bfloat16)
        for seed, (name, (kind, config)) in enumerate(PARTS.items())
    }
    del parts["text_encoder"]["text_projection.weight"]
    return parts


def write_folder(folder: Path, parts: dict[str, Tensors]) -> Path:
    """A whole repository in the diffusers layout."""
    for name, tensors in parts.items():
        kind, config = PARTS[name]
        values = CLASS[kind] | asdict(config)
        if kind == "clip":
            values["architectures"] = ["CLIPTextModel"]
        stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(values))
        save_file(tensors, folder / name / f"{stem}.safetensors", {"format": "pt"})
    write_small_files(folder)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    index = {name: ["library", cls] for name, cls in FAMILY.components.items()}
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_small_files(folder: Path) -> None:
    for name, golden in TOKENIZERS.items():
        shutil.copytree(GOLDENS / golden / "tokenizer", folder / name)


def write_files(folder: Path, parts: dict[str, Tensors]) -> Path:
    """The single files, as they are published."""
    folder.mkdir(exist_ok=True)
    for name, file in FILES.items():
        if name in parts:
            write = {"transformer": to_bfl, "vae": lambda t: to_sai("vae", t)}
            tensors = write.get(name, lambda t: t)(parts[name])
            save_file({k: t.contiguous() for k, t in tensors.items()}, folder / file)
    return folder / FILES["transformer"]


def to_bfl(tensors: Tensors) -> Tensors:
    """The transformer from the diffusers to Black Forest Labs' names and forms."""
    out: Tensors = {}
    for key, tensor in tensors.items():
        for old, new in (
            (r"^context_embedder", "txt_in"),
            (r"^x_embedder", "img_in"),
            (r"^time_text_embed.timestep_embedder", "time_in"),
            (r"^time_text_embed.guidance_embedder", "guidance_in"),
            (r"^time_text_embed.text_embedder", "vector_in"),
            (r"linear_1", "in_layer"),
            (r"linear_2", "out_layer"),
            (r"^norm_out.linear", "final_layer.adaLN_modulation.1"),
            (r"^proj_out", "final_layer.linear"),
            (r"^single_transformer_blocks", "single_blocks"),
            (r"^transformer_blocks", "double_blocks"),
            (r"(single_blocks.\d+).attn.norm_q.weight", r"\1.norm.query_norm.scale"),
            (r"(single_blocks.\d+).attn.norm_k.weight", r"\1.norm.key_norm.scale"),
            (r"(single_blocks.\d+).norm.linear", r"\1.modulation.lin"),
            (r"(single_blocks.\d+).proj_out", r"\1.linear2"),
            (r"attn.norm_q.weight", "img_attn.norm.query_norm.scale"),
            (r"attn.norm_k.weight", "img_attn.norm.key_norm.scale"),
            (r"attn.norm_added_q.weight", "txt_attn.norm.query_norm.scale"),
            (r"attn.norm_added_k.weight", "txt_attn.norm.key_norm.scale"),
            (r"attn.to_out.0", "img_attn.proj"),
            (r"attn.to_add_out", "txt_attn.proj"),
            (r"norm1_context.linear", "txt_mod.lin"),
            (r"norm1.linear", "img_mod.lin"),
            (r"ff_context.net.0.proj", "txt_mlp.0"),
            (r"ff_context.net.2", "txt_mlp.2"),
            (r"ff.net.0.proj", "img_mlp.0"),
            (r"ff.net.2", "img_mlp.2"),
        ):
            key = re.sub(old, new, key)
        if "adaLN" in key:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        out[key] = tensor
    for leaf in ("weight", "bias"):
        for i in range(FLUX.num_layers):
            for stream, name in (("img", "to_{}"), ("txt", "add_{}_proj")):
                rows = [out.pop(f"double_blocks.{i}.attn.{name.format(x)}.{leaf}") for x in "qkv"]
                out[f"double_blocks.{i}.{stream}_attn.qkv.{leaf}"] = torch.cat(rows)
        for i in range(FLUX.num_single_layers):
            rows = [out.pop(f"single_blocks.{i}.attn.to_{x}.{leaf}") for x in "qkv"]
            rows.append(out.pop(f"single_blocks.{i}.proj_mlp.{leaf}"))
            out[f"single_blocks.{i}.linear1.{leaf}"] = torch.cat(rows)
    return out


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A tiny FLUX dev as a folder, and loaded from it."""
    folder = write_folder(tmp_path_factory.mktemp("flux") / "model", flux_tensors())
    return folder, load_parts(folder)[1]


def differences(path: Path, expected: dict, **options: object) -> list[str]:
    """The parts of the model at path that are not, bit for bit and config for config, expected."""
    family, loaded = load_parts(path, **options)
    assert family == "flux"
    wrong = sorted(loaded.keys() ^ expected.keys())
    for name in loaded.keys() & expected.keys():
        part, other = expected[name], loaded[name]
        if name == "scheduler":
            same = other == part
        elif isinstance(part, torch.nn.Module):
            same = same_bits(other, part) and other.config == part.config
        else:
            same = type(other) is type(part)
        wrong += [] if same else [name]
    return wrong


def test_folder(flux) -> None:
    parts = flux[1]
    assert parts["transformer"].config == FLUX and parts["scheduler"] == DEV
    assert parts["text_encoder"].projection.weight.equal(torch.eye(64))
    assert load_component(flux[0], "scheduler") == DEV
    assert type(parts["tokenizer_2"]) is not type(parts["tokenizer"])


def test_single_files_beside_each_other(flux, tmp_path: Path) -> None:
    path = write_files(tmp_path, flux_tensors())
    write_small_files(tmp_path)
    assert not differences(path, flux[1])
    assert not differences(tmp_path, flux[1])  # the folder that the files are in


def test_single_files_named(flux, tmp_path: Path) -> None:
    parts = flux_tensors()
    path = write_files(tmp_path / "a", {"transformer": parts.pop("transformer")})
    extra = []
    for i, (name, tensors) in enumerate(parts.items()):  # told apart by tensors, not by names
        extra.append(tmp_path / f"{i}.safetensors")
        tensors = to_sai(name, tensors) if name == "vae" else tensors
        save_file({k: t.contiguous() for k, t in tensors.items()}, extra[-1])
    write_small_files(tmp_path / "b")
    assert not differences(path, flux[1], extra=[*extra, tmp_path / "b"])


def test_names_with_the_prefix_of_other_programs(flux, tmp_path: Path) -> None:
    tensors = to_bfl(flux_tensors()["transformer"])
    path = tmp_path / "any.safetensors"
    save_file({"model.diffusion_model." + k: t for k, t in tensors.items()}, path)
    assert same_bits(load_component(path, "transformer"), flux[1]["transformer"])


def test_a_clip_without_a_projection_is_as_wide_as_it_is_whatever_its_config_says(
    flux, tmp_path: Path
) -> None:
    shutil.copytree(flux[0] / "text_encoder", tmp_path / "text_encoder")
    path = tmp_path / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"projection_dim": 512}))
    clip = load_component(tmp_path, "text_encoder")
    assert clip.projection.weight.equal(torch.eye(64)) and clip.config.projection_dim == 64


def test_the_projection_of_a_clip_that_has_one_is_not_used(flux, tmp_path: Path) -> None:
    parts = flux_tensors()
    parts["text_encoder"]["text_projection.weight"] = torch.ones(64, 64, dtype=torch.bfloat16)
    folder = write_folder(tmp_path / "folder", parts)
    config = folder / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace("CLIPTextModel", "CLIPTextModelWithProjection"))
    assert not differences(folder, flux[1])

    sizes = {"hidden_size": 768, "projection_dim": 768, "num_attention_heads": 12}
    wide = replace(CLIP_L, **sizes, num_hidden_layers=1, vocab_size=50)  # as wide as CLIP-L is
    transformer = random_tensors("flux", replace(FLUX, pooled_projection_dim=768))
    files = {"transformer": transformer, "text_encoder": random_tensors("clip", wide)}
    clip = load_component(write_files(tmp_path / "files", files), "text_encoder")
    assert clip.projection.weight.equal(torch.eye(768)) and clip.config == wide


def test_schnell_is_told_by_its_tensors(tmp_path: Path) -> None:
    config = replace(FLUX, guidance_embeds=False)
    path = write_files(tmp_path, {"transformer": random_tensors("flux", config)})
    scheduler = load_component(path, "scheduler")
    assert scheduler == SchedulerConfig(
        spacing="even", default_steps=4, corrected_steps=4, default_guidance=1.0
    )
    with pytest.raises(FileNotFoundError) as error:
        load_parts(path)
    for what in ("vae (ae.safetensors or a folder", "clip_l.safetensors or", "t5xxl_fp16.safeten",
                 "tokenizer_2 (a folder tokenizer_2 with the small files spiece.model",
                 "hf download black-forest-labs/FLUX.1-schnell"):  # fmt: skip
        assert what in str(error.value)


def test_convert_and_inspect(flux, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write_files(tmp_path / "files", flux_tensors())
    write_small_files(tmp_path / "files")
    out = tmp_path / "out"
    assert main(["convert", str(path), str(out)]) == 0
    assert not differences(out, flux[1])
    for name, tensors in flux_tensors().items():  # as diffusers would have written it
        stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
        written = load_file(out / name / f"{stem}.safetensors")
        assert written.keys() == tensors.keys()
        assert all(written[key].equal(tensors[key]) for key in tensors), name
    index = json.loads((out / "model_index.json").read_text())
    assert index["_class_name"] == "FluxPipeline"
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 0
    said = capsys.readouterr().out
    for what in ("FLUX.1, folder", "2 double and 2 single layers of width 64", "shift by size",
                 "nothing is missing"):  # fmt: skip
        assert what in said, said


def test_saved_and_loaded_again(flux, tmp_path: Path) -> None:
    minidit.save(minidit.load(flux[0], dtype=torch.bfloat16), tmp_path / "out")
    assert not differences(tmp_path / "out", flux[1])


def test_parts_of_different_models_do_not_mix(tmp_path: Path) -> None:
    parts = flux_tensors()
    parts["text_encoder_2"] = random_tensors("t5", replace(T5, d_model=128))
    path = write_files(tmp_path, parts)
    with pytest.raises(ValueError, match="joint_attention_dim is 192, but .* gives 128"):
        load_parts(path)


@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_official_files_load_on_the_meta_device(name: str, tmp_path: Path) -> None:
    """Every name and shape of the published repository, and of the published single files."""
    folder, single = tmp_path / "folder", tmp_path / "single"
    single.mkdir()
    for component, manifest in {
        "transformer": f"diffusers_flux1_{name}_transformer",
        "vae": "diffusers_flux1_vae",
        "text_encoder": "diffusers_flux1_text_encoder",
        "text_encoder_2": "diffusers_flux1_text_encoder_2",
    }.items():
        official = manifests()[manifest]
        (folder / component).mkdir(parents=True)
        (folder / component / "config.json").write_text(json.dumps(official["config"]))
        for file, tensors in official["files"].items():
            write_header(folder / component / file, tensors)
    for manifest in (f"bfl_flux1_{name}", "bfl_flux1_ae", "sai_clip_l", "sai_t5xxl_fp16"):
        for file, tensors in manifests()[manifest]["files"].items():
            write_header(single / file, tensors)
    write_small_files(folder)
    write_small_files(single)
    (folder / "scheduler").mkdir()
    values = SCHEDULER if name == "dev" else SCHEDULER | {"shift": 1, "use_dynamic_shifting": False}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(values))
    pipes = [minidit.load(path, device="meta") for path in (folder, single)]
    for pipe in pipes:
        assert pipe.family == "flux"
        assert pipe.transformer.config == FluxConfig(guidance_embeds=name == "dev")
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        one, other = (getattr(pipe, part) for pipe in pipes)
        assert one.config == other.config, part
        shapes = [{k: t.shape for k, t in m.state_dict().items()} for m in (one, other)]
        assert shapes[0] == shapes[1], part
    assert pipes[0].scheduler == pipes[1].scheduler
