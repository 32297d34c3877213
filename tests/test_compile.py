"""Blocks that torch compiles: what they compute, and how often they are compiled."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import conditioning, noise, tiny_model

import cli
from minidit import denoise
from minidit.flow import flow_sigmas
from ras import RASConfig


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd3.5-medium", "lumina", "lumina2", "flux-dev"])
def test_compiled_blocks_draw_the_same_and_are_compiled_once_a_kind(family):
    """Not once a layer, and not once a ratio. Dense without a cache, dense with one, and regional
    make three, and three more for steps of any number of tokens."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.manual_seed(0)
    network = type(tiny_model(family))(replace(tiny_model(family).config, num_layers=7))
    for weight in network.requires_grad_(False).parameters():
        weight.add_(0.02 * torch.randn_like(weight))  # gates that start as zero open
    ras = RASConfig(ratio=0.5, fall=0.5, start=3, refresh=2)
    conds = [conditioning(family, 1, seed) for seed in (1, 9)]
    arguments = noise(1, 8, 8), flow_sigmas(14, 3.0), *conds, 3.0
    wanted, trace = denoise(network, *arguments, ras=ras)
    torch.compiler.reset()
    cli.compile_blocks(network, backend=backend)
    found, _ = denoise(network, *arguments, ras=ras)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert len({step.active for step in trace.steps}) > 3
    kinds = {kind(block) for block in network.modules() if block._compiled_call_impl}
    assert 3 <= len(graphs) <= 6 * len(kinds)


def kind(block: torch.nn.Module) -> tuple:
    """What makes another program of a block."""
    flags = (getattr(block, name, None) for name in ("last", "dual", "modulation"))
    return type(block), *map(bool, flags)
