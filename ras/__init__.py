"""Region-Adaptive Sampling (arXiv 2502.10389): compute only the active tokens of a step.

config.py says what can be chosen, plan.py which step does what, select.py who is active (by a
score of scores.py), cache.py what is kept between steps, reuse.py the velocity of stale tokens,
correct.py what they take back later, trace.py what happened, upstream.py how the official code
behaves. Nothing here knows a network: models import this package, never the other way round.
"""

from ras.cache import History, KVCache, observe
from ras.config import PRESETS, RASConfig
from ras.correct import settle
from ras.plan import plan
from ras.reuse import REUSE
from ras.scores import SCORES
from ras.select import select
from ras.steps import Step
from ras.trace import Trace
from ras.upstream import Upstream

__all__ = [
    "PRESETS",
    "REUSE",
    "SCORES",
    "History",
    "KVCache",
    "RASConfig",
    "Step",
    "Trace",
    "Upstream",
    "observe",
    "plan",
    "select",
    "settle",
]
