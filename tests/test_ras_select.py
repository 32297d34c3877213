"""Who is active next: starvation, scores, ties, dtypes, and what the history knows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ras import SCORES, History, RASConfig, Region, Step
from ras.run import observe
from ras.select import priority
from ras.tokens import mask_of, patchify, unpatchify
from ras.values import is_count, is_number, short

seeds = st.integers(0, 2**32 - 1)


def after_one_step(velocity: torch.Tensor, sigma: float = 1.0) -> History:
    """The history after a dense first step."""
    computed = torch.ones(velocity.shape[:2], dtype=torch.bool)
    return observe(None, velocity.float(), computed, torch.full(computed.shape, sigma), None)


def select(config: RASConfig, history: History, count: int) -> torch.Tensor:
    return config.select(history, Step(True, count)).active


def random_velocity(seed: int, batch: int, tokens: int) -> torch.Tensor:
    """(B, N, 4, 4) of very different sizes, so that scores spread over decades."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.randn(batch, tokens, 1, 1, generator=generator).mul(1.5).exp()
    return torch.randn(batch, tokens, 4, 4, generator=generator) * size


def sets_of(config: RASConfig, fields: list[torch.Tensor]) -> torch.Tensor:
    """Masks (steps, B, N) of the tokens that selection makes active after each velocity field."""
    masks, tokens = [], fields[0].shape[1]
    count, history = max(1, round(config.ratio * tokens)), after_one_step(fields[0])
    for i, field in enumerate(fields[1:], 1):
        region = config.select(history, Step(True, count))
        masks.append(mask_of(region.active, tokens))
        sigma = torch.full(masks[0].shape, 1 - i / len(fields))
        history = observe(history, field.float(), masks[-1], sigma, region)
    masks.append(mask_of(select(config, history, count), tokens))
    return torch.stack(masks)


@given(seeds, st.integers(1, 3), st.integers(2, 40), st.floats(0.05, 0.95), st.data())
def test_active_and_stale_partition_the_tokens(seed, batch, tokens, ratio, data):
    score = data.draw(st.sampled_from(sorted(SCORES)))
    prefer = data.draw(st.sampled_from(["low", "high"]))
    config = RASConfig(ratio=ratio, score=score, prefer=prefer)
    history = after_one_step(random_velocity(seed, batch, tokens))
    count = max(1, round(ratio * tokens))
    active = select(config, history, count)
    assert active.shape == (batch, count) and active.dtype == torch.int64
    assert (active[:, 1:] > active[:, :-1]).all()  # ascending, so each at most once
    assert active.min() >= 0 and active.max() < tokens
    assert (mask_of(active, tokens).sum(dim=1) == count).all()


@given(seeds, st.integers(4, 40), st.sampled_from(["low", "high"]))
def test_prefer_names_the_active_end(seed, tokens, prefer):
    history = after_one_step(random_velocity(seed, 2, tokens))
    active = mask_of(select(RASConfig(score="std", prefer=prefer), history, tokens // 2), tokens)
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
    st.integers(2, 20),
)
@example(0, 40, 0.25, [0.0, 0.1, 1.0], "low", 24)
def test_more_starvation_never_starves_more(seed, tokens, ratio, weights, prefer, steps):
    """On a velocity field that stands still. (Where scores move, a weight can be unlucky once in
    tens of thousands of random fields: the tokens that it rescued early compete later.)"""
    field = random_velocity(seed, 1, tokens)
    never = []
    for weight in sorted(weights):
        config = RASConfig(ratio=ratio, score="std", starvation=weight, prefer=prefer)
        never.append(int((~sets_of(config, [field] * steps).any(dim=0)).sum()))
    assert never == sorted(never, reverse=True)


@given(
    seeds,
    st.integers(3, 40),
    st.floats(0.05, 0.9),
    st.floats(0.01, 4),
    st.sampled_from(["low", "high"]),
)
@example(0, 40, 0.25, 1.0, "low")
def test_any_starvation_starves_no_more_than_none(seed, tokens, ratio, weight, prefer):
    """On velocity fields that change at every step. With upstream's sign three in four fail."""
    fields = [random_velocity(seed + i, 1, tokens) for i in range(12)]
    never = []
    for w in (0.0, weight):
        config = RASConfig(ratio=ratio, score="std", starvation=w, prefer=prefer)
        never.append(int((~sets_of(config, fields).any(dim=0)).sum()))
    assert never[1] <= never[0]


@given(seeds, st.integers(3, 40), st.sampled_from(["low", "high"]))
def test_starvation_that_outweighs_every_score_starves_nobody(seed, tokens, prefer):
    config = RASConfig(ratio=0.3, score="std", starvation=1e3, prefer=prefer)
    count = max(1, round(0.3 * tokens))
    fields = [random_velocity(seed + i, 1, tokens) for i in range(-(-tokens // count))]
    assert sets_of(config, fields).any(dim=0).all()


@given(seeds, st.sampled_from([torch.float16, torch.bfloat16]), st.floats(0, 3))
def test_half_precision_selects_what_float32_selects(seed, dtype, starvation):
    """Scores, ages and their product are float32 whatever the model's dtype: no exp(-k * age) can
    underflow, as it does upstream after 28 steps (D18)."""
    fields = [random_velocity(seed + i, 2, 32).to(dtype) for i in range(30)]
    config = RASConfig(ratio=0.5, score="std", starvation=starvation)
    assert sets_of(config, fields).equal(sets_of(config, [f.float() for f in fields]))


@given(seeds, st.sampled_from(sorted(SCORES)))
def test_a_batch_selects_what_its_members_select_alone(seed, score):
    config = RASConfig(score=score, starvation=0.3)
    fields = [random_velocity(seed + i, 3, 24) for i in range(6)]
    together = sets_of(config, fields)
    for b in range(3):
        assert together[:, b : b + 1].equal(sets_of(config, [f[b : b + 1] for f in fields]))


def test_scores_are_what_they_say():
    velocity = random_velocity(0, 2, 6)
    history = after_one_step(velocity)
    std = velocity.double().std(dim=3, unbiased=True).mean(dim=2)
    l2 = velocity.double().square().sum(dim=3).sqrt().mean(dim=2)
    assert torch.allclose(SCORES["std"](history).double(), std)
    assert torch.allclose(SCORES["l2"](history).double(), l2)


def test_error_is_the_change_since_the_time_before_per_unit_of_sigma():
    first, second, third = (random_velocity(i, 1, 4) for i in range(3))
    history = after_one_step(first)
    assert SCORES["error"](history).equal(first.flatten(2).norm(dim=2))  # nothing else is known
    one = torch.tensor([[False, True, True, False]])
    history = observe(history, second, one, torch.full((1, 4), 0.75), None)
    change = (second - first).flatten(2).norm(dim=2) / 0.25
    expected = torch.where(one, change, first.flatten(2).norm(dim=2))
    assert torch.allclose(SCORES["error"](history), expected)
    history = observe(history, third, torch.ones_like(one), torch.full((1, 4), 0.25), None)
    change = torch.where(
        one,
        (third - second).flatten(2).norm(dim=2) / 0.5,
        (third - first).flatten(2).norm(dim=2) / 0.75,
    )
    assert torch.allclose(history.error, change)


def test_random_scores_depend_on_the_step_only():
    history = after_one_step(random_velocity(0, 2, 16))
    score = SCORES["random"](history)
    assert score.equal(SCORES["random"](history)) and score[0].equal(score[1])
    assert not score.equal(SCORES["random"](history._replace(step=1)))
    many = after_one_step(random_velocity(0, 1, 4096))
    scores = torch.cat([SCORES["random"](many._replace(step=i)) for i in range(9)])
    assert 0 <= scores.min() < 0.01 and 0.99 < scores.max() < 1  # all of them count, log and all
    assert (scores.mean(dim=1) - 0.5).abs().max() < 0.05
    assert scores.argmax(dim=1).unique().numel() > 3  # and none is always first


@given(seeds, st.sampled_from(["low", "high"]), st.floats(0, 3), st.integers(0, 9))
def test_priority_is_the_logarithm_of_eq_1_with_stale_steps_counted_since_the_beginning(
    seed, prefer, k, start
):
    """Of any size of score, 0 included; age, which restarts, plays no part."""
    generator = torch.Generator().manual_seed(seed)
    history = after_one_step(random_velocity(seed, 2, 16) * 10.0**-start)
    skips, age = torch.randint(0, 9, (2, 2, 16), generator=generator).float()
    history.velocity[0, 3] = history.velocity[1, 5:7] = 0.0
    history = history._replace(skips=skips, age=age)
    config = RASConfig(score="l2", prefer=prefer, starvation=k)
    score = history.velocity.double().norm(dim=3).mean(dim=2).clamp(min=1e-30)
    wanted = (score.log() if prefer == "high" else -score.log()) + k * skips
    assert torch.allclose(priority(config, history).double(), wanted, rtol=1e-5, atol=1e-5)
    region = config.select(history, Step(True, 5))
    assert region.held is history.velocity and region.active.dtype == torch.int64
    best = priority(config, history).topk(5).indices.sort().values
    assert region.active.equal(best)  # ascending


def test_scores_of_half_precision_are_ranked_in_float32(monkeypatch):
    score = torch.tensor([[0.0, 6e-8, 1e-4, 0.5]], dtype=torch.float16)
    monkeypatch.setitem(SCORES, "half", lambda history: score)
    history = after_one_step(random_velocity(0, 1, 4))
    history = history._replace(skips=torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    log = priority(RASConfig(score="half", prefer="high", starvation=1.0), history)
    assert log.dtype == torch.float32 and log.isfinite().all()
    assert log[0, 0].item() == pytest.approx(1 - 30 * 2.302585)


@pytest.mark.parametrize("score", [torch.ones(1, 64), torch.zeros(1, 64)])
def test_equal_tokens_are_taken_in_row_major_order(monkeypatch, score):
    monkeypatch.setitem(SCORES, "equal", lambda history: score)
    history = after_one_step(random_velocity(0, 1, 64))
    for prefer in ("low", "high"):
        config = RASConfig(score="equal", prefer=prefer)
        assert select(config, history, 16).tolist() == [list(range(16))]


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        (lambda h: h.velocity, "returned torch.float32 (1, 8, 4, 4), must be"),
        (lambda h: h.age.long(), "returned torch.int64 (1, 8), must be a floating-point tensor"),
        (lambda h: [1.0], "score 'mine' returned [1.0], must be a floating-point tensor (1, 8)"),
    ],
)
def test_a_rule_that_returns_something_else_is_named(monkeypatch, rule, sentence):
    monkeypatch.setitem(SCORES, "mine", rule)
    with pytest.raises(ValueError) as error:
        select(RASConfig(score="mine"), after_one_step(random_velocity(0, 1, 8)), 3)
    assert sentence in str(error.value)


def test_a_score_of_ones_own_is_one_entry(monkeypatch):
    def centre(history: History) -> torch.Tensor:
        return torch.arange(1.0, history.velocity.shape[1] + 1).expand(history.velocity.shape[:2])

    monkeypatch.setitem(SCORES, "centre", centre)
    history = after_one_step(random_velocity(0, 1, 8))
    config = RASConfig(score="centre", prefer="high")
    assert select(config, history, 3).tolist() == [[5, 6, 7]]


@given(seeds, st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3))
def test_patchify_and_unpatchify_are_inverse_and_row_major(seed, batch, h, w, patch):
    pixels = torch.randn(batch, 3, h * patch, w * patch)
    tokens = patchify(pixels, patch)
    assert tokens.shape == (batch, h * w, patch * patch, 3)
    assert unpatchify(tokens, h * patch, w * patch, patch).equal(pixels)
    row, column = seed % h, seed % w
    cell = pixels[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
    assert tokens[:, row * w + column].equal(cell.flatten(2).transpose(1, 2))


@pytest.mark.parametrize(
    ("value", "count", "number"),
    [
        (3, True, True), (-2, True, True), (2**31 - 1, True, True), (2**31, False, True),
        (np.int64(3), True, True), (np.float32(0.5), False, True), (2.0, False, True),
        (True, False, False), (float("nan"), False, False), (10**400, False, False),
        ("3", False, False), (None, False, False),
    ],
)  # fmt: skip
def test_what_is_a_count_and_what_a_number(value, count, number):
    assert bool(is_count(value)) is count and bool(is_number(value)) is number


@given(st.text(max_size=200), st.integers(10, 90))
def test_a_value_in_a_sentence_is_one_line_of_bounded_length(text, length):
    shown = short(text, length)
    assert len(shown) <= length and "\n" not in shown
    whole = " ".join(repr(text).split())
    assert shown == whole if len(whole) <= length else shown == f"{whole[: length - 3]}..."
    assert len(short("x" * 200, length)) == length and short("x" * 200, length).endswith("...")


def test_history_knows_when_every_token_was_last_computed():
    first, second, third, fourth = (random_velocity(i, 1, 4) for i in range(4))
    history = after_one_step(first)
    assert history.region is None and history.step == 0
    region = Region(torch.tensor([[0, 2]]), history.velocity)
    history = observe(history, second, mask_of(region.active, 4), torch.full((1, 4), 0.8), region)
    only = Region(region.active[:, :1], history.velocity)
    history = observe(history, third, mask_of(only.active, 4), torch.full((1, 4), 0.5), only)
    expected = torch.stack((third[0, 0], first[0, 1], second[0, 2], first[0, 3]))[None]
    assert history.velocity.equal(expected)
    assert history.sigma.tolist() == [pytest.approx([0.5, 1.0, 0.8, 1.0])]
    assert history.age.tolist() == [[0, 2, 1, 2]] and history.skips.tolist() == [[0, 2, 1, 2]]
    dense = torch.ones(1, 4, dtype=torch.bool)
    history = observe(history, fourth, dense, torch.full((1, 4), 0.2), None)
    assert history.age.tolist() == [[0, 0, 0, 0]] and history.skips.tolist() == [[0, 2, 1, 2]]
    assert history.velocity.equal(fourth) and history.region is only and history.step == 3
