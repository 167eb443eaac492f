"""Imports torch, and the user's torch modules by their names: `package.module:factory`."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from fedprune.core.errors import MissingExtraError, ModelError, did_you_mean, error_reason
from fedprune.core.imports import import_user_module

_TORCH_HINT = (
    "In a clone, first pip install -c constraints.txt torch --index-url https://download.pytorch.org/whl/cpu (a small "
    "CPU wheel of the tested version), then"
)


def factory_product(text: str) -> Any:
    """The module that `package.module:factory` names, or that this function or class makes without arguments.

    Raises `ModelError` if there is no such factory, or it fails; `MissingExtraError` if torch is not installed.
    """
    torch = torch_package()
    factory = import_object(text)
    try:
        # A module is callable, too, but calling it would run its forward.
        is_product = isinstance(factory, torch.nn.Module) or not callable(factory)
        return factory if is_product else factory()
    except Exception as error:
        raise ModelError(f"{text} failed ({type(error).__name__}: {error_reason(error)})") from error


def import_object(text: str) -> Any:
    """The object `package.module:name`. Raises `ModelError` if the module can't be imported or lacks the name."""
    module_name, _, name = text.rpartition(":")
    try:
        module = import_user_module(module_name)
    except ImportError as error:
        hint = "Run the command in the folder of the module, or install its package."
        if module_name.endswith(".py"):
            hint = f"Name the module, not its file: {module_name.removesuffix('.py').replace('/', '.')}:{name}."
        raise ModelError(f"can't import {module_name} ({error_reason(error)})", hint=hint) from error
    except Exception as error:
        raise ModelError(f"importing {module_name} failed ({type(error).__name__}: {error_reason(error)})") from error
    if not hasattr(module, name):
        raise ModelError(
            f"module {module_name} has no {name}{did_you_mean(name, vars(module))}",
            hint=f"It was read from {getattr(module, '__file__', None) or 'Python itself'}.",
        )
    return getattr(module, name)


def torch_package() -> Any:
    """torch, with what its exporter needs. Raises `MissingExtraError` if it is not installed."""
    try:
        import onnxscript  # noqa: F401  torch.onnx needs it
        import torch
    except ImportError as error:
        missing = [n for n in ("torch", "onnxscript") if find_spec(n) is None] or [error.name or "torch"]
        raise MissingExtraError(
            f"a torch module needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed",
            hint=_TORCH_HINT,
            extra="torch",
        ) from error
    return torch


@contextlib.contextmanager
def pause_collection() -> Iterator[None]:
    """Pause the collector of reference cycles.

    torch, timm and torch's exporter make a million objects that stay. The collector looks through all of them again
    and again as they grow, for a fifth of the import's time, and frees only some tens of megabytes.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        # Moves all objects to the oldest generation at once; else the next collections would look through them. What
        # others have frozen would be thawed with them.
        if gc.get_freeze_count() == 0:
            gc.freeze()
            gc.unfreeze()
        gc.enable()
