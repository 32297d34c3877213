"""What lives between the steps: all that a network and a rule see, against naive bookkeeping."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minidit import denoise
from ras import KVCache, RASConfig, Region, Step, Trace
from ras.tokens import flat_rows, mask_of, patchify, unpatchify


class Spy:
    """A rule whose plan and sets are given, and that keeps every history which it is shown."""

    def __init__(self, sets: list[torch.Tensor | None], tokens: int) -> None:
        self.sets, self.seen = sets, []
        self.steps = tuple(
            Step(False, tokens) if one is None else Step(True, one.shape[1]) for one in sets
        )

    def plan(self, steps, tokens):
        return self.steps

    def select(self, history, step):
        self.seen.append(history)
        regional = [i for i, one in enumerate(self.sets) if one is not None]
        now = regional[len(self.seen) - 1]
        assert step == self.steps[now] and history.step == now - 1
        return Region(self.sets[now], history.velocity)


@st.composite
def sets(draw, batch: int, tokens: int) -> list[torch.Tensor | None]:
    """A dense step, then dense and regional ones with different tokens in every sample."""
    steps = [None]
    for _ in range(draw(st.integers(1, 7))):
        count = draw(st.integers(0, tokens - 1))  # 0 is a dense step
        rows = [sorted(draw(st.permutations(range(tokens)))[:count]) for _ in range(batch)]
        steps.append(torch.tensor(rows) if count else None)
    return steps


@given(st.data(), st.integers(1, 2), st.sampled_from([(1, 3), (2, 3), (3, 2)]), st.booleans())
def test_a_run_is_its_naive_version(data, batch, grid, correct):
    """Levels, histories, caches, velocities and latents of every step: tokens hold what they last
    had, and with the corrected solver take back half of what that got wrong over their stretch."""
    (h, w), N = grid, grid[0] * grid[1]
    chosen, seed = data.draw(sets(batch, N)), data.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    sigmas = torch.rand(len(chosen) + 1, generator=generator).add(0.05).cumsum(0).flip(0) / 9
    fields = torch.randn(len(chosen), batch, 3, 2 * h, 2 * w, generator=generator)
    asked, seen, rule = [], [], Spy(chosen, N)

    def model(latents, sigma, active=None, cache=None):
        asked.append((sigma, active, cache))
        field = fields[len(asked) - 1]
        if cache is not None:
            cache.part("a layer").write(field, field, None)
        if active is None:
            return field
        computed = mask_of(active, N)[:, :, None].expand(-1, -1, 4)
        return torch.where(unpatchify(computed, 2 * h, 2 * w, 2), field, 99.0)  # nobody reads it

    start = torch.randn(batch, 3, 2 * h, 2 * w, generator=generator)
    kept = start.clone()
    latents, trace = denoise(
        model, start, sigmas, {}, ras=rule, correct=correct,
        callback=lambda *args: seen.append(args),
    )  # fmt: skip
    assert start.equal(kept) and latents is seen[-1][2]
    assert not any(cache.nbytes for _, _, cache in asked if cache is not None)

    x, regions, shown = patchify(start, 2).double(), None, list(rule.seen)
    held, since, age, skips, error = {}, {}, {}, {}, {}
    for i, active in enumerate(chosen):
        sigma, given_active, cache = asked[i]
        assert sigma.equal(sigmas[i]) and sigma.dtype == torch.float32
        after = chosen[i + 1] if i + 1 < len(chosen) else None
        assert (cache is not None) == (active is not None or after is not None)
        assert given_active is active
        if active is not None:
            history = shown.pop(0)
            for b, n in held:
                assert history.velocity[b, n].equal(held[b, n])
                assert history.sigma[b, n] == since[b, n]
                assert (history.age[b, n], history.skips[b, n]) == (age[b, n], skips[b, n])
                assert history.error[b, n].item() == pytest.approx(error[b, n], rel=1e-4)
            assert history.region is None if regions is None else history.region.active is regions
            regions = active
        fresh, step = patchify(fields[i], 2), (sigmas[i + 1] - sigmas[i]).double()
        computed = torch.ones(batch, N) if active is None else mask_of(active, N)
        for b in range(batch):
            for n in range(N):
                if computed[b, n]:
                    v = fresh[b, n]
                    error[b, n] = v.norm().item()
                    if (b, n) in held:
                        change, stretch = v - held[b, n], (sigmas[i] - since[b, n]).double()
                        error[b, n] = (change.norm() / -stretch).item()
                        x[b, n] += correct * stretch * change.double() / 2
                    held[b, n], since[b, n], age[b, n] = v, sigmas[i], 0
                    skips.setdefault((b, n), 0)
                else:
                    age[b, n], skips[b, n] = age[b, n] + 1, skips[b, n] + 1
                x[b, n] += step * held[b, n].double()
        index, level, after_step, velocity, told = seen[i]
        assert (index, level) == (i, sigmas[i].item()) and told is active
        for (b, n), v in held.items():
            assert patchify(velocity, 2)[b, n].equal(v)
        assert torch.allclose(patchify(after_step, 2).double(), x, atol=1e-5)
        assert trace.active[i].equal(computed.bool())
    assert not shown and trace.sigmas == sigmas.tolist()[:-1] and trace.grid == grid
    assert tuple(trace.steps) == rule.steps
    assert trace.token_steps == sum(s.active for s in rule.steps)
    assert trace.share == pytest.approx(trace.token_steps / (N * len(chosen)))


@given(st.data(), st.integers(1, 3), st.sampled_from([(1, 4), (2, 3), (3, 2)]))
def test_heat_counts_the_regional_steps_of_one_sample(data, batch, grid):
    N = grid[0] * grid[1]
    trace, chosen = Trace(grid), data.draw(sets(batch, N))
    for i, active in enumerate(chosen):
        count = N if active is None else active.shape[1]
        mask = torch.ones(batch, N, dtype=torch.bool) if active is None else mask_of(active, N)
        trace.record(1 - i / 9, Step(active is not None, count), mask)
    regional = [active for active in chosen if active is not None]
    for b in range(batch):
        wanted = torch.zeros(grid) if regional else torch.ones(grid)
        for active in regional:
            for n in active[b].tolist():
                wanted[n // grid[1], n % grid[1]] += 1 / len(regional)
        assert torch.allclose(trace.heat(b), wanted)
    assert trace.heat().equal(trace.heat(0))
    for outside in (-1, batch):
        with pytest.raises(ValueError, match=f"is {outside}, must be within 0..{batch - 1}"):
            trace.heat(outside)
    for other in (0.0, True, "0"):
        with pytest.raises(ValueError, match="sample is .*, must be within"):
            trace.heat(other)


def test_a_trace_of_no_step_is_of_one_picture():
    assert Trace((2, 3)).heat().equal(torch.ones(2, 3))
    with pytest.raises(ValueError, match="sample is 1, must be within 0..0"):
        Trace((2, 3)).heat(1)


@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_noise_levels_of_any_precision_are_the_same_numbers(dtype, correct):
    """A model is given them in float32, as histories have them."""
    sigmas, seen = (torch.arange(8, -1, -1) / 8) ** 2, []  # exact in all of them
    start = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(0))

    def model(latents, sigma, active=None, cache=None):
        seen.append(sigma)
        return latents * sigma

    config = RASConfig(start=1, end=None, refresh=0, score="l2")
    one, other = (
        denoise(model, start, levels, {}, ras=config, correct=correct)
        for levels in (sigmas, sigmas.to(dtype))
    )
    assert other[0].equal(one[0]) and other[0].dtype == torch.float32
    assert {sigma.dtype for sigma in seen} == {torch.float32}
    assert other[1].sigmas == sigmas.tolist()[:-1]


def test_a_cache_moves_with_those_of_further_passes():
    cache, rows = KVCache(), torch.zeros(1, 3, 1, 2)
    for whole in (cache, cache.part("pass")):
        whole.part("layer").write(rows, rows, None)
    cache.to("meta")
    assert [x.is_meta for layer in cache for x in (layer.k, layer.v)] == [True] * 4


def test_a_cache_holds_the_rows_of_the_last_time_and_frees_all():
    cache, fused = KVCache(), torch.randn(2, 3, 5, 1, 2)  # k, v and more of one projection
    k, v = fused.unbind(1)[:2]
    layer = cache.part("a")
    full_k, full_v = layer.write(k, v, None)
    assert full_k.equal(k) and full_v.equal(v)
    assert full_k.untyped_storage().nbytes() == full_k.nbytes  # no more than its own is kept alive
    assert cache.nbytes == 2 * 2 * 5 * 2 * 4
    new_k, new_v = torch.randn(2, 2, 2, 1, 2)
    rows = flat_rows(torch.tensor([[3, 0], [1, 4]]), 5)
    again_k, again_v = layer.write(new_k, new_v, rows)
    for whole, old, new in ((again_k, k, new_k), (again_v, v, new_v)):
        wanted = old.clone()
        wanted[0, [3, 0]], wanted[1, [1, 4]] = new[0], new[1]
        assert whole.equal(wanted)
    assert again_k is layer.k and again_v is layer.v and cache.part("a") is layer
    assert again_k.data_ptr() == full_k.data_ptr() and list(cache) == [layer]
    for few in (new_k[:1], new_k.repeat(2, 1, 1, 1)):
        with pytest.raises(ValueError, match="filled with a batch of 2, got a batch of"):
            layer.write(few, few, rows)

    dense = torch.randn(2, 2, 5, 1, 2)
    for got, want in zip(layer.write(*dense, None), dense, strict=True):
        assert got.equal(want)  # a later dense step replaces all
    assert layer.k.equal(dense[0]) and layer.v.equal(dense[1])

    with pytest.raises(ValueError, match="no keys and values of this layer yet"):
        cache.part("b").write(new_k, new_v, rows)

    other = cache.part("more").part("a")
    assert other is cache.part("more").part("a") is not layer and not other.nbytes
    other.write(new_k, new_v, None)
    assert list(cache) == [layer, other] and layer.k.equal(dense[0])
    assert cache.nbytes == 2 * 2 * 5 * 2 * 4 + other.nbytes == layer.nbytes + other.nbytes
    cache.keep(slice(1, None))
    assert layer.k.equal(dense[0, 1:]) and other.v.equal(new_v[1:])
    assert layer.k.data_ptr() == dense[0, 1:].data_ptr()  # a view
    cache.clear()
    assert cache.nbytes == 0 and not list(cache) and cache.part("a") is not layer
    layer.clear()
    assert layer.k is layer.v is None and not list(layer)
