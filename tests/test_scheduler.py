"""Schedules of every solver and spacing, against formulas written out."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minidit.scheduler import SchedulerConfig, even_sigmas, flow_sigmas, spaced_sigmas


@given(st.integers(1, 60), st.floats(0.3, 8), st.floats(0.5, 2))
def test_spaced_levels_are_symmetric_then_shifted(steps, shift, ends):
    wanted = []
    for i in range(steps + 1):
        s = 1 - i / steps
        s = s**ends / (s**ends + (1 - s) ** ends)
        wanted.append(shift * s / (1 + (shift - 1) * s))
    got = spaced_sigmas(steps, shift, ends)
    assert got.dtype == torch.float32 and torch.allclose(got, torch.tensor(wanted), atol=1e-6)


@given(st.integers(1, 60), st.floats(0.3, 8))
def test_even_levels_have_no_denser_ends_and_corrected_ones_have(steps, shift):
    even = torch.linspace(1, 0, steps + 1)
    assert torch.allclose(even_sigmas(steps, shift), shift * even / (1 + (shift - 1) * even))
    assert spaced_sigmas(steps, shift).equal(spaced_sigmas(steps, shift, 1.25))


@given(st.integers(1, 60), st.sampled_from([1.0, 3.0, 1.15]))
def test_levels_are_rounded_to_float32_once(steps, shift):
    exact = [Fraction(steps - i, steps) for i in range(steps + 1)]
    exact = [shift * s / (1 + Fraction(shift - 1) * s) for s in exact]
    levels = even_sigmas(steps, shift).tolist()
    for level, true in zip(levels, exact, strict=True):
        assert abs(level - float(true)) <= 2**-25 * 1.001, (steps, shift)


@pytest.mark.parametrize(
    ("sound", "beyond"),
    [
        ({"shift": 1e-6}, {"shift": 0.9e-6}),
        ({"shift": 1e6}, {"shift": 1.1e6}),
        ({"corrected_shift": 1e-6}, {"corrected_shift": 0.9e-6}),
        ({"corrected_shift": 1e6}, {"corrected_shift": 1.1e6}),
        ({"base_shift": -9.9}, {"base_shift": -10.0}),
        ({"max_shift": 9.9}, {"max_shift": 10.0}),
        ({"max_image_seq_len": 257}, {"max_image_seq_len": 256}),
        ({"default_steps": 1}, {"default_steps": 0}),
        ({"corrected_steps": 1}, {"corrected_steps": 0}),
        ({"spacing": "even"}, {"spacing": "uneven"}),
        ({"default_solver": "corrected"}, {"default_solver": "heun"}),
        ({"default_guidance": 1e6}, {"default_guidance": math.inf}),
    ],
)
def test_values_have_limits(sound, beyond):
    (name,) = beyond
    assert getattr(SchedulerConfig(**sound), name) == sound[name]
    with pytest.raises(ValueError, match=f"{name} is .*, must be "):
        SchedulerConfig(**beyond)


def test_what_no_run_can_have_is_named():
    config = SchedulerConfig()
    for call in (config.steps, lambda solver: config.sigmas(4, solver, 16)):
        with pytest.raises(ValueError, match="solver is 'heun', must be 'euler' or 'corrected'"):
            call("heun")
    for tokens in (0, 1.0, 2**31 + 1):
        with pytest.raises(ValueError, match=f"tokens is {tokens}, must be an integer"):
            config.shift_at(tokens)
    steep = SchedulerConfig(use_dynamic_shifting=True, max_shift=9.0, max_image_seq_len=257)
    with pytest.raises(ValueError, match="shift is inf, must be a finite number within"):
        steep.shift_at(4096)
    with pytest.raises(ValueError, match=r"levels has shape \(1, 2\), must be \(steps \+ 1,\)"):
        config.shifted(torch.ones(1, 2), 16)


def test_guidance_of_1_is_a_default_as_any_other():
    assert SchedulerConfig(default_guidance=1.0).default_guidance == 1
    with pytest.raises(ValueError, match="default_guidance is 0.5, must be at least 1"):
        SchedulerConfig(default_guidance=0.5)


def test_what_a_file_leaves_out_is_sampled_like_sd3():
    config = SchedulerConfig()
    assert (config.default_solver, config.default_guidance, config.spacing) == (
        "euler", 7.0, "trained",
    )  # fmt: skip
    assert (config.steps("euler"), config.steps("corrected")) == (28, 14)
    assert (config.shift, config.corrected_shift, config.use_dynamic_shifting) == (1.0, None, False)
    assert (config.base_shift, config.max_shift) == (0.5, 1.15)  # and between these lengths
    assert (config.base_image_seq_len, config.max_image_seq_len) == (256, 4096)


def test_every_solver_has_its_levels_steps_and_shift():
    config = SchedulerConfig(
        shift=3.0, default_steps=28, corrected_steps=14, corrected_shift=2.0
    )  # fmt: skip
    assert (config.steps("euler"), config.steps("corrected")) == (28, 14)
    assert config.sigmas(9, "euler", 16).equal(flow_sigmas(9, 3.0))
    assert config.sigmas(9, "corrected", 16).equal(spaced_sigmas(9, 2.0))
    assert replace(config, spacing="even").sigmas(9, "euler", 16).equal(even_sigmas(9, 3.0))
    plain = replace(config, corrected_shift=None)
    assert plain.sigmas(9, "corrected", 16).equal(spaced_sigmas(9, 3.0))


@given(st.integers(1, 9000))
def test_a_dynamic_shift_is_exponential_in_the_number_of_tokens(tokens):
    config = SchedulerConfig(use_dynamic_shifting=True, spacing="even")
    shift = math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))
    assert config.shift_at(tokens) == pytest.approx(shift)
    assert torch.allclose(config.sigmas(7, "euler", tokens), even_sigmas(7, shift))
    own = torch.tensor([1.0, 0.4, 0.0])
    assert torch.allclose(config.shifted(own, tokens), shift * own / (1 + (shift - 1) * own))


@given(st.floats(0.2, 12))
def test_levels_of_ones_own_never_go_beyond_one(shift):
    own = torch.cat((torch.linspace(1, 0.99, 50), torch.zeros(1)))
    assert SchedulerConfig(shift=shift).shifted(own, 16).max() <= 1
