"""What the command lines share: options that load a model, and how a script ends.

Scripts import this first, so that Ctrl-C is a word already while torch is imported.
"""

from __future__ import annotations

import weights.interrupt  # noqa: F401  # isort: skip

import os

# threads that wait asleep: torch's own spin, and where other programs want the cores two threads
# then take seven times as long as one
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import re
import sys
import time
import warnings
from collections.abc import Callable
from opcode import opname
from pathlib import Path

import torch

import minidit
import ras
import weights
from minidit import checks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL = 100e6  # parameters of a transformer that one thread runs best
FOLDERS = [Path(m.__file__).resolve().parent for m in (minidit, ras, weights)]
FOLDERS.append(Path(__file__).resolve().parent)


# ---------------------------------------------------------------- options


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--model, --device, --dtype, --threads and --compile, as `load_model` reads them."""
    add = parser.add_argument
    add("--model", default="mini-lumina", help="mini-sd3, mini-lumina, folder, file or hub id")
    add_device_options(parser)
    add(
        "--compile",
        action="store_true",
        help="compile the transformer's blocks: worth it for many steps",
    )


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """--device, --dtype and --threads, as `device_of` and `dtype_of` read them."""
    add = parser.add_argument
    add("--device", help="cpu, cuda or mps; default: the fastest that is there")
    add("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--threads", type=int, help="of the CPU; default: 1 for small models, else torch's choice")


def device_of(args: argparse.Namespace) -> torch.device:
    """The device asked for, else CUDA (one a process), MPS or the CPU."""
    if args.device in (None, "cuda") and torch.cuda.is_available():
        return torch.device("cuda", share()[0] % torch.cuda.device_count())
    if args.device:
        return checks.device(args.device)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def dtype_of(args: argparse.Namespace, device: torch.device) -> torch.dtype:
    """The dtype asked for, else what suits the device."""
    if args.dtype:
        return DTYPES[args.dtype]
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def load_model(args: argparse.Namespace, **options) -> minidit.Pipeline:
    """The model that the options of `add_model_options` ask for."""
    device = device_of(args)
    pipe = minidit.load(args.model, device=device, dtype=dtype_of(args, device), **options)
    set_threads(args.threads, pipe.transformer)
    if args.compile:
        compile_blocks(pipe.transformer)
    return pipe


def compile_blocks(network: torch.nn.Module, **options) -> None:
    """Compile every block of a network by itself. Blocks of one kind share what was compiled, which
    takes seconds where the whole of a large network takes minutes."""
    # kinds of blocks, times dense with and without a cache, and regional: more than torch's 8
    torch._dynamo.config.recompile_limit = 32
    for blocks in network.children():
        for block in blocks if isinstance(blocks, torch.nn.ModuleList) else ():
            block.compile(**options)


def set_threads(threads: int | None, transformer: torch.nn.Module) -> None:
    """As many as asked for; else one for a small model, unless OMP_NUM_THREADS says otherwise.

    Threads of a small model wait for each other at every layer, and gain nothing: on two cores of
    load 8, 3 steps of mini-lumina took 8.0 s with one thread, 8.1 s with two that sleep while they
    wait, and 57 s with two that spin.
    """
    small = sum(p.numel() for p in transformer.parameters()) < SMALL
    if threads is None and small and "OMP_NUM_THREADS" not in os.environ:
        threads = 1
    if threads is not None:
        torch.set_num_threads(threads)


def now(device: torch.device) -> float:
    """Seconds on a clock, read when the device has done all that it was given."""
    if device.type != "meta":
        torch.zeros((), device=device).item()  # a number comes back after all that was before it
    return time.perf_counter()


def share() -> tuple[int, int]:
    """This process's number and how many there are, under torchrun; else 0 of 1."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty, one prompt each."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no UTF-8 text, must have one prompt a line") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty, must have one prompt a line")
    return lines


def size(text: str) -> tuple[int, int]:
    """Width and height of WIDTHxHEIGHT, or of one number for a square."""
    if not re.fullmatch(r"\d{1,9}(x\d{1,9})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no size, e.g. 1024x768")
    width, *height = map(int, text.split("x"))
    return width, *(height or [width])


def seed(text: str) -> int | None:
    """A number, or None for "random"."""
    if text == "random":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor random") from None


def at_least(parser: argparse.ArgumentParser, args: argparse.Namespace, **least: int) -> None:
    """Refuse numbers below their least value; what was not given, or is no option, passes.
    Threads are at least one everywhere."""
    for name, low in {"threads": 1, **least}.items():
        value = getattr(args, name, None)
        if value is not None and value < low:
            parser.error(f"--{name.replace('_', '-')} is {value}, must be at least {low}")


# ---------------------------------------------------------------- the end


def run(main: Callable[[], None]) -> None:
    """Run a script. What the project refuses, and what the machine lacks, ends it with a sentence
    and status 1, Ctrl-C with a word and status 130; any other error is a bug and keeps its
    traceback."""
    warnings.showwarning = _show_warning
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be in no encoding
    try:
        main()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        sentence = sentence_of(error)
        if sentence is None:
            raise
        sys.exit(f"error: {one_line(sentence)}")


def sentence_of(error: Exception) -> str | None:
    """What to say of an error that is no bug: a refusal, a file's trouble, too little memory."""
    if out_of_memory(error):
        reason = (str(error).strip().splitlines() or [""])[0]
        return f"there is not enough memory: {reason or 'try a smaller picture, dtype or model'}"
    if isinstance(error, OSError) or refused(error):
        return str(error.args[0] if isinstance(error, KeyError) else error)
    return None


def refused(error: Exception) -> bool:
    """Whether the project raised the error on purpose: with a `raise` of its own, as opposed to
    what Python or torch raised while it ran a line of the project."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    ours = any(folder in Path(code.co_filename).resolve().parents for folder in FOLDERS)
    kinds = isinstance(error, ValueError | KeyError)
    return ours and kinds and opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on the CPU or on the device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = re.search(r"alloc.*memory|memory.*alloc", str(error), re.IGNORECASE)
    return isinstance(error, RuntimeError) and words is not None


def one_line(text: str, most: int = 1000) -> str:
    """A text on one line, without what a terminal would obey, and not endless."""
    text = text if len(text) <= most else f"{text[:most]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _show_warning(message, category, *_) -> None:
    print(f"warning: {one_line(str(message))}", file=sys.stderr)
