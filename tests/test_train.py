"""examples/train.py on networks and pictures small enough for seconds: data, updates, resuming."""

from __future__ import annotations

import json
import random
import shutil
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDENS
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import devices
import minidit
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
    measure,
    models,
    optim,
    scenes,
    text,
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


@pytest.fixture(scope="module", autouse=True)
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

# the tiny vocabularies spell most words by letters
pytestmark = pytest.mark.filterwarnings("ignore:prompt has")


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


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "sd3_networks", tiny_sd3)
    monkeypatch.setattr(models, "lumina_networks", tiny_lumina)
    monkeypatch.setattr(models, "VAE", TINY_VAE)
    monkeypatch.setattr(vocabulary, "PIECES", 340)
    monkeypatch.setattr(scenes, "read_names", lambda: TINY_NAMES)
    monkeypatch.setattr(vae, "SIDES", (64, 96))
    for name, value in (("SIDE", 64), ("WIDTH", 32), ("DEPTH", 1)):
        monkeypatch.setattr(classifier, name, value)


@pytest.fixture(params=["sd3", "lumina"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


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


# ---------------------------------------------------------------- names and combinations


def test_names_are_many_and_differ():
    names = REAL_NAMES()
    assert 300 <= len(names) <= 1000
    assert len({name.text for name in names}) == len(names)
    by_text = {name.text: name for name in names}
    assert by_text["goose"].plural == "geese" and by_text["strawberry"].plural == "strawberries"
    assert str(by_text["octopus"]) == "an octopus" and str(by_text["unicorn"]) == "a unicorn"
    assert str(by_text["grapes"]) == "grapes"


def test_finds_pictures_cut_to_what_is_visible(packages):
    sprites = Sprites(packages)
    assert sprites.paths["sun"].name == "2600-fe0f.webp"
    assert sprites["sun"].size == (128, 128) and sprites["sun"].mode == "RGBa"


def test_missing_packages_and_pictures_are_named(packages, tmp_path):
    with pytest.raises(FileNotFoundError, match="npm install @lobehub/fluent-emoji-3d"):
        Sprites(tmp_path)
    with pytest.raises(KeyError, match="no picture of .*zebra"):
        Sprites(packages, [Name("zebra", "zebras")])


def test_some_combinations_are_held_out():
    names = [name.text for name in REAL_NAMES()]
    pairs = list(combinations(names, 2))
    assert 0.04 < np.mean([scenes.held_out_pair(*pair) for pair in pairs]) < 0.06
    assert all(scenes.held_out_pair(*p) == scenes.held_out_pair(*p[::-1]) for p in pairs[:99])
    colours = {scenes.held_out_colour(name) for name in names}
    assert colours == set(scenes.COLOURS) - {"white"}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1.0, 2.0, 0.5, 1.4]), st.integers(1, 3))
def test_training_scenes_are_complete_and_never_held_out(seed, aspect, most):
    scene = scenes.random_scene(random.Random(seed), REAL_NAMES(), most, aspect)
    assert scene == scenes.random_scene(random.Random(seed), REAL_NAMES(), most, aspect)
    assert 1 <= len(scene.things) <= most
    texts = [name.text for name in scene.names]
    for text_ in texts:
        assert scenes.held_out_colour(text_) not in scene.background.colours
    assert not any(scenes.held_out_pair(*pair) for pair in combinations(texts, 2))
    assert len(scene.names) in (1, len(scene.things))
    width, height = max(aspect, 1.0), max(1 / aspect, 1.0)
    for thing in scene.things:
        assert 0.25 <= thing.size <= 0.75
        assert thing.size / 2 < thing.x < width - thing.size / 2
        assert thing.size / 2 < thing.y < height - thing.size / 2
    for one, other in combinations(scene.things, 2):
        away = np.hypot(one.x - other.x, one.y - other.y)
        assert away > 0.45 * (one.size + other.size)


# ---------------------------------------------------------------- pictures


def one_thing(name: Name, kind: str, *colours: str, **more) -> Scene:
    thing = Thing(name, 0.5, 0.5, 0.5, mirror=False, angle=0.0)
    return Scene((thing,), Background(kind, colours, **more))


def test_things_are_where_the_scene_says(packages):
    apple, sprites = TINY_NAMES[0], Sprites(packages)
    scene = Scene((Thing(apple, 0.25, 0.3, 0.3, False, 0.0),), Background("plain", ("teal",)))
    image = scenes.draw(scene, sprites, 64, 128)
    assert image.shape == (64, 128, 3) and image.dtype == np.uint8
    assert (image[19, 16] == (200, 0, 20)).all()  # the middle of the box
    assert (image[5, 100] == scenes.COLOURS["teal"]).all()  # the ground
    box = (image == (200, 0, 20)).all(axis=2)
    rows, columns = np.nonzero(box)
    assert abs(np.ptp(rows) + 1 - 19) <= 2 and abs(np.ptp(columns) + 1 - 19) <= 2
    under = image[rows.max() + 1, 16].astype(int).sum()
    assert under < 0.97 * sum(scenes.COLOURS["teal"])  # a shadow where it stands
    assert (image[2] == scenes.COLOURS["teal"]).all()  # and none above it


def test_nearer_things_hide_what_is_behind_them(packages):
    apple, cherry = TINY_NAMES[:2]
    far, near = Thing(apple, 0.5, 0.4, 0.4, False, 0.0), Thing(cherry, 0.5, 0.6, 0.4, False, 0.0)
    sprites, ground = Sprites(packages), Background("plain", ("white",))
    images = [scenes.draw(Scene(t, ground), sprites, 64, 64) for t in ((far, near), (near, far))]
    assert (images[0] == images[1]).all()
    assert (images[0][32, 32] == (160, 40, 20)).all()


@pytest.mark.parametrize("kind", ["gradient", *scenes.TEXTURES])
@pytest.mark.parametrize("angle", [0.0, np.pi / 4, np.pi / 2])
def test_backgrounds_run_between_two_colours(kind, angle):
    colours = ("black", "white") if kind == "gradient" else ("red",)
    y, x = np.mgrid[:64, :64].astype(np.float32) + 0.5
    image = scenes.paint(Background(kind, colours, angle, 0.25), x, y, 64)
    ends = np.array(scenes.COLOURS[colours[0]]), image.reshape(-1, 3)
    assert np.abs(ends[1] - ends[0]).sum(axis=1).min() < 4
    assert np.ptp(image[..., 0]) > (250 if kind == "gradient" else 30)
    if kind == "gradient":
        assert image[0, 0, 0] < image[63, 63, 0]
    assert image.min() >= 0 and image.max() <= 255


# ---------------------------------------------------------------- captions


def test_plain_captions():
    apple, cherry, _, owl, grapes = TINY_NAMES
    assert scenes.caption(one_thing(owl, "plain", "orange")) == "an owl on an orange background"
    assert (
        scenes.caption(one_thing(grapes, "dotted", "teal")) == "grapes on a teal dotted background"
    )
    gradient = one_thing(apple, "gradient", "sky blue", "pink")
    assert scenes.caption(gradient) == "a red apple on a sky blue to pink gradient background"
    things = [Thing(name, 0.5, 0.5, 0.3, False, 0.0) for name in (owl, apple, cherry)]
    ground = Background("plain", ("teal",))
    assert scenes.caption(Scene((things[0],) * 2, ground)) == "two owls on a teal background"
    assert scenes.caption(Scene(tuple(things), ground)) == (
        "an owl, a red apple and a cherry blossom on a teal background"
    )


def test_captions_vary():
    scene, rng = one_thing(TINY_NAMES[3], "plain", "white"), random.Random(0)
    said = [scenes.caption(scene, rng).lower() for _ in range(400)]
    forms = {"an owl", "owl", "an owl on a white background", "owl on a white background"}
    assert set(said) == forms
    assert 120 < said.count("an owl") < 180


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6))
def test_place_words_are_true(seed):
    rng = random.Random(seed)
    things = [Thing(name, rng.random(), rng.random(), 0.3, False, 0.0) for name in TINY_NAMES[:2]]
    scene = Scene(tuple(things), Background("plain", ("teal",)))
    said = scenes.caption(scene, rng).lower()
    first, second = sorted(things, key=lambda thing: said.index(thing.name.text))
    if "left" in said:
        assert first.x < second.x
    if "right" in said:
        assert first.x > second.x
    if "above" in said:
        assert first.y < second.y
    if "below" in said:
        assert first.y > second.y
    assert ("left" in said or "right" in said) <= (
        abs(first.x - second.x) > abs(first.y - second.y)
    )


# ---------------------------------------------------------------- scenes encoded ahead


def test_latents_are_those_of_the_scenes(run, packages):
    data = latents.Latents(run / "data", 64, 64, TINY_NAMES)
    slots, of = data.choose(16, random.Random(0), most=2)
    found = data.array[slots].astype(np.float32)
    assert found.shape == (16, 8, 8, 8) and torch.equal(
        data.tensor[slots].float(), torch.from_numpy(found)
    )
    assert all(len(scene.things) <= 2 for scene in of)
    network, sprites = load_component(run, "vae"), Sprites(packages)
    pictures = np.stack([scenes.draw(scene, sprites, 64, 64) for scene in of])
    expected = vae.encode_images(network, pictures)
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=2e-3, rtol=1e-3)


def test_renewing_goes_forward_and_back(run, packages):
    sprites, network = Sprites(packages), load_component(run, "vae")
    data = latents.Latents(run / "data", 64, 64, TINY_NAMES)
    before = data.array.copy()
    data.renew(network, sprites, 43)
    assert list(data.numbers[:5]) == [80, 81, 82, 43, 44] and data.numbers[39] == 79
    assert not (data.array == before).all(axis=(1, 2, 3)).any()
    data.renew(network, sprites, 0)
    assert (data.array == before).all()


def test_a_slot_has_no_number_while_it_is_written(run, packages, monkeypatch):
    data = latents.Latents(run / "data", 64, 64, TINY_NAMES)
    seen, given = [], latents.encode_images
    monkeypatch.setattr(
        latents, "encode_images", lambda *a: (seen.append(list(data.numbers[:2])), given(*a))[1]
    )
    data.renew(load_component(run, "vae"), Sprites(packages), 2)
    assert seen == [[-1, 1], [40, -1]]


def test_interrupted_encoding_goes_on(run, packages, monkeypatch):
    sprites, network = Sprites(packages), load_component(run, "vae")
    calls = iter(range(5))
    given = latents.encode_images
    monkeypatch.setattr(latents, "encode_images", lambda *a: (next(calls), given(*a))[1])
    with pytest.raises(StopIteration):
        latents.prepare(run / "more", network, sprites, [(64, 128)], 8)
    monkeypatch.setattr(latents, "encode_images", given)
    whole = latents.Latents(run / "more", 64, 128, TINY_NAMES)
    assert (whole.numbers >= 0).sum() == 5
    latents.prepare(run / "more", network, sprites, [(64, 128)], 8)
    assert list(whole.numbers) == list(range(8)) and whole.array[7].any()


def test_bad_sizes_and_missing_files_are_refused(run, packages):
    network, sprites = load_component(run, "vae"), Sprites(packages)
    with pytest.raises(ValueError, match="size is 60x64, sides must be multiples of 16"):
        latents.prepare(run / "other", network, sprites, [(64, 60)], 8)
    assert not (run / "other").exists()
    with pytest.raises(FileNotFoundError, match=r"train.py scenes"):
        latents.Latents(run / "data", 128, 128, TINY_NAMES)


# ---------------------------------------------------------------- tokenizers


def test_tokenizers_know_the_words_of_the_captions(run):
    clip = load_component(run / "sd3", "tokenizer_2")
    ids = clip.encode("Red apple on a sky blue background")
    assert len(ids) == 2 + 7  # every word is one token
    assert clip.pad_id == 0 and max(ids) == clip.eos_id == len(clip.vocab) - 1
    assert clip.decode(clip.encode("zebra!")[1:-1]) == "zebra !"  # and spells any other
    t5 = load_component(run / "sd3", "tokenizer_3")
    assert t5.encode("Owl") == t5.encode("owl")
    assert t5.decode(t5.encode("owl")[:-1]) == "owl"


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


def test_muon_treats_a_convolution_as_the_matrix_of_what_enters_a_channel():
    generator = torch.Generator().manual_seed(0)
    start, grad = (torch.randn(8, 4, 3, 3, generator=generator) for _ in range(2))
    kernel = torch.nn.Parameter(start.to(memory_format=torch.channels_last, copy=True))
    kernel.grad = grad.to(memory_format=torch.channels_last)
    matrix = torch.nn.Parameter(start.flatten(1).clone())
    matrix.grad = grad.flatten(1).clone()
    for weight in (kernel, matrix):
        optim.Muon([("decoder.up.0.conv1.weight", weight)]).step(0.1)
    torch.testing.assert_close(kernel.data.flatten(1), matrix.data)


def test_optimiser_leaves_what_asks_for_no_gradient():
    network = AutoencoderKL(TINY_VAE).requires_grad_(False)
    network.decoder.requires_grad_(True)
    optimiser = optim.Optimiser(network.named_parameters())
    held = [p for group in optimiser.muon.groups.values() for p, _ in group]
    held += optimiser.adam.param_groups[0]["params"]
    assert {id(p) for p in held} == {id(p) for p in network.decoder.parameters()}
    assert id(network.decoder.conv_out.weight) in {
        id(p) for p in optimiser.adam.param_groups[0]["params"]
    }


@pytest.mark.parametrize("steps,cooldown,expected", [(10, 0, 1.0), (10, 4, 0.5)])
def test_learning_rate(steps, cooldown, expected):
    plan = optim.Plan(steps=steps, batch=1, warmup=2, cooldown=cooldown)
    assert plan.rate(0) == 0.5 and plan.rate(1) == 1.0
    assert plan.rate(8) == expected


def test_positions_run_from_edge_to_edge_at_every_size(run):
    pipe = models.new_pipeline("sd3", run, CPU)
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


# ---------------------------------------------------------------- VAE


def test_autoencoder_resumes_bit_by_bit(packages, tmp_path):
    plan = optim.Plan(steps=4, batch=2)
    vae.train_vae(tmp_path / "whole", packages, plan, CPU)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted(patch, 2)
        vae.train_vae(tmp_path / "parts", packages, plan, CPU)
    vae.train_vae(tmp_path / "parts", packages, plan, CPU)
    whole, parts = (load_component(tmp_path / name, "vae") for name in ("whole", "parts"))
    assert_equal(whole.state_dict(), parts.state_dict())


def colourful(seed: int, count: int) -> torch.Tensor:
    """Pixels (count, 3, 64, 64) of soft colourful patches."""
    chance = torch.Generator().manual_seed(seed)
    small = torch.rand(count, 3, 6, 6, generator=chance) * 2 - 1
    return torch.nn.functional.interpolate(small, size=64, mode="bicubic").clamp(-1, 1)


def test_the_encoder_starts_with_the_principal_components():
    network = AutoencoderKL(REAL_VAE)
    vae.principal(network, colourful(0, 32))
    pixels = colourful(1, 8)
    mean, logvar = network.moments(pixels)
    latents = mean.transpose(0, 1).flatten(1)  # (C, samples)
    blocks = torch.nn.functional.pixel_unshuffle(pixels, 8).transpose(0, 1).flatten(1)
    directions = torch.linalg.eigh(blocks.cov()).eigenvectors[:, -16:]
    centred = blocks - blocks.mean(dim=1, keepdim=True)
    least = (centred - directions @ directions.T @ centred).square().mean()
    ones = torch.cat((latents, torch.ones_like(latents[:1])))
    back = torch.linalg.lstsq(ones.T, blocks.T).solution
    assert (ones.T @ back - blocks.T).square().mean() < 1.5 * least  # no linear codec has less
    deviation = latents.std(dim=1)
    assert deviation[:3].min() > deviation[3:].max()  # the three means of colour come first
    assert deviation.min() > deviation.max() / 4
    assert logvar.max() < -6


def test_latents_have_mean_0_and_deviation_1_and_clear_channels_first(packages):
    torch.manual_seed(0)
    given = AutoencoderKL(TINY_VAE)
    sprites = Sprites(packages)
    images = vae.pictures(sprites, 64)
    final = vae.scaled(given, sprites)
    found = vae.encode_images(final, images)
    deviation, mean = torch.std_mean(found, dim=(0, 2, 3))
    torch.testing.assert_close(deviation.square().mean(), torch.tensor(1.0), atol=2e-3, rtol=0)
    torch.testing.assert_close(mean, torch.zeros(8), atol=1e-3, rtol=0)
    noise = final.moments(vae.to_pixels(images))[1].exp().mean(dim=(0, 2, 3)).sqrt()
    assert ((deviation / noise).diff() < 0).all()
    before = given.decoder.conv_in(vae.encode_images(given, images))
    after = final.decoder.conv_in(found)  # what the decoder sees, but for its edges
    torch.testing.assert_close(
        after[..., 1:-1, 1:-1], before[..., 1:-1, 1:-1], atol=1e-5, rtol=1e-4
    )


def test_composing_ahead_changes_nothing(packages, tmp_path):
    plan = optim.Plan(steps=3, batch=2)
    for workers in (0, 2):
        vae.train_vae(tmp_path / str(workers), packages, plan, CPU, workers=workers)
    one, other = (load_component(tmp_path / name, "vae").state_dict() for name in ("0", "2"))
    assert_equal(one, other)


def test_the_embedded_autoencoder_keeps_what_scenes_show(packages, tmp_path, monkeypatch):
    # boxes have sharp edges, of which larger ones have more: as large as when it was trained
    monkeypatch.setattr(scenes, "SIZES", {1: (0.3, 0.75), 2: (0.3, 0.55), 3: (0.25, 0.42)})
    network = models.load_vae(tmp_path)  # which has none of its own
    named = {"down_block_types": None, "up_block_types": None}  # in the file alone
    assert replace(network.config, **named) == REAL_VAE
    images = vae.pictures(Sprites(packages), 2)
    again = network.decode(vae.encode_images(network, images)).clamp(-1, 1)
    error = (again - vae.to_pixels(images)).square().mean() / 4  # of values in [0, 1]
    assert -10 * error.log10() > 28  # dB; 37 of real scenes, these are boxes


# ---------------------------------------------------------------- text encoders and transformer


def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(family, run, packages, monkeypatch):
    monkeypatch.setattr(transformer, "RENEWALS", 2)
    whole = trained(family, run, packages, PLAN)
    (run / family / "checkpoint.pt").unlink()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted(patch, 3)
        trained(family, run, packages, PLAN)
    parts = trained(family, run, packages, PLAN, prompts=["an owl"])
    assert_equal(whole, parts)
    assert any((run / family).glob("sheets/64x64-*.png"))
    data = latents.Latents(run / "data", 64, 64, TINY_NAMES)
    assert list(data.numbers[:7]) == [40, 41, 42, 43, 44, 45, 6]  # 2 renewals of 3 in 4 steps


def test_text_encoders_learn_first_and_training_starts_from_them(family, run, packages, capsys):
    plan = optim.Plan(steps=100, batch=8, warmup=10, cooldown=50)
    text.train_text(family, run, packages, plan, (64, 64), CPU)
    losses = [float(line.split()[3]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < 0.7 * losses[0]
    state = torch.load(run / family / "text.pt")
    still = replace(PLAN, steps=1, muon_lr=0.0, adam_lr=0.0)
    networks = trained(family, run, packages, still)["networks"]
    kinds = {name.split(".")[0] for name in networks}
    assert {name.split(".")[0] for name in state} == kinds - {"transformer"}
    for name, value in state.items():
        assert torch.equal(value, networks[name]), name


@pytest.mark.parametrize(
    ("said", "above", "answers"),  # 0 is the apple, 3 the owl
    [
        ("a red apple and an owl on a teal background", 0, {"first": 0, "second": 3}),
        ("an owl below a red apple", 0, {"first": 3, "second": 0, "above": 0, "below": 3}),
        ("a red apple below an owl", 3, {"first": 0, "second": 3, "above": 3, "below": 0}),
        ("two owls on a teal background", 3, {"first": 3, "second": 3}),
    ],
)
def test_a_caption_answers_who_is_first_and_who_is_where(said, above, answers):
    below = 3 if above == 0 or "two" in said else 0
    things = [
        Thing(TINY_NAMES[i], 0.5, y, 0.4, False, 0.0) for i, y in ((below, 0.8), (above, 0.2))
    ]
    scene = Scene(tuple(things), Background("plain", ("teal",)))
    table = text.answers(scene, said, {name: i for i, name in enumerate(TINY_NAMES)})
    found = {text.QUESTIONS[question]: name for question, name in table.nonzero().tolist()}
    assert found == answers and table.sum() == len(answers)


def test_choosing_ahead_changes_nothing(family, run, packages):
    kinds = [trained(family, run, packages, PLAN, renew=0)]
    (run / family / "checkpoint.pt").unlink()
    kinds.append(trained(family, run, packages, PLAN, renew=0, workers=2))
    assert_equal(*kinds)
    with pytest.raises(ValueError, match="renew is 3, must be 0 with workers"):
        trained(family, run, packages, PLAN, renew=3, workers=2)


def test_texts_are_what_the_encoders_make_of_the_captions(family, run, packages):
    pipe = models.new_pipeline(family, run, CPU)
    data = latents.Latents(run / "data", 64, 64, TINY_NAMES)
    texts = latents.Texts(pipe, data)
    network = load_component(run, "vae")
    texts.renew(data.renew(network, Sprites(packages), 2))  # slots 0 and 1 show scenes 40 and 41
    rows = [3 * 1 + 2, 3 * 7, -1]
    said = [
        scenes.caption(data.scene(n), random.Random(f"caption/{n}/{k}"))
        for n, k in ((41, 2), (7, 0))
    ]
    found, expected = texts.of(rows), pipe.encode([*said, ""])
    if family == "lumina":  # padding means nothing, and is longer
        length = expected["context_mask"].shape[1]
        assert not found["context_mask"][:, length:].any()
        read = expected["context_mask"][..., None]
        expected["context"] = expected["context"] * read
        found["context"] = found["context"][:, :length] * read
        found["context_mask"] = found["context_mask"][:, :length]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-3, rtol=2e-3)
    data.renew(network, Sprites(packages), 0)


def test_training_lowers_the_loss(family, run):
    trainer, step = new_trainer(family, run, replace(PLAN, steps=50, batch=8, cooldown=0))
    losses = [step(i).item() for i in range(50)]
    assert np.mean(losses[-10:]) < 0.85 * np.mean(losses[:3])


def test_noise_levels_lean_towards_noise():
    levels = transformer.noise_levels(4000, torch.Generator().manual_seed(0))
    assert levels.median() == pytest.approx(0.75, abs=0.01)  # of 0.5, shifted by 3
    assert 0 < levels.min() < 0.3 and 0.95 < levels.max() < 1


def test_every_parameter_of_the_transformer_is_trained(family, run):
    trainer, step = new_trainer(family, run, PLAN)
    before = {n: p.detach().clone() for n, p in trainer.networks.named_parameters()}
    for i in range(4):
        step(i)
    same = {n for n, p in trainer.networks.named_parameters() if torch.equal(p, before[n])}
    # text encoders are frozen; pad_token serves pictures of unequal sizes, which we lack
    assert same == {n for n in before if n.startswith(("text", "transformer.pad_token"))}


def test_export_loads_strictly_and_holds_the_averaged_weights(family, run, packages, tmp_path):
    state = trained(family, run, packages, PLAN)
    scheduler = replace(models.SCHEDULER, default_steps=2, corrected_steps=2, shift=2.5)
    models.export(family, run, tmp_path / "out", scheduler)
    pipe = minidit.load(tmp_path / "out")
    assert pipe.scheduler == scheduler
    for name, value in pipe.transformer.state_dict().items():
        if name != "pos_embed":
            expected = state["average"][f"transformer.{name}"].bfloat16().float()
            assert torch.equal(value, expected), name
    image = pipe("an owl on a pink background", height=64, width=64, seed=0).images[0]
    assert image.size == (64, 64)


# ---------------------------------------------------------------- measuring


def test_classifier_sees_what_is_there_and_where(packages, tmp_path):
    plan = optim.Plan(steps=120, batch=8, warmup=10, cooldown=60)
    classifier.train_classifier(tmp_path, packages, plan, CPU)
    network = classifier.load_classifier(tmp_path / "classifier.pt", TINY_NAMES)
    left = Thing(TINY_NAMES[0], 0.3, 0.5, 0.4, False, 0.0)
    right = Thing(TINY_NAMES[4], 0.75, 0.5, 0.4, False, 0.0)
    scene = Scene((left, right), Background("plain", ("sky blue",)))
    image = Image.fromarray(scenes.draw(scene, Sprites(packages), 96, 96))
    seen = classifier.look(network, image)
    assert {classifier.rank(seen, 0), classifier.rank(seen, 4)} == {0, 1}
    assert torch.allclose(seen.places[0], torch.tensor([0.3, 0.5]), atol=0.12)
    assert torch.allclose(seen.places[4], torch.tensor([0.75, 0.5]), atol=0.12)
    assert seen.ground[0, 0] > 0.9 > seen.ground[4, 2]


def test_classifier_labels():
    numbers = {name: i for i, name in enumerate(TINY_NAMES)}
    cells = classifier.labels(one_thing(TINY_NAMES[2], "plain", "red"), numbers, 64, 128)
    assert cells.shape == (8, 16)
    assert cells[3, 3] == 3 and cells[0, 0] == 0 and cells[3, 12] == 0 and cells[2, 2] == -1


def test_held_out_cases_are_held_out_and_mean_what_they_say():
    cases = measure.held_out_cases(REAL_NAMES(), 30, seed=0)
    assert all(case.scene.held_out for case in cases)
    assert [len(case.scene.things) for case in cases[:3]] == [1, 2, 2]
    for case in cases[2::3]:
        assert case.words in case.prompt and scenes.relation(*case.scene.things) == case.words
    assert cases == measure.held_out_cases(REAL_NAMES(), 30, seed=0)


def test_measure_prints_finite_numbers_dense_and_with_ras(packages, tmp_path, capsys, monkeypatch):
    torch.manual_seed(0)
    network = classifier.Classifier(len(TINY_NAMES))
    torch.save(network.state_dict(), tmp_path / "classifier.pt")
    args = ["measure", "--model", str(GOLDENS / "pipe_lumina"), "--packages", str(packages)]
    args += ["--run", str(tmp_path), "--count", "6", "--steps", "8"]
    results = []
    for more in ([], ["--ras-preset", "paper"], ["--guidance", "2"]):
        command(monkeypatch, *args, *more)
        lines = capsys.readouterr().out.splitlines()[1:]
        results.append({name: values for name, *values in map(str.split, lines)})
    names = ["vae_psnr", "single", "things", "places", "background", "frechet", "diversity"]
    assert list(results[0]) == names
    assert results[0].pop("vae_psnr")[0] == "-"
    for result in results:
        assert all(np.isfinite(float(x)) for n, v in result.items() if n != "vae_psnr" for x in v)
    assert len({result["frechet"][0] for result in results}) == 3  # drawn
    assert len({result["frechet"][1] for result in results}) == 1  # real
    with pytest.raises(ValueError, match="count is 5, must be at least 6"):
        command(monkeypatch, *args, "--count", "5")


def test_scores_of_perfect_and_of_wrong_pictures(packages):
    apple, cherry = TINY_NAMES[:2]
    things = (Thing(apple, 0.2, 0.5, 0.3, False, 0.0), Thing(cherry, 0.8, 0.5, 0.3, False, 0.0))
    scene = Scene(things, Background("plain", ("teal",)))
    case = measure.Case("", scene, "to the left of")
    image = Image.fromarray(scenes.draw(scene, Sprites(packages), 64, 64))
    numbers = {name: i for i, name in enumerate(TINY_NAMES)}
    ground = torch.zeros(8, 8)
    ground[0] = 1.0
    places = torch.tensor([[0.2, 0.5], [0.8, 0.5], *[[0.5, 0.5]] * 3])
    seen = classifier.Seen(torch.tensor([0.9, 0.8, 0.1, 0.2, 0.3]), places, ground)
    single = (measure.Case("", one_thing(apple, "plain", "teal")), seen, image)
    for swapped in (False, True):
        what = replace(seen, places=places.flip(0)[[3, 4, 0, 1, 2]]) if swapped else seen
        cases, saw, images = zip(single, (case, what, image), strict=True)
        found = measure.scores(cases, saw, images, numbers)
        assert found["single"] == found["things"] == 1
        assert found["places"] == (0 if swapped else 1) and found["background"] < 1


def test_frechet_distance_of_gaussians():
    rng = np.random.default_rng(0)
    sample = rng.normal(size=(500, 3))
    assert measure.frechet(sample, sample) == pytest.approx(0, abs=1e-9)
    assert measure.frechet(sample, sample + [1, 0, 2]) == pytest.approx(5, abs=1e-9)
    # the same Gaussian twice as wide: trace of (2 - 1)^2 times its covariance
    expected = np.trace(np.cov(sample, rowvar=False)) + np.square(sample.mean(0)).sum()
    assert measure.frechet(sample, 2 * sample) == pytest.approx(expected, rel=1e-6)


def test_sheet_draws_every_fixed_prompt(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "PROMPTS", train.PROMPTS[:8])
    out = tmp_path / "sheet.jpg"
    command(monkeypatch, "sheet", "--model", str(GOLDENS / "pipe_lumina"), "--out", str(out))
    side = Image.open(out).height
    assert Image.open(out).width > 2.5 * side  # two rows of six
    assert f"wrote {out}" in capsys.readouterr().out


def test_fixed_prompts_ask_for_things_that_are_known():
    known = [name.text for name in REAL_NAMES()]
    for prompt in train.PROMPTS:
        assert any(name in prompt for name in known), prompt


def test_devices_compares_with_the_cpu(monkeypatch, capsys):
    monkeypatch.setattr(devices, "WAYS", ((torch.float32, False), (torch.float16, False)))
    monkeypatch.setattr(devices, "SIDE", 8)
    monkeypatch.setattr(sys, "argv", ["devices.py", "--device", "cpu"])
    devices.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    assert [row[:4] for row in rows] == [
        [family, dtype, "no", ras]
        for family in models.PIXELS
        for ras in ("no", "yes")
        for dtype in ("float32", "float16")
    ]
    off = [float(row[4]) for row in rows]
    assert not any(off[::2]) and all(0 < x < 0.2 for x in off[1::2])
