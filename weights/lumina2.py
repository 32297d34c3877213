"""Lumina-Image 2.0: the key map of its transformer, and what a model of the family consists of.

Sources: the official files' tensor lists and the code of Lumina-Image-2.0 and diffusers.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from minidit.lumina2 import Lumina2, Lumina2Config
from minidit.scheduler import SchedulerConfig
from weights.files import Tensors, count, multiple_of, shape_of
from weights.keymap import Family, Network, Rows, Table


def lumina2(config: Lumina2Config, names: Collection[str] = ()) -> Table:
    """Lumina-Image 2.0: the diffusers layout, and that of Alpha-VLLM, where q, k and v are one."""
    embed, C, kv = "time_caption_embed.", config.hidden_size, config.kv_width
    table: dict[str, Any] = {
        "patch_embed": "x_embedder",
        "time_embed.fc1": (embed + "timestep_embedder.linear_1", "t_embedder.mlp.0"),
        "time_embed.fc2": (embed + "timestep_embedder.linear_2", "t_embedder.mlp.2"),
        "context_norm": (embed + "caption_embedder.0", "cap_embedder.0"),
        "context_embed": (embed + "caption_embedder.1", "cap_embedder.1"),
        "final.modulation": ("norm_out.linear_1", "final_layer.adaLN_modulation.1"),
        "final.linear": ("norm_out.linear_2", "final_layer.linear"),
    }
    for ours, theirs, norm1 in (
        ("blocks.*.", "layers.*.", "norm1.norm"),
        ("noise_refiner.*.", "noise_refiner.*.", "norm1.norm"),
        ("context_refiner.*.", "context_refiner.*.", "norm1"),
    ):
        attn, qkv, mlp = theirs + "attn.", theirs + "attention.qkv", theirs + "feed_forward."
        total = C + 2 * kv
        table |= {
            ours + "modulation": (theirs + "norm1.linear", theirs + "adaLN_modulation.1"),
            ours + "attn_norm1": (theirs + norm1, theirs + "attention_norm1"),
            ours + "attn_norm2": (theirs + "norm2", theirs + "attention_norm2"),
            ours + "ffn_norm*": theirs + "ffn_norm*",
            ours + "attn.q": (attn + "to_q", Rows(qkv, 0, C, total)),
            ours + "attn.k": (attn + "to_k", Rows(qkv, C, C + kv, total)),
            ours + "attn.v": (attn + "to_v", Rows(qkv, C + kv, total, total)),
            ours + "attn.?_norm": (attn + "norm_?", theirs + "attention.?_norm"),
            ours + "attn.out": (attn + "to_out.0", theirs + "attention.out"),
            ours + "mlp.w*": (mlp + "linear_*", mlp + "w*"),
        }
    return table


def lumina2_sizes(stored: Tensors) -> tuple[str, Lumina2Config]:
    """Sizes from shapes; that patches are of 2 x 2, and the three axes of rotary positions equally
    wide, does not show."""
    attn = "layers.0.attention."
    width, patch_values = shape_of(stored, "x_embedder.weight", 2)
    head = shape_of(stored, attn + "q_norm.weight", 1)[0]
    inner = shape_of(stored, attn + "out.weight", 2)[1]
    fused = shape_of(stored, attn + "qkv.weight", 2)[0]
    mlp = shape_of(stored, "layers.0.feed_forward.w1.weight", 2)[0]
    return "original", Lumina2Config(
        in_channels=patch_values // Lumina2Config.patch_size**2,
        hidden_size=width,
        num_layers=count(stored, "layers."),
        num_refiner_layers=count(stored, "noise_refiner."),
        num_attention_heads=max(1, inner // head),
        num_kv_heads=max(1, (fused - inner) // 2 // head),
        multiple_of=multiple_of(mlp, 4 * width, width),
        axes_dim_rope=(head // 3,) * 3,
        cap_feat_dim=shape_of(stored, "cap_embedder.0.weight", 1)[0],
    )


NETWORK = Network(
    Lumina2,
    Lumina2Config,
    lumina2,
    classes=("Lumina2Transformer2DModel",),
    sign="noise_refiner.0.attention.qkv.weight",
    sizes=lumina2_sizes,
    ignore=("norm_final.weight",),  # in the original file, for no forward pass
)
FAMILY = Family(
    name="lumina2",
    title="Lumina-Image 2.0",
    pipeline="Lumina2Pipeline",
    repo="Alpha-VLLM/Lumina-Image-2.0",
    components={
        "transformer": "Lumina2Transformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "Gemma2Model",
        "tokenizer": "GemmaTokenizerFast",
    },
    widths={
        "in_channels": [("vae", "latent_channels")],
        "cap_feat_dim": [("text_encoder", "hidden_size")],
    },
    scheduler=lambda config, name: SchedulerConfig(
        shift=6.0, spacing="even", default_steps=30, default_guidance=4.0
    ),
    latents={"scaling_factor": 0.3611, "shift_factor": 0.1159},
)
