"""Lumina-Image 2.0's network against diffusers' output on a tiny model, and its own rules."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import GOLDENS, conditioning, noise, randomised, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import minidit
from minidit import Lumina2, Lumina2Config
from minidit.lumina2 import image_places, text_places
from minidit.parts import rotate

CASE = GOLDENS / "lumina2"
INFO = json.loads((CASE / "info.json").read_text())


@pytest.mark.parametrize("refined", [False, True])
@pytest.mark.parametrize("run", INFO["runs"])
def test_golden(run, refined):
    model = minidit.load_component(CASE, "transformer", dtype=torch.float32)
    inputs = load_file(CASE / "inputs.safetensors")
    latents, sigma, context, mask = (
        inputs[f"{run}/{name}"]
        for name in ("hidden_states", "sigma", "encoder_hidden_states", "encoder_attention_mask")
    )
    cond = {"context": context, "context_mask": mask}
    velocity = model(latents, sigma, **(model.prepare(**cond) if refined else cond))
    expected = load_file(CASE / "expected.safetensors")[f"{run}/velocity"]
    assert (velocity - expected).abs().max() <= INFO["atol"][f"{run}/velocity"]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=3), st.integers(1, 5), st.integers(1, 5))
def test_a_batch_with_its_own_sigmas_equals_its_members_alone(sigmas, h, w):
    """With texts of different lengths, alone without their padding."""
    B, model, cond = len(sigmas), tiny_model("lumina2"), conditioning("lumina2", len(sigmas))
    latents = noise(B, 2 * h, 2 * w)
    together = model(latents, torch.tensor(sigmas), **cond)
    for b in range(B):
        own = {name: rows[b : b + 1, : b + 1] for name, rows in cond.items()}
        assert own["context_mask"].all()
        alone = model(latents[b : b + 1], sigmas[b], **own)
        assert torch.allclose(together[b : b + 1], alone, atol=1e-5)


def test_sigma_may_be_a_number_a_scalar_or_one_per_sample():
    model, cond = tiny_model("lumina2"), conditioning("lumina2", 2)
    expected = model(noise(2, 4, 4), 0.25, **cond)
    for sigma in (torch.tensor(0.25), torch.tensor([0.25]), torch.tensor([0.25, 0.25])):
        assert model(noise(2, 4, 4), sigma, **cond).equal(expected)


@given(
    st.lists(st.booleans(), min_size=5, max_size=9).filter(any),
    st.sampled_from([torch.bool, torch.int64, torch.uint8]),
    st.sampled_from([0.0, 1e4, float("nan"), float("inf")]),
)
def test_padding_may_be_anywhere_and_hold_anything(real, dtype, junk):
    model, mask = tiny_model("lumina2"), torch.tensor([real])
    text = torch.randn(1, sum(real), 20, generator=torch.Generator().manual_seed(0))
    padded = torch.full((1, len(real), 20), junk).masked_scatter(mask[..., None], text)
    expected = model(noise(1, 4, 6), 0.6, text, torch.ones(1, sum(real)))
    velocity = model(noise(1, 4, 6), 0.6, padded, mask.to(dtype))
    assert torch.allclose(velocity, expected, atol=1e-5)
    changed = model(noise(1, 4, 6), 0.6, text + 1, torch.ones(1, sum(real)))
    assert not torch.allclose(changed, expected, atol=1e-3)


def test_a_prompt_without_text_gives_numbers_that_its_padding_does_not_change():
    model, cond = tiny_model("lumina2"), conditioning("lumina2", 2)
    cond["context_mask"] = torch.tensor([[True] * 5, [False] * 5])
    velocity = model(noise(2, 4, 6), 0.6, **cond)
    assert torch.isfinite(velocity).all()
    cond["context"][1] = float("nan")
    assert model(noise(2, 4, 6), 0.6, **cond).equal(velocity)


def test_the_order_of_the_text_matters():
    model, cond = tiny_model("lumina2"), conditioning("lumina2", 1, tokens=7)
    cond["context_mask"] = torch.ones(1, 7)
    turned = cond | {"context": cond["context"].flip(1)}
    one, other = (model(noise(1, 4, 6), 0.6, **each) for each in (cond, turned))
    assert not torch.allclose(one, other, atol=1e-3)


def test_a_prepared_prompt_gives_the_same_bits_and_needs_no_context_refiners():
    model, cond = tiny_model("lumina2"), conditioning("lumina2", 2)
    prepared = model.prepare(**cond)
    assert prepared["context"].shape == (2, 5, 48)
    broken = Lumina2(model.config).requires_grad_(False)
    broken.load_state_dict(model.state_dict())
    for part in (broken.context_norm, broken.context_embed, broken.context_refiner):
        for value in part.parameters():
            value.fill_(float("nan"))
    again = model.prepare(**prepared)  # as they are
    assert again["refined"] and again["context"] is prepared["context"]
    assert again["context_mask"] is prepared["context_mask"]
    for sigma in (0.9, 0.2):
        expected = model(noise(2, 4, 6), sigma, **cond)
        assert broken(noise(2, 4, 6), sigma, **prepared).equal(expected)
        assert broken(noise(2, 4, 6), sigma, **cond).isnan().any()


def test_text_and_image_places():
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 1]])
    text = text_places(mask)
    assert text[0, :3].tolist() == [[0, 0, 0], [1, 0, 0], [2, 0, 0]]
    assert text[1, [1, 3]].tolist() == [[0, 0, 0], [1, 0, 0]]
    assert image_places(torch.tensor([[0, 7]]), 5, mask).tolist() == [
        [[3, 0, 0], [3, 1, 2]],
        [[2, 0, 0], [2, 1, 2]],
    ]
    assert image_places(torch.tensor([[4], [5]]), 5, mask).tolist() == [[[3, 0, 4]], [[2, 1, 0]]]


@given(st.tuples(*[st.integers(0, 40)] * 3))
def test_rotations(place):
    """32 channels turned by text number, 32 by row, 32 by column, the first pair of each fastest,
    in float32 whatever the weights are."""
    with torch.device("meta"):
        model = Lumina2(Lumina2Config(num_layers=1, num_refiner_layers=1)).bfloat16()
    rope = model._rotations(torch.tensor([[place]]))
    assert [(part.shape, part.dtype) for part in rope] == [((1, 1, 1, 96), torch.float32)] * 2
    turned = rotate(torch.tensor([1.0, 0.0]).repeat(48).expand(1, 1, 1, 96), rope).flatten()
    for axis, position in enumerate(place):
        for j in (0, 1, 15):
            angle = torch.tensor(position * 10000 ** (-2 * j / 32))
            pair = turned[32 * axis + 2 * j :][:2]
            assert torch.allclose(pair, torch.stack((angle.cos(), angle.sin())), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "width"),
    [
        ({}, 9216),
        ({"ffn_dim_multiplier": 0.3}, 2816),  # int(0.3 * 9216) = 2764
        ({"hidden_size": 96, "num_attention_heads": 1, "num_kv_heads": 1, "multiple_of": 100}, 400),
    ],
)
def test_mlp_width(change, width):
    assert Lumina2Config(**change).mlp_width == width


def test_official_size():
    """The number of parameters of the official file."""
    with torch.device("meta"):
        model = Lumina2(Lumina2Config())
    assert sum(p.numel() for p in model.parameters()) == 2_609_769_152


@pytest.mark.parametrize(
    "change", [{"num_kv_heads": None}, {"patch_size": 1}, {"num_refiner_layers": 1}]
)
def test_variants_run(change):
    config = replace(tiny_model("lumina2").config, **change)
    velocity = randomised(Lumina2(config))(noise(2, 4, 6), 0.5, **conditioning("lumina2", 2))
    assert velocity.shape == (2, 4, 4, 6) and torch.isfinite(velocity).all()


def test_gradients_are_those_of_finite_differences():
    """Some steps work in place; autograd must still see what they overwrite."""
    model = randomised(Lumina2(tiny_model("lumina2").config)).double().requires_grad_(True)
    cond, latents = conditioning("lumina2", 2), noise(2, 4, 6).double()

    def loss():
        return model(latents, torch.tensor([0.3, 0.8]), **cond).square().sum()

    loss().backward()
    generator = torch.Generator().manual_seed(0)
    step, values = 1e-5, []
    with torch.no_grad():
        moves = {p: torch.randn(p.shape, generator=generator) for p in model.parameters()}
        slope = sum((p.grad * move).sum() for p, move in moves.items())
        for side in (1, -2):
            for p, move in moves.items():
                p += side * step * move
            values.append(loss())
    assert slope.item() == pytest.approx(((values[0] - values[1]) / (2 * step)).item(), rel=1e-4)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"latents": torch.zeros(1, 3, 4, 4)}, "must be (batch, 4, height, width)"),
        ({"latents": torch.zeros(1, 4, 5, 4)}, "latents are 5x4, both must be multiples of 2"),
        ({"latents": torch.zeros(1, 4, 4, 34)}, "4x34, but the positions of this model end at 32x"),
        ({"sigma": torch.zeros(2)}, "sigma has shape (2,), must be a number or (1,)"),
        ({"context": torch.zeros(1, 5, 21)}, "(1, 5, 21), must be (1, tokens, 20)"),
        ({"context": torch.zeros(2, 5, 20)}, "context has shape (2, 5, 20)"),
        ({"context": torch.zeros(1, 0, 20)}, "context has shape (1, 0, 20)"),
        ({"refined": True}, "context has shape (1, 5, 20), must be (1, tokens, 48)"),
        ({"context_mask": torch.ones(1, 4)}, "context_mask has shape (1, 4), must be (1, 5)"),
        ({"active": torch.zeros(1, 1, dtype=torch.int64)}, "active tokens need a cache"),
    ],
)
def test_bad_inputs_are_named(change, sentence):
    inputs = {"latents": noise(1, 4, 4), "sigma": 0.5, **conditioning("lumina2", 1)}
    with pytest.raises(ValueError) as error:
        tiny_model("lumina2")(**(inputs | change))
    assert sentence in str(error.value)


def test_a_bad_prompt_is_named_where_it_is_prepared():
    cond = conditioning("lumina2", 1)
    with pytest.raises(ValueError, match=r"\(1, 5, 19\), must be \(batch, tokens, 20\)"):
        tiny_model("lumina2").prepare(cond["context"][..., 1:], cond["context_mask"])


@pytest.mark.parametrize(("rows", "columns"), [(6, 3), (3, 6), (4, 2), (2, 5)])
def test_pictures_beyond_the_positions_are_refused_along_either_side(rows, columns):
    config = replace(tiny_model("lumina2").config, axes_lens=(64, 4, 5))
    model, cond = Lumina2(config).eval(), conditioning("lumina2", 1)
    latents = torch.zeros(1, config.in_channels, 2 * rows, 2 * columns)
    if rows <= 4 and columns <= 5:
        assert model(latents, 0.5, **cond).shape == latents.shape
        return
    with pytest.raises(ValueError, match="the positions of this model end at 8x10"):
        model(latents, 0.5, **cond)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_layers": 0}, "num_layers is 0, must be at least 1"),
        ({"out_channels": 32}, "out_channels is 32, must be null or in_channels = 16"),
        ({"hidden_size": 2300}, "hidden_size is 2300, must be a multiple of num_attention_heads"),
        ({"num_kv_heads": 7}, "num_kv_heads is 7, must be a divisor of num_attention_heads = 24"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0, must be above 0"),
        ({"ffn_dim_multiplier": -1.0}, "ffn_dim_multiplier is -1.0, must be above 0"),
        ({"axes_dim_rope": (32, 32)}, "axes_dim_rope is (32, 32), must be three even numbers"),
        ({"axes_dim_rope": (32, 31, 33)}, "must be three even numbers"),
        ({"axes_dim_rope": (32, 32, 34)}, "add up to head_dim = 96"),
        ({"axes_lens": (300, 0, 512)}, "axes_lens is (300, 0, 512)"),
        ({"axes_lens": (300, 512)}, "axes_lens is (300, 512), must be three numbers"),
        ({"axes_dim_rope": (0, 48, 48)}, "axes_dim_rope is (0, 48, 48), must be three"),
        ({"ffn_dim_multiplier": 0.0}, "ffn_dim_multiplier is 0.0, must be above 0"),
        ({"norm_eps": float("nan")}, "norm_eps is nan, must be a finite number"),
    ],
)
def test_bad_configs_are_named(change, sentence):
    with pytest.raises(ValueError) as error:
        Lumina2Config(**change)
    assert sentence in str(error.value)


def test_the_narrowest_and_shortest_axes():
    config = Lumina2Config(axes_dim_rope=(2, 46, 48), axes_lens=(1, 1, 1))
    assert config.axes_dim_rope[0] == 2 and config.axes_lens == (1, 1, 1)
