"""All errors that fedprune raises on purpose, read from the source, so that no package must be there to import them."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

from fedprune.core.errors import ExitCode

WINGS = ("toolkit", "export", "device_runtime", "server")
_BASE = "FedpruneError"


@cache
def by_exit_code(root: Path) -> dict[ExitCode, list[str]]:
    """Names of the errors with which a command ends, by the exit code; those of `fedprune.core.errors` first.

    Args:
        root: The repository.
    """
    files = [path for wing in WINGS for path in sorted((root / wing).rglob("*.py"))]
    files = [path for path in files if "Error):" in path.read_text(encoding="utf-8")]
    files.sort(key=lambda path: path.name != "errors.py")
    known: dict[str, ExitCode] = {_BASE: ExitCode.INTERNAL}
    found: dict[ExitCode, list[str]] = {code: [] for code in ExitCode}
    waiting = [node for path in files for node in _classes(path)]
    while True:  # a base may come after what is made of it
        left = []
        for node in waiting:
            bases = [b.id for b in node.bases if isinstance(b, ast.Name) and b.id in known]
            if bases and node.name not in known:
                known[node.name] = _own_code(node) or known[bases[0]]
                found[known[node.name]].append(node.name)
            else:
                left.append(node)
        if len(left) == len(waiting):
            return found
        waiting = left


def _classes(path: Path) -> list[ast.ClassDef]:
    return [n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.ClassDef)]


def _own_code(node: ast.ClassDef) -> ExitCode | None:
    for line in node.body:
        targets = (
            line.targets if isinstance(line, ast.Assign) else [line.target] if isinstance(line, ast.AnnAssign) else []
        )
        named = any(isinstance(t, ast.Name) and t.id == "exit_code" for t in targets)
        value = line.value if isinstance(line, (ast.Assign, ast.AnnAssign)) else None
        if named and isinstance(value, ast.Attribute):
            return ExitCode[value.attr]
    return None
