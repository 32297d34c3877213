"""Prompt to picture: encode the prompt, sample, decode. One pipeline a family, one body for both.

B images (prompts times images a prompt), L text tokens, C latent channels.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from minidit.flow import Callback, check_ras, denoise
from minidit.scheduler import SchedulerConfig
from ras import RASConfig, Trace, Upstream

Prompts = str | Sequence[str]
Cond = dict[str, Any]


@dataclass
class Output:
    """images: PIL images; latents (B, C, H/8, W/8) float32 before decoding; trace: what RAS did,
    or None; seed: what the noise was drawn with (None for latents of one's own)."""

    images: list[Image.Image]
    latents: Tensor
    trace: Trace | None = None
    seed: int | None = None


@dataclass
class SD3Pipeline:
    """Stable Diffusion 3 and 3.5. text_encoder_3 (T5) may be None: zeros take its place."""

    transformer: nn.Module
    vae: nn.Module
    scheduler: SchedulerConfig
    text_encoder: nn.Module
    text_encoder_2: nn.Module
    tokenizer: Any
    tokenizer_2: Any
    text_encoder_3: nn.Module | None = None
    tokenizer_3: Any = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    offload: bool = False

    def __call__(
        self,
        prompt: Prompts,
        negative_prompt: Prompts = "",
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int | None = None,
        latents: Tensor | None = None,
        num_images: int = 1,
        ras: RASConfig | Upstream | None = None,
        callback: Callback | None = None,
        progress: bool = False,
        max_sequence_length: int = 256,
        use_t5: bool = True,
        prompt_2: Prompts | None = None,
        prompt_3: Prompts | None = None,
        solver: str | None = None,
    ) -> Output:
        """Draw `num_images` pictures of every prompt.

        height, width   pixels, multiples of 16; the model's own size where not given
        steps, guidance what the model's scheduler file asks for where not given; guidance 1 is off
        seed            picture i of a prompt depends on (seed, i) only, not on the rest of the
                        batch; None draws a seed, which the output tells
        latents         noise of one's own (B, C, height / 8, width / 8) instead of a seed
        ras             a RASConfig for Region-Adaptive Sampling, None for dense
        callback        see `minidit.denoise`
        solver          "euler" or "corrected"; what the model's scheduler file says if not given
        max_sequence_length  T5 tokens, at most what its tokenizer allows
        use_t5          False leaves T5 out even if it is there
        prompt_2, prompt_3   other texts for CLIP-G and T5 than for CLIP-L
        Raises ValueError for arguments that do not fit.
        """
        if not isinstance(max_sequence_length, int) or max_sequence_length < 2:
            raise ValueError(
                f"max_sequence_length is {max_sequence_length!r}, must be an integer of at least 2"
            )

        def encode(prompts: list[str], negative: list[str] | None) -> tuple[Cond, Cond | None]:
            second = _texts(prompt_2, len(prompts), "prompt_2") if prompt_2 is not None else prompts
            third = _texts(prompt_3, len(prompts), "prompt_3") if prompt_3 is not None else prompts
            none = negative or []
            both = self.encode(
                prompts + none, second + none, third + none, max_sequence_length, use_t5
            )
            return _halves(both, len(prompts), negative is not None)

        return _generate(
            self, encode, prompt, negative_prompt, height, width, steps, guidance, seed, latents,
            num_images, ras, callback, progress, solver,
        )  # fmt: skip

    def encode(
        self,
        prompts: list[str],
        prompts_2: list[str],
        prompts_3: list[str],
        max_sequence_length: int = 256,
        use_t5: bool = True,
    ) -> Cond:
        """Conditioning of n prompts: context (n, L, joint_attention_dim) and pooled (n, P).

        Two CLIPs side by side, zero-padded to T5's width, then T5 behind them; no encoder is given
        an attention mask (sd3-ref sd3_infer.py, get_cond).
        """
        width = self.transformer.config.joint_attention_dim
        clips = [
            self._clip(self.text_encoder, self.tokenizer, prompts),
            self._clip(self.text_encoder_2, self.tokenizer_2, prompts_2),
        ]
        clip = torch.cat([hidden for hidden, _ in clips], dim=2)  # (n, L_clip, D_l + D_g)
        clip = nn.functional.pad(clip, (0, width - clip.shape[2]))  # (n, L_clip, width)
        length = max_sequence_length
        if self.tokenizer_3 is not None:
            length = min(length, self.tokenizer_3.model_max_length or length)
        if use_t5 and self.text_encoder_3 is not None:
            ids = self.tokenizer_3(prompts_3, length).to(self.device)
            with _running(self, self.text_encoder_3) as encoder:
                t5 = encoder(ids)  # (n, L_t5, width)
        else:
            t5 = clip.new_zeros(len(prompts), length, width)
        context = torch.cat((clip, t5.to(clip.dtype)), dim=1)  # (n, L_clip + L_t5, width)
        return {"context": context, "pooled": torch.cat([pooled for _, pooled in clips], dim=1)}

    def _clip(self, module: nn.Module, tokenizer: Any, prompts: list[str]) -> tuple[Tensor, Tensor]:
        window = module.config.max_position_embeddings
        ids = tokenizer(prompts, min(tokenizer.model_max_length or window, window))
        with _running(self, module) as encoder:
            return encoder(ids.to(self.device))


@dataclass
class LuminaPipeline:
    """Lumina-Next: Next-DiT with Gemma."""

    transformer: nn.Module
    vae: nn.Module
    scheduler: SchedulerConfig
    text_encoder: nn.Module
    tokenizer: Any
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    offload: bool = False

    def __call__(
        self,
        prompt: Prompts,
        negative_prompt: Prompts = "",
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int | None = None,
        latents: Tensor | None = None,
        num_images: int = 1,
        ras: RASConfig | Upstream | None = None,
        callback: Callback | None = None,
        progress: bool = False,
        scaling_watershed: float = 1.0,
        proportional_attn: bool = True,
        solver: str | None = None,
    ) -> Output:
        """Draw `num_images` pictures of every prompt: the arguments of `SD3Pipeline`, and

        scaling_watershed  time in [0, 1] (0 = noise) below which RoPE is scaled linearly, above
                           which by NTK; 1 is always linear
        proportional_attn  scale self-attention with the number of tokens
        """

        def encode(prompts: list[str], negative: list[str] | None) -> tuple[Cond, Cond | None]:
            extra = {"scaling_watershed": scaling_watershed, "proportional_attn": proportional_attn}
            both = self.encode(prompts, negative)
            return _halves(both | extra, len(prompts), negative is not None)

        return _generate(
            self, encode, prompt, negative_prompt, height, width, steps, guidance, seed, latents,
            num_images, ras, callback, progress, solver,
        )  # fmt: skip

    def encode(self, prompts: list[str], negative: list[str] | None = None) -> Cond:
        """Conditioning of n prompts and their negatives: context (n or 2n, L, D) and context_mask.

        Prompts are lower-cased and stripped, negatives are not; negatives are cut and padded to the
        length of the prompts, a multiple of 8 up to 256 (the official pipeline, whose published
        pictures depend on it).
        """
        ids, mask = self.tokenizer([p.lower().strip() for p in prompts], 256, 8)  # (n, L)
        if negative is not None:
            length = ids.shape[1]
            more_ids, more_mask = self.tokenizer(negative, length, length)
            ids, mask = torch.cat((ids, more_ids)), torch.cat((mask, more_mask))  # (2n, L)
        ids, mask = ids.to(self.device), mask.to(self.device)
        with _running(self, self.text_encoder) as encoder:
            return {"context": encoder(ids, mask), "context_mask": mask}


def _generate(
    pipe: Any, encode: Any, prompt: Prompts, negative_prompt: Prompts, height: int | None,
    width: int | None, steps: int | None, guidance: float | None, seed: int | None,
    latents: Tensor | None, num_images: int, ras: Any, callback: Callback | None,
    progress: bool, solver: str | None,
) -> Output:  # fmt: skip
    """What both families do: check, encode, draw noise, denoise, decode."""
    prompts = _texts(prompt, None, "prompt")
    negative = _texts(negative_prompt, len(prompts), "negative_prompt")
    if not isinstance(num_images, int) or num_images < 1:
        raise ValueError(f"num_images is {num_images!r}, must be an integer of at least 1")
    check_ras(ras)
    solver = pipe.scheduler.default_solver if solver is None else solver
    steps = pipe.scheduler.steps(solver) if steps is None else steps
    guidance = pipe.scheduler.default_guidance if guidance is None else guidance
    if isinstance(guidance, bool) or not isinstance(guidance, int | float) or not guidance >= 1:
        raise ValueError(f"guidance is {guidance!r}, must be a number of at least 1 (1 is off)")
    count = len(prompts) * num_images
    if latents is None:
        shape = _latent_shape(pipe, height, width)
        seed = secrets.randbelow(2**32) if seed is None else seed
        noise = draw_noise(shape, seed, num_images)
        latents = noise.repeat(len(prompts), 1, 1, 1)  # (B, C, h, w)
    else:
        seed = None
        _check_latents(pipe, latents, count, height, width)
    tokens = latents.shape[-2] * latents.shape[-1] // pipe.transformer.config.patch_size**2
    sigmas = pipe.scheduler.sigmas(steps, solver, tokens)
    with torch.no_grad():
        cond, uncond = encode(prompts, negative if guidance != 1 else None)
        if num_images > 1:
            cond, uncond = (_repeat(half, num_images) for half in (cond, uncond))
        with _running(pipe, pipe.transformer) as transformer:
            latents, trace = denoise(
                transformer, latents.to(pipe.device), sigmas, cond, uncond, guidance,
                ras=ras, correct=solver == "corrected", callback=callback,
                progress=progress,
            )  # fmt: skip
        with _running(pipe, pipe.vae) as vae:
            images = [to_image(vae.decode(latent[None])[0]) for latent in latents]
    return Output(images, latents, trace, seed)


def draw_noise(shape: tuple[int, ...], seed: int, count: int) -> Tensor:
    """`count` noises of a seed, (count, *shape) float32, drawn on the CPU one after the other:
    noise i is the same for any count and on any device. Raises ValueError for a bad seed."""
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed!r}, must be an integer of at most 64 bits")
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(shape, generator=generator) for _ in range(count)])


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] to a PIL image; what lies outside is clamped."""
    bytes_ = (pixels.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(bytes_.permute(1, 2, 0).cpu().numpy())  # (H, W, 3)


def _texts(texts: Prompts, count: int | None, name: str) -> list[str]:
    """One string or several as a list; a single one serves `count` times."""
    listed = [texts] if isinstance(texts, str) else texts
    if not isinstance(listed, list | tuple) or not all(isinstance(t, str) for t in listed):
        raise ValueError(f"{name} is {texts!r}, must be a string or a list of strings")
    if not listed:
        raise ValueError(f"{name} is an empty list, must have at least one string")
    if count is not None and isinstance(texts, str):
        listed = [texts] * count
    if count is not None and len(listed) != count:
        raise ValueError(f"{name} has {len(listed)} strings, must have one or {count}")
    return list(listed)


def _halves(both: Cond, count: int, guided: bool) -> tuple[Cond, Cond | None]:
    """Rows of the prompts and of the negatives; what is no tensor belongs to both."""

    def rows(part: slice) -> Cond:
        return {k: v[part] if isinstance(v, Tensor) else v for k, v in both.items()}

    return rows(slice(count)), rows(slice(count, None)) if guided else None


def _repeat(cond: Cond | None, times: int) -> Cond | None:
    """Every row `times` times in a row."""
    if cond is None:
        return None
    return {
        k: v.repeat_interleave(times, dim=0) if isinstance(v, Tensor) else v
        for k, v in cond.items()
    }


def _latent_shape(pipe: Any, height: int | None, width: int | None) -> tuple[int, int, int]:
    """(C, h, w) for a size in pixels; raises ValueError unless VAE and patch divide it."""
    config, scale = pipe.transformer.config, pipe.vae.config.downscale
    multiple = scale * config.patch_size
    sizes = [config.sample_size * scale if s is None else s for s in (height, width)]
    for name, size in zip(("height", "width"), sizes, strict=True):
        if not isinstance(size, int) or size < multiple or size % multiple:
            raise ValueError(f"{name} is {size!r}, must be a positive multiple of {multiple}")
    return config.in_channels, sizes[0] // scale, sizes[1] // scale


def _check_latents(
    pipe: Any, latents: Tensor, count: int, height: int | None, width: int | None
) -> None:
    if not isinstance(latents, Tensor) or latents.ndim != 4:
        raise ValueError("latents must be a tensor of shape (images, channels, height, width)")
    scale = pipe.vae.config.downscale
    tall, wide = (s * scale for s in latents.shape[-2:])
    _latent_shape(pipe, tall, wide)
    if (height or tall, width or wide) != (tall, wide):
        raise ValueError(f"latents are for {wide}x{tall} pixels, but {width}x{height} was asked")
    wanted = (count, pipe.transformer.config.in_channels)
    if tuple(latents.shape[:2]) != wanted:
        raise ValueError(
            f"latents have shape {tuple(latents.shape)}, must be ({wanted[0]}, {wanted[1]}, h, w)"
        )


@contextmanager
def _running(pipe: Any, module: nn.Module) -> Iterator[nn.Module]:
    """The module on the pipeline's device, and with offload only for as long as it runs."""
    if not pipe.offload:
        yield module
        return
    module.to(pipe.device)
    try:
        yield module
    finally:
        module.to("cpu")
