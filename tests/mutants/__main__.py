"""python -m tests.mutants [--only TEXT] [--drawn N --seed S] [--results FILE]: which are noticed?

The mistakes of the lists, or N that are drawn by lot.
Works on a copy of the tree. Every mistake gets a process of its own, forked from one that has torch
loaded already, and runs the tests of its file until the first failure. A results file that is
there is gone on with: what it has is not run again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from zlib import crc32

ROOT = Path(__file__).parents[2]
LIMIT = 300  # seconds for one mistake; one that hangs is noticed, too


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", default="", help="names that contain this text: ras/plan.py:3")
    parser.add_argument("--drawn", type=int, help="so many drawn by lot, not those of the lists")
    parser.add_argument("--seed", type=int, default=0, help="of the lot")
    parser.add_argument("--results", type=Path, default=Path("mutants.txt"))
    args = parser.parse_args()
    if args.drawn is not None and args.drawn < 1:
        parser.error(f"--drawn is {args.drawn}, must be at least 1")
    os.environ["OMP_NUM_THREADS"] = "1"
    warm_up()

    from tests.mutants.drawn import drawn
    from tests.mutants.fifth import FIFTH
    from tests.mutants.fourth import FOURTH
    from tests.mutants.mistakes import MISTAKES, applied
    from tests.mutants.second import SECOND
    from tests.mutants.third import THIRD

    known, green = {}, set()
    if args.results.is_file():
        for line in args.results.read_text().splitlines():
            name, verdict, *_ = line.split()
            known[name] = verdict
    todo = (
        drawn(ROOT, args.drawn, args.seed)
        if args.drawn
        else [
            (f"{start}{file}:{i}", file, tests, applied((ROOT / file).read_text(), *pair))
            for start, mistakes in (
                ("", MISTAKES),
                ("second:", SECOND),
                ("third:", THIRD),
                ("fourth:", FOURTH),
                ("fifth:", FIFTH),
            )
            for file, (tests, pairs) in mistakes.items()
            for i, pair in enumerate(pairs)
        ]
    )
    todo.sort(key=lambda one: crc32(one[0].encode()))  # a part of a run is a fair sample
    with tempfile.TemporaryDirectory() as folder:
        tree, log = Path(folder) / "tree", Path(folder) / "log"
        ignore = shutil.ignore_patterns(".git", ".hypothesis", "__pycache__")
        shutil.copytree(ROOT, tree, ignore=ignore)
        for number, (name, file, tests, changed) in enumerate(todo, start=1):
            if args.only not in name or name in known:
                continue
            if tests not in green:
                verdict, by, _ = run(tree, tests.split(), log)
                if verdict == "caught":
                    raise SystemExit(f"red without any mistake, so it can't tell: {by}")
                green.add(tests)
            source = (tree / file).read_text()
            for text, time in ((changed, 2 * number), (source, 2 * number + 1)):
                (tree / file).write_text(text)
                os.utime(tree / file, (time, time))  # no two alike: bytecode is never stale
                if text != source:
                    verdict, by, seconds = run(tree, tests.split(), log)
            known[name] = verdict
            line = f"{name} {verdict} {seconds:.1f}s {by}"
            print(line, flush=True)
            with args.results.open("a") as results:
                results.write(line + "\n")
    caught = sum(verdict == "caught" for verdict in known.values())
    print(f"caught {caught} of {len(known)}: {100 * caught / max(1, len(known)):.1f} %")
    return 0


def warm_up() -> None:
    """Load once what every test loads, and let hypothesis stop at the first failure it finds, and
    try less than in the suite: what is noticed here is noticed there."""
    import pytest  # noqa: F401
    from hypothesis import HealthCheck, Phase, settings

    import minidit  # noqa: F401

    for name, module in list(sys.modules.items()):  # only what it loads is to stay
        file = getattr(module, "__file__", None)
        if file and ROOT in Path(file).parents and name != "__main__":
            del sys.modules[name]
    settings.register_profile(
        "mutants",
        deadline=None,
        max_examples=10,
        derandomize=True,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )


def run(tree: Path, tests: list[str], log: Path) -> tuple[str, str, float]:
    """ "caught" or "missed" by these tests of a tree, the test that failed, and CPU seconds."""
    child = os.fork()
    if not child:
        import pytest

        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        os.chdir(tree)
        sys.path[:] = [str(tree), *(p for p in sys.path if p not in ("", str(ROOT)))]
        signal.alarm(LIMIT)
        files = [f"tests/test_{name}".replace("::", ".py::") for name in tests]
        files = [name if "::" in name else f"{name}.py" for name in files]
        options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-n0"]
        options += ["--hypothesis-profile=mutants", "-m", "not slow"]
        os._exit(pytest.main([*options, *files]))
    _, status, usage = os.wait4(child, 0)
    seconds = usage.ru_utime + usage.ru_stime
    if status == 0:
        return "missed", "", seconds
    text = log.read_text()
    failed = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return "caught", (failed or [f"status {status} {text[-300:]!r}"])[0].split(" - ")[0], seconds


if __name__ == "__main__":
    sys.exit(main())
