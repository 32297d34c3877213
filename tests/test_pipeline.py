"""Prompt to picture against diffusers' pipelines, and what a user may rely on."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDENS
from safetensors.torch import load_file

import minidit
from minidit.pipeline import draw_noise, to_image
from ras import RASConfig

RUNS = [
    (case, run)
    for case in ("pipe_sd3", "pipe_sd35_medium_no_t5", "pipe_lumina")
    for run in json.loads((GOLDENS / case / "info.json").read_text())["runs"]
]
PIPES = ("pipe_sd3", "pipe_lumina")


@cache
def pipeline(name: str):
    return minidit.load(GOLDENS / name)


@pytest.mark.filterwarnings("ignore:.*is cut off")
@pytest.mark.parametrize(("case", "run"), RUNS)
def test_golden(case, run):
    info = json.loads((GOLDENS / case / "info.json").read_text())
    expected = {
        name.split("/")[1]: (value, info["atol"][name])
        for name, value in load_file(GOLDENS / case / "expected.safetensors").items()
        if name.startswith(run + "/")
    }
    call = dict(info["runs"][run]["call"])
    call["steps"], call["guidance"] = call.pop("num_inference_steps"), call.pop("guidance_scale")
    if case != "pipe_lumina":
        call["use_t5"] = info["runs"][run]["t5"]
    after = []
    out = pipeline(case)(
        **call,
        latents=load_file(GOLDENS / case / "inputs.safetensors")[f"{run}/latents"],
        callback=lambda *args: after.append(args[2]),
    )
    assert len(after) == call["steps"]
    for i, latents in enumerate(after, start=1):
        value, atol = expected[f"latents_after_{i}"]
        assert (latents - value).abs().max() <= atol
    value, atol = expected["final_latents"]
    assert (out.latents - value).abs().max() <= atol
    pictures = np.stack([np.asarray(image) for image in out.images])
    assert np.abs(pictures - 255 * expected["image"][0].numpy()).max() <= 0.5 + 255 * 2e-4


@pytest.mark.slow
@pytest.mark.parametrize(("model", "guidance"), [("mini-sd3", 3.0), ("mini-lumina", 4.0)])
def test_embedded_model_draws_what_diffusers_draws_from_it(model, guidance):
    """12 steps at 256 px, float32; diffusers 0.38.0 loaded the same folder, and for mini-lumina was
    given the embeddings of our token numbers (weights/README.md says why)."""
    initial = load_file(GOLDENS / "mini-sd3" / "expected.safetensors")["initial_latents"]
    expected = load_file(GOLDENS / model / "expected.safetensors")["final_latents"]
    prompts = [
        "red apple on a sky blue background",
        "smiling face with sunglasses on a navy blue background",
    ]
    pipe = minidit.load(model)
    out = pipe(prompts, steps=12, guidance=guidance, latents=initial)
    assert (out.latents - expected).abs().max() < 1e-3
    # the prompt's background: sky blue is (135, 206, 235), navy blue (10, 20, 90)
    for image, colour in zip(out.images, ((135, 206, 235), (10, 20, 90)), strict=True):
        corner = np.asarray(image, dtype=float)[2:6, 2:6].mean(axis=(0, 1))
        assert np.abs(corner - colour).max() < 40


@pytest.fixture(params=PIPES)
def pipe(request):
    return pipeline(request.param)


def draw(pipe, prompt="a cat", **kwargs):
    return pipe(prompt, **({"steps": 2, "guidance": 3.0, "height": 32, "width": 48} | kwargs))


def test_picture_i_of_a_seed_is_the_same_whatever_the_batch(pipe):
    many = draw(pipe, ["a cat", "two dogs"], seed=3, num_images=3)
    assert len(many.images) == 6 and many.seed == 3
    few = draw(pipe, "a cat", seed=3, num_images=2)
    assert torch.allclose(many.latents[:2], few.latents, atol=1e-4)
    assert torch.allclose(many.latents[0], draw(pipe, "a cat", seed=3).latents[0], atol=1e-4)
    assert not torch.allclose(many.latents[0], many.latents[1], atol=1e-1)
    if pipe is not pipeline("pipe_lumina"):  # there a prompt is padded to its neighbours' length
        dogs = draw(pipe, "two dogs", seed=3, num_images=3)
        assert torch.allclose(many.latents[3:], dogs.latents, atol=1e-4)


def test_the_same_seed_has_the_same_bits_and_another_seed_another_picture(pipe):
    assert draw(pipe, seed=0).latents.equal(draw(pipe, seed=0).latents)
    assert not draw(pipe, seed=0).latents.equal(draw(pipe, seed=1).latents)


def test_a_drawn_seed_is_told_and_repeats_the_picture(pipe):
    first = draw(pipe)
    assert first.latents.equal(draw(pipe, seed=first.seed).latents)


def test_noise_is_a_prefix_of_the_same_generators_batch():
    batch = torch.randn(5, 4, 6, 8, generator=torch.Generator().manual_seed(9))
    assert draw_noise((4, 6, 8), 9, 5).equal(batch)
    assert draw_noise((4, 6, 8), 9, 2).equal(batch[:2])


def test_sizes_negative_prompts_and_guidance_do_what_they_say(pipe):
    out = draw(pipe, seed=0)
    assert out.images[0].size == (48, 32) and out.latents.shape[2:] == (4, 6) and out.trace is None
    assert not draw(pipe, seed=0, negative_prompt="ugly").latents.equal(out.latents)
    unguided = draw(pipe, seed=0, guidance=1)
    assert unguided.latents.equal(draw(pipe, seed=0, guidance=1, negative_prompt="ugly").latents)


def test_ras_and_callback_go_through(pipe):
    seen = []
    out = draw(
        pipe, seed=0, steps=5, ras=RASConfig(start=2, refresh=0), num_images=2,
        callback=lambda step, *_: seen.append(step),
    )  # fmt: skip
    assert seen == [0, 1, 2, 3, 4]
    assert [step.regional for step in out.trace.steps] == [False, False, True, True, True]
    assert out.trace.heat().shape == (2, 3) and out.trace.active[2].shape == (2, 6)


@pytest.mark.parametrize("prompt", ["", "🎈 party 🎉", "一只猫", "tab\tnull\x00bell\x07", "\ud800"])
def test_odd_prompts_are_fine(pipe, prompt):
    assert torch.isfinite(draw(pipe, prompt, seed=0).latents).all()


def test_what_is_cut_off_is_quoted(pipe):
    with pytest.warns(UserWarning) as seen:
        draw(pipe, "a cat " * 300 + "and a lighthouse", seed=0)
    assert any(re.search("lighthouse.* is cut off", str(one.message)) for one in seen)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prompt": 7}, "prompt is 7, must be a string or a list of strings"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt has 2 strings, must have one or 1"),
        ({"height": 40}, "height is 40, must be a positive multiple of"),
        ({"width": 0}, "width is 0, must be a positive multiple of"),
        ({"steps": 0}, "steps is 0"),
        ({"guidance": 0.0}, "guidance is 0.0, must be a number of at least 1"),
        ({"guidance": "high"}, "guidance is 'high'"),
        ({"seed": "a"}, "seed is 'a'"),
        ({"num_images": 0}, "num_images is 0"),
        ({"ras": 0.5}, "ras is 0.5, must be a ras.RASConfig"),
        ({"ras": RASConfig(start=1, end=5)}, "end is 5, must be within 1..1 in this run"),
        ({"latents": torch.zeros(1, 3, 4, 6)}, "latents have shape (1, 3, 4, 6)"),
        ({"latents": torch.zeros(2, 4, 4, 6)}, "latents have shape (2, 4, 4, 6)"),
        ({"latents": torch.zeros(1, 4, 8, 6)}, "but 48x32 was asked"),
        ({"latents": torch.zeros(4, 4)}, "latents must be a tensor of shape"),
    ],
)
def test_bad_arguments_are_named(pipe, change, sentence):
    if "latents" in change and pipe is pipeline("pipe_sd3") and change["latents"].ndim == 4:
        change = {"latents": change["latents"].repeat(1, 4, 1, 1)}
        sentence = sentence.replace("(1, 3,", "(1, 12,").replace("(2, 4,", "(2, 16,")
    with pytest.raises(ValueError) as error:
        draw(pipe, **change)
    assert sentence in str(error.value)


def test_offload_changes_nothing_but_where_the_parts_are(pipe):
    name = PIPES[[pipeline(p) for p in PIPES].index(pipe)]
    away = minidit.load(GOLDENS / name, offload=True)
    assert draw(away, seed=0).latents.equal(draw(pipe, seed=0).latents)


@pytest.mark.parametrize("name", PIPES)
def test_offload_never_holds_more_than_the_largest_part(name, monkeypatch):
    """cpu:0 plays the accelerator: every move there and back is added up."""
    moved, held, peak, to = torch.nn.Module.to, 0, [], torch.device("cpu:0")

    def counting(module, device, *args):
        nonlocal held
        size = sum(tensor.nbytes for tensor in module.state_dict().values())
        held += size if device == to else -size
        peak.append(held)
        return moved(module, device, *args)

    pipe = minidit.load(GOLDENS / name, device=to, offload=True)
    monkeypatch.setattr(torch.nn.Module, "to", counting)
    draw(pipe, seed=0)
    parts = [part for part in vars(pipe).values() if isinstance(part, torch.nn.Module)]
    largest = max(sum(x.nbytes for x in part.state_dict().values()) for part in parts)
    assert len(peak) == 2 * len(parts)  # every part is moved once: prompts are encoded once
    assert held == 0 and max(peak) <= 1.15 * largest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", PIPES)
def test_half_precision_draws_nearly_the_same(name, dtype):
    half = minidit.load(GOLDENS / name, dtype=dtype)
    assert half.transformer.patch_embed.weight.dtype == dtype
    upcast = dtype == torch.float16 and half.vae.config.force_upcast
    assert half.vae.encoder.conv_in.weight.dtype == (torch.float32 if upcast else dtype)
    latents = draw(half, seed=0).latents
    expected = draw(pipeline(name), seed=0).latents
    assert latents.dtype == torch.float32
    assert (latents - expected).abs().max() < 0.1 * expected.abs().max()


def test_to_image_clamps_and_rounds():
    pixels = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).expand(3, 1, 5)
    assert np.asarray(to_image(pixels))[0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_goldens_are_small():
    size = sum(path.stat().st_size for path in Path(GOLDENS).rglob("*") if path.is_file())
    assert size < 20 * 2**20
