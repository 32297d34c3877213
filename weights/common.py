"""Networks that several families share: key maps of VAE, CLIP, T5 and Gemma.

In the tables our modules are on the left, the files on the right (see keymap.py). Sources: the
official files' tensor lists, and the loaders of diffusers and of Stability AI, which agree.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from minidit.clip import CLIPConfig, CLIPTextEncoder
from minidit.gemma import GemmaConfig, GemmaEncoder
from minidit.t5 import T5Config, T5Encoder
from minidit.vae import AutoencoderKL, VAEConfig
from weights.files import Tensors, count, shape_of
from weights.keymap import Network, Same, Source, Table


def vae(config: VAEConfig, names: Collection[str] = ()) -> Table:
    """The KL autoencoder: the diffusers layout, and Stability AI's, which counts the decoder's
    levels backwards. Old diffusers files call the attention's matrices query, key, value and
    proj_attn."""
    table: dict[str, Any] = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}

    def resnet(ours: str, diffusers: str, original: str) -> None:
        table[f"{ours}.norm*"] = (f"{diffusers}.norm*", f"{original}.norm*")
        table[f"{ours}.conv*"] = (f"{diffusers}.conv*", f"{original}.conv*")
        table[f"{ours}.shortcut"] = (f"{diffusers}.conv_shortcut", f"{original}.nin_shortcut")

    for half in ("encoder", "decoder"):
        attn, mid = f"{half}.mid_block.attentions.0.", f"{half}.mid.attn_1."
        old = attn + "query.weight" in names
        new = "query key value proj_attn" if old else "to_q to_k to_v to_out.0"
        for ours, name in zip(("q", "k", "v", "out"), new.split(), strict=True):
            theirs = mid + ours.replace("out", "proj_out")
            table[f"{half}.mid.attn.{ours}"] = (attn + name, theirs)
        table[f"{half}.mid.attn.norm"] = (attn + "group_norm", mid + "norm")
        for i in (1, 2):
            new, theirs = f"{half}.mid_block.resnets.{i - 1}", f"{half}.mid.block_{i}"
            resnet(f"{half}.mid.resnet{i}", new, theirs)
        table[f"{half}.conv_in"] = f"{half}.conv_in"
        table[f"{half}.norm_out"] = (f"{half}.conv_norm_out", f"{half}.norm_out")
        table[f"{half}.conv_out"] = f"{half}.conv_out"
    down, sai = "encoder.down_blocks.*.", "encoder.down.*."
    resnet("encoder.down.*.resnets.*", down + "resnets.*", sai + "block.*")
    table["encoder.down.*.downsample"] = (down + "downsamplers.0.conv", sai + "downsample.conv")
    levels = len(config.block_out_channels)
    for i in range(levels):
        up, sai = f"decoder.up_blocks.{i}.", f"decoder.up.{levels - 1 - i}."
        resnet(f"decoder.up.{i}.resnets.*", up + "resnets.*", sai + "block.*")
        table[f"decoder.up.{i}.upsample"] = (up + "upsamplers.0.conv", sai + "upsample.conv")
    return table


def clip(config: CLIPConfig, names: Collection[str] = ()) -> Table:
    """CLIP with the names of transformers, which all published layouts share; without a projection
    (Stability AI's clip_l, FLUX) ours is the identity."""
    layer = "text_model.encoder.layers.*."
    return {
        "token_embed": "text_model.embeddings.token_embedding",
        "pos_embed": "text_model.embeddings.position_embedding",
        "layers.*.norm*": layer + "layer_norm*",
        "layers.*.attn.?": layer + "self_attn.?_proj",
        "layers.*.attn.out": layer + "self_attn.out_proj",
        "layers.*.mlp.fc*": layer + "mlp.fc*",
        "final_norm": "text_model.final_layer_norm",
        "projection": ("text_projection", []),
    }


def t5(config: T5Config, names: Collection[str] = ()) -> Table:
    """T5 encoder with the names of transformers, which all published layouts share.

    The embedding goes by one name or two: the diffusers folders have `shared`, the single files
    that and a copy.
    """
    embed: Source = "shared"
    if "encoder.embed_tokens.weight" in names:
        both = "shared.weight" in names
        embed = Same("shared", "encoder.embed_tokens") if both else "encoder.embed_tokens"
    attn, mlp = "encoder.block.*.layer.0.", "encoder.block.*.layer.1."
    return {
        "token_embed": embed,
        "relative_bias": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        "layers.*.norm1": attn + "layer_norm",
        "layers.*.attn.?": attn + "SelfAttention.?",
        "layers.*.attn.out": attn + "SelfAttention.o",
        "layers.*.norm2": mlp + "layer_norm",
        "layers.*.mlp.gate": mlp + "DenseReluDense.wi_0",
        "layers.*.mlp.up": mlp + "DenseReluDense.wi_1",
        "layers.*.mlp.down": mlp + "DenseReluDense.wo",
        "final_norm": "encoder.final_layer_norm",
    }


def gemma(config: GemmaConfig, names: Collection[str] = ()) -> Table:
    """Gemma with the names of transformers: google's files put `model.` first, Lumina's do not.

    Gemma 2 calls a norm behind attention what Gemma calls the one before the MLP.
    """
    model = "model." if "model.embed_tokens.weight" in names else ""
    layer = model + "layers.*."
    before_mlp = "pre_feedforward_layernorm" if config.second else "post_attention_layernorm"
    return {
        "token_embed": model + "embed_tokens",
        "layers.*.norm1": layer + "input_layernorm",
        "layers.*.attn.?": layer + "self_attn.?_proj",
        "layers.*.attn.out": layer + "self_attn.o_proj",
        "layers.*.post_norm1": layer + "post_attention_layernorm",
        "layers.*.norm2": layer + before_mlp,
        "layers.*.post_norm2": layer + "post_feedforward_layernorm",
        "layers.*.mlp.gate": layer + "mlp.gate_proj",
        "layers.*.mlp.up": layer + "mlp.up_proj",
        "layers.*.mlp.down": layer + "mlp.down_proj",
        "final_norm": model + "norm",
    }


# Sizes of the networks in files without a config: from the shapes where shapes tell, otherwise what
# all published models have. ValueError if a shape makes no sense.


def vae_sizes(stored: Tensors) -> tuple[str, VAEConfig]:
    """Groups do not show, nor do scale and shift of the latents: see `Family.latents`."""
    levels = count(stored, "encoder.down.")
    return "original", VAEConfig(
        in_channels=shape_of(stored, "encoder.conv_in.weight", 4)[1],
        out_channels=shape_of(stored, "decoder.conv_out.weight", 4)[0],
        latent_channels=shape_of(stored, "decoder.conv_in.weight", 4)[1],
        block_out_channels=tuple(
            shape_of(stored, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(levels)
        ),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=count(stored, "encoder.down.0.block."),
        sample_size=1024,
        use_quant_conv="quant_conv.weight" in stored,
        use_post_quant_conv="post_quant_conv.weight" in stored,
    )


def is_clip_l(stored: Tensors) -> bool:
    """Whether a CLIP is SD3's first: 768 wide, and without a projection where it comes alone."""
    wide = shape_of(stored, "text_model.embeddings.token_embedding.weight", 2)[1]
    return "text_projection.weight" not in stored or wide == 768


def clip_sizes(stored: Tensors) -> tuple[str, CLIPConfig]:
    """Activation, head width (64) and end-of-text id do not show."""
    vocab, width = shape_of(stored, "text_model.embeddings.token_embedding.weight", 2)
    layer, projection = "text_model.encoder.layers.", "text_projection.weight"
    projected = projection in stored
    places = shape_of(stored, "text_model.embeddings.position_embedding.weight", 2)[0]
    return "diffusers" if projected else "unprojected", CLIPConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=shape_of(stored, layer + "0.mlp.fc1.weight", 2)[0],
        projection_dim=shape_of(stored, projection, 2)[0] if projected else width,
        num_hidden_layers=count(stored, layer),
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=places,
        hidden_act="quick_gelu" if is_clip_l(stored) else "gelu",
        eos_token_id=2,  # as in the official configs: the text ends at its highest id
    )


def t5_sizes(stored: Tensors) -> tuple[str, T5Config]:
    """All but the range of relative positions shows."""
    shared, copy = "shared.weight", "encoder.embed_tokens.weight"
    vocab, width = shape_of(stored, shared if shared in stored else copy, 2)
    attn = "encoder.block.0.layer.0.SelfAttention."
    buckets, heads = shape_of(stored, attn + "relative_attention_bias.weight", 2)
    return "diffusers", T5Config(
        vocab_size=vocab,
        d_model=width,
        d_kv=shape_of(stored, attn + "q.weight", 2)[0] // heads,
        d_ff=shape_of(stored, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 2)[0],
        num_layers=count(stored, "encoder.block."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
    )


NETWORKS = {
    "vae": Network(
        AutoencoderKL,
        VAEConfig,
        vae,
        classes=("AutoencoderKL",),
        sign="encoder.down.0.block.0.conv1.weight",
        sizes=vae_sizes,
        convs=True,
    ),
    "clip": Network(
        CLIPTextEncoder,
        CLIPConfig,
        clip,
        classes=("CLIPTextModelWithProjection", "CLIPTextModel", "clip_text_model"),
        extras={"model_type": "clip_text_model"},
        sign="text_model.embeddings.token_embedding.weight",
        sizes=clip_sizes,
        ignore=("text_model.embeddings.position_ids",),
    ),
    "t5": Network(
        T5Encoder,
        T5Config,
        t5,
        classes=("T5EncoderModel", "t5"),
        extras={"model_type": "t5", "is_encoder_decoder": False, "tie_word_embeddings": False},
        sign="encoder.final_layer_norm.weight",
        sizes=t5_sizes,
    ),
    "gemma": Network(
        GemmaEncoder,
        GemmaConfig,
        gemma,
        classes=("GemmaModel", "GemmaForCausalLM", "gemma"),
        extras={"model_type": "gemma"},
        ignore=("lm_head.weight",),  # the embedding once more
    ),
}
NETWORKS["gemma2"] = NETWORKS["gemma"]._replace(
    classes=("Gemma2Model", "Gemma2ForCausalLM", "gemma2"), extras={"model_type": "gemma2"}
)
