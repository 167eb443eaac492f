"""A file of float16, bfloat16 or float64 in float32, and how far onnxruntime's runs of the two may differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fedprune.core.errors import ModelError, error_reason
from fedprune_export.importing.model_file import parse_model
from fedprune_export.importing.raw_file import bypass_nodes, raw_session
from fedprune_export.importing.value_inference import value_types
from fedprune_export.ir.graph import Array, Graph, read_dims, read_tensor
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

    def compare(self, reference: bytes, outputs: list[str], removed: Mapping[str, str], graph: Graph) -> str:
        """Compare onnxruntime's runs of the file in its own types and in float32. Returns the note for the user.

        Raises `ModelError` if they differ by more than rounding explains.

        Args:
            reference: The file in float32 that the import was compared with.
            outputs: The values at which it was compared.
            removed: What it was left without, as in `TrainingEnd`.
            graph: The imported graph, whose embeddings say which identifiers are valid.
        """
        names = " and ".join(helper.tensor_dtype_to_np_dtype(kind).name for kind in self.types)
        tolerance = max(_TOLERANCES[kind] for kind in self.types)
        note = f"The file computes in {names}, the model in float32"
        proto, own_proto = (parse_model(file, run_checker=False) for file in (reference, self.own))
        types = {i.name: helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type) for i in own_proto.graph.input}
        try:
            # Optimised, onnxruntime would compute part of it in float32, and it crashes on some files of float16.
            own = raw_session(bypass_nodes(own_proto, removed), outputs, exact=True)
        except ModelError as error:
            reason = error_reason(error.__cause__ or error).rpartition(" : ")[2]
            return (
                f"{note}. onnxruntime doesn't run the file as it is here, so its float32 was compared alone: {reason}"
            )
        numbers = _random_feeds(proto.graph, below=vocabulary_size(graph))
        # Rounded in the file's own types first, which float32 then takes as they are.
        feeds = {name: value.astype(types[name]) for name, value in numbers.items() if name in own.inputs}
        expected = own.run(feeds, outputs)
        single = raw_session(reference, outputs).run({n: v.astype(numbers[n].dtype) for n, v in feeds.items()}, outputs)
        finite = [n for n in outputs if np.isfinite(expected[n]).all() or not np.isfinite(single[n]).all()]
        for name in finite:
            worst = relative_distance(expected[name], single[name])
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


def as_single_precision(raw: bytes, graph: Graph) -> SinglePrecision | None:
    """A file in float32; None if it computes in float32 already, or in whole numbers.

    `graph` is what was read from it. Raises `ModelError` if a tensor is damaged.
    """
    types = _computed_types(graph)
    if not types:
        return None
    model = parse_model(raw, run_checker=False)
    _convert(model)
    single: bytes = model.SerializeToString(deterministic=True)
    return SinglePrecision(single, raw, tuple(sorted(types)))


def _random_feeds(graph: onnx.GraphProto, below: int) -> dict[str, Array]:
    """Normal numbers, and whole ones from 0 to below a number, for the inputs of a file; a free size is the batch's."""
    tensors, generator, feeds = {t.name for t in graph.initializer}, np.random.default_rng(1), dict[str, Array]()
    for value in [v for v in graph.input if v.name not in tensors]:
        shape = [d if isinstance(d, int) else 2 for d in read_dims(value)]
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
        numbers: Array = generator.standard_normal(shape) if dtype.kind == "f" else generator.integers(0, below, shape)
        feeds[value.name] = numbers.astype(dtype)
    return feeds


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


def _computed_types(graph: Graph) -> set[int]:
    """The types of `_TOLERANCES` that a file computes in.

    A value that depends on neither inputs nor weights doesn't count: it is folded in the type that the file gives it.
    Neither does a weight of 16 bits that is only rearranged before it is cast (`stored_weights`).
    """
    dtypes = [*(p.dtype for p in (*graph.inputs, *graph.outputs)), *(v.dtype for v in graph.initializers.values())]
    declared = {helper.np_dtype_to_tensor_dtype(dtype) for dtype in dtypes}
    declared.update(n.attrs[name] for n in graph.nodes for name in _TYPE_ATTRIBUTES & n.attrs.keys())
    if not declared & _TOLERANCES.keys():
        return set()
    halves = [helper.tensor_dtype_to_np_dtype(kind) for kind in (TensorProto.FLOAT16, TensorProto.BFLOAT16)]
    from_weights = {name for name, value in graph.initializers.items() if value.dtype in halves and value.size > 1}
    values = {p.name for p in graph.inputs}
    for node in graph.nodes:
        if values.intersection(node.inputs):
            values.update(node.outputs)
        elif from_weights.intersection(node.inputs):
            from_weights.update(node.outputs)
            # Arithmetic on weights is trained through, so it has to be in float32.
            if node.op not in REARRANGEMENTS:
                values.update(node.outputs)
    types = value_types(graph)
    return {types[name] for name in values if types.get(name) in _TOLERANCES}
