"""The plan: a pure function, exact counts, and a sentence for everything impossible."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ras
from ras import PRESETS, Given, RASConfig, Upstream, plan

ratios = st.floats(0.01, 1.0, exclude_max=True)


@given(ratios, st.integers(2, 40), st.integers(1, 300), st.data())
def test_counts_and_kinds_are_exact(ratio, steps, tokens, data):
    start = data.draw(st.integers(1, steps - 1))
    end = data.draw(st.none() | st.integers(start, steps - 1))
    last = steps - 1 if end is None else end
    refresh = data.draw(st.lists(st.integers(start, last), unique=True).map(tuple))
    config = RASConfig(ratio=ratio, start=start, end=end, refresh=refresh)
    steps_ = plan(config, steps, tokens)
    count = max(1, round(ratio * tokens))
    assert len(steps_) == steps
    for t, step in enumerate(steps_):
        regional = start <= t <= last and t not in refresh and count < tokens
        assert step.regional == regional
        assert step.active == (count if regional else tokens)


@given(st.floats(0.3, 0.7), st.floats(-0.5, 0.5), st.integers(6, 60))
def test_a_falling_ratio_is_linear_and_keeps_its_mean(ratio, fall, steps):
    config = RASConfig(ratio=ratio, fall=fall, start=2, end=None, refresh=0)
    counts = [step.active for step in plan(config, steps, 10_000)[2:]]
    assert sum(counts) / len(counts) == pytest.approx(ratio * 10_000, abs=1)
    slopes = [a - b for a, b in zip(counts[1:], counts, strict=False)]
    assert max(slopes) - min(slopes) <= 1
    assert counts[0] - counts[-1] == pytest.approx(fall * 10_000, abs=1)


@given(st.integers(0, 6), st.integers(1, 8), st.integers(2, 50), st.integers(0, 9))
def test_refresh_steps_are_spread_evenly(count, start, length, later):
    end = start + length - 1 if later else None
    steps = plan(RASConfig(start=start, end=end, refresh=count), start + length + later, 64)
    assert not any(step.regional for step in (*steps[:start], *steps[start + length :]))
    dense = [t for t in range(start, start + length) if not steps[t].regional]
    assert len(dense) == min(count, (length - 1) // 2)
    edges = [start - 1, *dense, start + length]
    stretches = [b - a for a, b in zip(edges, edges[1:], strict=False)]
    assert max(stretches) - min(stretches) <= 1
    assert min(stretches) > 1  # every refresh has regional steps on both sides


@pytest.mark.parametrize("fall", [0.5, -0.5])
def test_a_falling_ratio_may_reach_one_which_is_dense(fall):
    config = RASConfig(ratio=0.75, fall=fall, start=1, end=None, refresh=0)
    counts = [100, 88, 75, 62, 50][:: 1 if fall > 0 else -1]
    steps = plan(config, 6, 100)
    assert [step.active for step in steps] == [100, *counts]
    assert [step.regional for step in steps] == [False] + [count < 100 for count in counts]


@given(st.floats(-0.5, 0.5), st.integers(1, 9))
def test_the_ratio_of_a_single_regional_step_is_the_mean(fall, step):
    config = RASConfig(ratio=0.5, fall=fall, start=step, end=step, refresh=0)
    assert [one.active for one in plan(config, 10, 1000)] == [1000] * step + [500] + [1000] * (
        9 - step
    )


def test_two_refreshes_of_28_steps_are_the_ones_of_the_official_script():
    steps = plan(RASConfig(start=4, end=None, refresh=2), 28, 256)
    assert [t for t in range(4, 28) if not steps[t].regional] == [12, 20]


@given(st.integers(2, 100))
def test_shares_of_the_run_fit_any_number_of_steps(steps):
    """The default preset works from two steps on; start and refresh keep their shares."""
    regional = [
        step.regional for step in plan(RASConfig(start=0.35, end=None, refresh=0.22), steps, 64)
    ]
    start = regional.index(True)
    assert start == max(1, round(0.35 * steps))
    dense = regional[start:].count(False)
    assert dense == min(round(0.22 * (steps - start)), (steps - start - 1) // 2)


@given(st.integers(1, 30), st.integers(1, 500))
def test_ratio_one_is_all_dense(steps, tokens):
    for config in (RASConfig(ratio=1), RASConfig(ratio=1, start=1, end=99)):
        assert plan(config, steps, tokens) == (ras.Step(False, tokens),) * steps


def test_a_plan_is_the_same_for_every_call_and_prints():
    first, second = (plan(RASConfig(), 28, 256) for _ in range(2))
    assert first == second
    assert "regional=True, active=128" in str(first)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"ratio": 0}, "ratio is 0, must be in (0, 1]"),
        ({"ratio": 1.2}, "ratio is 1.2"),
        ({"ratio": float("nan")}, "ratio is nan"),
        ({"ratio": "half"}, "ratio is 'half'"),
        ({"ratio": True}, "ratio is True, must be a finite number"),
        ({"starvation": False}, "starvation is False, must be a finite number"),
        ({"starvation": float("inf")}, "starvation is inf"),
        ({"start": 0}, "start is 0"),
        ({"start": 0.0}, "start is 0.0"),
        ({"end": 0.0}, "end is 0.0"),
        ({"refresh": 0.0}, "refresh is 0.0"),
        ({"start": True}, "start is True"),
        ({"start": 1.5}, "start is 1.5, must be a number of steps of at least 1, or a share"),
        ({"start": 4, "end": 3}, "end is 3, must be at least start = 4"),
        ({"start": 4, "refresh": (2,)}, "refresh is (2,), must be step numbers from start = 4"),
        ({"refresh": -1}, "refresh is -1"),
        ({"refresh": 1.0}, "refresh is 1.0"),
        ({"fall": 1.2}, "fall is 1.2"),
        ({"ratio": 0.25, "fall": 0.5}, "which spans 0 to 0.5"),
        ({"ratio": 0.25, "fall": -0.5}, "which spans 0 to 0.5"),
        ({"ratio": 0.25, "fall": -0.6}, "which spans -0.05 to 0.55"),
        ({"ratio": 0.8, "fall": 0.6}, "which spans 0.5 to 1.1"),
        ({"ratio": 0.8, "fall": -0.6}, "which spans 0.5 to 1.1"),
        ({"score": "entropy"}, "score is 'entropy', must be one of std"),
        ({"prefer": "middle"}, "prefer is 'middle'"),
        ({"starvation": -1}, "starvation is -1"),
        ({"end": 1.5}, "end is 1.5, must be None, a step number, or a share in (0, 1)"),
        ({"end": 0}, "end is 0, must be at least start = 1"),  # start is a share
        ({"end": True}, "end is True"),
        ({"refresh": (9, 9.5)}, "refresh is (9, 9.5), must be step numbers from start = 1"),
        ({"refresh": (True,)}, "refresh is (True,)"),
        ({"fall": float("nan")}, "fall is nan, must be a finite number"),
        ({"score": ["std"]}, "score is ['std'], must be one of std"),
        ({"starvation": 10**400}, "starvation is 1000"),
    ],
)
def test_impossible_settings_are_named(settings, sentence):
    with pytest.raises(ValueError) as error:
        RASConfig(**settings)
    assert sentence in str(error.value)


@given(st.integers(2, 120))
def test_the_default_never_takes_two_regional_steps_in_a_row(steps):
    done = plan(RASConfig.preset("default"), steps, 64)
    regional = [step.regional for step in done]
    assert not regional[0] and (any(regional) or steps < 3)
    assert not any(a and b for a, b in zip(regional, regional[1:], strict=False))


@pytest.mark.parametrize(("steps", "last"), [(20, 16), (28, 23), (50, 41)])
def test_a_share_as_end_keeps_the_rest_of_the_run_dense(steps, last):
    done = plan(RASConfig(start=2, end=0.85, refresh=0), steps, 64)
    assert [i for i, step in enumerate(done) if step.regional] == list(range(2, last + 1))
    early = plan(RASConfig(start=15, end=0.2, refresh=0), steps, 64)
    assert [i for i, step in enumerate(early) if step.regional] == [15]  # one at least


@pytest.mark.parametrize(
    ("config", "steps", "sentence"),
    [
        (RASConfig(end=20), 20, "end is 20, must be within 7..19 in this run"),
        (
            RASConfig(start=4, end=None, refresh=(9, 30, 31)),
            28,
            "refresh names step 30, must be within 4..27",
        ),
        (RASConfig, 28, "config is <class 'ras.config.RASConfig'>, must be a ras.RASConfig or"),
        ("paper", 28, "config is 'paper', must be a ras.RASConfig or"),
        (Upstream(), 0, "steps is 0"),
        (Upstream(error_reset_steps=(30, 31)), 30, "names step 30, must be below steps = 30"),
        (RASConfig(), 0, "steps is 0"),
        (RASConfig(), 2.0, "steps is 2.0, must be an integer"),
        (RASConfig.preset("upstream_sd3"), 20, "error_reset_steps names step 20"),
        (Upstream(sample_ratio=0.99, error_reset_steps=()), 28, "leave 0 of 64 tokens"),
    ],
)
def test_configs_that_do_not_fit_the_run_are_named(config, steps, sentence):
    with pytest.raises(ValueError) as error:
        plan(config, steps, 64)
    assert sentence in str(error.value)


@pytest.mark.parametrize("config", [RASConfig(), Upstream(), Given(mask=torch.ones(1, 1, 64) > 0)])
def test_a_run_has_at_least_one_token_and_at_most_10000_steps(config):
    assert len(plan(config, 10_000, 64)) == 10_000
    with pytest.raises(ValueError, match="steps is 10001, must be at most 10000"):
        plan(config, 10_001, 64)
    for tokens in (0, -1, 64.0, True):
        with pytest.raises(ValueError, match=f"tokens is {tokens}, must be an integer"):
            plan(config, 28, tokens)


@pytest.mark.parametrize("name", ["default", "paper"])
@pytest.mark.parametrize("steps", range(1, 40))
def test_a_run_of_any_length_fits_a_preset(name, steps):
    """Steps that a preset cannot make regional are dense: nobody typed its `start`."""
    done = plan(RASConfig.preset(name), steps, 64)
    assert len(done) == steps and not done[0].regional


@pytest.mark.parametrize("steps", [1, 8, 20])
def test_official_presets_name_what_a_short_run_lacks(steps):
    with pytest.raises(ValueError, match="error_reset_steps names step .*: take more steps"):
        plan(RASConfig.preset("upstream_sd3"), steps, 256)


def test_upstream_lumina_at_256_tokens_fails_as_the_official_code_does_and_says_what_to_do():
    with pytest.raises(ValueError, match="suits the 4096 tokens of 1024 px: scale it with"):
        plan(RASConfig.preset("upstream_lumina"), 30, 256)


def test_the_default_config_is_the_default_preset():
    assert RASConfig() == RASConfig.preset("default")


@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 5))
def test_half_of_a_range_is_every_other_step(start, length, later):
    """Where it is even the last step of it, too."""
    config = RASConfig(start=start, end=start + length - 1, refresh=0.5)
    steps = plan(config, start + length + later, 64)
    within = [i % 2 == 0 for i in range(length)]
    assert [step.regional for step in steps] == [False] * start + within + [False] * later


def test_numbers_of_numpy_are_numbers():
    config = RASConfig(ratio=np.float32(0.5), start=np.int64(2), end=None, refresh=(np.int64(3),))
    steps = plan(config, np.int64(6), 10)
    assert [step.active for step in steps] == [10, 10, 5, 10, 5, 5]
    assert [type(step.active) for step in steps] == [int] * 6


def test_every_choice_of_the_presets():
    """Tables and pictures in the documentation are of these."""
    assert RASConfig() == RASConfig(
        ratio=0.5, fall=0.0, start=0.35, end=0.75, refresh=0.5, score="error", prefer="high",
        starvation=0.0,
    )  # fmt: skip
    assert RASConfig.preset("paper") == RASConfig(
        ratio=0.5, fall=0.25, start=4, end=None, refresh=2, score="std", prefer="low",
        starvation=1.0,
    )  # fmt: skip
    assert RASConfig.preset("upstream_sd3") == Upstream(
        sample_ratio=0.5, metric="std", high_ratio=0.3, starvation_scale=0.1,
        scheduler_start_step=4, scheduler_end_step=28, error_reset_steps=(12, 20),
    )  # fmt: skip
    assert RASConfig.preset("upstream_lumina") == Upstream(
        sample_ratio=0.5, metric="std", high_ratio=1.0, starvation_scale=0.1,
        scheduler_start_step=4, scheduler_end_step=30, error_reset_steps=(12, 22),
        skip_num_step=256, skip_num_step_length=4,
    )  # fmt: skip


def test_lists_of_steps_are_as_good_as_tuples():
    assert RASConfig(refresh=[9]) == RASConfig(refresh=(9,))
    assert Upstream(error_reset_steps=[0, 9]) == Upstream(error_reset_steps=(0, 9))


def test_presets():
    for name in ("default", "paper", "upstream_sd3", "upstream_lumina"):
        assert any(step.regional for step in plan(RASConfig.preset(name), 30, 4096))
    for other in ("fast", ["paper"], None):
        with pytest.raises(KeyError, match=re.escape(f"no preset {other!r}, only default")):
            RASConfig.preset(other)


def test_with_ratio_reaches_the_official_settings_too():
    assert RASConfig.preset("paper").with_ratio(0.25).ratio == 0.25
    assert RASConfig.preset("upstream_sd3").with_ratio(0.25).sample_ratio == 0.25
    for preset in PRESETS.values():  # and nothing else
        assert preset.with_ratio(0.5).with_ratio(getattr(preset, "ratio", 0.5)) == preset


def test_upstream_counts_as_its_scripts_have_them():
    sd3 = plan(RASConfig.preset("upstream_sd3"), 28, 4096)
    assert {step.active for step in sd3} == {4096, 4096 - 2047}  # both bars rounded down
    lumina = plan(RASConfig.preset("upstream_lumina"), 30, 4096)
    dropped = [4096 - step.active for step in lumina if step.regional]
    assert sorted(set(dropped)) == [1280, 1536, 1792, 2048, 2304, 2560, 2816]
    assert sum(dropped) / len(dropped) == 1984
