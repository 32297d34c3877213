"""The scripts, as a user runs them: what they write, print, and say when something is wrong."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS
from PIL import Image

from ras import Step, Trace

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = ["a cat", "--model", str(GOLDENS / "pipe_sd3"), "--size", "48x32", "--guidance", "3"]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run examples/NAME.py's main in this process, in an empty folder, without what it changes for
    the whole process."""
    monkeypatch.chdir(tmp_path)
    for name in ("set_num_threads", "set_flush_denormal"):
        monkeypatch.setattr(torch, name, lambda value: None)

    def run(name: str, *args: str):
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *args])
        return module.main()

    return run


def test_sample_writes_pictures_and_says_what_they_cost(run, tmp_path, capsys):
    run("sample", *TINY, "--steps", "8", "--n", "2", "--out", "cat.png", "--active-map", "map.png",
        "--ras-preset", "paper", "--ras", "0.5", "--verbose")  # fmt: skip
    printed = capsys.readouterr().out
    for name in ("cat-0.png", "cat-1.png"):
        assert f"wrote {name} (48x32, seed 0" in printed
        assert Image.open(tmp_path / name).size == (48, 32)
    assert Image.open(tmp_path / "map.png").size == (2 * 48 + 4, 32)
    assert "token-steps (" in printed and "% of dense)" in printed and "weights: " in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cat-0.png", "cat-1.png", "map.png"]


def test_sample_draws_with_a_next_dit(run, tmp_path, capsys):
    run(
        "sample",
        "a cat",
        "--model",
        str(GOLDENS / "pipe_lumina"),
        "--size",
        "48x32",
        "--steps",
        "4",
    )
    assert Image.open(tmp_path / "sample.png").size == (48, 32)
    assert "token-steps (" in capsys.readouterr().out


def test_sample_without_ras_is_dense(run, capsys):
    run("sample", *TINY, "--steps", "2", "--ras", "off")
    assert "cost: 100 %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--ras", "half"], "--ras is 'half', must be a number in (0, 1] or off"),
        (["--ras", "1.5"], "ratio is 1.5, must be in (0, 1]"),
        (["--ras", "off", "--active-map", "m.png"], "--ras off leaves no regions"),
        (["--ras-preset", "best"], "there is no preset 'best', only default"),
        (["--out", "cat.docx"], "cat.docx has no picture's ending"),
        (["--out", "missing/cat.png"], "missing/cat.png can't be written"),
        (["--model", "missing/model"], "missing/model"),
        (["--size", "40x40"], "must be a positive multiple of"),
        (["--steps", "0"], "steps is 0"),
        (["--guidance", "0"], "guidance is 0.0, must be a number of at least 1"),
    ],
)
def test_sample_says_what_is_wrong_and_writes_nothing(run, tmp_path, args, sentence):
    with pytest.raises((ValueError, OSError, KeyError)) as error:
        run("sample", *TINY, *args)
    assert sentence in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_errors_leave_one_sentence_and_a_failed_exit(tmp_path):
    for args, sentence in (
        (["--ras", "2"], "error: ratio is 2.0"),
        (["--speed", "9"], "unrecognized arguments: --speed 9"),
        (["--size", "big"], "'big' is no size, e.g. 1024x768"),
    ):
        command = [sys.executable, str(EXAMPLES / "sample.py"), *TINY, *args]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode != 0 and sentence in done.stderr
        assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_sample_leaves_nothing_half_written(run, tmp_path, monkeypatch):
    def broken(self, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", broken)
    with pytest.raises(OSError, match="no space"):
        run("sample", *TINY, "--steps", "2", "--ras", "off")
    assert not list(tmp_path.iterdir())


def test_compare_draws_a_sheet_a_map_and_an_animation(run, tmp_path, monkeypatch):
    run("compare", "a cat", "--model", str(GOLDENS / "pipe_sd3"), "--steps", "8", "--ratios", "0.5",
        "--steps-map", "steps.png", "--gif", "steps.gif")  # fmt: skip
    assert Image.open(tmp_path / "compare.png").width > 3 * 32
    assert Image.open(tmp_path / "steps.png").width > 0
    assert Image.open(tmp_path / "steps.gif").n_frames > 3  # equal frames are merged


@pytest.mark.parametrize("family", ["sd3", "sd3.5-medium", "lumina"])
def test_benchmark_prints_shares_of_time_and_flops(run, capsys, monkeypatch, family):
    benchmark = importlib.import_module("benchmark")
    small = {"num_layers": 1, "num_attention_heads": 4}
    sizes = {"hidden_size": 96} if family == "lumina" else {"caption_projection_dim": 256}
    config = benchmark.VARIANTS[family]
    tiny = type(config)(**(vars(config) | small | sizes | {
        k: v for k, v in (("num_kv_heads", 2), ("dual_attention_layers", ())) if hasattr(config, k)
    }))  # fmt: skip
    monkeypatch.setitem(benchmark.VARIANTS, family, tiny)
    run("benchmark", "--family", family, "--layers", "1", "--size", "64", "--repeats", "1",
        "--ratios", "0.5", "--extrapolate")  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert "1 layers, 64 px, batch 2" in lines[0] and "cache: " in lines[1]
    dense, half = (line.split() for line in lines[3:])
    assert dense[2:] == ["100.0%", "100.0%", "1.000"]
    assert half[0] == "50.0%" and 45 < float(half[3].rstrip("%")) < 99


def test_heat_counts_regional_steps_only():
    trace = Trace((1, 3))
    one = torch.zeros(1, 4, 2, 6)
    trace.record(1.0, Step(False, 3), None, one)
    trace.record(0.8, Step(True, 1, True), torch.tensor([[1]]), one)
    trace.record(0.6, Step(True, 2, True), torch.tensor([[1, 2]]), one)
    assert trace.heat().tolist() == [[0.0, 1.0, 0.5]]
    assert trace.token_steps == 6 and trace.share == 6 / 9


EVALUATE = ["--model", str(GOLDENS / "pipe_sd3"), "--prompts", "a cat", "--seeds", "2"]
EVALUATE += ["--steps", "8", "--out", "e.jsonl", "--settings", "default", "paper", "dense"]


def test_evaluate_resumes_and_makes_the_same_table(run, tmp_path, capsys):
    run("evaluate", *EVALUATE, "--plot", "e.png", "--images", "pictures")
    table = capsys.readouterr().out
    rows = (tmp_path / "e.jsonl").read_text().splitlines()
    assert len(rows) == 6 and "| default |" in table and table.count("±") == 12
    assert "| dense | 100% | 99.0 ± 0.0 | 99.0 ± 0.0 | 1.000 ± 0.000 |" in table
    assert Image.open(tmp_path / "e.png").width > 600
    names = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.glob("pictures/*/*.png"))
    folders = ("default", "dense", "paper")
    assert names == [f"pictures/{name}/00000-{seed}.png" for name in folders for seed in (0, 1)]
    (tmp_path / "e.jsonl").write_text("\n".join(rows[:3]) + '\n{"setting": "def')
    run("evaluate", *EVALUATE)
    assert capsys.readouterr().out == table


def test_evaluate_without_scikit_image_leaves_out_ssim(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    run("evaluate", *EVALUATE)
    assert "| 99.0 ± 0.0 | nan ± nan |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("evaluate --steps 0", "--steps is 0, must be at least 1"),
        ("evaluate --ode-steps -1", "--ode-steps is -1, must be at least 0"),
        ("evaluate --settings best", "invalid choice: 'best' (choose from"),
        ("evaluate --plot table.docx", "table.docx has no picture's ending"),
        ("evaluate --plot missing/table.svg", "missing must be a writable folder"),
        ("evaluate --captions empty.txt", "empty.txt has no captions, must have one a line"),
        ("evaluate --captions missing.txt", "missing.txt"),
        ("compare --steps 0", "--steps is 0, must be at least 1"),
        ("compare --ratios 2", "ratio is 2.0, must be in (0, 1]"),
        ("compare --ras-preset best", "there is no preset 'best', only default"),
        ("benchmark --layers 0", "--layers is 0, must be at least 1"),
        ("benchmark --size 100", "--size is 100, must be a positive multiple of 16"),
        ("quality . --captions empty.txt", "empty.txt has no captions"),
        ("train sheet --model mini-sd3 --out sheet.docx", "sheet.docx has no picture's ending"),
        ("train measure --model mini-sd3 --ras-preset best", "there is no preset 'best'"),
        ("train measure --model missing", "there is no file or folder missing"),
        ("train train --run r --steps 0", "--steps is 0, must be at least 1"),
        ("train train --run r --family sdxl", "invalid choice: 'sdxl'"),
        ("train train --run r --size 100", "no r/data/sd3-100.npy; make it with"),
        ("train prepare --run r --sizes 40", "size is 40, must be a multiple of 16 up to 256"),
        ("train prepare --run r --colours 18", "colours is 18, must be within 1..17"),
    ],
)
def test_scripts_say_what_is_wrong_and_write_nothing(run, tmp_path, capsys, command, sentence):
    (tmp_path / "empty.txt").touch()
    with pytest.raises((ValueError, OSError, KeyError, SystemExit)) as error:
        run(*command.split())
    assert sentence in str(error.value) + capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


@pytest.mark.slow
def test_evaluate_makes_the_same_table_with_two_processes(run, tmp_path, capsys):
    run("evaluate", *EVALUATE)
    table = capsys.readouterr().out
    (tmp_path / "e.jsonl").unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(EXAMPLES / "evaluate.py"), *EVALUATE]
    here = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | here
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == table
    assert sorted(p.name for p in tmp_path.glob("e*.jsonl")) == ["e.0.jsonl", "e.1.jsonl"]


def test_quality_pairs_pictures_with_their_captions(run, tmp_path, capsys, monkeypatch):
    """The metric networks can't be fetched here: stand-ins show what reaches them."""

    class Metric:
        def __init__(self, *_, **__):
            self.seen, self.real = [], []

        def to(self, device):
            return self

        def reset(self):
            self.seen = []

        def update(self, picture, *captions, real=False):
            assert picture.dtype == torch.uint8 and picture.shape[:2] == (1, 3)
            (self.real if real else self.seen).append((picture[0, 0, 0, 0].item(), *captions))

        def compute(self):
            if any(len(one) > 1 for one in self.seen):
                return torch.tensor(float(all(c == [f"gray {v}"] for v, c in self.seen)))
            return torch.tensor(10.0 * len(self.real) + len(self.seen))

    for module, name in (("image.fid", "FrechetInceptionDistance"),
                         ("multimodal.clip_score", "CLIPScore")):  # fmt: skip
        stub = type(sys)("stub")
        setattr(stub, name, Metric)
        monkeypatch.setitem(sys.modules, f"torchmetrics.{module}", stub)
    (tmp_path / "captions.txt").write_text("gray 0\n\ngray 1\ngray 2\n")
    for folder, values in (("one", (0, 2)), ("other", (1,)), ("real", (7, 8, 9))):
        (tmp_path / folder).mkdir()
        for value in values:
            path = tmp_path / folder / f"{value:05d}-4.png"
            Image.new("RGB", (6, 4), (value,) * 3).save(path)
    run("quality", "one", "other", "--captions", "captions.txt", "--reference", "real")
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == ["| one | 1.00 | 32.00 | 2 |", "| other | 1.00 | 31.00 | 1 |"]
    with pytest.raises(ValueError, match="00007-4.png is none of the 3 captions' pictures"):
        run("quality", "real", "--captions", "captions.txt")
    with pytest.raises(FileNotFoundError, match="nothing is no folder"):
        run("quality", "nothing", "--captions", "captions.txt")
