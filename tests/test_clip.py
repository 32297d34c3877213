"""The CLIP text encoder against transformers' numbers, and what its masks and pooling promise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import randomised, rounding
from safetensors.torch import load_file

from minidit import load_component
from minidit.clip import CLIPConfig, CLIPTextEncoder, quick_gelu

GOLDENS = Path(__file__).parent / "goldens"
CONFIG = CLIPConfig(
    vocab_size=60, hidden_size=24, intermediate_size=40, projection_dim=10, num_hidden_layers=3,
    num_attention_heads=3, max_position_embeddings=16, eos_token_id=2,
)  # fmt: skip
IDS = torch.tensor([[50, 7, 2, 9, 59, 59, 59, 59], [50, 59, 8, 1, 0, 0, 59, 3]])


@pytest.fixture(scope="module")
def encoder() -> CLIPTextEncoder:
    return randomised(CLIPTextEncoder(CONFIG))


@pytest.mark.parametrize(
    ("case", "component"),
    [
        ("clip_l", "text_encoder"),
        ("clip_g", "text_encoder_2"),
        ("clip_eos_explicit", "text_encoder"),
    ],
)
def test_matches_transformers(case: str, component: str) -> None:
    folder = GOLDENS / case
    model = load_component(folder, component)
    inputs, expected = (load_file(folder / f"{n}.safetensors") for n in ("inputs", "expected"))
    limits = json.loads((folder / "info.json").read_text())["outputs"]
    for name, ids in inputs.items():
        run = name.split("/")[0]
        for key, got in zip(("penultimate", "text_embeds"), model(ids), strict=True):
            error = (got - expected[f"{run}/{key}"]).abs().max()
            assert error <= rounding(limits[f"{run}/{key}"]), (run, key)


def test_tokens_do_not_see_what_follows(encoder: CLIPTextEncoder) -> None:
    changed = IDS.clone()
    changed[:, 5] = 11
    before, after = encoder(IDS)[0], encoder(changed)[0]
    assert torch.allclose(before[:, :5], after[:, :5], atol=1e-6)
    assert (before[:, 5:] - after[:, 5:]).abs().amax(dim=(0, 2)).min() > 1e-3


def test_pooled_is_read_at_the_largest_id_under_the_legacy_config(
    encoder: CLIPTextEncoder,
) -> None:
    after_end = IDS.clone()
    after_end[0, 5:], after_end[1, 2:] = 13, 13  # behind the first 59: columns 4 and 1
    at_end = IDS.clone()
    at_end[0, 3], at_end[1, 0] = 13, 13  # in front of it
    assert torch.allclose(encoder(IDS)[1], encoder(after_end)[1], atol=1e-6)
    assert (encoder(IDS)[1] - encoder(at_end)[1]).abs().amin(dim=1).min() > 0


def test_pooled_is_read_at_the_first_end_token_otherwise(encoder: CLIPTextEncoder) -> None:
    explicit = CLIPTextEncoder(replace(CONFIG, eos_token_id=9)).eval()
    explicit.load_state_dict(encoder.state_dict())
    ids = torch.tensor([[50, 7, 9, 59, 9]])
    pooled = explicit(ids)[1]
    assert torch.allclose(pooled, explicit(ids[:, :3])[1], atol=1e-6)
    assert not torch.allclose(pooled, encoder(ids)[1], atol=1e-3), "59 is larger, but not the end"


def test_batch_is_the_same_as_one_by_one(encoder: CLIPTextEncoder) -> None:
    together = encoder(IDS)
    for i in range(len(IDS)):
        for a, b in zip(together, encoder(IDS[i : i + 1]), strict=True):
            assert torch.allclose(a[i], b[0], atol=1e-5)


def test_penultimate_of_one_layer_is_the_embedding() -> None:
    model = randomised(CLIPTextEncoder(replace(CONFIG, num_hidden_layers=1)))
    want = model.token_embed.weight[IDS] + model.pos_embed.weight[:8]
    assert torch.equal(model(IDS)[0], want)


def test_quick_gelu_is_not_gelu() -> None:
    x = torch.tensor([-2.0, 0.0, 1.0])
    assert torch.allclose(quick_gelu(x), torch.tensor([-0.0643, 0.0, 0.8458]), atol=1e-4)
    assert CLIPTextEncoder(replace(CONFIG, hidden_act="gelu")).layers[0].mlp.activation(
        x
    ).tolist() == pytest.approx([-0.0455, 0.0, 0.8413], abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(encoder: CLIPTextEncoder, dtype: torch.dtype) -> None:
    other = CLIPTextEncoder(CONFIG).eval().to(dtype)
    other.load_state_dict(encoder.state_dict())
    for want, got in zip(encoder(IDS), other(IDS), strict=True):
        assert got.dtype == dtype
        assert (want - got).norm() < 0.02 * want.norm()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 2]], r"ids is \[\[1, 2\]\], must be a dense tensor"),
        (torch.rand(1, 4), "float32"),
        (torch.zeros(4, dtype=torch.int64), r"\(4,\)"),
        (torch.zeros(2, 0, dtype=torch.int64), r"\(2, 0\)"),
        (torch.zeros(1, 17, dtype=torch.int64), "17 tokens, must be at most 16"),
        (torch.tensor([[0, 60]]), r"within 0\.\.60, must be within 0\.\.59"),
        (torch.tensor([[-1, 5]]), r"within -1\.\.5"),
    ],
)
def test_bad_ids_are_named(encoder: CLIPTextEncoder, ids: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder(ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 5}, "hidden_size is 24"),
        ({"hidden_act": "swish"}, "'swish', must be one of quick_gelu, gelu"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ],
)
def test_bad_configs_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)
