"""A file of float16, bfloat16 or float64 in float32, and how far onnxruntime's runs of the two may differ."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from fedprune.core.errors import ModelError, error_reason
from fedprune_export.importing.graph_writer import value_types
from fedprune_export.importing.model_file import parse_model
from fedprune_export.importing.original import random_feeds, relative_distance
from fedprune_export.importing.raw_file import raw_session
from fedprune_export.ir.graph import Array, Graph, read_tensor
from fedprune_export.ir.operators import REARRANGEMENTS
from fedprune_export.ir.sample_inputs import vocabulary_size

# Rounding errors of n operators in a row add up as a random walk does, to about √n roundings (Higham and Mary, "A new
# approach to probabilistic rounding error analysis", SIAM J. Sci. Comput. 41(5), 2019). The factor is for operators
# that enlarge an error, such as a softmax of large scores.
_ERROR_FACTOR = 8

_SEEDS = (1, 2)  # batches of random samples, by the seeds that draw them

# What computes nothing rounds nothing.
_EXACT_OPERATORS = REARRANGEMENTS | {"Cast", "CastLike", "Concat", "Constant", "Gather", "Relu", "Shape", "Slice"}
_TYPE_NAMES: dict[int, str] = {
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.DOUBLE: "float64",
}


_MAX_FLOAT32 = np.finfo(np.float32).max


# Significant bits of the types that are computed in float32 instead, the leading one included.
SIGNIFICANT_BITS: dict[int, int] = {TensorProto.FLOAT16: 11, TensorProto.BFLOAT16: 8, TensorProto.DOUBLE: 53}

# Attributes that name a type.
TYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_dtype", "output_datatype", "stash_type", "softmax_precision"})


@dataclass(frozen=True)
class SinglePrecision:
    """A file in float32.

    Attributes:
        raw: The file in float32.
        own: The file in its own types.
        types: The types, as numbers of `onnx.TensorProto`, that are computed in float32.
        depth: The most operators in a row that round.
    """

    raw: bytes
    own: bytes
    types: tuple[int, ...]
    depth: int

    @property
    def tolerance(self) -> float:
        """How far outputs in float32 and in the file's own types may differ, relative to the largest number."""
        bits = min(24, *(SIGNIFICANT_BITS[kind] for kind in self.types))
        return max(_ERROR_FACTOR * math.sqrt(self.depth) * 2.0**-bits, 1e-6)

    def compare(self, ended: bytes, graph: Graph) -> str:
        """Compare onnxruntime's runs of the file in its own types and in float32. Returns the note for the user.

        Raises `ModelError` if they differ by more than rounding explains.

        Args:
            ended: The file in float32 as it was imported: perhaps without what is behind its training end.
            graph: The imported graph, whose embeddings say which identifiers are valid.
        """
        names = " and ".join(_TYPE_NAMES[kind] for kind in self.types)
        note = f"The file computes in {names}, the model in float32"
        proto = parse_model(ended, run_checker=False)
        outputs = [o.name for o in proto.graph.output]
        try:
            # Optimised, onnxruntime would compute part of it in float32, and it crashes on some files of float16.
            own = raw_session(_ended_like(self.own, proto), outputs, exact=True)
        except ModelError as error:
            reason = error_reason(error.__cause__ or error).rpartition(" : ")[2]
            return (
                f"{note}. onnxruntime doesn't run the file as it is here, so its float32 was compared alone: {reason}"
            )
        single, below = raw_session(ended, outputs), vocabulary_size(graph)
        for seed in _SEEDS:
            numbers = random_feeds(proto.graph, seed=seed, below=below)
            # Rounded in the file's own types first, which float32 then takes as they are.
            feeds = {n: _as_type(v, own.inputs[n][0]) for n, v in numbers.items() if n in own.inputs}
            expected = own.run(feeds, outputs)
            found = single.run({n: _as_type(v, single.inputs[n][0]) for n, v in feeds.items()}, outputs)
            for name in outputs:
                old, new = expected[name].astype(np.float64), found[name]
                if not np.isfinite(old).all() and np.isfinite(new).all():
                    return f"{note}: in its own type its output isn't finite for random inputs."
                worst = relative_distance(new, old)
                if not worst <= self.tolerance:
                    raise ModelError(
                        f"the file computes in {names}, and its output differs in float32",
                        expected=f"agreement to {self.tolerance:.2g}, which {self.depth} roundings in a row explain",
                        got=f"{worst:.2g}",
                        hint="Export the model in float32.",
                    )
        return (
            f"{note}. Outputs of the two agree to {self.tolerance:.1g}, which {self.depth} roundings in a row explain."
        )


def as_single_precision(raw: bytes, inlined: onnx.ModelProto) -> SinglePrecision | None:
    """A file in float32; None if it computes in float32 already, or in whole numbers.

    `inlined` is the file's model without functions, loops and branches. Raises `ModelError` if a tensor is damaged.
    """
    types = computed_types(inlined)
    if not types:
        return None
    model = parse_model(raw, run_checker=False)
    convert_to_float32(model)
    single: bytes = model.SerializeToString(deterministic=True)
    return SinglePrecision(single, raw, tuple(sorted(types)), _depth(inlined.graph.node))


def _depth(nodes: Iterable[onnx.NodeProto]) -> int:
    """The most rounding operators in a row."""
    depths: dict[str, int] = {}
    for node in nodes:
        own = 0 if node.op_type in _EXACT_OPERATORS else 1
        depth = own + max((depths.get(i, 0) for i in node.input), default=0)
        depths.update(dict.fromkeys(node.output, depth))
    return max(1, *depths.values())


def _ended_like(own: bytes, ended: onnx.ModelProto) -> bytes:
    """A file that ends as another does: with its outputs, which may be inner values, of whatever type they have in it,
    and with the transpositions that were put before them."""
    model = parse_model(own, run_checker=False)
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


_NUMPY_NAMES = {"float": "float32", "double": "float64"}


def _as_type(value: Array, type_name: str) -> Array:
    """An array in onnxruntime's type of an input, such as "tensor(float16)"."""
    name = type_name.removeprefix("tensor(").removesuffix(")")
    return value.astype(_NUMPY_NAMES.get(name, name))


def convert_to_float32(model: onnx.ModelProto) -> None:
    """Write every float of a model as float32, also in functions and sub-graphs. Whole numbers keep their types.

    Numbers beyond float32, such as the lowest float64 in a mask, become its largest. Raises `ModelError` if a tensor is
    damaged.
    """
    _convert_graph(model.graph)
    for function in model.functions:
        _convert_nodes(function.node)
        _convert_attributes(function.attribute_proto)
        del function.value_info[:]


def _convert_graph(graph: onnx.GraphProto) -> None:
    # Types of inner values are inferred again.
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        _convert_type(value.type)
    for tensor in (*graph.initializer, *(sparse.values for sparse in graph.sparse_initializer)):
        _convert_tensor(tensor)
    _convert_nodes(graph.node)


def _convert_type(declared: onnx.TypeProto) -> None:
    kind = declared.WhichOneof("value")
    if kind == "tensor_type" and declared.tensor_type.elem_type in SIGNIFICANT_BITS:
        declared.tensor_type.elem_type = TensorProto.FLOAT
    elif kind in ("sequence_type", "optional_type"):
        _convert_type(getattr(declared, kind).elem_type)


def _convert_nodes(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        _convert_attributes(node.attribute)


def _convert_attributes(attributes: Iterable[onnx.AttributeProto]) -> None:
    for attribute in attributes:
        if attribute.name in TYPE_ATTRIBUTES and attribute.i in SIGNIFICANT_BITS:
            attribute.i = TensorProto.FLOAT
        if attribute.HasField("t"):
            _convert_tensor(attribute.t)
        if attribute.HasField("sparse_tensor"):
            _convert_tensor(attribute.sparse_tensor.values)
        for tensor in attribute.tensors:
            _convert_tensor(tensor)
        for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            _convert_graph(graph)


def _convert_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type not in SIGNIFICANT_BITS:
        return
    value = read_tensor(tensor)
    if tensor.data_type == TensorProto.DOUBLE:
        value = np.where(np.isfinite(value), np.clip(value, -_MAX_FLOAT32, _MAX_FLOAT32), value)
    tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float32), tensor.name))


def computed_types(proto: onnx.ModelProto) -> set[int]:
    """The types of `SIGNIFICANT_BITS` that a model without functions computes in.

    A value that depends on neither inputs nor weights doesn't count: it is folded in the type that the file gives it.
    Neither does a weight of 16 bits that is only rearranged before it is cast (`stored_weights`).
    """
    graph = proto.graph
    stored = [(tensor.name, tensor) for tensor in graph.initializer]
    constants = [node for node in graph.node if node.op_type == "Constant"]
    stored += [(node.output[0], a.t) for node in constants for a in node.attribute if a.name == "value"]
    declared = {v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}
    declared.update(tensor.data_type for _, tensor in stored)
    declared.update(a.i for n in graph.node for a in n.attribute if a.name in TYPE_ATTRIBUTES)
    if not declared & SIGNIFICANT_BITS.keys():
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
    return {types[name] for name in values if types.get(name) in SIGNIFICANT_BITS}
