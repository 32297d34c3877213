"""Lumina-Next: the key map of Next-DiT, and what a model of the family consists of."""

from __future__ import annotations

from collections.abc import Collection

from minidit.checks import short
from minidit.nextdit import NextDiT, NextDiTConfig
from minidit.scheduler import SchedulerConfig
from weights.files import Stored, Tensors, count, multiple_of, read_namespace, shape_of
from weights.keymap import Family, Network, Same, Source, Table

# Lumina-T2X's files, best first; the averaged weights are what its own script samples with
FILES = tuple(
    f"consolidated{ema}.00-of-01.{end}" for ema in ("_ema", "") for end in ("safetensors", "pth")
)


def nextdit(config: NextDiTConfig, names: Collection[str] = ()) -> Table:
    """Next-DiT: the diffusers layout, and that of Lumina-T2X.

    diffusers stores the one query of a layer twice, for both of its attentions.
    """
    embed, layer = "time_caption_embed.", "layers.*."
    attn, attn1, attn2 = layer + "attention.", layer + "attn1.", layer + "attn2."

    def query(name: str) -> Source:
        return attn1 + name if config.two_queries else Same(attn1 + name, attn2 + name)

    return {
        "patch_embed": ("patch_embedder.proj", "x_embedder"),
        "pad_token": "pad_token",
        "time_embed.fc1": (embed + "timestep_embedder.linear_1", "t_embedder.mlp.0"),
        "time_embed.fc2": (embed + "timestep_embedder.linear_2", "t_embedder.mlp.2"),
        "caption_embed.norm": (embed + "caption_embedder.0", "cap_embedder.0"),
        "caption_embed.linear": (embed + "caption_embedder.1", "cap_embedder.1"),
        "blocks.*.modulation": (layer + "norm1.linear", layer + "adaLN_modulation.1"),
        "blocks.*.attn_norm1": (layer + "norm1.norm", layer + "attention_norm1"),
        "blocks.*.attn_norm2": (layer + "norm2", layer + "attention_norm2"),
        "blocks.*.ffn_norm*": layer + "ffn_norm*",
        "blocks.*.context_norm": (layer + "norm1_context", layer + "attention_y_norm"),
        "blocks.*.attn.q": (query("to_q"), attn + "wq"),
        "blocks.*.attn.?": (attn1 + "to_?", attn + "w?"),
        "blocks.*.attn.q_norm": (query("norm_q"), attn + "q_norm"),
        "blocks.*.attn.k_norm": (attn1 + "norm_k", attn + "k_norm"),
        "blocks.*.attn.context_?": (attn2 + "to_?", attn + "w?_y"),
        "blocks.*.attn.context_?_norm": (attn2 + "norm_?", attn + "?y_norm"),
        "blocks.*.attn.gate": (layer + "gate", attn + "gate"),
        "blocks.*.attn.out": (attn2 + "to_out.0", attn + "wo"),
        "blocks.*.mlp.w*": (layer + "feed_forward.linear_*", layer + "feed_forward.w*"),
        "final.modulation": ("norm_out.linear_1", "final_layer.adaLN_modulation.1"),
        "final.linear": ("norm_out.linear_2", "final_layer.linear"),
    }


def nextdit_sizes(stored: Tensors) -> tuple[str, NextDiTConfig]:
    """Sizes from shapes; the image size from model_args.pth, if that is beside; what neither tells
    is the default, as in every published model."""
    width, patch_values = shape_of(stored, "x_embedder.weight", 2)
    heads = shape_of(stored, "layers.0.attention.gate", 1)[0]
    keys = shape_of(stored, "layers.0.attention.wk.weight", 2)[0]
    mlp = shape_of(stored, "layers.0.feed_forward.w1.weight", 2)[0]
    return "original", NextDiTConfig(
        sample_size=image_size(stored["x_embedder.weight"]) // 8,
        in_channels=patch_values // NextDiTConfig.patch_size**2,
        hidden_size=width,
        num_layers=count(stored, "layers."),
        num_attention_heads=heads,
        num_kv_heads=max(1, keys * heads // width),
        multiple_of=multiple_of(mlp, int(8 * width / 3), width),  # 2/3 of 4 widths
        learn_sigma=shape_of(stored, "final_layer.linear.weight", 2)[0] > patch_values,
        qk_norm="layers.0.attention.q_norm.weight" in stored,
        cross_attention_dim=shape_of(stored, "layers.0.attention.wk_y.weight", 2)[1],
    )


def image_size(tensor: Stored) -> int:
    """Pixels a side of the training pictures, from model_args.pth beside a file of Lumina-T2X."""
    args = tensor.file.with_name("model_args.pth")
    size = read_namespace(args).get("image_size", 1024) if args.is_file() else 1024
    if type(size) is not int or not 8 <= size < 2**16:
        said = short(size) if type(size) in (int, float, str) else f"a {type(size).__name__}"
        raise ValueError(f"image_size in model_args.pth is {said}, must be a number of pixels")
    return size


NETWORK = Network(
    NextDiT,
    NextDiTConfig,
    nextdit,
    classes=("LuminaNextDiT2DModel",),
    sign="layers.0.attention.wq.weight",
    sizes=nextdit_sizes,
)
FAMILY = Family(
    name="lumina",
    title="Lumina-Next",
    pipeline="LuminaPipeline",
    repo="Alpha-VLLM/Lumina-Next-SFT-diffusers",
    components={
        "transformer": "LuminaNextDiT2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "GemmaModel",
        "tokenizer": "GemmaTokenizerFast",
    },
    widths={
        "in_channels": [("vae", "latent_channels")],
        "cross_attention_dim": [("text_encoder", "hidden_size")],
    },
    scheduler=lambda config, name: SchedulerConfig(
        shift=1.0, default_steps=30, default_guidance=4.0
    ),
)
