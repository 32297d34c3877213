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
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [
        "| corrected", "| ours", "| ours, steps left out"
    ]  # fmt: skip
    assert Image.open(tmp_path / "e.png").width > 600
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
    points = [(4.0, 20.0, 1.0, 8), (9.0, 30.0, 1.0, 8)]
    found = dict.fromkeys(("corrected", "ours, fresh keys", "hold"), points)
    evaluate.plot(found, "a model", tmp_path / "e.svg")
    drawn = (tmp_path / "e.svg").read_text("utf-8")
    assert all(f"<!-- {name} -->" in drawn for name in (*found, "a model", "network evaluations"))


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
