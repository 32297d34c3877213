"""FLUX.1 from the prompt to the picture, against what diffusers' pipeline drew."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import GOLDENS, randomised, rounding
from safetensors.torch import load_file

import minidit
from minidit import Flux
from minidit.scheduler import SchedulerConfig
from ras import RASConfig

CASE = GOLDENS / "pipe_flux_dev"
INFO = json.loads((CASE / "info.json").read_text())
EXPECTED = load_file(CASE / "expected.safetensors")
DEV = SchedulerConfig(shift=3.0, use_dynamic_shifting=True, spacing="even")
SCHNELL = SchedulerConfig(spacing="even", default_steps=4, corrected_steps=4, default_guidance=1.0)
OURS = {  # diffusers' names and ours
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "true_cfg_scale": "true_guidance",
    "num_images_per_prompt": "num_images",
}


@cache
def dev() -> minidit.Pipeline:
    return minidit.load(CASE)


@cache
def schnell() -> minidit.Pipeline:
    """The same model without guidance, with schnell's scheduler."""
    network = randomised(Flux(replace(dev().transformer.config, guidance_embeds=False)))
    return replace(dev(), transformer=network, scheduler=SCHNELL)


def draw(pipe: minidit.Pipeline, **kwargs):
    """Latents of a small picture in two steps."""
    call = {"prompt": "a cat", "height": 32, "width": 48, "steps": 2, "seed": 0}
    return pipe(**(call | {"max_sequence_length": 16, "output": "latent"} | kwargs)).latents


@pytest.mark.filterwarnings("ignore:.*is cut off")
@pytest.mark.parametrize("run", INFO["call"])
def test_golden(run):
    call = {OURS.get(name, name): value for name, value in INFO["call"][run].items()}
    seen = []
    out = dev()(
        **call,
        latents=load_file(CASE / "inputs.safetensors")[f"{run}/latents"],
        output="numpy",
        callback=lambda *step: seen.append(step),
    )
    found = {
        "final_latents": out.latents,
        "latents_after_1": seen[0][2],
        "sigmas": torch.tensor([*(step[1] for step in seen), 0.0]),
        "image": torch.from_numpy(out.images),
    }
    if f"{run}/prompt_embeds" in EXPECTED:
        cond = dev().encode(call["prompt"], [], prompt_2=call["prompt_2"], max_sequence_length=24)
        found |= {"prompt_embeds": cond["context"], "pooled_prompt_embeds": cond["pooled"]}
    names = {name.split("/")[1] for name in EXPECTED if name.startswith(run + "/")}
    assert {"final_latents", "latents_after_1", "sigmas"} <= names <= found.keys()
    for name in names:
        atol = rounding(INFO["outputs"][f"{run}/{name}"])
        assert (found[name] - EXPECTED[f"{run}/{name}"]).abs().max() <= atol, name


@pytest.mark.parametrize("name", [name for name in EXPECTED if name.startswith("schedule/")])
def test_noise_levels_of_dev_at_any_size(name):
    tokens, steps = map(int, re.findall(r"\d+", name))
    levels = DEV.sigmas(steps, "euler", tokens)
    assert (levels - EXPECTED[name]).abs().max() <= rounding(INFO["outputs"][name])


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


def test_what_is_not_given_is_what_the_scheduler_asks_for():
    for pipe, steps, guidance, tokens in ((dev(), 28, 3.5, 512), (schnell(), 4, 1.0, 256)):
        plain = draw(pipe, steps=None, guidance=None, max_sequence_length=None)
        same = {"steps": steps, "guidance": guidance, "max_sequence_length": tokens}
        assert plain.equal(draw(pipe, **same))
        assert not plain.equal(draw(pipe, **same | {"max_sequence_length": tokens - 1}))


def test_guidance_is_an_input_of_dev_and_nothing_to_schnell(monkeypatch):
    one, other = draw(dev(), guidance=1), draw(dev(), guidance=3)
    assert not torch.allclose(one, other, atol=1e-2)
    assert draw(schnell(), guidance=0.0).equal(draw(schnell(), guidance=3.5))
    batches = []
    monkeypatch.setattr(dev().transformer, "forward", spy(dev().transformer.forward, batches))
    draw(dev(), guidance=3)
    assert batches == [1, 1]  # no second half
    draw(dev(), guidance=3, true_guidance=2)
    assert batches[2:] == [2, 2]


def spy(forward, batches: list[int]):
    """The same function, which notes how large its batches are."""

    def noted(latents, *args, **kwargs):
        batches.append(len(latents))
        return forward(latents, *args, **kwargs)

    return noted


@pytest.mark.parametrize("pipe", [dev, schnell])
def test_a_negative_prompt_acts_under_true_guidance_alone(pipe):
    plain = draw(pipe())
    with pytest.warns(UserWarning, match="negative_prompt is ignored: true_guidance is 1, off"):
        assert draw(pipe(), negative_prompt="ugly").equal(plain)
    guided = draw(pipe(), negative_prompt="ugly", true_guidance=3)
    assert not guided.equal(draw(pipe(), negative_prompt="a dog", true_guidance=3))
    # the prompt as its own negative: u + g (c - u) = c
    assert torch.allclose(draw(pipe(), negative_prompt="a cat", true_guidance=3), plain, atol=1e-4)


@pytest.mark.parametrize("pipe", [dev, schnell])
@pytest.mark.parametrize("solver", ["euler", "corrected"])
def test_regions_go_through(pipe, solver):
    call = {"prompt": "a cat", "height": 64, "width": 48, "steps": 12, "seed": 0, "solver": solver}
    out = pipe()(**call, max_sequence_length=16, output="latent", ras=RASConfig(ratio=0.5))
    dense = pipe()(**call, max_sequence_length=16, output="latent").latents
    assert 0.5 < out.trace.share < 0.9
    assert torch.isfinite(out.latents).all() and not out.latents.equal(dense)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"true_guidance": 0.5},
            "must be a finite number of at least 1 (1 is off)",
        ),
        ({"guidance": -1}, "guidance is -1, must be a finite number of at least 0"),
        ({"max_sequence_length": 513}, "max_sequence_length is 513, must be an integer within 2.."),
        ({"prompt_2": ["a", "b"]}, "prompt_2 has 2 strings, must have one or 1"),
        (
            {"use_t5": False},
            "this model takes no use_t5; allowed are prompt_2, max_sequence_length",
        ),
        ({"height": 40}, "height is 40, must be a positive multiple of 16"),
    ],
)
def test_bad_arguments_are_named(change, sentence):
    for pipe in (dev(), schnell()):
        with pytest.raises(ValueError) as error:
            draw(pipe, **change)
        assert sentence in str(error.value)
