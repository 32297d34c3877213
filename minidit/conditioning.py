"""What a family makes of a prompt: the tensors that its text encoders give, and its guidance.

`FAMILIES` has two functions a family. Their keyword-only parameters are the names that the pipeline
takes for that family besides its own.

    encode(pipe, prompts, negatives, *, ...) -> Cond           negatives, then prompts, as one batch
    guide(pipe, guidance, *, ...) -> (Guidance, Cond)          how to guide, and what else the
                                                               network is to be told

n rows (negatives and prompts), L text tokens, D width of the network's context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import Parameter, signature
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from minidit import checks
from minidit.guidance import Guidance

Cond = dict[str, Any]
SYSTEM_PROMPT = (  # of Lumina-Image 2.0 (diffusers pipeline_lumina2.py)
    "You are an assistant designed to generate superior images with the superior degree of "
    "image-text alignment based on textual prompts or user prompts."
)


class Conditioning(NamedTuple):
    """How one kind of network is conditioned."""

    encode: Callable[..., Cond]
    guide: Callable[..., tuple[Guidance, Cond]]

    def split(self, options: Cond) -> tuple[Cond, Cond]:
        """Options for `encode` and for `guide`; ValueError for a name that neither takes."""
        known = [options_of(function) for function in self]
        checks.names("this model", options, known[0] + known[1])
        ours, theirs = ({k: options[k] for k in options if k in names} for names in known)
        return ours, theirs


def options_of(function: Callable[..., Any]) -> list[str]:
    """The keyword-only parameters of a function."""
    parameters = signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is Parameter.KEYWORD_ONLY]


def encode_sd3(
    pipe: Any,
    prompts: list[str],
    negatives: list[str],
    *,
    prompt_2: str | Sequence[str] | None = None,
    prompt_3: str | Sequence[str] | None = None,
    max_sequence_length: int = 256,
    use_t5: bool = True,
) -> Cond:
    """SD3 and SD3.5: context (n, L, D) and pooled (n, P).

    The tokens of two CLIPs side by side, zero-padded to T5's width, then T5's behind them; no
    encoder is given an attention mask (sd3-ref sd3_infer.py, get_cond).

    prompt_2, prompt_3   other texts for CLIP-G and for T5 than for CLIP-L
    max_sequence_length  tokens of T5, at most what its tokenizer allows
    use_t5               False puts zeros in T5's place, as where there is no T5
    """
    length = checks.integer("max_sequence_length", max_sequence_length, 2, 512)
    use_t5 = checks.flag("use_t5", use_t5) and pipe.text_encoder_3 is not None
    rows = [negatives + prompts]  # of each encoder
    for name, other in (("prompt_2", prompt_2), ("prompt_3", prompt_3)):
        other = prompts if other is None else checks.texts(name, other, len(prompts))
        rows.append(negatives + other)
    hidden, pooled = encode_clip(pipe, pipe.text_encoder, pipe.tokenizer, rows[0])
    hidden_2, pooled_2 = encode_clip(pipe, pipe.text_encoder_2, pipe.tokenizer_2, rows[1])
    context = torch.cat((hidden, hidden_2), dim=2)  # (n, L_clip, D_l + D_g)
    width = pipe.transformer.config.joint_attention_dim
    context = pad(context, (0, width - context.shape[2]))  # (n, L_clip, D)
    if pipe.tokenizer_3 is not None:
        length = min(length, pipe.tokenizer_3.model_max_length or length)
    if use_t5:
        t5 = pipe.run(pipe.text_encoder_3, pipe.tokenizer_3(rows[2], length))  # (n, L_t5, D)
    else:
        t5 = context.new_zeros(len(context), length, width)
    context = torch.cat((context, t5.to(context.dtype)), dim=1)  # (n, L_clip + L_t5, D)
    return {"context": context, "pooled": torch.cat((pooled, pooled_2), dim=1)}


def encode_clip(pipe: Any, encoder: Any, tokenizer: Any, rows: list[str]) -> tuple[Tensor, Tensor]:
    """A CLIP's hidden states (n, L_clip, D_clip) and pooled vectors (n, P_clip) of texts."""
    window = encoder.config.max_position_embeddings
    return pipe.run(encoder, tokenizer(rows, min(tokenizer.model_max_length or window, window)))


def guide_sd3(
    pipe: Any,
    guidance: float,
    *,
    skip_layers: Sequence[int] = (),
    skip_guidance: float = 2.8,
    skip_start: float = 0.01,
    skip_stop: float = 0.2,
) -> tuple[Guidance, Cond]:
    """Classifier-free guidance, and skip-layer guidance where layers are named: see `Guidance`."""
    last = pipe.transformer.config.num_layers - 1
    if not isinstance(skip_layers, Sequence) or isinstance(skip_layers, str):
        raise ValueError(
            f"skip_layers is {checks.short(skip_layers)}, must be a list of layer numbers"
        )
    layers = tuple(checks.integer("a number in skip_layers", i, 0, last) for i in skip_layers)
    return Guidance(guidance, layers, skip_guidance, skip_start, skip_stop), {}


def encode_lumina(pipe: Any, prompts: list[str], negatives: list[str]) -> Cond:
    """Lumina-Next: context (n, L, D) and context_mask (n, L).

    Prompts are lower-cased and stripped, negatives are not; negatives are cut and padded to the
    length of the prompts, a multiple of 8 up to 256 (the official pipeline, whose published
    pictures depend on it).
    """
    ids, mask = pipe.tokenizer([p.lower().strip() for p in prompts], 256, 8)  # (prompts, L)
    if negatives:
        length = ids.shape[1]
        first_ids, first_mask = pipe.tokenizer(negatives, length, length)
        ids, mask = torch.cat((first_ids, ids)), torch.cat((first_mask, mask))  # (n, L)
    context = pipe.run(pipe.text_encoder, ids, mask)
    return {"context": context, "context_mask": mask.to(context.device)}


def guide_lumina(
    pipe: Any,
    guidance: float,
    *,
    scaling_watershed: float = 1.0,
    proportional_attn: bool = True,
) -> tuple[Guidance, Cond]:
    """Classifier-free guidance.

    scaling_watershed  time in [0, 1] (0 = noise) below which RoPE is scaled linearly, above which
                       by NTK; 1 is always linear
    proportional_attn  scale self-attention with the number of tokens
    """
    watershed = checks.number("scaling_watershed", scaling_watershed, 0, 1)
    proportional = checks.flag("proportional_attn", proportional_attn)
    return Guidance(guidance), {
        "scaling_watershed": watershed,
        "proportional_attn": proportional,
    }


def encode_flux(
    pipe: Any,
    prompts: list[str],
    negatives: list[str],
    *,
    prompt_2: str | Sequence[str] | None = None,
    max_sequence_length: int | None = None,
) -> Cond:
    """FLUX.1: T5's tokens as context (n, L, D), CLIP's summary without its projection as pooled
    (n, P). As in the official code no encoder is given an attention mask: padding is text, too.

    prompt_2             other texts for T5 than for CLIP
    max_sequence_length  tokens of T5, 512 for dev and 256 for schnell where not given
    """
    if max_sequence_length is None:
        max_sequence_length = 512 if pipe.transformer.config.guidance_embeds else 256
    length = checks.integer("max_sequence_length", max_sequence_length, 2, 512)
    second = prompts if prompt_2 is None else checks.texts("prompt_2", prompt_2, len(prompts))
    _, pooled = encode_clip(pipe, pipe.text_encoder, pipe.tokenizer, negatives + prompts)
    context = pipe.run(pipe.text_encoder_2, pipe.tokenizer_2(negatives + second, length))
    return {"context": context, "pooled": pooled}


def guide_flux(pipe: Any, guidance: float, *, true_guidance: float = 1.0) -> tuple[Guidance, Cond]:
    """The guidance that dev was distilled with is an input of its network; schnell has none.

    true_guidance  the scale of classifier-free guidance on top of it, with the negative prompt;
                   it doubles the work, 1 is off
    """
    how = Guidance(checks.number("true_guidance", true_guidance, 1, also=" (1 is off)"))
    scale = checks.number("guidance", guidance, 0)
    return how, {"guidance": scale} if pipe.transformer.config.guidance_embeds else {}


def encode_lumina2(
    pipe: Any,
    prompts: list[str],
    negatives: list[str],
    *,
    system_prompt: str = SYSTEM_PROMPT,
    max_sequence_length: int = 256,
) -> Cond:
    """Lumina-Image 2.0: context (n, L, D) and context_mask (n, L), padded to the longest text.

    system_prompt        what the text encoder is told before every prompt, but not before negatives
    max_sequence_length  tokens of the text encoder, at most what the network has positions for
    """
    most = pipe.transformer.config.axes_lens[0] - 1  # the image stands behind the text
    length = checks.integer("max_sequence_length", max_sequence_length, 2, most)
    (start,) = checks.texts("system_prompt", system_prompt, 1)
    texts = negatives + [f"{start} <Prompt Start> {prompt}" for prompt in prompts]
    ids, mask = pipe.tokenizer(texts, length, 8)  # (n, L)
    context = pipe.run(pipe.text_encoder, ids, mask)
    return {"context": context, "context_mask": mask.to(context.device)}


def guide_lumina2(
    pipe: Any,
    guidance: float,
    *,
    cfg_trunc_ratio: float = 1.0,
    cfg_normalization: bool = True,
) -> tuple[Guidance, Cond]:
    """Classifier-free guidance, ended early or normalised: see `Guidance`."""
    how = {"cfg_trunc_ratio": cfg_trunc_ratio, "cfg_normalization": cfg_normalization}
    return Guidance(guidance, **how), {}


FAMILIES = {
    "sd3": Conditioning(encode_sd3, guide_sd3),
    "lumina": Conditioning(encode_lumina, guide_lumina),
    "flux": Conditioning(encode_flux, guide_flux),
    "lumina2": Conditioning(encode_lumina2, guide_lumina2),
}
