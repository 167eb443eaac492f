"""Digests of strategies' code, by which a page tells with which code its rows were made."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

import fedprune
from fedprune.strategies.presets import PRESETS

ROOT = Path(fedprune.__file__).parents[1]
_ROOM = "fedprune.strategies"


@cache
def strategy_digest(strategy: str) -> str:
    """Digest of the code of a preset, or of a composition `module:function`: of its module and of all modules of
    `fedprune.strategies` that this imports, without comments and docstrings."""
    preset = PRESETS.get(name := strategy.partition(":")[0])  # several of one function are partial
    pending, used = [getattr(preset, "func", preset).__module__ if preset else name], dict[str, str]()
    while pending:
        module = pending.pop()
        folder = Path(__file__).parents[2] if module.startswith("benchmarks.") else ROOT
        path = folder / f"{module.replace('.', '/')}.py"
        if module in used or not path.exists():
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        pending += [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module is not None
                    and n.module.startswith(_ROOM)]  # fmt: skip
        used[module] = code_of(tree)
    return hashlib.sha256("\n".join(f"{n} {used[n]}" for n in sorted(used)).encode()).hexdigest()[:8]


def code_of(tree: ast.AST) -> str:
    """Code as text, without comments and docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree)
