"""Sigmas against the official scheduler, Euler steps on fields with known answers, guidance."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import GOLDENS, noise
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from minidit import denoise, flow_sigmas
from minidit.guidance import Guidance
from ras import RASConfig, Record


def test_sigmas_are_those_of_the_official_scheduler_to_the_bit():
    expected = load_file(GOLDENS / "scheduler" / "sigmas.safetensors")
    assert len(expected) == 24
    for name, sigmas in expected.items():
        shift, steps = name.split("/")
        assert flow_sigmas(int(steps), float(shift)).equal(sigmas), name


@given(st.integers(1, 200), st.floats(0.2, 12))
def test_sigmas_fall_from_one_to_zero(steps, shift):
    sigmas = flow_sigmas(steps, shift)
    assert sigmas.shape == (steps + 1,) and sigmas.dtype == torch.float32
    assert sigmas[0] == pytest.approx(1) and sigmas[-1] == 0
    assert (sigmas[1:] < sigmas[:-1]).all()


@pytest.mark.parametrize(
    ("steps", "shift", "sentence"),
    [
        (0, 1.0, "steps is 0"),
        (10_001, 1.0, "steps is 10001, must be an integer within 1..10000"),
        (4, 2e6, "shift is 2000000.0, must be a finite number within 1e-06..1e"),
        (2.5, 1.0, "steps is 2.5"),
        (4, 0.0, "shift is 0.0"),
        (4, math.nan, "shift is nan"),
        (4, 1e-300, "shift is 1e-300"),  # 1 / (1 + (1e-300 - 1)) is infinite
    ],
)
def test_impossible_schedules_are_named(steps, shift, sentence):
    with pytest.raises(ValueError, match=sentence):
        flow_sigmas(steps, shift)


@given(st.integers(1, 30), st.floats(0.5, 6))
def test_straight_paths_are_exact_with_any_steps(steps, shift):
    """velocity = noise - image, the straight path of rectified flow, ends at the image."""
    image, start = noise(2, 4, 6, 0), noise(2, 4, 6, 1)
    latents, trace = denoise(lambda x, sigma: start - image, start, flow_sigmas(steps, shift), {})
    assert trace is None
    assert torch.allclose(latents, image, atol=1e-5)


def test_euler_is_first_order_on_a_curved_field():
    """d x / d sigma = x has the answer x * exp(-1): halving the steps doubles the error."""
    start = noise(1, 4, 4)
    errors = []
    for steps in (50, 100, 200):
        latents, _ = denoise(lambda x, sigma: x, start, torch.linspace(1, 0, steps + 1), {})
        errors.append((latents - start * math.exp(-1)).abs().max())
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.05)


def test_corrected_is_second_order_on_a_curved_field():
    """Halving the steps quarters the error."""
    start = noise(1, 4, 4)
    errors = []
    for steps in (50, 100):
        sigmas = torch.linspace(1, 0, steps + 1) ** 1.3  # steps of unequal lengths
        latents, _ = denoise(lambda x, sigma: x, start, sigmas, {}, correct=True)
        errors.append((latents - start * math.exp(-1)).abs().max())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.15)


def test_polynomial_in_sigma_is_the_riemann_sum():
    sigmas = flow_sigmas(7, 3.0)
    latents, _ = denoise(lambda x, s: 3 * s**2 * torch.ones_like(x), noise(1, 2, 2), sigmas, {})
    total = sum(3 * a**2 * (b - a) for a, b in zip(sigmas, sigmas[1:], strict=False))
    assert torch.allclose(latents, noise(1, 2, 2) + total, atol=1e-6)


def test_guidance_is_uncond_plus_scaled_difference():
    def model(x, sigma, level):
        return level.view(-1, 1, 1, 1).expand_as(x)

    one, three = {"level": torch.tensor([1.0, 2.0])}, {"level": torch.tensor([3.0, 3.0])}
    sigmas = torch.tensor([1.0, 0.0])
    latents, _ = denoise(model, torch.zeros(2, 4, 2, 2), sigmas, three, one, 5.0)
    assert latents[:, 0, 0, 0].tolist() == [-(1 + 5 * 2), -(2 + 5 * 1)]


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_a_token_is_a_patch_of_the_model(patch):
    class Model:
        config = SimpleNamespace(patch_size=patch)

        def __call__(self, latents, sigma, active=None, cache=None):
            return torch.zeros_like(latents)

    config = RASConfig(ratio=0.5, start=1, end=None, refresh=0)
    _, trace = denoise(Model(), noise(1, 8, 12), flow_sigmas(4, 3.0), {}, ras=config)
    assert trace.grid == (8 // patch, 12 // patch)


def test_without_regions_latents_of_any_size_will_do():
    start = noise(1, 3, 5)
    latents, _ = denoise(lambda x, sigma: x / x, start, flow_sigmas(3, 1.0), {}, correct=True)
    assert torch.allclose(latents, start - 1, atol=1e-5)


def test_guidance_one_does_not_run_the_unconditional_half():
    batches = []

    def model(x, sigma, level):
        batches.append(len(x))
        return x

    level = {"level": torch.zeros(2)}
    denoise(model, noise(2, 2, 2), flow_sigmas(2, 1.0), level, level, 1.0)
    denoise(model, noise(2, 2, 2), flow_sigmas(2, 1.0), level, level, 2.0)
    assert batches == [2, 2, 4, 4]


def test_guided_channels_leave_the_others_conditional():
    class Model:
        guided_channels = 3

        def __call__(self, x, sigma, level):
            return level.view(-1, 1, 1, 1).expand_as(x)

    cond, uncond = {"level": torch.tensor([2.0])}, {"level": torch.tensor([1.0])}
    sigmas = torch.tensor([1.0, 0.0])
    latents, _ = denoise(Model(), torch.zeros(1, 4, 2, 2), sigmas, cond, uncond, 3.0)
    assert latents[0, :, 0, 0].tolist() == [-4, -4, -4, -2]


@pytest.mark.parametrize("shown", [False, True])
def test_progress_is_shown_where_it_is_asked_for(shown, capsys):
    denoise(lambda x, sigma: x, noise(1, 2, 2), flow_sigmas(3, 1.0), {}, progress=shown)
    said = capsys.readouterr().err
    assert ("denoising: 100%" in said) == ("step" in said) == shown


def test_what_is_no_tensor_goes_to_the_model_as_it_is():
    seen = []

    def model(x, sigma, name, level):
        seen.append((name, level.tolist()))
        return x

    cond, uncond = ({"name": name, "level": torch.ones(1) * i} for i, name in enumerate("ab"))
    denoise(model, noise(1, 2, 2), flow_sigmas(1, 1.0), cond, uncond, 2.0)
    assert seen == [("a", [1.0, 0.0])]  # the prompt's, and rows of both
    with pytest.raises(ValueError, match="level'] has shape"):
        denoise(model, noise(1, 2, 2), flow_sigmas(1, 1.0), cond | {"level": torch.ones(2)})


def test_callback_sees_every_step_and_the_latents_after_it():
    seen = []
    sigmas = flow_sigmas(5, 3.0)
    latents, _ = denoise(
        lambda x, sigma: x, noise(1, 2, 2), sigmas, {}, callback=lambda *args: seen.append(args)
    )
    assert [step for step, *_ in seen] == [0, 1, 2, 3, 4]
    assert [sigma for _, sigma, *_ in seen] == sigmas.tolist()[:-1]
    x = noise(1, 2, 2)
    for step, _, after, velocity, active in seen:
        assert velocity.equal(x) and active is None
        x = x + (sigmas[step + 1] - sigmas[step]) * velocity
        assert after.equal(x)
    assert latents.equal(x)


def test_half_precision_models_are_integrated_in_float32():
    types = []

    def model(x, sigma):
        types.append(x.dtype)
        return x.half()

    for dtype in (torch.float16, torch.float64):
        latents, _ = denoise(model, noise(1, 2, 2).to(dtype), flow_sigmas(3, 1.0), {})
        assert latents.dtype == torch.float32
    assert types == [torch.float32] * 6


def test_guidance_of_half_precision_models_is_computed_in_float32():
    """7 * 60000 is beyond float16, and a tenth of 0.001 is lost beside 1 in bfloat16."""
    sigmas, level = torch.tensor([1.0, 0.0]), {"level": torch.zeros(1)}
    for dtype, u, c, scale in (
        (torch.float16, -30000.0, 30000.0, 7.0), (torch.bfloat16, 1.0, 1.0078125, 1.1),
    ):  # fmt: skip
        both = torch.tensor([u, c], dtype=dtype).view(2, 1, 1, 1)
        latents, _ = denoise(
            lambda x, sigma, level, both=both: both.expand_as(x), torch.zeros(1, 4, 2, 2), sigmas,
            level, level, scale,
        )  # fmt: skip
        assert latents[0, 0, 0, 0].item() == pytest.approx(-(u + scale * (c - u)), rel=1e-6)


def test_no_gradients_are_kept():
    weight = torch.ones(1, requires_grad=True)
    seen = []
    latents, _ = denoise(
        lambda x, sigma: weight * x, noise(1, 2, 2), flow_sigmas(2, 1.0), {},
        callback=lambda *args: seen.append(args[3]),
    )  # fmt: skip
    assert not latents.requires_grad and not any(velocity.requires_grad for velocity in seen)


def plain(latents, sigma, level):
    """A model that knows nothing of regions, nor of layers to skip."""
    return latents


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"latents": torch.zeros(4, 2, 2)}, "latents has shape (4, 2, 2), must be (B, C, H, W)"),
        ({"sigmas": torch.ones(1)}, "sigmas are tensor([1.]), must be (steps + 1,)"),
        ({"latents": 5}, "latents is 5, must be a dense tensor"),
        (
            {"latents": torch.zeros(1, 4, 2, 2, dtype=torch.cfloat)},
            "latents is torch.complex64, must be",
        ),
        ({"sigmas": [1.0, 0.0]}, "sigmas is [1.0, 0.0], must be a dense tensor"),
        ({"cond": None}, "cond is None, must be a dict"),
        ({"uncond": [1], "guidance": 2.0}, "uncond is [1], must be a dict"),
        ({"callback": 5}, "callback is 5, must be a function or None"),
        ({"guidance": "high"}, "guidance is 'high', must be a finite number"),
        ({"guidance": 0.5}, "guidance is 0.5, must be a finite number of at least 1"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"guidance": 2.0}, "needs uncond"),
        ({"guidance": float("inf")}, "guidance is inf"),
        ({"ras": "default"}, "ras is 'default', must be"),
        ({"ras": RASConfig}, "must be a ras.RASConfig, a ras.Upstream or None"),
        ({"ras": RASConfig(), "latents": torch.zeros(1, 4, 3, 4)}, "latents are 3x4, both must be"),
        ({"ras": RASConfig(), "latents": torch.zeros(1, 4, 4, 3)}, "latents are 4x3, both must be"),
        ({"cond": {"level": torch.zeros(3)}}, "cond['level'] has shape (3,), must be (1,)"),
        (
            {"uncond": {"level": torch.zeros(2)}, "guidance": 2.0},
            "uncond['level'] has shape (2,), must be (1,)",
        ),
        ({"uncond": {}, "guidance": 2.0}, "uncond['level'] is missing"),
        (
            {"uncond": {"level": torch.zeros(1, device="meta")}, "guidance": 2.0},
            "uncond['level'] is on meta, must be on cpu",
        ),
        ({"sigmas": torch.ones(3, device="meta")}, "sigmas are tensor(..., device='meta'"),
        ({"sigmas": torch.ones(3).long()}, "sigmas is torch.int64, must be floating point"),
        ({"cond": {"height": torch.zeros(1)}}, "which cannot be given latents, sigma, height: "),
        ({"model": 5}, "model is 5, which cannot be given"),
        (
            {"ras": RASConfig(), "model": plain},
            "cannot be given latents, sigma, level, active, cache",
        ),
        ({"record": Record(), "model": plain}, "level, active, cache: "),
        (
            {"guidance": Guidance(2.0, (0,)), "uncond": {"level": torch.zeros(1)}},
            "cannot be given latents, sigma, level, skip_layers: ",
        ),
        ({"ras": SimpleNamespace(plan=len)}, "must be a ras.RASConfig, a ras.Upstream or None"),
        ({"ras": SimpleNamespace(select=len)}, "must be a ras.RASConfig, a ras.Upstream or None"),
        ({"correct": 1}, "correct is 1, must be True or False"),
        ({"progress": 0}, "progress is 0, must be True or False"),
        ({"known": torch.zeros(1)}, "known is tensor([0.]), must be a Known or None"),
        ({"record": True}, "record is True, must be a Record or None"),
    ],
)
def test_what_does_not_fit_is_named(change, sentence):
    arguments = {
        "latents": torch.zeros(1, 4, 2, 2),
        "sigmas": flow_sigmas(2, 1.0),
        "cond": {"level": torch.zeros(1)},
    }
    with pytest.raises(ValueError) as error:
        denoise(**({"model": lambda x, s, level, active=0, cache=0: x} | arguments | change))
    assert sentence in str(error.value)
