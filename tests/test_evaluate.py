"""evaluate.py: it resumes, shares the seeds out, and makes the same table however it ran."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import GOLDENS
from PIL import Image
from test_examples import EXAMPLES, run  # noqa: F401

import curves
import evaluate

EVALUATE = ["--model", str(GOLDENS / "pipe_sd3"), "--prompts", "a cat", "a dog", "--seeds", "2"]
EVALUATE += ["--out", "e", "--size", "48", "--ode-steps", "16", "--steps", "6", "10"]
EVALUATE += ["--methods", "corrected", "ours", "ours, steps left out"]


def test_evaluate_counts_evaluations_and_resumes_to_the_same_table(run, tmp_path, capsys):  # noqa: F811
    run("evaluate", *EVALUATE, "--plot", "e.png")
    table = capsys.readouterr().out
    lines = (tmp_path / "e" / "rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 3 * 2 * 2 * 2  # methods, costs, prompts, seeds
    assert [line.split(" | ")[0] for line in table.splitlines() if " ± " in line] == [
        "| corrected", "| ours", "| ours, steps left out", "| ours", "| ours, steps left out"
    ]  # fmt: skip
    assert Image.open(tmp_path / "e.png").size == (700, 1100)  # nearness, and gains
    rows = [row for row in rows if row["key"][4:] == ["a cat", 0]]
    costs = {
        name: [r["evaluations"] for r in rows if r["key"][2] == name] for name in EVALUATE[-3:]
    }
    assert costs["corrected"] == [6, 10]
    for dense, ours, skipped in zip(*costs.values(), strict=True):
        assert skipped < ours < dense
    snr = [row["snr"] for row in rows if row["key"][2] == "corrected"]
    assert snr[-1] > snr[0]
    (tmp_path / "e" / "rows.jsonl").write_text("\n".join(lines[:7]) + '\n{"key": ["co')
    run("evaluate", *EVALUATE)
    assert capsys.readouterr().out == table


def test_the_plot_names_its_lines(tmp_path):
    points = [curves.Point(4.0, 20.0, 1.0, 8), curves.Point(9.0, 30.0, 1.0, 8)]
    found = dict.fromkeys(("corrected", "ours, fresh keys", "hold"), points)
    for gained in ({}, {"ours, random tokens": points}):
        evaluate.plot(found, gained, "a model", tmp_path / "e.svg")
        drawn = (tmp_path / "e.svg").read_text("utf-8")
        words = (*found, *gained, "a model", "network evaluations")
        assert all(f"<!-- {word} -->" in drawn for word in words)


def rows(name: str, picture: str, *points: tuple[float, float]) -> list[dict]:
    """Rows of a method and a picture, (evaluations, SNR) each."""
    return [
        {"key": ("m", None, name, i, picture, 0), "evaluations": cost, "snr": snr}
        for i, (cost, snr) in enumerate(points)
    ]


def test_a_gain_is_over_the_same_picture_at_the_same_cost():
    some = rows("ours", "a", (3, 9), (5, 30), (8, 26), (9, 50)) + rows("ours", "b", (3, 1), (5, 11))
    some += rows("plain", "a", (8, 28), (4, 20)) + rows("plain", "b", (8, 14), (4, 10))
    some += rows("ours", "c", (5, 99))  # the control has no such picture
    found = curves.gains(some, ["plain", "ours"], "plain")
    five, eight = found.pop("ours")  # nothing below 4 evaluations and above 8
    assert not found and five[::3] == (5, 2) and eight[::3] == (8, 1)
    # a: 30 - 22 on the line from 20 to 28; b: 11 - 11 on that from 10 to 14
    assert five.value == 4 and five.half == pytest.approx(1.96 * 32**0.5 / 2**0.5)
    assert eight.value == -2


def test_a_curve_is_the_mean_over_its_pictures_by_cost():
    some = rows("ours", "a", (8, 26), (5, 30)) + rows("ours", "b", (8, 20), (5, 34))
    ((name, points),) = curves.curves(some, ["plain", "ours"]).items()
    assert name == "ours" and [tuple(p)[:2] for p in points] == [(5, 32), (8, 23)]
    text = curves.table({name: points}, "dB")
    assert text.splitlines()[2] == "| ours | 5.0: 32.0 ± 3.9, 8.0: 23.0 ± 5.9 | 2 |"


def test_lorenz_prints_a_row_a_step_and_draws(run, tmp_path, capsys):  # noqa: F811
    args = ("--model", EVALUATE[1], "--size", "48", "--prompts", "a cat", "--steps", "5")
    run("lorenz", *args, "--plot", "l.png")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("5 steps, euler, 1 pictures")
    assert [line[:4] for line in lines[4:]] == [f"| {i} " for i in (1, 2, 3, 4)]
    assert Image.open(tmp_path / "l.png").width == 700


@pytest.mark.slow
def test_evaluate_makes_the_same_table_with_two_processes(run, tmp_path, capsys):  # noqa: F811
    run("evaluate", *EVALUATE)
    table = capsys.readouterr().out
    for path in (tmp_path / "e").iterdir():
        path.unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(EXAMPLES / "evaluate.py"), *EVALUATE]
    here = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | here
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == table
    names = sorted(path.name for path in (tmp_path / "e").glob("rows*"))
    assert names == ["rows.0.jsonl", "rows.1.jsonl"]
