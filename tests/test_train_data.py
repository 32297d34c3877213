"""What examples/train.py trains on: scenes, captions, latents, tokenizers."""

from __future__ import annotations

import random
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_runs import REAL_NAMES, SMALL, TINY_NAMES, one_thing

from training import (
    latents,
    scenes,
    vae,
    vocabulary,
)
from training.scenes import Background, Name, Scene, Sprites, Thing
from weights.load import load_component

pytestmark = SMALL


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
