"""The T5 encoder against transformers' numbers, its distance buckets, masks and float16."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import randomised, rounding
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from minidit import load_component
from minidit.t5 import T5Config, T5Encoder, distance_buckets

GOLDENS = Path(__file__).parent / "goldens"
CONFIG = T5Config(
    vocab_size=50, d_model=24, d_kv=6, d_ff=40, num_layers=3, num_heads=3,
    relative_attention_num_buckets=16, relative_attention_max_distance=40,
)  # fmt: skip
IDS = torch.tensor([[7, 3, 9, 41, 1, 0, 0, 0], [2, 2, 30, 17, 8, 4, 11, 1]])


@pytest.fixture(scope="module")
def encoder() -> T5Encoder:
    return randomised(T5Encoder(CONFIG))


def test_matches_transformers() -> None:
    folder = GOLDENS / "t5"
    model = load_component(folder, "text_encoder_3")
    inputs, expected = (load_file(folder / f"{n}.safetensors") for n in ("inputs", "expected"))
    limits = json.loads((folder / "info.json").read_text())["outputs"]
    assert len(expected) == 3
    for name, want in expected.items():
        run = name.split("/")[0]
        got = model(inputs[f"{run}/input_ids"], inputs.get(f"{run}/attention_mask"))
        assert (got - want).abs().max() <= rounding(limits[name]), run


def test_buckets_of_the_official_sizes() -> None:
    distances = torch.tensor([0, -1, -7, -8, -11, -12, -16, -127, -500, 1, 8, 500])
    want = [0, 1, 7, 8, 8, 9, 10, 15, 15, 17, 24, 31]
    assert distance_buckets(distances, 32, 128).tolist() == want


@given(st.integers(-600, 600), st.integers(4, 64), st.integers(2, 300))
def test_buckets_follow_the_formula(distance: int, buckets: int, max_distance: int) -> None:
    half, exact = buckets // 2, buckets // 4
    if max_distance <= exact:
        max_distance += exact
    want, far = (half if distance > 0 else 0), abs(distance)
    if far < exact:
        want += far
    else:
        scaled = math.log(far / exact) / math.log(max_distance / exact) * (half - exact)
        if abs(scaled - round(scaled)) < 1e-4:
            return  # on the edge of a bucket, where float32 decides
        want += min(exact + int(scaled), half - 1)
    assert distance_buckets(torch.tensor([distance]), buckets, max_distance).item() == want


def test_positions_count_by_distance_only(encoder: T5Encoder) -> None:
    bias = encoder._position_bias(30)
    assert bias.shape == (1, 3, 30, 30)
    assert torch.equal(bias[..., 1:, 1:], bias[..., :-1, :-1])
    assert not torch.equal(bias, bias.transpose(2, 3)), "before and after must differ"


def test_attention_is_not_scaled(encoder: T5Encoder) -> None:
    attn, x = encoder.layers[0].attn, torch.randn(1, 5, 24)
    bias = torch.zeros(1, 3, 5, 5)
    q, k, v = (p(x).view(5, 3, 6).transpose(0, 1) for p in (attn.q, attn.k, attn.v))
    want = ((q @ k.transpose(1, 2)).softmax(dim=2) @ v).transpose(0, 1).reshape(1, 5, 18)
    assert torch.allclose(attn(x, bias), attn.out(want), atol=1e-5)


def test_padding_counts_unless_masked(encoder: T5Encoder) -> None:
    other, mask = IDS.clone(), (IDS != 0).long()
    other[0, 5:] = 13
    assert not torch.allclose(encoder(IDS)[0, :5], encoder(other)[0, :5], atol=1e-3)
    masked = encoder(IDS, mask)
    assert torch.allclose(masked[0, :5], encoder(other, mask)[0, :5], atol=1e-5)
    assert torch.allclose(masked[0, :5], encoder(IDS[:1, :5])[0], atol=1e-5)


def test_a_prompt_of_padding_alone_stays_finite(encoder: T5Encoder) -> None:
    assert encoder(IDS, torch.zeros_like(IDS)).isfinite().all()


def test_batch_is_the_same_as_one_by_one(encoder: T5Encoder) -> None:
    together = encoder(IDS)
    for i in range(len(IDS)):
        assert torch.allclose(together[i], encoder(IDS[i : i + 1])[0], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(encoder: T5Encoder, dtype: torch.dtype) -> None:
    other = T5Encoder(CONFIG).eval().to(dtype)
    other.load_state_dict(encoder.state_dict())
    got, want = other(IDS), encoder(IDS)
    assert got.dtype == dtype
    assert (want - got).norm() < 0.05 * want.norm()


def test_float16_survives_states_that_it_cannot_hold(encoder: T5Encoder) -> None:
    """As in T5-XXL: the gated product and the sum of the layers both pass 65504."""
    large = T5Encoder(CONFIG).eval()
    large.load_state_dict(encoder.state_dict())
    for layer in large.layers:
        layer.mlp.gate.weight.data *= 200
        layer.mlp.up.weight.data *= 200
        layer.mlp.down.weight.data *= 20
    largest = []
    large.layers[0].mlp.register_forward_hook(lambda m, i, out: largest.append(out.abs().max()))
    want = large(IDS)
    assert largest[0] > 65504
    got = large.half()(IDS)
    assert got.dtype == torch.float16 and got.isfinite().all()
    assert (want - got).norm() < 0.02 * want.norm()


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.zeros(1, 3), None, "float32"),
        (torch.tensor([[50]]), None, r"must be within 0\.\.49"),
        (IDS, torch.ones(2, 7), r"mask has shape \(2, 7\), must be \(2, "),
        (IDS, [[1]], r"mask is \[\[1\]\], must be a dense tensor"),
    ],
)
def test_bad_inputs_are_named(encoder: T5Encoder, ids, mask, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder(ids, mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feed_forward_proj": "relu"}, "'relu', must be 'gated-gelu'"),
        ({"relative_attention_num_buckets": 2}, "is 2, must be at least 4"),
        ({"relative_attention_max_distance": 4}, "must be at least 4 and less than"),
        ({"d_ff": 0}, "d_ff is 0"),
    ],
)
def test_bad_configs_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_buckets_have_limits() -> None:
    T5Config(relative_attention_num_buckets=4, relative_attention_max_distance=2)
    for buckets, distance in ((3, 2), (4, 1), (32, 8)):
        with pytest.raises(ValueError, match=f"relative_attention_num_buckets is {buckets}, must"):
            T5Config(
                relative_attention_num_buckets=buckets, relative_attention_max_distance=distance
            )
