"""The two families in small: which networks, how they start, how they are driven and exported.

B batch, L text tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import minidit
import weights
from minidit.clip import CLIPConfig, CLIPTextEncoder
from minidit.gemma import GemmaConfig, GemmaEncoder
from minidit.mmdit import MMDiT, MMDiTConfig
from minidit.nextdit import NextDiT, NextDiTConfig
from minidit.pipeline import Pipeline
from minidit.scheduler import SchedulerConfig
from minidit.t5 import T5Config, T5Encoder
from minidit.vae import AutoencoderKL, VAEConfig
from weights.load import load_component

PIXELS = {"lumina": 384, "sd3": 256}  # the size that each model is made for
MOST = {"lumina": 3, "sd3": 2}  # things in a picture
WINDOW = 32  # text tokens of each tokenizer of SD3
TABLE = 32  # side of SD3's position table, in tokens
SCHEDULER = SchedulerConfig(shift=3.0, default_steps=24, default_guidance=3.0)

# SD3's VAE in small, narrow where pictures are large. Our Lumina-Next has the same one, not SDXL's
# of 4 channels: it keeps more of the picture, and one training run serves both families.
VAE = VAEConfig(
    latent_channels=16,
    block_out_channels=(16, 32, 64, 128),
    norm_num_groups=2,  # few: a channel beside one other can't say how bright a plain picture is
    sample_size=256,
    scaling_factor=1.0,
    use_quant_conv=False,
    use_post_quant_conv=False,
)


def load_vae(run: Path) -> AutoencoderKL:
    """The run's own autoencoder, where it has trained one, else that of the embedded models."""
    embedded = Path(weights.__file__).with_name("mini-lumina")
    return load_component(run if (run / "vae").is_dir() else embedded, "vae")


def new_pipeline(family: str, run: Path, device: torch.device) -> Pipeline:
    """A pipeline of untrained networks with the run's VAE and the family's tokenizers."""
    shared = {"family": family, "vae": load_vae(run), "scheduler": SCHEDULER}
    tokenizer = load_component(run / family, "tokenizer")
    if family == "lumina":
        transformer, gemma = lumina_networks(tokenizer.model.get_piece_size())
        return Pipeline(
            transformer=transformer, text_encoder=gemma, tokenizer=tokenizer, **shared
        ).to(device)
    second, third = (load_component(run / family, f"tokenizer_{i}") for i in (2, 3))
    transformer, clip, clip_2, t5 = sd3_networks(len(tokenizer.vocab), third.model.get_piece_size())
    return Pipeline(
        transformer=transformer, text_encoder=clip, text_encoder_2=clip_2, text_encoder_3=t5,
        tokenizer=tokenizer, tokenizer_2=second, tokenizer_3=third, **shared,
    ).to(device)  # fmt: skip


def sd3_networks(clip_vocab: int, t5_vocab: int) -> list[nn.Module]:
    """MMDiT, CLIP, CLIP and T5 in small: 6 layers of 256 as SD3-medium would have with depth 4."""
    width, clip_widths, t5_width = 256, (64, 96), 160
    transformer = MMDiT(
        MMDiTConfig(
            sample_size=PIXELS["sd3"] // 8,
            num_layers=6,
            num_attention_heads=width // 64,
            joint_attention_dim=t5_width,
            caption_projection_dim=width,
            pooled_projection_dim=sum(clip_widths),
            pos_embed_max_size=TABLE,
        )
    )
    clips = [
        CLIPTextEncoder(
            CLIPConfig(
                vocab_size=clip_vocab,
                hidden_size=size,
                intermediate_size=4 * size,
                projection_dim=size,
                num_hidden_layers=2,
                num_attention_heads=size // 32,
                max_position_embeddings=WINDOW,
                hidden_act=act,
                eos_token_id=clip_vocab - 1,
            )
        )
        for size, act in zip(clip_widths, ("quick_gelu", "gelu"), strict=True)
    ]
    t5 = T5Encoder(
        T5Config(
            vocab_size=t5_vocab, d_model=t5_width, d_kv=32, d_ff=320, num_layers=2, num_heads=5
        )
    )
    networks = [transformer, *clips, t5]
    for network in networks:
        initialise(network)
    return networks


def lumina_networks(gemma_vocab: int) -> list[nn.Module]:
    """Next-DiT and Gemma in small: wider and deeper than our SD3, for it has one stream."""
    width, text = 320, 256
    transformer = NextDiT(
        NextDiTConfig(
            sample_size=PIXELS["lumina"] // 8,
            patch_size=2,
            in_channels=VAE.latent_channels,
            hidden_size=width,
            num_layers=8,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=64,
            ffn_dim_multiplier=None,
            norm_eps=1e-5,
            learn_sigma=True,
            qk_norm=True,
            cross_attention_dim=text,
        )
    )
    gemma = GemmaEncoder(
        GemmaConfig(
            vocab_size=gemma_vocab,
            hidden_size=text,
            intermediate_size=384,
            num_hidden_layers=3,  # the last one is never run
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=64,
            max_position_embeddings=256,
        )
    )
    networks = [transformer, gemma]
    for network in networks:
        initialise(network)
    return networks


def initialise(network: nn.Module) -> None:
    """Xavier for matrices, zero for biases, gates and the head, so that blocks start as identity.

    Random numbers come from torch's global generator.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding):
            std = 0.02 if "relative" in name else 0.3
            if isinstance(network, GemmaEncoder):  # which multiplies by the root of its width
                std = network.config.hidden_size**-0.5
            nn.init.normal_(module.weight, std=std)
        if name.endswith(("modulation", "final.linear")):
            nn.init.zeros_(module.weight)


def trainable(pipe: Any) -> nn.ModuleDict:
    """The networks that are trained together: everything but the VAE, and but what is never run."""
    names = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    networks = nn.ModuleDict({n: getattr(pipe, n) for n in names if getattr(pipe, n, None)})
    for name, weight in networks.named_parameters():
        weight.requires_grad_(not idle(pipe, name))
    return networks


def idle(pipe: Any, name: str) -> bool:
    """Whether a parameter takes no part: Lumina reads what enters Gemma's last layer, and
    Next-DiT's pad_token serves batches of unequal sizes, which we lack."""
    if pipe.family != "lumina":
        return False
    last = f"text_encoder.layers.{len(pipe.text_encoder.layers) - 1}."
    return name.startswith((last, "text_encoder.final_norm", "transformer.pad_token"))


def place(pipe: Any, side: int) -> None:
    """Set SD3's position table for pictures of a side: always the same coordinates edge to edge.

    A token of a 128 pixel picture stands for four of a 256 pixel one and gets the position in their
    midst, so that what was learnt about places carries over. Next-DiT scales its rotary positions
    itself.
    """
    if pipe.family != "sd3":
        return
    grid, full = side // 16, PIXELS["sd3"] // 16
    at = (torch.arange(TABLE) - (TABLE - grid) / 2 + 0.5) * full / grid - 0.5  # (TABLE,)
    width = pipe.transformer.config.width
    rates = 100.0 ** (-torch.arange(width // 4) / (width // 4))
    angles = at[:, None] * rates  # (TABLE, width / 4)
    one = torch.cat((angles.sin(), angles.cos()), dim=1)  # (TABLE, width / 2)
    shape = (TABLE, TABLE, width // 2)
    table = torch.cat((one[None, :].expand(shape), one[:, None].expand(shape)), dim=2)
    pipe.transformer.pos_embed.copy_(table.reshape(1, TABLE * TABLE, width))


def export(family: str, run: Path, out: Path, scheduler: SchedulerConfig) -> None:
    """Write the averaged networks of a run's checkpoint as a whole model."""
    pipe = new_pipeline(family, run, torch.device("cpu"))
    state = torch.load(run / family / "checkpoint.pt", map_location="cpu")
    trainable(pipe).load_state_dict(state["average"])
    place(pipe, PIXELS[family])
    pipe.scheduler = scheduler
    minidit.save(pipe, out, torch.bfloat16)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"wrote {out}, {size / 1e6:.1f} MB")
