"""python -m weights inspect PATH | convert PATH FOLDER"""

from __future__ import annotations

import weights.interrupt  # noqa: F401  # isort: skip

import argparse
import math
import sys

from weights.files import COMPONENTS
from weights.load import open_model
from weights.networks import Model, Part, build
from weights.save import convert


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m weights", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    look = commands.add_parser("inspect", help="say what a model is and what it lacks to run")
    write = commands.add_parser("convert", help="write a model in the diffusers folder layout")
    for command in (look, write):
        command.add_argument("path", help="folder, single file or hub id")
        command.add_argument(
            "--with", dest="extra", action="append", default=[], metavar="PATH",
            help="a file or folder with what is not beside a single file (may be repeated)",
        )  # fmt: skip
        command.add_argument("--no-t5", action="store_true", help="leave the T5 encoder out")
    write.add_argument("out", help="the folder to write, which must not exist")
    options = parser.parse_args(arguments)
    look = options.command == "inspect"
    try:
        model = open_model(options.path, not options.no_t5, options.extra, weights=not look)
        if look:
            lines, sound = describe(model)
            print("\n".join(lines))
            return 0 if sound else 1
        convert(model, options.out, report=print)
    except (ValueError, OSError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    print(f"wrote {options.out}")
    for name, reason in model.missing.items():
        print(f"without {name}: {reason}")
    return 0


def describe(model: Model) -> tuple[list[str], bool]:
    """What a model is, one line a component, and whether all its files are sound."""
    family = model.family
    title = family.title if family else "not a whole model"
    if family and getattr(model.parts["transformer"].config, "qk_norm", None) == "rms_norm":
        title = "Stable Diffusion 3.5"
    lines, sound = [f"{model.where}: {title}, {model.layout}"], True
    for name in COMPONENTS:
        said = [f"MISSING: {model.missing[name]}"] if name in model.missing else []
        if name in model.parts:
            text, fits = _describe_part(model.parts[name], name in model.missing)
            said.insert(0, text)
            sound &= fits
        elif name in model.tokenizers:
            said.insert(0, f"in {model.tokenizers[name]}")
        elif name == "scheduler" and model.scheduler:
            config = model.scheduler
            shift = "by size" if config.use_dynamic_shifting else f"{config.shift:g}"
            said.append(
                f"shift {shift}, {config.default_steps} steps of guidance "
                f"{config.default_guidance:g} unless told otherwise"
            )
        if said:
            lines.append(f"  {name:15} {'; '.join(said)}")
    if family and not model.missing:
        lines.append("nothing is missing to run it" if sound else "it cannot run as it is")
    elif family:
        lines.append(f"to run it, get {', '.join(model.missing)} (see {family.repo} on the hub)")
    return lines, sound


def _describe_part(part: Part, missing: bool) -> tuple[str, bool]:
    """A network and its size, and whether its files fit it."""
    config = part.config
    if part.kind == "vae":
        size = f"{config.latent_channels} channels, widths {list(config.block_out_channels)}"
    else:
        layers = vars(config).get("num_layers") or config.num_hidden_layers
        if hasattr(config, "num_single_layers"):
            layers = f"{layers} double and {config.num_single_layers} single"
        names = ("width", "hidden_size", "d_model")
        width = next(getattr(config, name) for name in names if hasattr(config, name))
        size = f"{layers} layers of width {width}"
    if missing:  # there are no tensors to compare it with
        return f"{part.kind}, {size}", True
    try:
        module, _ = build(part)
    except ValueError as error:
        return f"{part.kind}, {size}; UNSOUND: {error}", False
    values = sum(math.prod(tensor.shape) for tensor in module.state_dict().values())
    kinds = sorted({str(t.dtype).removeprefix("torch.") for t in part.stored.values()})
    stored = sum(t.size for t in part.stored.values())
    amount = f"{stored / 1e9:.2f} GB" if stored >= 1e9 else f"{stored / 1e6:.1f} MB"
    return (
        f"{type(module).__name__}, {size}, {values / 1e6:.1f} M values, "
        f"stored as {' and '.join(kinds)}, {amount}"
    ), True


if __name__ == "__main__":
    sys.exit(main())
