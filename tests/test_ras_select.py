"""Who is active next: starvation, the staleness bound, scores, dtypes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ras import SCORES, History, RASConfig, observe, plan, select
from ras.tokens import mask_of, patchify, unpatchify

seeds = st.integers(0, 2**32 - 1)
ONE = (torch.tensor(1.0), torch.tensor(0.9))  # noise levels of a first step and the next


def random_velocity(seed: int, batch: int, tokens: int) -> torch.Tensor:
    """(B, N, 4, 4) of very different sizes, so that scores spread over decades."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.randn(batch, tokens, 1, 1, generator=generator).mul(1.5).exp()
    return torch.randn(batch, tokens, 4, 4, generator=generator) * size


def sets_of(config: RASConfig, fields: list[torch.Tensor]) -> torch.Tensor:
    """Masks (steps, B, N) of the tokens that selection makes active after each velocity field."""
    history, masks, count = None, [], max(1, round(config.ratio * fields[0].shape[1]))
    active, sigma = None, torch.tensor(0.5)
    for field in fields:
        history = observe(history, field, field, active, sigma, sigma)
        active = select(config, history, count, len(fields))
        masks.append(mask_of(active, field.shape[1]))
    return torch.stack(masks)


@given(seeds, st.integers(1, 3), st.integers(2, 40), st.floats(0.05, 0.95), st.data())
def test_active_and_stale_partition_the_tokens(seed, batch, tokens, ratio, data):
    score = data.draw(st.sampled_from(sorted(SCORES)))
    prefer = data.draw(st.sampled_from(["low", "high"]))
    config = RASConfig(ratio=ratio, score=score, prefer=prefer)
    history = observe(None, random_velocity(seed, batch, tokens), None, None, *ONE)
    count = max(1, round(ratio * tokens))
    active = select(config, history, count, 28)
    assert active.shape == (batch, count) and active.dtype == torch.int64
    assert (active[:, 1:] > active[:, :-1]).all()  # ascending, so each at most once
    assert active.min() >= 0 and active.max() < tokens
    assert (mask_of(active, tokens).sum(dim=1) == count).all()


@given(seeds, st.integers(4, 40), st.sampled_from(["low", "high"]))
def test_prefer_names_the_active_end(seed, tokens, prefer):
    history = observe(None, random_velocity(seed, 2, tokens), None, None, *ONE)
    active = mask_of(
        select(RASConfig(score="std", prefer=prefer), history, tokens // 2, 28), tokens
    )
    score = SCORES["std"](history)
    for row, chosen in zip(score, active, strict=True):
        inside, outside = row[chosen], row[~chosen]
        assert inside.max() <= outside.min() if prefer == "low" else inside.min() >= outside.max()


@given(
    seeds,
    st.integers(3, 40),
    st.floats(0.05, 0.9),
    st.lists(st.floats(0, 5), min_size=2, max_size=5),
    st.sampled_from(["low", "high"]),
    st.sampled_from(["age", "skips"]),
    st.integers(2, 20),
)
@example(0, 40, 0.25, [0.0, 0.1, 1.0], "low", "skips", 24)
def test_more_starvation_never_starves_more(seed, tokens, ratio, weights, prefer, by, steps):
    """On a velocity field that stands still. (Where scores move, a weight can be unlucky once in
    tens of thousands of random fields: the tokens that it rescued early compete later.)"""
    field = random_velocity(seed, 1, tokens)
    never = []
    for weight in sorted(weights):
        config = RASConfig(
            ratio=ratio, score="std", starvation=weight, prefer=prefer, starved_by=by
        )
        never.append(int((~sets_of(config, [field] * steps).any(dim=0)).sum()))
    assert never == sorted(never, reverse=True)


@given(
    seeds,
    st.integers(3, 40),
    st.floats(0.05, 0.9),
    st.floats(0.01, 4),
    st.sampled_from(["low", "high"]),
    st.sampled_from(["age", "skips"]),
)
@example(0, 40, 0.25, 1.0, "low", "skips")
def test_any_starvation_starves_no_more_than_none(seed, tokens, ratio, weight, prefer, by):
    """On velocity fields that change at every step. With upstream's sign three in four fail."""
    fields = [random_velocity(seed + i, 1, tokens) for i in range(12)]
    never = []
    for w in (0.0, weight):
        config = RASConfig(ratio=ratio, score="std", starvation=w, prefer=prefer, starved_by=by)
        never.append(int((~sets_of(config, fields).any(dim=0)).sum()))
    assert never[1] <= never[0]


@given(seeds, st.integers(3, 40), st.sampled_from(["low", "high"]))
def test_starvation_that_outweighs_every_score_starves_nobody(seed, tokens, prefer):
    config = RASConfig(ratio=0.3, score="std", starvation=1e3, prefer=prefer)
    count = max(1, round(0.3 * tokens))
    fields = [random_velocity(seed + i, 1, tokens) for i in range(-(-tokens // count))]
    assert sets_of(config, fields).any(dim=0).all()


@given(seeds, st.integers(2, 60), st.integers(1, 9), st.floats(0, 1), st.data())
def test_the_staleness_bound_holds(seed, tokens, bound, starvation, data):
    config = RASConfig(
        ratio=data.draw(st.floats(min(0.99, 1.2 / (bound + 1) + 1 / tokens), 0.99)),
        max_stale=bound,
        score="std",
        starvation=starvation,
        start=1,
        refresh=0,
    )
    steps = 25
    if not plan(config, steps, tokens)[1].regional:
        return  # so few tokens that all are active
    masks = sets_of(config, [random_velocity(seed + i, 2, tokens) for i in range(steps)])
    stale = torch.zeros(masks.shape[1:])
    for mask in masks:
        stale = (stale + 1) * ~mask
        assert stale.max() <= bound


def test_the_bound_is_tight():
    """With exactly as many active tokens as the bound needs, it is reached but not passed."""
    config = RASConfig(ratio=0.25, score="std", max_stale=3, start=1, refresh=0)
    masks = sets_of(config, [random_velocity(0, 1, 64)] * 20)
    assert (masks.float().mean(dim=0) == 0.25).all()  # everybody in turns


@given(seeds, st.sampled_from([torch.float16, torch.bfloat16]), st.floats(0, 3))
def test_half_precision_selects_what_float32_selects(seed, dtype, starvation):
    """Scores, ages and their product are float32 whatever the model's dtype: no exp(-k * age) can
    underflow, as it does upstream after 28 steps (D18)."""
    fields = [random_velocity(seed + i, 2, 32).to(dtype) for i in range(30)]
    config = RASConfig(ratio=0.5, score="std", starvation=starvation, starved_by="skips")
    assert sets_of(config, fields).equal(sets_of(config, [f.float() for f in fields]))


@given(seeds, st.sampled_from(sorted(SCORES)))
def test_a_batch_selects_what_its_members_select_alone(seed, score):
    config = RASConfig(score=score, max_stale=3)
    fields = [random_velocity(seed + i, 3, 24) for i in range(6)]
    together = sets_of(config, fields)
    for b in range(3):
        assert together[:, b : b + 1].equal(sets_of(config, [f[b : b + 1] for f in fields]))


def test_scores_are_what_they_say():
    velocity = random_velocity(0, 2, 6)
    history = observe(None, velocity, None, None, *ONE)
    std = velocity.double().std(dim=3, unbiased=True).mean(dim=2)
    l2 = velocity.double().square().sum(dim=3).sqrt().mean(dim=2)
    assert torch.allclose(SCORES["std"](history).double(), std)
    assert torch.allclose(SCORES["l2"](history).double(), l2)


def test_drift_is_the_rate_of_change_times_the_distance_ahead():
    first, second = random_velocity(0, 1, 4), random_velocity(1, 1, 4)
    history = observe(None, first, None, None, torch.tensor(1.0), torch.tensor(0.75))
    unknown = first.flatten(2).norm(dim=2) * 0.25  # no rate yet
    assert torch.allclose(SCORES["drift"](history), unknown)
    sigmas = torch.tensor(0.75), torch.tensor(0.25)
    history = observe(history, second, first, torch.tensor([[1, 2]]), *sigmas)
    rate = (second - first).flatten(2).norm(dim=2) / 0.25
    expected = torch.stack(
        (first[0, 0].norm() * 0.75, *(rate[0, 1:3] * 0.5), first[0, 3].norm() * 0.75)
    )
    assert torch.allclose(SCORES["drift"](history)[0], expected)


def test_random_scores_depend_on_seed_and_step_only():
    history = observe(None, random_velocity(0, 2, 16), None, None, *ONE)
    score = SCORES["random"](history)
    assert score.equal(SCORES["random"](history)) and score[0].equal(score[1])
    for change in ({"step": 1}, {"seed": 1}):
        assert not score.equal(SCORES["random"](dataclasses.replace(history, **change)))


def test_a_score_of_ones_own_is_one_entry(monkeypatch):
    def centre(history: History) -> torch.Tensor:
        return torch.arange(1.0, history.velocity.shape[1] + 1).expand(history.velocity.shape[:2])

    monkeypatch.setitem(SCORES, "centre", centre)
    history = observe(None, random_velocity(0, 1, 8), None, None, *ONE)
    config = RASConfig(score="centre", prefer="high")
    assert select(config, history, 3, 28).tolist() == [[5, 6, 7]]


@given(seeds, st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3))
def test_patchify_and_unpatchify_are_inverse_and_row_major(seed, batch, h, w, patch):
    pixels = torch.randn(batch, 3, h * patch, w * patch)
    tokens = patchify(pixels, patch)
    assert tokens.shape == (batch, h * w, patch * patch, 3)
    assert unpatchify(tokens, h * patch, w * patch, patch).equal(pixels)
    row, column = seed % h, seed % w
    cell = pixels[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
    assert tokens[:, row * w + column].equal(cell.flatten(2).transpose(1, 2))


def test_history_keeps_the_last_two_velocities_of_every_token():
    first, second, third = (random_velocity(i, 1, 4) for i in range(3))
    active = torch.tensor([[0, 2]])
    history = observe(None, first, None, None, *ONE, seed=7)
    history = observe(history, second, first, active, torch.tensor(0.8), torch.tensor(0.5))
    history = observe(
        history, third, history.last, active[:, :1], torch.tensor(0.5), torch.tensor(0.2)
    )
    assert history.velocity.equal(
        torch.stack((third[0, 0], first[0, 1], second[0, 2], first[0, 3]))[None]
    )
    assert history.last.equal(history.velocity)
    assert history.prior.equal(
        torch.stack((second[0, 0], first[0, 1], first[0, 2], first[0, 3]))[None]
    )
    assert history.last_sigma.tolist() == [pytest.approx([0.5, 1.0, 0.8, 1.0])]
    assert history.prior_sigma.tolist() == [pytest.approx([0.8, 1.0, 1.0, 1.0])]
    assert history.age.tolist() == [[0, 2, 1, 2]] and history.skips.tolist() == [[0, 2, 1, 2]]
    assert (history.step, history.seed) == (2, 7)
