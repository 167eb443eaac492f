"""Import of users' modules: strategies, torch factories and data functions."""

from __future__ import annotations

import importlib
import importlib.util
import sys
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
