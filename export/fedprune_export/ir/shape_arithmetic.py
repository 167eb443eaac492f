"""Shape arithmetic: values that a graph computes from sizes alone, and which of their elements depend on certain axes.

Sizes may depend on the batch, which varies between runs, or on channels, which vary between submodels. A number that
depends on neither is a constant. That follows from how it is computed, since numbers may be equal in a few runs by
chance.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.operators import ELEMENTWISE, SIZE_OPERATORS
from fedprune_export.ir.trace import Trace

Marks = npt.NDArray[np.bool_]  # per element of a value, whether it follows one of the axes in question

_LOGIC = {"Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "Not", "And", "Or"}
_POSITIONWISE = ELEMENTWISE | _LOGIC | {"Where", "Mod"}
_RESHAPING = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten"})


def size_marks(
    graph: Graph, trace: Trace, constants: Container[str], marked_axes: Callable[[str], Sequence[bool]]
) -> dict[str, Marks]:
    """Mark the elements that depend on certain axes, for all values computed from shapes and constants alone.

    `marked_axes`: returns for each axis of a value whether it is one of these. Outputs of operators that are unusual in
    shape arithmetic have all elements marked, or none.
    """
    out: dict[str, Marks] = {}
    for node in graph.nodes:
        if node.domain:
            continue
        if node.op in SIZE_OPERATORS:
            row = np.array(marked_axes(node.inputs[0]), np.bool_)
            if node.op == "Shape":
                out[node.outputs[0]] = row[int(node.attrs.get("start", 0)) : node.attrs.get("end")]
            else:
                out[node.outputs[0]] = np.array(row.any())
            continue
        reads = [i for i in node.inputs if i]
        if node.op == "ConstantOfShape" or (node.op == "Expand" and node.inputs[0] not in out):
            continue  # sizes give its length, not its content
        if any(i in out for i in reads) and all(i in out or i in constants for i in reads):
            for name in node.outputs:
                if name:
                    out[name] = _output_marks(graph, trace, node, name, out)
    return out


def size_origins(graph: Graph, values: Iterable[str]) -> list[Node]:
    """The Shape and Size nodes from which values are computed, in the graph's order."""
    needed = set(values)
    sources = []
    for node in reversed(graph.nodes):
        if needed.intersection(node.outputs):
            if node.op in SIZE_OPERATORS and not node.domain:
                sources.append(node)
            else:
                needed.update(node.inputs)
    return sources[::-1]


def _output_marks(graph: Graph, trace: Trace, node: Node, output: str, marks_by_name: dict[str, Marks]) -> Marks:
    """Marks of a node's output."""
    marks = [marks_by_name.get(i, np.zeros(trace.shapes[i], np.bool_)) for i in node.inputs if i]
    shape = trace.shapes[output]
    passed: Marks | None = None
    first = marks[0]
    if node.op == "Gather" and first.ndim == 1 and node.inputs[1] in graph.initializers:
        passed = np.asarray(first[graph.initializers[node.inputs[1]]])
    elif node.op == "Slice" and first.ndim == 1:
        bounds = [graph.initializers.get(i) for i in node.inputs[1:3]]
        if len(node.inputs) < 5 and all(b is not None and b.size == 1 for b in bounds):
            passed = first[slice(*(int(b.item()) for b in bounds if b is not None))]
    elif node.op == "Concat":
        passed = np.concatenate(marks, axis=int(node.attrs["axis"]))
    # A target that follows the marked axes moves elements in a way that differs from run to run.
    elif node.op in _RESHAPING and not any(m.any() for m in marks[1:]):
        passed = first
    elif node.op in _POSITIONWISE and not any(trace.batched(output)):
        passed = np.logical_or.reduce([np.broadcast_to(m, shape) for m in marks])
    # Any other operator, or one whose marks don't fit its output: all elements may depend on each of its inputs.
    if passed is None or passed.size != int(np.prod(shape, dtype=np.int64)):
        return np.full(shape, any(m.any() for m in marks))
    return passed.reshape(shape)
