"""Key maps of Lumina-Next: Next-DiT and Gemma (its VAE is SDXL's, see sd3.vae_diffusers).

The left side is our module, the right side the file (see keymap.py for how to read a table).
Sources: the official files' tensor lists and the code of Lumina-T2X and diffusers, which agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minidit.gemma import GemmaConfig
from minidit.nextdit import NextDiTConfig
from weights.files import Tensors, count, shape_of
from weights.keymap import Same, Source, Table

# Lumina-T2X's files, best first; the averaged weights are what its own script samples with
FILES = tuple(
    f"consolidated{ema}.00-of-01.{end}" for ema in ("_ema", "") for end in ("safetensors", "pth")
)
LAYER = "layers.*."


def nextdit_diffusers(config: NextDiTConfig, stored: Tensors | None = None) -> Table:
    """Next-DiT in the diffusers layout, which stores the one query of a layer twice."""
    q: Source = LAYER + "attn1.to_q"
    q_norm: Source = LAYER + "attn1.norm_q"
    if config.shared_query:
        q = Same(LAYER + "attn1.to_q", LAYER + "attn2.to_q")
        q_norm = Same(LAYER + "attn1.norm_q", LAYER + "attn2.norm_q")
    return {
        "patch_embed": "patch_embedder.proj",
        "pad_token": "pad_token",
        "time_embed.fc1": "time_caption_embed.timestep_embedder.linear_1",
        "time_embed.fc2": "time_caption_embed.timestep_embedder.linear_2",
        "caption_embed.norm": "time_caption_embed.caption_embedder.0",
        "caption_embed.linear": "time_caption_embed.caption_embedder.1",
        "blocks.*.modulation": LAYER + "norm1.linear",
        "blocks.*.attn_norm1": LAYER + "norm1.norm",
        "blocks.*.attn_norm2": LAYER + "norm2",
        "blocks.*.ffn_norm1": LAYER + "ffn_norm1",
        "blocks.*.ffn_norm2": LAYER + "ffn_norm2",
        "blocks.*.context_norm": LAYER + "norm1_context",
        "blocks.*.attn.q": q,
        "blocks.*.attn.k": LAYER + "attn1.to_k",
        "blocks.*.attn.v": LAYER + "attn1.to_v",
        "blocks.*.attn.q_norm": q_norm,
        "blocks.*.attn.k_norm": LAYER + "attn1.norm_k",
        "blocks.*.attn.context_q": LAYER + "attn2.to_q",
        "blocks.*.attn.context_q_norm": LAYER + "attn2.norm_q",
        "blocks.*.attn.context_k": LAYER + "attn2.to_k",
        "blocks.*.attn.context_v": LAYER + "attn2.to_v",
        "blocks.*.attn.context_k_norm": LAYER + "attn2.norm_k",
        "blocks.*.attn.gate": LAYER + "gate",
        "blocks.*.attn.out": LAYER + "attn2.to_out.0",
        "blocks.*.mlp.w1": LAYER + "feed_forward.linear_1",
        "blocks.*.mlp.w2": LAYER + "feed_forward.linear_2",
        "blocks.*.mlp.w3": LAYER + "feed_forward.linear_3",
        "final.modulation": "norm_out.linear_1",
        "final.linear": "norm_out.linear_2",
    }


def nextdit_original(config: NextDiTConfig, stored: Tensors | None = None) -> Table:
    """Next-DiT as Lumina-T2X saves it."""
    return {
        "patch_embed": "x_embedder",
        "pad_token": "pad_token",
        "time_embed.fc1": "t_embedder.mlp.0",
        "time_embed.fc2": "t_embedder.mlp.2",
        "caption_embed.norm": "cap_embedder.0",
        "caption_embed.linear": "cap_embedder.1",
        "blocks.*.modulation": LAYER + "adaLN_modulation.1",
        "blocks.*.attn_norm1": LAYER + "attention_norm1",
        "blocks.*.attn_norm2": LAYER + "attention_norm2",
        "blocks.*.ffn_norm1": LAYER + "ffn_norm1",
        "blocks.*.ffn_norm2": LAYER + "ffn_norm2",
        "blocks.*.context_norm": LAYER + "attention_y_norm",
        "blocks.*.attn.q": LAYER + "attention.wq",
        "blocks.*.attn.k": LAYER + "attention.wk",
        "blocks.*.attn.v": LAYER + "attention.wv",
        "blocks.*.attn.q_norm": LAYER + "attention.q_norm",
        "blocks.*.attn.k_norm": LAYER + "attention.k_norm",
        "blocks.*.attn.context_k": LAYER + "attention.wk_y",
        "blocks.*.attn.context_v": LAYER + "attention.wv_y",
        "blocks.*.attn.context_k_norm": LAYER + "attention.ky_norm",
        "blocks.*.attn.gate": LAYER + "attention.gate",
        "blocks.*.attn.out": LAYER + "attention.wo",
        "blocks.*.mlp.w1": LAYER + "feed_forward.w1",
        "blocks.*.mlp.w2": LAYER + "feed_forward.w2",
        "blocks.*.mlp.w3": LAYER + "feed_forward.w3",
        "final.modulation": "final_layer.adaLN_modulation.1",
        "final.linear": "final_layer.linear",
    }


def gemma(config: GemmaConfig, stored: Tensors | None = None) -> Table:
    """Gemma with the names of transformers: google's files put `model.` first, Lumina's do not."""
    model = "model." if stored is not None and "model.embed_tokens.weight" in stored else ""
    layer = model + LAYER
    return {
        "token_embed": model + "embed_tokens",
        "layers.*.norm1": layer + "input_layernorm",
        "layers.*.attn.q": layer + "self_attn.q_proj",
        "layers.*.attn.k": layer + "self_attn.k_proj",
        "layers.*.attn.v": layer + "self_attn.v_proj",
        "layers.*.attn.out": layer + "self_attn.o_proj",
        "layers.*.norm2": layer + "post_attention_layernorm",
        "layers.*.mlp.gate": layer + "mlp.gate_proj",
        "layers.*.mlp.up": layer + "mlp.up_proj",
        "layers.*.mlp.down": layer + "mlp.down_proj",
        "final_norm": model + "norm",
    }


def nextdit_config(stored: Tensors, args: Mapping[str, Any]) -> NextDiTConfig:
    """Sizes of Next-DiT in the original layout, which has no config: read from shapes.

    args are the fields of model_args.pth, if it is there: only the image size is not in the shapes.
    """
    width, patch_values = shape_of(stored, "x_embedder.weight", 2)
    heads = shape_of(stored, "layers.0.attention.gate", 1)[0]
    keys = shape_of(stored, "layers.0.attention.wk.weight", 2)[0]
    mlp = shape_of(stored, "layers.0.feed_forward.w1.weight", 2)[0]
    size = args.get("image_size", 1024)
    if type(size) is not int or not 8 <= size < 2**16:
        raise ValueError(
            f"image_size in model_args.pth is {size!r:.80}, must be a number of pixels"
        )
    patch = 2  # as in every published model
    # the MLP is 2/3 of 4 widths, rounded up to a multiple of this
    multiples = [
        m for m in (256, 128, 64, 32, 16, 8, 4, 2, 1) if -(-int(8 * width / 3) // m) * m == mlp
    ]
    if not multiples:
        raise ValueError(f"the MLP is {mlp} wide, which does not follow from a width of {width}")
    channels = patch_values // patch**2
    return NextDiTConfig(
        sample_size=size // 8,
        patch_size=patch,
        in_channels=channels,
        hidden_size=width,
        num_layers=count(stored, "layers."),
        num_attention_heads=heads,
        num_kv_heads=max(1, keys * heads // width),
        multiple_of=multiples[0],
        ffn_dim_multiplier=None,
        norm_eps=1e-5,
        learn_sigma=shape_of(stored, "final_layer.linear.weight", 2)[0] > patch_values,
        qk_norm="layers.0.attention.q_norm.weight" in stored,
        cross_attention_dim=shape_of(stored, "layers.0.attention.wk_y.weight", 2)[1],
        shared_query=True,
    )
