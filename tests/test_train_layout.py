"""What training's noise says of a scene's layout: quantiles, as a Gaussian has them."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training import scenes
from training.layout import (
    CODES,
    FREE,
    SIGMA,
    layout_codes,
    read_layout,
    write_layout,
)
from training.scenes import SIZES, Background, Name, Scene, Thing, spoken

APPLE, FOX = Name("red apple", "red apples"), Name("fox", "foxes")
PLAIN = Background("plain", ("teal",))
ONE, TWO = (np.mean(SIZES[count]) for count in (1, 2))


def codes_of(*things: Thing, text: str = "", aspect: float = 1.0, seed: int = 0) -> np.ndarray:
    return np.array(layout_codes(Scene(things, PLAIN), text, aspect, random.Random(seed)))


def pair(x: float, y: float, other_x: float, other_y: float) -> tuple[Thing, Thing]:
    return (
        Thing(FOX, x, y, TWO, mirror=False, angle=0.0),
        Thing(APPLE, other_x, other_y, TWO, mirror=True, angle=0.0),
    )


# ---------------------------------------------------------------- codes of a scene


def test_one_thing_says_place_size_mirror_and_turn():
    middle = Thing(FOX, 0.5, 0.5, ONE, mirror=True, angle=0.0)
    codes = codes_of(middle)
    np.testing.assert_allclose(codes[[0, 1, 2, 7]], 0, atol=1e-9)
    assert codes[3] > 0 and np.isnan(codes[[4, 5, 6]]).all()
    for place, change in {
        0: {"x": 0.6}, 1: {"y": 0.6}, 2: {"size": SIZES[1][1]}, 7: {"angle": 3.0},
    }.items():  # fmt: skip
        assert codes_of(replace(middle, **change))[place] > 0.1
    assert codes_of(replace(middle, mirror=False))[3] < 0


def test_two_things_say_middle_distance_direction_and_order():
    text, other = "a fox and a red apple on a teal background", "a red apple and a fox"
    codes = codes_of(*pair(0.25, 0.5, 0.75, 0.5), text=text)  # the apple on the right
    assert not np.isnan(codes).any()
    assert codes[3] < 0 < codes[6]  # only the apple is a mirror image
    assert codes[7] > 0 > codes_of(*pair(0.25, 0.5, 0.75, 0.5), text=other)[7]
    assert codes_of(*pair(0.75, 0.5, 0.25, 0.5), text=text)[7] < 0
    assert codes[4] > 0 and abs(codes[5]) < 0.1 * codes[4]  # half way round
    below = codes_of(*pair(0.5, 0.25, 0.5001, 0.75), text=text)
    assert below[4] < 0 and abs(below[5]) < 0.1 * -below[4]  # a whole turn is none
    rising, falling = (codes_of(*pair(0.3, y, 0.7, 1 - y), text=text) for y in (0.7, 0.3))
    assert rising[5] < 0 < falling[5]
    right, left = (codes_of(*pair(0.27 + x, 0.25, 0.67 + x, 0.75), text=text) for x in (0.05, 0.0))
    assert right[0] > left[0] and right[1] == pytest.approx(left[1])
    far, near = (codes_of(*pair(0.5 - x, 0.5, 0.5 + x, 0.5), text=text) for x in (0.25, 0.22))
    assert far[2] > near[2] and far[0] == pytest.approx(near[0], abs=1e-6)


def test_the_order_in_a_scene_changes_nothing():
    things = pair(0.3, 0.3, 0.7, 0.6)
    text = "a fox and a red apple"
    np.testing.assert_array_equal(codes_of(*things, text=text), codes_of(*things[::-1], text=text))


def test_who_is_where_stays_free_if_the_caption_says_it():
    things = pair(0.25, 0.5, 0.75, 0.5)
    codes = codes_of(*things, text="a fox to the left of a red apple on a teal background")
    assert np.isnan(codes[[4, 5, 7]]).all() and not np.isnan(codes[[0, 1, 2, 3, 6]]).any()
    foxes = (things[0], replace(things[1], name=FOX))  # neither is named first
    codes = codes_of(*foxes, text="two foxes on a teal background")
    assert np.isnan(codes[7]) and not np.isnan(codes[:7]).any()


def test_three_things_say_nothing():
    things = [Thing(FOX, x, 0.5, 0.3, False, 0.0) for x in (0.2, 0.5, 0.8)]
    assert np.isnan(codes_of(*things, text="three foxes")).all()


@pytest.mark.parametrize("aspect", [1.0, 2.0])
@pytest.mark.parametrize("count", [1, 2])
def test_codes_are_gaussian_and_independent(aspect, count):
    rng, names, rows = random.Random(3), [APPLE, FOX], []
    for _ in range(2500):
        scene = scenes.compose(rng, names[:count], PLAIN, aspect)
        rows.append(layout_codes(scene, "a red apple and a fox", aspect, rng))
    codes = np.array(rows)
    codes = codes[:, ~np.isnan(codes[0])]
    assert codes.shape[1] == {1: 5, 2: 8}[count]
    assert np.isfinite(codes).all()
    for moment, expected in ((1, 0), (2, 1), (3, 0), (4, 3)):
        np.testing.assert_allclose((codes**moment).mean(axis=0), expected, atol=0.1 * 1.9**moment)
    np.testing.assert_allclose(np.corrcoef(codes.T), np.eye(codes.shape[1]), atol=0.09)


@given(st.floats(0.3, 0.75), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_codes_are_numbers_whatever_the_scene(size, x, y, seed):
    thing = Thing(FOX, x, y, size, mirror=seed % 2 == 0, angle=9.0)
    assert np.isfinite(codes_of(thing, seed=seed)[[0, 1, 2, 3, 7]]).all()


@pytest.mark.parametrize(
    ("text", "order"),
    [
        ("A hot dog and a dog on a red background", ["hot dog", "dog"]),
        ("a dog and a hot dog", ["dog", "hot dog"]),
        ("a cat face above a cat", ["cat face", "cat"]),
        ("a cat above a cat face", ["cat", "cat face"]),
        ("an elephant and an ant", ["elephant", "ant"]),
    ],
)
def test_order_is_that_of_the_caption(text, order):
    for names in (order, order[::-1]):
        things = tuple(Thing(Name(name, ""), 0.5, 0.5, 0.4, False, 0.0) for name in names)
        assert [thing.name.text for thing in spoken(things, text)] == order


# ---------------------------------------------------------------- numbers in the noise


@settings(deadline=None)
@given(st.integers(0, 999), st.sampled_from([(8, 8), (16, 32), (4, 6)]))
def test_noise_says_what_was_written_and_is_else_as_it_was(seed, size):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(3, 16, *size, generator=generator, dtype=torch.float64)
    codes = torch.randn(3, CODES, generator=generator, dtype=torch.float64)
    codes[1, 2:] = FREE
    sigma = torch.tensor([1.0, SIGMA + 0.01, SIGMA])
    written = write_layout(noise, codes, sigma)
    expected = read_layout(noise)
    expected[0], expected[1, :2] = codes[0], codes[1, :2]
    torch.testing.assert_close(read_layout(written), expected)
    assert torch.equal(written[2], noise[2])
    assert torch.equal(written[:, CODES:], noise[:, CODES:])
    change = written - noise  # one number is one degree of freedom
    torch.testing.assert_close(
        change.square().sum((2, 3)).sqrt()[:, :CODES], (expected - read_layout(noise)).abs()
    )


def test_what_changes_along_one_axis_alone_says_nothing():
    rows = torch.randn(1, 16, 8, 1, dtype=torch.float64).expand(1, 16, 8, 12)
    for stripes in (rows, rows.mT):
        torch.testing.assert_close(read_layout(stripes), torch.zeros(1, CODES).double())
