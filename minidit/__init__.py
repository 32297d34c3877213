"""Stable Diffusion 3 / 3.5 and Lumina-Next in pure PyTorch, with Region-Adaptive Sampling."""

from __future__ import annotations

from typing import Any

import torch

from minidit.flow import denoise, flow_sigmas


def load_component(
    path: str, name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """One part of a model repository: see `weights.load.load_component`."""
    from weights.load import load_component

    return load_component(path, name, device=device, dtype=dtype)
