"""Pictures redrawn and painted into: diffusers' recorded runs, and what must hold of every edit."""

from __future__ import annotations

import json
import re
from functools import cache

import numpy as np
import pytest
import torch
from conftest import GOLDENS, conditioning, noise, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

import minidit
from minidit import denoise, flow_sigmas
from minidit.edit import Source, first_step, latent_masks, read_pictures, to_grey, to_rgb
from minidit.flow import Guidance, Known
from ras import Given, KVCache, RASConfig, Record, Upstream
from ras.plan import Step
from ras.record import Recalled

RUNS = [
    (case, run)
    for case in ("pipe_sd3_img2img", "pipe_sd3_inpaint")
    for run in json.loads((GOLDENS / case / "info.json").read_text())["runs"]
]


@cache
def pipeline(name: str) -> minidit.Pipeline:
    return minidit.load(GOLDENS / name)


# ---------------------------------------------------------------- diffusers' recorded runs


@pytest.mark.parametrize(("case", "run"), RUNS)
def test_golden(case, run):
    info = json.loads((GOLDENS / case / "info.json").read_text())
    inputs, tensors = (
        {
            name.removeprefix(f"{run}/"): value
            for name, value in load_file(GOLDENS / case / f"{file}.safetensors").items()
            if name.startswith(f"{run}/")
        }
        for file in ("inputs", "expected")
    )
    call = dict(info["runs"][run]["call"])
    call["steps"], call["guidance"] = call.pop("num_inference_steps"), call.pop("guidance_scale")
    pictures = [Image.fromarray(x.numpy()) for x in inputs["image"]]
    if "mask" in inputs:
        call["mask"] = [Image.fromarray(x.numpy()) for x in inputs["mask"]]
        expected = tensors["mask_latents"].bool()
        assert latent_masks(call["mask"], 8).equal(expected)
    after = []
    out = pipeline(case)(
        **call, image=pictures, latents=inputs["noise"], solver="euler",
        callback=lambda *args: after.append((args[1], args[2])),
    )  # fmt: skip
    assert len(after) == info["runs"][run]["steps_run"]
    assert torch.allclose(torch.tensor([a[0] for a in after]), tensors["sigmas_used"][:-1])
    for i, (_, latents) in enumerate(after, start=1):
        atol = info["atol"][f"{run}/latents_after_{i}"]
        assert (latents - tensors[f"latents_after_{i}"]).abs().max() <= atol
    drawn = tensors["image"].numpy().astype(int)
    for i, image in enumerate(out.images):
        white = np.ones(drawn[i].shape, bool)
        if "mask" in inputs:  # diffusers shows all that was decoded, we keep what the mask keeps
            mask = np.asarray(call["mask"][min(i, len(call["mask"]) - 1)])
            given = np.asarray(pictures[min(i, len(pictures) - 1)])
            assert (np.asarray(image)[mask == 0] == given[mask == 0]).all()
            white = np.broadcast_to((mask == 255)[..., None], white.shape)
        assert np.abs(np.asarray(image, int) - drawn[i])[white].max() <= 1


# ---------------------------------------------------------------- edits of a drawing


def draw(family: str, **kwargs) -> tuple[torch.Tensor, object]:
    """Six guided steps of two pictures of 12 tokens, from the same noise and prompts."""
    return denoise(
        tiny_model(family), noise(2, 6, 8), flow_sigmas(6, 3.0), conditioning(family, 2, 1),
        conditioning(family, 2, 9), 3.0, **kwargs,
    )  # fmt: skip


def edit(
    family: str, record: Record, mask: torch.Tensor, config: object, first: int = 0,
    prompt: int = 3, start: torch.Tensor | None = None,
):  # fmt: skip
    """An edit of them under a mask of tokens (2, 3, 4): other prompts, other noise."""
    latents = mask.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]  # (2, 1, 6, 8)
    known = Known(record.path[first:], latents)
    start = noise(2, 6, 8, 7) if start is None else start
    return denoise(
        tiny_model(family), known.put(start, 0), flow_sigmas(6, 3.0)[first:],
        conditioning(family, 2, prompt), conditioning(family, 2, 9), 3.0, ras=config, known=known,
        correct=record.correct,
    )  # fmt: skip


def tokens(*names: tuple[int, ...]) -> torch.Tensor:
    """(2, 3, 4) bool, true at these tokens of each picture."""
    mask = torch.zeros(2, 12, dtype=torch.bool)
    for b, some in enumerate(names):
        mask[b, list(some)] = True
    return mask.view(2, 3, 4)


SOME = tokens((1, 2, 5), (7, 11))


@pytest.mark.parametrize("correct", [False, True])
def test_an_edit_with_the_drawings_own_noise_and_prompt_is_the_drawing(family, correct):
    record = Record()
    drawn, _ = draw(family, correct=correct, record=record)
    assert drawn.equal(draw(family, correct=correct)[0])
    for ring, first in ((0, 0), (1, 0), (0, 3)):
        if correct and first:  # the correction of the step before is not done again
            continue
        config = Given(ring).at(SOME, record, first)
        latents, trace = edit(family, record, SOME, config, first, 1, record.path[first])
        assert all(step.regional for step in trace.steps)
        assert torch.allclose(latents, drawn, atol=1e-4)


class Regional(Given):
    """Every step regional, also with every token active."""

    def plan(self, steps: int, tokens: int) -> tuple[Step, ...]:
        return (Step(True, tokens),) * steps


def test_with_every_token_active_an_edit_equals_the_dense_edit(family):
    record = Record()
    draw(family, correct=True, record=record)
    dense, _ = edit(family, record, SOME, None)
    wide, trace = edit(family, record, SOME, Given(99).at(SOME, record))
    assert trace.share == 1 and wide.equal(dense)
    assert not any(step.regional for step in trace.steps)
    latents, _ = edit(family, record, SOME, Regional().at(SOME, record))
    assert torch.allclose(latents, dense, atol=1e-4)
    near, _ = edit(family, record, SOME, Given(0).at(SOME, record))
    assert not torch.allclose(near, dense, atol=1e-3)


@pytest.mark.parametrize("recorded", [False, True])
def test_nothing_outside_the_mask_changes_and_the_record_survives(family, recorded):
    record = Record()
    drawn, _ = draw(family, record=record)
    before = [x.clone() for c in record.caches.values() for layer in c for x in (layer.k, layer.v)]
    latents, trace = edit(family, record, SOME, Given(1).at(SOME, record if recorded else None))
    white = SOME.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None].expand_as(drawn)
    assert latents[~white].equal(drawn[~white])
    assert not (latents == drawn)[white].any()
    after = [x for c in record.caches.values() for layer in c for x in (layer.k, layer.v)]
    assert all(x.equal(y) for x, y in zip(before, after, strict=True))
    assert [step.regional for step in trace.steps] == [recorded or i % 3 > 0 for i in range(6)]


@given(st.integers(1, 12))
def test_the_cost_is_the_share_of_the_mask(count):
    record = Record()
    draw("lumina", record=record)
    mask = tokens(range(count), range(12 - count, 12))
    _, trace = edit("lumina", record, mask, Given(0).at(mask, record))
    assert trace.token_steps == 6 * count


@given(st.lists(st.lists(st.booleans(), min_size=20, max_size=20), min_size=1, max_size=3),
       st.sampled_from([0, 1, 1.5, 2, 4]))  # fmt: skip
def test_active_are_the_tokens_nearest_to_the_mask_as_many_for_every_picture(masks, ring):
    mask = torch.tensor(masks).view(-1, 4, 5)
    config = Given(ring, every=2).at(mask)
    steps = config.plan(4, 20)
    assert len({step.active for step in steps if step.regional}) <= 1
    place = torch.cartesian_prod(torch.arange(4.0), torch.arange(5.0))
    for b in range(len(mask)):
        inside = place[mask[b].flatten()]
        distance = torch.cdist(place, inside).amin(1) if len(inside) else torch.full((20,), np.inf)
        assert torch.allclose(config.distance[b], distance)
        for step in filter(lambda step: step.regional, steps):
            active = config.select(None, step).active[b]
            assert len(active.unique()) == step.active and active.equal(active.sort().values)
            rest = [i for i in range(20) if i not in active]
            assert distance[active].max() <= min([distance[i] for i in rest], default=np.inf)
            assert set((distance <= ring).nonzero().flatten().tolist()) <= set(active.tolist())


@given(st.none() | st.integers(1, 8), st.integers(1, 20))
def test_every_so_many_steps_are_dense_unless_a_record_replaces_them(every, steps):
    for record in (None, Record()):
        plan = Given(0, every).at(SOME, record).plan(steps, 12)
        dense = [t for t, step in enumerate(plan) if not step.regional]
        recorded = record is not None and every is None
        assert dense == ([] if recorded else [t for t in range(steps) if t % (every or 3) == 0])


def test_steps_that_are_not_kept_are_read_off_a_line_in_sigma():
    record = Record(every=3)
    for levels in ([1.0, 0.2, 0.0], [1.0, 0.9, 0.7, 0.6, 0.3, 0.1, 0.0]):  # a run begins anew
        record.start(levels, torch.zeros(1, 1, 2, 2), False)
        for i, level in enumerate(levels[:-1]):
            kept = record.cache(i)
            assert (kept is not None) == (i in (0, 3, len(levels) - 2))
            if kept is not None:
                rows = torch.full((1, 4, 1, 2), level)
                kept.part("layer").write(rows, -rows, None)
            record.end(i, torch.zeros(1, 1, 2, 2))
    rows, fresh = torch.tensor([[1]]), torch.full((1, 1, 1, 2), 9.0)
    for i, level in enumerate(levels[:-1]):
        k, v = record.recall(i, 1).part("layer").write(fresh, fresh, rows)
        assert torch.allclose(k[0, [0, 2, 3]], torch.tensor(level))
        assert torch.allclose(v[0, [0, 2, 3]], torch.tensor(-level))
        assert (k[0, 1] == 9).all() and (v[0, 1] == 9).all()
    assert record.nbytes == 3 * 2 * 4 * 2 * 4 + 7 * 4 * 4


@pytest.mark.parametrize(
    "bad",
    [
        {"ring": -1}, {"ring": "2"}, {"ring": np.nan}, {"ring": True}, {"every": 0}, {"every": 1.5},
        {"every": True}, {"mask": [[True]]}, {"record": 5}, {"first": -1}, {"first": 0.0},
    ],
)  # fmt: skip
def test_given_refuses(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} is .*, must be"):
        Given(**bad)


def test_given_by_default_has_a_ring_of_1_and_takes_any():
    assert Given() == Given(1, None, None, None, 0)
    assert Given(np.int64(2)).at(SOME).plan(2, 12)[1] == Given(2).at(SOME).plan(2, 12)[1]
    assert not any(step.regional for step in Given(np.inf).at(SOME).plan(4, 12))


def test_a_record_moves_what_it_keeps_where_it_was_told(family):
    record = Record(every=2, device="meta")
    drawn, _ = draw(family, record=record)
    kept = [x for c in record.caches.values() for layer in c for x in (layer.k, layer.v)]
    assert kept and all(x.is_meta for x in kept)
    assert len(record.path) == 7 and record.path[-1].equal(drawn)
    assert record.nbytes == sum(x.nbytes for x in (*kept, *record.path))
    assert record.guided


@pytest.mark.parametrize("pictures", [1, 2])
def test_between_a_guided_and_an_unguided_step_the_negative_half_is_the_earlier_ones(pictures):
    """Both halves then, so that they stay alike; without guidance the line between both steps."""
    guided, unguided = KVCache(), KVCache()
    guided.part("layer").write(*[torch.full((2 * pictures, 3, 1, 1), 2.0)] * 2, None)
    unguided.part("layer").write(*[torch.full((pictures, 3, 1, 1), 6.0)] * 2, None)
    recalled = Recalled(pictures, pictures, guided, unguided, 0.25)
    for halves, stale in ((2, 2.0), (1, 3.0)):
        fresh = torch.zeros(halves * pictures, 1, 1, 1)
        rows = 3 * torch.arange(halves * pictures)[:, None]  # the first of every sample
        for full in recalled.part("layer").write(fresh, fresh, rows):
            assert full.shape == (halves * pictures, 3, 1, 1)
            assert (full[:, 0] == 0).all() and (full[:, 1:] == stale).all()


def test_a_record_of_every_second_step_survives_the_end_of_guidance():
    arguments = tiny_model("lumina2"), noise(2, 6, 8), flow_sigmas(6, 3.0)
    conds = [conditioning("lumina2", 2, seed) for seed in (1, 9)]
    record, how = Record(every=2), Guidance(3.0, cfg_trunc_ratio=0.67)
    denoise(*arguments, *conds, how, record=record)
    edited, _ = denoise(*arguments, *conds, how, ras=Given(0).at(SOME, record))
    assert edited.isfinite().all()


def test_a_step_that_only_the_edit_guides_is_refused():
    """The drawing's guidance ended before it, so that nothing of the negative prompt is kept."""
    record, arguments = Record(), (tiny_model("lumina"), noise(2, 6, 8), flow_sigmas(6, 3.0))
    conds = [conditioning("lumina", 2, seed) for seed in (1, 9)]
    denoise(*arguments, *conds, Guidance(3.0, cfg_trunc_ratio=0.5), record=record)
    assert record.guided  # its first steps were
    config = Given(0).at(SOME, record)
    for ratio in (0.5, 0.3):
        how = Guidance(3.0, cfg_trunc_ratio=ratio)
        assert denoise(*arguments, *conds, how, ras=config)[0].isfinite().all()
    with pytest.raises(ValueError, match="guides a step that the drawing did not"):
        denoise(*arguments, *conds, Guidance(3.0, cfg_trunc_ratio=0.7), ras=config)


def test_given_without_a_mask_and_records_of_regional_runs_are_refused(family):
    with pytest.raises(ValueError, match="needs a mask"):
        draw(family, ras=Given())
    with pytest.raises(ValueError, match="12 tokens, must have 20"):
        Given().at(SOME).plan(4, 20)
    for config in (RASConfig(), Upstream(), Given().at(SOME)):
        with pytest.raises(ValueError, match="record is for dense runs"):
            draw(family, ras=config, record=Record())
    for every in (0, 1.0, True):
        with pytest.raises(ValueError, match=f"every is {every}, must be an integer of at least 1"):
            Record(every=every)


# ---------------------------------------------------------------- the pipeline


PICTURE = Image.fromarray((np.arange(48 * 32 * 3) * 7 % 251).reshape(32, 48, 3).astype(np.uint8))
BOX = Image.new("L", (48, 32))
BOX.paste(255, (16, 0, 40, 24))


@pytest.fixture(params=["pipe_sd3_inpaint", "pipe_lumina", "pipe_flux_dev"])
def pipe(request):
    return pipeline(request.param)


def call(pipe, prompt="a cat", **kwargs):
    return pipe(prompt, **({"steps": 4, "guidance": 3.0, "seed": 0} | kwargs))


def test_a_white_mask_and_strength_1_draw_what_the_text_alone_draws(pipe):
    out = call(pipe, height=32, width=48)
    white = call(pipe, image=PICTURE, mask=Image.new("L", (48, 32), 255))
    assert white.latents.equal(out.latents)
    assert np.array_equal(white.images[0], out.images[0])


def test_strength_is_six_tenths_where_no_mask_says_what_to_keep():
    pipe, levels = pipeline("pipe_lumina"), []
    out, told = (
        call(pipe, image=PICTURE, steps=10, output="latent", **strength,
             callback=lambda i, sigma, *_: levels.append(sigma))
        for strength in ({}, {"strength": 0.6})
    )  # fmt: skip
    assert out.latents.equal(told.latents) and len(levels) == 12


def test_a_drawing_may_be_redrawn_without_a_mask():
    """All of it, from its last latents, with as much noise as the strength says."""
    pipe = pipeline("pipe_lumina")
    out = call(pipe, height=32, width=48, keep=True)
    new = call(pipe, image=out, strength=0.5, steps=None, seed=4, ras=None)
    source = Source(out, None, 0.5, 1, 16)
    start = torch.randn(out.latents.shape, generator=torch.Generator().manual_seed(4))
    levels = source.levels(torch.tensor(out.record.levels))
    latents, known = source.start(pipe, start, levels)
    assert known is None and len(levels) == 3
    assert torch.allclose(latents, levels[0] * start + (1 - levels[0]) * out.latents, atol=1e-6)
    assert new.latents.shape == out.latents.shape and not new.latents.equal(out.latents)
    assert not np.array_equal(np.asarray(new.images[0])[:8], np.asarray(out.images[0])[:8])


@pytest.mark.parametrize("ras", [None, Given(), RASConfig()])
def test_a_black_mask_gives_the_picture_back(pipe, ras):
    out = call(pipe, image=PICTURE, mask=Image.new("L", (48, 32)), ras=ras)
    assert np.array_equal(out.images[0], PICTURE)
    same = call(pipe, image=PICTURE, mask=Image.new("L", (48, 32)), ras=ras, output="numpy")
    assert np.allclose(same.images[0], np.asarray(PICTURE) / 255, atol=1e-6)


def test_black_keeps_its_pixels_and_grey_mixes(pipe):
    soft = BOX.copy()
    soft.paste(64, (0, 24, 48, 32))
    out = call(pipe, image=PICTURE, mask=soft, output="numpy").images[0]
    hard = call(pipe, image=PICTURE, mask=soft.point(lambda x: 255), latents=None)
    assert hard.images[0].size == (48, 32)
    drawn = np.asarray(call(pipe, image=PICTURE, mask=soft).images[0], int)
    picture, grey = np.asarray(PICTURE, int), np.asarray(soft)
    assert (drawn == picture)[grey == 0].all() and not (drawn == picture)[grey == 255].all()
    assert np.abs(out * 255 - drawn).max() <= 1


def test_an_edit_of_a_drawing(pipe):
    out = call(pipe, ["a cat", "a dog"], height=32, width=48, keep=True)
    assert out.latents.equal(call(pipe, ["a cat", "a dog"], height=32, width=48).latents)
    bytes_ = out.record.nbytes
    near = {"guidance": 3.0, "ras": Given(0)}
    new = pipe.edit(out, BOX, ["a fox", "a hen"], seed=5, num_images=2, **near)
    assert len(new.images) == 4 and out.record.nbytes == bytes_
    assert new.trace.share < 1 and all(step.regional for step in new.trace.steps)
    kept = np.asarray(BOX) == 0
    for i, image in enumerate(new.images):
        assert np.array_equal(np.asarray(image)[kept], np.asarray(out.images[i // 2])[kept])
    alone = pipe.edit(out, [BOX, BOX], ["a fox", "a hen"], seed=5, **near)
    assert torch.allclose(alone.latents, new.latents[::2], atol=1e-4)
    again = pipe.edit(out, BOX, ["a cat", "a dog"], seed=0, **near)
    assert torch.allclose(again.latents, out.latents, atol=1e-4)
    late = pipe.edit(out, BOX, ["a cat", "a dog"], seed=0, strength=0.5, **near)
    assert len(late.trace.steps) == 2
    assert not late.latents.equal(out.latents)  # it starts on the straight line to the noise
    dense = pipe.edit(out, BOX, ["a fox", "a hen"], guidance=3.0, seed=5, ras=None)
    assert dense.trace is None and torch.allclose(dense.latents, alone.latents, atol=2)


@pytest.mark.parametrize("solver", ["euler", "corrected"])
def test_an_edit_has_the_solver_of_its_drawing(solver):
    pipe = pipeline("pipe_lumina")
    out = call(pipe, height=32, width=48, keep=True, solver=solver)
    untold, told = (
        pipe.edit(out, BOX, "a fox", guidance=3.0, seed=5, output="latent", **options)
        for options in ({}, {"solver": solver})
    )
    assert untold.latents.equal(told.latents)


def test_a_picture_from_elsewhere_can_be_recorded_and_edited(pipe):
    black = Image.new("L", (48, 32))
    out = call(pipe, image=PICTURE, mask=black, keep=True)
    assert np.array_equal(out.images[0], PICTURE)
    new = pipe.edit(out, BOX, "a fox", guidance=3.0, seed=5, ras=Given(0))
    kept = np.asarray(BOX) == 0
    assert np.array_equal(np.asarray(new.images[0])[kept], np.asarray(PICTURE)[kept])
    assert not np.array_equal(new.images[0], PICTURE)


def test_a_record_of_every_second_step_serves_too():
    pipe = pipeline("pipe_lumina")
    out = call(pipe, height=32, width=48, keep=Record(every=2, device="cpu"))
    whole = call(pipe, height=32, width=48, keep=True)
    assert list(out.record.caches) == [0, 2, 3] and out.record.nbytes < whole.record.nbytes
    new, exact = (
        pipe.edit(some, BOX, "a cat", guidance=3.0, seed=0, ras=Given(0)) for some in (out, whole)
    )
    assert torch.allclose(exact.latents, out.latents, atol=1e-4)
    assert 1e-3 < (new.latents - out.latents).abs().max() < 2  # close, and not the same


SKIP = {"skip_layers": [1], "skip_start": 0.1, "skip_stop": 0.6}


def test_skipped_layers_are_recorded_too():
    pipe = pipeline("pipe_sd35_slg")
    out = call(pipe, height=32, width=48, keep=True, **SKIP)
    again = pipe.edit(out, BOX, "a cat", guidance=3.0, seed=0, ras=Given(0), **SKIP)
    assert torch.allclose(again.latents, out.latents, atol=1e-4)
    # steps 1 and 2 of 4 skip: between kept steps 0 and 2 and at 3 there are none of these keys
    some = call(pipe, height=32, width=48, keep=Record(every=2), **SKIP)
    for skip_stop in (0.6, 1.0):
        more = SKIP | {"skip_stop": skip_stop}
        near = pipe.edit(some, BOX, "a cat", guidance=3.0, seed=0, ras=Given(0), **more)
        assert (near.latents - out.latents).abs().max() < 4


def test_an_edit_may_skip_layers_where_the_drawing_did_not():
    """That pass has no keys to take from the record: it computes every token."""
    pipe = pipeline("pipe_sd35_slg")
    out = call(pipe, height=32, width=48, keep=True)
    skipping = call(pipe, height=32, width=48, **SKIP)
    edited = pipe.edit(out, Image.new("L", (48, 32), 255), "a cat", seed=0, guidance=3.0, **SKIP)
    assert torch.allclose(edited.latents, skipping.latents, atol=1e-4)  # all of it drawn anew
    part = pipe.edit(out, BOX, "a cat", seed=0, guidance=3.0, ras=Given(0), **SKIP)
    assert not torch.allclose(part.latents, out.latents, atol=1e-2)
    assert part.latents.isfinite().all()


def test_an_edit_may_not_run_a_layer_that_the_drawing_skipped():
    pipe = pipeline("pipe_sd35_slg")
    out = call(pipe, height=32, width=48, keep=True, **SKIP)
    other = SKIP | {"skip_layers": [0]}
    with pytest.raises(ValueError, match="runs a layer that the drawing skipped: skip the same"):
        pipe.edit(out, BOX, "a cat", guidance=3.0, seed=0, ras=Given(0), **other)


def test_a_pass_apart_is_read_off_the_same_line_between_kept_steps():
    caches = []
    for value in (2.0, 6.0):
        caches.append(KVCache())
        caches[-1].part("skip").part("layer").write(*[torch.full((1, 4, 1, 1), value)] * 2, None)
    fresh, rows = torch.zeros(1, 1, 1, 1), torch.tensor([[1]])
    for after, stale in ((caches[1], 3.0), (None, 2.0), (KVCache(), 2.0)):
        recalled = Recalled(1, 1, caches[0], after, 0.25).part("skip")
        for full in recalled.part("layer").write(fresh, fresh, rows):
            assert full.flatten().tolist() == [stale, 0.0, stale, stale]


REFUSED = {
    "image is .*, must be a PIL image": {"image": "cat.png"},
    "image has 2 pictures, must have 1$": {"image": [PICTURE, PICTURE]},
    "image has 2 pictures, must have 1 or 3": {
        "prompt": ["a", "b", "c"], "image": [PICTURE, PICTURE],
    },
    r"image is 50x30 pixels, both must be multiples of 16: .* 48x32": {
        "image": PICTURE.resize((50, 30))
    },
    "image has pictures of 48x32 and 32x48": {
        "prompt": ["a", "b"], "image": [PICTURE, PICTURE.rotate(90, expand=True)],
    },
    "mask is 16x16 pixels, the picture 48x32": {"image": PICTURE, "mask": BOX.resize((16, 16))},
    "mask is given without a picture": {"mask": BOX},
    "strength is given without a picture": {"strength": 0.5},
    "strength is 1.5, must be": {"image": PICTURE, "strength": 1.5},
    "strength is 0, which draws nothing": {"image": PICTURE, "strength": 0},
    "width is 64, but image is 48x32 pixels": {"image": PICTURE, "width": 64},
    "height is 48, but image is 48x32 pixels": {"image": PICTURE, "height": 48},
    "image is 48x30 pixels, both must be multiples of 16": {"image": PICTURE.resize((48, 30))},
    "mask is 48x16 pixels, the picture 48x32": {
        "prompt": ["a", "b"], "image": [PICTURE] * 2, "mask": [BOX, BOX.crop((0, 0, 48, 16))],
    },
    "mask has 3 pictures, must have 1$": {"image": PICTURE, "mask": [BOX] * 3},
    "within 70000..70000, must be": {"image": Image.fromarray(np.full((32, 48), 70000, np.int32))},
    "latents are for 32x32 pixels": {
        "image": PICTURE, "latents": torch.zeros(1, 16, 4, 4), "seed": None,
    },
    "keep is 3, must be True or False": {"keep": 3},
    "keep is for dense runs": {"keep": True, "ras": RASConfig()},
    "ras.Given needs a mask": {"image": PICTURE, "ras": Given()},
    "mode F": {"image": Image.new("F", (48, 32))},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    with pytest.raises(ValueError, match=message):
        call(pipeline("pipe_sd3_inpaint"), **REFUSED[message])


@pytest.mark.parametrize("length", [8, 24])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_prompts_of_another_length_are_refused_where_text_is_cached(length, guidance):
    pipe, how = pipeline("pipe_sd3_inpaint"), {"guidance": guidance}
    out = call(pipe, height=32, width=48, keep=True, max_sequence_length=16, **how)
    with pytest.raises(ValueError, match="drawn with .* text tokens, the edit has"):
        pipe.edit(out, BOX, "a fox", max_sequence_length=length, **how)


def test_edits_that_do_not_suit_the_drawing_are_refused(pipe):
    for options in ({}, {"output": "numpy", "keep": True}, {"output": "latent", "keep": True}):
        with pytest.raises(ValueError, match="without record"):
            pipe.edit(call(pipe, height=32, width=48, **options), BOX, "a fox")
    out = call(pipe, height=32, width=48, keep=True, guidance=1.0)
    for name, value in (("steps", 3), ("sigmas", [1.0])):
        with pytest.raises(ValueError, match=f"{name} can't be chosen"):
            pipe.edit(out, BOX, "a fox", guidance=1.0, **{name: value})
    if pipe.family != "flux":  # which is told its guidance
        with pytest.raises(ValueError, match="drawn without"):
            pipe.edit(out, BOX, "a fox", guidance=3.0)
    out.record.path[0] = out.record.path[0][:, 1:]  # of another model
    with pytest.raises(ValueError, match="draw it with this model"):
        pipe.edit(out, BOX, "a fox", guidance=1.0)


def test_a_guided_drawing_serves_edits_without_guidance_and_several_of_them(pipe):
    out = call(pipe, height=32, width=48, keep=True)
    plain = call(pipe, height=32, width=48, keep=True, guidance=1.0)
    some, each = (
        pipe.edit(drawing, BOX, ["a cat", "b", "c"], guidance=1.0, seed=0, ras=Given(0))
        for drawing in (out, plain)
    )
    assert torch.allclose(each.latents[0], plain.latents[0], atol=1e-4)
    assert len(some.images) == 3 and torch.isfinite(some.latents).all()
    if pipe.family != "flux":
        assert not torch.allclose(some.latents[0], each.latents[0], atol=1e-3)


def test_without_guidance_the_prompts_half_of_a_guided_step_is_read():
    record, rows = Record(every=2), torch.tensor([[0]])
    record.start([1.0, 0.5, 0.25, 0.0], torch.zeros(1, 1, 2, 2), False)
    halves = torch.tensor([[-1.0, -1.0], [1.0, 3.0]]).view(2, 2, 1, 1)  # negative prompt first
    for step in (0, 2):
        record.cache(step).part("layer").write(halves + step, halves, None)
    fresh = torch.full((1, 1, 1, 1), 9.0)
    for step, there in ((0, 3.0), (1, 3.0 + 2 * (1.0 - 0.5) / (1.0 - 0.25)), (2, 5.0)):
        k, v = record.recall(step, 1).part("layer").write(fresh, fresh, rows)
        assert k.flatten().tolist() == pytest.approx([9, there])
        assert v.flatten().tolist() == [9, 3]


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_an_edit_of_less_strength_goes_on_where_the_drawing_was(strength, monkeypatch):
    """With the drawing's own prompt it follows the drawing from its first step on, of which it has
    the latents, and the keys and values."""
    pipe = pipeline("pipe_sd3_inpaint")
    out = call(pipe, height=32, width=48, keep=True, steps=4)
    steps, recall = [], Record.recall
    monkeypatch.setattr(
        Record, "recall", lambda self, step, batch: steps.append(step) or recall(self, step, batch)
    )
    levels = []
    edited = pipe.edit(
        out, BOX, "a cat", guidance=3.0, strength=strength, seed=0, ras=Given(0),
        callback=lambda i, sigma, *_: levels.append(sigma),
    )  # fmt: skip
    first = 4 - round(4 * strength)
    assert steps == [0, 1, 2, 3][first:] and levels == out.record.levels[first:-1]
    kept = ~latent_masks([to_grey(BOX)], 8)[0, 0]
    assert edited.latents[..., kept].equal(out.latents[..., kept])
    source = Source(out, BOX, strength, 1, 16)
    _, known = source.start(
        pipe, torch.zeros_like(out.latents), source.levels(torch.tensor(out.record.levels))
    )
    assert len(known.path) == 5 - first
    for mine, recorded in zip(known.path, out.record.path[first:], strict=True):
        assert mine.equal(recorded)


# ---------------------------------------------------------------- reading pictures


@pytest.mark.parametrize(("grey", "drawn"), [(0, False), (127, False), (128, True), (255, True)])
def test_by_latents_white_begins_at_128_of_the_first_pixel(grey, drawn):
    mask = Image.new("L", (16, 8), 255 - grey)
    mask.putpixel((8, 0), grey)
    assert latent_masks([mask], 8)[0, 0, 0, 1].item() is drawn


def test_pictures_of_every_mode_are_read_as_people_see_them():
    red = Image.new("RGB", (2, 1), (200, 30, 40))
    assert to_rgb(red).getpixel((0, 0)) == (200, 30, 40)
    clear = Image.new("RGBA", (2, 1), (200, 30, 40, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    clear.putpixel((0, 0), (200, 30, 40, 255))
    assert to_rgb(clear).getpixel((0, 0)) == (200, 30, 40)
    assert to_grey(Image.new("LA", (1, 1), (255, 0))).getpixel((0, 0)) == 0
    assert to_rgb(Image.new("1", (1, 1), 1)).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(red.quantize(2)).getpixel((0, 0)) == (200, 30, 40)
    palette = red.quantize(2)
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.array([[0, 400, 257 * 100, 65535]], np.uint16))
    assert deep.mode == "I;16"
    assert np.asarray(to_grey(deep)).tolist() == [[0, 2, 100, 255]]  # 400 / 257 = 1.56
    assert np.asarray(to_rgb(deep.convert("I")))[0, 2].tolist() == [100, 100, 100]
    levels = np.arange(65536)
    wide = Image.fromarray(levels.astype(np.uint16).reshape(256, 256))
    nearest = np.abs(levels[:, None] / 65535 - np.arange(256) / 255).argmin(axis=1)
    assert (np.asarray(to_grey(wide)).flatten() == nearest).all()
    with pytest.raises(ValueError, match="within -1..0"):
        to_rgb(Image.fromarray(np.array([[-1, 0]], np.int32)))
    turned = Image.new("RGB", (2, 1))
    turned.getexif()[0x0112] = 6  # to be turned by a quarter
    assert to_rgb(turned).size == (1, 2)


@given(st.integers(1, 60), st.floats(0.001, 1))
def test_strength_is_the_share_of_the_steps_that_run_rounded_up(steps, strength):
    left = steps - first_step(steps, strength)
    assert max(1, steps * strength - 1e-6) <= left < steps * strength + 1
    assert first_step(steps, 1e-300) == steps - 1


def test_a_picture_that_fits_nowhere_near_is_told_a_size():
    with pytest.raises(ValueError, match=re.escape("e.g. to 16x16")):
        read_pictures(Image.new("RGB", (3, 5)), 1, 16)


def test_recalled_keys_serve_several_edits_of_a_picture_each():
    record, rows = Record(), torch.tensor([[0], [2], [4], [6]])
    record.start([1.0, 0.0], torch.zeros(2, 1, 2, 2), False)
    recorded, fresh = torch.arange(4.0).view(2, 2, 1, 1), torch.full((4, 1, 1, 1), 9.0)
    record.cache(0).part("layer").write(recorded, recorded, None)
    k, _ = record.recall(0, 4).part("layer").write(fresh, fresh, rows)
    assert k.flatten().tolist() == [9, 1, 9, 1, 9, 3, 9, 3]
    assert record.caches[0].part("layer").k.equal(recorded)


def test_a_pass_that_the_later_kept_step_lacks_is_read_from_the_earlier_one_alone():
    record, keys = Record(every=2), torch.arange(4.0).view(1, 4, 1, 1)
    record.start([1.0, 0.8, 0.6, 0.4, 0.0], torch.zeros(1, 1, 2, 2), False)
    for step in (0, 2):
        record.cache(step).part("layer").write(keys + step, keys + step, None)
    record.cache(0).part("more").part("layer").write(keys, keys, None)
    fresh, rows = torch.full((1, 1, 1, 1), 9.0), torch.tensor([[1]])
    between, more = record.recall(1, 1), record.recall(1, 1).part("more")
    assert between.part("layer").write(fresh, fresh, rows)[0].flatten().tolist() == [1, 9, 3, 4]
    assert more.part("layer").write(fresh, fresh, rows)[0].flatten().tolist() == [0, 9, 2, 3]
    assert more.part("layer").write(fresh, fresh, None)[0] is fresh  # a pass over every token
