"""Ctrl-C while modules are imported, which takes torch seconds: a word instead of a traceback.

Importing this is enough, before torch is imported. Python itself then ends with status 130.
"""

from __future__ import annotations

import sys


def say(kind, error, trace) -> None:
    """Report an error that nobody caught."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = say
