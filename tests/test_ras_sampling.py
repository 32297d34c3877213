"""RAS in the sampling loop: what a whole run must hold, on analytic fields and on every network."""

from __future__ import annotations

import gc

import pytest
import torch
from conftest import conditioning, noise, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from minidit import denoise, flow_sigmas
from ras import SCORES, KVCache, RASConfig, plan

# the paper's rule
REGIONAL = RASConfig(
    ratio=0.4, start=2, end=None, refresh=1, score="std", prefer="low", starvation=0.1
)  # fmt: skip


def sample(family: str, config: RASConfig | None, seed: int = 2, batch: int = 2, **kwargs):
    """Eight guided steps of the tiny model of a family on 6 x 8 latents."""
    return denoise(
        tiny_model(family), noise(batch, 6, 8, seed), flow_sigmas(8, 3.0),
        conditioning(family, batch, 1), conditioning(family, batch, 9), 3.0, ras=config, **kwargs,
    )  # fmt: skip


def test_ratio_one_has_the_same_bits_as_dense(family):
    dense, none = sample(family, None)
    latents, trace = sample(family, RASConfig(ratio=1))
    assert none is None and trace.share == 1
    assert latents.equal(dense)


def test_active_counts_equal_the_plan(family):
    _, trace = sample(family, REGIONAL)
    steps = plan(REGIONAL, 8, 12)
    assert tuple(trace.steps) == steps
    for step, active in zip(steps, trace.active, strict=True):
        assert active.shape == (2, 12) and (active.sum(dim=1) == step.active).all()
    assert trace.token_steps == sum(step.active for step in steps)
    assert trace.sigmas == flow_sigmas(8, 3.0).tolist()[:-1]
    assert trace.share == trace.token_steps / (8 * 12) < 0.8


def test_stale_tokens_keep_their_velocity_and_active_ones_get_a_new_one(family):
    seen = []
    sample(family, REGIONAL, callback=lambda *args: seen.append(args))
    for (_, _, _, before, _), (step, _, _, velocity, active) in zip(seen, seen[1:], strict=False):
        if active is not None:
            mask = torch.zeros(2, 12, dtype=torch.bool).scatter_(1, active, True)
            pixels = mask.view(2, 1, 3, 1, 4, 1).expand(2, 4, 3, 2, 4, 2).reshape(2, 4, 6, 8)
            assert velocity[~pixels].equal(before[~pixels]), step
            assert not (velocity == before)[pixels].any(), step


def test_guidance_halves_share_their_active_set(family):
    calls = []

    class Recording:
        config = tiny_model(family).config
        guided_channels = tiny_model(family).guided_channels

        def __call__(self, latents, sigma, active=None, cache=None, **cond):
            calls.append(active)
            return tiny_model(family)(latents, sigma, active=active, cache=cache, **cond)

    denoise(
        Recording(), noise(2, 6, 8), flow_sigmas(8, 3.0), conditioning(family, 2, 1),
        conditioning(family, 2, 9), 3.0, ras=REGIONAL,
    )  # fmt: skip
    regional = [active for active in calls if active is not None]
    assert len(calls) == 8 and len(regional) == 5
    assert all(active.shape[0] == 4 and active[:2].equal(active[2:]) for active in regional)


def test_a_batch_equals_its_members_alone(family):
    together, trace = sample(family, REGIONAL, batch=3)
    for b in range(3):
        alone, own = denoise(
            tiny_model(family), noise(3, 6, 8)[b : b + 1], flow_sigmas(8, 3.0),
            {k: v[b : b + 1] for k, v in conditioning(family, 3, 1).items()},
            {k: v[b : b + 1] for k, v in conditioning(family, 3, 9).items()}, 3.0, ras=REGIONAL,
        )  # fmt: skip
        assert torch.allclose(together[b : b + 1], alone, atol=1e-4)
        assert all(x[b].equal(y[0]) for x, y in zip(trace.active, own.active, strict=True))


def test_the_same_seed_has_the_same_bits_also_after_a_run_aborted_at_any_step(family):
    class Abort(Exception):
        pass

    expected, trace = sample(family, REGIONAL)
    for last in range(8):

        def callback(step, *_, last=last):
            if step == last:
                raise Abort

        with pytest.raises(Abort):
            sample(family, REGIONAL, seed=5, callback=callback)
        latents, again = sample(family, REGIONAL)
        assert latents.equal(expected)
        assert all(a.equal(b) for a, b in zip(trace.active, again.active, strict=True))


def test_caches_are_freed_when_a_run_ends_normally_or_not(family):
    gc.collect()
    others = {id(x) for x in gc.get_objects() if type(x) is KVCache}  # that earlier tests left

    def held() -> int:
        caches = [x for x in gc.get_objects() if type(x) is KVCache and id(x) not in others]
        return sum(x.nbytes for x in caches)

    during = []

    def callback(step, *_):
        during.append(held())
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as error:
        sample(family, REGIONAL, callback=callback)
    assert during[0] == 0 and min(during[1:]) > 0  # filled at the last step before a regional one
    assert error.traceback and held() == 0  # even while the traceback keeps the frames alive
    sample(family, REGIONAL)
    assert held() == 0


def test_two_interleaved_runs_do_not_touch_each_other(family):
    outer, outer_trace = sample(family, REGIONAL)
    inner, _ = sample(family, REGIONAL, seed=7)
    inside = []

    def callback(step, *_):
        inside.append(sample(family, REGIONAL, seed=7)[0])

    latents, trace = sample(family, REGIONAL, callback=callback)
    assert latents.equal(outer) and all(x.equal(inner) for x in inside)
    assert all(a.equal(b) for a, b in zip(trace.active, outer_trace.active, strict=True))


@given(st.floats(0.02, 0.98), st.integers(3, 12), st.booleans())
def test_constant_velocity_is_exact_at_any_ratio(ratio, steps, correct):
    target = torch.randn(2, 4, 6, 10, generator=torch.Generator().manual_seed(0))
    config = RASConfig(ratio=ratio, start=1, end=None, refresh=0)
    start, sigmas = noise(2, 6, 10), flow_sigmas(steps, 3.0)
    model = only_active(lambda x, sigma: target)
    latents, _ = denoise(model, start, sigmas, {}, ras=config, correct=correct)
    assert torch.allclose(latents, start - target, atol=1e-5)


@given(
    st.floats(0.05, 0.95), st.integers(3, 16), st.sampled_from(sorted(SCORES)),
    st.sampled_from(["low", "high"]), st.integers(0, 3), st.floats(0, 2), st.floats(-2, 2),
)  # fmt: skip
def test_corrected_velocity_linear_in_sigma_is_exact(
    ratio, steps, score, prefer, refresh, k, factor
):
    """At any plan, ratio and rule, whatever stale tokens move along: the mean of both ends is the
    mean over a stretch. Only a last step is not followed by one that corrects it, so the field is
    compared where that one begins."""
    slope, offset = noise(2, 6, 10, 3), noise(2, 6, 10, 4)

    class Guess(RASConfig):
        def select(self, history, step):
            region = super().select(history, step)
            return region._replace(held=factor * region.held)

    config = Guess(
        ratio=ratio, start=1, end=steps - 2, refresh=refresh, score=score, prefer=prefer,
        starvation=k,
    )  # fmt: skip
    sigmas, seen = flow_sigmas(steps, 3.0), []

    def model(x, sigma):
        return slope * sigma + offset

    def callback(step, sigma, latents, velocity, active):
        seen.append(latents - (sigmas[step + 1] - sigmas[step]) * velocity)

    run = {"ras": config, "correct": True, "callback": callback}
    denoise(only_active(model), noise(2, 6, 10), sigmas, {}, **run)
    here, top = sigmas[-2], sigmas[0]
    exact = noise(2, 6, 10) + slope * (here**2 - top**2) / 2 + offset * (here - top)
    assert torch.allclose(seen[-1], exact, atol=2e-5)


@given(st.integers(1, 12), st.floats(0.5, 5))
def test_corrected_with_every_token_active_is_the_trapezoid_method(steps, shift):
    def field(x, sigma):
        return torch.tanh(2 * x) + sigma * x.flip(1)

    sigmas, x = flow_sigmas(steps, shift), noise(2, 6, 10)
    for config in (None, RASConfig(ratio=1)):
        model = only_active(field)
        latents, _ = denoise(model, x, sigmas, {}, ras=config, correct=True)
        guess, start, before = x, x, None
        for i in range(steps):  # predict with the last velocity, then redo the step with the mean
            velocity = field(guess, sigmas[i])
            if i > 0:
                start = start + (sigmas[i] - sigmas[i - 1]) * (before + velocity) / 2
            guess, before = start + (sigmas[i + 1] - sigmas[i]) * velocity, velocity
        assert torch.allclose(latents, guess, atol=1e-5)


def test_correction_moves_the_tokens_that_are_computed_and_no_others():
    def field(x, sigma):
        return x * sigma**2

    moves = []

    def callback(step, sigma, latents, velocity, active):
        moves.append((latents, velocity, active))

    sigmas = flow_sigmas(8, 3.0)
    _, trace = denoise(
        only_active(field), noise(2, 6, 8), sigmas, {}, ras=REGIONAL, correct=True,
        callback=callback,
    )  # fmt: skip
    for t in range(1, 8):
        expected = moves[t - 1][0] + (sigmas[t + 1] - sigmas[t]) * moves[t][1]
        moved = (moves[t][0] - expected).abs() > 1e-5  # (B, C, H, W): beyond the Euler step
        tokens = moved.view(2, 4, 3, 2, 4, 2).any(dim=5).any(dim=3).any(dim=1).flatten(1)
        assert tokens.equal(trace.active[t]), t


@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from(["low", "high"]))
def test_non_square_equals_the_transposed_problem(h, w, prefer):
    """A field that acts on every pixel alone knows no rows from columns: neither may RAS."""

    def field(x, sigma):
        return torch.tanh(3 * x) + sigma * x.flip(1)

    config = RASConfig(ratio=0.4, start=1, refresh=1, score="std", prefer=prefer)
    start, sigmas = noise(2, 2 * h, 2 * w), flow_sigmas(7, 3.0)
    one, trace = denoise(only_active(field), start, sigmas, {}, ras=config, correct=True)
    turned_start = start.mT.contiguous()
    other, turned = denoise(only_active(field), turned_start, sigmas, {}, ras=config, correct=True)
    assert torch.allclose(one, other.mT, atol=1e-5)
    for a, b in zip(trace.active, turned.active, strict=True):
        assert a.view(2, h, w).equal(b.view(2, w, h).mT)


def only_active(field):
    """A model made of a velocity field, that like the networks is zero where it was not asked."""

    def model(latents, sigma, active=None, cache=None):
        velocity = field(latents, sigma)
        if active is None:
            return velocity
        (b, c, height, width), h, w = latents.shape, latents.shape[2] // 2, latents.shape[3] // 2
        mask = torch.zeros(b, h * w, dtype=torch.bool).scatter_(1, active, True)
        pixels = mask.view(b, 1, h, 1, w, 1).expand(b, c, h, 2, w, 2).reshape(b, c, height, width)
        return velocity * pixels

    return model
