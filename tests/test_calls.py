"""Wrong calls of everything public: each works or is refused in one sentence (calls.py)."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from calls import calls, run


@pytest.mark.filterwarnings("ignore")
def test_wrong_calls_are_refused_in_one_sentence(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    found = calls(tmp_path)
    for name, (function, arguments) in found.items():
        assert function(**arguments()) is not None or name == "save"  # sound arguments
    ends = Counter()
    for i in range(1000):
        _, end, trace = run(found, 0, i)
        assert not trace, trace
        ends[end] += 1
    assert ends["works"] > 40 and ends["one sentence"] > 800
    assert not set(os.listdir(tmp_path)) - {f"saved {i}" for i in range(100)}
