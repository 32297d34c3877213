"""Call everything public with a wrong argument, as often as asked for, and count what comes of it.

    python tests/calls.py --count 10000 [--first 0] [--seed 0] [--show 3]

Call i takes sound arguments and puts something else in the place of one of them, or of something
inside one; a generator that is seeded with the seed and i draws it, so that every call can be made
again: --first i --count 1. The outcomes are
    works         the value is fine there, or is not looked at
    one sentence  an error that the project raises, of one printable line
    wrong         any other exception; the first few are printed with their traceback
The exit status is 1 if anything is wrong.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "examples")]

import numpy as np
import torch
from conftest import FAMILIES, GOLDENS, conditioning, noise, tiny_model
from fuzz import parse, report
from PIL import Image

import minidit
import ras
from cli import refused
from minidit.checks import short
from minidit.clip import CLIPConfig
from minidit.flow import denoise, flow_sigmas
from minidit.gemma import GemmaConfig
from minidit.guidance import Guidance
from minidit.scheduler import SchedulerConfig
from minidit.t5 import T5Config
from minidit.tokenizers import CLIPTokenizer, SentencePieceTokenizer
from minidit.vae import VAEConfig

OUTCOMES = ("works", "one sentence", "wrong")
PIPES = ("pipe_sd3", "pipe_lumina", "pipe_flux_dev", "pipe_lumina2")

VALUES: tuple[Callable[[], Any], ...] = (  # made anew each time: nobody else shall see a change
    *(lambda value=value: value for value in (
        None, True, False, 0, 1, -1, 3, 2**31, 2**70, 10**400, -(10**5000), 0.5, -0.0, 1.0, -1e300,
        float("nan"), float("inf"), float("-inf"), 1j, "", "abc", "cpu", "0", "\0", "\n\x1b[2J",
        "\ud800", "é猫🧑", b"", b"x", (), (1,), range(3), object, object(), len, Exception("x"),
        np.int64(5), np.float32(0.5), np.float64("nan"), np.bool_(True), np.complex64(1j),
        torch.float32, torch.int8, torch.device("meta"), torch.Size([1]), Path("a"),
        ras.RASConfig, ras.RASConfig(), ras.Given(), SchedulerConfig(), Guidance(),
    )),
    *(lambda n=n: "x" * n for n in (3000, 1_000_000)),
    lambda: "a cat " * 160_000,
    lambda: [],
    lambda: [None],
    lambda: ["a", 1],
    lambda: [[1]],
    lambda: [0.5, 0.2],
    lambda: {},
    lambda: {"a": 1},
    lambda: {1},
    lambda: iter([1]),
    lambda: np.array([1.0, 0.5]),
    lambda: np.array("a"),
    lambda: np.array([None]),
    lambda: np.zeros((0, 3), np.uint8),
    lambda: torch.tensor(3),
    lambda: torch.tensor(0.5),
    lambda: torch.tensor(float("nan")),
    lambda: torch.zeros(0),
    lambda: torch.zeros(2),
    lambda: torch.zeros(2, 3),
    lambda: torch.zeros(2, 2, 2),
    lambda: torch.zeros(2, 4, 8, 6),
    lambda: torch.zeros(2, 4, 8, 6, dtype=torch.float16),
    lambda: torch.zeros(2, 4, 7, 5),
    lambda: torch.zeros(0, 4, 8, 6),
    lambda: torch.zeros(2, 0, 8, 6),
    lambda: torch.zeros(2, 4, 8, 6, device="meta"),
    lambda: torch.full((2, 4, 8, 6), torch.nan),
    lambda: torch.zeros(2, 5, 20, device="meta"),
    lambda: torch.zeros(2, 5, 20).int(),
    lambda: torch.zeros(2, 5, 20, dtype=torch.complex64),
    lambda: torch.zeros(2, 4).long(),
    lambda: torch.zeros(2, 4).bool(),
    lambda: torch.zeros(2, 3).to_sparse(),
    lambda: torch.Generator(),
    lambda: torch.nn.Linear(2, 2),
    lambda: Image.new("RGB", (48, 32)),
    lambda: Image.new("F", (48, 32)),
    lambda: Image.new("L", (7, 5)),
    lambda: ras.Record(),
    lambda: ras.KVCache(),
)  # fmt: skip


class Anew(NamedTuple):
    """An argument that is made anew for every call."""

    make: Callable[[], Any]

    def __call__(self) -> Any:
        return self.make()


class Call(NamedTuple):
    """Something to call, and what makes sound arguments for it: all that it takes, by name."""

    function: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]


def calls(folder: Path) -> dict[str, Call]:
    """Everything that is called; what is written goes into a new folder."""
    pipes = {name: minidit.load(GOLDENS / name) for name in PIPES}
    found: dict[str, Call] = {}

    def add(name: str, function: Callable[..., Any], /, **arguments: Any) -> None:
        def anew() -> dict[str, Any]:
            return {k: v() if isinstance(v, Anew) else v for k, v in arguments.items()}

        found[name] = Call(function, anew)

    load = {"path": GOLDENS / "pipe_lumina", "device": "cpu", "dtype": torch.float32}
    add("load", minidit.load, **load, offload=False, use_t5=True, extra=())
    add("load_component", minidit.load_component, **load, name="vae")
    numbers = iter(range(10**9))
    add(
        "save", minidit.save, pipe=pipes["pipe_lumina"], dtype=None,
        folder=Anew(lambda: folder / f"saved {next(numbers)}"),
    )  # fmt: skip

    picture = Image.new("RGB", (48, 32), "red")
    mask = Image.linear_gradient("L").resize((48, 32))
    common = {
        "prompt": "a cat", "negative_prompt": "", "height": 32, "width": 48, "steps": 2,
        "guidance": 3.0, "seed": 1, "num_images": 1, "ras": None, "solver": "corrected",
        "sigmas": None, "callback": None, "progress": False, "output": "pil", "generator": None,
        "latents": None, "keep": False, "image": None, "mask": None, "strength": None,
    }  # fmt: skip
    options = {
        "sd3": {"prompt_2": "b", "prompt_3": None, "max_sequence_length": 8, "use_t5": True,
                "skip_layers": (0,), "skip_guidance": 2.0, "skip_start": 0.0, "skip_stop": 1.0},
        "lumina": {"scaling_watershed": 1.0, "proportional_attn": True},
        "flux": {"prompt_2": None, "max_sequence_length": 8, "true_guidance": 1.0},
        "lumina2": {"system_prompt": "You draw.", "max_sequence_length": 16, "cfg_trunc_ratio": 0.5,
                    "cfg_normalization": True},
    }  # fmt: skip
    for name, pipe in pipes.items():
        more = options[pipe.family]
        add(name, pipe, **common, **more)
        add(f"{name} redraws", pipe, **common | {"image": picture, "strength": 0.6}, **more)
        given = {"image": picture, "mask": mask, "ras": ras.Given()}
        add(f"{name} repaints", pipe, **common | given, **more)
        drawn = pipe("a cat", steps=2, height=32, width=48, seed=0, keep=True)
        add(f"{name} edits", pipe.edit, out=drawn, mask=mask, prompt="a dog", seed=None)
        encode = {k: v for k, v in more.items() if k in ("prompt_2", "max_sequence_length")}
        add(f"{name} encodes", pipe.encode, prompts=["a"], negatives=["b"], **encode)
        parts = {field.name: getattr(pipe, field.name) for field in fields(pipe)}
        add(f"{name} is made", minidit.Pipeline, **parts)
        other = minidit.load(GOLDENS / name)  # whatever becomes of it
        add(f"{name} moves", other.to, device="cpu")

    add_networks(add)
    add_denoise(add)

    add("flow_sigmas", flow_sigmas, steps=4, shift=3.0)
    add_config(add, "SchedulerConfig", SchedulerConfig())
    add_config(add, "Guidance", Guidance(3.0, skip_layers=(0,)))
    for scheduler in (SchedulerConfig(), SchedulerConfig(use_dynamic_shifting=True)):
        kind = "dynamic" if scheduler.use_dynamic_shifting else "constant"
        add(f"{kind} sigmas", scheduler.sigmas, steps=4, solver="euler", tokens=16)
        levels = Anew(lambda: torch.tensor([0.9, 0.5, 0.0]))
        add(f"{kind} shifted", scheduler.shifted, levels=levels, tokens=16)
    add("steps of a solver", SchedulerConfig().steps, solver="euler")
    given = ras.Given().at(torch.ones(1, 16, 16, dtype=torch.bool))
    for config in (
        ras.RASConfig(),
        ras.RASConfig.preset("paper"),
        ras.Upstream(),
        ras.Given(),
        given,
    ):
        add_config(add, type(config).__name__, config)
        if config != ras.Given():  # which has no mask yet
            add(f"plan of a {type(config).__name__}", ras.plan, config=config, steps=28, tokens=256)
            add(f"{type(config).__name__}.plan", config.plan, steps=28, tokens=256)
    for config in (ras.RASConfig(), ras.Upstream()):
        add(f"{type(config).__name__}.with_ratio", config.with_ratio, ratio=0.5)
    add("preset", ras.RASConfig.preset, name="paper")
    add("Record", ras.Record, every=2, device=None)
    trace = pipes["pipe_lumina"](
        "a", steps=4, height=32, width=48, seed=0, ras=ras.RASConfig(start=1)
    ).trace
    add("heat", trace.heat, sample=0)

    add_tokenizers(add, pipes)
    return found


def add_config(add: Callable[..., None], name: str, config: Any) -> None:
    """A dataclass, made of the values of one that is sound."""
    add(name, type(config), **{field.name: getattr(config, field.name) for field in fields(config)})


def add_networks(add: Callable[..., None]) -> None:
    """Configs, constructors and forward passes; regional ones have a cache that is filled."""
    for family in FAMILIES:
        model = tiny_model(family)
        add_config(add, f"config of {family}", model.config)
        add(f"{family} is made", type(model), config=model.config)
        latents = noise(2, 8, 6)
        cond = conditioning(family, 2)
        more = {"skip_layers": (0,)} if family.startswith("sd3") else {}
        if family == "lumina":
            more = {"scaling_watershed": 0.5, "proportional_attn": True}
        if family == "lumina2":
            more = {"refined": False}
        whole = {"latents": latents, "sigma": 0.5, **cond, **more, "active": None, "cache": None}
        add(f"{family} dense", model, **whole)

        def filled(model=model, latents=latents, cond=cond) -> ras.KVCache:
            cache = ras.KVCache()
            model(latents, 0.7, **cond, cache=cache)
            return cache

        some = {"active": torch.tensor([[0, 3], [1, 2]]), "cache": Anew(filled)}
        add(f"{family} regional", model, **whole | some)
        if hasattr(model, "prepare"):
            add(f"{family} prepares", model.prepare, **cond, refined=False)

    vae = minidit.load_component(GOLDENS / "pipe_lumina", "vae")
    add_config(add, "config of a VAE", VAEConfig())
    add("VAE is made", minidit.AutoencoderKL, config=vae.config)
    image = torch.zeros(1, 3, 16, 16)
    add("VAE encodes", vae.encode, image=image, generator=torch.Generator())
    add("VAE moments", vae.moments, image=image)
    add("VAE decodes", vae.decode, latents=torch.zeros(1, 4, 8, 6), tile=4)
    for name, config, part in (
        ("CLIP", CLIPConfig(), ("pipe_sd3", "text_encoder")),
        ("T5", T5Config(), ("pipe_sd3", "text_encoder_3")),
        ("Gemma", GemmaConfig(), ("pipe_lumina", "text_encoder")),
        ("Gemma 2", None, ("pipe_lumina2", "text_encoder")),
    ):
        encoder = minidit.load_component(GOLDENS / part[0], part[1])
        add_config(add, f"config of {name}", config or encoder.config)
        add(f"{name} is made", type(encoder), config=encoder.config)
        ids = torch.ones(2, 6, dtype=torch.long)
        more = {} if name == "CLIP" else {"mask": torch.ones_like(ids)}
        add(f"{name} reads", encoder, ids=ids, **more)


def add_denoise(add: Callable[..., None]) -> None:
    for family in FAMILIES:
        cond, uncond = conditioning(family, 2), conditioning(family, 2, seed=9)
        add(
            f"denoise {family}", denoise, model=tiny_model(family), latents=noise(2, 8, 6),
            sigmas=flow_sigmas(2, 3.0), cond=cond, uncond=uncond, guidance=3.0, ras=None,
            correct=True, known=None, record=None, callback=None, progress=False,
        )  # fmt: skip
        add(
            f"denoise {family} by regions", denoise, model=tiny_model(family),
            latents=noise(2, 8, 6), sigmas=flow_sigmas(3, 3.0), cond=cond, uncond=None,
            guidance=1.0, ras=ras.RASConfig(start=1, end=None, refresh=0),
        )  # fmt: skip


def add_tokenizers(add: Callable[..., None], pipes: dict[str, Any]) -> None:
    clip, t5 = pipes["pipe_sd3"].tokenizer, pipes["pipe_sd3"].tokenizer_3
    gemma = pipes["pipe_lumina"].tokenizer
    for name, tokenizer in (("CLIP", clip), ("T5", t5), ("Gemma", gemma)):
        more = {} if name == "CLIP" else {"pad_to": 4}
        add(f"{name} tokenizer", tokenizer, prompts=["a cat"], max_length=8, **more)
        add(f"{name} ids", tokenizer.encode, text="a cat")
        add(f"{name} text", tokenizer.decode, ids=[5, 6])
    vocab = {piece: i for i, piece in enumerate(("a</w>", "b", "ba</w>", "<s>", "</s>"))}
    named = {"bos": "<s>", "eos": "</s>", "unk": "</s>", "pad": "</s>"}
    add(
        "CLIP tokenizer is made", CLIPTokenizer, vocab=vocab, merges=[("b", "a</w>")], **named,
        special={"<x>": 7}, special_lower=None, model_max_length=77,
    )  # fmt: skip
    add(
        "SentencePiece tokenizer is made", SentencePieceTokenizer, model=t5.model,
        special={"<pad>": 0, "</s>": 1}, pad="<pad>", start=None, end="</s>",
        padding_side="right", pad_to=None, model_max_length=77,
    )  # fmt: skip


def spoil(arguments: dict[str, Any], rng: Random) -> tuple[dict[str, Any], str]:
    """The arguments with another value in one place, and the name of the place."""
    name = rng.choice(sorted(arguments))
    value, old = rng.choice(VALUES)(), arguments[name]
    if name == "callback" and callable(value):  # what a caller's function raises is the caller's
        value = None
    if isinstance(old, dict | list | tuple) and old and rng.randrange(2):  # inside it
        where = rng.choice(list(old) if isinstance(old, dict) else range(len(old)))
        items = dict(old) if isinstance(old, dict) else list(old)
        items[where] = value
        return arguments | {name: type(old)(items)}, f"{name}[{where!r}]"
    return arguments | {name: value}, name


def outcome(call: Callable[[], Any]) -> tuple[str, str]:
    """How a call ends, one of OUTCOMES, and the traceback of what is wrong."""
    try:
        call()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        message = str(error.args[0]) if isinstance(error, KeyError) else str(error)
        ours = refused(error) or isinstance(error, FileNotFoundError | FileExistsError)
        if ours and 10 < len(message) < 1000 and message.isprintable():
            return "one sentence", ""
        return "wrong", "".join(traceback.format_exception(error, limit=-4))[-3000:]
    return "works", ""


def run(found: dict[str, Call], seed: int, i: int) -> tuple[str, str, str]:
    """Make call i: what was called, how it ended, and what is wrong about that."""
    rng = Random(f"{seed}:{i}")
    name = rng.choice(sorted(found))
    function, arguments = found[name]
    spoilt, place = spoil(arguments(), rng)
    result, trace = outcome(lambda: function(**spoilt))
    value = short(spoilt.get(place.partition("[")[0]))
    return name, result, f"call {i}: {name}, {place} is {value}\n{trace}" if trace else ""


def main() -> int:
    options = parse(__doc__)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    counts: dict[str, Counter[str]] = {}
    shown, start = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        found = calls(Path(temporary))
        for function, arguments in found.values():
            function(**arguments())  # what is wrong below is the other value
        for i in range(options.first, options.first + options.count):
            name, result, trace = run(found, options.seed, i)
            counts.setdefault(name, Counter())[result] += 1
            if trace and shown < options.show:
                shown += 1
                print(trace, flush=True)
        os.chdir("/")
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    return report(counts, OUTCOMES)


if __name__ == "__main__":
    sys.exit(main())
