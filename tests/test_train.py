"""examples/train.py on networks and pictures small enough for seconds: steps and measures."""

from __future__ import annotations

import random
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import GOLDENS
from PIL import Image
from training_runs import (
    CPU,
    PLAN,
    REAL_NAMES,
    SMALL,
    TINY_NAMES,
    assert_equal,
    command,
    interrupted,
    new_trainer,
    one_thing,
    trained,
)

import devices
import minidit
import train
from training import (
    classifier,
    latents,
    measure,
    models,
    optim,
    scenes,
    text,
    transformer,
)
from training.layout import SIGMA
from training.scenes import Background, Scene, Sprites, Thing
from weights.load import load_component

pytestmark = SMALL


@pytest.fixture(params=["sd3", "lumina"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


# ---------------------------------------------------------------- text encoders and transformer


def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(family, run, packages, monkeypatch):
    monkeypatch.setattr(transformer, "RENEWALS", 2)
    whole = trained(family, run, packages, PLAN)
    (run / family / "checkpoint.pt").unlink()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted(patch, 3)
        trained(family, run, packages, PLAN)
    parts = trained(family, run, packages, PLAN, prompts=["an owl"])
    assert_equal(whole, parts)
    assert any((run / family).glob("sheets/64x64-*.png"))
    data = latents.Latents(run / "data", 64, 64, TINY_NAMES)
    assert list(data.numbers[:7]) == [40, 41, 42, 43, 44, 45, 6]  # 2 renewals of 3 in 4 steps


def test_text_encoders_learn_first_and_training_starts_from_them(family, run, packages, capsys):
    plan = optim.Plan(steps=100, batch=8, warmup=10, cooldown=50)
    text.train_text(family, run, packages, plan, (64, 64), CPU)
    losses = [float(line.split()[3]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < 0.7 * losses[0]
    state = torch.load(run / family / "text.pt")
    still = replace(PLAN, steps=1, muon_lr=0.0, adam_lr=0.0)
    networks = trained(family, run, packages, still)["networks"]
    kinds = {name.split(".")[0] for name in networks}
    assert {name.split(".")[0] for name in state} == kinds - {"transformer"}
    for name, value in state.items():
        assert torch.equal(value, networks[name]), name


@pytest.mark.parametrize(
    ("said", "above", "answers"),  # 0 is the apple, 3 the owl
    [
        ("a red apple and an owl on a teal background", 0, {"first": 0, "second": 3}),
        ("an owl below a red apple", 0, {"first": 3, "second": 0, "above": 0, "below": 3}),
        ("a red apple below an owl", 3, {"first": 0, "second": 3, "above": 3, "below": 0}),
        ("two owls on a teal background", 3, {"first": 3, "second": 3}),
    ],
)
def test_a_caption_answers_who_is_first_and_who_is_where(said, above, answers):
    below = 3 if above == 0 or "two" in said else 0
    things = [
        Thing(TINY_NAMES[i], 0.5, y, 0.4, False, 0.0) for i, y in ((below, 0.8), (above, 0.2))
    ]
    scene = Scene(tuple(things), Background("plain", ("teal",)))
    table = text.answers(scene, said, {name: i for i, name in enumerate(TINY_NAMES)})
    found = {text.QUESTIONS[question]: name for question, name in table.nonzero().tolist()}
    assert found == answers and table.sum() == len(answers)


def test_choosing_ahead_changes_nothing(family, run, packages):
    kinds = [trained(family, run, packages, PLAN, renew=0)]
    (run / family / "checkpoint.pt").unlink()
    kinds.append(trained(family, run, packages, PLAN, renew=0, workers=2))
    assert_equal(*kinds)
    with pytest.raises(ValueError, match="renew is 3, must be 0 with workers"):
        trained(family, run, packages, PLAN, renew=3, workers=2)


def test_texts_are_what_the_encoders_make_of_the_captions(family, run, packages):
    pipe = models.new_pipeline(family, run, CPU)
    data = latents.Latents(run / "data", 64, 64, TINY_NAMES)
    texts = latents.Texts(pipe, data)
    network = load_component(run, "vae")
    texts.renew(data.renew(network, Sprites(packages), 2))  # slots 0 and 1 show scenes 40 and 41
    rows = [3 * 1 + 2, 3 * 7, -1]
    said = [
        scenes.caption(data.scene(n), random.Random(f"caption/{n}/{k}"))
        for n, k in ((41, 2), (7, 0))
    ]
    found, expected = texts.of(torch.tensor(rows)), pipe.encode([*said, ""])
    if family == "lumina":  # padding means nothing, and is longer
        length = expected["context_mask"].shape[1]
        assert not found["context_mask"][:, length:].any()
        read = expected["context_mask"][..., None]
        expected["context"] = expected["context"] * read
        found["context"] = found["context"][:, :length] * read
        found["context_mask"] = found["context_mask"][:, :length]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-3, rtol=2e-3)
    data.renew(network, Sprites(packages), 0)


def test_training_lowers_the_loss(family, run):
    trainer, step = new_trainer(family, run, replace(PLAN, steps=50, batch=8, cooldown=0))
    losses = [step(i).item() for i in range(50)]
    assert np.mean(losses[-10:]) < 0.85 * np.mean(losses[:3])


def test_noise_levels_lean_towards_noise():
    levels = transformer.noise_levels(8000, torch.Generator().manual_seed(0))
    evenly, levels = levels.split([3200, 4800])  # LAYOUT is 0.4
    assert levels.median() == pytest.approx(0.75, abs=0.01)  # of 0.5, shifted by 3
    assert 0 < levels.min() < 0.3 and 0.95 < levels.max() < 1
    assert SIGMA < evenly.min() and evenly.max() < 1
    assert evenly.mean() == pytest.approx((1 + SIGMA) / 2, abs=0.01)


def test_an_empty_caption_leaves_the_layout_to_the_noise(family, run, monkeypatch):
    monkeypatch.setattr(transformer, "EMPTY", 1.0)
    monkeypatch.setitem(scenes.GROUPS, (1, 1), 0)
    trainer, _ = new_trainer(family, run, replace(PLAN, batch=16))
    data = latents.Latents(run / "data", 64, 64, TINY_NAMES)
    choice = trainer.choose(0, [data])
    assert set(choice.captions) == {-1}
    for slot, codes in zip(choice.slots, choice.codes, strict=True):
        things = data.scene(int(data.numbers[slot])).things
        assert len(things) == 3 or not np.isnan(codes[4:6]).any()


def test_every_parameter_of_the_transformer_is_trained(family, run):
    trainer, step = new_trainer(family, run, PLAN)
    before = {n: p.detach().clone() for n, p in trainer.networks.named_parameters()}
    for i in range(4):
        step(i)
    same = {n for n, p in trainer.networks.named_parameters() if torch.equal(p, before[n])}
    # text encoders are frozen; pad_token serves pictures of unequal sizes, which we lack
    assert same == {n for n in before if n.startswith(("text", "transformer.pad_token"))}


def test_export_loads_strictly_and_holds_the_averaged_weights(family, run, packages, tmp_path):
    state = trained(family, run, packages, PLAN)
    scheduler = replace(models.SCHEDULER, default_steps=2, corrected_steps=2, shift=2.5)
    models.export(family, run, tmp_path / "out", scheduler)
    pipe = minidit.load(tmp_path / "out")
    assert pipe.scheduler == scheduler
    for name, value in pipe.transformer.state_dict().items():
        if name != "pos_embed":
            expected = state["average"][f"transformer.{name}"].bfloat16().float()
            assert torch.equal(value, expected), name
    image = pipe("an owl on a pink background", height=64, width=64, seed=0).images[0]
    assert image.size == (64, 64)


# ---------------------------------------------------------------- measuring


def test_classifier_sees_what_is_there_and_where(packages, tmp_path):
    plan = optim.Plan(steps=120, batch=8, warmup=10, cooldown=60)
    classifier.train_classifier(tmp_path, packages, plan, CPU)
    network = classifier.load_classifier(tmp_path / "classifier.pt", TINY_NAMES)
    left = Thing(TINY_NAMES[0], 0.3, 0.5, 0.4, False, 0.0)
    right = Thing(TINY_NAMES[4], 0.75, 0.5, 0.4, False, 0.0)
    scene = Scene((left, right), Background("plain", ("sky blue",)))
    image = Image.fromarray(scenes.draw(scene, Sprites(packages), 96, 96))
    seen = classifier.look(network, image)
    assert {classifier.rank(seen, 0), classifier.rank(seen, 4)} == {0, 1}
    assert torch.allclose(seen.places[0], torch.tensor([0.3, 0.5]), atol=0.12)
    assert torch.allclose(seen.places[4], torch.tensor([0.75, 0.5]), atol=0.12)
    assert seen.ground[0, 0] > 0.9 > seen.ground[4, 2]


def test_classifier_labels():
    numbers = {name: i for i, name in enumerate(TINY_NAMES)}
    cells = classifier.labels(one_thing(TINY_NAMES[2], "plain", "red"), numbers, 64, 128)
    assert cells.shape == (8, 16)
    assert cells[3, 3] == 3 and cells[0, 0] == 0 and cells[3, 12] == 0 and cells[2, 2] == -1


def test_held_out_cases_are_held_out_and_mean_what_they_say():
    cases = measure.held_out_cases(REAL_NAMES(), 30, seed=0)
    assert all(case.scene.held_out for case in cases)
    assert [len(case.scene.things) for case in cases[:3]] == [1, 2, 2]
    for case in cases[2::3]:
        assert case.words in case.prompt and scenes.relation(*case.scene.things) == case.words
    assert cases == measure.held_out_cases(REAL_NAMES(), 30, seed=0)


def test_measure_prints_finite_numbers_dense_and_with_ras(packages, tmp_path, capsys, monkeypatch):
    torch.manual_seed(0)
    network = classifier.Classifier(len(TINY_NAMES))
    torch.save(network.state_dict(), tmp_path / "classifier.pt")
    args = ["measure", "--model", str(GOLDENS / "pipe_lumina"), "--packages", str(packages)]
    args += ["--run", str(tmp_path), "--count", "6", "--steps", "8"]
    results = []
    for more in ([], ["--ras-preset", "paper"], ["--guidance", "2"]):
        command(monkeypatch, *args, *more)
        lines = capsys.readouterr().out.splitlines()[1:]
        results.append({name: values for name, *values in map(str.split, lines)})
    names = ["vae_psnr", "single", "things", "places", "background", "frechet", "diversity"]
    assert list(results[0]) == names
    assert results[0].pop("vae_psnr")[0] == "-"
    for result in results:
        assert all(np.isfinite(float(x)) for n, v in result.items() if n != "vae_psnr" for x in v)
    assert len({result["frechet"][0] for result in results}) == 3  # drawn
    assert len({result["frechet"][1] for result in results}) == 1  # real
    with pytest.raises(ValueError, match="count is 5, must be at least 6"):
        command(monkeypatch, *args, "--count", "5")


def test_scores_of_perfect_and_of_wrong_pictures(packages):
    apple, cherry = TINY_NAMES[:2]
    things = (Thing(apple, 0.2, 0.5, 0.3, False, 0.0), Thing(cherry, 0.8, 0.5, 0.3, False, 0.0))
    scene = Scene(things, Background("plain", ("teal",)))
    case = measure.Case("", scene, "to the left of")
    image = Image.fromarray(scenes.draw(scene, Sprites(packages), 64, 64))
    numbers = {name: i for i, name in enumerate(TINY_NAMES)}
    ground = torch.zeros(8, 8)
    ground[0] = 1.0
    places = torch.tensor([[0.2, 0.5], [0.8, 0.5], *[[0.5, 0.5]] * 3])
    seen = classifier.Seen(torch.tensor([0.9, 0.8, 0.1, 0.2, 0.3]), places, ground)
    single = (measure.Case("", one_thing(apple, "plain", "teal")), seen, image)
    for swapped in (False, True):
        what = replace(seen, places=places.flip(0)[[3, 4, 0, 1, 2]]) if swapped else seen
        cases, saw, images = zip(single, (case, what, image), strict=True)
        found = measure.scores(cases, saw, images, numbers)
        assert found["single"] == found["things"] == 1
        assert found["places"] == (0 if swapped else 1) and found["background"] < 1


def test_frechet_distance_of_gaussians():
    rng = np.random.default_rng(0)
    sample = rng.normal(size=(500, 3))
    assert measure.frechet(sample, sample) == pytest.approx(0, abs=1e-9)
    assert measure.frechet(sample, sample + [1, 0, 2]) == pytest.approx(5, abs=1e-9)
    # the same Gaussian twice as wide: trace of (2 - 1)^2 times its covariance
    expected = np.trace(np.cov(sample, rowvar=False)) + np.square(sample.mean(0)).sum()
    assert measure.frechet(sample, 2 * sample) == pytest.approx(expected, rel=1e-6)


def test_sheet_draws_every_fixed_prompt(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "PROMPTS", train.PROMPTS[:8])
    out = tmp_path / "sheet.jpg"
    command(monkeypatch, "sheet", "--model", str(GOLDENS / "pipe_lumina"), "--out", str(out))
    side = Image.open(out).height
    assert Image.open(out).width > 2.5 * side  # two rows of six
    assert f"wrote {out}" in capsys.readouterr().out


@pytest.mark.parametrize(("model", "most"), [("pipe_lumina", 3), ("pipe_sd3", 2)])
def test_a_sheet_asks_for_no_more_things_than_the_model_knows(model, most, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(train, "draw_sheet", lambda pipe, prompts, out: asked.extend(prompts))
    out = tmp_path / "sheet.png"
    command(monkeypatch, "sheet", "--model", str(GOLDENS / model), "--out", str(out))
    assert len(asked) == len(train.PROMPTS)
    three = [prompt for prompt in asked if "three" in prompt or ", a" in prompt]
    assert len(three) == (2 if most == 3 else 0)


def test_fixed_prompts_ask_for_things_that_are_known():
    known = [name.text for name in REAL_NAMES()]
    for prompt in train.PROMPTS:
        assert any(name in prompt for name in known), prompt


def test_devices_compares_with_the_cpu(monkeypatch, capsys):
    monkeypatch.setattr(devices, "WAYS", ((torch.float32, False), (torch.float16, False)))
    monkeypatch.setattr(devices, "SIDE", 8)
    monkeypatch.setattr(sys, "argv", ["devices.py", "--device", "cpu"])
    devices.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    assert [row[:4] for row in rows] == [
        [family, dtype, "no", ras]
        for family in models.PIXELS
        for ras in ("no", "yes")
        for dtype in ("float32", "float16")
    ]
    off = [float(row[4]) for row in rows]
    assert not any(off[::2]) and all(0 < x < 0.2 for x in off[1::2])
