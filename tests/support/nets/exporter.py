"""torch's exporter, with its translations of operators made once in a process.

It makes them anew for every export, from the sources of some 500 functions, which takes as long as all the rest of a
small network's export. They depend on the opset alone.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from typing import Any


@functools.cache
def keep_translations() -> None:
    """Let exports share the translations; each still gets a table of its own to add to."""
    with warnings.catch_warnings(), contextlib.suppress(ImportError, AttributeError):  # of another torch: only slower
        warnings.simplefilter("ignore")
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        cached_registry = functools.cache(ONNXRegistry.from_torchlib)

        def from_torchlib(*which: Any, **opset: Any) -> ONNXRegistry:
            registry = copy.copy(cached_registry(*which, **opset))
            registry.functions = {name: list(overloads) for name, overloads in registry.functions.items()}
            return registry

        ONNXRegistry.from_torchlib = staticmethod(from_torchlib)
