"""What the tests of examples/train.py share: pictures and networks small enough for seconds."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from minidit.clip import CLIPConfig, CLIPTextEncoder
from minidit.gemma import GemmaConfig, GemmaEncoder
from minidit.mmdit import MMDiT, MMDiTConfig
from minidit.nextdit import NextDiT, NextDiTConfig
from minidit.t5 import T5Config, T5Encoder
from minidit.vae import AutoencoderKL
from training import (
    classifier,
    latents,
    loop,
    models,
    optim,
    scenes,
    transformer,
    vae,
    vocabulary,
)
from training.scenes import Background, Name, Scene, Sprites, Thing
from weights.load import load_component
from weights.save import write_network

NAMES = {
    "🍎": ("red apple", "1f34e"),
    "🌸": ("cherry blossom", "1f338"),
    "☀️": ("sun", "2600-fe0f"),
    "🦉": ("owl", "1f989"),
    "🍇": ("grapes", "1f347"),
}
TINY_NAMES = [Name(name, "" if name == "grapes" else f"{name}s") for name, _ in NAMES.values()]
REAL_NAMES = scenes.read_names
CPU = torch.device("cpu")
SMALL = [
    pytest.mark.usefixtures("float32", "tiny"),
    pytest.mark.filterwarnings("ignore:prompt has"),  # tiny vocabularies spell most by letters
]


@pytest.fixture(scope="module")
def float32():
    """The same numbers on every processor: some would take products in bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim, "fast_dtype", lambda device: torch.float32)
        yield


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A node_modules folder with five pictures: an opaque box, transparent around it."""
    modules = tmp_path_factory.mktemp("node_modules")
    pictures = modules / "@lobehub/fluent-emoji-3d/assets"
    pictures.mkdir(parents=True)
    for i, (_, code) in enumerate(NAMES.values()):
        pixels = np.zeros((256, 256, 4), dtype=np.uint8)
        pixels[64:192, 64:192] = (200 - 40 * i, 40 * i, 20, 255)
        Image.fromarray(pixels).save(pictures / f"{code}.webp", lossless=True)
    (modules / "unicode-emoji-json").mkdir()
    entries = {e: {"name": name} for e, (name, _) in NAMES.items()}
    (modules / "unicode-emoji-json/data-by-emoji.json").write_text(json.dumps(entries))
    return modules


REAL_VAE = models.VAE
TINY_VAE = replace(
    models.VAE, block_out_channels=(8, 8, 8, 16), norm_num_groups=1, latent_channels=8,
    sample_size=64,
)  # fmt: skip


def tiny_sd3(clip_vocab: int, t5_vocab: int) -> list[torch.nn.Module]:
    clip = CLIPConfig(
        vocab_size=clip_vocab, hidden_size=8, intermediate_size=16, projection_dim=8,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=models.WINDOW,
        eos_token_id=clip_vocab - 1,
    )  # fmt: skip
    transformer = MMDiTConfig(
        sample_size=32, in_channels=8, out_channels=8, num_layers=2, num_attention_heads=2,
        attention_head_dim=8, joint_attention_dim=16, caption_projection_dim=16,
        pooled_projection_dim=16, pos_embed_max_size=models.TABLE,
    )  # fmt: skip
    t5 = T5Config(vocab_size=t5_vocab, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    networks = [MMDiT(transformer), CLIPTextEncoder(clip), CLIPTextEncoder(clip), T5Encoder(t5)]
    for network in networks:
        models.initialise(network)
    return networks


def tiny_lumina(gemma_vocab: int) -> list[torch.nn.Module]:
    transformer = NextDiTConfig(
        sample_size=32, in_channels=8, hidden_size=32, num_layers=2, num_attention_heads=2,
        num_kv_heads=1, multiple_of=16, cross_attention_dim=16,
    )  # fmt: skip
    gemma = GemmaConfig(
        vocab_size=gemma_vocab, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    networks = [NextDiT(transformer), GemmaEncoder(gemma)]
    for network in networks:
        models.initialise(network)
    return networks


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "sd3_networks", tiny_sd3)
    monkeypatch.setattr(models, "lumina_networks", tiny_lumina)
    monkeypatch.setattr(models, "VAE", TINY_VAE)
    monkeypatch.setattr(vocabulary, "PIECES", 340)
    monkeypatch.setattr(scenes, "read_names", lambda: TINY_NAMES)
    monkeypatch.setattr(vae, "SIDES", (64, 96))
    for name, value in (("SIDE", 64), ("WIDTH", 32), ("DEPTH", 1)):
        monkeypatch.setattr(classifier, name, value)


@pytest.fixture(scope="module")
def prepared(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a VAE, tokenizers of both families, and scenes of 64 pixels."""
    run = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    write_network(AutoencoderKL(TINY_VAE), run / "vae", torch.bfloat16)
    sprites = Sprites(packages, TINY_NAMES)
    latents.prepare(run / "data", load_component(run, "vae"), sprites, [(64, 64)], 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "PIECES", 340)
        for family in ("sd3", "lumina"):
            vocabulary.write_tokenizers(family, TINY_NAMES, run / family, 400)
    return run


@pytest.fixture
def run(prepared: Path, tmp_path: Path) -> Path:
    """A copy of it to train in."""
    shutil.copytree(prepared, tmp_path / "run")
    return tmp_path / "run"


PLAN = optim.Plan(steps=4, batch=4, warmup=2, cooldown=2)


def trained(family: str, run: Path, packages: Path, plan: optim.Plan, **more) -> dict:
    options = {"sizes": [(64, 64)], "renew": 3, "device": CPU, "save_minutes": 60.0}
    transformer.train(family, run, packages, plan, **options | more)
    return torch.load(run / family / "checkpoint.pt")


def new_trainer(family: str, run: Path, plan: optim.Plan):
    """A trainer, and its step as a function of the step's number."""
    torch.manual_seed(0)
    trainer = transformer.Trainer(family, models.new_pipeline(family, run, CPU), plan)
    models.place(trainer.pipe, 64)
    data = [latents.Latents(run / "data", 64, 64, TINY_NAMES)]
    texts = [latents.Texts(trainer.pipe, data[0])]
    return trainer, lambda i: trainer.step(i, trainer.choose(i, data), data, texts)


def one_thing(name: Name, kind: str, *colours: str, **more) -> Scene:
    thing = Thing(name, 0.5, 0.5, 0.5, mirror=False, angle=0.0)
    return Scene((thing,), Background(kind, colours, **more))


def command(monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    """A command of train.py, without what it changes for the whole process."""
    for name in ("set_num_threads", "set_flush_denormal"):
        monkeypatch.setattr(torch, name, lambda value: None)
    monkeypatch.setattr("sys.argv", ["train.py", *args])
    train.main()


def flat(state: dict, prefix: str = "") -> dict:
    """Every value of a nested state by its path."""
    out = {}
    for key, value in state.items():
        name = f"{prefix}/{key}"
        out |= flat(value, name) if isinstance(value, dict) else {name: value}
    return out


def interrupted(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make every Loop save and stop after a step."""
    given = loop.Loop.__iter__

    def stopping(self):
        for number in given(self):
            if number == step:
                self.save()
                raise KeyboardInterrupt
            yield number

    monkeypatch.setattr(loop.Loop, "__iter__", stopping)


def assert_equal(one: dict, other: dict) -> None:
    one, other = flat(one), flat(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name]), name
