"""Stable Diffusion 3 and 3.5: the key map of MMDiT, and what a model of the family consists of."""

from __future__ import annotations

import math
from collections.abc import Collection

from minidit.mmdit import MMDiT, MMDiTConfig
from minidit.scheduler import SchedulerConfig
from weights.files import T5_FILES, Tensors, count, shape_of
from weights.keymap import Family, Network, Table, swap


def mmdit(config: MMDiTConfig, names: Collection[str] = ()) -> Table:
    """MMDiT: the diffusers layout, and that of Stability AI, which ours follows.

    diffusers keeps q, k and v apart, and the two-chunk modulations (the last text stream's and the
    head's) as scale, shift where Stability AI has shift, scale.
    """
    embed, block, last = "time_text_embed.", "transformer_blocks.*.", str(config.num_layers - 1)
    image, context = "joint_blocks.*.x_block.", "joint_blocks.*.context_block."
    norm1, modulation = block + "norm1_context.linear", context + "adaLN_modulation.1"
    return {
        "pos_embed": ("pos_embed.pos_embed", "pos_embed"),
        "patch_embed": ("pos_embed.proj", "x_embedder.proj"),
        "time_embed.fc1": (embed + "timestep_embedder.linear_1", "t_embedder.mlp.0"),
        "time_embed.fc2": (embed + "timestep_embedder.linear_2", "t_embedder.mlp.2"),
        "pooled_embed.fc1": (embed + "text_embedder.linear_1", "y_embedder.mlp.0"),
        "pooled_embed.fc2": (embed + "text_embedder.linear_2", "y_embedder.mlp.2"),
        "context_embed": "context_embedder",
        "blocks.*.image.modulation": (block + "norm1.linear", image + "adaLN_modulation.1"),
        "blocks.*.image.attn.qkv": (block + "attn.to_?", image + "attn.qkv"),
        "blocks.*.image.attn.?_norm": (block + "attn.norm_?", image + "attn.ln_?"),
        "blocks.*.image.attn.out": (block + "attn.to_out.0", image + "attn.proj"),
        "blocks.*.image.attn2.qkv": (block + "attn2.to_?", image + "attn2.qkv"),
        "blocks.*.image.attn2.?_norm": (block + "attn2.norm_?", image + "attn2.ln_?"),
        "blocks.*.image.attn2.out": (block + "attn2.to_out.0", image + "attn2.proj"),
        "blocks.*.image.mlp.fc1": (block + "ff.net.0.proj", image + "mlp.fc1"),
        "blocks.*.image.mlp.fc2": (block + "ff.net.2", image + "mlp.fc2"),
        f"blocks.{last}.context.modulation": (
            swap(norm1.replace("*", last)),
            modulation.replace("*", last),
        ),
        "blocks.*.context.modulation": (norm1, modulation),
        "blocks.*.context.attn.qkv": (block + "attn.add_?_proj", context + "attn.qkv"),
        "blocks.*.context.attn.?_norm": (block + "attn.norm_added_?", context + "attn.ln_?"),
        "blocks.*.context.attn.out": (block + "attn.to_add_out", context + "attn.proj"),
        "blocks.*.context.mlp.fc1": (block + "ff_context.net.0.proj", context + "mlp.fc1"),
        "blocks.*.context.mlp.fc2": (block + "ff_context.net.2", context + "mlp.fc2"),
        "final.modulation": (swap("norm_out.linear"), "final_layer.adaLN_modulation.1"),
        "final.linear": ("proj_out", "final_layer.linear"),
    }


def mmdit_sizes(stored: Tensors) -> tuple[str, MMDiTConfig]:
    """Sizes from shapes: all show, but heads are 64 wide where no norm of theirs is stored."""
    width, channels, patch, _ = shape_of(stored, "x_embedder.proj.weight", 4)
    layers = count(stored, "joint_blocks.")
    norm = "joint_blocks.0.context_block.attn.ln_k.weight"
    head = shape_of(stored, norm, 1)[0] if norm in stored else 64
    table = math.isqrt(shape_of(stored, "pos_embed", 3)[1])
    return "original", MMDiTConfig(
        sample_size=min(128, table * patch),
        patch_size=patch,
        in_channels=channels,
        out_channels=shape_of(stored, "final_layer.linear.weight", 2)[0] // patch**2,
        num_layers=layers,
        num_attention_heads=width // head,
        attention_head_dim=head,
        joint_attention_dim=shape_of(stored, "context_embedder.weight", 2)[1],
        caption_projection_dim=width,
        pooled_projection_dim=shape_of(stored, "y_embedder.mlp.0.weight", 2)[1],
        pos_embed_max_size=table,
        qk_norm="rms_norm" if norm in stored else None,
        dual_attention_layers=tuple(
            i for i in range(layers) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in stored
        ),
    )


def scheduler(config: MMDiTConfig, name: str) -> SchedulerConfig:
    """What to sample with where no file says it.

    Nothing inside the files tells SD3.5-large-turbo from SD3.5-large, so its two numbers, and
    nothing else, go by the name of the file, folder or hub repository.
    """
    if "turbo" in name.lower():
        return SchedulerConfig(shift=3.0, default_steps=4, default_guidance=1.0)
    return SchedulerConfig(shift=3.0, default_steps=28, default_guidance=7.0)


NETWORK = Network(
    MMDiT,
    MMDiTConfig,
    mmdit,
    classes=("SD3Transformer2DModel",),
    sign="joint_blocks.0.x_block.attn.qkv.weight",
    sizes=mmdit_sizes,
)
FAMILY = Family(
    name="sd3",
    title="Stable Diffusion 3",
    pipeline="StableDiffusion3Pipeline",
    repo="stabilityai/stable-diffusion-3-medium-diffusers",
    components={
        "transformer": "SD3Transformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "CLIPTokenizer",
        "tokenizer_3": "T5TokenizerFast",
    },
    optional=("text_encoder_3", "tokenizer_3"),
    widths={
        "in_channels": [("vae", "latent_channels")],
        "joint_attention_dim": [("text_encoder_3", "d_model")],
        "pooled_projection_dim": [
            ("text_encoder", "projection_dim"),
            ("text_encoder_2", "projection_dim"),
        ],
    },
    scheduler=scheduler,
    beside={
        "text_encoder": ("clip_l.safetensors",),
        "text_encoder_2": ("clip_g.safetensors",),
        "text_encoder_3": T5_FILES,
    },
    latents={"scaling_factor": 1.5305, "shift_factor": 0.0609},
)
