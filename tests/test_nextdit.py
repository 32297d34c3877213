"""Next-DiT against diffusers' output on a tiny model, and its own rules."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import GOLDENS, conditioning, noise, randomised, rounding, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import minidit
from minidit import NextDiT, NextDiTConfig

CASE = GOLDENS / "lumina_next"
INFO = json.loads((CASE / "info.json").read_text())
RUNS = INFO["call"]


@pytest.mark.parametrize("run", RUNS)
def test_golden(run):
    model = minidit.load_component(CASE, "transformer", dtype=torch.float32)
    inputs = load_file(CASE / "inputs.safetensors")
    expected = load_file(CASE / "expected.safetensors")[f"{run}/sample"]
    velocity = model(
        inputs[f"{run}/hidden_states"],
        1 - inputs[f"{run}/timestep"],
        inputs[f"{run}/encoder_hidden_states"],
        inputs[f"{run}/encoder_mask"],
        scaling_watershed=RUNS[run]["scaling_watershed"],
        proportional_attn="base_sequence_length" in RUNS[run]["cross_attention_kwargs"],
    )
    wanted = -expected[:, :4]  # the other half is the variance
    assert (velocity - wanted).abs().max() <= rounding(INFO["outputs"][f"{run}/sample"])


@pytest.mark.parametrize("run", RUNS)
def test_golden_rotations(run):
    model = NextDiT(NextDiTConfig(sample_size=8, hidden_size=48, num_attention_heads=4,
                                  num_kv_heads=2, num_layers=1))  # fmt: skip
    expected = load_file(CASE / "expected.safetensors")
    h, w, _ = expected[f"{run}/rotary_cos"].shape
    time = torch.tensor([INFO["runs"][run]["t"]])
    watershed = RUNS[run]["scaling_watershed"]
    tokens = torch.arange(h * w)[None]
    cos, sin = (x.view(h, w, -1) for x in model._rotations(tokens, h, w, time, watershed))
    for table, name in ((cos[..., ::2], "rotary_cos"), (sin[..., 1::2], "rotary_sin")):
        atol = rounding(INFO["outputs"][f"{run}/{name}"])
        assert (table - expected[f"{run}/{name}"]).abs().max() <= atol


@given(st.lists(st.floats(0, 1), min_size=1, max_size=3), st.integers(1, 5), st.integers(1, 5))
def test_a_batch_with_its_own_sigmas_equals_its_members_alone(sigmas, h, w):
    """Also where the watershed lies between the samples of one batch."""
    B, model, cond = len(sigmas), tiny_model("lumina"), conditioning("lumina", len(sigmas))
    latents = noise(B, 2 * h, 2 * w)
    together = model(latents, torch.tensor(sigmas), **cond, scaling_watershed=0.4)
    for b in range(B):
        own = {name: rows[b : b + 1] for name, rows in cond.items()}
        alone = model(latents[b : b + 1], sigmas[b], **own, scaling_watershed=0.4)
        assert torch.allclose(together[b : b + 1], alone, atol=1e-5)


def test_sigma_may_be_a_number_a_scalar_or_one_per_sample():
    model, cond = tiny_model("lumina"), conditioning("lumina", 2)
    expected = model(noise(2, 4, 4), 0.25, **cond)
    for sigma in (torch.tensor(0.25), torch.tensor([0.25]), torch.tensor([0.25, 0.25])):
        assert model(noise(2, 4, 4), sigma, **cond).equal(expected)


@given(st.permutations(range(7)), st.sampled_from([torch.bool, torch.int64, torch.uint8]))
def test_text_may_stand_anywhere_between_padding(order, dtype):
    """Left or right padding, and any other order: nothing in the network numbers text tokens."""
    model, cond = tiny_model("lumina"), conditioning("lumina", 3, tokens=7)
    moved = {name: rows[:, order] for name, rows in cond.items()}
    moved["context_mask"] = moved["context_mask"].to(dtype)
    first, second = (model(noise(3, 4, 6), 0.6, **each) for each in (cond, moved))
    assert torch.allclose(first, second, atol=1e-5)


@pytest.mark.parametrize("junk", [1e4, float("nan"), float("inf")])
def test_padding_has_no_influence(junk):
    model, cond = tiny_model("lumina"), conditioning("lumina", 3)
    padding = ~cond["context_mask"][:, :, None]
    assert padding.any()
    dirty = cond | {"context": cond["context"].masked_fill(padding, junk)}
    longer = {name: torch.cat((rows, torch.zeros_like(rows)), dim=1) for name, rows in cond.items()}
    expected = model(noise(3, 4, 6), 0.6, **cond)
    assert model(noise(3, 4, 6), 0.6, **dirty).equal(expected)
    assert torch.allclose(model(noise(3, 4, 6), 0.6, **longer), expected, atol=1e-5)
    some_text = cond | {"context": cond["context"] + 1}
    assert not torch.allclose(model(noise(3, 4, 6), 0.6, **some_text), expected, atol=1e-2)


def test_a_prompt_without_text_gives_numbers_that_its_padding_does_not_change():
    model, cond = tiny_model("lumina"), conditioning("lumina", 2)
    cond["context_mask"] = torch.tensor([[True] * 5, [False] * 5])
    velocity = model(noise(2, 4, 6), 0.6, **cond)
    assert torch.isfinite(velocity).all()
    cond["context"][1] = float("nan")
    assert model(noise(2, 4, 6), 0.6, **cond).equal(velocity)


def test_one_query_equals_two_equal_queries():
    model, cond = tiny_model("lumina"), conditioning("lumina", 2)
    double = NextDiT(replace(model.config, two_queries=True)).requires_grad_(False)
    weights = model.state_dict()
    copies = {name.replace("attn.q", "attn.context_q"): value for name, value in weights.items()}
    double.load_state_dict(copies | weights)
    latents = noise(2, 6, 4)
    assert torch.allclose(double(latents, 0.6, **cond), model(latents, 0.6, **cond), atol=1e-6)
    double.blocks[0].attn.context_q.weight *= 2
    double.blocks[0].attn.context_q_norm.bias += 0.5
    assert not torch.allclose(double(latents, 0.6, **cond), model(latents, 0.6, **cond), atol=1e-3)


def test_at_the_trained_size_neither_watershed_nor_proportional_attention_matter():
    model, cond = tiny_model("lumina"), conditioning("lumina", 1)

    def velocity(side, **options):
        return model(noise(1, side, side), 0.6, **cond, **options)

    for options in ({"scaling_watershed": 0.1}, {"proportional_attn": False}):
        assert torch.allclose(velocity(8, **options), velocity(8), atol=1e-5)
        assert not torch.allclose(velocity(12, **options), velocity(12), atol=1e-3)


def test_watershed_compares_with_one_minus_sigma():
    """Linear below it, so with 0.3 at sigma 0.8 (time 0.2); NTK above, at sigma 0.6 (time 0.4)."""
    model, cond, latents = tiny_model("lumina"), conditioning("lumina", 1), noise(1, 12, 4)
    for sigma, same_as in ((0.8, 1.0), (0.6, 0.0)):
        velocity = model(latents, sigma, **cond, scaling_watershed=0.3)
        assert velocity.equal(model(latents, sigma, **cond, scaling_watershed=same_as))
        assert not velocity.equal(model(latents, sigma, **cond, scaling_watershed=1 - same_as))


@pytest.mark.parametrize(("channels", "guided"), [(4, 3), (16, None)])
def test_guidance_leaves_the_fourth_of_four_channels(channels, guided):
    with torch.device("meta"):
        model = NextDiT(NextDiTConfig(num_layers=1, in_channels=channels))
    assert model.guided_channels == guided


def test_attention_scale_of_the_official_size():
    with torch.device("meta"):
        model = NextDiT(NextDiTConfig(num_layers=1))
    assert model._attention_scale(4096) == pytest.approx(72**-0.5)  # 1024 x 1024 pixels
    assert model._attention_scale(8192) == pytest.approx(math.sqrt(13 / 12 / 72))  # twice as many


@pytest.mark.parametrize(
    ("change", "width"),
    [
        ({}, 6144),
        ({"ffn_dim_multiplier": 1.3}, 8192),  # int(1.3 * 6144) = 7987
        ({"hidden_size": 128, "multiple_of": 1, "ffn_dim_multiplier": 0.7}, 238),  # int(0.7 * 341)
        ({"hidden_size": 128, "multiple_of": 32, "ffn_dim_multiplier": 0.5}, 192),  # int(0.5 * 341)
    ],
)
def test_mlp_width(change, width):
    assert NextDiTConfig(**change).mlp_width == width


@pytest.mark.parametrize(
    "change",
    [{"learn_sigma": False}, {"qk_norm": False}, {"num_kv_heads": None}, {"patch_size": 1}],
)
def test_variants_run(change):
    config = replace(tiny_model("lumina").config, **change)
    velocity = randomised(NextDiT(config))(noise(2, 4, 6), 0.5, **conditioning("lumina", 2))
    assert velocity.shape == (2, 4, 4, 6) and torch.isfinite(velocity).all()


def test_gradients_are_those_of_finite_differences():
    """Some steps work in place; autograd must still see what they overwrite."""
    model = randomised(NextDiT(tiny_model("lumina").config)).double().requires_grad_(True)
    cond, latents = conditioning("lumina", 2), noise(2, 4, 6).double()

    def loss():
        return model(latents, torch.tensor([0.3, 0.8]), **cond).square().sum()

    loss().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == ["pad_token"]
    generator = torch.Generator().manual_seed(0)
    step, values = 1e-5, []
    with torch.no_grad():
        moves = {p: torch.randn(p.shape, generator=generator) for p in model.parameters()}
        slope = sum((p.grad * move).sum() for p, move in moves.items() if p.grad is not None)
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
        ({"sigma": torch.zeros(2)}, "sigma has shape (2,), must be a number or (1,)"),
        (
            {"context": torch.zeros(1, 5, 21)},
            "context has shape (1, 5, 21), must be (1, tokens, 20)",
        ),
        ({"context": torch.zeros(2, 5, 20)}, "context has shape (2, 5, 20)"),
        ({"context": torch.zeros(1, 0, 20)}, "context has shape (1, 0, 20)"),
        ({"context_mask": torch.ones(1, 4)}, "context_mask has shape (1, 4), must be (1, 5)"),
        ({"active": torch.zeros(1, 1, dtype=torch.int64)}, "active tokens need a cache"),
    ],
)
def test_bad_inputs_are_named(change, sentence):
    inputs = {"latents": noise(1, 4, 4), "sigma": 0.5, **conditioning("lumina", 1)}
    with pytest.raises(ValueError) as error:
        tiny_model("lumina")(**(inputs | change))
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_layers": 0}, "num_layers is 0, must be at least 1"),
        ({"hidden_size": 64}, "hidden_size is 64, must be a multiple of 4"),
        ({"hidden_size": 2300}, "hidden_size is 2300, must be a multiple of 4"),
        ({"num_kv_heads": 7}, "num_kv_heads is 7, must be a divisor of num_attention_heads = 32"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0, must be above 0"),
        ({"ffn_dim_multiplier": -1.0}, "ffn_dim_multiplier is -1.0, must be above 0"),
        ({"sample_size": 3}, "sample_size is 3, must be at least 4"),
        ({"ffn_dim_multiplier": 0.0}, "ffn_dim_multiplier is 0.0, must be above 0"),
        ({"norm_eps": float("nan")}, "norm_eps is nan, must be a finite number"),
    ],
)
def test_bad_configs_are_named(change, sentence):
    with pytest.raises(ValueError) as error:
        NextDiTConfig(**change)
    assert sentence in str(error.value)
