"""torch's exporter: files as users export them, and translations of operators that are made once in a process.

The exporter makes them anew for every export, from the sources of some 500 functions, which takes as long as all the
rest of a small network's export. They depend on the opset alone.
"""

import contextlib
import copy
import functools
import io
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


def users_file(module: Any, opset: int) -> bytes:
    """A module as a user exports it: without a list of its parameters, by torch's older exporter below opset 18."""
    import torch

    samples, file = (torch.zeros(2, *module.input_shape),), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if opset < 18:
            axes = {"image": {0: "N"}}
            options: Any = {"dynamo": False, "input_names": [*axes], "dynamic_axes": axes}
            torch.onnx.export(module.eval(), samples, file, opset_version=opset, **options)
            return file.getvalue()
        options = {"dynamo": True, "verbose": False, "dynamic_shapes": ({0: torch.export.Dim("N", min=1)},)}
        program = torch.onnx.export(module.eval(), samples, opset_version=opset, **options)
        return bytes(program.model_proto.SerializeToString())
