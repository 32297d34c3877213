"""Region-Adaptive Sampling (arXiv 2502.10389): compute only the active tokens of a step.

config.py says what can be chosen, plan.py which step does what, select.py who is active and what
that is read from, run.py what lives between the steps, cache.py the keys and values, tokens.py how
tokens are numbered, trace.py what happened, upstream.py how the official code behaves. given.py is
the region of an edit, record.py what a drawing leaves for it. Nothing here knows a network: models
import this package, never the other way round.
"""

from ras.cache import KVCache
from ras.config import PRESETS, RASConfig
from ras.given import Given
from ras.plan import Step, plan
from ras.record import Record
from ras.run import Run
from ras.select import SCORES, History, Region
from ras.trace import Trace
from ras.upstream import Upstream

__all__ = [
    "PRESETS",
    "SCORES",
    "Given",
    "History",
    "KVCache",
    "RASConfig",
    "Record",
    "Region",
    "Run",
    "Step",
    "Trace",
    "Upstream",
    "plan",
]
