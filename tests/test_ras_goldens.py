"""Recorded runs of microsoft/RAS, reproduced token for token."""

from __future__ import annotations

import json
from dataclasses import fields
from functools import cache

import pytest
import torch
from conftest import GOLDENS
from safetensors.torch import load_file

import minidit
from minidit import denoise, flow_sigmas
from ras import Upstream

CASES = {case["id"]: case for case in json.loads((GOLDENS / "ras" / "cases.json").read_text())}


@cache
def tensors() -> dict[str, torch.Tensor]:
    return load_file(GOLDENS / "ras" / "cases.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_recorded_run(name):
    case = CASES[name]
    data = {k.split("/")[1]: v for k, v in tensors().items() if k.startswith(name + "/")}
    model = minidit.load_component(GOLDENS / "ras" / case["model"], "transformer")
    settings = {f.name: case["settings"][f.name] for f in fields(Upstream)}

    embeds, more = data["prompt_embeds"], ("pooled", data.get("pooled"))
    positive, negative = (1, 0) if case["family"] == "sd3" else (0, 1)
    if case["family"] == "lumina":
        more = ("context_mask", data["prompt_mask"])

    def conditioning(row):
        return {"context": embeds[row : row + 1], more[0]: more[1][row : row + 1]}

    positive = positive if len(embeds) > 1 else 0
    latents, trace = denoise(
        model,
        data["latents_init"],
        flow_sigmas(case["steps"], case["shift"]),
        conditioning(positive),
        conditioning(negative) if case["cfg"] else None,
        case["guidance"] if case["cfg"] else 1.0,
        ras=Upstream(**settings),
    )
    active = torch.stack([mask[0] for mask in trace.active])
    assert active.equal(data["active"].bool())
    assert (latents - data["final"]).abs().max() < 1e-3
