"""MMDiT against diffusers' output on tiny models of every SD3 kind, and its own rules."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import GOLDENS, conditioning, noise, rounding, tiny_model
from safetensors.torch import load_file

import minidit
from minidit import MMDiT, MMDiTConfig

RUNS = [
    (case, run)
    for case in ("sd3_medium", "sd35_medium", "sd35_large")
    for run in json.loads((GOLDENS / case / "info.json").read_text())["call"]
]


@pytest.mark.parametrize(("case", "run"), RUNS)
def test_golden(case, run):
    info = json.loads((GOLDENS / case / "info.json").read_text())
    model = minidit.load_component(GOLDENS / case, "transformer", dtype=torch.float32)
    inputs = load_file(GOLDENS / case / "inputs.safetensors")
    expected = load_file(GOLDENS / case / "expected.safetensors")[f"{run}/sample"]
    velocity = model(
        inputs[f"{run}/hidden_states"],
        inputs[f"{run}/timestep"] / 1000,
        inputs[f"{run}/encoder_hidden_states"],
        inputs[f"{run}/pooled_projections"],
        skip_layers=tuple(info["call"][run]["skip_layers"] or ()),
    )
    assert (velocity - expected).abs().max() <= rounding(info["outputs"][f"{run}/sample"])


SD3 = ["sd3-medium", "sd3.5-large", "sd3.5-medium"]


@pytest.mark.parametrize("family", SD3)
def test_a_batch_with_its_own_sigmas_equals_its_members_alone(family):
    model, cond, sigma = tiny_model(family), conditioning(family, 3), torch.tensor([0.9, 0.5, 0.1])
    together = model(noise(3, 4, 10), sigma, **cond)
    for b in range(3):
        own = {name: rows[b : b + 1] for name, rows in cond.items()}
        alone = model(noise(3, 4, 10)[b : b + 1], float(sigma[b]), **own)
        assert torch.allclose(together[b : b + 1], alone, atol=1e-5)


def test_sigma_may_be_a_number_a_scalar_or_one_per_sample():
    model, cond = tiny_model("sd3-medium"), conditioning("sd3-medium", 2)
    expected = model(noise(2, 4, 4), 0.25, **cond)
    for sigma in (torch.tensor(0.25), torch.tensor([0.25]), torch.tensor([0.25, 0.25])):
        assert model(noise(2, 4, 4), sigma, **cond).equal(expected)


def test_position_table_is_cropped_in_its_centre():
    model = tiny_model("sd3-medium")
    S, C = model.config.pos_embed_max_size, model.config.width
    rows, columns = torch.meshgrid(torch.arange(S), torch.arange(S), indexing="ij")
    model = MMDiT(model.config)
    model.pos_embed = (100.0 * rows + columns).reshape(1, S * S, 1).expand(1, S * S, C)
    table = model._positions(torch.arange(18)[None], 3, 6)[0, :, 0].view(3, 6)
    assert table[0, 0] == 100 * ((S - 3) // 2) + (S - 6) // 2
    assert table[2, 5] == table[0, 0] + 205


def test_a_single_token_and_the_whole_table_work():
    model, cond = tiny_model("sd3.5-medium"), conditioning("sd3.5-medium", 1)
    for side in (2, 24):
        velocity = model(noise(1, side, side), 0.5, **cond)
        assert velocity.shape == (1, 4, side, side) and torch.isfinite(velocity).all()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"latents": torch.zeros(1, 3, 4, 4)}, "must be (batch, 4, height, width)"),
        ({"latents": torch.zeros(1, 4, 5, 4)}, "latents are 5x4, both must be multiples of 2"),
        ({"latents": torch.zeros(1, 4, 26, 4)}, "latents are 26x4, but the position table"),
        ({"latents": torch.zeros(1, 4, 4, 26)}, "4x26, but the position table of this model ends"),
        ({"skip_layers": "1"}, "skip_layers is '1', must be layer numbers"),
        ({"skip_layers": (0, 0.5)}, "skip_layers is (0, 0.5), must be layer numbers"),
        ({"sigma": torch.zeros(2)}, "sigma has shape (2,), must be a number or (1,)"),
        ({"context": torch.zeros(1, 5, 21)}, "(1, 5, 21), must be (1, tokens, 20)"),
        ({"context": torch.zeros(2, 5, 20)}, "context has shape (2, 5, 20)"),
        ({"pooled": torch.zeros(1, 13)}, "pooled has shape (1, 13), must be (1, 12)"),
    ],
)
def test_bad_inputs_are_named(change, sentence):
    inputs = {"latents": noise(1, 4, 4), "sigma": 0.5, **conditioning("sd3-medium", 1)}
    with pytest.raises(ValueError) as error:
        tiny_model("sd3-medium")(**(inputs | change))
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_layers": 0}, "num_layers is 0, must be at least 1"),
        ({"caption_projection_dim": 100}, "num_attention_heads * attention_head_dim = 1536"),
        ({"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm', must be null or 'rms_norm'"),
        ({"dual_attention_layers": (0, 24)}, "names layer 24, must be within 0..23"),
        ({"dual_attention_layers": (-1,)}, "names layer -1, must be within 0..23"),
    ],
)
def test_bad_configs_are_named(change, sentence):
    with pytest.raises(ValueError) as error:
        MMDiTConfig(**change)
    assert sentence in str(error.value)
