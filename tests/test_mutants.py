"""The list of mistakes in mutants/ fits the code as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutants.fifth import FIFTH
from mutants.fourth import FOURTH
from mutants.mistakes import MISTAKES, applied
from mutants.second import SECOND
from mutants.third import THIRD

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("mistakes", "file"),
    [(each, file) for each in (MISTAKES, SECOND, THIRD, FOURTH, FIFTH) for file in each],
)
def test_every_mistake_still_applies(mistakes, file):
    tests, pairs = mistakes[file]
    source = (ROOT / file).read_text()
    changed = [applied(source, *pair) for pair in pairs]
    for text in changed:
        compile(text, file, "exec")
    assert len({source, *changed}) == len(changed) + 1
    for name in tests.split():
        name, _, function = name.partition("::")
        text = (ROOT / "tests" / f"test_{name}.py").read_text()
        assert f"def {function}(" in text if function else text
