"""Train the embedded models: a small SD3 or Lumina-Next, text encoders included, on a CPU.

    npm install @lobehub/fluent-emoji-3d@1.1.0 unicode-emoji-json@0.9.0
    python examples/train.py vae     --family sd3 --run runs/sd3    # the autoencoder
    python examples/train.py prepare --family sd3 --run runs/sd3    # tokenizers and latents
    python examples/train.py text    --family sd3 --run runs/sd3    # the text encoders alone
    python examples/train.py train   --family sd3 --run runs/sd3 --size 128 --steps 6000
    python examples/train.py train   --family sd3 --run runs/sd3 --size 256 --steps 20000
    python examples/train.py export  --family sd3 --run runs/sd3 --out my-sd3
    python examples/train.py measure --model my-sd3

`vae` and `train` go on where they were interrupted. A step's data, noise and times are a function
of seed and step number alone, so a resumed run makes the very steps of an uninterrupted one.

Published models read prompts with encoders that others trained on much text. Ours learn from the
captions alone, in a stage of their own (`text`): to predict a thumbnail of the picture. After that
the transformer learns the velocity of a rectified flow, first at 128 pixels, where a step costs a
quarter, then at 256. Matrices are updated by Muon (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon), everything else by AdamW.

B batch, C latent channels, h and w latent size.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import re
import shutil
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

# threads that wait must sleep: spinning ones make a shared machine several times slower
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import minidit
from examples import emoji
from minidit import tokenizers
from minidit.clip import CLIPConfig, CLIPTextEncoder
from minidit.flow import SchedulerConfig
from minidit.gemma import GemmaConfig, GemmaEncoder
from minidit.mmdit import MMDiT, MMDiTConfig
from minidit.pipeline import LuminaPipeline, SD3Pipeline, to_image
from minidit.t5 import T5Config, T5Encoder
from minidit.vae import AutoencoderKL, VAEConfig
from weights.keymap import recipes, write_out
from weights.load import load_component
from weights.model import FAMILIES
from weights.networks import KINDS

PIXELS = 256  # the size that the models are made for
WINDOW = 24  # text tokens of each tokenizer of SD3
MERGES = 2500  # of the CLIP vocabulary: nearly every word of the captions becomes one token
PIECES = 1600  # of the SentencePiece vocabularies
TABLE = 32  # side of SD3's position table, in tokens
SCHEDULER = SchedulerConfig(shift=3.0, default_steps=24, default_guidance=4.0)

PROMPTS = (
    "red apple on a sky blue background",
    "panda on a pink background",
    "grinning face on a white background",
    "pizza on a teal background",
    "tiger face on a lavender background",
    "hamburger on a black background",
    "red heart",
    "fox on a lime green background",
    "strawberry on a yellow background",
    "smiling face with sunglasses on a navy blue background",
    "watermelon on a beige background",
    "unicorn on a purple background",
    "rocket on a navy blue background",
    "guitar on a yellow background",
    "soccer ball on a green background",
    "octopus on a beige background",
    "cactus on an orange background",
    "robot on a magenta background",
    "sailboat on a pink background",
    "castle on a sky blue background",
    "banana on a purple background",
    "penguin on a red background",
    "crown on a gray background",
    "camera on a brown background",
)  # fmt: skip


# ---------------------------------------------------------------- the two families


def new_pipeline(family: str, run: Path) -> SD3Pipeline | LuminaPipeline:
    """A pipeline of untrained networks with the run's tokenizers and VAE."""
    device = torch.device("cpu")
    vae = load_component(run, "vae")
    tokenizer = load_component(run, "tokenizer")
    if family == "sd3":
        second, third = (load_component(run, f"tokenizer_{i}") for i in (2, 3))
        transformer, clip, clip_2, t5 = sd3_networks(
            len(tokenizer.vocab), third.model.get_piece_size()
        )
        return SD3Pipeline(
            transformer, vae, SCHEDULER, clip, clip_2, tokenizer, second, t5, third, device
        )
    transformer, gemma = lumina_networks(tokenizer.model.get_piece_size())
    return LuminaPipeline(transformer, vae, SCHEDULER, gemma, tokenizer, device)


def sd3_networks(clip_vocab: int, t5_vocab: int) -> list[nn.Module]:
    """MMDiT, CLIP, CLIP and T5 in small: 6 layers of 256 as SD3-medium would have with depth 4."""
    width, clip_widths, t5_width = 256, (64, 96), 160
    transformer = MMDiT(
        MMDiTConfig(
            sample_size=PIXELS // 8,
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
    """Next-DiT and Gemma in small: as many layers as our SD3, wider, for it has one stream."""
    from minidit.nextdit import NextDiT, NextDiTConfig

    width, text = 320, 256
    transformer = NextDiT(
        NextDiTConfig(
            sample_size=PIXELS // 8,
            patch_size=2,
            in_channels=VAE.latent_channels,
            hidden_size=width,
            num_layers=6,
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
    """The networks that are trained together: everything but the VAE."""
    names = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    return nn.ModuleDict({n: getattr(pipe, n) for n in names if getattr(pipe, n, None) is not None})


def encode(pipe: Any, captions: list[str]) -> dict[str, Tensor]:
    """The transformer's conditioning arguments for captions, with gradients if they are on."""
    if isinstance(pipe, SD3Pipeline):
        return pipe.encode(captions, captions, captions)
    return pipe.encode(captions)


def place(pipe: Any, pixels: int) -> None:
    """Set SD3's position table for training at a size: always the same coordinates edge to edge.

    A token of a 128 pixel picture stands for four of a 256 pixel one and gets the position in their
    midst, so that what was learnt about places carries over. Next-DiT's rotary positions do the
    same by themselves.
    """
    if not isinstance(pipe, SD3Pipeline):
        return
    grid, full = pixels // 16, PIXELS // 16
    at = (torch.arange(TABLE) - (TABLE - grid) / 2 + 0.5) * full / grid - 0.5  # (TABLE,)
    width = pipe.transformer.config.width
    rates = 100.0 ** (-torch.arange(width // 4) / (width // 4))
    angles = at[:, None] * rates  # (TABLE, width / 4)
    one = torch.cat((angles.sin(), angles.cos()), dim=1)  # (TABLE, width / 2)
    shape = (TABLE, TABLE, width // 2)
    table = torch.cat((one[None, :].expand(shape), one[:, None].expand(shape)), dim=2)
    pipe.transformer.pos_embed.copy_(table.reshape(1, TABLE * TABLE, width))


# ---------------------------------------------------------------- tokenizers


def train_bpe(texts: list[str], merges: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's byte-level BPE: vocabulary and merges, the most frequent pair first.

    Ties go to the pair that comes first in alphabetical order.
    """
    words = Counter(word for text in texts for word in tokenizers.words(text.lower()))
    pieces = {}
    for word in words:
        letters = [tokenizers.CHARACTERS[byte] for byte in word.encode()]
        pieces[word] = [*letters[:-1], letters[-1] + "</w>"]
    learnt: list[tuple[str, str]] = []
    for _ in range(merges):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in pairwise(pieces[word]):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        learnt.append(best)
        for word in words:
            if len(pieces[word]) > 1:
                pieces[word] = tokenizers.join(pieces[word], best)
    letters = sorted(tokenizers.CHARACTERS)  # "!" is number 0, as in the official vocabulary
    names = [*letters, *(letter + "</w>" for letter in letters)]
    names += dict.fromkeys("".join(pair) for pair in learnt)
    names += ["<|startoftext|>", "<|endoftext|>"]
    return {name: number for number, name in enumerate(names)}, learnt


def write_tokenizers(family: str, names: list[str], run: Path) -> None:
    """Train the family's tokenizers on all captions and write them as the official files."""
    texts = [emoji.caption(name, colour) for name in names for colour in emoji.COLOURS]
    texts += [f"{article} {name}" for name in names for article in ("a", "an")] * 2
    if family == "lumina":
        write_sentencepiece(
            [text.lower() for text in texts], run / "tokenizer/tokenizer.model", pad_id=0, eos_id=1,
            bos_id=2, unk_id=3, byte_fallback=True, normalization_rule_name="identity",
            add_dummy_prefix=False, remove_extra_whitespaces=False,
        )  # fmt: skip
        tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
        config = {"tokenizer_class": "GemmaTokenizer", **tokens, "unk_token": "<unk>"}
        write_json(run / "tokenizer/tokenizer_config.json", config | {"padding_side": "right"})
        return
    vocab, merges = train_bpe(texts, MERGES)
    for folder, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        write_json(run / folder / "vocab.json", vocab)
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
        (run / folder / "merges.txt").write_text("\n".join(lines), "utf-8")
        end = "<|endoftext|>"
        tokens = {"bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end}
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": WINDOW, **tokens}
        write_json(run / folder / "tokenizer_config.json", config | {"pad_token": pad})
    write_sentencepiece(
        texts, run / "tokenizer_3/spiece.model", pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        normalization_rule_name="nmt_nfkc_cf",
    )  # fmt: skip
    tokens = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "extra_ids": 0}
    config = {"tokenizer_class": "T5Tokenizer", "model_max_length": WINDOW, **tokens}
    write_json(run / "tokenizer_3/tokenizer_config.json", config)


def write_sentencepiece(texts: list[str], path: Path, **options: Any) -> None:
    """Train a SentencePiece unigram model on texts and write it to path."""
    names = ("pad", "eos", "bos") if options["bos_id"] >= 0 else ("pad",)
    pieces = {f"{name}_piece": f"<{name}>" for name in names}
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=file, vocab_size=PIECES,
            model_type="unigram", hard_vocab_limit=False, character_coverage=1.0,
            num_threads=1, minloglevel=2, **pieces, **options,
        )  # fmt: skip


# ---------------------------------------------------------------- data


def prepare(family: str, run: Path, packages: Path, sizes: list[int], colours: int) -> None:
    """Tokenizers, and the latents of every name on `colours` colours, at each size in pixels."""
    found = emoji.find_emoji(packages)
    names, groups = [e.name for e in found], [e.group for e in found]
    folder = run / "data"
    write_json(folder / "emoji.json", {"names": names, "groups": groups})
    write_tokenizers(family, names, run)
    vae = load_component(run, "vae")
    for size in sizes:
        path, part = folder / f"{family}-{size}.npy", folder / f"{family}-{size}.part"
        if path.is_file():
            continue
        shape = (len(found), colours, vae.config.latent_channels, size // 8, size // 8)
        array = np.lib.format.open_memmap(part, mode="w+", dtype=np.float16, shape=shape)
        values = list(emoji.COLOURS.values())
        for i, one in enumerate(tqdm(found, desc=f"encoding {size} px", unit="name")):
            backgrounds = [values[j] for j in emoji.shown(i, colours)]
            images = emoji.compose(emoji.read(one, size), backgrounds)
            array[i] = encode_images(vae, images).numpy()
        array.flush()
        del array
        os.replace(part, path)


@torch.no_grad()
def encode_images(vae: nn.Module, images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 latents (B, C, H/8, W/8), computed in bfloat16."""
    with autocast():
        return vae.encode(to_pixels(images)).float()


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1], channels last in memory."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


# ---------------------------------------------------------------- autoencoder


# SD3's VAE in small. Our Lumina-Next has the same one, not SDXL's of 4 channels: it keeps more
# of the picture, and one training run serves both families.
VAE = VAEConfig(
    latent_channels=16,
    block_out_channels=(32, 64, 96, 96),
    norm_num_groups=8,
    sample_size=PIXELS,
    scaling_factor=1.0,
    use_quant_conv=False,
    use_post_quant_conv=False,
)


def train_vae(
    family: str, run: Path, packages: Path, steps: int, batch: int, lr: float,
    init: Path | None = None, save_every: int = 100, seed: int = 0,
) -> None:  # fmt: skip
    """Train the autoencoder on crops, and write it with the scale that its latents need.

    Loss: absolute and squared error of the pixels, absolute error of their differences to the
    neighbours, which keeps edges sharp, and a little of the usual pull towards a unit Gaussian.
    init is a folder with a vae, of any number of latent channels, to take over what fits.
    """
    found = emoji.find_emoji(packages)
    pictures = [emoji.read(e, PIXELS) for e in found]
    torch.manual_seed(seed)
    vae = AutoencoderKL(VAE).to(memory_format=torch.channels_last)
    if init is not None:
        given, state = load_component(init, "vae").state_dict(), vae.state_dict()
        state |= {n: t for n, t in given.items() if n in state and t.shape == state[n].shape}
        vae.load_state_dict(state)
    average = copy.deepcopy(vae).requires_grad_(False)
    adam = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0)
    done, checkpoint = 0, run / "vae.pt"
    if checkpoint.is_file():
        state = torch.load(checkpoint, map_location="cpu")
        vae.load_state_dict(state["vae"])
        average.load_state_dict(state["average"])
        adam.load_state_dict(state["adam"])
        done = state["steps"]
    started, logged = time.time(), []
    for step in range(done, steps):
        rng = random.Random(f"{seed}/{step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        images = to_pixels(emoji.crops(pictures, batch, 64 if step < steps // 2 else 96, rng))
        with autocast():
            mean, logvar = vae.moments(images)  # (B, C, h, w) each
            mean, logvar = mean.float(), logvar.float()
            noise = torch.randn(mean.shape, generator=generator)
            drawn = vae.decode(mean + (logvar / 2).exp() * noise).float()
        error = drawn - images  # (B, 3, H, W)
        kl = (mean.square() + logvar.exp() - 1 - logvar).mean() / 2
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        loss = error.abs().mean() + error.square().mean() + edges / 2 + 1e-4 * kl
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for group in adam.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * min(1, 2 * (steps - step) / steps)
        adam.step()
        adam.zero_grad()
        weight = max(0.002, 1 / (step + 1))
        torch._foreach_lerp_(list(average.parameters()), list(vae.parameters()), weight)
        logged.append(error.detach().square().mean())
        if (step + 1) % save_every == 0 or step + 1 == steps:
            psnr = 10 * math.log10(4 / torch.stack(logged).mean().item())
            pace = (time.time() - started) / (step + 1 - done)
            left, logged = pace * (steps - step - 1) / 60, []
            print(f"step {step + 1:6d}  {psnr:.2f} dB on crops  {left:.1f} min left", flush=True)
            state = {"vae": vae.state_dict(), "average": average.state_dict()}
            save(state | {"adam": adam.state_dict(), "steps": step + 1}, checkpoint)

    # what the transformer sees shall have mean 0 (where the family allows a shift) and deviation 1
    images = emoji.crops(pictures, 32, PIXELS, random.Random("scale"))
    latents = torch.cat([encode_images(average, part[None]) for part in images])  # (B, C, h, w)
    shift = latents.mean().item() if family == "sd3" else 0.0
    scale = 1 / (latents - shift).square().mean().sqrt().item()
    config = replace(average.config, scaling_factor=round(scale, 4))
    if family == "sd3":
        config = replace(config, shift_factor=round(shift, 4))
    final = AutoencoderKL(config)
    final.load_state_dict(average.state_dict())
    write_network(final, run / "vae")


# ---------------------------------------------------------------- optimiser


class Muon:
    """Momentum, made orthogonal before it is applied: every direction of a matrix moves alike.

    Matrices that are several in one (qkv, the chunks of a modulation) are treated one by one.
    Matrices of one shape are stacked, so that the Newton-Schulz iteration is a few large products.
    """

    def __init__(self, named: list[tuple[str, nn.Parameter]], decay: float = 0.01) -> None:
        self.decay = decay
        self.groups: dict[tuple[int, int], list[tuple[nn.Parameter, int]]] = {}
        for name, weight in named:
            rows, columns = weight.shape
            several = name.endswith(("qkv.weight", "modulation.weight")) and rows % columns == 0
            parts = rows // columns if several else 1
            self.groups.setdefault((rows // parts, columns), []).append((weight, parts))
        self.momentum = {
            shape: torch.zeros(sum(parts for _, parts in group), *shape)
            for shape, group in self.groups.items()
        }

    @torch.no_grad()
    def step(self, lr: float, beta: float = 0.95) -> None:
        for (rows, columns), group in self.groups.items():
            momentum = self.momentum[rows, columns]  # (matrices, rows, columns)
            grads = torch.cat([weight.grad.view(-1, rows, columns) for weight, _ in group])
            momentum.lerp_(grads, 1 - beta)
            update = orthogonal(grads.lerp_(momentum, beta))  # Nesterov's look ahead
            scale = lr * max(1, rows / columns) ** 0.5
            pieces = update.float().split([parts for _, parts in group])
            weights = [weight.data.view(-1, rows, columns) for weight, _ in group]
            torch._foreach_mul_(weights, 1 - lr * self.decay)
            torch._foreach_add_(weights, pieces, alpha=-scale)

    def zero_grad(self) -> None:
        for group in self.groups.values():
            for weight, _ in group:
                weight.grad = None


def orthogonal(matrices: Tensor, iterations: int = 5) -> Tensor:
    """The nearest orthogonal matrices (n, rows, columns), roughly: singular values 0.7 to 1.2.

    Newton-Schulz iteration with Jordan's coefficients, in bfloat16.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16().contiguous()
    x /= x.norm(dim=(1, 2), keepdim=True) + 1e-7
    for _ in range(iterations):
        a = torch.bmm(x, x.mT)
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return x.mT if tall else x


# ---------------------------------------------------------------- text encoders


def train_text(
    family: str, run: Path, steps: int, batch: int, size: int = 128, seed: int = 0
) -> None:
    """Teach the text encoders what the pictures look like, before there is a transformer.

    The official encoders come trained on more text than there is in our captions; a transformer
    that trains together with raw ones finds out very slowly that names matter. So each kind of
    their output learns first to predict, by one linear map, a thumbnail of the picture: its latents
    at 8 x 8. Nothing but the encoders is kept, in text.pt of the run.
    """
    torch.manual_seed(seed)
    data = emoji.Latents(run / "data", family, size)
    pipe = new_pipeline(family, run)
    encoders = trainable(pipe).train().requires_grad_(True)
    del encoders["transformer"]
    sizes = [view.shape[1] for view in text_views(encode(pipe, [""]))]
    heads = nn.ModuleList(nn.Linear(size, 64 * data.array.shape[2]) for size in sizes)
    muon, adam = optimisers(pipe, encoders, heads)
    plan, started, losses = Plan(steps=steps, cooldown=steps // 3), time.time(), []
    for step in range(steps):
        pictures, captions = data.batch(batch, random.Random(f"text/{seed}/{step}"))
        target = F.adaptive_avg_pool2d(torch.from_numpy(pictures), 8).flatten(1)  # (B, 64 * C)
        with autocast(), PlainAttention():
            views = text_views(encode(pipe, captions))
            drawn = [head(view) for head, view in zip(heads, views, strict=True)]
        loss = sum(F.mse_loss(one.float(), target) for one in drawn) / len(heads)
        loss.backward()
        update(muon, adam, plan, step)
        losses.append(loss.detach())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            mean, losses = torch.stack(losses).mean().item(), []
            left = (time.time() - started) / (step + 1) * (steps - step - 1) / 60
            print(f"step {step + 1:6d}  loss {mean:.4f}  {left:.1f} min left", flush=True)
    save(encoders.state_dict(), run / "text.pt")


def text_views(cond: dict[str, Tensor]) -> list[Tensor]:
    """The conditioning as vectors (B, size): SD3's pooled state and the mean of each window, or
    the mean of Lumina's states."""
    if "pooled" in cond:
        return [cond["pooled"], *(half.mean(dim=1) for half in cond["context"].chunk(2, dim=1))]
    mask = cond["context_mask"][..., None]  # (B, L, 1)
    return [(cond["context"] * mask).sum(dim=1) / mask.sum(dim=1)]


def optimisers(pipe: Any, *networks: nn.Module) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the matrices inside blocks and layers, AdamW for all other parameters."""
    named = [pair for network in networks for pair in network.named_parameters()]
    if isinstance(pipe, LuminaPipeline):  # it reads what enters Gemma's last layer
        unread = f"text_encoder.layers.{len(pipe.text_encoder.layers) - 1}."
        named = [(n, p) for n, p in named if not n.startswith(unread)]
    inner = [(n, p) for n, p in named if re.search(r"(^|\.)(blocks|layers)\.", n)]
    matrices = [(n, p) for n, p in inner if p.ndim == 2]
    chosen = {id(p) for _, p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    return Muon(matrices), torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=0, foreach=True)


def update(muon: Muon, adam: torch.optim.AdamW, plan: Plan, step: int) -> None:
    """One step of both optimisers at the plan's rates; forgets the gradients."""
    rate = plan.rate(step)
    muon.step(plan.muon_lr * rate)
    for group in adam.param_groups:
        group["lr"] = plan.adam_lr * rate
    adam.step()
    adam.zero_grad()
    muon.zero_grad()


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class Plan:
    """What decides a training run's every number; steps may be raised when it goes on."""

    size: int = 256  # pixels
    steps: int = 20000  # in all, earlier sizes included
    batch: int = 32
    muon_lr: float = 0.02
    adam_lr: float = 2e-3
    warmup: int = 100
    cooldown: int = 0  # the last steps, in which the learning rate falls to 0
    shift: float = 4.0  # of the noise levels, towards noise: where the prompt decides
    empty: float = 0.1  # share of captions left empty, for guidance
    joint: int = 0  # 1 trains the text encoders on together with the transformer
    seed: int = 0

    def rate(self, step: int) -> float:
        """Factor of the learning rates at a step."""
        rising = min(1.0, (step + 1) / self.warmup)
        return rising * min(1.0, (self.steps - step) / max(1, self.cooldown))


class Trainer:
    """Networks, their running average and the optimisers; `state` is all that a run has to keep."""

    def __init__(self, pipe: Any, plan: Plan) -> None:
        self.pipe, self.plan, self.steps = pipe, plan, 0
        self.networks = trainable(pipe).train().requires_grad_(False)
        learning = self.networks if plan.joint else self.networks["transformer"]
        self.muon, self.adam = optimisers(pipe, learning.requires_grad_(True))
        self.average = copy.deepcopy(self.networks).requires_grad_(False).eval()

    def step(self, data: emoji.Latents) -> Tensor:
        """One update; returns its loss, detached."""
        plan = self.plan
        rng = random.Random(f"{plan.seed}/{self.steps}")
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        pictures, captions = data.batch(plan.batch, rng)
        captions = ["" if rng.random() < plan.empty else text for text in captions]

        clean = torch.from_numpy(pictures)  # (B, C, h, w)
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.randn(plan.batch, generator=generator).sigmoid()
        sigma = plan.shift * t / (1 + (plan.shift - 1) * t)  # (B,)
        noisy = torch.lerp(clean, noise, sigma[:, None, None, None])
        with autocast(), PlainAttention():
            cond = encode(self.pipe, captions)
            velocity = self.pipe.transformer(noisy, sigma, **cond)
        loss = F.mse_loss(velocity.float(), noise - clean)

        loss.backward()
        update(self.muon, self.adam, plan, self.steps)
        self.steps += 1
        # an average over about the last tenth of the run, however long it gets (Karras et al. 2024)
        weight = min(1.0, 8 / (self.steps + 1))
        torch._foreach_lerp_(
            list(self.average.parameters()), list(self.networks.parameters()), weight
        )
        return loss.detach()

    def averaged(self) -> Any:
        """The pipeline with the averaged networks, for drawing."""
        return replace(self.pipe, **dict(self.average.items()))

    def state(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "networks": self.networks.state_dict(),
            "average": self.average.state_dict(),
            "muon": self.muon.momentum,
            "adam": self.adam.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.networks.load_state_dict(state["networks"])
        self.average.load_state_dict(state["average"])
        for shape, momentum in state["muon"].items():
            self.muon.momentum[shape].copy_(momentum)
        self.adam.load_state_dict(state["adam"])


def train(family: str, run: Path, plan: Plan, save_minutes: float, sheet_minutes: float) -> None:
    """Train until plan.steps, with checkpoints and sample sheets on the way."""
    torch.manual_seed(plan.seed)
    data = emoji.Latents(run / "data", family, plan.size)
    pipe = new_pipeline(family, run)
    if (run / "text.pt").is_file():
        trainable(pipe).load_state_dict(torch.load(run / "text.pt"), strict=False)
    trainer = Trainer(pipe, plan)
    checkpoint = run / "checkpoint.pt"
    if checkpoint.is_file():
        trainer.load(torch.load(checkpoint, map_location="cpu"))
        print(f"going on from step {trainer.steps} of {checkpoint}")
    for pipe in (trainer.pipe, trainer.averaged()):
        place(pipe, plan.size)
    size = sum(p.numel() for p in trainer.networks.parameters())
    print(f"{family}: {size / 1e6:.1f} M parameters, {len(data.names)} names, {plan}", flush=True)

    losses: list[Tensor] = []
    started = saved = drawn = logged = time.time()
    while trainer.steps < plan.steps:
        losses.append(trainer.step(data))
        now, done = time.time(), trainer.steps >= plan.steps
        if trainer.steps % 50 == 0 or done:
            count = len(losses)
            loss, losses = torch.stack(losses).mean().item(), []
            pace, logged = (now - logged) / count, now
            left = pace * (plan.steps - trainer.steps) / 60
            print(
                f"step {trainer.steps:6d}  loss {loss:.4f}  {pace:.3f} s a step  "
                f"{(now - started) / 60:.1f} min run, {left:.1f} min left",
                flush=True,
            )
            if not math.isfinite(loss):
                raise RuntimeError(f"the loss is {loss} at step {trainer.steps}; lower --muon-lr")
        if done or now - saved > 60 * save_minutes:
            save(trainer.state(), checkpoint)
            saved = time.time()
        if done or now - drawn > 60 * sheet_minutes:
            path = run / f"sheets/{plan.size}-{trainer.steps:06d}.png"
            draw_sheet(trainer.averaged(), PROMPTS, plan.size, path)
            drawn = time.time()
            print(f"wrote {path}", flush=True)


def save(state: Any, path: Path) -> None:
    """Write a checkpoint so that an interruption leaves the old one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def draw_sheet(pipe: Any, prompts: tuple[str, ...], size: int, path: Path) -> None:
    """One picture a prompt, all from the same noise, as one image."""
    columns = 6
    with autocast():
        images = pipe(list(prompts), height=size, width=size, seed=0, steps=14).images
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * size, rows * size))
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * size, i // columns * size))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


class PlainAttention(TorchFunctionMode):
    """Within it, attention is two matrix products and a softmax instead of torch's fused kernel.

    On a CPU, at a few hundred tokens, the fused kernel's backward pass takes three to five times as
    long, which made it a quarter of a training step.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            func = plain_attention
        return func(*args, **(kwargs or {}))


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """F.scaled_dot_product_attention without dropout: q (B, H, L, D), k and v (B, G, S, D)."""
    B, H, L, D = q.shape
    if enable_gqa:
        k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    q, k, v = (x.to(v.dtype).reshape(B * H, -1, D) for x in (q, k, v))
    factor = D**-0.5 if scale is None else scale
    scores = torch.baddbmm(q.new_zeros(()), q, k.mT, beta=0, alpha=factor)  # (B * H, L, S)
    if is_causal:
        attn_mask = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        scores = scores.view(B, H, L, -1)
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attn_mask.to(scores.dtype)
        scores = scores.flatten(0, 1)
    return torch.bmm(scores.softmax(dim=-1).to(v.dtype), v).view(B, H, L, D)


def autocast() -> Any:
    """bfloat16 products where the processor has them, which is three times as fast."""
    return torch.autocast("cpu", torch.bfloat16)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")


# ---------------------------------------------------------------- export


OFFICIAL = {  # our networks -> what the official config.json says besides the sizes
    "mmdit": {"_class_name": "SD3Transformer2DModel"},
    "nextdit": {"_class_name": "LuminaNextDiT2DModel"},
    "vae": {
        "_class_name": "AutoencoderKL",
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "clip": {"architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model"},
    "t5": {"architectures": ["T5EncoderModel"], "model_type": "t5", "is_encoder_decoder": False},
    "gemma": {"architectures": ["GemmaModel"], "model_type": "gemma"},
}


def write_network(module: nn.Module, folder: Path) -> None:
    """One network as config.json and a bfloat16 safetensors file with the official names."""
    kind = next(name for name, kind in KINDS.items() if isinstance(module, kind.network))
    state = module.state_dict()
    table = KINDS[kind].tables["diffusers"](module.config, None)
    plan = recipes(table, {name: tuple(value.shape) for name, value in state.items()})
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        tensors |= write_out(value.contiguous().bfloat16(), plan[name])
    config = asdict(module.config) | OFFICIAL[kind]
    config.pop("shared_query", None)  # ours: the loader reads it off the tensors
    write_json(folder / "config.json", config)
    stem = "diffusion_pytorch_model" if kind in ("mmdit", "nextdit", "vae") else "model"
    tensors = {name: value.clone().contiguous() for name, value in tensors.items()}
    save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})


def export(family: str, run: Path, out: Path, scheduler: SchedulerConfig) -> None:
    """Write the averaged networks of a run's checkpoint in the official folder layout."""
    pipe = new_pipeline(family, run)
    average = trainable(pipe)
    average.load_state_dict(torch.load(run / "checkpoint.pt", map_location="cpu")["average"])
    place(pipe, PIXELS)
    for name, module in average.items():
        write_network(module, out / name)
    for name in ("vae", "tokenizer", "tokenizer_2", "tokenizer_3"):
        if (run / name).is_dir():
            shutil.copytree(run / name, out / name, dirs_exist_ok=True)
    values = {"_class_name": "FlowMatchEulerDiscreteScheduler", **asdict(scheduler)}
    write_json(out / "scheduler/scheduler_config.json", values)
    index = {"_class_name": FAMILIES[family].pipeline}
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    for name in sorted(path.name for path in out.iterdir() if path.is_dir()):
        values = name.startswith(("text", "tokenizer"))
        config = out / name / ("tokenizer_config.json" if "tokenizer" in name else "config.json")
        if config.is_file():
            given = json.loads(config.read_text("utf-8"))
            kind = given.get("_class_name") or given.get("tokenizer_class")
            library = "transformers" if values else "diffusers"
            index[name] = [library, kind or given["architectures"][0]]
    write_json(out / "model_index.json", index)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"wrote {out}, {size / 1e6:.1f} MB")


# ---------------------------------------------------------------- measuring


@torch.no_grad()
def measure(
    model: Path, packages: Path, count: int, batch: int = 20, seed: int = 1
) -> dict[str, float]:
    """How good a model's pictures are, on pairings of name and colour that it never saw.

    vae_psnr     dB, of encoding and decoding the real pictures
    top1, top5   share of pictures whose nearest real one on that colour, among all names, is of the
                 name that was asked for, or is so for one of the nearest five; at 64 x 64 pixels
    background   mean absolute error of the corners, 0 to 255 a channel
    frechet      Frechet distance between drawn and real pictures, by mean and covariance of the VAE
                 latents' averages over quarters
    """
    pipe = minidit.load(model)
    found = emoji.find_emoji(packages)
    small = [emoji.read(one, 64) for one in found]
    colours = list(emoji.COLOURS.items())
    numbers = random.Random(seed).sample(range(len(found)), count)
    ranks, errors, psnr, drawn, real = [], [], [], [], []
    for start in tqdm(range(0, count, batch), desc="drawing", unit="batch"):
        part = numbers[start : start + batch]
        pairs = [(i, *colours[emoji.held_out(i)]) for i in part]
        prompts = [emoji.caption(found[i].name, colour) for i, colour, _ in pairs]
        with autocast():
            out = pipe(prompts, seed=seed + start)
        drawn.append(out.latents)
        for (i, _, value), image in zip(pairs, out.images, strict=True):
            rivals = np.stack([emoji.compose(picture, [value])[0] for picture in small])
            thumb = np.asarray(image.resize((64, 64), Image.Resampling.LANCZOS))
            gaps = np.square(rivals.astype(np.float32) - thumb).mean(axis=(1, 2, 3))  # (names,)
            ranks.append((gaps < gaps[i]).sum())
            pixels = np.asarray(image, dtype=np.float32)
            corners = np.stack([pixels[y, x] for y in (2, -3) for x in (2, -3)])  # (4, 3)
            errors.append(np.abs(corners - value).mean())
            picture = emoji.compose(emoji.read(found[i], PIXELS), [value])
            real.append(pipe.vae.encode(to_pixels(picture)))
            again = np.asarray(to_image(pipe.vae.decode(real[-1])[0]), dtype=np.float32)
            psnr.append(10 * math.log10(255**2 / np.square(again - picture[0]).mean()))
    return {
        "vae_psnr": float(np.mean(psnr)),
        "top1": float(np.mean([rank < 1 for rank in ranks])),
        "top5": float(np.mean([rank < 5 for rank in ranks])),
        "background": float(np.mean(errors)),
        "frechet": frechet(features(torch.cat(drawn)), features(torch.cat(real))),
    }


def features(latents: Tensor) -> np.ndarray:
    """Averages of each channel over the quarters of a picture: (pictures, 4 * C)."""
    return F.adaptive_avg_pool2d(latents.float(), 2).flatten(1).double().numpy()


def frechet(one: np.ndarray, other: np.ndarray) -> float:
    """Frechet distance between the Gaussians that fit two sets of features (n, d)."""
    gap = np.square(one.mean(0) - other.mean(0)).sum()
    a, b = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    # the trace of (a b) ** (1 / 2): a b has the eigenvalues of a symmetric, positive matrix
    root = np.sqrt(np.linalg.eigvals(a @ b).real.clip(0)).sum()
    return float(gap + np.trace(a) + np.trace(b) - 2 * root)


# ---------------------------------------------------------------- command line


def main() -> None:
    """Parse the command line and run one command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        if name != "measure":
            sub.add_argument("--family", choices=("sd3", "lumina"), default="sd3")
            sub.add_argument("--run", type=Path, required=True, help="folder of this training run")
        sub.add_argument("--packages", type=Path, default=Path("node_modules"))
        sub.add_argument("--threads", type=int, default=os.cpu_count())
        return sub

    sub = command("vae", "train the autoencoder")
    sub.add_argument("--steps", type=int, default=12000)
    sub.add_argument("--batch", type=int, default=16)
    sub.add_argument("--lr", type=float, default=2e-3)
    sub.add_argument("--init", type=Path, help="folder of a model whose VAE to start from")

    sub = command("prepare", "train the tokenizers and encode the pictures")
    sub.add_argument("--sizes", type=int, nargs="+", default=[128, 256])
    most = len(emoji.COLOURS) - 1
    sub.add_argument(
        "--colours", type=int, default=most, help="colours a name, at most %(default)s"
    )

    sub = command("text", "teach the text encoders what the pictures look like")
    sub.add_argument("--steps", type=int, default=1500)
    sub.add_argument("--batch", type=int, default=128)

    sub = command("train", "train the transformer with its text encoders")
    for name, value in asdict(Plan()).items():
        sub.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    sub.add_argument("--save-minutes", type=float, default=3)
    sub.add_argument("--sheet-minutes", type=float, default=10)

    sub = command("export", "write a model in the official folder layout")
    sub.add_argument("--out", type=Path, required=True)
    sub.add_argument("--shift", type=float, default=SCHEDULER.shift)
    sub.add_argument("--default-steps", type=int, default=SCHEDULER.default_steps)
    sub.add_argument("--default-guidance", type=float, default=SCHEDULER.default_guidance)

    sub = command("measure", "print how good a model's pictures are")
    sub.add_argument("--model", type=Path, required=True)
    sub.add_argument("--count", type=int, default=200)

    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    if args.command == "vae":
        train_vae(args.family, args.run, args.packages, args.steps, args.batch, args.lr, args.init)
    elif args.command == "prepare":
        prepare(args.family, args.run, args.packages, args.sizes, args.colours)
    elif args.command == "text":
        train_text(args.family, args.run, args.steps, args.batch)
    elif args.command == "train":
        plan = Plan(**{name: getattr(args, name) for name in asdict(Plan())})
        train(args.family, args.run, plan, args.save_minutes, args.sheet_minutes)
    elif args.command == "export":
        scheduler = SchedulerConfig(
            shift=args.shift,
            default_steps=args.default_steps,
            default_guidance=args.default_guidance,
        )
        export(args.family, args.run, args.out, scheduler)
    else:
        for name, value in measure(args.model, args.packages, args.count).items():
            print(f"{name:12s} {value:.3f}")


if __name__ == "__main__":
    main()
