"""Modules that are imported by name: a user's own, a package's public ones when they are first used, and programs of
child processes."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType


def own_module(name: str) -> ModuleType:
    """Import a user's module from the current folder or the module path; raises any error of the module, or
    `ImportError`.

    The module itself is looked for in the current folder first. For all other imports of the process that folder comes
    last, so that no file in it takes the place of an installed module.
    """
    here, top = str(Path.cwd()), name.partition(".")[0]
    if here not in sys.path:
        sys.path.append(here)
    if top not in sys.modules:
        found = PathFinder.find_spec(top, [here])
        if found is not None and found.loader is not None and found.origin is not None:
            module = importlib.util.module_from_spec(found)
            sys.modules[top] = module
            try:
                found.loader.exec_module(module)
            except BaseException:
                del sys.modules[top]
                raise
    return importlib.import_module(name)


def program_code(code: str) -> str:
    """The code for `python -c`, which would import from the current folder before all others: this doesn't."""
    return f"import sys\nsys.path[:] = [p for p in sys.path if p]\n{code}"  # Python 3.10 has no -P


def module_code(name: str) -> str:
    """Code for `python -c` that does what `python -m` does, but imports nothing from the current folder."""
    return program_code(f"from runpy import run_module\nrun_module({name!r}, run_name='__main__', alter_sys=True)")


def lazy_attributes(package: str, modules: Mapping[str, str]) -> Callable[[str], object]:
    """A package's `__getattr__` (PEP 562), from the module of each name."""

    def load(name: str) -> object:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value: object = getattr(import_module(modules[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return load
