"""Prompt to picture: encode the prompt, sample, decode. One pipeline for every family.

What a family makes of a prompt is in conditioning.py, the sampling loop in flow.py.

B images (prompts times images a prompt), n prompts, C latent channels, h and w size of the latents.
"""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import ras as regions
from minidit import checks
from minidit.conditioning import FAMILIES, Cond
from minidit.edit import Source, check_text_rows, drawn_levels
from minidit.flow import Callback, check_ras, denoise
from minidit.scheduler import SOLVERS, SchedulerConfig
from ras.plan import MOST_STEPS

Prompts = str | Sequence[str]
OUTPUTS = ("pil", "numpy", "latent")


@dataclass
class Output:
    """What a call of the pipeline gives.

    images   PIL images, or with output="numpy" one array (B, H, W, 3) float32 in [0, 1], or with
             output="latent" an empty list
    latents  (B, C, h, w) float32, before decoding
    trace    what Region-Adaptive Sampling did, None for a dense run
    seed     what the noise was drawn with, None for a generator or latents of one's own
    record   what `edit` needs, where it was to be kept
    """

    images: list[Image.Image] | np.ndarray
    latents: Tensor
    trace: regions.Trace | None = None
    seed: int | None = None
    record: regions.Record | None = None


@dataclass(kw_only=True)
class Pipeline:
    """A whole model. Parts that its family does not have are None; SD3's T5 may be left out.

    device   where the parts run; with offload each is there only for as long as it runs
    """

    family: str
    transformer: nn.Module
    vae: nn.Module
    scheduler: SchedulerConfig
    text_encoder: nn.Module
    tokenizer: Any
    text_encoder_2: nn.Module | None = None
    tokenizer_2: Any = None
    text_encoder_3: nn.Module | None = None
    tokenizer_3: Any = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    offload: bool = False

    def __post_init__(self) -> None:
        checks.choice("family", self.family, FAMILIES)

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompts,
        *,
        negative_prompt: Prompts = "",
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        num_images: int = 1,
        image: Image.Image | Sequence[Image.Image] | Output | None = None,
        mask: Image.Image | Sequence[Image.Image] | None = None,
        strength: float | None = None,
        keep: bool | regions.Record = False,
        ras: regions.RASConfig | regions.Upstream | regions.Given | None = None,
        solver: str | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        callback: Callback | None = None,
        progress: bool = False,
        output: str = "pil",
        **conditioning: Any,
    ) -> Output:
        """Draw `num_images` pictures of every prompt: those of the first, of the second, ...

        height, width   pixels, multiples of 16; the model's own size where not given
        steps, guidance, solver   what the model's scheduler asks for where not given; guidance 1 is
                        off; solver "euler" or "corrected" (see `minidit.denoise`)
        seed            picture i of a prompt depends on (seed, i) only, not on the rest of the
                        batch; None draws a seed, which the output tells
        generator       draw the noise of the whole batch from it instead, as diffusers does
        latents         noise of one's own (B, C, height / 8, width / 8) instead of both
        sigmas          falling noise levels in (0, 1] of one's own, one a step. As in diffusers
                        they are still to be shifted towards the noise by the model's
                        scheduler, and the 0 at the end is added where it is missing
        image           a picture to redraw, or one for every prompt; the size is the picture's
        mask            of the picture's size: white is drawn anew, black keeps its pixels bit for
                        bit, grey is a mix; by latents, white begins at 128 (see minidit/edit.py)
        strength        in (0, 1], the share of the steps to run, starting from the picture with
                        that much noise; 0.6 if not given, with a mask 1: nothing is left of it
        keep            True, or a ras.Record, to keep every step's keys and values for `edit`: a
                        lot of memory, see `ras.Record`. The run must be dense
        ras             a RASConfig or Upstream for Region-Adaptive Sampling, with a mask a Given,
                        for which the mask is the region; None for dense
        callback        callback(step, sigma, latents, velocity, active) after every step
        output          "pil", "numpy" or "latent": see `Output`
        conditioning    what the family takes besides: the keyword-only parameters of its functions
                        in minidit/conditioning.py
        Raises ValueError for arguments that do not fit, and where the result is not finite.
        """
        family = FAMILIES[self.family]
        for_encode, for_guide = family.split(conditioning)
        prompts = checks.texts("prompt", prompt)
        negatives = checks.texts("negative_prompt", negative_prompt, len(prompts))
        guidance = self.scheduler.default_guidance if guidance is None else guidance
        how, told = family.guide(self, guidance, **for_guide)
        source = self._source(image, mask, strength, len(prompts))
        drawn = source.record if source else None  # an earlier run that this one follows
        if solver is None:
            solver = SOLVERS[drawn.correct] if drawn else self.scheduler.default_solver
        checks.choice("solver", solver, SOLVERS)
        checks.choice("output", output, OUTPUTS)
        checks.flag("progress", progress)
        checks.function("callback", callback)
        self._need_data()
        num_images = checks.integer("num_images", num_images, 1, checks.MOST_PICTURES)
        record = self._record(keep, ras)
        if source:
            height, width = source.fit(height, width)
        noise, seed = self._noise(latents, seed, generator, height, width, len(prompts), num_images)
        tokens = noise[0, 0].numel() // self.transformer.config.patch_size**2
        if drawn:
            levels = drawn_levels(drawn, noise, how.scale, steps, sigmas)
        else:
            levels = self._levels(steps, sigmas, solver, tokens)
        if source:
            levels = source.levels(levels)
        check_ras(ras)
        if isinstance(ras, regions.Given) and source and source.masks:
            first = len(drawn.levels) - len(levels) if drawn else 0
            ras = ras.at(source.tokens(self, len(noise)), drawn, first)
        if ras is not None:
            ras.plan(len(levels) - 1, tokens)  # refuses now, before texts are encoded
        if how.scale == 1:
            if any(negatives):
                name = "true_guidance" if self.family == "flux" else "guidance"
                warnings.warn(f"negative_prompt is ignored: {name} is 1, off", stacklevel=3)
            negatives = []

        batch = family.encode(self, prompts, negatives, **for_encode)
        if drawn:
            check_text_rows(drawn, tokens, batch["context"].shape[1])
        uncond, cond = (
            {k: v[rows].repeat_interleave(num_images, dim=0) for k, v in batch.items()} | told
            for rows in (slice(len(negatives)), slice(len(negatives), None))
        )
        latents, known = noise.to(self.device), None
        if source:
            latents, known = source.start(self, latents, levels)
        with self.running(self.transformer) as transformer:
            latents, trace = denoise(
                transformer, latents, levels, cond, uncond if negatives else None, how, ras=ras,
                correct=solver == "corrected", known=known, record=record, callback=callback,
                progress=progress,
            )  # fmt: skip
        if not latents.isfinite().all():
            raise ValueError(
                "the result has values that are not finite: the weights do, or the numbers left "
                f"the range of {next(self.transformer.parameters()).dtype} (try float32)"
            )
        images = self._decode(latents, output)
        if source and len(images):
            images = source.paste(images)
        return Output(images, latents, trace, seed, record)

    def edit(
        self,
        out: Output,
        mask: Image.Image | Sequence[Image.Image],
        prompt: Prompts,
        **options: Any,
    ) -> Output:
        """Draw a part of drawn pictures anew: pipe(prompt, image=out, mask=mask, ras=Given(), ...).

        out      of a call with keep=True. The edit has its noise levels and its solver, and its
                 keys and values serve for what the mask keeps: a step costs the tokens under the
                 mask and a ring around them. It can be edited again and again
        options  arguments of a call; ras=None computes all tokens in every step
        Raises ValueError for arguments that do not fit.
        """
        return self(prompt, image=out, mask=mask, **{"ras": regions.Given()} | options)

    def encode(
        self, prompts: list[str], negatives: Sequence[str] = (), **conditioning: Any
    ) -> Cond:
        """The network's conditioning arguments for negatives and prompts, as one batch."""
        self._need_data()
        if not isinstance(negatives, list | tuple) or negatives:
            negatives = checks.texts("negatives", negatives)
        prompts = checks.texts("prompts", prompts)
        return FAMILIES[self.family].encode(self, prompts, list(negatives), **conditioning)

    def to(self, device: str | torch.device) -> Pipeline:
        """Move to a device, where the next call runs; ValueError where it is not available."""
        device, parts = checks.device(device), []
        if device.type != "meta":
            self._need_data()
        if not self.offload:
            parts = [part for part in vars(self).values() if isinstance(part, nn.Module)]
        try:
            for part in parts:
                part.to(device)
        except BaseException:  # too little memory there, or Ctrl-C: all or nothing
            for part in parts:
                part.to(self.device)
            raise
        self.device = device
        return self

    def run(self, module: nn.Module, *inputs: Tensor) -> Any:
        """module(*inputs) on the pipeline's device."""
        with self.running(module):
            return module(*(x.to(self.device) for x in inputs))

    @contextmanager
    def running(self, module: nn.Module) -> Iterator[nn.Module]:
        """The module on the pipeline's device, and with offload only for as long as it runs."""
        if not self.offload:
            yield module
            return
        try:
            yield module.to(self.device)
        finally:
            module.to("cpu")

    def _need_data(self) -> None:
        if self.device.type == "meta":
            raise ValueError("this model is on the meta device, which has no data: load it on cpu")

    def _source(self, image: Any, mask: Any, strength: Any, n: int) -> Source | None:
        if image is not None:
            multiple = self.vae.config.downscale * self.transformer.config.patch_size
            return Source(image, mask, strength, n, multiple)
        for name, value in (("mask", mask), ("strength", strength)):
            if value is not None:
                raise ValueError(f"{name} is given without a picture: pass image=")
        return None

    def _record(self, keep: Any, ras: Any) -> regions.Record | None:
        record = keep
        if not isinstance(keep, regions.Record):
            record = regions.Record() if checks.flag("keep", keep) else None
        if record is not None and ras is not None:
            raise ValueError("keep is for dense runs: pass ras=None")
        return record

    def _noise(
        self, latents: Any, seed: Any, generator: Any, height: Any, width: Any, n: int, count: int
    ) -> tuple[Tensor, int | None]:
        """Latents to start from, `count` for each of n prompts (B, C, h, w), and their seed."""
        sources = {"latents": latents, "seed": seed, "generator": generator}
        given = [name for name, value in sources.items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given, which is one source too many")
        if latents is not None:
            self._check_latents(latents, n * count, height, width)
            return latents.float(), None
        shape = self._latent_shape(height, width)
        if generator is not None:
            return noise_of_generator((n * count, *shape), generator), None
        seed = secrets.randbelow(2**32) if seed is None else seed
        return draw_noise(shape, seed, count).repeat(n, 1, 1, 1), seed

    def _latent_shape(self, height: Any, width: Any) -> tuple[int, int, int]:
        """(C, h, w) for a size in pixels; raises ValueError unless VAE and patch divide it."""
        config, scale = self.transformer.config, self.vae.config.downscale
        multiple, sizes = scale * config.patch_size, []
        for name, size in (("height", height), ("width", width)):
            size = config.sample_size * scale if size is None else size
            size = checks.integer(name, size, multiple)
            if size % multiple:
                raise ValueError(f"{name} is {size}, must be a positive multiple of {multiple}")
            sizes.append(size)
        if sizes[0] * sizes[1] > checks.MOST_PIXELS:
            raise ValueError(
                f"height is {checks.short(sizes[0])} and width {checks.short(sizes[1])}, at most "
                f"{checks.MOST_PIXELS:,} pixels in all are possible"
            )
        return self.vae.config.latent_channels, sizes[0] // scale, sizes[1] // scale

    def _check_latents(self, latents: Any, count: int, height: Any, width: Any) -> None:
        if not isinstance(latents, Tensor) or latents.ndim != 4 or not latents.is_floating_point():
            what = f"{latents.dtype} {tuple(latents.shape)}" if isinstance(latents, Tensor) else ""
            raise ValueError(
                f"latents are {what or checks.short(latents)}, must be a floating point tensor of "
                "shape (images, channels, height, width)"
            )
        scale = self.vae.config.downscale
        tall, wide = (s * scale for s in latents.shape[-2:])
        shape = (count, *self._latent_shape(tall, wide))
        if tuple(latents.shape) != shape:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}, must be ({shape[0]}, {shape[1]}, h, w)"
            )
        if (tall if height is None else height, wide if width is None else width) != (tall, wide):
            raise ValueError(
                f"latents are for {wide}x{tall} pixels, but "
                f"{checks.short(width)}x{checks.short(height)} was asked"
            )
        if latents.is_meta or not latents.isfinite().all():
            raise ValueError("latents have values that are not finite, or none")

    def _levels(self, steps: Any, sigmas: Any, solver: str, tokens: int) -> Tensor:
        """Noise levels (steps + 1,), from the scheduler or of one's own."""
        if steps is not None:
            steps = checks.integer("steps", steps, 1, MOST_STEPS)
        if sigmas is None:
            steps = self.scheduler.steps(solver) if steps is None else steps
            return self.scheduler.sigmas(steps, solver, tokens)
        levels = own_levels(sigmas)
        if steps not in (None, len(levels) - 1):
            raise ValueError(
                f"steps is {steps}, but sigmas are {len(levels) - 1} steps: leave one out"
            )
        return self.scheduler.shifted(levels, tokens)

    def _decode(self, latents: Tensor, output: str) -> list[Image.Image] | np.ndarray:
        """Pictures one after the other, so that memory is that of one."""
        if output == "latent":
            return []
        convert = to_image if output == "pil" else to_array
        with self.running(self.vae) as vae:
            images = [convert(vae.decode(latent[None])[0]) for latent in latents]
        return images if output == "pil" else np.stack(images)


def own_levels(sigmas: Any) -> Tensor:
    """A caller's noise levels as float32 that end with 0."""
    try:
        levels = torch.as_tensor(sigmas)
        levels = levels[:0] if levels.is_complex() or levels.dtype == torch.bool else levels
        levels = levels.cpu().float()
    except (TypeError, ValueError, RuntimeError, OverflowError, IndexError):
        levels = torch.empty(0)
    if levels.ndim == 1 and len(levels) and levels[-1] != 0:
        levels = torch.cat((levels, torch.zeros(1)))
    falling = levels.ndim == 1 and len(levels) > 1 and bool((levels.diff() < 0).all())
    if not falling or not levels[0] <= 1 or levels[-1] != 0 or len(levels) > MOST_STEPS + 1:
        raise ValueError(
            f"sigmas are {checks.short(sigmas)}, must be 1 to {MOST_STEPS} falling noise "
            "levels in (0, 1], with or without a 0 at the end"
        )
    return levels


def draw_noise(shape: tuple[int, ...], seed: int, count: int) -> Tensor:
    """`count` noises of a seed, (count, *shape) float32, drawn on the CPU one after the other:
    noise i is the same for any count and on any device. Raises ValueError for a bad seed."""
    seed = checks.integer("seed", seed, -(2**63), 2**64 - 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(shape, generator=generator) for _ in range(count)])


def noise_of_generator(shape: tuple[int, ...], generator: Any) -> Tensor:
    """One draw for the whole batch, on the generator's own device, as diffusers' randn_tensor."""
    if not isinstance(generator, torch.Generator):
        raise ValueError(f"generator is {checks.short(generator)}, must be a torch.Generator")
    return torch.randn(shape, generator=generator, device=generator.device)


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] to a PIL image; what lies outside is clamped."""
    bytes_ = (pixels.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(bytes_.permute(1, 2, 0).cpu().numpy())  # (H, W, 3)


def to_array(pixels: Tensor) -> np.ndarray:
    """(3, H, W) in [-1, 1] to (H, W, 3) float32 in [0, 1]; what lies outside is clamped."""
    return (pixels.float() / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).cpu().numpy()
