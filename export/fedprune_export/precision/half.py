"""float16: half the bytes, and what tensor cores compute with. Inputs and outputs stay float32.

Which type an operator computes in is written into the graph (it is strongly typed), so that every runtime computes the
same. Operators that add many numbers up or take exponentials stay in float32, and so do all that aren't known to be
safe.

A `LoweredPair` is the graph that a board runs, and the `prepare` graph that makes its tensors from float32 weights.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from fedprune_export.ir.graph import Node
from fedprune_export.precision.lowered_pair import LoweredPair, node_text

# Operators that compute in float16.
_FLOAT16_OPERATORS = frozenset(
    {
        *("Conv", "ConvTranspose", "Gemm", "MatMul", "MaxPool", "AveragePool"),
        *("Add", "Sub", "Mul", "Max", "Min", "Clip", "Abs", "Neg"),
        *("Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "HardSigmoid", "HardSwish", "Sigmoid", "Tanh"),
        *("Concat", "Split", "Slice", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity"),
        *("Expand", "Gather", "Pad", "Tile", "Where", "DepthToSpace", "SpaceToDepth"),
    }
)

_MAX_FLOAT16 = float(np.finfo(np.float16).max)


def convert_to_float16(pair: LoweredPair) -> list[str]:
    """Let a graph compute in float16. Returns the nodes that stay in float32."""
    writer = _Float16Writer(pair)
    nodes, pair.graph.nodes = pair.graph.nodes, []
    return [node_text(n) for n in nodes if not writer.add_node(n)]


class _Float16Writer:
    """Writes the nodes of a graph again, one after the other, with the casts that they need."""

    def __init__(self, pair: LoweredPair) -> None:
        self._pair, self._graph = pair, pair.graph
        self._output_names = pair.output_names()
        self._half_names: dict[str, str] = {}
        self._cast_back: set[str] = set()
        self._computed_in_half: set[str] = set()

    def add_node(self, node: Node) -> bool:
        """Append a node with the casts that it needs; returns False if it computes floats in float32."""
        floats = [self._pair.is_float(o) for o in node.outputs if o]
        reads = [i for i in node.inputs if i and self._is_float(i)]
        if node.op not in _FLOAT16_OPERATORS or node.domain or not reads or not floats or not all(floats):
            node.inputs = [self._as_float32(i) if i in reads else i for i in node.inputs]
            self._graph.nodes.append(node)
            return not reads or not any(floats)
        node.inputs = [self._as_float16(i) if i in reads else i for i in node.inputs]
        names = [o for o in node.outputs if o]
        node.outputs = [f"{o}~float16" if o else o for o in node.outputs]
        self._half_names |= {n: f"{n}~float16" for n in names}
        self._computed_in_half.update(names)
        self._graph.nodes.append(node)
        # The model's outputs stay float32: their readers need not know the precision.
        for name in self._output_names.intersection(names):
            self._as_float32(name)
        return True

    def _is_float(self, name: str) -> bool:
        constant = self._graph.initializers.get(name)
        if constant is not None:
            return bool(constant.dtype == np.float32)
        return self._pair.is_tensor(name) or self._pair.is_float(name)

    def _as_float16(self, name: str) -> str:
        """A value in float16."""
        if name in self._half_names:
            return self._half_names[name]
        half_name = self._half_names[name] = f"{name}~float16"
        if name in self._graph.initializers:
            value = np.clip(self._graph.initializers[name], -_MAX_FLOAT16, _MAX_FLOAT16)
            self._graph.initializers[half_name] = value.astype(np.float16)
        elif self._pair.is_tensor(name):
            prepare = self._pair.prepare
            # Numbers that are too large become the largest, not infinite. The trial of the finished model shows whether
            # that harms.
            prepared_name = self._pair.prepared_value(name)
            bounded = prepare.emit("Clip", prepared_name, prepare.scalar(-_MAX_FLOAT16), prepare.scalar(_MAX_FLOAT16))
            half = prepare.emit("Cast", bounded, attrs={"to": TensorProto.FLOAT16})
            self._pair.define_tensor(half_name, half, np.float16)
        else:
            self._graph.emit("Cast", name, attrs={"to": TensorProto.FLOAT16}, out=half_name)
        return half_name

    def _as_float32(self, name: str) -> str:
        """A value in float32, under its own name."""
        if name in self._computed_in_half and name not in self._cast_back:
            self._cast_back.add(name)
            self._graph.emit("Cast", self._half_names[name], attrs={"to": TensorProto.FLOAT}, out=name)
            self._graph.nodes[-1].name = f"{name}~float32"  # the node that made the value may be called like it
        return name
