"""examples/train.py on networks and pictures small enough for seconds: data, updates, resuming."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDENS
from PIL import Image

import minidit
import train
from minidit.clip import CLIPConfig, CLIPTextEncoder
from minidit.gemma import GemmaConfig, GemmaEncoder
from minidit.mmdit import MMDiT, MMDiTConfig
from minidit.nextdit import NextDiT, NextDiTConfig
from minidit.t5 import T5Config, T5Encoder
from minidit.vae import AutoencoderKL
from training import autoencoder, emoji, files, measuring, models, optim, vocabulary
from weights.load import load_component
from weights.save import write_network

NAMES = {
    "🍎": ("red apple", "Food & Drink", "1f34e"),
    "🐼": ("panda", "Animals & Nature", "1f43c"),
    "☀️": ("sun", "Travel & Places", "2600-fe0f"),
    "🏁": ("chequered flag", "Flags", "1f3c1"),
}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A node_modules folder with four pictures: opaque in the middle, transparent around."""
    modules = tmp_path_factory.mktemp("node_modules")
    pictures = modules / "@lobehub/fluent-emoji-3d/assets"
    pictures.mkdir(parents=True)
    for i, (_, _, code) in enumerate(NAMES.values()):
        pixels = np.zeros((256, 256, 4), dtype=np.uint8)
        pixels[64:192, 64:192] = (200 - 40 * i, 40 * i, 20, 255)
        Image.fromarray(pixels).save(pictures / f"{code}.webp", lossless=True)
    (modules / "unicode-emoji-json").mkdir()
    entries = {e: {"name": name, "group": group} for e, (name, group, _) in NAMES.items()}
    (modules / "unicode-emoji-json/data-by-emoji.json").write_text(json.dumps(entries))
    return modules


TINY_VAE = replace(
    models.VAE, block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=4
)

# the tiny vocabularies spell most words by letters
pytestmark = pytest.mark.filterwarnings("ignore:prompt has")


def tiny_sd3(clip_vocab: int, t5_vocab: int) -> list[torch.nn.Module]:
    clip = CLIPConfig(
        vocab_size=clip_vocab, hidden_size=8, intermediate_size=16, projection_dim=8,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=models.WINDOW,
        eos_token_id=clip_vocab - 1,
    )  # fmt: skip
    transformer = MMDiTConfig(
        sample_size=32, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2,
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
        sample_size=32, hidden_size=32, num_layers=2, num_attention_heads=2, num_kv_heads=1,
        multiple_of=16, cross_attention_dim=16,
    )  # fmt: skip
    gemma = GemmaConfig(
        vocab_size=gemma_vocab, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    networks = [NextDiT(transformer), GemmaEncoder(gemma)]
    for network in networks:
        models.initialise(network)
    return networks


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "sd3_networks", tiny_sd3)
    monkeypatch.setattr(models, "lumina_networks", tiny_lumina)
    monkeypatch.setattr(models, "VAE", TINY_VAE)
    monkeypatch.setattr(vocabulary, "PIECES", 340)


@pytest.fixture(params=["sd3", "lumina"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def run(family: str, packages: Path, tmp_path: Path) -> Path:
    """A prepared run: VAE, tokenizers and latents at 64 pixels."""
    torch.manual_seed(0)
    write_network(AutoencoderKL(TINY_VAE), tmp_path / "vae", torch.bfloat16)
    autoencoder.prepare(family, tmp_path, packages, [64], 17)
    return tmp_path


PLAN = optim.Plan(size=64, steps=4, batch=4, warmup=2, cooldown=2)


def trained(family: str, run: Path, plan: optim.Plan) -> dict:
    train.train(family, run, plan, save_minutes=60, sheet_minutes=60)
    return torch.load(run / "checkpoint.pt")


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


# ---------------------------------------------------------------- data


def test_finds_named_pictures_of_the_groups(packages):
    found = emoji.find_emoji(packages)
    assert [e.name for e in found] == ["red apple", "panda", "sun"]  # no flag
    assert found[2].path.name == "2600-fe0f.webp"


def test_missing_packages_name_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="npm install @lobehub/fluent-emoji-3d"):
        emoji.find_emoji(tmp_path)


def test_background_shows_exactly_where_the_picture_is_transparent(packages):
    apple = emoji.find_emoji(packages)[0]
    images = emoji.compose(emoji.read(apple, 256))
    assert images.shape == (len(emoji.COLOURS), 256, 256, 3)
    for image, colour in zip(images, emoji.COLOURS.values(), strict=True):
        assert (image[10, 10] == colour).all()
        assert (image[128, 128] == (200, 0, 20)).all()


def test_captions():
    assert emoji.caption("panda", "sky blue") == "panda on a sky blue background"
    assert emoji.caption("panda", "orange") == "panda on an orange background"
    rng = random.Random(0)
    white = counted(emoji.caption("owl", "white", rng).lower() for _ in range(400))
    assert set(white) == {
        "owl", "an owl", "owl on a white background", "an owl on a white background"
    }  # fmt: skip
    assert 130 < white["owl"] < 210


def counted(texts) -> dict[str, int]:
    counts: dict[str, int] = {}
    for text in texts:
        counts[text] = counts.get(text, 0) + 1
    return counts


def test_every_name_has_one_colour_that_training_never_shows(family, run):
    data = emoji.Latents(run / "data", family, 64)
    seen = set()
    rng = random.Random(0)
    for _ in range(40):
        pictures, captions = data.batch(32, rng)
        assert pictures.shape == (32, 4, 8, 8) and pictures.dtype == np.float32
        seen.update(captions)
    plain = {text.lower() for text in seen}
    for i, name in enumerate(data.names):
        for j, colour in enumerate(emoji.COLOURS):
            shown = any(text.endswith(emoji.caption(name, colour)) for text in plain)
            assert shown == (j != emoji.held_out(i))


def test_latents_are_those_of_the_vae(family, run, packages):
    data = emoji.Latents(run / "data", family, 64)
    images = emoji.compose(emoji.read(emoji.find_emoji(packages)[1], 64))
    expected = autoencoder.encode_images(load_component(run, "vae"), images)
    stored = torch.from_numpy(data.array[1].astype(np.float32))
    torch.testing.assert_close(stored, expected[emoji.shown(1)], atol=2e-3, rtol=0)


def test_latents_that_are_not_there_name_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="train.py prepare"):
        emoji.Latents(tmp_path, "sd3", 64)


# ---------------------------------------------------------------- tokenizers


def test_tokenizers_know_the_words_of_the_captions(packages, tmp_path):
    names = [e.name for e in emoji.find_emoji(packages)]
    vocabulary.write_tokenizers("sd3", names, tmp_path)
    clip = load_component(tmp_path, "tokenizer_2")
    ids = clip.encode("Red apple on a sky blue background")
    assert len(ids) == 2 + 7  # every word is one token
    assert clip.pad_id == 0 and max(ids) == clip.eos_id == len(clip.vocab) - 1
    assert clip.decode(clip.encode("zebra!")[1:-1]) == "zebra !"  # and spells any other
    t5 = load_component(tmp_path, "tokenizer_3")
    assert t5.encode("Panda") == t5.encode("panda")
    assert t5.decode(t5.encode("panda")[:-1]) == "panda"


def test_bpe_joins_the_most_frequent_pair_first():
    vocab, merges = vocabulary.train_bpe(["aab aab ab", "cd"], 3)
    assert merges[0] == ("a", "b</w>")  # 3 times; then aab twice, cd once
    assert merges[1:] == [("a", "ab</w>"), ("c", "d</w>")]
    assert len(vocab) == 512 + 3 + 2 and vocab["!"] == 0


# ---------------------------------------------------------------- optimiser and positions


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 64, 16), (2, 16, 64)])
def test_newton_schulz_makes_singular_values_nearly_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(optim.orthogonal(matrices).float())
    assert values.min() > 0.5 and values.max() < 1.3


def test_muon_treats_q_k_and_v_one_by_one():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(48, 16, generator=generator)
    grad = torch.randn(48, 16, generator=generator)
    fused = torch.nn.Parameter(start.clone())
    fused.grad = grad.clone()
    apart = [torch.nn.Parameter(part.clone()) for part in start.chunk(3)]
    for part, its_grad in zip(apart, grad.chunk(3), strict=True):
        part.grad = its_grad.clone()
    optim.Muon([("blocks.0.attn.qkv.weight", fused)]).step(0.1)
    optim.Muon([(f"blocks.0.attn.{x}.weight", p) for x, p in zip("qkv", apart, strict=True)]).step(
        0.1
    )
    torch.testing.assert_close(fused.data, torch.cat([p.data for p in apart]))
    whole = torch.nn.Parameter(start.clone())
    whole.grad = grad.clone()
    optim.Muon([("blocks.0.mlp.fc1.weight", whole)]).step(0.1)
    assert (whole - fused).abs().max() > 0.01


@pytest.mark.parametrize("family", ["sd3"], indirect=True)
def test_positions_run_from_edge_to_edge_at_every_size(family, run):
    pipe = models.new_pipeline("sd3", run)
    width, model = pipe.transformer.config.width, pipe.transformer
    models.place(pipe, 256)
    fine = model._positions(torch.arange(256)[None], 16, 16).view(16, 16, width)
    models.place(pipe, 128)
    coarse = model._positions(torch.arange(64)[None], 8, 8).view(8, 8, width)
    # sin(x) and cos(x) of the first rate, 1: the angle between neighbours is what x grows by
    quarter = width // 4
    assert torch.allclose(fine[0, 3, 0], torch.tensor(3.0).sin(), atol=1e-5)
    assert torch.allclose(coarse[0, 3, 0], torch.tensor(6.5).sin(), atol=1e-5)
    assert torch.allclose(coarse[3, 0, 2 * quarter], torch.tensor(6.5).sin(), atol=1e-5)


# ---------------------------------------------------------------- training


def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(family, run, tmp_path):
    whole = trained(family, run, PLAN)
    (run / "checkpoint.pt").unlink()
    trained(family, run, replace(PLAN, steps=2, cooldown=0))
    parts = trained(family, run, PLAN)
    whole, parts = flat(whole), flat(parts)
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, parts[name]), name
    assert any(run.glob("sheets/64-*.png"))


def test_text_encoders_learn_thumbnails_first_and_training_starts_from_them(family, run, capsys):
    train.train_text(family, run, steps=200, batch=16, size=64)
    losses = [float(line.split()[3]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < 0.7 * losses[0]
    state = torch.load(run / "text.pt")
    trained(family, run, replace(PLAN, steps=1, muon_lr=0.0, adam_lr=0.0))
    networks = torch.load(run / "checkpoint.pt")["networks"]
    assert {name.split(".")[0] for name in state} == {name.split(".")[0] for name in networks} - {
        "transformer"
    }
    for name, value in state.items():
        assert torch.equal(value, networks[name]), name


def test_training_lowers_the_loss(family, run):
    torch.manual_seed(0)
    plan = replace(PLAN, steps=60, batch=16, cooldown=0, joint=1)
    trainer = train.Trainer(models.new_pipeline(family, run), plan)
    models.place(trainer.pipe, 64)
    data = emoji.Latents(run / "data", family, 64)
    losses = [trainer.step(data).item() for _ in range(60)]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:3])


@pytest.mark.parametrize("joint", [0, 1])
def test_every_parameter_that_is_run_is_trained(family, run, joint):
    torch.manual_seed(0)
    trainer = train.Trainer(models.new_pipeline(family, run), replace(PLAN, joint=joint))
    models.place(trainer.pipe, 64)
    data = emoji.Latents(run / "data", family, 64)
    before = {n: p.detach().clone() for n, p in trainer.networks.named_parameters()}
    for _ in range(4):
        trainer.step(data)
    same = {n for n, p in trainer.networks.named_parameters() if torch.equal(p, before[n])}
    # Gemma's last layer is never run; pad_token serves pictures of unequal sizes, which we lack
    idle = ("text_encoder.layers.1.", "text_encoder.final_norm", "transformer.pad_token")
    frozen = {n for n in before if n.startswith("text") and not joint}
    idle = frozen | {n for n in before if family == "lumina" and n.startswith(idle)}
    assert same == idle


def test_export_loads_strictly_and_holds_the_averaged_weights(family, run, tmp_path):
    state = trained(family, run, PLAN)
    scheduler = replace(models.SCHEDULER, default_steps=2, shift=2.5)
    files.export(family, run, tmp_path / "out", scheduler)
    pipe = minidit.load(tmp_path / "out")
    assert pipe.scheduler == scheduler
    for name, value in pipe.transformer.state_dict().items():
        if name != "pos_embed":
            expected = state["average"][f"transformer.{name}"].bfloat16().float()
            assert torch.equal(value, expected), name
    image = pipe("panda on a pink background", height=64, width=64, seed=0).images[0]
    assert image.size == (64, 64)


@pytest.mark.parametrize("steps,cooldown,expected", [(10, 0, 1.0), (10, 4, 0.5)])
def test_learning_rate(steps, cooldown, expected):
    plan = optim.Plan(steps=steps, warmup=2, cooldown=cooldown)
    assert plan.rate(0) == 0.5 and plan.rate(1) == 1.0
    assert plan.rate(8) == expected


def test_autoencoder_resumes_bit_by_bit_and_scales_its_latents(family, packages, tmp_path):
    arguments = {"packages": packages, "batch": 2, "lr": 1e-3}
    autoencoder.train_vae(family, tmp_path / "whole", steps=4, **arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoencoder, "save", stop_after(autoencoder.save, 2))
        with pytest.raises(KeyboardInterrupt):
            autoencoder.train_vae(family, tmp_path / "parts", steps=4, save_every=2, **arguments)
    autoencoder.train_vae(family, tmp_path / "parts", steps=4, **arguments)
    whole, parts = (load_component(tmp_path / name, "vae") for name in ("whole", "parts"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    images = emoji.crops(
        [emoji.read(e, 256) for e in emoji.find_emoji(packages)], 16, 256, random.Random(1)
    )
    latents = autoencoder.encode_images(whole, images)
    assert 0.8 < latents.square().mean().sqrt() < 1.25
    assert (whole.config.shift_factor is None) == (family == "lumina")


def stop_after(save, steps):
    def saving(state, path):
        save(state, path)
        if state["steps"] == steps:
            raise KeyboardInterrupt

    return saving


# ---------------------------------------------------------------- measuring


def test_measure_prints_finite_numbers_dense_and_with_ras(packages, capsys, monkeypatch):
    args = ["measure", "--model", str(GOLDENS / "pipe_lumina"), "--packages", str(packages)]
    args += ["--count", "3", "--steps", "8"]
    results = []
    for more in ([], ["--ras-preset", "paper"], ["--guidance", "2"]):
        command(monkeypatch, *args, *more)
        results.append(dict(line.split() for line in capsys.readouterr().out.splitlines()))
    assert list(results[0]) == ["vae_psnr", "top1", "top5", "background", "frechet"]
    assert all(np.isfinite(float(value)) for result in results for value in result.values())
    assert len({result["vae_psnr"] for result in results}) == 1
    assert len({result["frechet"] for result in results}) == 3
    with pytest.raises(ValueError, match="count is 1, must be within 2.."):
        command(monkeypatch, *args, "--count", "1")


def test_frechet_distance_of_gaussians():
    rng = np.random.default_rng(0)
    sample = rng.normal(size=(500, 3))
    assert measuring.frechet(sample, sample) == pytest.approx(0, abs=1e-9)
    assert measuring.frechet(sample, sample + [1, 0, 2]) == pytest.approx(5, abs=1e-9)
    # the same Gaussian twice as wide: trace of (2 - 1)^2 times its covariance
    expected = np.trace(np.cov(sample, rowvar=False)) + np.square(sample.mean(0)).sum()
    assert measuring.frechet(sample, 2 * sample) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("case", ["plain", "mask", "bias", "causal", "grouped"])
def test_plain_attention_is_torch_attention(case):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    heads = 2 if case == "grouped" else 4
    tokens = 5 if case == "causal" else 7
    q, k, v = draw(2, 4, 5, 8), draw(2, heads, tokens, 8), draw(2, heads, tokens, 8)
    options = {
        "plain": {},
        "mask": {"attn_mask": draw(2, 1, 5, 7) > -1},
        "bias": {"attn_mask": draw(1, 4, 5, 7), "scale": 1.0},
        "causal": {"is_causal": True},
        "grouped": {"enable_gqa": True},
    }[case]
    attention = torch.nn.functional.scaled_dot_product_attention
    expected = attention(q, k, v, **options)
    with optim.PlainAttention():
        torch.testing.assert_close(attention(q, k, v, **options), expected)


def test_sheet_draws_every_fixed_prompt(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "PIXELS", 32)
    monkeypatch.setattr(train, "PROMPTS", train.PROMPTS[:8])
    out = tmp_path / "sheet.jpg"
    command(monkeypatch, "sheet", "--model", str(GOLDENS / "pipe_lumina"), "--out", str(out))
    assert Image.open(out).size == (6 * 32 + 5 * 4, 2 * 32 + 4)
    assert f"wrote {out}" in capsys.readouterr().out
