"""Prompt to picture against diffusers' pipelines, and what a user may rely on."""

from __future__ import annotations

import copy
import json
import re
import warnings
from functools import cache
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDENS, conditioning, noise, tiny_model
from safetensors.torch import load_file

import minidit
from minidit import checks
from minidit.conditioning import FAMILIES, options_of
from minidit.flow import Guidance, denoise, flow_sigmas
from minidit.pipeline import draw_noise, own_levels, to_array, to_image
from ras import RASConfig
from ras.plan import MOST_STEPS
from ras.tokens import patchify

RUNS = [
    (case, run)
    for case in (
        "pipe_sd3",
        "pipe_sd35_medium_no_t5",
        "pipe_sd35_slg",
        "pipe_lumina",
        "pipe_lumina2",
    )
    for run in json.loads((GOLDENS / case / "info.json").read_text())["runs"]
]
PIPES = ("pipe_sd3", "pipe_lumina", "pipe_flux_dev", "pipe_lumina2")
OURS = {  # diffusers' names and ours
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "skip_guidance_layers": "skip_layers",
    "skip_layer_guidance_scale": "skip_guidance",
    "skip_layer_guidance_start": "skip_start",
    "skip_layer_guidance_stop": "skip_stop",
}


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
    call = {OURS.get(name, name): value for name, value in info["runs"][run]["call"].items()}
    steps = call.pop("steps") if "sigmas" in call else call["steps"]
    if "t5" in info["runs"][run] and case != "pipe_lumina":
        call["use_t5"] = info["runs"][run]["t5"]
    after, levels = [], []

    def callback(step, sigma, latents, velocity, active):
        after.append(latents)
        levels.append(sigma)

    latents = load_file(GOLDENS / case / "inputs.safetensors")[f"{run}/latents"]
    out = pipeline(case)(**call, latents=latents, callback=callback)
    assert len(after) == steps
    for i, latents in enumerate(after, start=1):
        if f"latents_after_{i}" in expected:  # in long runs not every step is recorded
            value, atol = expected[f"latents_after_{i}"]
            assert (latents - value).abs().max() <= atol
    value, atol = expected["final_latents"]
    assert (out.latents - value).abs().max() <= atol
    if "sigmas" in expected:
        assert torch.allclose(torch.tensor(levels), expected["sigmas"][0][:-1], atol=1e-6)
    if "image" in expected:
        pictures = np.stack([np.asarray(image) for image in out.images])
        assert np.abs(pictures - 255 * expected["image"][0].numpy()).max() <= 0.5 + 255 * 2e-4


@pytest.mark.slow
@pytest.mark.parametrize(("model", "guidance"), [("mini-sd3", 3.0), ("mini-lumina", 1.0)])
def test_embedded_model_draws_what_diffusers_draws_from_it(model, guidance):
    """12 steps at 256 px, float32; diffusers 0.38.0 loaded the same folder, and for mini-lumina was
    given the embeddings of our token numbers and no guidance (weights/README.md says why)."""
    initial = load_file(GOLDENS / "mini-sd3" / "expected.safetensors")["initial_latents"]
    expected = load_file(GOLDENS / model / "expected.safetensors")["final_latents"]
    prompts = [
        "a red apple on a sky blue background",
        "a smiling face with sunglasses on a navy blue background",
    ]
    pipe = minidit.load(model)
    out = pipe(prompts, steps=12, guidance=guidance, latents=initial, solver="euler")
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


def test_a_drawn_seed_has_32_bits(monkeypatch):
    monkeypatch.setattr("secrets.randbelow", lambda limit: limit - 1)
    assert draw(pipeline("pipe_sd3"), steps=1).seed == 2**32 - 1


def test_noise_is_a_prefix_of_the_same_generators_batch():
    batch = torch.randn(5, 4, 6, 8, generator=torch.Generator().manual_seed(9))
    assert draw_noise((4, 6, 8), 9, 5).equal(batch)
    assert draw_noise((4, 6, 8), 9, 2).equal(batch[:2])
    assert not draw_noise((4, 6, 8), -9, 2).equal(batch[:2])


@pytest.mark.parametrize("pipe", ["pipe_sd3", "pipe_lumina"], indirect=True)
def test_sizes_negative_prompts_and_guidance_do_what_they_say(pipe):
    out = draw(pipe, seed=0)
    assert out.images[0].size == (48, 32) and out.latents.shape[2:] == (4, 6) and out.trace is None
    assert not draw(pipe, seed=0, negative_prompt="ugly").latents.equal(out.latents)
    unguided = draw(pipe, seed=0, guidance=1)
    with pytest.warns(UserWarning, match="negative_prompt is ignored: guidance is 1, off"):
        assert unguided.latents.equal(
            draw(pipe, seed=0, guidance=1, negative_prompt="ugly").latents
        )


def test_what_is_not_given_is_what_the_scheduler_asks_for(pipe):
    plain = pipe("a cat", seed=0, height=32, width=48)
    s = pipe.scheduler
    steps, guidance = s.steps(s.default_solver), s.default_guidance
    given = draw(pipe, seed=0, steps=steps, guidance=guidance, solver=s.default_solver)
    assert plain.latents.equal(given.latents)
    size = pipe.transformer.config.sample_size
    assert draw(pipe, height=None, width=None).latents.shape[2:] == (size, size)


def test_latents_of_ones_own_are_the_noise_and_have_no_seed(pipe):
    noise = draw_noise((pipe.vae.config.latent_channels, 4, 6), 5, 2)
    seeded = draw(pipe, seed=5, num_images=2)
    own = draw(pipe, latents=noise.double(), num_images=2, height=None, width=None)
    assert own.latents.equal(seeded.latents)
    assert own.seed is None and seeded.seed == 5


def test_seeds_and_sizes_have_limits():
    for seed in (-(2**63), -1, 2**64 - 1):
        assert draw_noise((1,), seed, 1).isfinite().all()
    for seed in (-(2**63) - 1, 2**64):
        with pytest.raises(ValueError, match="seed is .*, must be an integer within"):
            draw_noise((1,), seed, 1)
    pipe = pipeline("pipe_sd3")
    assert pipe._latent_shape(8192, 8192) == (16, 1024, 1024)
    with pytest.raises(ValueError, match="height is 8208 and width 8192, at most 67,108,864"):
        pipe._latent_shape(8208, 8192)
    assert checks.texts("prompt", "x" * 20_000) == ["x" * 20_000]
    for long in ("x" * 20_001, ["", "x" * 20_001]):
        with pytest.raises(ValueError, match="prompt has 20,001 characters, at most 20,000"):
            checks.texts("prompt", long)


def test_a_negative_prompt_of_one_picture_is_not_lost():
    """The warning is about all of them, and points at the caller."""
    pipe, prompts = pipeline("pipe_lumina"), ["a cat", "a dog"]
    with pytest.warns(UserWarning, match="negative_prompt is ignored: guidance is 1") as caught:
        pipe(prompts, negative_prompt=["", "ugly"], guidance=1, steps=1, height=32, width=32)
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(prompts, negative_prompt=["", ""], guidance=1, steps=1, height=32, width=32)


def test_encode_takes_texts():
    pipe = pipeline("pipe_lumina")
    assert len(pipe.encode("a cat", "ugly")["context"]) == 2
    for wrong in (None, [5], 0):
        with pytest.raises(ValueError, match="negatives is .*, must be a"):
            pipe.encode(["a cat"], wrong)
        with pytest.raises(ValueError, match="prompts is .*, must be a"):
            pipe.encode(wrong)


def test_a_generator_draws_the_batch_at_once(pipe):
    def generator():
        return torch.Generator().manual_seed(4)

    shape = (2, pipe.vae.config.latent_channels, 4, 6)
    noise = torch.randn(shape, generator=generator())
    out = draw(pipe, ["a cat", "two dogs"], generator=generator())
    assert out.latents.equal(draw(pipe, ["a cat", "two dogs"], latents=noise).latents)
    assert out.seed is None


def test_outputs_show_the_same_picture(pipe):
    pil = draw(pipe, seed=0, num_images=2)
    assert pil.images[0] != pil.images[1]
    array = draw(pipe, seed=0, num_images=2, output="numpy")
    latent = draw(pipe, seed=0, num_images=2, output="latent")
    assert latent.images == [] and latent.latents.equal(pil.latents)
    assert array.images.dtype == np.float32 and array.images.shape == (2, 32, 48, 3)
    assert array.images.min() >= 0 and array.images.max() <= 1
    assert np.abs(255 * array.images - np.stack(pil.images)).max() <= 0.501


def test_sigmas_are_shifted_and_end_with_0(pipe):
    def levels(sigmas):
        seen = []
        draw(pipe, steps=None, sigmas=sigmas, callback=lambda *args: seen.append(args[1]))
        return seen

    shift, own = pipe.scheduler.shift_at(tokens=6), [1.0, 0.5, 0.2]
    want = pytest.approx([shift * s / (1 + (shift - 1) * s) for s in own])
    assert levels(own) == want
    assert levels([*own, 0]) == want and levels(torch.tensor(own)) == want
    assert levels([1]) == levels([1, 0]) == levels(torch.tensor([1])) == pytest.approx([1.0])
    assert levels(np.array(own)) == want


def test_solvers_differ_and_euler_is_the_official_one(pipe):
    euler, corrected = (
        draw(pipe, seed=0, steps=4, solver=s).latents for s in ("euler", "corrected")
    )
    assert not torch.allclose(euler, corrected, atol=1e-3)
    euler, corrected = (
        draw(pipe, seed=0, steps=None, sigmas=[1, 0.6, 0.3], solver=s).latents
        for s in ("euler", "corrected")
    )
    assert not torch.allclose(euler, corrected, atol=1e-3)  # also on the same levels


def test_ras_and_callback_go_through(pipe):
    seen = []
    out = draw(
        pipe, seed=0, steps=5, ras=RASConfig(start=2, end=None, refresh=0), num_images=2,
        callback=lambda step, *_: seen.append(step),
    )  # fmt: skip
    assert seen == [0, 1, 2, 3, 4]
    assert [step.regional for step in out.trace.steps] == [False, False, True, True, True]
    assert out.trace.heat().shape == (2, 3) and out.trace.active[2].shape == (2, 6)


def test_numbers_of_numpy_are_numbers(pipe):
    plain = draw(pipe, seed=3, num_images=2)
    numpy = draw(
        pipe, seed=np.int64(3), num_images=np.int32(2), steps=np.int64(2), guidance=np.float32(3),
        height=np.int16(32), width=np.uint8(48), progress=np.bool_(False),
    )  # fmt: skip
    assert numpy.latents.equal(plain.latents)


def test_moving_moves_every_part(pipe):
    name = PIPES[[pipeline(p) for p in PIPES].index(pipe)]
    moved = minidit.load(GOLDENS / name)
    assert moved.to("meta") is moved and moved.device.type == "meta"
    parts = [part for part in vars(moved).values() if isinstance(part, torch.nn.Module)]
    assert all(p.is_meta for part in parts for p in part.parameters())
    with pytest.raises(ValueError, match="this model is on the meta device, which has no data"):
        draw(moved)
    for device in ("cuda:99", "gpu", 1.5, torch.float16):
        with pytest.raises(ValueError, match="device .* is not available here"):
            moved.to(device)


def test_a_move_that_fails_is_undone(pipe, monkeypatch):
    moves, move = [], torch.nn.Module.to

    def failing(self, where):
        moves.append(where)
        if len(moves) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return move(self, torch.device("cpu"))

    monkeypatch.setattr(torch.nn.Module, "to", failing)
    with pytest.raises(torch.OutOfMemoryError):
        pipe.to("cpu:0")
    parts = sum(isinstance(part, torch.nn.Module) for part in vars(pipe).values())
    assert moves[2:] == [torch.device("cpu")] * parts and pipe.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"device": "gpu"}, "device 'gpu' is not available here"),
        ({"device": 1.5, "offload": True}, "device 1.5 is not available here"),
        ({"offload": "yes"}, "offload is 'yes', must be True or False"),
        ({"use_t5": 1}, "use_t5 is 1, must be True or False"),
        ({"extra": "abc"}, "extra is 'abc', must be a list of files or folders"),
        ({"device": "x" * 5000}, "is not available here"),
        ({"dtype": "x" * 5000}, "dtype is 'xxx"),
    ],
)
def test_bad_arguments_of_load_are_named(options, sentence):
    with pytest.raises(ValueError) as error:
        minidit.load(GOLDENS / "pipe_sd3", **options)
    assert sentence in str(error.value) and len(str(error.value)) < 400
    with pytest.raises(ValueError, match="family is 'sdxl', must be 'sd3' or 'lumina'"):
        minidit.Pipeline(
            family="sdxl", transformer=None, vae=None, scheduler=None, text_encoder=None,
            tokenizer=None,
        )  # fmt: skip


def test_a_result_that_is_not_finite_is_no_picture(pipe):
    name = PIPES[[pipeline(p) for p in PIPES].index(pipe)]
    broken = minidit.load(GOLDENS / name)
    broken.transformer.patch_embed.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="the result has values that are not finite"):
        draw(broken)
    broken = minidit.load(GOLDENS / name)  # of one value in each patch alone
    broken.transformer.final.linear.bias.data[0] = torch.inf
    with pytest.raises(ValueError, match="the result has values that are not finite"):
        draw(broken, guidance=1, steps=1)  # a second step would spread it


def encoded(pipe, *args, **kwargs):
    return pipe.encode(*args, **kwargs)["context"]


def test_prompts_of_sd3_go_to_the_encoders_that_they_are_for():
    """CLIP-L's columns, CLIP-G's, and T5's rows, each changed by its own prompt alone."""
    pipe = pipeline("pipe_sd3")
    left = pipe.text_encoder.config.hidden_size
    window = pipe.text_encoder.config.max_position_embeddings

    def parts(prompt, **kwargs):
        context = encoded(pipe, [prompt], **kwargs)
        clip = context[:, :window]
        return clip[..., :left], clip[..., left:], context[:, window:]

    def same(a, b):
        return [x.equal(y) for x, y in zip(a, b, strict=True)]

    cat, dog = parts("a cat"), parts("two dogs")
    assert same(cat, dog) == [False, False, False]
    assert same(parts("a cat", prompt_2=["two dogs"]), cat) == [True, False, True]
    assert same(parts("a cat", prompt_2=["two dogs"]), dog) == [False, True, False]
    assert same(parts("a cat", prompt_3="two dogs"), dog) == [False, False, True]
    assert not parts("a cat", use_t5=False)[2].any()


def test_t5_gets_no_more_tokens_than_its_tokenizer_allows(monkeypatch):
    pipe = pipeline("pipe_sd3")
    window = pipe.text_encoder.config.max_position_embeddings
    for allowed, length in ((None, 40), (512, 40), (16, 16)):
        monkeypatch.setattr(pipe.tokenizer_3, "model_max_length", allowed)
        for use_t5 in (True, False):
            context = encoded(pipe, ["a cat"], max_sequence_length=40, use_t5=use_t5)
            assert context.shape[1] == window + length


def test_negatives_come_first_and_prompts_after_them(pipe):
    both = pipe.encode(["a cat", "a cat"], ["two dogs", ""])
    alone = pipe.encode(["a cat"])
    for name, rows in alone.items():
        found = both[name][2:].float()
        assert torch.allclose(found, rows.expand_as(found).float(), atol=1e-5)
        assert not both[name][:1].equal(rows) or name == "context_mask"


def test_lumina_pads_texts_to_a_multiple_of_8():
    """The recorded runs would not notice: their masks hide the padding."""
    pipe = pipeline("pipe_lumina")
    for words in (1, 5, 9, 14):
        mask = pipe.encode(["cat " * words], ["dog"])["context_mask"]
        length = len(pipe.tokenizer.encode(("cat " * words).strip()))
        assert mask.shape == (2, -(-length // 8) * 8)
        assert mask[1].sum() == length  # of the prompt, which is lower case and stripped already


@pytest.mark.parametrize("ratio", [0.3, 1.0])
def test_truncated_guidance_with_ras_of_every_token_is_dense(ratio):
    pipe, how = pipeline("pipe_lumina2"), {"cfg_trunc_ratio": ratio, "steps": 8, "seed": 0}
    dense = draw(pipe, **how)
    assert draw(pipe, ras=RASConfig(ratio=1), **how).latents.equal(dense.latents)
    regional = draw(pipe, ras=RASConfig(ratio=0.5), **how)
    assert regional.trace.share < 1 and not regional.latents.equal(dense.latents)
    error = (regional.latents - dense.latents).norm() / dense.latents.norm()
    assert error < 0.5, error


@pytest.mark.parametrize("prompt", ["", "🎈 party 🎉", "一只猫", "tab\tnull\x00bell\x07", "\ud800"])
def test_odd_prompts_are_fine(pipe, prompt):
    assert torch.isfinite(draw(pipe, prompt, seed=0).latents).all()


def test_what_is_cut_off_is_quoted(pipe):
    with pytest.warns(UserWarning) as seen:
        draw(pipe, "a cat " * 300 + "and a lighthouse" + " by the sea" * 300, seed=0)
    said = [str(one.message) for one in seen if "is cut off" in str(one.message)]
    assert said and all(re.search("'.*(cat|sea).*\\.\\.\\. is cut off", text) for text in said)
    assert max(map(len, said)) < 160


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd3.5-medium", "lumina", "flux-dev"])
def test_networks_compile_without_a_graph_break(kind):
    """Dense, dense with a cache, regional, and one more where a size is found to vary."""
    model, graphs = copy.deepcopy(tiny_model(kind)), []
    arguments = (noise(1, 8, 6), flow_sigmas(8, 3.0), conditioning(kind, 1), conditioning(kind, 1))
    plain, trace = denoise(model, *arguments, 3.0, ras=RASConfig())
    torch._dynamo.reset()
    model.compile(fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    compiled, _ = denoise(model, *arguments, 3.0, ras=RASConfig())
    assert torch.allclose(compiled, plain, atol=1e-5) and 3 <= len(graphs) <= 5
    assert {step.regional for step in trace.steps} == {True, False}


@pytest.mark.parametrize("steps", [1, 2, MOST_STEPS, MOST_STEPS + 1])
def test_levels_of_ones_own_end_with_0_and_are_at_most_ten_thousand_steps(steps):
    levels = torch.linspace(1, 0, steps + 1)
    for given in (levels, levels[:-1], levels.tolist()):
        if steps > MOST_STEPS:
            with pytest.raises(ValueError, match="must be 1 to 10000 falling noise levels"):
                own_levels(given)
        else:
            assert own_levels(given).equal(levels)


@pytest.mark.parametrize(("skip_start", "passes"), [(0.0, 4), (0.3, 3)])
def test_skip_layer_guidance_works_with_regions(skip_start, passes):
    """Steps so close that a regional one must give what a dense one gives at its active tokens. The
    pass without the layers has keys of its own; where it starts, it computes every token."""
    model, calls = tiny_model("sd3.5-medium"), []

    class Spy(torch.nn.Module):
        config, guided_channels = model.config, None

        def forward(self, *args, active=None, cache=None, skip_layers=(), **cond):
            calls.append((len(args[0]), skip_layers, active is not None, cache))
            return model(*args, active=active, cache=cache, skip_layers=skip_layers, **cond)

    sigmas = torch.tensor([1.0, 1 - 1e-6, 1 - 2e-6, 1 - 3e-6, 1 - 4e-6, 0.5])
    guidance = Guidance(3.0, skip_layers=(1,), skip_start=skip_start, skip_stop=1.0)

    def velocities(ras):
        seen = []
        cond, uncond = conditioning("sd3.5-medium", 2), conditioning("sd3.5-medium", 2, seed=9)
        denoise(
            Spy(), noise(2, 8, 6), sigmas, cond, uncond, guidance, ras=ras,
            callback=lambda *args: seen.append((args[3], args[4])),
        )  # fmt: skip
        return seen

    dense = velocities(None)
    assert [batch for batch, *_ in calls] == [4] * (5 - passes) + [4, 2] * passes
    calls.clear()
    regional = velocities(RASConfig(ratio=0.5, start=2, end=None, refresh=0))
    for (all_of_it, _), (some_of_it, active) in zip(dense, regional, strict=True):
        if active is not None:
            a, b = (patchify(v, 2).flatten(2) for v in (all_of_it, some_of_it))  # (B, N, P*P*C)
            index = active[..., None].expand(-1, -1, a.shape[2])
            a, b = a.gather(1, index), b.gather(1, index)
            assert torch.allclose(a, b, atol=1e-3) and a.abs().mean() > 0.1
    skipping = [(active, cache) for _, layers, active, cache in calls if layers]
    assert [active for active, _ in skipping] == [False] + [True] * (passes - 1)
    main = [cache for _, layers, _, cache in calls if not layers and cache is not None]
    assert len({id(cache) for _, cache in skipping if cache is not None}) == 1
    assert skipping[-1][1] is not main[-1] and main[-1].nbytes == 0  # and nothing is left


BAD = [
    ({"prompt": 7}, "prompt is 7, must be a string or a list of strings"),
    ({"prompt": []}, "prompt is an empty list"),
    ({"prompt": {"a": 1}}, "prompt is {'a': 1}, must be a string or a list"),
    ({"negative_prompt": ["a", "b"]}, "negative_prompt has 2 strings, must have one or 1"),
    ({"negative_prompt": None}, "negative_prompt is None, must be a string"),
    ({"height": 40}, "height is 40, must be a positive multiple of"),
    ({"width": 0}, "width is 0, must be an integer of at least"),
    ({"width": True}, "width is True, must be an integer"),
    ({"height": 32.0}, "height is 32.0, must be an integer"),
    ({"height": 16 * 10**8}, "height is 1600000000 and width 48, at most 67,108,864"),
    ({"height": 16000, "width": 16000}, "height is 16000 and width 16000, at most 67,108,864"),
    ({"steps": 0}, "steps is 0, must be an integer within 1..10000"),
    ({"steps": 10**12}, "steps is 1000000000000, must be an integer within 1..10000"),
    ({"steps": True}, "steps is True"),
    ({"steps": "4"}, "steps is '4'"),
    ({"guidance": "high"}, "guidance is 'high'"),
    ({"guidance": float("inf")}, "guidance is inf, must be a finite number"),
    ({"guidance": float("nan")}, "guidance is nan, must be a finite number"),
    ({"guidance": 10**400}, "guidance is 1000"),
    ({"guidance": 10**5000}, "guidance is "),
    ({"guidance": torch.tensor(3.0)}, "guidance is tensor(3.), must be a finite number"),
    ({"guidance": True}, "guidance is True"),
    ({"seed": "a"}, "seed is 'a', must be an integer"),
    ({"seed": 2**64}, "seed is 18446744073709551616, must be an integer within"),
    ({"seed": 1.0}, "seed is 1.0"),
    ({"seed": 1, "generator": torch.Generator()}, "seed and generator are given"),
    ({"seed": 1, "latents": torch.zeros(1, 4, 4, 6)}, "latents and seed are given"),
    ({"generator": 5}, "generator is 5, must be a torch.Generator"),
    ({"num_images": 0}, "num_images is 0"),
    ({"num_images": 10**9}, "num_images is 1000000000, must be an integer within 1..10000"),
    ({"num_images": False}, "num_images is False"),
    ({"ras": 0.5}, "ras is 0.5, must be a ras.RASConfig, a ras.Upstream or None"),
    ({"ras": RASConfig}, "must be a ras.RASConfig, a ras.Upstream or None"),
    ({"ras": RASConfig(start=1, end=5)}, "end is 5, must be within 1..1 in this run"),
    ({"solver": "heun"}, "solver is 'heun', must be 'euler' or 'corrected'"),
    ({"solver": ["euler"]}, "solver is ['euler'], must be"),
    ({"output": "jpeg"}, "output is 'jpeg', must be 'pil' or 'numpy' or 'latent'"),
    ({"callback": 5}, "callback is 5, must be a function or None"),
    ({"progress": "yes"}, "progress is 'yes', must be True or False"),
    ({"steps": 0, "sigmas": [1.0, 0.0]}, "steps is 0, must be an integer within 1.."),
    ({"sigmas": [1.0]}, "steps is 2, but sigmas are 1 steps: leave one out"),
    ({"steps": None, "sigmas": [0.5, 0.7]}, "sigmas are [0.5, 0.7], must be 1 to 10000 falling"),
    ({"steps": None, "sigmas": [0.5, 0.5]}, "sigmas are [0.5, 0.5]"),
    ({"steps": None, "sigmas": [2.0, 0.5]}, "sigmas are [2.0, 0.5]"),
    ({"steps": None, "sigmas": [0.5, -0.5]}, "sigmas are [0.5, -0.5]"),
    ({"steps": None, "sigmas": [float("nan")]}, "sigmas are [nan]"),
    ({"steps": None, "sigmas": []}, "sigmas are []"),
    ({"steps": None, "sigmas": torch.tensor([0.5j])}, "sigmas are tensor([0.+0.5"),
    ({"steps": None, "sigmas": [True]}, "sigmas are [True]"),
    ({"steps": None, "sigmas": [0]}, "sigmas are [0]"),
    ({"steps": None, "sigmas": "fine"}, "sigmas are 'fine'"),
    ({"steps": None, "sigmas": 0.5}, "sigmas are 0.5"),
    ({"steps": None, "sigmas": [[1.0, 0.5]]}, "sigmas are [[1.0, 0.5]]"),
    ({"steps": None, "sigmas": [10**400]}, "sigmas are [1000"),
    ({"latents": torch.zeros(1, 3, 4, 6)}, "latents have shape (1, 3, 4, 6)"),
    ({"latents": torch.zeros(2, 4, 4, 6)}, "latents have shape (2, 4, 4, 6)"),
    ({"latents": torch.zeros(1, 4, 8, 6)}, "latents are for 48x64 pixels, but 48x32 was asked"),
    ({"latents": torch.zeros(4, 4)}, "latents are torch.float32 (4, 4), must be a floating point"),
    ({"latents": torch.zeros(1, 4, 4, 6).cfloat()}, "latents are torch.complex64"),
    ({"latents": torch.zeros(1, 4, 4, 6).int()}, "latents are torch.int32"),
    (
        {"latents": torch.full((1, 4, 4, 6), torch.inf)},
        "latents have values that are not finite, or none",
    ),
    ({"latents": torch.full((1, 4, 4, 6), torch.nan)}, "latents have values that are not finite"),
    ({"latents": torch.zeros(1, 4, 4, 6, device="meta")}, "latents have values that are not fin"),
    ({"latents": "noise"}, "latents are 'noise', must be a floating point tensor"),
    ({"order": 2}, "this model takes no order; allowed are "),
    ({"max_sequence": 2, "use_t6": 1}, "this model takes no max_sequence, use_t6; allowed are "),
]
BAD_SD3 = [
    ({"guidance": 0.0}, "guidance is 0.0, must be a finite number of at least 1 (1 is off)"),
    ({"max_sequence_length": 1}, "max_sequence_length is 1, must be an integer within 2..512"),
    ({"max_sequence_length": 10**9}, "max_sequence_length is 1000000000"),
    ({"use_t5": "no"}, "use_t5 is 'no', must be True or False"),
    ({"prompt_2": 7}, "prompt_2 is 7, must be a string"),
    ({"prompt_3": ["a", "b"]}, "prompt_3 has 2 strings, must have one or 1"),
    ({"scaling_watershed": 0.5}, "this model takes no scaling_watershed; allowed are prompt_2"),
    ({"skip_layers": 2}, "skip_layers is 2, must be a list of layer numbers"),
    ({"skip_layers": "2"}, "skip_layers is '2', must be a list of layer numbers"),
    ({"skip_layers": [99]}, "a number in skip_layers is 99, must be an integer within 0.."),
    ({"skip_layers": [0.5]}, "a number in skip_layers is 0.5"),
    ({"skip_layers": [0], "guidance": 1}, "skip_layers needs guidance, which is 1, off"),
    ({"skip_layers": [0], "skip_guidance": "a"}, "skip_guidance is 'a', must be a finite number"),
    ({"skip_layers": [0], "skip_start": -1}, "skip_start is -1, must be a finite number within"),
    ({"skip_layers": [0], "skip_stop": 2}, "skip_stop is 2, must be a finite number within 0..1"),
]
BAD_LUMINA = [
    ({"scaling_watershed": 2}, "scaling_watershed is 2, must be a finite number within 0..1"),
    ({"proportional_attn": 1}, "proportional_attn is 1, must be True or False"),
    ({"use_t5": False}, "this model takes no use_t5; allowed are scaling_watershed, proportional"),
]
BAD_LUMINA2 = [
    ({"system_prompt": 7}, "system_prompt is 7, must be a string"),
    ({"system_prompt": ["a", "b"]}, "system_prompt has 2 strings, must have one or 1"),
    ({"max_sequence_length": 300}, "max_sequence_length is 300, must be an integer within 2..299"),
    ({"cfg_trunc_ratio": 1.5}, "cfg_trunc_ratio is 1.5, must be a finite number within 0..1"),
    ({"cfg_normalization": 1}, "cfg_normalization is 1, must be True or False"),
]


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [(name, *one) for name in PIPES for one in BAD]
    + [("pipe_sd3", *one) for one in BAD_SD3]
    + [("pipe_lumina", *one) for one in BAD_LUMINA]
    + [("pipe_lumina2", *one) for one in BAD_LUMINA2],
)
def test_bad_arguments_are_named_before_anything_runs(name, change, sentence, monkeypatch):
    pipe = pipeline(name)
    latents = change.get("latents")
    if name != "pipe_lumina" and isinstance(latents, torch.Tensor) and latents.ndim == 4:
        change = change | {"latents": latents.repeat(1, 4, 1, 1)}
        sentence = sentence.replace("(1, 3,", "(1, 12,").replace("(2, 4,", "(2, 16,")
    monkeypatch.setattr(type(pipe), "running", None)
    with pytest.raises(ValueError) as error:
        draw(pipe, **change)
    assert sentence in str(error.value) and len(str(error.value)) < 300
    assert "\n" not in str(error.value)


class Ran(Exception):
    """The arguments were taken."""


ODD = [
    None, True, False, 0, 1, -1, 2**70, 10**400, -(10**5000), 0.5, -0.0, float("nan"),
    float("inf"), 1j, "", "abc", "\n\x1b[2J" * 100, b"x", [], [None], ["a", 1], [[1]], (), {},
    {"a": 1}, {1}, range(3), object(), object, len, np.int64(5), np.float32("nan"), np.bool_(1),
    np.array([1.0, 0.5]), np.array("a"), torch.tensor(3), torch.zeros(0), torch.zeros(1, 4, 4, 6),
    torch.zeros(2, 2, dtype=torch.complex64), torch.zeros(1, 4, 4, 6, device="meta"),
    torch.Generator(), RASConfig, RASConfig(), Path("a"),
]  # fmt: skip
NAMES = [p.name for p in signature(minidit.Pipeline.__call__).parameters.values()][1:-1]


@pytest.mark.filterwarnings("ignore:.*is cut off", "ignore:negative_prompt is ignored")
@pytest.mark.parametrize("name", PIPES)
def test_odd_arguments_are_taken_or_refused_with_one_sentence(name, monkeypatch):
    """All arguments of a family with all odd values, one at a time: some 4,000 calls."""

    def running(self, module):
        raise Ran

    pipe = pipeline(name)
    monkeypatch.setattr(type(pipe), "running", running)
    family = FAMILIES[pipe.family]
    for argument in (*NAMES, *options_of(family.encode), *options_of(family.guide), "other"):
        for value in ODD:
            with pytest.raises((ValueError, Ran)) as error:
                draw(pipe, **{"prompt": "a cat", argument: value})
            message = str(error.value)
            assert len(message) < 400 and (not message or message.isprintable()), argument


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


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_stops_leaves_nothing(pipe, error):
    """Parts are back where they were, and the next run has the same bits."""
    name = PIPES[[pipeline(p) for p in PIPES].index(pipe)]
    to = torch.device("cpu:0")
    away = minidit.load(GOLDENS / name, device=to, offload=True)
    moves, move = [], torch.nn.Module.to

    def stop(step, *_):
        raise error("stop")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.nn.Module, "to", lambda self, where: moves.append(where) or move(self, where)
        )
        with pytest.raises(error, match="stop"):
            draw(away, seed=0, steps=4, ras=RASConfig(start=1), callback=stop)
    assert moves and moves == [to, "cpu"] * (len(moves) // 2)
    assert draw(away, seed=0).latents.equal(draw(pipe, seed=0).latents)


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
    assert to_array(pixels)[0, :, 0].tolist() == [0, 0, 0.5, 1, 1]


def test_goldens_are_small():
    size = sum(path.stat().st_size for path in Path(GOLDENS).rglob("*") if path.is_file())
    assert size < 20 * 2**20
