"""The Gemma encoders against transformers' numbers, its masks, heads and positions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import randomised, rounding
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from minidit import load_component
from minidit.gemma import GemmaConfig, GemmaEncoder, capped_attention, causal_mask
from minidit.parts import attention

GOLDENS = Path(__file__).parent / "goldens"
CONFIG = GemmaConfig(
    vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=32,
)  # fmt: skip
SECOND = {
    "model_type": "gemma2", "query_pre_attn_scalar": 6, "attn_logit_softcapping": 2.0,
    "sliding_window": 3,
}  # fmt: skip
IDS = torch.tensor([[2, 7, 3, 9, 41], [2, 2, 30, 17, 8]])
ONES = torch.ones_like(IDS)


@pytest.fixture(scope="module")
def encoder() -> GemmaEncoder:
    return small_norms(randomised(GemmaEncoder(CONFIG)))


def small_norms(model: GemmaEncoder) -> GemmaEncoder:
    """Norm weights around zero, as they stand for 1 + w."""
    for name, value in model.named_parameters():
        if "norm" in name:
            value.data -= 1
    return model


def test_matches_transformers() -> None:
    folder = GOLDENS / "gemma"
    model = load_component(folder, "text_encoder")
    inputs, expected = (load_file(folder / f"{n}.safetensors") for n in ("inputs", "expected"))
    limits = json.loads((folder / "info.json").read_text())["outputs"]
    assert len(expected) == 2
    for name, want in expected.items():
        run = name.split("/")[0]
        mask = inputs[f"{run}/attention_mask"]
        got = model(inputs[f"{run}/input_ids"], mask)
        if run == "left":  # transformers' states of padding depend on its attention backend there
            got = got * mask[..., None]
        assert (got - want).abs().max() <= rounding(limits[name]), run


@pytest.mark.parametrize("run", ["right", "within_window", "left"])
def test_gemma_2_matches_transformers(run: str) -> None:
    folder = GOLDENS / "gemma2"
    model = load_component(folder, "text_encoder")
    inputs, expected = (load_file(folder / f"{n}.safetensors") for n in ("inputs", "expected"))
    limits = json.loads((folder / "info.json").read_text())["atol"]
    mask = inputs[f"{run}/attention_mask"]
    got = model(inputs[f"{run}/input_ids"], mask)
    assert got.isfinite().all()  # also where nothing is in sight
    name = f"{run}/penultimate"
    assert ((got - expected[name]) * mask[..., None]).abs().max() <= limits[name]


@given(st.integers(0, 6), st.integers(0, 6), st.sampled_from([CONFIG, replace(CONFIG, **SECOND)]))
def test_padding_on_either_side_changes_no_token(left: int, right: int, config) -> None:
    model = small_norms(randomised(GemmaEncoder(config)))
    ids = torch.nn.functional.pad(IDS, (left, right), value=11)
    mask = torch.nn.functional.pad(ONES, (left, right))
    got = model(ids, mask)
    assert got.isfinite().all()
    assert torch.allclose(got[:, left : left + 5], model(IDS, ONES), atol=1e-4)


def test_no_token_at_all_stays_finite(encoder: GemmaEncoder) -> None:
    assert encoder(IDS, torch.zeros_like(IDS)).isfinite().all()


@given(st.lists(st.booleans(), min_size=1, max_size=9))
def test_queries_see_the_text_up_to_them_or_themselves(mask: list[bool]) -> None:
    visible = causal_mask(torch.tensor([mask]))[0, 0]
    for i, row in enumerate(visible.tolist()):
        text = [k for k in range(i + 1) if mask[k]]
        assert [k for k, seen in enumerate(row) if seen] == (text or [i])


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.integers(1, 10))
def test_in_a_window_queries_see_its_text_or_themselves(mask: list[bool], window: int) -> None:
    visible = causal_mask(torch.tensor([mask]), window)[0, 0]
    for i, row in enumerate(visible.tolist()):
        text = [k for k in range(max(0, i - window + 1), i + 1) if mask[k]]
        assert [k for k, seen in enumerate(row) if seen] == (text or [i])


def test_layers_of_gemma_2_alternate_or_are_named() -> None:
    config = replace(CONFIG, **SECOND)
    assert config.sliding == (True, False, True) and CONFIG.sliding == (False,) * 3
    kinds = ("full_attention", "sliding_attention", "full_attention")
    named = replace(config, layer_types=kinds)
    assert named.sliding == (False, True, False)
    one, other = (small_norms(randomised(GemmaEncoder(each))) for each in (config, named))
    assert not torch.allclose(one(IDS), other(IDS), atol=1e-3)
    wide = small_norms(randomised(GemmaEncoder(replace(named, sliding_window=5))))
    full = small_norms(randomised(GemmaEncoder(replace(config, layer_types=kinds[:1] * 3))))
    assert torch.equal(wide(IDS), full(IDS))  # five tokens fit into a window of five


def test_the_cap_bounds_logits_softly(encoder: GemmaEncoder) -> None:
    """A huge one changes nothing, a tiny one makes attention an average of what is seen."""
    second = replace(CONFIG, **(SECOND | {"query_pre_attn_scalar": 8, "sliding_window": 99}))
    q, k, v = torch.randn(3, 2, 5, 4, 8, generator=torch.Generator().manual_seed(0))
    visible = causal_mask(ONES)
    loose, tight = (capped_attention(q, k, v, visible, 8**-0.5, cap) for cap in (1e5, 1e-5))
    assert torch.allclose(loose, attention(q, k, v, visible), atol=1e-5)
    seen = visible.float() / visible.sum(dim=3, keepdim=True)
    assert torch.allclose(tight, (seen @ v.transpose(1, 2)).transpose(1, 2).flatten(2), atol=1e-4)
    states = []
    for cap in (1.0, 1e5):
        model = GemmaEncoder(replace(second, attn_logit_softcapping=cap))
        states.append(small_norms(randomised(model))(IDS))
    assert not torch.allclose(*states, atol=1e-3)


def test_tokens_do_not_see_what_follows(encoder: GemmaEncoder) -> None:
    changed = IDS.clone()
    changed[:, 3] = 11
    before, after = encoder(IDS, ONES), encoder(changed, ONES)
    assert torch.allclose(before[:, :3], after[:, :3], atol=1e-5)
    assert (before[:, 3:] - after[:, 3:]).abs().amax(dim=(0, 2)).min() > 1e-3


def test_no_mask_means_text_throughout(encoder: GemmaEncoder) -> None:
    assert torch.equal(encoder(IDS), encoder(IDS, ONES))
    assert torch.equal(encoder(IDS, ONES.bool()), encoder(IDS, ONES))


def test_the_last_layer_is_not_run(encoder: GemmaEncoder) -> None:
    model = GemmaEncoder(CONFIG).eval()
    model.load_state_dict(encoder.state_dict())
    for part in (model.layers[-1], model.final_norm):
        for value in part.parameters():
            value.data.fill_(float("nan"))
    assert torch.equal(model(IDS), encoder(IDS))


def test_one_layer_gives_the_scaled_embedding() -> None:
    model = GemmaEncoder(replace(CONFIG, num_hidden_layers=1)).eval().bfloat16()
    got = model(IDS)
    want = model.token_embed.weight[IDS] * torch.tensor(24**0.5).bfloat16()
    assert torch.equal(got, want)


def test_shared_heads_are_repeated_heads(encoder: GemmaEncoder) -> None:
    """Each key-value head serves neighbouring query heads: 0, 0, 1, 1."""
    model = GemmaEncoder(replace(CONFIG, num_key_value_heads=4)).eval()
    state = {
        name: value.view(2, 8, -1).repeat_interleave(2, dim=0).flatten(0, 1)
        if name.endswith(("attn.k.weight", "attn.v.weight"))
        else value
        for name, value in encoder.state_dict().items()
    }
    model.load_state_dict(state)
    assert torch.allclose(model(IDS), encoder(IDS), atol=1e-5)


def test_theta_may_stand_in_either_place(encoder: GemmaEncoder) -> None:
    state = encoder.state_dict()
    old, new = (
        GemmaEncoder(replace(CONFIG, **change)).eval()
        for change in (
            {"rope_theta": 2500.0},
            {"rope_parameters": {"rope_theta": 2500.0, "rope_type": "default"}},
        )
    )
    old.load_state_dict(state), new.load_state_dict(state)
    assert torch.equal(old(IDS), new(IDS))
    assert not torch.allclose(old(IDS), encoder(IDS), atol=1e-4)


def test_batch_is_the_same_as_one_by_one(encoder: GemmaEncoder) -> None:
    together = encoder(IDS)
    for i in range(len(IDS)):
        assert torch.allclose(together[i], encoder(IDS[i : i + 1])[0], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, **SECOND)])
def test_other_types(config: GemmaConfig, dtype: torch.dtype) -> None:
    encoder = small_norms(randomised(GemmaEncoder(config)))
    other = GemmaEncoder(config).eval().to(dtype)
    other.load_state_dict(encoder.state_dict())
    got, want = other(IDS, ONES), encoder(IDS, ONES)
    assert got.dtype == dtype
    assert (want - got).norm() < 0.05 * want.norm()


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (IDS.float(), ONES, "float32"),
        (IDS + 20, ONES, r"must be within 0\.\.49"),
        (torch.zeros(1, 33, dtype=torch.int64), None, "33 tokens, must be at most 32"),
        (IDS, ONES[:, 1:], r"mask has shape \(2, 4\), must be \(2, 5\)"),
    ],
)
def test_bad_inputs_are_named(encoder: GemmaEncoder, ids, mask, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder(ids, mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads is 4"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"hidden_act": "silu"}, "hidden_act is 'silu'"),
        ({"hidden_activation": "relu"}, "'relu', must be 'gelu' or"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling is .*, must be null"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
        ({"rope_theta": 0.0}, "rope_theta is 0.0"),
        ({"attention_bias": True}, "attention_bias"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"model_type": "gemma3"}, "model_type is 'gemma3', must be 'gemma' or 'gemma2'"),
        ({"model_type": "gemma2"}, "query_pre_attn_scalar is None, must be above 0"),
        (SECOND | {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping is 0.0"),
        (SECOND | {"layer_types": ("full_attention",)}, "must be 3 times 'sliding_attention'"),
        (SECOND | {"layer_types": ("full",) * 3}, "layer_types is"),
    ],
)
def test_bad_configs_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)
