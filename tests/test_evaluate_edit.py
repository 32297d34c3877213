"""examples/evaluate_edit.py: every method once, and a run that goes on."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import evaluate_edit
from evaluate_edit import seam


def test_every_method_runs_once_and_no_more(monkeypatch, tmp_path, capsys):
    plot, sheet = tmp_path / "edit.png", tmp_path / "edit.jpg"
    words = ["evaluate_edit.py", "--model", "mini-lumina", "--prompts", "1", "--seeds", "1"]
    words += ["--areas", "6", "--steps", "6", "--out", str(tmp_path), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*words, "--plot", str(plot), "--sheet", str(sheet)])
    evaluate_edit.main()
    text = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().split("\n") if line]
    names = {*evaluate_edit.METHODS, evaluate_edit.WHOLE}
    assert {row["key"][2] for row in rows} == names and all("seam" in row for row in rows)
    assert all(name in text for name in names)
    assert plot.stat().st_size and sheet.stat().st_size
    (same,) = [r["snr"] for r in rows if r["key"][2] == "dense, fewer steps" and r["key"][3] == 4]
    assert same == pytest.approx(99)  # as many steps as the dense edit itself has
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(evaluate_edit, "drawn", lambda *_: pytest.fail("drawn once more"))
    evaluate_edit.main()


def test_a_seam_is_a_step_at_the_border_and_nothing_else():
    mask = torch.zeros(2, 1, 4, 6, dtype=torch.bool)
    mask[0, :, 1:3, 2:4] = mask[1, :, :, 3:] = True
    place = torch.arange(48.0) + 2 * torch.arange(32.0)[:, None]  # 8 pixels a latent
    before = place.expand(2, 3, 32, 48)
    assert seam(before, before, mask) == pytest.approx([0, 0])
    # 40 up or down where the picture rises by 2 downwards and by 1 to the right
    assert seam(before, before + 40, mask) == pytest.approx([40 - 1.5, 40])
    noise = 100 * torch.rand(2, 3, 32, 48, generator=torch.manual_seed(0))
    assert max(map(abs, seam(noise, noise, mask))) < 10
    other = before.clone()
    other[:, :, :16] += 40  # a border of the picture's own, which the mask's crosses
    assert max(map(abs, seam(other, other, mask))) < 2
