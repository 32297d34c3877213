"""The shared pieces of the networks: formulas to the last digit, and half precision."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES, conditioning, noise, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from minidit import parts

HALVES = (torch.float16, torch.bfloat16)


def half_of(family: str, dtype: torch.dtype) -> torch.nn.Module:
    """The tiny model of a family in another precision."""
    model = type(tiny_model(family))(tiny_model(family).config)
    model.load_state_dict(tiny_model(family).state_dict())
    return model.to(dtype).requires_grad_(False)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1e-4, 1e-3, 1.0, 3e4])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_rms_norm_of_small_and_of_huge_values(size, dtype):
    """Squares of 3e4 are beyond float16, and those of 1e-4 are nothing beside eps."""
    norm = parts.RMSNorm(64, eps=1e-5)
    norm.weight.data = random(64, seed=1)
    norm.to(dtype)
    x, modulation = (size * random(2, 3, 64).clamp(-2, 2)).to(dtype), random(2, 1, 64, seed=2)
    out = norm(x, modulation.to(dtype))
    wide = x.double()
    wanted = wide / (wide.square().mean(dim=2, keepdim=True) + 1e-5).sqrt()
    wanted = wanted * norm.weight.double() * modulation.to(dtype).double()
    assert out.dtype == dtype
    assert torch.allclose(out.double(), wanted, rtol={4: 1e-5}.get(x.itemsize, 0.02), atol=1e-6)


@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_norms_of_queries_and_keys_have_their_own_weights_and_eps(size):
    layer = parts.Projections(8, 4)
    for p in layer.parameters():
        p.data = random(*p.shape, seed=p.numel())
    layer.k_norm.weight.data += 1
    x = size * random(1, 3, 8)
    layer.qkv.bias.data.zero_()
    plain = layer.qkv(x).view(1, 3, 3, 2, 4).unbind(2)  # (1, tokens, heads, 4) each
    for got, raw, norm in zip(layer(x)[:2], plain, (layer.q_norm, layer.k_norm), strict=False):
        wanted = raw / (raw.square().mean(dim=3, keepdim=True) + 1e-6).sqrt() * norm.weight
        assert torch.allclose(got, wanted, rtol=1e-4)
    assert layer(x)[2].equal(plain[2])


def test_layer_norm_of_small_values_and_modulation():
    x, shift, scale = 1e-3 * random(2, 3, 16), random(2, 1, 16, seed=1), random(2, 1, 16, seed=2)
    centred = x - x.mean(dim=2, keepdim=True)
    wanted = centred / (centred.square().mean(dim=2, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(parts.layer_norm(x), wanted, rtol=1e-4, atol=1e-5)
    assert torch.allclose(parts.modulate(x, shift, scale), x * (1 + scale) + shift)


@given(st.floats(0, 1000), st.sampled_from([8, 256]))
def test_time_features_are_cosines_then_sines(t, width):
    half = width // 2
    angles = [t * 10000 ** (-i / half) for i in range(half)]
    wanted = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
    got = parts.time_features(torch.tensor([t]), width)[0]
    assert torch.allclose(got, torch.tensor(wanted), atol=2e-4)
    assert parts.time_features(torch.tensor([t]).half(), width).dtype == torch.float32


@pytest.mark.parametrize("dtype", HALVES)
def test_rotary_positions_turn_pairs_of_channels_in_float32(dtype):
    angle, x = 100 * random(1, 5, 1, 4), random(2, 5, 3, 8, seed=1)
    pairs = torch.view_as_complex(x.unflatten(3, (4, 2)))  # (2, 5, 3, 4)
    wanted = torch.view_as_real(pairs * torch.polar(torch.ones(()), angle)).flatten(3)
    rope = parts.turns(angle)
    assert torch.allclose(parts.rotate(x, rope), wanted, atol=1e-5)
    low = parts.rotate(x.to(dtype), rope)
    assert low.equal(parts.rotate(x.to(dtype).float(), rope).to(dtype))


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [None, 0.9])
def test_attention_is_softmax_over_all_keys(heads, masked, scale):
    """Query head i reads key-value head i // (H / G)."""
    q, k, v = random(2, 3, 4, 8), random(2, 5, heads, 8, seed=1), random(2, 5, heads, 8, seed=2)
    mask = torch.rand(2, 1, 1, 5, generator=torch.Generator().manual_seed(0)) < 0.7
    out = parts.attention(q, k, v, mask if masked else None, scale).view(2, 3, 4, 8)
    for b in range(2):
        for i in range(4):
            j = i * heads // 4
            scores = q[b, :, i] @ k[b, :, j].T * (8**-0.5 if scale is None else scale)
            if masked:
                scores = scores.masked_fill(~mask[b, 0], -torch.inf)
            assert torch.allclose(out[b, :, i], scores.softmax(dim=1) @ v[b, :, j], atol=1e-5)


def test_mlp_uses_the_activation_that_it_is_told():
    x = 2 * random(4, 8)
    for name, function in (("silu", F.silu), ("gelu", lambda y: F.gelu(y, approximate="tanh"))):
        mlp = parts.MLP(8, 16, 8, activation=name)
        assert mlp(x).equal(mlp.fc2(function(mlp.fc1(x))))


def inputs_of(module: torch.nn.Module, run) -> list[torch.Tensor]:
    """What a module is given while something runs."""
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        run()
    finally:
        handle.remove()
    return seen


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", FAMILIES)
def test_noise_levels_stay_float32_in_networks_of_half_precision(kind, dtype):
    """0.7123 in bfloat16 is 0.711: 1.2 of 1000 time steps, and features of another time."""
    low, cond, levels = half_of(kind, dtype), conditioning(kind, 2), torch.tensor([0.7123, 0.0301])
    features = [
        inputs_of(model.time_embed, lambda m=model: m(noise(2, 4, 6), levels, **cond))[0]
        for model in (low, tiny_model(kind))
    ]
    assert features[0].dtype == dtype and features[1].dtype == torch.float32
    assert features[0].equal(features[1].to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_the_mean_of_many_large_text_tokens_is_finite_in_half_precision(dtype):
    """256 tokens near 600: their sum is beyond float16."""
    model = half_of("lumina", dtype)
    context = 600 + random(1, 256, 20)
    mask = torch.arange(256)[None] < 250
    (seen,) = inputs_of(
        model.caption_embed, lambda: model(noise(1, 4, 4), 0.5, context, mask)
    )  # fmt: skip
    assert seen.dtype == dtype
    assert torch.allclose(seen.float(), context[:, :250].to(dtype).float().mean(dim=1), rtol=0.005)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"latents": torch.zeros(1, 4, 4, 5)}, "latents are 4x5, both must be multiples of 2"),
        ({"latents": torch.zeros(1, 4, 5, 4)}, "latents are 5x4, both must be multiples of 2"),
        ({"latents": torch.zeros(1, 4, 0, 4)}, "latents are 0x4, both must be multiples of 2"),
        ({"latents": torch.zeros(0, 4, 4, 4)}, "latents are 4x4, both must be multiples of 2"),
        ({"latents": torch.zeros(1, 4, 4, 4).int()}, "latents is torch.int32, must be floating"),
        ({"latents": torch.zeros(1, 4, 4, 4, device="meta")}, "latents is on meta, must be on cpu"),
        ({"cache": {}}, "cache is {}, must be a ras.KVCache or None"),
        ({"context": torch.zeros(1, 5, 20, device="meta")}, "context is on meta, must be on cpu"),
        ({"context": torch.zeros(1, 5, 20).long()}, "context is torch.int64, must be floating"),
        ({"sigma": torch.tensor(0.5j)}, "sigma is tensor(0.+0.5"),
        ({"sigma": float("nan")}, "sigma is nan, must be a finite number"),
        ({"sigma": torch.zeros(1, 1, 2)}, "sigma has shape (1, 1, 2), must be a number or (1,)"),
        ({"sigma": torch.zeros(1, device="meta")}, "sigma is tensor(..., device='meta'"),
    ],
)
@pytest.mark.parametrize("kind", FAMILIES)
def test_what_does_not_fit_is_named_by_every_network(kind, change, sentence):
    inputs = {"latents": noise(1, 4, 4), "sigma": 0.5, **conditioning(kind, 1)}
    with pytest.raises(ValueError) as error:
        tiny_model(kind)(**inputs | change)
    assert sentence in str(error.value)


@pytest.mark.parametrize("kind", ["mmdit", "flux"])
def test_the_pooled_prompt_lies_where_the_latents_do(kind):
    cond = conditioning(kind, 1)
    with pytest.raises(ValueError, match="pooled is on meta, must be on cpu"):
        tiny_model(kind)(noise(1, 4, 4), 0.5, **cond | {"pooled": cond["pooled"].to("meta")})


def test_a_noise_level_is_one_number_or_one_for_each_sample():
    latents = noise(2, 4, 4)
    for sigma in (0.5, torch.tensor(0.5), torch.tensor([[0.5]]), torch.tensor([0.5, 0.5]).double()):
        level = parts.batch_sigma(sigma, latents)
        assert level.equal(torch.tensor([0.5, 0.5])) and level.dtype == torch.float32
    for shape in ((3,), (2, 1), (1, 2), (0,)):
        with pytest.raises(ValueError, match=r"sigma has shape .*, must be a number or \(2,\)"):
            parts.batch_sigma(torch.zeros(shape), latents)


def test_ids_are_whole_numbers_of_the_table():
    table = torch.nn.Embedding(9, 2)
    for dtype in (torch.int32, torch.int64):
        parts.check_ids(torch.tensor([[0, 8]], dtype=dtype), table, 2, torch.ones(1, 2))
    for ids, mask, sentence in (
        ([[-1, 8]], None, "ids are within -1..8, must be within 0..8"),
        ([[0, 9]], None, "ids are within 0..9, must be within 0..8"),
        ([[0, 1, 2]], None, "ids have 3 tokens, must be at most 2"),
        ([[]], None, "ids are torch.float32 (1, 0), must be int64 and not empty"),
        ([[0.0, 1.0]], None, "ids are torch.float32 (1, 2), must be int64"),
        ([0, 1], None, "ids has shape (2,), must be (batch, tokens)"),
        ([[0, 1]], torch.ones(2, 2), "mask has shape (2, 2), must be (1, 2)"),
    ):
        with pytest.raises(ValueError) as error:
            parts.check_ids(torch.tensor(ids), table, 2, mask)
        assert sentence in str(error.value)
    with pytest.raises(ValueError, match="not empty"):
        parts.check_ids(torch.zeros(1, 0, dtype=torch.int64), table)


def test_the_watershed_itself_belongs_to_ntk():
    model, tokens = tiny_model("lumina"), torch.arange(24)[None]
    at = [model._rotations(tokens, 6, 4, torch.tensor([0.25]), w)[0] for w in (0.25, 0.0, 0.5)]
    assert at[0].equal(at[1]) and not at[0].equal(at[2])
