"""Tiny models in every published layout, for the tests of `weights`.

The diffusers folder is the starting point: its names are the ones that the golden tests of the
networks check. The other layouts are made from its tensors by the renames below, which are written
on their own and not by the tables that they test.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from minidit.clip import CLIPConfig
from minidit.gemma import GemmaConfig
from minidit.mmdit import MMDiTConfig
from minidit.nextdit import NextDiTConfig
from minidit.t5 import T5Config
from minidit.vae import VAEConfig
from weights.files import DTYPES
from weights.keymap import Recipe
from weights.networks import NETWORKS, plan_of

GOLDENS = Path(__file__).parent / "goldens"
Tensors = dict[str, torch.Tensor]
MMDIT = MMDiTConfig(
    sample_size=16, in_channels=16, out_channels=16, num_layers=3, num_attention_heads=2,
    attention_head_dim=64, joint_attention_dim=192, caption_projection_dim=128,
    pooled_projection_dim=192, pos_embed_max_size=8, qk_norm="rms_norm",
    dual_attention_layers=(0, 1),
)  # fmt: skip
NEXTDIT = NextDiTConfig(
    sample_size=16, patch_size=2, in_channels=4, hidden_size=48, num_layers=2,
    num_attention_heads=4, num_kv_heads=2, multiple_of=256, cross_attention_dim=24,
)  # fmt: skip
VAE = VAEConfig(
    latent_channels=16, block_out_channels=(32, 64), layers_per_block=1, sample_size=1024,
    down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
)  # fmt: skip
CLIP_L = CLIPConfig(
    vocab_size=1200, hidden_size=64, intermediate_size=80, projection_dim=64, num_hidden_layers=2,
    num_attention_heads=1, hidden_act="quick_gelu", eos_token_id=2,
)  # fmt: skip
CLIP_G = CLIPConfig(
    vocab_size=1200, hidden_size=128, intermediate_size=96, projection_dim=128, num_hidden_layers=2,
    num_attention_heads=2, hidden_act="gelu", eos_token_id=2,
)  # fmt: skip
T5 = T5Config(vocab_size=900, d_model=192, d_kv=16, d_ff=48, num_layers=2, num_heads=2)
GEMMA = GemmaConfig(
    vocab_size=800, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=8,
)  # fmt: skip
SD3 = {
    "transformer": ("mmdit", MMDIT),
    "vae": ("vae", VAE),
    "text_encoder": ("clip", CLIP_L),
    "text_encoder_2": ("clip", CLIP_G),
    "text_encoder_3": ("t5", T5),
}
LUMINA = {
    "transformer": ("nextdit", NEXTDIT),
    "vae": ("vae", VAEConfig(block_out_channels=(32, 64), scaling_factor=0.13025)),
    "text_encoder": ("gemma", GEMMA),
}
CLASS = {
    "mmdit": {"_class_name": "SD3Transformer2DModel"},
    "nextdit": {"_class_name": "LuminaNextDiT2DModel"},
    "flux": {"_class_name": "FluxTransformer2DModel"},
    "vae": {"_class_name": "AutoencoderKL"},
    "clip": {"architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model"},
    "t5": {"architectures": ["T5EncoderModel"], "model_type": "t5"},
    "gemma": {"architectures": ["GemmaModel"], "model_type": "gemma"},
}
TOKENIZERS = {  # of the goldens
    "tokenizer": "tok_clip_pad_bang",
    "tokenizer_2": "tok_clip_pad_bang",
    "tokenizer_3": "tok_t5_tiny",
}
PREFIXES = {
    "transformer": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
    "text_encoder_3": "text_encoders.t5xxl.transformer.",
}


def manifests() -> dict[str, dict]:
    """The official files: {manifest: {"files": {file: {name: [dtype, *shape]}}, "config"}}."""
    found = {}
    for path in sorted((GOLDENS / "manifests").glob("*.json.gz")):
        found |= json.loads(gzip.decompress(path.read_bytes()))
    return found


def write_header(path: Path, tensors: dict[str, list]) -> None:
    """A safetensors file with a real header and no data: a hole as large as the official file."""
    header, end = {}, 0
    for name, (dtype, *shape) in tensors.items():
        size = DTYPES[dtype].itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def stored(kind: str, config: object) -> list[Recipe]:
    """Names and shapes of a network's tensors in the diffusers layout."""
    with torch.device("meta"):
        module = NETWORKS[kind].module(config)
    return list(plan_of(kind, "diffusers", module).values())


def random_tensors(
    kind: str, config: object, seed: int = 0, dtype: torch.dtype = torch.float16
) -> Tensors:
    """A network's tensors under their diffusers names, with random values."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for recipe in stored(kind, config):
        for name in recipe.names:
            tensors[name] = torch.randn(recipe.shape, generator=generator).to(dtype)
        if recipe.copy:
            tensors[recipe.copy] = tensors[recipe.names[0]].clone()
    return tensors


def sd3_tensors() -> dict[str, Tensors]:
    """A tiny SD3.5; CLIP-L's projection is the identity, as in the official files."""
    parts = {
        name: random_tensors(kind, config, seed)
        for seed, (name, (kind, config)) in enumerate(SD3.items())
    }
    parts["text_encoder"]["text_projection.weight"] = torch.eye(64, dtype=torch.float16)
    return parts


def lumina_tensors() -> dict[str, Tensors]:
    """A tiny Lumina-Next in bfloat16."""
    return {
        name: random_tensors(kind, config, seed, torch.bfloat16)
        for seed, (name, (kind, config)) in enumerate(LUMINA.items())
    }


def write_component(folder: Path, name: str, kind: str, config: object, tensors: Tensors) -> None:
    """One subfolder of the diffusers layout."""
    write_config(folder, kind, config)
    stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
    save_file(tensors, folder / f"{stem}.safetensors", {"format": "pt"})


def write_config(folder: Path, kind: str, config: object) -> None:
    """A component's folder with only its config.json."""
    folder.mkdir(parents=True)
    values = {**CLASS[kind], **asdict(config)}
    (folder / "config.json").write_text(json.dumps(values))


def write_folder(folder: Path, family: str, parts: dict[str, Tensors]) -> Path:
    """A whole repository in the diffusers layout."""
    kinds = SD3 if family == "sd3" else LUMINA
    for name, tensors in parts.items():
        write_component(folder / name, name, *kinds[name], tensors)
    write_tokenizers(folder, family)
    (folder / "scheduler").mkdir()
    shift = 3.0 if family == "sd3" else 1.0
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    tokenizers = list(TOKENIZERS) if family == "sd3" else ["tokenizer"]
    index = {name: ["library", "Class"] for name in [*parts, *tokenizers, "scheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_tokenizers(folder: Path, family: str) -> None:
    """The tokenizers' folders of a family."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = TOKENIZERS if family == "sd3" else {"tokenizer": "tok_gemma_tiny"}
    for name, golden in kinds.items():
        shutil.copytree(GOLDENS / golden / "tokenizer", folder / name)


def to_sai(name: str, tensors: Tensors) -> Tensors:
    """One component from the diffusers to Stability AI's names and forms."""
    if name == "transformer":
        return _mmdit_to_sai(tensors)
    if name == "vae":
        return dict(_vae_to_sai(key, tensor) for key, tensor in tensors.items())
    out = dict(tensors)
    if name == "text_encoder":
        del out["text_projection.weight"]
    if name == "text_encoder_3":
        out["encoder.embed_tokens.weight"] = out["shared.weight"].clone()
    return out


def _mmdit_to_sai(tensors: Tensors) -> Tensors:
    out: Tensors = {}
    last = MMDIT.num_layers - 1
    simple = {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "proj_out": "final_layer.linear",
        "context_embedder": "context_embedder",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
    }
    block = {
        "attn.to_out.0": "x_block.attn.proj",
        "attn.norm_q": "x_block.attn.ln_q",
        "attn.norm_k": "x_block.attn.ln_k",
        "attn2.to_out.0": "x_block.attn2.proj",
        "attn2.norm_q": "x_block.attn2.ln_q",
        "attn2.norm_k": "x_block.attn2.ln_k",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff.net.2": "x_block.mlp.fc2",
        "norm1.linear": "x_block.adaLN_modulation.1",
        "attn.to_add_out": "context_block.attn.proj",
        "attn.norm_added_q": "context_block.attn.ln_q",
        "attn.norm_added_k": "context_block.attn.ln_k",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
        "norm1_context.linear": "context_block.adaLN_modulation.1",
    }
    fused = {"attn.to_{}": "x_block.attn", "attn2.to_{}": "x_block.attn2"}
    fused["attn.add_{}_proj"] = "context_block.attn"
    for key, tensor in tensors.items():
        module, _, leaf = key.rpartition(".")
        if key == "pos_embed.pos_embed":
            out["pos_embed"] = tensor
        elif match := re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module):
            number, rest = match.groups()
            if rest in block:
                if rest == "norm1_context.linear" and int(number) == last:
                    tensor = torch.cat(tensor.chunk(2)[::-1])
                out[f"joint_blocks.{number}.{block[rest]}.{leaf}"] = tensor
        else:
            if module == "norm_out.linear":
                tensor = torch.cat(tensor.chunk(2)[::-1])
            out[f"{simple[module]}.{leaf}"] = tensor
    for number in range(last + 1):
        for pattern, name in fused.items():
            for leaf in ("weight", "bias"):
                start = f"transformer_blocks.{number}."
                keys = [f"{start}{pattern.format(letter)}.{leaf}" for letter in "qkv"]
                if keys[0] in tensors:
                    qkv = torch.cat([tensors[key] for key in keys])
                    out[f"joint_blocks.{number}.{name}.qkv.{leaf}"] = qkv
    return out


def _vae_to_sai(key: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    levels = len(VAE.block_out_channels)
    key = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", key)
    for old, new in (
        ("down_blocks.", "down."),
        ("mid_block.resnets.0", "mid.block_1"),
        ("mid_block.resnets.1", "mid.block_2"),
        ("mid_block.attentions.0", "mid.attn_1"),
        ("group_norm", "norm"),
        ("to_out.0", "proj_out"),
        ("to_", ""),
        ("resnets.", "block."),
        ("downsamplers.0", "downsample"),
        ("upsamplers.0", "upsample"),
        ("conv_shortcut", "nin_shortcut"),
        ("conv_norm_out", "norm_out"),
    ):
        key = key.replace(old, new)
    if "attn_1" in key and tensor.ndim == 2:
        tensor = tensor[:, :, None, None]
    return key, tensor


def write_single(path: Path, parts: dict[str, Tensors]) -> Path:
    """A single file of Stability AI with these components in it."""
    tensors = {
        PREFIXES[name] + key: tensor.contiguous()
        for name, part in parts.items()
        for key, tensor in to_sai(name, part).items()
    }
    save_file(tensors, path, {"about": "anything"})
    return path


def to_lumina_t2x(tensors: Tensors) -> Tensors:
    """Next-DiT from the diffusers to Lumina-T2X's names; the second query is dropped."""
    renames = (
        ("patch_embedder.proj", "x_embedder"),
        ("time_caption_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
        ("time_caption_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
        ("time_caption_embed.caption_embedder", "cap_embedder"),
        ("attn1.to_q", "attention.wq"),
        ("attn1.to_k", "attention.wk"),
        ("attn1.to_v", "attention.wv"),
        ("attn1.norm_q", "attention.q_norm"),
        ("attn1.norm_k", "attention.k_norm"),
        ("attn2.to_k", "attention.wk_y"),
        ("attn2.to_v", "attention.wv_y"),
        ("attn2.norm_k", "attention.ky_norm"),
        ("attn2.to_out.0", "attention.wo"),
        ("norm1_context", "attention_y_norm"),
        ("norm1.linear", "adaLN_modulation.1"),
        ("norm1.norm", "attention_norm1"),
        (".norm2", ".attention_norm2"),
        ("feed_forward.linear_", "feed_forward.w"),
        ("norm_out.linear_1", "final_layer.adaLN_modulation.1"),
        ("norm_out.linear_2", "final_layer.linear"),
        (".gate", ".attention.gate"),
    )
    out = {}
    for key, tensor in tensors.items():
        if ".attn2.to_q" in key or ".attn2.norm_q" in key:
            continue
        for old, new in renames:
            if old in key:
                key = key.replace(old, new)
                break
        out[key] = tensor
    return out


def write_lumina_t2x(folder: Path, tensors: Tensors, end: str = "safetensors") -> Path:
    """Lumina-T2X's file with its arguments beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"consolidated_ema.00-of-01.{end}"
    original = to_lumina_t2x(tensors)
    save_file(original, path) if end == "safetensors" else torch.save(original, path)
    args = Namespace(model="NextDiT_2B_GQA_patch2", image_size=128, qk_norm=True, vae="sdxl")
    torch.save(args, folder / "model_args.pth")
    return path


def same_bits(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two modules hold the same parameters and buffers, to the bit."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
