"""The optimiser, positions and the autoencoder of examples/train.py."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from training_runs import CPU, REAL_VAE, SMALL, TINY_VAE, assert_equal, interrupted

from minidit.vae import AutoencoderKL
from training import loop, models, optim, scenes, vae
from training.scenes import Sprites
from weights.load import load_component

pytestmark = SMALL


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


@pytest.mark.parametrize(
    ("first", "count", "expected"),
    [(0, 1, 1.0), (1000, 100, 1 - (1001 / 1101) ** 8), (10**6, 500, 1 - 1 / math.e)],
)
def test_the_average_follows_by_a_tenth_of_the_steps_or_500(first, count, expected):
    average, network = (torch.nn.Linear(1, 1, bias=False) for _ in range(2))
    torch.nn.init.zeros_(average.requires_grad_(False).weight)
    torch.nn.init.ones_(network.weight)
    for step in range(first, first + count):
        loop.follow(average, network, step)
    assert average.weight.item() == pytest.approx(expected, abs=2e-3)


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
