"""FLUX.1 in both published layouts: tiny models to the bit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from weight_files import CLASS, Tensors, manifests, random_tensors, same_bits, write_header

from minidit.flux import FluxConfig
from weights.flux import FAMILY
from weights.load import load_component, read_parts

FLUX = FluxConfig(
    in_channels=64, num_layers=2, num_single_layers=2, num_attention_heads=2,
    attention_head_dim=32, joint_attention_dim=24, pooled_projection_dim=64, guidance_embeds=True,
    axes_dims_rope=(4, 14, 14),
)  # fmt: skip


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


def test_both_layouts_of_the_transformer_give_the_same(tmp_path: Path) -> None:
    tensors = random_tensors("flux", FLUX)
    save_file(to_bfl(tensors), tmp_path / "flux1-dev.safetensors")
    folder = tmp_path / "transformer"
    folder.mkdir()
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    config = {**CLASS["flux"], **vars(FLUX)}
    (folder / "config.json").write_text(json.dumps(config))
    single = load_component(tmp_path / "flux1-dev.safetensors", "transformer")
    diffusers = load_component(tmp_path, "transformer")
    assert single.config == diffusers.config == FLUX
    assert same_bits(single, diffusers)


def test_sizes_read_from_official_shapes(tmp_path: Path) -> None:
    for name in ("dev", "schnell"):
        file = f"flux1-{name}.safetensors"
        write_header(tmp_path / file, manifests()[f"bfl_flux1_{name}"]["files"][file])
        (part,) = read_parts(tmp_path / file)
        assert part.config == FluxConfig(guidance_embeds=name == "dev")
    write_header(
        tmp_path / "ae.safetensors", manifests()["bfl_flux1_ae"]["files"]["ae.safetensors"]
    )
    official = manifests()["diffusers_flux1_vae"]["config"]
    read = vars(read_parts(tmp_path / "ae.safetensors")[0].config) | FAMILY.latents
    for key in official.keys() & read.keys():
        value = tuple(official[key]) if isinstance(official[key], list) else official[key]
        assert read[key] == value, key
