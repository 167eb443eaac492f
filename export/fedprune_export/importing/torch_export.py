"""Exports torch modules as ONNX files with all their weights.

The exporter's optimisations are off, because they fuse batch norms into convolutions and merge equal weights of
different layers. The import simplifies graphs without changing weights.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import onnx

from fedprune.core.errors import ModelError, error_reason, shape_text
from fedprune.model.lengths import Shape, upper_shape
from fedprune_export.importing import metadata
from fedprune_export.importing.draws import rewrite_draws
from fedprune_export.importing.inlining import inline_model
from fedprune_export.importing.lengths import FREE_INPUT_KEY, LENGTHS, MASK, FreeInput, free_input, read_shape
from fedprune_export.importing.quiet_libraries import silence_libraries
from fedprune_export.importing.raw_file import raw_session
from fedprune_export.importing.torch_calls import replace_calls
from fedprune_export.importing.torch_loading import pause_collection, torch_package
from fedprune_export.importing.torch_training_mode import TrainingMode, lost_draws_notes, record_training_mode
from fedprune_export.importing.torch_translations import TorchTranslations
from fedprune_export.importing.translation import read_graph, write_graph
from fedprune_export.ir.instance_norms import INSTANCE_NORMS_KEY
from fedprune_export.ir.rounding import relative_distance

# Types of inputs.
_INPUT_DTYPES = ("float32", "int64", "float16", "int32", "bool", "uint8")

# How far, relative to the largest number, an export whose draws are at their means may be from evaluation.
_MAX_DISTANCE = 1e-3


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
    mode = record_training_mode(torch, module, samples)
    notes = list(mode.notes)
    try:
        with replace_calls(torch):
            proto = _export_drawing(module, samples, mode)
            if proto is None:
                # Right predictions are worth more than draws, which a note names.
                notes += lost_draws_notes(mode.draws)
                module.eval()
                proto = export_module(module, samples)
    except ModelError:
        raise
    except Exception as error:
        shapes = " and ".join(shape_text("n", *sample.shape[1:]) for sample in samples)
        raise ModelError(
            f"{name}: torch can't export it for input {shapes} ({error_reason(root_cause(error))})",
            hint="Check that the module takes tensors of these shapes, with any batch, returns tensors, and "
            "decides nothing by the values of tensors (if, while)."
            + ("" if samples[0].dtype == torch.int64 else " If it takes token ids, add --token-ids."),
        ) from error
    finally:
        for submodule, training in modes:
            submodule.training = training
    texts = _tensor_facts(torch, module, {t.name for t in proto.graph.initializer})
    texts |= {} if varying_input is None else {FREE_INPUT_KEY: json.dumps(varying_input)}
    texts |= {metadata.TRAINING_NOTES_KEY: json.dumps(notes)} if notes else {}
    metadata.write_properties(proto, texts)
    raw: bytes = proto.SerializeToString(deterministic=True)
    return raw


def _export_drawing(module: Any, samples: tuple[Any, ...], mode: TrainingMode) -> onnx.ModelProto | None:
    """A module that draws as in training mode, as an ONNX model; None if it draws nothing, can't be exported in this
    mode, or computes something else than evaluation once its draws are at their means."""
    if not mode.modules:
        return None
    module.eval()
    for submodule in mode.modules:
        submodule.training = True
    try:
        proto = export_module(module, samples)
    except Exception:  # noqa: BLE001  the user's code, which may decide by what it draws
        return None
    graph = read_graph(inline_model(proto))
    rewrite_draws(graph, [])
    feeds = dict(zip((p.name for p in graph.inputs), (s.numpy(force=True) for s in mode.samples), strict=True))
    names = [p.name for p in graph.outputs]
    expected = mode.outputs if isinstance(mode.outputs, (list, tuple)) else [mode.outputs]
    try:
        outputs = raw_session(write_graph(graph).SerializeToString(), names, exact=True).run(feeds)
    except ModelError:
        return None
    distances = (relative_distance(e.numpy(force=True), outputs[n]) for e, n in zip(expected, names, strict=True))
    return proto if max(distances, default=0.0) <= _MAX_DISTANCE else None


def export_module(module: Any, samples: tuple[Any, ...]) -> onnx.ModelProto:
    """Export a torch module as an ONNX model with a free batch, without traces of the exporting machine.

    A tensor that has several names goes by its first. Raises `ModelError` if a parameter was lost on the way.
    """
    torch = torch_package()
    batch = torch.export.Dim("N", min=1)
    names = _first_names(module)
    # torch.export gives the children of the module to a torch.fx.GraphModule as attributes, which fails where that
    # class has an attribute of the same name.
    if any(hasattr(torch.fx.GraphModule, name) for name, _ in module.named_children()):
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
    graph, exported = program.model.graph, program.exported_program
    _separate_names(graph)
    # A file may lack a parameter that the outputs do not depend on. Any other was fused or folded by the exporter, and
    # the import would train another model.
    parameters = exported.graph_signature.inputs_to_parameters
    used = [parameters[n.name] for n in exported.graph.nodes if n.name in parameters and n.users]
    if lost := [name for name in used if name not in graph.initializers]:
        raise ModelError(
            "weights were lost or fused in torch's export",
            expected=f"{len(used)} tensors",
            got=f"{len(used) - len(lost)} (without {', '.join(lost[:5])})",
            hint="Please report this with the module.",
        )
    for old in [*graph.initializers]:
        stripped = old.removeprefix(_WRAPPED_NAME + ".")
        graph.initializers[old].name = names.get(stripped, stripped)
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
    holder.training = False  # not `eval()`: layers that draw random numbers are in training mode
    return holder


def _separate_names(graph: Any) -> None:
    """Rename values whose name a tensor or an earlier value has, too, as the exporter does for a buffer `index`."""
    used_names = set(graph.initializers)
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
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
    arguments = [*inspect.signature(module.forward).parameters]
    dtype_names = getattr(module, "input_dtype", {})
    sizes = sizes if isinstance(sizes, Mapping) else {next(iter(arguments), "x"): tuple(sizes)}
    dtype_names = dtype_names if isinstance(dtype_names, Mapping) else dict.fromkeys(sizes, dtype_names)
    if len(sizes) == 1 and (token_ids or example is not None):
        dtype_names = {**dtype_names, **dict.fromkeys(sizes, torch.int64 if token_ids else example.dtype)}
    shapes = {argument: read_shape(shape, f"{name}: input_shape") for argument, shape in sizes.items()}
    usual_dtypes: dict[str, Any] = {}
    varying_input = free_input(shapes)
    if varying_input is not None:
        max_length = upper_shape(shapes[varying_input.name])[varying_input.axis]
        computed: dict[str, Shape] = {MASK: (max_length,), LENGTHS: ()}
        shapes |= {n: shape for n, shape in computed.items() if n in arguments or n in shapes}
        usual_dtypes[LENGTHS] = torch.int64
        shapes = dict(sorted(shapes.items(), key=lambda item: (*arguments, item[0]).index(item[0])))
    device = next((p.device for p in module.parameters()), "cpu")
    # Two samples each, because torch.export takes an axis of size 1 for one that never varies.
    samples = (
        torch.zeros(
            (2, *upper_shape(shape)),
            device=device,
            dtype=_torch_dtype(dtype_names.get(n, usual_dtypes.get(n, torch.float32)), name),
        )
        for n, shape in shapes.items()
    )
    return tuple(samples), varying_input


def _torch_dtype(dtype: Any, name: str) -> Any:
    """A dtype of torch, given as an object or by its name. Raises `ModelError` if no input may have it."""
    text = str(dtype).rpartition(".")[2]
    if text not in _INPUT_DTYPES:
        raise ModelError(f"{name}: type of the input", expected=" or ".join(_INPUT_DTYPES), got=dtype)
    return getattr(torch_package(), text)


def _first_names(module: Any) -> dict[str, str]:
    """The first name of every parameter and buffer, by each of its names: a tied parameter has several."""
    by_id: dict[int, str] = {}
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: by_id.setdefault(id(tensor), name) for name, tensor in tensors}


def _tensor_facts(torch: Any, module: Any, exported: set[str]) -> dict[str, str]:
    """Metadata on the tensors of an export: which are parameters, and which of these are unused, frozen and tied."""
    parameters = dict(module.named_parameters())
    # Running statistics are buffers for PyTorch; here they are cut and averaged with the parameters.
    statistics = _statistics(module, torch.nn.modules.batchnorm._NormBase, exported)
    aliases: dict[str, list[str]] = {}
    for alias, first in _first_names(module).items():
        if alias != first:
            aliases.setdefault(first, []).append(alias)
    facts = {
        metadata.UNUSED_KEY: [n for n in parameters if n not in exported],
        metadata.FROZEN_KEY: [n for n, p in parameters.items() if n in exported and not p.requires_grad],
        metadata.TIED_KEY: aliases,
        INSTANCE_NORMS_KEY: _statistics(module, torch.nn.modules.instancenorm._InstanceNorm, exported)[::2],
    }
    texts = {metadata.PARAMETERS_KEY: json.dumps([*(n for n in parameters if n in exported), *statistics])}
    return texts | {key: json.dumps(fact) for key, fact in facts.items() if fact}


def _statistics(module: Any, kind: Any, exported: set[str]) -> list[str]:
    """The exported running statistics of norms of a kind: mean and variance of each."""
    return [
        name
        for prefix, submodule in module.named_modules()
        if isinstance(submodule, kind)
        for field in ("running_mean", "running_var")
        if (name := f"{prefix}.{field}" if prefix else field) in exported
    ]
