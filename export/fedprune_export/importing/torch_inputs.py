"""Makes the sample inputs with which a torch module is exported, one tensor for each argument of its `forward`.

If an input's length varies, these include `mask` and `lengths`, which the graph computes from the padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from fedprune.core.errors import ModelError
from fedprune.model.lengths import Shape, upper_shape
from fedprune_export.importing.lengths import LENGTHS, MASK, FreeInput, free_input, read_shape
from fedprune_export.importing.torch_loading import torch_package

# Types of inputs.
_INPUT_DTYPES = ("float32", "int64", "float16", "int32", "bool", "uint8")


def sample_inputs(
    module: Any, example: Any, input_shape: Sequence[Any] | None, token_ids: bool, name: str
) -> tuple[tuple[Any, ...], FreeInput | None]:
    """A tensor of zeros for each argument, and the input whose length varies, if one does.

    The arguments are those of `export_torch`; `example` is the example input, if there is one.
    """
    torch = torch_package()
    sizes: Any = input_shape or (tuple(example.shape[1:]) if example is not None else None)
    sizes = sizes or getattr(module, "input_shape", None)
    if not sizes:
        raise ModelError(
            f"{name}: the input shape is unknown",
            hint="Give the module an attribute input_shape (such as (3, 32, 32)), or fedprune-export --input-shape.",
        )
    dtype_names = getattr(module, "input_dtype", {})
    if isinstance(sizes, Mapping):
        shapes = {argument: read_shape(shape, f"{name}: input_shape") for argument, shape in sizes.items()}
        dtype_names = dtype_names if isinstance(dtype_names, Mapping) else dict.fromkeys(shapes, dtype_names)
        dtypes = {n: _torch_dtype(dtype_names.get(n, torch.float32), name) for n in shapes}
    else:
        argument = next(iter(inspect.signature(module.forward).parameters), "x")
        shapes = {argument: read_shape(tuple(sizes), f"{name}: input_shape")}
        input_dtype = dtype_names.get(argument, torch.float32) if isinstance(dtype_names, Mapping) else dtype_names
        dtype = torch.int64 if token_ids else example.dtype if example is not None else input_dtype
        dtypes = {argument: _torch_dtype(dtype, name)}
    varying_input = free_input(shapes)
    if varying_input is not None:
        shapes, dtypes = _add_computed_inputs(module, shapes, dtypes, varying_input, dtype_names, name)
    device = next((p.device for p in module.parameters()), "cpu")
    # Two samples each, because torch.export takes an axis of size 1 for one that never varies.
    samples = (torch.zeros((2, *upper_shape(s)), device=device, dtype=dtypes[n]) for n, s in shapes.items())
    return tuple(samples), varying_input


def _add_computed_inputs(
    module: Any, shapes: dict[str, Shape], dtypes: dict[str, Any], varying: FreeInput, dtype_names: Any, name: str
) -> tuple[dict[str, Shape], dict[str, Any]]:
    """Shapes and types of a module's arguments, in their order, including the computed ones (mask and lengths)."""
    torch = torch_package()
    max_length = upper_shape(shapes[varying.name])[varying.axis]
    arguments = list(inspect.signature(module.forward).parameters)
    computed = {MASK: ((max_length,), torch.float32), LENGTHS: ((), torch.int64)}
    computed = {n: shape_and_dtype for n, shape_and_dtype in computed.items() if n in arguments or n in shapes}
    dtype_names = dtype_names if isinstance(dtype_names, Mapping) else {}
    dtypes = dtypes | {n: _torch_dtype(dtype_names.get(n, usual), name) for n, (_, usual) in computed.items()}
    shapes = shapes | {n: shape for n, (shape, _) in computed.items()}
    order = [n for n in arguments if n in shapes] or list(shapes)
    return {n: shapes[n] for n in (order if len(order) == len(shapes) else shapes)}, dtypes


def _torch_dtype(dtype: Any, name: str) -> Any:
    """A dtype of torch, given as an object or by its name. Raises `ModelError` if no input may have it."""
    text = str(dtype).rpartition(".")[2]
    if text not in _INPUT_DTYPES:
        raise ModelError(f"{name}: type of the input", expected=" or ".join(_INPUT_DTYPES), got=dtype)
    return getattr(torch_package(), text)
