"""FLUX.1 against diffusers' output on a tiny model, and its own rules."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import GOLDENS, conditioning, noise, randomised, rounding, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import minidit
from minidit import Flux, FluxConfig
from minidit.flux import clip
from minidit.parts import rotate

CASE = GOLDENS / "flux_dev"
INFO = json.loads((CASE / "info.json").read_text())


@pytest.mark.parametrize("run", INFO["call"])
def test_golden(run):
    model = minidit.load_component(CASE, "transformer", dtype=torch.float32)
    inputs = load_file(CASE / "inputs.safetensors")
    names = ("latents", "sigma", "context", "pooled", "guidance")
    velocity = model(*(inputs[f"{run}/{name}"] for name in names))
    expected = load_file(CASE / "expected.safetensors")[f"{run}/velocity"]
    atol = rounding(INFO["outputs"][f"{run}/velocity"])
    assert (velocity - expected).abs().max() <= atol


@pytest.mark.parametrize("family", ["flux-dev", "flux-schnell"])
def test_a_batch_with_its_own_sigmas_equals_its_members_alone(family):
    model, cond, sigma = tiny_model(family), conditioning(family, 3), torch.tensor([0.9, 0.5, 0.1])
    together = model(noise(3, 4, 10), sigma, **cond)
    for b in range(3):
        own = {name: rows[b : b + 1] for name, rows in cond.items()}
        alone = model(noise(3, 4, 10)[b : b + 1], float(sigma[b]), **own)
        assert torch.allclose(together[b : b + 1], alone, atol=1e-5)


@pytest.mark.parametrize("name", ["sigma", "guidance"])
def test_sigma_and_guidance_may_be_a_number_a_scalar_or_one_per_sample(name):
    model, inputs = tiny_model("flux-dev"), {"sigma": 0.5, **conditioning("flux-dev", 2)}
    expected = model(noise(2, 4, 4), **(inputs | {name: 0.25}))
    for value in (torch.tensor(0.25), torch.tensor([0.25]), torch.tensor([0.25, 0.25])):
        assert model(noise(2, 4, 4), **(inputs | {name: value})).equal(expected)
    assert not torch.allclose(model(noise(2, 4, 4), **(inputs | {name: 0.75})), expected, atol=1e-2)


@given(st.permutations(range(7)))
def test_text_tokens_have_no_order(order):
    """All of them stand at the same place: T5 has put their order into them."""
    model, cond = tiny_model("flux-schnell"), conditioning("flux-schnell", 2, tokens=7)
    moved = cond | {"context": cond["context"][:, order]}
    first, second = (model(noise(2, 4, 6), 0.6, **each) for each in (cond, moved))
    assert torch.allclose(first, second, atol=1e-5)


@given(st.integers(0, 9), st.integers(0, 9))
def test_rotations_of_an_image_token_and_of_text(row, column):
    """16 channels that nothing turns, 56 by row, 56 by column, the first pair of each fastest."""
    with torch.device("meta"):
        model = Flux(FluxConfig(num_layers=1, num_single_layers=1))
    rope = model._rotations(torch.tensor([[row * 10 + column]]), 1, 10)
    assert [part.shape for part in rope] == [(1, 2, 1, 128)] * 2
    image, text = rotate(torch.tensor([1.0, 0.0]).repeat(64).expand(1, 2, 1, 128), rope)[0, :, 0]
    assert text.equal(torch.tensor([1.0, 0.0]).repeat(64)) and image[:16].equal(text[:16])
    for start, place in ((16, row), (72, column)):
        for j in (0, 1, 27):
            angle = torch.tensor(place * 10000 ** (-2 * j / 56))
            pair = image[start + 2 * j : start + 2 * j + 2]
            assert torch.allclose(pair, torch.stack((angle.cos(), angle.sin())), atol=1e-5)


def test_keys_of_a_place_depend_on_nothing_but_the_distance():
    model = tiny_model("flux-schnell")
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))

    def product(one: int, other: int) -> torch.Tensor:  # token numbers in a grid 8 wide
        turned = (
            rotate(x, model._rotations(torch.tensor([[at]]), 0, 8))
            for x, at in ((q, one), (k, other))
        )
        return torch.mul(*turned).sum()

    assert torch.allclose(product(3, 12), product(20, 29), atol=1e-5)
    assert not torch.allclose(product(3, 12), product(20, 28), atol=1e-3)


def test_half_precision_keeps_noise_levels_guidance_and_angles_in_float32():
    model = Flux(tiny_model("flux-dev").config)
    model.load_state_dict(tiny_model("flux-dev").state_dict())
    model, cond = model.to(torch.bfloat16), conditioning("flux-dev", 1)
    far = torch.tensor([[257, 259]])  # columns that bfloat16 rounds to 256 and 260
    expected = tiny_model("flux-dev")._rotations(far, 2, 300)
    for half, full in zip(model._rotations(far, 2, 300), expected, strict=True):
        assert half.dtype == torch.float32 and half.equal(full)
    for name, values in {"sigma": (0.7310, 0.7315), "guidance": (3.500, 3.503)}.items():
        assert len({torch.tensor(v, dtype=torch.bfloat16).item() for v in values}) == 1
        one, other = (model(noise(1, 4, 4), **({"sigma": 0.5, **cond} | {name: v})) for v in values)
        assert not one.equal(other), name


def test_clip_bounds_float16_at_both_ends_and_nothing_else():
    ends = torch.tensor([-torch.inf, -1.0, 2.0, torch.inf])
    assert clip(ends.half()).tolist() == [-65504, -1, 2, 65504]
    assert clip(ends).equal(ends) and clip(ends.bfloat16()).equal(ends.bfloat16())


def test_float16_clips_the_residual_stream_instead_of_becoming_infinite():
    config = tiny_model("flux-schnell").config
    model = randomised(Flux(config)).to(torch.float16)
    with torch.no_grad():
        model.double_blocks[0].context.mlp.fc2.bias.fill_(6e4)
        model.double_blocks[0].context.modulation.bias[-config.width :] = 2  # its gate
        model.single_blocks[0].out.bias.fill_(6e4)
        model.single_blocks[0].modulation.bias[-config.width :] = 2
    velocity = model(noise(1, 4, 4), 0.5, **conditioning("flux-schnell", 1))
    assert torch.isfinite(velocity).all()


def test_official_sizes():
    """The numbers of parameters of the official files, and of pixels where nothing is said."""
    assert FluxConfig.sample_size * 8 == 1024
    for guidance, count in ((True, 11_901_408_320), (False, 11_891_178_560)):
        with torch.device("meta"):
            model = Flux(FluxConfig(guidance_embeds=guidance))
        assert sum(p.numel() for p in model.parameters()) == count
        assert model.config.latent_channels == 16


def test_gradients_reach_every_weight():
    model = randomised(Flux(tiny_model("flux-dev").config)).requires_grad_(True)
    model(noise(1, 4, 4), 0.5, **conditioning("flux-dev", 1)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"latents": torch.zeros(1, 3, 4, 4)}, "must be (batch, 4, height, width)"),
        ({"latents": torch.zeros(1, 4, 5, 4)}, "latents are 5x4, both must be multiples of 2"),
        ({"sigma": torch.zeros(2)}, "sigma has shape (2,), must be a number or (1,)"),
        ({"context": torch.zeros(1, 5, 21)}, "(1, 5, 21), must be (1, tokens, 20)"),
        ({"pooled": torch.zeros(1, 13)}, "pooled has shape (1, 13), must be (1, 12)"),
        ({"guidance": torch.ones(2)}, "guidance has shape (2,), must be a number or (1,)"),
        ({"guidance": None}, "guidance is None, must be a number"),
        ({"active": torch.zeros(1, 1, dtype=torch.int64)}, "active tokens need a cache"),
    ],
)
def test_bad_inputs_are_named(change, sentence):
    inputs = {"latents": noise(1, 4, 4), "sigma": 0.5, **conditioning("flux-dev", 1)}
    with pytest.raises(ValueError) as error:
        tiny_model("flux-dev")(**(inputs | change))
    assert sentence in str(error.value)


def test_schnell_has_no_guidance():
    cond = conditioning("flux-schnell", 1)
    with pytest.raises(ValueError, match=r"guidance is 3.5, must be None"):
        tiny_model("flux-schnell")(noise(1, 4, 4), 0.5, **cond, guidance=3.5)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_single_layers": 0}, "num_single_layers is 0, must be at least 1"),
        ({"in_channels": 66}, "in_channels is 66, must be a multiple of 4"),
        ({"axes_dims_rope": (64, 64)}, "axes_dims_rope is (64, 64), must be three even numbers"),
        ({"axes_dims_rope": (16, 55, 57)}, "must be three even numbers"),
        ({"axes_dims_rope": (0, 64, 64)}, "axes_dims_rope is (0, 64, 64), must be three even"),
        ({"axes_dims_rope": (32, 32, 32, 32)}, "must be three even numbers"),
        ({"attention_head_dim": 64}, "add up to attention_head_dim = 64"),
        ({"attention_head_dim": 130}, "add up to attention_head_dim = 130"),
    ],
)
def test_bad_configs_are_named(change, sentence):
    with pytest.raises(ValueError) as error:
        FluxConfig(**change)
    assert sentence in str(error.value)


def test_the_narrowest_axes():
    assert FluxConfig(axes_dims_rope=(2, 62, 64)).axes_dims_rope[0] == 2
