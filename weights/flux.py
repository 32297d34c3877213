"""FLUX.1, dev and schnell: the transformer's key map, and what a model of the family consists of.

Sources: the official files' tensor lists, Black Forest Labs' and diffusers' modules, which agree.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from minidit.flux import Flux, FluxConfig
from minidit.scheduler import SchedulerConfig
from weights.files import T5_FILES, Tensors, count, shape_of
from weights.keymap import Family, Network, Rows, Table, swap


def flux(config: FluxConfig, names: Collection[str] = ()) -> Table:
    """The transformer: the diffusers layout, and that of Black Forest Labs.

    diffusers keeps q, k, v and the MLP of the single blocks apart, and the head's modulation as
    scale, shift; all other modulations are alike in both.
    """
    embed, block = "time_text_embed.", "transformer_blocks.*."
    one, single = "single_transformer_blocks.*.", "single_blocks.*."
    image, text = "double_blocks.*.img_", "double_blocks.*.txt_"
    linear1 = single + "linear1"  # q, k, v and the MLP, which is four times as wide
    table: dict[str, Any] = {
        "patch_embed": ("x_embedder", "img_in"),
        "context_embed": ("context_embedder", "txt_in"),
        "time_embed.fc1": (embed + "timestep_embedder.linear_1", "time_in.in_layer"),
        "time_embed.fc2": (embed + "timestep_embedder.linear_2", "time_in.out_layer"),
        "guidance_embed.fc1": (embed + "guidance_embedder.linear_1", "guidance_in.in_layer"),
        "guidance_embed.fc2": (embed + "guidance_embedder.linear_2", "guidance_in.out_layer"),
        "pooled_embed.fc1": (embed + "text_embedder.linear_1", "vector_in.in_layer"),
        "pooled_embed.fc2": (embed + "text_embedder.linear_2", "vector_in.out_layer"),
        "double_blocks.*.image.modulation": (block + "norm1.linear", image + "mod.lin"),
        "double_blocks.*.image.attn.qkv": (block + "attn.to_?", image + "attn.qkv"),
        "double_blocks.*.image.attn.out": (block + "attn.to_out.0", image + "attn.proj"),
        "double_blocks.*.image.mlp.fc1": (block + "ff.net.0.proj", image + "mlp.0"),
        "double_blocks.*.image.mlp.fc2": (block + "ff.net.2", image + "mlp.2"),
        "double_blocks.*.context.modulation": (block + "norm1_context.linear", text + "mod.lin"),
        "double_blocks.*.context.attn.qkv": (block + "attn.add_?_proj", text + "attn.qkv"),
        "double_blocks.*.context.attn.out": (block + "attn.to_add_out", text + "attn.proj"),
        "double_blocks.*.context.mlp.fc1": (block + "ff_context.net.0.proj", text + "mlp.0"),
        "double_blocks.*.context.mlp.fc2": (block + "ff_context.net.2", text + "mlp.2"),
        "single_blocks.*.modulation": (one + "norm.linear", single + "modulation.lin"),
        "single_blocks.*.attn.qkv": (one + "attn.to_?", Rows(linear1, 0, 3, 7)),
        "single_blocks.*.mlp": (one + "proj_mlp", Rows(linear1, 3, 7, 7)),
        "single_blocks.*.out": (one + "proj_out", single + "linear2"),
        "final.modulation": (swap("norm_out.linear"), "final_layer.adaLN_modulation.1"),
        "final.linear": ("proj_out", "final_layer.linear"),
    }
    for ours, norm, theirs in (
        ("double_blocks.*.image", block + "attn.norm_", image + "attn.norm."),
        ("double_blocks.*.context", block + "attn.norm_added_", text + "attn.norm."),
        ("single_blocks.*", one + "attn.norm_", single + "norm."),
    ):
        for x, word in (("q", "query"), ("k", "key")):
            scale = f"{theirs}{word}_norm.scale"
            table[f"{ours}.attn.{x}_norm.weight"] = (f"{norm}{x}.weight", scale)
    return table


def flux_sizes(stored: Tensors) -> tuple[str, FluxConfig]:
    """Sizes from shapes: all show but how the axes share the rotary channels of a head, 1/8 and
    twice 7/16 in all published models."""
    width, channels = shape_of(stored, "img_in.weight", 2)
    head = shape_of(stored, "double_blocks.0.img_attn.norm.query_norm.scale", 1)[0]
    first = head // 16 * 2
    return "original", FluxConfig(
        in_channels=channels,
        num_layers=count(stored, "double_blocks."),
        num_single_layers=count(stored, "single_blocks."),
        num_attention_heads=width // head,
        attention_head_dim=head,
        joint_attention_dim=shape_of(stored, "txt_in.weight", 2)[1],
        pooled_projection_dim=shape_of(stored, "vector_in.in_layer.weight", 2)[1],
        guidance_embeds="guidance_in.in_layer.weight" in stored,
        axes_dims_rope=(first, (head - first) // 2, (head - first) // 2),
    )


def scheduler(config: FluxConfig, name: str) -> SchedulerConfig:
    """What to sample with where no file says it: dev is told from schnell by its guidance."""
    if config.guidance_embeds:
        return SchedulerConfig(
            shift=3.0, use_dynamic_shifting=True, spacing="even", default_guidance=3.5
        )
    return SchedulerConfig(spacing="even", default_steps=4, corrected_steps=4, default_guidance=1.0)


NETWORK = Network(
    Flux,
    FluxConfig,
    flux,
    classes=("FluxTransformer2DModel",),
    sign="double_blocks.0.img_attn.qkv.weight",
    sizes=flux_sizes,
)
FAMILY = Family(
    name="flux",
    title="FLUX.1",
    pipeline="FluxPipeline",
    repo="black-forest-labs/FLUX.1-schnell",
    components={
        "transformer": "FluxTransformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "T5EncoderModel",
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "T5TokenizerFast",
    },
    widths={
        "latent_channels": [("vae", "latent_channels")],
        "joint_attention_dim": [("text_encoder_2", "d_model")],
        "pooled_projection_dim": [("text_encoder", "hidden_size")],
    },
    scheduler=scheduler,
    beside={
        "vae": ("ae.safetensors",),
        "text_encoder": ("clip_l.safetensors",),
        "text_encoder_2": T5_FILES,
    },
    latents={"scaling_factor": 0.3611, "shift_factor": 0.1159},
)
