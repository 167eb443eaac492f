"""Exports torch modules as ONNX files with all their weights.

The exporter's optimisations are off, because they fuse batch norms into convolutions and merge equal weights of
different layers. The import simplifies graphs without changing weights.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import onnx

from fedprune.core.errors import ModelError, error_reason, shape_text
from fedprune_export.importing import metadata
from fedprune_export.importing.garbage_collection import pause_collection
from fedprune_export.importing.lengths import FREE_INPUT_KEY
from fedprune_export.importing.quiet_libraries import silence_libraries
from fedprune_export.importing.torch_bags import export_embedding_bags
from fedprune_export.importing.torch_dropout import export_dropouts, extract_masks
from fedprune_export.importing.torch_inputs import sample_inputs
from fedprune_export.importing.torch_loading import torch_package
from fedprune_export.importing.torch_tensors import record_tensors
from fedprune_export.importing.torch_training_mode import record_training_mode
from fedprune_export.importing.torch_translations import TorchTranslations


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
