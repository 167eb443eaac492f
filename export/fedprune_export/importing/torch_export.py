"""Export of torch modules as ONNX files with all their weights.

The exporter's optimisations are off, because they fuse batch norms into convolutions and merge equal weights of
different layers. The import simplifies graphs without changing weights.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import json
import logging
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import onnx

from fedprune.core.errors import MissingExtraError, ModelError, did_you_mean, error_reason, shape_text
from fedprune.core.imports import import_user_module
from fedprune.model.lengths import Shape, upper_shape
from fedprune_export.importing import metadata
from fedprune_export.importing.lengths import FREE_INPUT_KEY, LENGTHS, MASK, free_input, read_shape
from fedprune_export.importing.torch_dropout import (
    export_dropouts,
    extract_mask_axes,
    record_training_mode,
)
from fedprune_export.importing.torch_translations import TorchTranslations
from fedprune_export.ir.dropout import DROPOUT_AXES_KEY

_TORCH_HINT = (
    "In a clone, first pip install -c constraints.txt torch --index-url https://download.pytorch.org/whl/cpu (a small "
    "CPU wheel of the tested version), then"
)


def export_torch(
    source: Any, *, input_shape: Sequence[Any] | None = None, token_ids: bool = False, name: str = "module"
) -> bytes:
    """A torch module in evaluation mode as ONNX bytes, with all weights under their `state_dict` names.

    Parameters that don't require gradients are listed as frozen. A tensor that has several names goes by its first.
    Raises `ModelError` if it can't be exported, or weights were lost on the way; `MissingExtraError` if torch or
    onnxscript is not installed.

    Args:
        source: The module, or a pair of the module and an example input (with a batch), which may be int64.
        input_shape: One sample's shape; else that of the example, else the module's attribute `input_shape`. The
            module's attribute `input_dtype` says that the input is int64. Of a module with several inputs these
            attributes are mappings by the names of its arguments, in their order. A size may be the bounds of a
            length, such as "400:16000"; the module's arguments `mask` and `lengths` are then computed.
        token_ids: Whether the input is int64, where neither the example nor the module says it.
    """
    torch = torch_package()
    module, example = source if isinstance(source, tuple) and len(source) == 2 else (source, None)
    if not isinstance(module, torch.nn.Module):
        raise ModelError(f"{name} made no model", expected="a torch module", got=type(module).__name__)
    # The module is handed back as it came: PyTorch keeps the mode in every submodule, and they may differ.
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    samples, varying_input = _sample_inputs(module, example, input_shape, token_ids, name)
    training_mode = record_training_mode(torch, module, samples)
    module.eval()
    try:
        with export_dropouts(torch, module, training_mode):
            proto = export_module(module, samples)
    except Exception as error:
        shapes = " and ".join(shape_text("n", *sample.shape[1:]) for sample in samples)
        raise ModelError(
            f"{name}: torch can't export it for input {shapes} ({error_reason(root_cause(error))})",
            hint="Check that the module takes tensors of these shapes, with any batch, returns tensors, and "
            "decides nothing by the values of tensors (if, while)."
            + ("" if samples[0].dtype == torch.int64 else " If it takes token ids, add --token-ids."),
        ) from error
    else:
        _record_tensors(torch, module, samples, proto, name)
    finally:
        for submodule, training in modes:
            submodule.training = training
    texts = {} if varying_input is None else {FREE_INPUT_KEY: json.dumps(varying_input)}
    axes = extract_mask_axes(proto.graph.node)
    texts |= {DROPOUT_AXES_KEY: json.dumps(axes)} if axes else {}
    texts |= {metadata.TRAINING_NOTES_KEY: json.dumps(training_mode.notes)} if training_mode.notes else {}
    metadata.write_properties(proto, texts)
    raw: bytes = proto.SerializeToString(deterministic=True)
    return raw


def export_module(module: Any, samples: tuple[Any, ...]) -> onnx.ModelProto:
    """Export a torch module as an ONNX model with a free batch, without traces of the exporting machine."""
    torch = torch_package()
    batch = torch.export.Dim("N", min=1)
    # torch.export gives the children of the module to a torch.fx.GraphModule as attributes, which fails where that
    # class has an attribute of the same name.
    clash = any(hasattr(torch.fx.GraphModule, name) for name, _ in module.named_children())
    if clash:
        module = _wrap_module(module)
    with silence_libraries():
        program = torch.onnx.export(
            module,
            samples,
            dynamo=True,
            optimize=False,
            dynamic_shapes=(*({0: batch} for _ in samples),),
            custom_translation_table=TorchTranslations(torch).table(),
            external_data=False,
            verbose=False,
        )
    if clash:
        for old in [*program.model.graph.initializers]:
            program.model.graph.initializers[old].name = old.removeprefix(_WRAPPED_NAME + ".")
    _separate_names(program.model.graph)
    proto = onnx.load_model_from_string(program.model_proto.SerializeToString())
    # Versions, stack traces and paths would give one model another digest on every machine.
    proto.producer_version = ""
    del proto.graph.metadata_props[:]
    for node in proto.graph.node:  # stack traces and paths
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*proto.graph.initializer, *proto.graph.value_info):
        del value.metadata_props[:]
    return proto


# The attribute that holds the module in the wrapper, and so the prefix of its tensors.
_WRAPPED_NAME = "wrapped"


def _wrap_module(module: Any) -> Any:
    """Wrap a module in another one, whose only child it is, so that the names of its layers can't clash."""
    holder = torch_package().nn.Module()
    setattr(holder, _WRAPPED_NAME, module)
    holder.forward = functools.wraps(module.forward)(lambda *arguments: module(*arguments))
    return holder.eval()


def _sample_inputs(
    module: Any, example: Any, input_shape: Sequence[Any] | None, token_ids: bool, name: str
) -> tuple[tuple[Any, ...], tuple[str, int, int] | None]:
    """Sample inputs for the exporter, a tensor of zeros for each argument, and the input whose length varies."""
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
        dtypes = {n: _torch_dtype(dtype_names.get(n, torch.float32), _INPUT_DTYPES, name) for n in shapes}
    else:
        argument = next(iter(inspect.signature(module.forward).parameters), "x")
        shapes = {argument: read_shape(tuple(sizes), f"{name}: input_shape")}
        input_dtype = dtype_names.get(argument, torch.float32) if isinstance(dtype_names, Mapping) else dtype_names
        dtype = torch.int64 if token_ids else example.dtype if example is not None else input_dtype
        dtypes = {argument: _torch_dtype(dtype, _INPUT_DTYPES[:2], name)}
    varying_input = free_input(shapes)
    if varying_input is not None:
        shapes, dtypes = _add_computed_inputs(module, shapes, dtypes, varying_input, dtype_names, name)
    device = next((p.device for p in module.parameters()), "cpu")
    # Two samples each, because torch.export takes an axis of size 1 for one that never varies.
    samples = (torch.zeros((2, *upper_shape(s)), device=device, dtype=dtypes[n]) for n, s in shapes.items())
    return tuple(samples), varying_input


def _add_computed_inputs(
    module: Any,
    shapes: dict[str, Shape],
    dtypes: dict[str, Any],
    varying_input: tuple[str, int, int],
    dtype_names: Any,
    name: str,
) -> tuple[dict[str, Shape], dict[str, Any]]:
    """Shapes and types of a module's arguments, in their order, including the computed ones (mask and lengths)."""
    torch = torch_package()
    max_length = upper_shape(shapes[varying_input[0]])[varying_input[1]]
    arguments = list(inspect.signature(module.forward).parameters)
    computed = {MASK: ((max_length,), torch.float32), LENGTHS: ((), torch.int64)}
    computed = {n: shape_and_dtype for n, shape_and_dtype in computed.items() if n in arguments or n in shapes}
    dtype_names = dtype_names if isinstance(dtype_names, Mapping) else {}
    dtypes = dtypes | {
        n: _torch_dtype(dtype_names.get(n, usual), _INPUT_DTYPES, name) for n, (_, usual) in computed.items()
    }
    shapes = shapes | {n: shape for n, (shape, _) in computed.items()}
    order = [n for n in arguments if n in shapes] or list(shapes)
    return {n: shapes[n] for n in (order if len(order) == len(shapes) else shapes)}, dtypes


# Types of inputs; where there is one alone, one of the first two.
_INPUT_DTYPES = ("float32", "int64", "float16", "int32", "bool", "uint8")


def _torch_dtype(dtype: Any, allowed: Sequence[str], name: str) -> Any:
    """A dtype of torch, given by itself or its name. Raises `ModelError` if it isn't allowed."""
    text = str(dtype).rpartition(".")[2]
    if text not in allowed:
        raise ModelError(f"{name}: type of the input", expected=" or ".join(allowed), got=dtype)
    return getattr(torch_package(), text)


def _separate_names(graph: Any) -> None:
    """Rename values whose name a tensor or an earlier value has, too, as the exporter does for a buffer `index`."""
    used_names = set(graph.initializers)
    for value in graph.inputs:
        while value.name in used_names:
            value.name += "_"
        used_names.add(value.name)
    for node in graph:
        for value in node.outputs:
            while value.name in used_names:
                value.name += "_"
            used_names.add(value.name)


def _record_tensors(torch: Any, module: Any, samples: tuple[Any, ...], proto: onnx.ModelProto, name: str) -> None:
    """Give tensors their first name, and record which are trainable, unused, frozen and tied."""
    # A tied parameter is one tensor under several names; they all get the first one.
    by_id: dict[int, str] = {}
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    first_names = {n: by_id.setdefault(id(tensor), n) for n, tensor in tensors}
    _rename_initializers(proto, first_names)
    parameters = dict(module.named_parameters())
    initializer_names = {t.name for t in proto.graph.initializer}
    unused = [n for n in parameters if n not in initializer_names]
    # A file may lack a parameter that the outputs do not depend on. Any other was fused or folded by the exporter, and
    # the import would train another model.
    lost = _used_parameters(torch, module, samples, {n: parameters[n] for n in unused})
    if lost:
        raise ModelError(
            f"{name}: weights were lost or fused in the export",
            expected=f"{len(parameters)} tensors",
            got=f"{len(parameters) - len(lost)} (without {', '.join(lost[:5])})",
            hint="Please report this with the module.",
        )
    trainable = [n for n in parameters if n in initializer_names]
    # Running statistics are buffers for PyTorch; here they are cut and averaged with the parameters.
    statistics = [
        f"{prefix}.{field}" if prefix else field
        for prefix, submodule in module.named_modules()
        if isinstance(submodule, torch.nn.modules.batchnorm._BatchNorm)
        for field in ("running_mean", "running_var")
    ]
    statistics = [n for n in statistics if n in initializer_names]
    texts = {metadata.PARAMETERS_KEY: json.dumps([*trainable, *statistics])}
    if unused:
        texts[metadata.UNUSED_KEY] = json.dumps(unused)
    frozen = [n for n in trainable if not parameters[n].requires_grad]
    if frozen:
        texts[metadata.FROZEN_KEY] = json.dumps(frozen)
    aliases: dict[str, list[str]] = {}
    for alias, first in first_names.items():
        if alias != first:
            aliases.setdefault(first, []).append(alias)
    if aliases:
        texts[metadata.TIED_KEY] = json.dumps(aliases)
    onnx.helper.set_model_props(proto, texts)


def _used_parameters(torch: Any, module: Any, samples: tuple[Any, ...], parameters: dict[str, Any]) -> list[str]:
    """The names of the parameters on which the module's outputs depend."""
    if not parameters:
        return []
    required_gradients = {n: p.requires_grad for n, p in parameters.items()}
    try:
        # Frozen parameters count, too: a gradient only shows that an output depends on one.
        for value in parameters.values():
            value.requires_grad_(True)
        with torch.enable_grad():
            result = module(*samples)
            outputs = [o for o in (result if isinstance(result, (tuple, list)) else [result]) if o.requires_grad]
            gradients = [None] * len(parameters)
            if outputs:
                gradients = torch.autograd.grad(
                    sum(o.sum() for o in outputs), list(parameters.values()), allow_unused=True
                )
    finally:
        for name, value in parameters.items():
            value.requires_grad_(required_gradients[name])
    return [n for n, gradient in zip(parameters, gradients, strict=True) if gradient is not None]


def _rename_initializers(proto: onnx.ModelProto, names: dict[str, str]) -> None:
    """Rename initialisers; those that become the same are the same tensor."""
    if all(old == new for old, new in names.items()):
        return
    tensors = {t.name: t for t in proto.graph.initializer if names.get(t.name, t.name) == t.name}
    for tensor in list(proto.graph.initializer):
        new = names.get(tensor.name, tensor.name)
        if new == tensor.name:
            continue
        if new in tensors:
            proto.graph.initializer.remove(tensor)
        else:
            tensor.name = new
            tensors[new] = tensor
    for node in proto.graph.node:
        for i, value in enumerate(node.input):
            node.input[i] = names.get(value, value)
    for info in list(proto.graph.value_info):
        if names.get(info.name, info.name) != info.name:
            proto.graph.value_info.remove(info)


def factory_product(text: str) -> Any:
    """The module that the factory `package.module:factory` makes; a class of modules makes one without arguments.

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
        raise ModelError(
            f"can't import {module_name} ({error_reason(error)})",
            hint="Run the command in the folder of the module, or install its package.",
        ) from error
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
def silence_libraries() -> Iterator[None]:
    """Suppress the progress lines, logs and deprecation warnings of other libraries."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # torch logs the graphs of a failed export as errors
    try:
        silent = contextlib.redirect_stderr(_OtherThreads(sys.stderr, threading.get_ident()))
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), silent:
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


class _OtherThreads:
    """A stream that drops what one thread writes; another one may draw a progress line."""

    def __init__(self, stream: Any, thread: int) -> None:
        self._stream, self._thread = stream, thread

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._thread else int(self._stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def root_cause(error: BaseException) -> BaseException:
    """The root cause of an error: the exporter's own errors only name its steps."""
    # An error can be among its own causes, for example where it is raised again from what it has caused.
    visited = {id(error)}
    while error.__cause__ is not None and id(error.__cause__) not in visited:
        error = error.__cause__
        visited.add(id(error))
    return error
