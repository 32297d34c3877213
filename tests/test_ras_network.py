"""Mask and cache inside the forward pass of every network: gathered rows against a boolean mask."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES, conditioning, noise, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ras import KVCache, RASConfig, Run, Upstream
from ras.tokens import flat_rows, mask_of, patchify

NETWORKS = st.sampled_from(FAMILIES)


class MaskedCache:
    """The same step as the gathered one, over the full sequence: rows outside the mask keep what
    the stored cache holds. Text rows, which follow the image rows, are always fresh."""

    def __init__(self, stored: KVCache, mask: torch.Tensor) -> None:
        self.stored, self.mask = stored, mask

    def part(self, name):
        return MaskedCache(self.stored.part(name), self.mask)

    def write(self, k, v, rows):
        mask = F.pad(self.mask, (0, k.shape[1] - self.mask.shape[1]), value=True)[:, :, None, None]
        return torch.where(mask, k, self.stored.k), torch.where(mask, v, self.stored.v)


def tensors(cache: KVCache) -> list[torch.Tensor]:
    """Keys and values of all layers, one after the other."""
    return [x for layer in cache for x in (layer.k, layer.v)]


def rows(cache: KVCache) -> list[int]:
    """How many rows every layer has."""
    return [layer.k.shape[1] for layer in cache]


def draw_active(data: st.DataObject, batch: int, tokens: int) -> torch.Tensor:
    """Any active set, a different one for every sample, in any order."""
    count = data.draw(st.integers(1, tokens))
    rows = [data.draw(st.permutations(range(tokens)))[:count] for _ in range(batch)]
    return torch.tensor(rows)


@given(NETWORKS, st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.data())
def test_gathered_step_equals_boolean_mask_over_the_full_sequence(family, batch, h, w, data):
    model, cond = tiny_model(family), conditioning(family, batch)
    active = draw_active(data, batch, h * w)
    mask = mask_of(active, h * w)
    cache = KVCache()
    model(noise(batch, 2 * h, 2 * w), 0.9, **cond, cache=cache)  # dense step, fills the cache
    stored = deepcopy(cache)

    later = noise(batch, 2 * h, 2 * w, seed=3)
    gathered = patchify(model(later, 0.6, **cond, active=active, cache=cache), 2)
    masked = patchify(model(later, 0.6, **cond, cache=MaskedCache(stored, mask)), 2)
    assert torch.allclose(gathered[mask], masked[mask], atol=2e-5)
    assert (gathered[~mask] == 0).all()  # the model says nothing about stale tokens

    for old, new in zip(tensors(stored), tensors(cache), strict=True):
        text = old.shape[1] - h * w  # rows behind the image rows, none in image attention
        stale = F.pad(~mask, (0, text), value=False)
        assert new[stale].equal(old[stale])  # bit-identical
        assert not new[~stale].equal(old[~stale])


@given(NETWORKS, st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.data())
def test_regional_step_with_fresh_caches_equals_the_dense_step(family, batch, h, w, data):
    """Same latents, same sigma: whatever the active set and its order, active rows are the dense
    ones, in the output and in the caches."""
    model, cond = tiny_model(family), conditioning(family, batch)
    latents, active = noise(batch, 2 * h, 2 * w), draw_active(data, batch, h * w)
    plain = model(latents, 0.7, **cond)
    cache = KVCache()
    assert model(latents, 0.7, **cond, cache=cache).equal(plain)  # caching costs no bit
    dense = deepcopy(cache)
    regional = model(latents, 0.7, **cond, active=active, cache=cache)
    mask = mask_of(active, h * w)
    assert torch.allclose(patchify(regional, 2)[mask], patchify(plain, 2)[mask], atol=2e-5)
    for old, new in zip(tensors(dense), tensors(cache), strict=True):
        assert torch.allclose(old, new, atol=2e-5)


def test_order_of_active_is_irrelevant(family):
    model, cond = tiny_model(family), conditioning(family, 1)
    cache = KVCache()
    model(noise(1, 8, 8), 0.9, **cond, cache=cache)
    active = torch.tensor([[3, 7, 8, 12]])
    results = []
    for order in ([0, 1, 2, 3], [3, 0, 2, 1]):
        mine = deepcopy(cache)
        results.append(model(noise(1, 8, 8, 5), 0.5, **cond, active=active[:, order], cache=mine))
    assert torch.allclose(*results, atol=1e-5)


def test_a_batch_equals_its_members_alone(family):
    model, cond = tiny_model(family), conditioning(family, 3)
    active = torch.tensor([[0, 5, 7], [1, 2, 3], [4, 8, 11]])
    first, later = noise(3, 6, 8), noise(3, 6, 8, seed=3)
    cache = KVCache()
    model(first, 0.9, **cond, cache=cache)
    together = model(later, 0.4, **cond, active=active, cache=cache)
    for b in range(3):
        mine, own = KVCache(), {name: rows[b : b + 1] for name, rows in cond.items()}
        model(first[b : b + 1], 0.9, **own, cache=mine)
        alone = model(later[b : b + 1], 0.4, **own, active=active[b : b + 1], cache=mine)
        assert torch.allclose(together[b : b + 1], alone, atol=1e-5)


def test_every_block_of_either_kind_caches_image_rows_and_text_rows():
    cache = KVCache()
    tiny_model("flux-dev")(noise(1, 8, 8), 0.9, **conditioning("flux-dev", 1), cache=cache)
    assert rows(cache) == 4 * [16 + 5]


def test_noise_refiners_have_their_own_caches_and_context_refiners_none():
    cache = KVCache()
    tiny_model("lumina2")(noise(1, 8, 8), 0.9, **conditioning("lumina2", 1), cache=cache)
    assert rows(cache) == [16, 16, 16 + 5, 16 + 5]


def test_second_attention_has_its_own_cache():
    cache = KVCache()
    model = tiny_model("sd3.5-medium")
    model(noise(1, 8, 8), 0.9, **conditioning("sd3.5-medium", 1), cache=cache)
    assert rows(cache) == [16 + 5, 16, 16 + 5, 16 + 5, 16]
    assert cache.part(0).part("attn2").k.shape[1] == 16


def test_a_regional_step_updates_the_cache_in_place_and_copies_nothing(family):
    model, cond, cache = tiny_model(family), conditioning(family, 1), KVCache()
    model(noise(1, 8, 8), 0.9, **cond, cache=cache)
    before = [x.data_ptr() for x in tensors(cache)]
    size = cache.nbytes
    model(noise(1, 8, 8), 0.5, **cond, active=torch.tensor([[1, 2]]), cache=cache)
    assert before == [x.data_ptr() for x in tensors(cache)]
    assert size == cache.nbytes == sum(x.nbytes for x in tensors(cache))
    cache.clear()
    assert cache.nbytes == 0


def test_no_state_stays_on_the_module(family):
    model, cond, cache = tiny_model(family), conditioning(family, 1), KVCache()
    before = {name: vars(module).copy() for name, module in model.named_modules()}
    model(noise(1, 8, 8), 0.9, **cond, cache=cache)
    model(noise(1, 8, 8), 0.5, **cond, active=torch.tensor([[1, 2]]), cache=cache)
    assert before == {name: vars(module) for name, module in model.named_modules()}


def test_a_regional_step_reads_nothing_back_from_the_device(family):
    """Fake tensors have shapes but no values: any read-back to the host raises."""
    configs = (RASConfig(start=4), Upstream(high_ratio=0.3, error_reset_steps=(5,)))
    runs = [Run(c, torch.linspace(1, 0, 29), noise(2, 8, 8), 2, correct=True) for c in configs]
    with FakeTensorMode() as mode:
        with pytest.raises(DataDependentOutputException):
            torch.ones(1).item()
        model = type(tiny_model(family))(tiny_model(family).config)
        cond = {k: mode.from_tensor(v) for k, v in conditioning(family, 2).items()}
        for run in runs:
            latents, run.sigmas = torch.randn(2, 4, 8, 8), mode.from_tensor(run.sigmas)
            for i in range(6):
                active, cache = run.begin(i)
                velocity = model(latents, run.sigmas[i], **cond, active=active, cache=cache)
                velocity, correction = run.end(i, velocity)
                latents = latents + correction + velocity
            assert run.trace.steps[4].regional
        assert velocity.shape == latents.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_and_stays_close(family, dtype):
    model = type(tiny_model(family))(tiny_model(family).config)
    model.load_state_dict(tiny_model(family).state_dict())
    model = model.to(dtype).requires_grad_(False)
    cond, active = conditioning(family, 1), torch.tensor([[0, 3, 5]])
    out = []
    for network in (model, tiny_model(family)):
        cache = KVCache()
        network(noise(1, 6, 4), 0.9, **cond, cache=cache)
        out.append(network(noise(1, 6, 4, 3), 0.5, **cond, active=active, cache=cache).float())
    assert torch.isfinite(out[0]).all()
    assert (out[0] - out[1]).abs().max() < 0.15 * out[1].abs().max()


@pytest.mark.parametrize(
    ("active", "sentence"),
    [
        (torch.tensor([[0, 1]], dtype=torch.int32), "active is torch.int32, must be int64"),
        (torch.tensor([0, 1]), "active has shape (2,), must be (1, count)"),
        (torch.tensor([[0], [1]]), "active has shape (2, 1), must be (1, count)"),
        (torch.arange(17)[None], "active names 17 tokens, must be 1..16"),
        (torch.zeros(1, 0, dtype=torch.int64), "active names 0 tokens"),
    ],
)
def test_bad_active_sets_are_named(family, active, sentence):
    model, cond, cache = tiny_model(family), conditioning(family, 1), KVCache()
    with pytest.raises(ValueError) as error:
        model(noise(1, 8, 8), 0.5, **cond, active=active, cache=cache)
    assert sentence in str(error.value)


def test_every_token_may_be_active(family):
    model, cond, cache = tiny_model(family), conditioning(family, 1), KVCache()
    dense = model(noise(1, 8, 8), 0.5, **cond, cache=cache)
    regional = model(noise(1, 8, 8), 0.5, **cond, active=torch.arange(16)[None], cache=cache)
    assert torch.allclose(regional, dense, atol=1e-5)


def test_active_needs_a_filled_cache_of_its_batch(family):
    model, active = tiny_model(family), torch.tensor([[0, 1]])
    with pytest.raises(ValueError, match="need a cache"):
        model(noise(1, 8, 8), 0.5, **conditioning(family, 1), active=active)
    cache = KVCache()
    with pytest.raises(ValueError, match="run a dense step"):
        model(noise(1, 8, 8), 0.5, **conditioning(family, 1), active=active, cache=cache)
    model(noise(1, 8, 8), 0.5, **conditioning(family, 1), cache=cache)
    with pytest.raises(ValueError, match="filled with a batch of 1, got a batch of 2"):
        twice = active.repeat(2, 1)
        model(noise(2, 8, 8), 0.5, **conditioning(family, 2), active=twice, cache=cache)


def test_flat_rows_number_the_rows_of_every_sample():
    assert flat_rows(torch.tensor([[0, 2], [1, 2]]), 4).tolist() == [[0, 2], [5, 6]]
