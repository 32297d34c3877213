"""examples/evaluate_edit.py: every method once, and a run that goes on."""

from __future__ import annotations

import json
import sys

import pytest

import evaluate_edit


def test_every_method_runs_once_and_no_more(monkeypatch, tmp_path, capsys):
    plot, sheet = tmp_path / "edit.png", tmp_path / "edit.jpg"
    words = ["evaluate_edit.py", "--model", "mini-lumina", "--prompts", "1", "--seeds", "1"]
    words += ["--areas", "6", "--steps", "6", "--out", str(tmp_path), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*words, "--plot", str(plot), "--sheet", str(sheet)])
    evaluate_edit.main()
    text = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().split("\n") if line]
    assert {row["key"][2] for row in rows} == set(evaluate_edit.METHODS)
    assert all(name in text for name in evaluate_edit.METHODS)
    assert plot.stat().st_size and sheet.stat().st_size
    (same,) = [r["snr"] for r in rows if r["key"][2] == "dense, fewer steps" and r["key"][3] == 4]
    assert same == pytest.approx(99)  # as many steps as the dense edit itself has
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(evaluate_edit, "drawn", lambda *_: pytest.fail("drawn once more"))
    evaluate_edit.main()
