"""Key maps of FLUX.1's transformer; its VAE, CLIP and T5 have the names of SD3's (sd3.py).

The left side is our module, the right side the file (see keymap.py for how to read a table).
Sources: the official files' tensor lists, Black Forest Labs' and diffusers' modules, which agree.
"""

from __future__ import annotations

from dataclasses import replace

from minidit.flux import FluxConfig
from minidit.vae import VAEConfig
from weights import sd3
from weights.files import Tensors, count, shape_of
from weights.keymap import Rows, Swap, Table


def flux_diffusers(config: FluxConfig, stored: Tensors | None = None) -> Table:
    """FLUX.1 in the diffusers layout, which keeps q, k and v apart and has the head's modulation as
    scale, shift; all others are as in Black Forest Labs' layout."""
    double, single = "transformer_blocks.*.", "single_transformer_blocks.*."
    return {
        "patch_embed": "x_embedder",
        "context_embed": "context_embedder",
        "time_embed.fc1": "time_text_embed.timestep_embedder.linear_1",
        "time_embed.fc2": "time_text_embed.timestep_embedder.linear_2",
        "guidance_embed.fc1": "time_text_embed.guidance_embedder.linear_1",
        "guidance_embed.fc2": "time_text_embed.guidance_embedder.linear_2",
        "pooled_embed.fc1": "time_text_embed.text_embedder.linear_1",
        "pooled_embed.fc2": "time_text_embed.text_embedder.linear_2",
        "double_blocks.*.image.modulation": double + "norm1.linear",
        "double_blocks.*.image.attn.qkv": tuple(double + f"attn.to_{x}" for x in "qkv"),
        "double_blocks.*.image.attn.q_norm": double + "attn.norm_q",
        "double_blocks.*.image.attn.k_norm": double + "attn.norm_k",
        "double_blocks.*.image.attn.out": double + "attn.to_out.0",
        "double_blocks.*.image.mlp.fc1": double + "ff.net.0.proj",
        "double_blocks.*.image.mlp.fc2": double + "ff.net.2",
        "double_blocks.*.context.modulation": double + "norm1_context.linear",
        "double_blocks.*.context.attn.qkv": tuple(double + f"attn.add_{x}_proj" for x in "qkv"),
        "double_blocks.*.context.attn.q_norm": double + "attn.norm_added_q",
        "double_blocks.*.context.attn.k_norm": double + "attn.norm_added_k",
        "double_blocks.*.context.attn.out": double + "attn.to_add_out",
        "double_blocks.*.context.mlp.fc1": double + "ff_context.net.0.proj",
        "double_blocks.*.context.mlp.fc2": double + "ff_context.net.2",
        "single_blocks.*.modulation": single + "norm.linear",
        "single_blocks.*.attn.qkv": tuple(single + f"attn.to_{x}" for x in "qkv"),
        "single_blocks.*.attn.q_norm": single + "attn.norm_q",
        "single_blocks.*.attn.k_norm": single + "attn.norm_k",
        "single_blocks.*.mlp": single + "proj_mlp",
        "single_blocks.*.out": single + "proj_out",
        "final.modulation": Swap("norm_out.linear"),
        "final.linear": "proj_out",
    }


def flux_original(config: FluxConfig, stored: Tensors | None = None) -> Table:
    """FLUX.1 in Black Forest Labs' layout; linear1 of a single block holds q, k, v and the MLP."""
    table: Table = {
        "patch_embed": "img_in",
        "context_embed": "txt_in",
        "single_blocks.*.modulation": "single_blocks.*.modulation.lin",
        "single_blocks.*.attn.qkv": Rows("single_blocks.*.linear1", 0, 3, of=7),
        "single_blocks.*.mlp": Rows("single_blocks.*.linear1", 3, 7, of=7),
        "single_blocks.*.attn.q_norm.weight": "single_blocks.*.norm.query_norm.scale",
        "single_blocks.*.attn.k_norm.weight": "single_blocks.*.norm.key_norm.scale",
        "single_blocks.*.out": "single_blocks.*.linear2",
        "final.modulation": "final_layer.adaLN_modulation.1",
        "final.linear": "final_layer.linear",
    }
    for ours, theirs in {"time": "time", "guidance": "guidance", "pooled": "vector"}.items():
        table |= {f"{ours}_embed.fc1": f"{theirs}_in.in_layer"}
        table |= {f"{ours}_embed.fc2": f"{theirs}_in.out_layer"}
    for ours, theirs in {"image": "img", "context": "txt"}.items():
        stream, block = f"double_blocks.*.{ours}.", f"double_blocks.*.{theirs}_"
        table |= {
            stream + "modulation": block + "mod.lin",
            stream + "attn.qkv": block + "attn.qkv",
            stream + "attn.q_norm.weight": block + "attn.norm.query_norm.scale",
            stream + "attn.k_norm.weight": block + "attn.norm.key_norm.scale",
            stream + "attn.out": block + "attn.proj",
            stream + "mlp.fc1": block + "mlp.0",
            stream + "mlp.fc2": block + "mlp.2",
        }
    return table


def flux_part(stored: Tensors) -> tuple[str, str, FluxConfig]:
    """Sizes in a single file, which has no config: everything shows but the share of each axis in
    the rotary channels, 1/8 and twice 7/16 in all published models. ValueError if a shape makes no
    sense."""
    width, channels = shape_of(stored, "img_in.weight", 2)
    head = shape_of(stored, "double_blocks.0.img_attn.norm.query_norm.scale", 1)[0]
    first = head // 16 * 2
    config = FluxConfig(
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
    return "flux", "original", config


def vae_part(stored: Tensors) -> tuple[str, str, VAEConfig]:
    """The autoencoder, whose single file has SD3's names without their prefix."""
    kind, layout, config = sd3.vae_part(stored)
    return kind, layout, replace(config, scaling_factor=0.3611, shift_factor=0.1159)
