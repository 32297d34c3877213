"""FLUX.1 from the prompt to the picture, against what diffusers' pipeline drew."""

from __future__ import annotations

import json
import re

import pytest
import torch
from conftest import GOLDENS
from safetensors.torch import load_file

from minidit.scheduler import SchedulerConfig

CASE = GOLDENS / "pipe_flux_dev"
INFO = json.loads((CASE / "info.json").read_text())
EXPECTED = load_file(CASE / "expected.safetensors")
DEV = SchedulerConfig(shift=3.0, use_dynamic_shifting=True, spacing="even")
SCHNELL = SchedulerConfig(spacing="even")


@pytest.mark.parametrize("name", [name for name in EXPECTED if name.startswith("schedule/")])
def test_noise_levels_of_dev_at_any_size(name):
    tokens, steps = map(int, re.findall(r"\d+", name))
    levels = DEV.sigmas(steps, "euler", tokens)
    assert (levels - EXPECTED[name]).abs().max() <= INFO["outputs"][name]["tight_atol"]


def test_noise_levels_of_schnell_are_even():
    assert SCHNELL.sigmas(4, "euler", 4096).equal(torch.tensor([1, 0.75, 0.5, 0.25, 0]))
    assert SCHNELL.sigmas(1, "euler", 4096).tolist() == [1, 0]


def test_the_shift_of_dev_is_a_line_of_the_tokens_on_a_logarithmic_scale():
    shifts = [DEV.shift_at(tokens) for tokens in (16, 256, 4096, 6400)]
    assert torch.tensor(shifts).log().tolist() == pytest.approx([0.459375, 0.5, 1.15, 1.54])
    assert SCHNELL.shift_at(4096) == 1.0
    own = torch.tensor([1.0, 0.5, 0.0])
    assert DEV.shifted(own, 256).tolist() == pytest.approx([1, 1 / (1 + 0.606530), 0])


def test_the_corrected_solver_shifts_as_much():
    even = SCHNELL.sigmas(9, "corrected", 256)
    assert torch.allclose(DEV.sigmas(9, "corrected", 256), DEV.shifted(even, 256), atol=1e-6)
