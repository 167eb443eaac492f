"""Imports by name: a user's module, a package's lazy attributes, and the code of child processes."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

from fedprune.core.disk import path_exists


def import_user_module(name: str) -> ModuleType:
    """Import a user's module from the current folder or the module path; raises any error of the module, or
    `ImportError`.

    The module itself is looked for in the current folder first. For all other imports of the process that folder comes
    last, so that no file in it takes the place of an installed module.
    """
    current_folder, top_name = str(Path.cwd()), name.partition(".")[0]
    if current_folder not in sys.path:
        sys.path.append(current_folder)
    if top_name not in sys.modules:
        # Searched by hand: with the folder first on the path, a user's `numpy.py` would replace numpy everywhere.
        spec = PathFinder.find_spec(top_name, [current_folder])
        if spec is not None and spec.loader is not None and spec.origin is not None:
            module = importlib.util.module_from_spec(spec)
            sys.modules[top_name] = module  # before it runs, as the import system does: it may import itself
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[top_name]
                raise
    return importlib.import_module(name)


def is_function(source: str) -> bool:
    """Whether samples are named by a class or a function. A name with a colon may be a file's: an existing file is
    one."""
    return ":" in source and not source.endswith(".npz") and not path_exists(Path(source), file=True)


def program_code(code: str) -> str:
    """Wrap code for `python -c` so that it imports nothing from the current folder, which `-c` puts first."""
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
        setattr(sys.modules[package], name, value)  # so that `__getattr__` is asked once per name
        return value

    return load
