"""Mistakes that nobody made up: drawn by lot from all small changes of the syntax tree.

A comparison, an operator, a number, a condition, an argument or a statement is changed, or left
out. What changes an error message, an annotation or a docstring alone is none.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "amin": "amax", "amax": "amin", "any": "all", "all": "any"}
SYMMETRIC = {"transpose", "promote_types", "maximum", "minimum", "equal", "min", "max"}
UNSEEN = {"device", "memory_format", "strict"}  # arguments that change nothing that a CPU can see
TESTS = {
    "ras/plan.py": "ras_plan ras_upstream",
    "ras/config.py": "ras_plan ras_select ras_run ras_sampling examples doors calls",
    "ras/values.py": "ras_plan ras_select doors calls",
    "ras/select.py": "ras_select ras_run",
    "ras/run.py": "ras_run ras_upstream flow ras_sampling edit",
    "ras/cache.py": "ras_run ras_network edit guidance",
    "ras/tokens.py": "ras_select ras_network",
    "ras/given.py": "edit",
    "ras/record.py": "edit",
    "ras/trace.py": "ras_run ras_sampling",
    "ras/upstream.py": "ras_upstream ras_plan calls",
    "minidit/flow.py": "flow ras_run edit guidance",
    "minidit/guidance.py": "flow guidance pipeline",
    "minidit/scheduler.py": "scheduler flow calls",
    "minidit/edit.py": "edit",
    "minidit/pipeline.py": "edit flux_pipeline pipeline doors calls",
    "minidit/conditioning.py": "conditioning flux_pipeline pipeline calls",
    "minidit/checks.py": "doors calls pipeline edit",
    "minidit/mmdit.py": "mmdit parts ras_network layouts",
    "minidit/nextdit.py": "nextdit parts ras_network layouts",
    "minidit/flux.py": "flux ras_network flux_pipeline layouts",
    "minidit/lumina2.py": "lumina2 ras_network layouts",
    "minidit/parts.py": "parts nextdit mmdit flux lumina2 clip t5 gemma ras_network",
    "minidit/vae.py": "vae layouts calls",
    "minidit/strips.py": "vae",
    "minidit/clip.py": "clip layouts calls",
    "minidit/t5.py": "t5 layouts calls",
    "minidit/gemma.py": "gemma layouts calls",
    "minidit/tokenizers.py": "tokenizers",
    "weights/files.py": "load doors fuzz layouts lumina2_layouts",
    "weights/keymap.py": "layouts load save",
    "weights/networks.py": "load layouts doors flux_layouts lumina2_layouts",
    "weights/common.py": "layouts load",
    "weights/sd3.py": "layouts load",
    "weights/lumina.py": "layouts load",
    "weights/flux.py": "flux_layouts layouts",
    "weights/lumina2.py": "lumina2_layouts layouts",
    "weights/load.py": "load layouts doors resolve flux_layouts lumina2_layouts",
    "weights/resolve.py": "resolve",
    "weights/save.py": "save layouts flux_layouts",
    "weights/tokenizers.py": "tokenizers load doors",
    "weights/__main__.py": "cli_weights",
}


def drawn(root: Path, count: int, seed: int) -> list[tuple[str, str, str, str]]:
    """(name, file, its tests, source with the mistake in it) of `count` different mistakes.

    The name says where and what, without white space, and which of all: two changes of a line may
    look alike at their beginning. "ras/plan.py:41:start+1->start-1#87".
    """
    found = [(file, *change) for file in TESTS for change in changes((root / file).read_text())]
    some = random.Random(seed).sample(list(enumerate(found)), min(count, len(found)))
    return [
        ("".join(f"{file}:{line}:{what}#{number}".split()), file, TESTS[file], source)
        for number, (file, line, what, source) in some
    ]


def changes(source: str) -> Iterator[tuple[int, str, str]]:
    """Line, what is changed into what, and the changed source, for every mistake."""
    lines = source.encode().splitlines(keepends=True)
    starts = [sum(map(len, lines[:i])) for i in range(len(lines))]
    text = b"".join(lines)
    for node, decides in inner(ast.parse(source)):
        first = starts[node.lineno - 1] + node.col_offset
        last = starts[node.end_lineno - 1] + node.end_col_offset
        unmet = [ast.Constant(False)] if decides else []  # an `if` without its consequence
        for new in (*unmet, *variants(node)):
            code = ast.unparse(new)
            inside = f"({code})" if isinstance(node, ast.expr) else code
            changed = (text[:first] + inside.encode() + text[last:]).decode()
            yield node.lineno, f"{text[first:last].decode()[:60]}->{code[:60]}", changed


def inner(node: ast.AST) -> Iterator[tuple[ast.stmt | ast.expr, bool]]:
    """The statements and expressions that do something, below a node; whether it decides."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom):
                continue
            if isinstance(child, ast.keyword) and child.arg in UNSEEN:
                continue
            if isinstance(child, ast.stmt | ast.expr):
                yield child, field == "test"
            if isinstance(child, ast.AST):
                yield from inner(child)


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """What a node could be by mistake."""

    def but(**fields) -> ast.AST:
        new = deepcopy(node)
        for field, value in fields.items():
            setattr(new, field, value)
        return new

    match node:
        case ast.Compare(ops=[op]) if type(op) in COMPARISONS:
            yield but(ops=[COMPARISONS[type(op)]()])
        case ast.BinOp(op=op) if type(op) in OPERATORS and not textual(node):
            yield but(op=OPERATORS[type(op)]())
        case ast.BoolOp(values=[one, *others]):
            yield one
            yield others[0] if len(others) == 1 else but(values=others)
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield but(value=not value)
        case ast.Constant(value=int(value)):
            yield but(value=value + 1)
            if value > 0:
                yield but(value=value - 1)
        case ast.Constant(value=float(value)):
            yield but(value=2 * value or 1.0)
        case ast.IfExp():
            yield node.body
            yield node.orelse
        case ast.Name(id=name, ctx=ast.Load()) if name in NAMES:
            yield but(id=NAMES[name])
        case ast.Call(args=args, keywords=keywords):
            name = ast.unparse(node.func).rpartition(".")[2]
            apart = len({ast.dump(one) for one in args[:2]}) > 1 and name not in SYMMETRIC
            if apart and not any(isinstance(one, ast.Starred) for one in args):
                yield but(args=[args[1], args[0], *args[2:]])
            for one in keywords:
                if one.arg not in UNSEEN:
                    yield but(keywords=[other for other in keywords if other is not one])
        case ast.Expr(value=ast.Call()) | ast.AugAssign():
            yield ast.Pass()


def textual(node: ast.BinOp) -> bool:
    """Whether an operator joins text."""
    return any(
        isinstance(side, ast.JoinedStr)
        or (isinstance(side, ast.Constant) and isinstance(side.value, str | bytes))
        for side in (node.left, node.right)
    )
