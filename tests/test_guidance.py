"""Guidance in parts of a run and of full strength: truncated, normalised, and both with RAS."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import FAMILIES, conditioning, noise, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from minidit import denoise, flow_sigmas
from minidit.flow import Guidance
from ras import Given, KVCache, RASConfig, Run, Step
from ras.tokens import mask_of, unpatchify

REGIONAL = RASConfig(ratio=0.4, start=2, refresh=1)
SIGMAS = flow_sigmas(8, 3.0)


@given(st.integers(1, 40), st.floats(0, 1))
def test_steps_are_guided_up_to_the_ratio(steps, ratio):
    how = Guidance(4.0, cfg_trunc_ratio=ratio)
    assert [how.guides(i, steps) for i in range(steps)] == [
        not (i + 1) / steps > ratio for i in range(steps)
    ]
    assert not any(Guidance(1.0, cfg_trunc_ratio=ratio).guides(i, steps) for i in range(steps))


@given(st.integers(1, 40), st.floats(0, 1), st.floats(0, 1))
def test_steps_skip_layers_between_the_ends_and_not_at_them(steps, start, stop):
    how = Guidance(4.0, skip_layers=(1,), skip_start=start, skip_stop=stop)
    assert [how.skips(i, steps) for i in range(steps)] == [
        start * steps < i < stop * steps for i in range(steps)
    ]
    fifth = Guidance(4.0, skip_layers=(1,), skip_start=0.2, skip_stop=0.8)
    assert [fifth.skips(i, 5) for i in range(5)] == [False, False, True, True, False]
    assert not any(Guidance(4.0).skips(i, steps) for i in range(steps))


def test_skip_layer_guidance_adds_the_scaled_difference_to_the_prompt():
    def model(x, sigma, level, skip_layers=()):
        level = 0.5 * level if skip_layers == (7,) else level
        return level.view(-1, 1, 1, 1).expand_as(x)

    cond, uncond = {"level": torch.tensor([6.0])}, {"level": torch.tensor([1.0])}
    how = Guidance(4.0, skip_layers=(7,), skip_guidance=2.0, skip_start=0.0, skip_stop=1.0)
    seen = []
    denoise(
        model, torch.zeros(1, 4, 2, 2), torch.linspace(1, 0, 4), cond, uncond, how,
        callback=lambda *args: seen.append(args[3][0, 0, 0, 0].item()),
    )  # fmt: skip
    assert seen == [1 + 4 * 5, 1 + 4 * 5 + 2 * (6 - 3), 1 + 4 * 5 + 2 * (6 - 3)]


@pytest.mark.parametrize(("ratio", "guided"), [(1.0, 8), (0.5, 4), (0.49, 3), (0.1, 0)])
def test_truncated_guidance_runs_the_prompt_alone_from_there_on(ratio, guided):
    batches = []

    def model(x, sigma, level):
        assert len(level) == len(x)
        batches.append(len(x))
        return level.view(-1, 1, 1, 1).expand_as(x)

    cond, uncond = {"level": torch.tensor([3.0, 3.0])}, {"level": torch.tensor([1.0, 2.0])}
    how, start = Guidance(5.0, cfg_trunc_ratio=ratio), torch.zeros(2, 4, 2, 2)
    latents, _ = denoise(model, start, torch.linspace(1, 0, 9), cond, uncond, how)
    assert batches == [4] * guided + [2] * (8 - guided)
    wanted = [((u + 5 * (3 - u)) * guided + 3 * (8 - guided)) / -8 for u in (1, 2)]
    assert latents[:, 0, 0, 0].tolist() == pytest.approx(wanted)


def test_normalised_guidance_keeps_the_norm_of_every_row_of_a_channel():
    c, u = noise(2, 4, 6, 3), noise(2, 4, 6, 4)
    c[0, 1, 2], u[0, 1, 2] = 1e-5 * c[0, 1, 2], 1e-5 * u[0, 1, 2]  # hardly anything, but something
    c[0, 0, 0] = 0.0
    u[1, 1, 1] = c[1, 1, 1] = 0.0  # nothing to scale

    def model(x, sigma, which):
        return torch.cat((u, c))

    which, sigmas = {"which": torch.zeros(2)}, torch.tensor([1.0, 0.0])
    how = Guidance(4.0, cfg_normalization=True)
    latents, _ = denoise(model, torch.zeros_like(c), sigmas, which, which, how)
    guided = u + 4 * (c - u)
    assert torch.allclose(latents.norm(dim=3), c.norm(dim=3), rtol=1e-4, atol=1e-8)
    cosine = torch.cosine_similarity(-latents, guided, dim=3, eps=1e-12)
    assert torch.allclose(cosine, (c.norm(dim=3) > 0).float(), atol=1e-5)


def halves_apart(family: str, how: Guidance, batch: int) -> torch.Tensor:
    """A regional run whose halves are separate calls with caches of their own, in full."""
    model, latents = tiny_model(family), noise(batch, 6, 8)
    halves = [conditioning(family, batch, seed) for seed in (9, 1)]  # negative, prompt
    caches, held = [KVCache(), KVCache()], [None, None]
    run = Run(REGIONAL, SIGMAS, latents, 2)
    for i in range(8):
        active, cache = run.begin(i)
        for k, cond in enumerate(halves):
            region = {} if cache is None else {"active": active, "cache": caches[k]}
            velocity = model(latents, run.sigmas[i], **cond, **region)
            if active is not None:
                mask = mask_of(active, 12)[:, :, None].expand(-1, -1, 4)
                velocity = torch.where(unpatchify(mask, 6, 8, 2), velocity, held[k])
            held[k] = velocity
        u, c = held
        velocity = c
        if (i + 1) / 8 <= how.cfg_trunc_ratio:
            velocity = u + how.scale * (c - u)
            if how.cfg_normalization:
                velocity = (
                    velocity * c.norm(dim=3, keepdim=True) / velocity.norm(dim=3, keepdim=True)
                )
        velocity, _ = run.end(i, velocity)
        latents = latents + (run.levels[i + 1] - run.levels[i]) * velocity
    return latents


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.65, 1.0])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "lumina"])
def test_regional_runs_are_those_of_halves_apart(family, ratio, normalise):
    """Guidance may end before, at, and behind regional steps; stale tokens count in the norms.
    (Lumina-Next guides three of its four channels, which is another rule.)"""
    how = Guidance(3.0, cfg_trunc_ratio=ratio, cfg_normalization=normalise)
    cond = [conditioning(family, 2, seed) for seed in (1, 9)]
    latents, trace = denoise(tiny_model(family), noise(2, 6, 8), SIGMAS, *cond, how, ras=REGIONAL)
    assert trace.share < 0.8
    assert torch.allclose(latents, halves_apart(family, how, 2), atol=1e-4)


@given(st.sets(st.integers(0, 11), min_size=1, max_size=11), st.integers(1, 2))
def test_in_an_edit_tokens_that_are_never_computed_count_in_no_norm(drawn, batch):
    mask = torch.zeros(batch, 12, dtype=torch.bool)
    mask[:, list(drawn)] = True
    white = unpatchify(mask[:, :, None].expand(-1, -1, 4), 6, 8, 2)  # (B, 1, 6, 8)
    c, u = noise(batch, 6, 8, 3), noise(batch, 6, 8, 4)

    class Regional(Given):
        def plan(self, steps, tokens):
            return (Step(True, len(drawn)),) * steps

    def model(x, sigma, which, active=None, cache=None):
        assert active.tolist() == [sorted(drawn)] * (2 * batch)
        return torch.where(white.repeat(2, 1, 1, 1), torch.cat((u, c)), 0.0)

    which, seen = {"which": torch.zeros(batch)}, []
    denoise(
        model, noise(batch, 6, 8), torch.linspace(1, 0, 4), which, which,
        Guidance(4.0, cfg_normalization=True), ras=Regional(0).at(mask.view(batch, 3, 4)),
        callback=lambda *args: seen.append(args[3]),
    )  # fmt: skip
    guided, alone = (u + 4 * (c - u)) * white, c * white
    sizes = alone.norm(dim=3, keepdim=True) / guided.norm(dim=3, keepdim=True).clamp(min=1e-12)
    assert all(torch.allclose(velocity, guided * sizes, atol=1e-5) for velocity in seen)


def test_keys_and_values_of_the_negative_prompt_are_dropped_without_a_copy():
    cache = KVCache()
    k, v = torch.randn(2, 4, 5, 2, 3)
    layer = cache.part("layer")
    layer.write(k, v, None)
    cache.keep(slice(-2, None))
    for kept, whole in zip((layer.k, layer.v), (k, v), strict=True):
        assert kept.equal(whole[2:]) and kept.data_ptr() == whole[2:].data_ptr()
    layer.write(torch.zeros(2, 1, 2, 3), torch.zeros(2, 1, 2, 3), torch.tensor([[1], [5]]))
    assert (k[[2, 3], [1, 0]] == 0).all() and not (k[2:, 2:] == 0).any()


def test_what_no_step_can_change_is_prepared_once():
    class Counting:
        config = tiny_model("lumina2").config
        calls = 0

        def prepare(self, **cond):
            self.calls += 1
            return tiny_model("lumina2").prepare(**cond)

        def __call__(self, latents, sigma, context, context_mask, refined=False, **region):
            assert refined
            cond = {"context": context, "context_mask": context_mask, "refined": refined}
            return tiny_model("lumina2")(latents, sigma, **cond, **region)

    model, how = Counting(), Guidance(3.0, cfg_trunc_ratio=0.5)
    cond = [conditioning("lumina2", 2, seed) for seed in (1, 9)]
    latents, _ = denoise(model, noise(2, 6, 8), SIGMAS, *cond, how, ras=REGIONAL)
    assert model.calls == 1
    assert torch.allclose(latents, halves_apart("lumina2", how, 2), atol=1e-4)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"cfg_trunc_ratio": 1.5}, "cfg_trunc_ratio is 1.5, must be a finite number within 0..1"),
        ({"cfg_trunc_ratio": float("nan")}, "cfg_trunc_ratio is nan"),
        ({"cfg_normalization": 1}, "cfg_normalization is 1, must be True or False"),
        ({"skip_guidance": -0.1}, "skip_guidance is -0.1, must be a finite number of at least 0"),
        ({"skip_layers": "1"}, "skip_layers is '1', must be a list"),
        ({"skip_layers": (1,), "scale": 1}, "skip_layers needs guidance, which is 1, off"),
        ({"scale": 0.99}, "guidance is 0.99, must be a finite number of at least 1"),
    ],
)
def test_bad_settings_are_named(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        Guidance(**{"scale": 4.0} | change)


def test_guidance_is_off_by_default_and_numbers_are_floats():
    assert Guidance() == Guidance(1.0, (), 2.8, 0.01, 0.2, 1.0, False)
    how = Guidance(np.float32(3), skip_guidance=np.int64(0))
    assert (type(how.scale), type(how.skip_guidance)) == (float, float)


@pytest.mark.parametrize("name", ["skip_start", "skip_stop", "cfg_trunc_ratio"])
def test_shares_of_a_run_are_within_0_and_1(name):
    for share in (0, 1):
        assert getattr(Guidance(3.0, **{name: share}), name) == share
    for beyond in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"{name} is {beyond}, must be a finite number within"):
            Guidance(3.0, **{name: beyond})
