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

EVALUATE = ["--model", str(GOLDENS / "pipe_sd3"), "--prompts", "a cat", "a dog", "--seeds", "2"]
EVALUATE += ["--out", "e", "--size", "48", "--ode-steps", "24"]
EVALUATE += ["--methods", "corrected", "ours", "ours, steps left out", "paper"]


def test_evaluate_resumes_and_makes_the_same_table(run, tmp_path, capsys):  # noqa: F811
    run("evaluate", *EVALUATE, "--plot", "e.png")
    table = capsys.readouterr().out
    lines = (tmp_path / "e" / "rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == (6 + 6 + 6 + 4) * 2 * 2
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [
        "| corrected", "| ours", "| ours, steps left out", "| paper"
    ]  # fmt: skip
    assert Image.open(tmp_path / "e.png").width > 600
    (tmp_path / "e" / "rows.jsonl").write_text("\n".join(lines[:7]) + '\n{"key": ["co')
    run("evaluate", *EVALUATE)
    assert capsys.readouterr().out == table


def test_nearer_with_more_evaluations_and_no_regional_step_is_counted_whole(run, tmp_path):  # noqa: F811
    run("evaluate", *EVALUATE)
    rows = map(json.loads, (tmp_path / "e" / "rows.jsonl").read_text().splitlines())
    rows = [row for row in rows if row["key"][4:] == ["a cat", 0]]
    costs = {
        name: [r["evaluations"] for r in rows if r["key"][2] == name] for name in EVALUATE[-4:]
    }
    assert costs["corrected"] == [6, 8, 10, 12, 14, 18]
    for dense, ours, skipped in zip(*list(costs.values())[:3], strict=True):
        assert skipped < ours < dense
    snr = [row["snr"] for row in rows if row["key"][2] == "corrected"]
    assert snr[-1] > snr[0]


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
