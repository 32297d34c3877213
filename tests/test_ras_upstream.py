"""Upstream against a second, naive version of the official rule, over settings of any kind."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minidit import denoise
from ras import Upstream, plan
from ras.tokens import mask_of, patchify, unpatchify


class Crash(Exception):
    """What the official code does with these settings."""


class Official:
    """One picture's run as microsoft/RAS computes it, token by token in plain Python.

    Written from a description of the official code (part B of the project's notes), not from
    ras/upstream.py: `stale`, `held`, `drops` and the order of events carry the official meaning.
    """

    def __init__(self, how: Upstream, steps: int, rows: int, columns: int) -> None:
        self.how, self.tokens = how, rows * columns
        self.first, self.last = how.scheduler_start_step, how.scheduler_end_step
        average = int((1 - how.sample_ratio) * rows * columns)
        self.skip = []
        for t in range(steps):
            skip, length = average, how.skip_num_step_length
            if length:
                group = t // length - ((steps + self.first) // length) // 2
                skip = 64 * math.floor((average + how.skip_num_step * group) / 64)
            if t < self.first or t in how.error_reset_steps:
                skip = 0
            self.skip.append(skip)
        self.drops, self.stale, self.held = [-(steps + 1.0)] * self.tokens, None, None

    def regional(self, t: int) -> bool:
        how = self.how
        within = self.first <= t <= self.last and t not in how.error_reset_steps
        return within and how.sample_ratio < 1

    def merge(self, t: int, fresh: list) -> tuple[list[int] | None, list]:
        """The active tokens of step t, None for all, and its velocities where stale ones hold."""
        if not self.regional(t):
            return None, fresh
        if self.stale is None or len(self.stale) == self.tokens:
            raise Crash
        merged = [self.held[n] if n in self.stale else fresh[n] for n in range(self.tokens)]
        return [n for n in range(self.tokens) if n not in self.stale], merged

    def choose(self, t: int, merged: list) -> None:
        """At the end of step t, for step t + 1: the end step does not choose, except after 0."""
        ahead = t + 1
        inside = self.first <= ahead <= self.last if t == 0 else self.first <= ahead < self.last
        if not inside or ahead in self.how.error_reset_steps or ahead >= len(self.skip):
            return
        score = [self.score(token) * math.exp(self.how.starvation_scale * drops)
                 for token, drops in zip(merged, self.drops, strict=True)]  # fmt: skip
        order = sorted(range(self.tokens), key=score.__getitem__)
        skip, high_ratio = self.skip[ahead], self.how.high_ratio
        if not 0 <= skip <= self.tokens:
            raise Crash
        low, high = int(skip * (1 - high_ratio)), int(skip * high_ratio)
        self.stale = set(order[:low] + order[-high:])
        if len(self.stale) == self.tokens:  # -0 is 0: nothing asked at the high end drops all
            raise Crash
        self.held = merged
        for n in self.stale:
            self.drops[n] += 1

    def score(self, token: list) -> float:
        """Of the pixels of a patch, each a list of channels."""
        of_pixels = []
        for pixel in token:
            if self.how.metric == "l2norm":
                of_pixels.append(math.sqrt(sum(x * x for x in pixel)))
            else:
                mean = sum(pixel) / len(pixel)
                squares = sum((x - mean) ** 2 for x in pixel)
                of_pixels.append(math.sqrt(squares / (len(pixel) - 1)))
        return sum(of_pixels) / len(of_pixels)


@st.composite
def official_runs(draw) -> tuple[Upstream, int, tuple[int, int]]:
    """Settings, steps and grid of tokens."""
    steps = draw(st.integers(2, 9))
    start = draw(st.integers(1, steps))
    end = draw(st.integers(start, steps))
    resets = draw(st.sets(st.integers(0, steps - 1), max_size=3))
    grid, length = draw(st.sampled_from([(4, 4), (6, 8), (3, 5), (7, 7), (5, 2)])), 0
    if draw(st.booleans()):  # in multiples of 64 tokens
        grid, length = draw(st.sampled_from([(12, 12), (14, 11)])), draw(st.integers(1, 4))
    how = Upstream(
        sample_ratio=draw(st.integers(1, 15)) / 16,
        metric=draw(st.sampled_from(["std", "l2norm"])),
        high_ratio=draw(st.sampled_from([1.0, 0.9, 0.7, 0.5, 0.3, 0.1])),
        starvation_scale=draw(st.sampled_from([0.0, 0.1, 0.4, 1.0])),
        scheduler_start_step=start,
        scheduler_end_step=end,
        error_reset_steps=tuple(resets),
        skip_num_step=draw(st.integers(-40, 40)) if length else 0,
        skip_num_step_length=length,
    )
    return how, steps, grid


@settings(max_examples=80)
@given(official_runs(), st.integers(0, 2**31))
def test_every_step_is_that_of_the_naive_version(run, seed):
    """Active sets in ascending order, and velocities to the bit: what stale tokens hold, too."""
    how, steps, (h, w) = run
    generator = torch.Generator().manual_seed(seed)
    fields = torch.randn(steps, 2, 3, 2 * h, 2 * w, generator=generator)
    fields *= torch.randn(steps, 2, 1, 2 * h, 2 * w, generator=generator).exp()

    wanted = []
    try:
        runs = [Official(how, steps, h, w) for _ in range(2)]
        for t, field in enumerate(fields):
            rows = []
            for one, fresh in zip(runs, patchify(field, 2).tolist(), strict=True):
                active, merged = one.merge(t, fresh)
                one.choose(t, merged)
                rows.append((active, merged))
            wanted.append(rows)
    except Crash:
        with pytest.raises(ValueError):
            plan(how, steps, h * w)
        return

    calls, seen = iter(fields), []

    def model(latents, sigma, active=None, cache=None):
        field = next(calls)
        if active is None:
            return field
        computed = mask_of(active, h * w)[:, :, None].expand(-1, -1, 4)
        return torch.where(unpatchify(computed, 2 * h, 2 * w, 2), field, 99.0)  # nobody reads it

    denoise(
        model, torch.zeros(2, 3, 2 * h, 2 * w), torch.linspace(1, 0, steps + 1), {}, ras=how,
        callback=lambda *args: seen.append(args[3:]),
    )  # fmt: skip
    planned = [None if not step.regional else step.active for step in plan(how, steps, h * w)]
    assert planned == [None if active is None else active.shape[1] for _, active in seen]
    for (velocity, active), rows in zip(seen, wanted, strict=True):
        assert patchify(velocity, 2).equal(torch.tensor([merged for _, merged in rows]))
        sets = [row for row, _ in rows]
        assert sets == ([None, None] if active is None else active.tolist())


def test_products_of_ratio_and_sides_are_truncated_from_left_to_right():
    """0.1 * 10 * 10 need not be 0.1 * 100, and (1 - 0.9) * N is not N - 0.9 * N."""
    for side in range(3, 41):
        for hundredths in range(5, 96):
            ratio = hundredths / 100
            stale = int((1 - ratio) * side * side)
            how = Upstream(sample_ratio=ratio, scheduler_start_step=1, error_reset_steps=())
            if stale:
                assert plan(how, 3, side * side)[1].active == side * side - stale


@given(st.integers(2, 40), st.integers(1, 12), st.integers(1, 9), st.sampled_from([-64, 64, 256]))
def test_groups_of_steps_leave_out_more_and_more_tokens(steps, start, length, each):
    """By `each` from one group of `length` steps to the next; around half of steps + start it is
    the average of the ratio, as far as whole groups allow."""
    how = Upstream(
        scheduler_start_step=start, scheduler_end_step=99, error_reset_steps=(),
        skip_num_step=each, skip_num_step_length=length,
    )  # fmt: skip
    middle = int(int((steps + start) / length) / 2)
    wanted = [2**19 + each * (t // length - middle) for t in range(start, steps)]
    assert [2**20 - step.active for step in plan(how, steps, 2**20)[start:]] == wanted


def test_the_step_after_the_first_chooses_even_where_it_is_the_end_step():
    how = Upstream(scheduler_start_step=1, scheduler_end_step=1, error_reset_steps=())
    assert [step.regional for step in plan(how, 4, 16)] == [False, True, False, False]
    later = Upstream(scheduler_start_step=2, scheduler_end_step=2, error_reset_steps=())
    with pytest.raises(ValueError, match="step 2 is regional but nothing was ever selected"):
        plan(later, 4, 16)


def test_a_reset_before_the_end_step_repeats_the_set_and_the_velocities_of_the_last_region():
    how = Upstream(scheduler_start_step=1, scheduler_end_step=3, error_reset_steps=(2,))
    fields = torch.randn(4, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    calls, seen = iter(fields), []
    denoise(
        lambda x, sigma, active=None, cache=None: next(calls), torch.zeros(1, 3, 8, 8),
        torch.linspace(1, 0, 5), {}, ras=how, callback=lambda *args: seen.append(args[3:]),
    )  # fmt: skip
    (_, none), (_, active), (dense, no), (end, again) = seen
    assert none is None and no is None and dense.equal(fields[2]) and again.equal(active)
    computed = mask_of(active, 16)[:, :, None, None]
    assert patchify(end, 2).equal(
        torch.where(computed, patchify(fields[3], 2), patchify(fields[0], 2))
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"skip_num_step": 64, "skip_num_step_length": 1}, "leave -64 of 144 tokens out at step 1"),
        (
            {"skip_num_step": -64, "skip_num_step_length": 1},
            "leave 192 of 144 tokens out at step 1",
        ),
        ({"sample_ratio": 0.999}, "leave 0 of 144 tokens out at step 1"),
        ({"high_ratio": 0.01}, "leave 72 of 144 tokens out at step 1 (71 low, 0 high)"),
    ],
)
def test_what_the_official_code_cannot_do_is_named(change, sentence):
    how = Upstream(**{"scheduler_start_step": 1, "error_reset_steps": ()} | change)
    with pytest.raises(ValueError) as error:
        plan(how, 6, 144)
    assert sentence in str(error.value)


def test_a_step_that_leaves_out_all_tokens_and_no_more_is_refused():
    how = Upstream(
        scheduler_start_step=1, error_reset_steps=(), skip_num_step=-32, skip_num_step_length=1
    )
    with pytest.raises(ValueError, match=r"leave 64 of 64 tokens out at step 1 \(0 low, 64 high"):
        plan(how, 6, 64)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"scheduler_start_step": 0}, "scheduler_start_step is 0, must be at least 1"),
        ({"scheduler_end_step": 3}, "scheduler_end_step is 3, must be at least 4"),
        ({"error_reset_steps": (-1,)}, "error_reset_steps is (-1,)"),
        ({"error_reset_steps": 12}, "error_reset_steps is 12"),
        ({"sample_ratio": 0}, "sample_ratio is 0, must be in (0, 1]"),
        ({"high_ratio": 0.0}, "high_ratio is 0.0, must be in (0, 1]"),
        ({"metric": "l2"}, "metric is 'l2', must be 'std' or 'l2norm'"),
        ({"starvation_scale": float("nan")}, "starvation_scale is nan"),
        ({"skip_num_step_length": -1}, "skip_num_step_length is -1"),
        ({"skip_num_step": 0.5}, "skip_num_step is 0.5, must be an integer"),
        ({"skip_num_step_length": 4.0}, "skip_num_step_length is 4.0, must be at least 0"),
        ({"scheduler_start_step": 4.0}, "scheduler_start_step is 4.0, must be an integer"),
        ({"scheduler_end_step": True}, "scheduler_end_step is True, must be an integer"),
        ({"error_reset_steps": (12, 1.5)}, "error_reset_steps is (12, 1.5)"),
        ({"sample_ratio": 1.01}, "sample_ratio is 1.01, must be in (0, 1]"),
        ({"high_ratio": 1.01}, "high_ratio is 1.01, must be in (0, 1]"),
        ({"starvation_scale": "a"}, "starvation_scale is 'a', must be a finite number"),
    ],
)
def test_impossible_settings_are_named(change, sentence):
    with pytest.raises(ValueError) as error:
        Upstream(**change)
    assert sentence in str(error.value)


def test_values_at_their_limits_are_possible():
    how = Upstream(sample_ratio=1, scheduler_start_step=1, error_reset_steps=(0,))
    assert [step.regional for step in plan(how, 5, 16)] == [False] * 5  # all active is dense
    assert Upstream(scheduler_start_step=7, scheduler_end_step=7).scheduler_end_step == 7
    nearly = Upstream(sample_ratio=1 / 16, scheduler_start_step=1, error_reset_steps=())
    assert plan(nearly, 4, 16)[1].active == 1
    with pytest.raises(ValueError, match="leave 16 of 16 tokens out at step 1"):
        plan(Upstream(sample_ratio=1e-18, scheduler_start_step=1, error_reset_steps=()), 4, 16)


def test_defaults_are_those_of_the_official_arguments():
    how = Upstream()
    assert (how.sample_ratio, how.metric, how.high_ratio, how.starvation_scale) == (
        0.5, "std", 1.0, 0.1,
    )  # fmt: skip
    assert (how.scheduler_start_step, how.scheduler_end_step) == (4, 30)
    assert how.error_reset_steps == (12, 22)
    assert (how.skip_num_step, how.skip_num_step_length) == (0, 0)
