"""Exports torch modules as ONNX files with all their weights.

The exporter's optimisations are off, because they fuse batch norms into convolutions and merge equal weights of
different layers. The import simplifies graphs without changing weights.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import onnx

from fedprune.core.errors import ModelError, error_reason, shape_text
from fedprune.model.lengths import Shape, upper_shape
from fedprune_export.importing import metadata
from fedprune_export.importing.lengths import FREE_INPUT_KEY, LENGTHS, MASK, FreeInput, free_input, read_shape
from fedprune_export.importing.quiet_libraries import silence_libraries
from fedprune_export.importing.torch_dropout import export_dropouts, extract_masks
from fedprune_export.importing.torch_loading import pause_collection, torch_package
from fedprune_export.importing.torch_training_mode import record_training_mode
from fedprune_export.importing.torch_translations import TorchTranslations
from fedprune_export.ir.instance_norms import INSTANCE_NORMS_KEY

# Types of inputs.
_INPUT_DTYPES = ("float32", "int64", "float16", "int32", "bool", "uint8")


@pause_collection()
def export_torch(
    source: Any, *, input_shape: Sequence[Any] | None = None, token_ids: bool = False, name: str = "module"
) -> bytes:
    """A torch module in evaluation mode as ONNX bytes, with all weights under their `state_dict` names.

    Parameters that don't require gradients are listed as frozen. A tensor that has several names goes by its first.
    Raises `ModelError` if it can't be exported, or weights were lost on the way; `MissingExtraError` if torch or
    onnxscript is not installed.

    Args:
        source: The module, or a pair of the module and an example input (with a batch), which may be int64.
        input_shape: One sample's shape; by default that of the example, or the module's attribute `input_shape`. Its
            attribute `input_dtype` may say that the input is int64. If a module has several inputs, these attributes
            are mappings by the names of its arguments, in their order. A size may be the bounds of a length, such as
            "400:16000"; the module's arguments `mask` and `lengths` are then computed.
        token_ids: Whether the input is int64, if neither the example nor the module says it.
    """
    torch = torch_package()
    module, example = source if isinstance(source, tuple) and len(source) == 2 else (source, None)
    if not isinstance(module, torch.nn.Module):
        raise ModelError(f"{name} made no model", expected="a torch module", got=type(module).__name__)
    # The module is handed back as it came: PyTorch keeps the mode in every submodule, and they may differ.
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    samples, varying_input = sample_inputs(module, example, input_shape, token_ids, name)
    training_mode = record_training_mode(torch, module, samples)
    module.eval()
    for submodule in training_mode.drawing:
        submodule.training = True
    try:
        with export_dropouts(torch, module, training_mode.calls), export_embedding_bags(torch):
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
        with torch.random.fork_rng(devices=[]):
            record_tensors(torch, module, samples, proto, name)
    finally:
        for submodule, training in modes:
            submodule.training = training
    texts = {} if varying_input is None else {FREE_INPUT_KEY: json.dumps(varying_input)}
    texts |= extract_masks(proto)
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
    for node in proto.graph.node:
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


def root_cause(error: BaseException) -> BaseException:
    """The root cause of an error: the exporter's own errors only name its steps."""
    # An error can be among its own causes, for example if it is raised again from an error that it has caused.
    visited = {id(error)}
    while error.__cause__ is not None and id(error.__cause__) not in visited:
        error = error.__cause__
        visited.add(id(error))
    return error


@contextmanager
def export_embedding_bags(torch: Any) -> Iterator[None]:
    """Let calls of `embedding_bag` on identifiers [n, length] be lookups and reductions while a module is exported: the
    exporter writes a loop over the samples.

    Flat identifiers with offsets stay as they are: their bags differ in length from sample to sample.
    """
    embedding_bag = torch.nn.functional.embedding_bag

    class Bags(torch.overrides.TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(
            self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            bags = _bags(torch, *args, **(kwargs or {})) if function is embedding_bag else None
            return function(*args, **(kwargs or {})) if bags is None else bags

    with Bags():
        yield


def _bags(
    torch: Any,
    ids: Any,
    weight: Any,
    offsets: Any = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Any = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """The bags [n, width] of identifiers [n, length]; None for other calls. The arguments are torch's own."""
    if ids.dim() != 2 or offsets is not None or max_norm is not None:
        return None
    rows = torch.nn.functional.embedding(ids, weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    if padding_idx is None:
        return {"sum": rows.sum, "mean": rows.mean, "max": rows.amax}[mode](1)
    # Padding counts neither in a mean nor for a maximum; a bag of nothing else is 0.
    counts = (ids != padding_idx % weight.shape[0]).unsqueeze(-1)
    if mode == "max":
        largest = torch.where(counts, rows, -math.inf).amax(1)
        return torch.where(counts.any(1), largest, 0.0)
    total = (rows * counts).sum(1)
    return total if mode == "sum" else total / counts.sum(1).clamp(min=1)


def sample_inputs(
    module: Any, example: Any, input_shape: Sequence[Any] | None, token_ids: bool, name: str
) -> tuple[tuple[Any, ...], FreeInput | None]:
    """A tensor of zeros for each argument, and the input whose length varies, if one does.

    If that length varies, they include `mask` and `lengths`, which the graph computes from the padding. The arguments
    are those of `export_torch`; `example` is the example input, if there is one.
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


def record_tensors(torch: Any, module: Any, samples: tuple[Any, ...], proto: onnx.ModelProto, name: str) -> None:
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
    exported = [n for n in parameters if n in initializer_names]
    # Running statistics are buffers for PyTorch; here they are cut and averaged with the parameters.
    statistics = _statistics(module, torch.nn.modules.batchnorm._NormBase, initializer_names)
    instance_norms = _statistics(module, torch.nn.modules.instancenorm._InstanceNorm, initializer_names)[::2]
    aliases: dict[str, list[str]] = {}
    for alias, first in first_names.items():
        if alias != first:
            aliases.setdefault(first, []).append(alias)
    frozen = [n for n in exported if not parameters[n].requires_grad]
    facts = {metadata.UNUSED_KEY: unused, metadata.FROZEN_KEY: frozen, metadata.TIED_KEY: aliases}
    facts[INSTANCE_NORMS_KEY] = instance_norms
    texts = {metadata.PARAMETERS_KEY: json.dumps([*exported, *statistics])}
    texts |= {key: json.dumps(fact) for key, fact in facts.items() if fact}
    onnx.helper.set_model_props(proto, texts)


def _statistics(module: Any, kind: Any, exported: set[str]) -> list[str]:
    """The exported running statistics of norms of a kind: mean and variance of each."""
    return [
        name
        for prefix, submodule in module.named_modules()
        if isinstance(submodule, kind)
        for field in ("running_mean", "running_var")
        if (name := f"{prefix}.{field}" if prefix else field) in exported
    ]


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
