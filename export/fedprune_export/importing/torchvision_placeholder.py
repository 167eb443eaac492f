"""A placeholder for torchvision, which timm imports for image transforms and operators that its networks don't need."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NoReturn

from fedprune.core.errors import MissingExtraError

TORCHVISION = "torchvision"


@contextmanager
def torchvision_or_placeholder() -> Iterator[None]:
    """While timm is imported, let a placeholder take torchvision's place where that is missing or can't be imported.

    The placeholder's modules are removed from `sys.modules` afterwards, so that other packages see no torchvision.
    """
    try:
        importlib.import_module(TORCHVISION)
    except Exception:  # noqa: BLE001 - whatever it fails with, timm can do without it
        _forget()
    else:
        yield
        return
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _forget()


def _forget() -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == TORCHVISION]:
        del sys.modules[name]


class _PlaceholderType(type):
    """A class that can be named, compared and derived from, but not instantiated; its members are their names."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name

    def __call__(cls, *_: object, **__: object) -> NoReturn:
        raise MissingExtraError(
            f"timm needs torchvision's {cls.__name__} here, and torchvision is missing or can't be imported",
            hint="Install the torchvision that belongs to your torch; `python -c 'import torchvision'` has to work.",
        )


class _PlaceholderModule(ModuleType):
    def __getattr__(self, name: str) -> _PlaceholderType:
        if name.startswith("__"):
            raise AttributeError(name)
        return _PlaceholderType(name, (), {})


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != TORCHVISION:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _PlaceholderModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass
