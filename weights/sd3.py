"""Key maps of Stable Diffusion 3 and 3.5: MMDiT, VAE, CLIP and T5.

The left side is our module, the right side the file (see keymap.py for how to read a table).
Sources: the official files' tensor lists, diffusers' and Stability AI's loaders, which agree.
"""

from __future__ import annotations

import math
from typing import Any

from minidit.clip import CLIPConfig
from minidit.mmdit import MMDiTConfig
from minidit.t5 import T5Config
from minidit.vae import VAEConfig
from weights.files import Tensors, count, shape_of
from weights.keymap import IDENTITY, Conv1x1, Same, Source, Swap, Table

# Stability AI's single files: where each component's tensors are
PREFIXES = {
    "transformer": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
    "text_encoder_3": "text_encoders.t5xxl.transformer.",
}


def mmdit_diffusers(config: MMDiTConfig, stored: Tensors | None = None) -> Table:
    """MMDiT in the diffusers layout.

    diffusers keeps q, k and v apart, and the two-chunk modulations (the last text stream's and the
    head's) as scale, shift where Stability AI has shift, scale.
    """
    block, last = "transformer_blocks.*.", config.num_layers - 1
    return {
        "pos_embed": "pos_embed.pos_embed",
        "patch_embed": "pos_embed.proj",
        "time_embed.fc1": "time_text_embed.timestep_embedder.linear_1",
        "time_embed.fc2": "time_text_embed.timestep_embedder.linear_2",
        "pooled_embed.fc1": "time_text_embed.text_embedder.linear_1",
        "pooled_embed.fc2": "time_text_embed.text_embedder.linear_2",
        "context_embed": "context_embedder",
        "blocks.*.image.modulation": block + "norm1.linear",
        "blocks.*.image.attn.qkv": tuple(block + f"attn.to_{x}" for x in "qkv"),
        "blocks.*.image.attn.q_norm": block + "attn.norm_q",
        "blocks.*.image.attn.k_norm": block + "attn.norm_k",
        "blocks.*.image.attn.out": block + "attn.to_out.0",
        "blocks.*.image.attn2.qkv": tuple(block + f"attn2.to_{x}" for x in "qkv"),
        "blocks.*.image.attn2.q_norm": block + "attn2.norm_q",
        "blocks.*.image.attn2.k_norm": block + "attn2.norm_k",
        "blocks.*.image.attn2.out": block + "attn2.to_out.0",
        "blocks.*.image.mlp.fc1": block + "ff.net.0.proj",
        "blocks.*.image.mlp.fc2": block + "ff.net.2",
        f"blocks.{last}.context.modulation": Swap(
            f"transformer_blocks.{last}.norm1_context.linear"
        ),
        "blocks.*.context.modulation": block + "norm1_context.linear",
        "blocks.*.context.attn.qkv": tuple(block + f"attn.add_{x}_proj" for x in "qkv"),
        "blocks.*.context.attn.q_norm": block + "attn.norm_added_q",
        "blocks.*.context.attn.k_norm": block + "attn.norm_added_k",
        "blocks.*.context.attn.out": block + "attn.to_add_out",
        "blocks.*.context.mlp.fc1": block + "ff_context.net.0.proj",
        "blocks.*.context.mlp.fc2": block + "ff_context.net.2",
        "final.modulation": Swap("norm_out.linear"),
        "final.linear": "proj_out",
    }


def mmdit_original(config: MMDiTConfig, stored: Tensors | None = None) -> Table:
    """MMDiT in Stability AI's layout, which ours follows."""
    image, context = "joint_blocks.*.x_block.", "joint_blocks.*.context_block."
    return {
        "pos_embed": "pos_embed",
        "patch_embed": "x_embedder.proj",
        "time_embed.fc1": "t_embedder.mlp.0",
        "time_embed.fc2": "t_embedder.mlp.2",
        "pooled_embed.fc1": "y_embedder.mlp.0",
        "pooled_embed.fc2": "y_embedder.mlp.2",
        "context_embed": "context_embedder",
        "blocks.*.image.modulation": image + "adaLN_modulation.1",
        "blocks.*.image.attn.qkv": image + "attn.qkv",
        "blocks.*.image.attn.q_norm": image + "attn.ln_q",
        "blocks.*.image.attn.k_norm": image + "attn.ln_k",
        "blocks.*.image.attn.out": image + "attn.proj",
        "blocks.*.image.attn2.qkv": image + "attn2.qkv",
        "blocks.*.image.attn2.q_norm": image + "attn2.ln_q",
        "blocks.*.image.attn2.k_norm": image + "attn2.ln_k",
        "blocks.*.image.attn2.out": image + "attn2.proj",
        "blocks.*.image.mlp.fc1": image + "mlp.fc1",
        "blocks.*.image.mlp.fc2": image + "mlp.fc2",
        "blocks.*.context.modulation": context + "adaLN_modulation.1",
        "blocks.*.context.attn.qkv": context + "attn.qkv",
        "blocks.*.context.attn.q_norm": context + "attn.ln_q",
        "blocks.*.context.attn.k_norm": context + "attn.ln_k",
        "blocks.*.context.attn.out": context + "attn.proj",
        "blocks.*.context.mlp.fc1": context + "mlp.fc1",
        "blocks.*.context.mlp.fc2": context + "mlp.fc2",
        "final.modulation": "final_layer.adaLN_modulation.1",
        "final.linear": "final_layer.linear",
    }


def vae_diffusers(config: VAEConfig, stored: Tensors | None = None) -> Table:
    """The KL autoencoder in the diffusers layout, also of files from before its rename.

    Old files call the attention's matrices query, key, value and proj_attn, and some keep them as
    1x1 convolutions.
    """
    stored = stored or {}
    table: dict[str, Source] = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        attn = f"{half}.mid_block.attentions.0."
        old = attn + "query.weight" in stored
        names = (
            ("query", "key", "value", "proj_attn") if old else ("to_q", "to_k", "to_v", "to_out.0")
        )
        first = stored.get(attn + names[0] + ".weight")
        conv = first is not None and len(first.shape) == 4
        for ours, theirs in zip(("q", "k", "v", "out"), names, strict=True):
            table[f"{half}.mid.attn.{ours}"] = Conv1x1(attn + theirs) if conv else attn + theirs
        table |= {
            f"{half}.conv_in": f"{half}.conv_in",
            f"{half}.mid.attn.norm": attn + "group_norm",
            **_resnet(f"{half}.mid.resnet1", f"{half}.mid_block.resnets.0", "conv_shortcut"),
            **_resnet(f"{half}.mid.resnet2", f"{half}.mid_block.resnets.1", "conv_shortcut"),
            f"{half}.norm_out": f"{half}.conv_norm_out",
            f"{half}.conv_out": f"{half}.conv_out",
        }
    return table | {
        **_resnet("encoder.down.*.resnets.*", "encoder.down_blocks.*.resnets.*", "conv_shortcut"),
        **_resnet("decoder.up.*.resnets.*", "decoder.up_blocks.*.resnets.*", "conv_shortcut"),
        "encoder.down.*.downsample": "encoder.down_blocks.*.downsamplers.0.conv",
        "decoder.up.*.upsample": "decoder.up_blocks.*.upsamplers.0.conv",
    }


def vae_original(config: VAEConfig, stored: Tensors | None = None) -> Table:
    """The KL autoencoder in Stability AI's layout, which counts the decoder's levels backwards."""
    table: dict[str, Source] = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        for ours, theirs in {"q": "q", "k": "k", "v": "v", "out": "proj_out"}.items():
            table[f"{half}.mid.attn.{ours}"] = Conv1x1(f"{half}.mid.attn_1.{theirs}")
        table |= {
            f"{half}.conv_in": f"{half}.conv_in",
            f"{half}.mid.attn.norm": f"{half}.mid.attn_1.norm",
            **_resnet(f"{half}.mid.resnet1", f"{half}.mid.block_1", "nin_shortcut"),
            **_resnet(f"{half}.mid.resnet2", f"{half}.mid.block_2", "nin_shortcut"),
            f"{half}.norm_out": f"{half}.norm_out",
            f"{half}.conv_out": f"{half}.conv_out",
        }
    levels = len(config.block_out_channels)
    for i in range(levels):
        down, up = f"encoder.down.{i}.", f"decoder.up.{levels - 1 - i}."
        table |= _resnet(f"encoder.down.{i}.resnets.*", down + "block.*", "nin_shortcut")
        table |= _resnet(f"decoder.up.{i}.resnets.*", up + "block.*", "nin_shortcut")
        table[f"encoder.down.{i}.downsample"] = down + "downsample.conv"
        table[f"decoder.up.{i}.upsample"] = up + "upsample.conv"
    return table


def _resnet(ours: str, theirs: str, shortcut: str) -> dict[str, Source]:
    """One residual block of the autoencoder; only the name of its shortcut differs."""
    parts = {part: part for part in ("norm1", "conv1", "norm2", "conv2")} | {"shortcut": shortcut}
    return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in parts.items()}


def clip(config: CLIPConfig, stored: Tensors | None = None) -> Table:
    """CLIP with the names of transformers, which all published layouts share."""
    layer = "text_model.encoder.layers.*."
    return {
        "token_embed": "text_model.embeddings.token_embedding",
        "pos_embed": "text_model.embeddings.position_embedding",
        "layers.*.norm1": layer + "layer_norm1",
        "layers.*.attn.q": layer + "self_attn.q_proj",
        "layers.*.attn.k": layer + "self_attn.k_proj",
        "layers.*.attn.v": layer + "self_attn.v_proj",
        "layers.*.attn.out": layer + "self_attn.out_proj",
        "layers.*.norm2": layer + "layer_norm2",
        "layers.*.mlp.fc1": layer + "mlp.fc1",
        "layers.*.mlp.fc2": layer + "mlp.fc2",
        "final_norm": "text_model.final_layer_norm",
        "projection": "text_projection",
    }


def clip_unprojected(config: CLIPConfig, stored: Tensors | None = None) -> Table:
    """CLIP without its projection: Stability AI's clip_l, whose own is the identity."""
    return {**clip(config), "projection": IDENTITY}


def t5(config: T5Config, stored: Tensors | None = None) -> Table:
    """T5 encoder with the names of transformers, which all published layouts share.

    The embedding goes by one name or two: the diffusers folders have `shared`, the single files
    that and a copy.
    """
    shared, copy = "shared", "encoder.embed_tokens"
    embed: Source = shared
    if stored is not None and copy + ".weight" in stored:
        embed = Same(shared, copy) if shared + ".weight" in stored else copy
    attn, mlp = "encoder.block.*.layer.0.", "encoder.block.*.layer.1."
    return {
        "token_embed": embed,
        "relative_bias": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        "layers.*.norm1": attn + "layer_norm",
        "layers.*.attn.q": attn + "SelfAttention.q",
        "layers.*.attn.k": attn + "SelfAttention.k",
        "layers.*.attn.v": attn + "SelfAttention.v",
        "layers.*.attn.out": attn + "SelfAttention.o",
        "layers.*.norm2": mlp + "layer_norm",
        "layers.*.mlp.gate": mlp + "DenseReluDense.wi_0",
        "layers.*.mlp.up": mlp + "DenseReluDense.wi_1",
        "layers.*.mlp.down": mlp + "DenseReluDense.wo",
        "final_norm": "encoder.final_layer_norm",
    }


# Kind, layout and sizes of the networks in a single file, which has no config: from the shapes
# where shapes tell, otherwise what all published models have. ValueError if a shape makes no sense.


def mmdit_part(stored: Tensors) -> tuple[str, str, MMDiTConfig]:
    """MMDiT: everything shows, except that heads are 64 wide where no norm of theirs is stored."""
    width, channels, patch, _ = shape_of(stored, "x_embedder.proj.weight", 4)
    layers = count(stored, "joint_blocks.")
    norm = "joint_blocks.0.context_block.attn.ln_k.weight"
    head = shape_of(stored, norm, 1)[0] if norm in stored else 64
    table = math.isqrt(shape_of(stored, "pos_embed", 3)[1])
    config = MMDiTConfig(
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
    return "mmdit", "original", config


def vae_part(stored: Tensors) -> tuple[str, str, VAEConfig]:
    """The autoencoder: groups, scale and shift of the latents do not show."""
    levels = count(stored, "encoder.down.")
    widths = [shape_of(stored, f"encoder.down.{i}.block.0.conv1.weight", 4) for i in range(levels)]
    config = VAEConfig(
        in_channels=shape_of(stored, "encoder.conv_in.weight", 4)[1],
        out_channels=shape_of(stored, "decoder.conv_out.weight", 4)[0],
        latent_channels=shape_of(stored, "decoder.conv_in.weight", 4)[1],
        block_out_channels=tuple(width[0] for width in widths),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=count(stored, "encoder.down.0.block."),
        norm_num_groups=32,
        sample_size=1024,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv="quant_conv.weight" in stored,
        use_post_quant_conv="post_quant_conv.weight" in stored,
    )
    return "vae", "original", config


def clip_role(stored: Tensors) -> str:
    """Whether a CLIP is SD3's first or second: L is 768 wide, and comes without its projection."""
    first = "text_projection.weight" not in stored
    wide = shape_of(stored, "text_model.embeddings.token_embedding.weight", 2)[1]
    return "text_encoder" if first or wide == 768 else "text_encoder_2"


def clip_l_part(stored: Tensors) -> tuple[str, str, CLIPConfig]:
    """The first CLIP; of either, activation, head width (64) and end-of-text id do not show."""
    return _clip_part(stored, "quick_gelu")


def clip_g_part(stored: Tensors) -> tuple[str, str, CLIPConfig]:
    """The second CLIP."""
    return _clip_part(stored, "gelu")


def _clip_part(stored: Tensors, activation: str) -> tuple[str, str, CLIPConfig]:
    vocab, width = shape_of(stored, "text_model.embeddings.token_embedding.weight", 2)
    layer, projection = "text_model.encoder.layers.", "text_projection.weight"
    projected = projection in stored
    config = CLIPConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=shape_of(stored, layer + "0.mlp.fc1.weight", 2)[0],
        projection_dim=shape_of(stored, projection, 2)[0] if projected else width,
        num_hidden_layers=count(stored, layer),
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=shape_of(
            stored, "text_model.embeddings.position_embedding.weight", 2
        )[0],
        hidden_act=activation,
        eos_token_id=2,  # as in the official configs: the text ends at its highest id
    )
    return "clip", "diffusers" if projected else "unprojected", config


def t5_part(stored: Tensors) -> tuple[str, str, T5Config]:
    """T5: all but the range of its relative positions shows."""
    shared, copy = "shared.weight", "encoder.embed_tokens.weight"
    vocab, width = shape_of(stored, shared if shared in stored else copy, 2)
    attn = "encoder.block.0.layer.0.SelfAttention."
    buckets, heads = shape_of(stored, attn + "relative_attention_bias.weight", 2)
    config = T5Config(
        vocab_size=vocab,
        d_model=width,
        d_kv=shape_of(stored, attn + "q.weight", 2)[0] // heads,
        d_ff=shape_of(stored, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 2)[0],
        num_layers=count(stored, "encoder.block."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
    )
    return "t5", "diffusers", config


CONFIGS: dict[str, Any] = {
    "transformer": mmdit_part,
    "vae": vae_part,
    "text_encoder": clip_l_part,
    "text_encoder_2": clip_g_part,
    "text_encoder_3": t5_part,
}
