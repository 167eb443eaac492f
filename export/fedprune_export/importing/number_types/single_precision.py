"""A file of float16, bfloat16 or float64 in float32, and how far onnxruntime's runs of the two may differ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fedprune.core.errors import ModelError, error_reason
from fedprune_export.importing.graph_writer import value_types
from fedprune_export.importing.model_file import parse_model
from fedprune_export.importing.original import random_feeds
from fedprune_export.importing.raw_file import raw_session
from fedprune_export.ir.graph import Graph, read_tensor
from fedprune_export.ir.operators import REARRANGEMENTS
from fedprune_export.ir.rounding import relative_distance
from fedprune_export.ir.sample_inputs import vocabulary_size

# How far outputs in a type and in float32 may differ, relative to the largest number. Errors of some 100 roundings in a
# row add up to about 100 units in the last place, where some operators enlarge them.
_TOLERANCES: dict[int, float] = {TensorProto.FLOAT16: 0.05, TensorProto.BFLOAT16: 0.3, TensorProto.DOUBLE: 1e-4}
_MAX_FLOAT32 = np.finfo(np.float32).max

# Attributes that name a type.
_TYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_dtype", "output_datatype", "stash_type", "softmax_precision"})


@dataclass(frozen=True)
class SinglePrecision:
    """A file in float32.

    Attributes:
        raw: The file in float32.
        own: The file in its own types.
        types: The types, as numbers of `onnx.TensorProto`, that are computed in float32.
    """

    raw: bytes
    own: bytes
    types: tuple[int, ...]

    def compare(self, ended: bytes, graph: Graph) -> str:
        """Compare onnxruntime's runs of the file in its own types and in float32. Returns the note for the user.

        Raises `ModelError` if they differ by more than rounding explains.

        Args:
            ended: The file in float32 as it was imported: perhaps without what is behind its training end.
            graph: The imported graph, whose embeddings say which identifiers are valid.
        """
        names = " and ".join(helper.tensor_dtype_to_np_dtype(kind).name for kind in self.types)
        tolerance = max(_TOLERANCES[kind] for kind in self.types)
        note = f"The file computes in {names}, the model in float32"
        proto, own_proto = (parse_model(file, run_checker=False) for file in (ended, self.own))
        types = {i.name: helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type) for i in own_proto.graph.input}
        outputs = [o.name for o in proto.graph.output]
        try:
            # Optimised, onnxruntime would compute part of it in float32, and it crashes on some files of float16.
            own = raw_session(_ended_like(own_proto, proto), outputs, exact=True)
        except ModelError as error:
            reason = error_reason(error.__cause__ or error).rpartition(" : ")[2]
            return (
                f"{note}. onnxruntime doesn't run the file as it is here, so its float32 was compared alone: {reason}"
            )
        numbers = random_feeds(proto.graph, seed=1, below=vocabulary_size(graph))
        # Rounded in the file's own types first, which float32 then takes as they are.
        feeds = {name: value.astype(types[name]) for name, value in numbers.items() if name in own.inputs}
        expected = own.run(feeds, outputs)
        found = raw_session(ended, outputs).run({n: v.astype(numbers[n].dtype) for n, v in feeds.items()}, outputs)
        finite = [n for n in outputs if np.isfinite(expected[n]).all() or not np.isfinite(found[n]).all()]
        for name in finite:
            worst = relative_distance(expected[name], found[name])
            if not worst <= tolerance:
                raise ModelError(
                    f"the file computes in {names}, and its output differs in float32",
                    expected=f"agreement to {tolerance:g}, which the type's roundings explain",
                    got=f"{worst:.2g}",
                    hint="Export the model in float32.",
                )
        if len(finite) < len(outputs):
            return f"{note}: in its own type its output isn't finite for random inputs."
        return f"{note}. Outputs of the two agree to {tolerance:g}, which the type's roundings explain."


def as_single_precision(raw: bytes, inlined: onnx.ModelProto) -> SinglePrecision | None:
    """A file in float32; None if it computes in float32 already, or in whole numbers.

    `inlined` is the file's model without functions, loops and branches. Raises `ModelError` if a tensor is damaged.
    """
    types = _computed_types(inlined)
    if not types:
        return None
    model = parse_model(raw, run_checker=False)
    _convert(model)
    single: bytes = model.SerializeToString(deterministic=True)
    return SinglePrecision(single, raw, tuple(sorted(types)))


def _ended_like(model: onnx.ModelProto, ended: onnx.ModelProto) -> bytes:
    """A file that ends as another does: with its outputs, which may be inner values, of whatever type they have in it,
    and with the transpositions that were put before them."""
    declared, inputs = {o.name for o in model.graph.output}, {n.output[0]: list(n.input) for n in model.graph.node}
    changed = [n for n in ended.graph.node if list(n.input) != inputs.get(n.output[0])]
    changed_values = {name for node in changed for name in node.output}
    nodes = [n for n in model.graph.node if changed_values.isdisjoint(n.output)]
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *changed])
    names = [o.name for o in ended.graph.output]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in declared)
    out: bytes = model.SerializeToString(deterministic=True)
    return out


def _convert(message: Any) -> None:
    """Write every float in a part of a model as float32, also in functions and sub-graphs. Whole numbers keep their
    types. Raises `ModelError` if a tensor is damaged."""
    if isinstance(message, TensorProto) and message.data_type in _TOLERANCES:
        value = read_tensor(message).astype(np.float64)
        # Numbers beyond float32, such as the lowest float64 in a mask, become its largest.
        value = np.where(np.isfinite(value), np.clip(value, -_MAX_FLOAT32, _MAX_FLOAT32), value)
        message.CopyFrom(numpy_helper.from_array(value.astype(np.float32), message.name))
    elif isinstance(message, onnx.TypeProto.Tensor) and message.elem_type in _TOLERANCES:
        message.elem_type = TensorProto.FLOAT
    elif isinstance(message, onnx.AttributeProto) and message.name in _TYPE_ATTRIBUTES and message.i in _TOLERANCES:
        message.i = TensorProto.FLOAT
    else:
        for kind, value in message.ListFields():
            if kind.message_type is not None:
                for part in [value] if hasattr(value, "ListFields") else value:
                    _convert(part)


def _computed_types(proto: onnx.ModelProto) -> set[int]:
    """The types of `_TOLERANCES` that a model without functions computes in.

    A value that depends on neither inputs nor weights doesn't count: it is folded in the type that the file gives it.
    Neither does a weight of 16 bits that is only rearranged before it is cast (`stored_weights`).
    """
    graph = proto.graph
    stored = [(tensor.name, tensor) for tensor in graph.initializer]
    constants = [node for node in graph.node if node.op_type == "Constant"]
    stored += [(node.output[0], a.t) for node in constants for a in node.attribute if a.name == "value"]
    declared = {v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}
    declared.update(tensor.data_type for _, tensor in stored)
    declared.update(a.i for n in graph.node for a in n.attribute if a.name in _TYPE_ATTRIBUTES)
    if not declared & _TOLERANCES.keys():
        return set()
    halves = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    from_weights = {name for name, tensor in stored if tensor.data_type in halves and math.prod(tensor.dims) > 1}
    initializer_names = {tensor.name for tensor in graph.initializer}
    values = {v.name for v in graph.input if v.name not in initializer_names}
    for node in graph.node:
        if values.intersection(node.input):
            values.update(node.output)
        elif from_weights.intersection(node.input):
            from_weights.update(node.output)
            # Arithmetic on weights is trained through, so it has to be in float32.
            if node.op_type not in REARRANGEMENTS:
                values.update(node.output)
    types = value_types(proto)
    return {types[name] for name in values if types.get(name) in _TOLERANCES}
