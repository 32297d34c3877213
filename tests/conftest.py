"""Tiny models with random weights, and what the tests of both families share."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from minidit.flux import Flux, FluxConfig
from minidit.lumina2 import Lumina2, Lumina2Config
from minidit.mmdit import MMDiT, MMDiTConfig
from minidit.nextdit import NextDiT, NextDiTConfig

pytest_plugins = ["training_runs"]  # fixtures of test_train*.py

GOLDENS = Path(__file__).parent / "goldens"


def rounding(output: dict) -> float:
    """How far a recorded output may be off: what two implementations differed by on one machine,
    and more, since exp, sine and matrix products round differently on another processor."""
    return 4 * output["tight_atol"]


FAMILIES = (
    "sd3-medium", "sd3.5-large", "sd3.5-medium", "lumina", "lumina2", "flux-dev", "flux-schnell",
)  # fmt: skip

torch.set_num_threads(1)  # tiny matrices: threads only wait for each other
settings.register_profile(
    "default",
    deadline=None,
    max_examples=25,
    derandomize=True,  # the suite gives the same verdict every time
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("default")


@cache
def tiny_model(family: str) -> torch.nn.Module:
    """A model of three or four blocks whose every weight matters: gates and heads are not zero."""
    if family == "lumina":
        config = NextDiTConfig(
            sample_size=8, hidden_size=48, num_layers=3, num_attention_heads=4, num_kv_heads=2,
            multiple_of=16, cross_attention_dim=20,
        )  # fmt: skip
        return randomised(NextDiT(config))
    if family == "lumina2":
        config = Lumina2Config(
            sample_size=8, in_channels=4, hidden_size=48, num_layers=2, num_refiner_layers=2,
            num_attention_heads=4, num_kv_heads=2, multiple_of=16, axes_dim_rope=(4, 4, 4),
            axes_lens=(64, 16, 16), cap_feat_dim=20,
        )  # fmt: skip
        return randomised(Lumina2(config))
    if family.startswith("flux"):
        config = FluxConfig(
            in_channels=16, num_layers=2, num_single_layers=2, num_attention_heads=2,
            attention_head_dim=16, joint_attention_dim=20, pooled_projection_dim=12,
            guidance_embeds=family == "flux-dev", axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
        return randomised(Flux(config))
    config = MMDiTConfig(
        sample_size=8, in_channels=4, out_channels=4, num_layers=3, num_attention_heads=2,
        attention_head_dim=16, joint_attention_dim=20, caption_projection_dim=32,
        pooled_projection_dim=12, pos_embed_max_size=12,
        qk_norm=None if family == "sd3-medium" else "rms_norm",
        dual_attention_layers=(0, 2) if family == "sd3.5-medium" else (),
    )  # fmt: skip
    return randomised(MMDiT(config))


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter and buffer drawn anew, norms around one."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        scale = value.shape[1] ** -0.5 if value.ndim > 1 and name != "pos_embed" else 0.2
        noise = scale * torch.randn(value.shape, generator=generator)
        value.data.copy_(noise + 1 if "norm" in name and name.endswith("weight") else noise)
    return model.eval().requires_grad_(False)


def conditioning(family: str, batch: int, seed: int = 1, tokens: int = 5) -> dict:
    """Random conditioning of `batch` prompts for the tiny model of a family."""
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(batch, tokens, 20, generator=generator)
    if family.startswith("lumina"):
        lengths = torch.arange(batch) % tokens + 1
        return {"context": context, "context_mask": torch.arange(tokens) < lengths[:, None]}
    cond = {"context": context, "pooled": torch.randn(batch, 12, generator=generator)}
    if family == "flux-dev":
        cond["guidance"] = 1.0 + torch.arange(batch)
    return cond


def noise(batch: int, height: int, width: int, seed: int = 2) -> torch.Tensor:
    """Random latents for the tiny models."""
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Every kind of network that RAS runs in."""
    return request.param
