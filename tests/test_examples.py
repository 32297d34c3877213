"""The scripts, as a user runs them: what they write, print, and say when something is wrong."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS
from PIL import Image

import cli
import minidit
import ras
from ras import Step, Trace

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
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


@pytest.mark.parametrize("model", ["pipe_lumina", "pipe_flux_dev", "pipe_lumina2"])
def test_sample_draws_with_every_family(run, tmp_path, capsys, model):
    args = ("--model", str(GOLDENS / model), "--size", "48x32", "--steps", "5")
    run("sample", "a cat", *args, "--ras", "0.5")
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
        (["--out", "cat.docx"], "cat.docx has no picture's ending that can be written, e.g. .png"),
        (["--out", "cat.psd"], "cat.psd has no picture's ending"),  # Pillow only reads it
        (["--out", "cat.xbm"], "cat.xbm has no picture's ending"),  # and this one has no colour
        (["--out", "cat"], "cat has no picture's ending"),
        (["--active-map", "./sample.png"], "sample.png is named for two outputs"),
        (["--n", "3", "--active-map", "sample-1.png"], "sample-1.png is named for two outputs"),
        (["--no-t5", "--model", str(GOLDENS / "pipe_lumina")], "--no-t5 is for SD3, and "),
        (["--device", "cuda:99"], "device 'cuda:99' is not available here"),
        (["--out", "missing/cat.png"], "missing/cat.png can't be written"),
        (["--model", "missing/model"], "missing/model"),
        (["--size", "40x40"], "must be a positive multiple of"),
        (["--steps", "0"], "--steps is 0, must be at least 1"),
        (
            ["--steps", "1000000000000"],
            "steps is 1000000000000, must be an integer within 1..10000",
        ),
        (["--n", "0"], "--n is 0, must be at least 1"),
        (["--guidance", "0"], "guidance is 0.0, must be a finite number of at least 1"),
        (["--guidance", "inf"], "guidance is inf, must be a finite number"),
        (["--size", "64x64x64"], "'64x64x64' is no size, e.g. 1024x768"),
        (["--size", "big"], "'big' is no size, e.g. 1024x768"),
        (["--seed", "any"], "'any' is neither a number nor random"),
        (["--solver", "heun"], "invalid choice: 'heun'"),
        (["--speed", "9"], "unrecognized arguments: --speed 9"),
        (["--prompts", "p.txt"], "--prompts and prompt are given, must be one of them"),
    ],
)
def test_sample_says_what_is_wrong_and_writes_nothing(run, tmp_path, capsys, args, sentence):
    with pytest.raises((ValueError, OSError, KeyError, SystemExit)) as error:
        run("sample", *TINY, *args)
    assert sentence in str(error.value) + capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_script_that_refuses_ends_with_one_sentence(tmp_path):
    command = [sys.executable, str(EXAMPLES / "sample.py"), *TINY, "--ras", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: ratio is 2.0, must be in (0, 1]")
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def ending(main, capsys):
    """Status and words of a script that ends by itself."""
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    code = end.value.code
    return (code, capsys.readouterr().err) if isinstance(code, int) else (1, code)


def raising(error):
    def main():
        raise error

    return main


def test_a_refusal_is_a_sentence_and_a_bug_keeps_its_traceback(capsys):
    """What tells them apart is who raised: a `raise` of the project, or Python in a line of it."""
    config = ras.RASConfig()
    for main, sentence in (
        (lambda: ras.RASConfig(ratio=2), "error: ratio is 2, must be in (0, 1]"),
        (lambda: ras.RASConfig.preset("best"), "error: there is no preset 'best'"),
        (lambda: cli.read_lines(Path("missing.txt")), "error: [Errno 2] No such file"),
        (lambda: minidit.load("missing/model"), "missing/model"),
        (raising(OSError("no space left")), "error: no space left"),
    ):
        status, words = ending(main, capsys)
        assert status == 1 and sentence in words and "\n" not in words
    for main, kind in (
        (lambda: {}["seed"], KeyError),  # a slip in a script
        (lambda: int("many"), ValueError),
        (lambda: config.plan(8), TypeError),  # a call that Python refuses
        (lambda: cli.share().missing, AttributeError),
        (lambda: torch.zeros(2) @ torch.zeros(3), RuntimeError),
        (raising(ValueError("of somebody else")), ValueError),
    ):
        with pytest.raises(kind):
            cli.run(main)


def test_what_is_said_is_one_line_without_what_a_terminal_obeys(capsys, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    name = "a\n\x1b[2Jb\udcff" + "c" * 5_000_000
    _, words = ending(raising(OSError(name)), capsys)
    assert words.startswith(r"error: a\n\x1b[2Jb\udcffccc") and len(words) < 1100
    cli.run(lambda: (warnings.warn(name, stacklevel=2), print(f"wrote {name[:8]}")))
    out, words = capsys.readouterr()
    assert words.startswith(r"warning: a\n\x1b[2Jb\udcffccc") and len(words) < 1100
    assert out == "wrote a\n\x1b[2Jb\\udcff\n"


@pytest.fixture
def compiled(monkeypatch) -> list[type]:
    """The kinds of the modules that were to be compiled, which they are not."""
    kinds = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: kinds.append(type(self)))
    return kinds


def test_compile_compiles_the_blocks(run, compiled):
    run("sample", *TINY, "--steps", "1", "--ras", "off", "--compile")
    assert compiled == [minidit.mmdit.Block] * 3


def test_too_little_memory_is_a_sentence(capsys):
    for main in (
        raising(MemoryError()),
        raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB")),
        lambda: torch.empty(2**60, dtype=torch.uint8),
    ):
        status, words = ending(main, capsys)
        assert status == 1 and words.startswith("error: there is not enough memory: ")
        assert "\n" not in words


def test_ctrl_c_is_a_word_and_status_130(capsys):
    assert ending(raising(KeyboardInterrupt), capsys) == (130, "stopped\n")


@pytest.mark.parametrize("program", [[str(EXAMPLES / "sample.py")], ["-m", "weights", "inspect"]])
def test_ctrl_c_is_a_word_while_modules_are_imported(program, tmp_path):
    stop = "import signal\nsignal.raise_signal(signal.SIGINT)\nfor _ in iter(int, 1): pass"
    (tmp_path / "torch.py").write_text(stop)
    paths = os.pathsep.join((str(tmp_path), str(ROOT)))
    done = subprocess.run(
        [sys.executable, *program], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths}, timeout=60,
        # what runs behind a shell's "&" ignores Ctrl-C, and so does what it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert done.returncode in (130, -signal.SIGINT) and done.stderr == "stopped\n"


def test_other_errors_while_modules_are_imported_keep_their_traceback():
    code = "import weights.interrupt; 1 / 0"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


def test_what_makes_ctrl_c_a_word_is_imported_first():
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text()
        first = re.search(r"^(import|from) (?!__future__).*", text, re.MULTILINE)
        if "run(main)" in text and path.name != "cli.py":
            words = ("import cli ", "from cli ", "import weights.interrupt ")
            assert first[0].startswith(words), path


def test_a_png_carries_what_it_was_drawn_with(run, tmp_path):
    """Enough to draw it again, whatever the prompt is written in."""
    run("sample", "猫 \udcff", *TINY[1:], "--steps", "8", "--n", "2", "--seed", "random", "--ras",
        "0.5", "--solver", "euler", "--negative", "mud")  # fmt: skip
    info = Image.open(tmp_path / "sample-1.png").info
    assert info["prompt"] == "猫 ?" and info["negative prompt"] == "mud"
    assert (info["steps"], info["solver"], info["guidance"]) == ("8", "euler", "3.0")
    assert info["RAS"] == str(ras.RASConfig.preset("default").with_ratio(0.5))
    assert info["picture"] == "1" and info["model"].endswith("pipe_sd3")
    assert info["Software"] == f"minidit {minidit.__version__}"
    run("sample", "猫 \udcff", *TINY[1:], "--steps", "8", "--n", "2", "--seed", info["seed"],
        "--ras", "0.5", "--solver", "euler", "--negative", "mud", "--out", "again.png")  # fmt: skip
    first, again = (Image.open(tmp_path / f"{name}-1.png") for name in ("sample", "again"))
    assert first.tobytes() == again.tobytes()
    run("sample", *TINY, "--steps", "2", "--ras", "off", "--out", "dense.jpg")
    run("sample", *TINY, "--steps", "2", "--ras", "off", "--out", "dense.png")
    assert Image.open(tmp_path / "dense.png").info["RAS"] == "off"


def test_a_file_of_prompts_is_a_picture_a_line_and_processes_share_them(
    run, tmp_path, capsys, monkeypatch
):
    (tmp_path / "p.txt").write_text("a cat\n\n  two dogs \na fox\n")
    args = [*TINY[1:], "--prompts", "p.txt", "--steps", "2", "--ras", "off"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, names in (("1", ["1"]), ("0", ["0", "1", "2"])):
        monkeypatch.setenv("RANK", rank)
        run("sample", *args, "--out", "x.png")
        assert sorted(p.name for p in tmp_path.glob("x*")) == [f"x-{i}.png" for i in names]
    prompts = [Image.open(tmp_path / f"x-{i}.png").info["prompt"] for i in range(3)]
    assert prompts == ["a cat", "two dogs", "a fox"]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    for text, sentence in ((b"\n \n", "p.txt is empty, must have"), (b"\xff", "no UTF-8 text")):
        (tmp_path / "p.txt").write_bytes(text)
        with pytest.raises(ValueError, match=sentence):
            cli.read_lines(tmp_path / "p.txt")


def test_what_is_unsaid_suits_the_machine(monkeypatch):
    unsaid = argparse.Namespace(device=None, dtype=None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank, device in (("0", "cuda:0"), ("1", "cuda:1"), ("2", "cuda:0")):
        monkeypatch.setenv("RANK", rank)
        assert cli.device_of(unsaid) == torch.device(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for there, device in ((True, "mps"), (False, "cpu")):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=there: there)
        assert cli.device_of(unsaid) == torch.device(device)
    for device, dtype in (
        ("cuda:1", torch.bfloat16),
        ("mps", torch.bfloat16),
        ("cpu", torch.float),
    ):
        assert cli.dtype_of(unsaid, torch.device(device)) == dtype
    said = argparse.Namespace(device="cpu", dtype="float16")
    assert cli.dtype_of(said, cli.device_of(said)) == torch.float16


def test_a_small_model_gets_one_thread_unless_told(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with torch.device("meta"):
        small, large = torch.nn.Linear(10, 10), torch.nn.Linear(10_000, 20_000)
    cli.set_threads(None, small)
    assert asked == [1]
    cli.set_threads(None, large)
    assert asked == [1]
    cli.set_threads(4, small)
    assert asked == [1, 4]
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    cli.set_threads(None, small)
    assert asked == [1, 4]


def test_a_warning_is_a_line(run, capsys, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    cli.run(lambda: run("sample", *TINY[:5], "--guidance", "1", "--negative", "mud", "--steps", "2",
                        "--ras", "off"))  # fmt: skip
    assert "warning: negative_prompt is ignored: guidance is 1, off\n" in capsys.readouterr().err


def test_sample_leaves_nothing_half_written(run, tmp_path, monkeypatch):
    write = Image.Image.save

    def broken(self, path, *args, **options):
        if not isinstance(path, Path):  # the check at the door
            return write(self, path, *args, **options)
        path.write_bytes(b"half")
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


def tiny_benchmark(monkeypatch, family: str) -> tuple[str, ...]:
    """Arguments of benchmark.py for one narrow layer of a family."""
    benchmark = importlib.import_module("benchmark")
    small = {"num_layers": 1, "num_attention_heads": 4}
    sizes = {
        "lumina": {"hidden_size": 96},
        "lumina2": {"hidden_size": 96, "axes_dim_rope": (8, 8, 8)},
        "flux": {},
    }.get(family, {"caption_projection_dim": 256})
    config = benchmark.VARIANTS[family]
    tiny = type(config)(**(vars(config) | small | sizes | {
        k: v for k, v in (("num_kv_heads", 2), ("dual_attention_layers", ())) if hasattr(config, k)
    }))  # fmt: skip
    monkeypatch.setitem(benchmark.VARIANTS, family, tiny)
    return "--family", family, "--layers", "1", "--size", "64"


@pytest.mark.parametrize("family", ["sd3", "sd3.5-medium", "lumina", "flux", "lumina2"])
def test_benchmark_prints_shares_of_time_and_flops(run, capsys, monkeypatch, family):
    run("benchmark", *tiny_benchmark(monkeypatch, family), "--repeats", "1", "--ratios", "0.5")
    lines = capsys.readouterr().out.splitlines()
    assert "1 layers, 64 px, batch 2" in lines[0] and "cache: " in lines[1]
    dense, half = (line.split() for line in lines[3:])
    assert dense[2:] == ["100.0%", "100.0%", "1.000"]
    assert half[0] == "50.0%" and 45 < float(half[3].rstrip("%")) < 99


def test_benchmark_compiles_the_blocks(run, capsys, monkeypatch, compiled):
    arguments = tiny_benchmark(monkeypatch, "flux")
    run("benchmark", *arguments, "--repeats", "1", "--ratios", "0.5", "--compile")
    assert compiled == [minidit.flux.DoubleBlock] + [minidit.flux.SingleBlock] * 2
    assert capsys.readouterr().out.splitlines()[0].endswith(", compiled")


@pytest.mark.parametrize("batch", ["1", "2"])
def test_benchmark_times_whole_runs(run, capsys, monkeypatch, batch):
    run("benchmark", *tiny_benchmark(monkeypatch, "lumina2"), "--run", "--batch", batch)
    official, dense, regions = capsys.readouterr().out.splitlines()[2:]
    assert official.split()[2:4] == ["28", "28.00"] and official.endswith("100.0%")
    assert dense.split()[1:3] == ["14", "14.00"] and regions.split()[2:4] == ["14", "12.50"]


def test_heat_counts_regional_steps_only():
    trace = Trace((1, 3))
    for sigma, step, active in (
        (1.0, Step(False, 3), [1, 1, 1]),
        (0.8, Step(True, 1), [0, 1, 0]),
        (0.6, Step(True, 2), [0, 1, 1]),
    ):
        trace.record(sigma, step, torch.tensor([active], dtype=torch.bool))
    assert trace.heat().tolist() == [[0.0, 1.0, 0.5]]
    assert trace.token_steps == 6 and trace.share == 6 / 9


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("evaluate --ode-steps 0", "--ode-steps is 0, must be at least 1"),
        ("evaluate --methods best", "invalid choice: 'best' (choose from"),
        ("evaluate --plot table.docx", "table.docx has no picture's ending"),
        ("evaluate --plot missing/table.svg", "missing must be a writable folder"),
        ("evaluate --captions empty.txt", "empty.txt is empty, must have one prompt a line"),
        ("evaluate --captions missing.txt", "missing.txt"),
        ("compare --steps 0", "--steps is 0, must be at least 1"),
        ("compare --ratios 2", "ratio is 2.0, must be in (0, 1]"),
        ("compare --ras-preset best", "there is no preset 'best', only default"),
        ("compare --gif a.jpg", "a.jpg has no picture's ending that can be written, one of .apng"),
        ("compare --steps-map compare.png", "compare.png is named for two outputs"),
        ("compare --solver heun", "invalid choice: 'heun'"),
        ("lorenz --steps 2", "--steps is 2, must be at least 3"),
        ("lorenz --plot curves.docx", "curves.docx has no picture's ending"),
        ("benchmark --layers 0", "--layers is 0, must be at least 1"),
        ("benchmark --size 100", "--size is 100, must be a positive multiple of 16"),
        ("train sheet --model mini-sd3 --out sheet.docx", "sheet.docx has no picture's ending"),
        ("train measure --run r --model mini-sd3 --ras-preset best", "there is no preset 'best'"),
        ("train measure --run r --model missing", "there is no file or folder missing"),
        ("train text --run r --family sd3 --steps 0", "--steps is 0, must be at least 1"),
        ("train train --run r --family sdxl --sizes 128", "invalid choice: 'sdxl'"),
        ("train train --run r --family sd3 --sizes 128", "no emoji packages in node_modules; run"),
        ("train scenes --run r --sizes 256x40", "size is 256x40, sides must be multiples of 16"),
        ("train scenes --run r --sizes 256 --count 0", "--count is 0, must be at least 1"),
    ],
)
def test_scripts_say_what_is_wrong_and_write_nothing(run, tmp_path, capsys, command, sentence):
    (tmp_path / "empty.txt").touch()
    with pytest.raises((ValueError, OSError, KeyError, SystemExit)) as error:
        run(*command.split())
    assert sentence in str(error.value) + capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]
