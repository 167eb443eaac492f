"""Imports the solvers that the extra `subflot` installs: POT and scipy."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from fedprune.core.errors import MissingExtraError


def check_installed() -> None:
    """Load the solvers. Raises `MissingExtraError` if the extra `subflot` is not installed."""
    load_pot()
    load_assignment_solver()


@cache
def load_pot() -> Any:
    """POT, imported without the tensor libraries that POT would load besides numpy."""
    names = [f"POT_BACKEND_DISABLE_{n}" for n in ("PYTORCH", "JAX", "TENSORFLOW", "CUPY")]
    added = [n for n in names if n not in os.environ] if {"ot", "torch"}.isdisjoint(sys.modules) else []
    os.environ.update(dict.fromkeys(added, "1"))
    try:
        import ot
    except ImportError as error:
        raise MissingExtraError("transport plans need POT", extra="subflot") from error
    finally:
        # The variables are POT's own, but children of this process would inherit them.
        for name in added:
            del os.environ[name]
    return ot


@cache
def load_assignment_solver() -> Callable[..., Any]:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise MissingExtraError("transport plans need scipy", extra="subflot") from error
    return linear_sum_assignment  # type: ignore[no-any-return]
