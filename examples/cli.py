"""What the command lines share: the dtypes by name, least values, and errors as one sentence."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def at_least(parser: argparse.ArgumentParser, args: argparse.Namespace, **least: int) -> None:
    """Refuse numbers below their least value; what was not given, or is no option, passes."""
    for name, low in least.items():
        value = getattr(args, name, None)
        if value is not None and value < low:
            parser.error(f"--{name.replace('_', '-')} is {value}, must be at least {low}")


def run(main: Callable[[], None]) -> None:
    """Run a script; what it refuses ends it with one sentence and exit status 1."""
    try:
        main()
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        sys.exit(f"error: {error.args[0] if isinstance(error, KeyError) else error}")
    except KeyboardInterrupt:
        sys.exit("stopped")
