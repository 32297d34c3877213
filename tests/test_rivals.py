"""rivals.py: every rule where its answer is known exactly, and every method of evaluate.py once."""

from __future__ import annotations

from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from conftest import GOLDENS, conditioning, noise, tiny_model
from hypothesis import given
from hypothesis import strategies as st

import evaluate
import minidit
import rivals
from minidit import denoise
from minidit.scheduler import SchedulerConfig
from ras import KVCache, RASConfig

PIPE = SimpleNamespace(scheduler=SchedulerConfig(shift=2.0))
STEPS, GRID = 12, (3, 4)


def drawing(path: rivals.Path | None = None) -> rivals.Drawing:
    """A run of twelve Euler steps, of which only levels and calibration are needed."""
    return rivals.Drawing(PIPE, ["a cat"], 0, STEPS, "euler", None, lambda steps, solver: path)


def draw(field, config=None, batch=1):
    """Latents of twelve Euler steps along a velocity that depends on the noise level alone."""
    sigmas = PIPE.scheduler.sigmas(STEPS, "euler", GRID[0] * GRID[1])

    def model(latents, sigma, active=None, cache=None):
        return field(sigma).expand(latents.shape)

    return denoise(model, noise(batch, 6, 8), sigmas, {}, ras=config)[0]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 3), st.sampled_from([1e-6, 0.3]), st.sampled_from(["error", "random"]))
def test_forecasts_are_exact_where_the_velocity_is_such_a_curve_in_the_noise_level(
    refresh, ratio, score
):
    config = RASConfig(start=3, end=None, refresh=refresh, ratio=ratio, score=score)
    a, b, c = random(3, 1, 4, 6, 8)
    for rule, field, exact in (
        (rivals.line, lambda s: a + b * s, True),
        (rivals.parabola, lambda s: a + b * s + c * s * s, True),
        (rivals.line, lambda s: a + b * s + c * s * s, False),
    ):
        found, dense = draw(field, rule(config, drawing())), draw(field)
        assert torch.allclose(found, dense, atol=1e-3) is exact


def test_a_forecast_starts_anew_in_every_run():
    rule = rivals.parabola(RASConfig(start=3, end=None, refresh=2, ratio=0.3), drawing())
    a, b = random(2, 1, 4, 6, 8)
    first = draw(lambda s: a + b * s, rule)
    draw(lambda s: b * s.exp(), rule, batch=2)
    assert draw(lambda s: a + b * s, rule).equal(first)


def test_scaled_velocities_are_exact_where_only_their_length_changes_as_calibrated():
    direction = random(1, 4, 6, 8)
    sigmas = PIPE.scheduler.sigmas(STEPS, "euler", 12)[:-1]
    velocity = (1 + sigmas**2)[:, None, None, None, None] * random(1, 2, 12, 4, 4, seed=1)
    path = rivals.Path(sigmas, velocity, velocity)
    config = RASConfig(start=2, end=None, refresh=2, ratio=0.3)
    found = draw(lambda s: (1 + s**2) * direction, rivals.Scaled(config, drawing(path)))
    assert torch.allclose(found, draw(lambda s: (1 + s**2) * direction), atol=1e-4)


@given(st.integers(0, 12), st.integers(1, 4), st.integers(0, 2**31))
def test_a_gate_makes_at_most_as_many_steps_dense_as_are_asked_for(refresh, start, seed):
    errors = random(20, seed=seed).abs()
    config = RASConfig(start=start, end=None, refresh=refresh)
    found = rivals.gated(config, 20, lambda i, last: errors[i].item()).refresh
    assert len(found) <= refresh and all(start <= i < 20 for i in found)
    assert sorted(set(found)) == list(found)


def test_a_gate_spreads_equal_errors_evenly():
    config = RASConfig(start=2, end=None, refresh=3)
    assert rivals.gated(config, 14, lambda i, last: 1.0).refresh == (5, 9, 13)


@pytest.mark.parametrize("rule", [rivals.tea_cache, rivals.mag_cache])
def test_gates_open_where_the_calibration_changes(rule):
    """In step 7 the input's and the output's size jump, and a little in every other step."""
    step = torch.arange(STEPS)
    size = (1 + 0.01 * (step % 5)).cumprod(0) * (1 + 9 * (step >= 7))
    velocity = size[:, None, None, None, None] * random(1, 2, 12, 4, 4)  # of step i
    after = velocity.roll(-1, dims=0)  # the input of step i is what step i - 1 left
    path = rivals.Path(torch.linspace(1, 0.1, STEPS), after, velocity)
    config = RASConfig(start=3, end=None, refresh=1)
    assert rule(config, drawing(path)).refresh == (7,)


@pytest.fixture(scope="module")
def pipe():
    return minidit.load(str(GOLDENS / "pipe_sd3"))


def test_tokens_chosen_once_stay(pipe):
    config = RASConfig(ratio=0.3, start=2, end=None, refresh=1)
    rule = rivals.Once(config, drawing())
    trace = pipe(["a cat"], steps=8, seed=0, height=48, width=48, ras=rule).trace
    regional = [a for a, step in zip(trace.active, trace.steps, strict=True) if step.regional]
    assert len(regional) == 5 and all(active.equal(regional[0]) for active in regional)


def test_the_oracle_takes_the_tokens_that_the_dense_run_moves_most(pipe):
    how = {"steps": 6, "solver": "corrected", "size": 48}
    path = rivals.dense_path(pipe, ["a cat", "a dog"], 0, **how)
    assert path.velocity.shape == path.after.shape == (6, 2, 9, 4, 16)
    task = rivals.Drawing(pipe, ["a cat", "a dog"], 0, **how, calibrate=None)
    rule = rivals.Oracle(RASConfig(ratio=0.3, start=3, end=None, refresh=0), task)
    trace = pipe(
        ["a cat", "a dog"], steps=6, solver="corrected", seed=0, height=48, width=48, ras=rule
    ).trace
    moved = (path.velocity[3] - path.velocity[2]).flatten(2).norm(dim=2)  # (2, 9)
    worst = moved.topk(3, dim=1).indices
    assert trace.active[3].gather(1, worst).all() and (trace.active[3].sum(dim=1) == 3).all()


def test_fresh_keys_are_those_of_a_dense_step(family):
    model, latents, cond = tiny_model(family), noise(2, 6, 8), conditioning(family, 2)
    fresh, sigma = rivals.FreshKeys(model), torch.tensor(0.4)
    stale = KVCache()
    if hasattr(model, "prepare"):
        cond = fresh.prepare(**cond)
    model(latents + 1, sigma, **cond, active=None, cache=stale)
    active = torch.tensor([[0, 5], [3, 11]])
    found = fresh(latents, sigma, **cond, active=active, cache=stale)
    assert found.equal(model(latents, sigma, **cond))
    assert fresh.config is model.config and fresh.guided_channels == model.guided_channels


@pytest.mark.slow
@pytest.mark.parametrize("name", evaluate.METHODS)
def test_every_method_draws(pipe, name):
    setting = evaluate.METHODS[name][1]
    calibrate = cache(partial(rivals.dense_path, pipe, ["a cat"], 0, size=48))
    latents, cost = evaluate.draw(pipe, setting, ["a dog"], 0, 48, calibrate)
    assert latents.isfinite().all() and 4 < cost < 28
    assert len(evaluate.METHODS[name]) >= 5


def test_the_plot_shows_methods_that_there_are():
    assert {*evaluate.NEARNESS, *evaluate.GAINS} <= set(evaluate.METHODS)


def test_lorenz_curves_of_known_errors():
    from lorenz import lorenz, table

    error = torch.tensor([[1.0, 4.0, 2.0, 3.0]])
    assert lorenz(error)[0].tolist() == pytest.approx([0, 0.4, 0.7, 0.9, 1])
    rising = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert lorenz(error, rising)[0].tolist() == pytest.approx([0, 0.3, 0.5, 0.9, 1])
    rows = table(torch.stack((rising, error)), [1.0, 0.7, 0.4]).splitlines()
    assert rows[2] == "| 1 | 0.700 | 0% | 40% | 70% |  | 2.2 |"
    assert rows[3] == "| 2 | 0.400 | 0% | 40% | 70% | 30% | 2.2 |"
