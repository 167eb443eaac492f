"""Digest of the code that decides a row's numbers: of the simulator, and of the row's own strategy.

It covers every module of the project that these import, without docstrings, comments, type hints and the messages of
errors and logs. A changed strategy is a change of its own rows alone: `presets` imports all of them, and only the one
that a row names is followed from there.
"""

from __future__ import annotations

import ast
import hashlib
import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedprune.strategies.presets import PRESETS

ROOT = "benchmarks.accuracy.run"

_OURS = ("benchmarks", "fedprune", "fedprune_device", "fedprune_export", "fedprune_server")
_PRESETS = "fedprune.strategies.presets"
_METHODS = "fedprune.strategies.methods"
_EVERY_STRATEGYS = f"{_METHODS}.robust"

BY_VALUE = ("benchmarks.accuracy.nets", "benchmarks.accuracy.protocol")
"""Their settings and networks are in a run's key by value; what they import counts."""

UNDECIDING = (
    "fedprune.core.text",
    "fedprune.output",
    "fedprune_server.config",
    "fedprune_server.executor.divergence",
    "fedprune_server.executor.ray_driver",
    "fedprune_server.executor.ray_pool",
    "fedprune_server.simulation.results.run_folder",
    "fedprune_server.simulation.runs",
    "fedprune_server.storage",
)
"""Modules and packages that decide no number of a finished run: messages, files, settings that tables don't use."""

ON_SAMPLES = ("fedprune_server.executor.distillation",)
"""Modules that decide numbers only where the server has samples."""


@cache
def code_digest(strategy: str, *, samples: bool = False) -> str:
    """Digest of the code of a row.

    Args:
        strategy: The row's strategy, as in its job.
        samples: Whether the server has samples.
    """
    undeciding = UNDECIDING if samples else (*UNDECIDING, *ON_SAMPLES)
    found = {module: _essence(path, presets=module == _PRESETS) for module, path in closure(strategy).items()}
    kept = {m: e for m, e in found.items() if m not in BY_VALUE and not _within(m, undeciding)}
    body = [kept, strategy_module(strategy)]
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def strategy_module(strategy: str) -> str:
    """The module of a preset, or of a strategy of one's own."""
    return strategy.partition(":")[0] if ":" in strategy else PRESETS[strategy].__module__


@cache
def closure(strategy: str) -> dict[str, Path]:
    """All modules of the project that a row's run may import, with their files."""
    own = strategy_module(strategy)
    packages = {*_OURS, own.partition(".")[0]}
    found: dict[str, Path] = {}
    left = [ROOT, own, _EVERY_STRATEGYS]
    while left:
        module = left.pop()
        if module in found or module.partition(".")[0] not in packages:
            continue
        left.append(module.rpartition(".")[0])
        if (path := _file(module)) is None:
            continue  # a name of a module, or a folder without code
        found[module] = path
        imported = _imports(path)
        left += [m for m in imported if not (module == _PRESETS and _within(m, (_METHODS,)))]
    return found


def _within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == p or module.startswith(f"{p}.") for p in packages)


@cache
def _file(module: str) -> Path | None:
    top, *rest = module.split(".")
    spec = find_spec(top) if top else None
    if spec is None:
        return None
    if not spec.submodule_search_locations:
        return Path(spec.origin) if spec.origin and not rest else None
    place = Path(next(iter(spec.submodule_search_locations))).joinpath(*rest)
    files = (place / "__init__.py", place.with_suffix(".py")) if rest else (place / "__init__.py",)
    return next((f for f in files if f.is_file()), None)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def _imports(path: Path) -> frozenset[str]:
    """Modules that a file imports anywhere; names that it imports from a package may be modules."""
    found: set[str] = set()
    left: list[ast.AST] = [_tree(path)]
    while left:
        node = left.pop()
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path}: a relative import, which this digest doesn't follow")
            found |= {str(node.module), *(f"{node.module}.{a.name}" for a in node.names)}
        if not _for_types_alone(node):  # no expression has an import in it
            left += [n for n in ast.iter_child_nodes(node) if not isinstance(n, ast.expr)]
    return frozenset(found)


def _for_types_alone(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@cache
def _essence(path: Path, *, presets: bool = False) -> str:
    """Digest of a file's code, the same for every version of Python."""
    tree = _tree(path)
    body = tree.body
    if presets:  # the row's own entry counts by the module that it names
        body = [n for n in body if not _lists_presets(n)]
    plain = [_plain(n) for n in body if not _says_nothing(n)]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()


def _lists_presets(node: ast.stmt) -> bool:
    if isinstance(node, ast.ImportFrom):
        return _within(str(node.module), (_METHODS,)) and node.module != _EVERY_STRATEGYS
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "PRESETS"


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(v) for v in value if not _says_nothing(v)]
    if not isinstance(value, ast.AST):
        return repr(value)
    if isinstance(value, ast.Raise):  # a run that raises has no result
        return ["Raise"]
    kept = ((f, v) for f, v in ast.iter_fields(value) if v not in (None, []) and f not in ("returns", "kind"))
    if isinstance(value, ast.arg):
        return ["arg", value.arg]
    return [type(value).__name__, {f: _plain(v) for f, v in kept}]


def _says_nothing(node: object) -> bool:
    """A docstring, the package's version, or a line for a log."""
    if isinstance(node, ast.Assign):
        return [getattr(target, "id", "") for target in node.targets] == ["__version__"]
    if isinstance(node, ast.AST) and _for_types_alone(node):
        return True
    if not isinstance(node, ast.Expr):
        return False
    if isinstance(node.value, ast.Constant):
        return isinstance(node.value.value, str)
    call = node.value
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
        return False
    return isinstance(call.func.value, ast.Name) and call.func.value.id.strip("_").lower() == "log"
