"""Stable Diffusion 3 / 3.5, FLUX.1, Lumina-Next and Lumina-Image 2.0 in pure PyTorch, with
Region-Adaptive Sampling.

import minidit, ras
pipe = minidit.load("mini-lumina")
out = pipe("a red apple on a sky blue background", seed=0, ras=ras.RASConfig(ratio=0.5))
out.images[0].save("apple.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from minidit import checks
from minidit.clip import CLIPTextEncoder
from minidit.flow import denoise, flow_sigmas
from minidit.flux import Flux, FluxConfig
from minidit.gemma import GemmaEncoder
from minidit.lumina2 import Lumina2, Lumina2Config
from minidit.mmdit import MMDiT, MMDiTConfig
from minidit.nextdit import NextDiT, NextDiTConfig
from minidit.pipeline import Output, Pipeline
from minidit.t5 import T5Encoder
from minidit.vae import AutoencoderKL

__version__ = "0.1.0"
__all__ = [
    "AutoencoderKL",
    "CLIPTextEncoder",
    "Flux",
    "FluxConfig",
    "GemmaEncoder",
    "Lumina2",
    "Lumina2Config",
    "MMDiT",
    "MMDiTConfig",
    "NextDiT",
    "NextDiTConfig",
    "Output",
    "Pipeline",
    "T5Encoder",
    "denoise",
    "flow_sigmas",
    "load",
    "load_component",
    "save",
]


def load(
    path: str | PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    offload: bool = False,
    use_t5: bool = True,
    extra: Sequence[str | PathLike[str]] = (),
) -> Pipeline:
    """A whole model: folder, single file, hub id, or "mini-sd3" / "mini-lumina".

    device "cpu", "cuda", "mps", or "meta" to check every name and shape without reading data
    dtype  of the weights in memory, whatever they are on disk
    offload  keep on the device only the part that is running
    use_t5   False leaves out SD3's third text encoder
    extra    files or folders with what a single file lacks (encoders, tokenizers), if not beside it
    Raises ValueError or FileNotFoundError, with nothing loaded, for files that do not fit.
    """
    from weights.load import load_parts

    checks.path("path", path)
    device = checks.device(device)
    checks.flag("offload", offload)
    checks.flag("use_t5", use_t5)
    kept = "cpu" if offload else device
    family, parts = load_parts(path, device=kept, dtype=dtype, use_t5=use_t5, extra=extra)
    vae = parts["vae"]
    if dtype == torch.float16 and vae.config.force_upcast:
        vae.float()  # its activations leave the range of float16
    return Pipeline(family=family, **parts, device=device, offload=offload)


def load_component(
    path: str | PathLike[str],
    name: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Any:
    """One part of a model: see `weights.load.load_component`."""
    from weights.load import load_component

    checks.path("path", path)
    return load_component(path, name, device=device, dtype=dtype)


def save(pipe: Any, folder: str | PathLike[str], dtype: torch.dtype | None = None) -> None:
    """Write a pipeline as a folder in the official layout: see `weights.save.save`."""
    from weights.load import check_target
    from weights.save import save

    checks.path("folder", folder)
    try:
        folder = Path(folder).expanduser()
    except RuntimeError as error:  # no home
        raise ValueError(f"folder is {checks.short(folder)}: {error}") from None
    if dtype is not None:
        dtype = check_target("cpu", dtype)[1]
    save(pipe, folder, dtype)
