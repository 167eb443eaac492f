"""The values that are live in memory while onnxruntime runs a graph node by node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

from fedprune_export.ir.drafts import Node
from fedprune_export.ir.graph import Graph
from fedprune_export.ir.operators import VIEWS

_IN_PLACE = frozenset(
    {
        *("Abs", "Add", "Cast", "Ceil", "Clip", "Div", "Elu", "Erf", "Exp", "Floor", "HardSigmoid", "HardSwish"),
        *("LeakyRelu", "Log", "Mul", "Neg", "Not", "Pow", "Reciprocal", "Relu", "Sigmoid", "Softplus", "Softsign"),
        *("Sqrt", "Sub", "Sum", "Tanh"),
    }
)
"""Operators that run in place: they overwrite an input of the output's size if nothing reads it later."""


def reads(node: Node) -> list[str]:
    """Names of the values that a node reads, including outer values that the body of a loop reads."""
    return [i for i in node.inputs if i] + sorted(node.read_inside())


def execution_order(graph: Graph) -> list[Node]:
    """The nodes in the order in which onnxruntime runs them by default.

    A depth-first search backwards from the nodes whose outputs nothing reads: the last node first and, of the producers
    of a node's inputs, the one of the highest index first (`Graph::ReverseDFSFrom` with `NodeCompare` in onnxruntime's
    core/graph/graph.cc). So nothing is computed long before it is needed, whatever the order in the file.
    """
    index = {id(n): i for i, n in enumerate(graph.nodes)}
    makers = graph.producers()
    before = [sorted({index[id(makers[i])] for i in reads(n) if i in makers}) for n in graph.nodes]
    read = {i for sources in before for i in sources}
    stack = [(i, False) for i in range(len(graph.nodes)) if i not in read]
    visited = [False] * len(graph.nodes)
    out: list[Node] = []
    while stack:
        i, leave = stack.pop()
        if leave:
            out.append(graph.nodes[i])
        elif not visited[i]:
            visited[i] = True
            stack.append((i, True))
            stack += [(j, False) for j in before[i]]
    return out


def last_reads(nodes: Sequence[Node], kept: Sequence[str]) -> dict[str, int]:
    """The index of each value's last read in an order of nodes; kept values are read at its end."""
    last = {name: at for at, node in enumerate(nodes) for name in reads(node)}
    return last | dict.fromkeys(kept, len(nodes))


def live_bytes(nodes: Sequence[Node], sizes: Mapping[str, int], kept: Sequence[str]) -> list[int]:
    """Bytes of the values that are live while each node runs, without inputs and constants of the graph.

    An output that is a view of an input, or is computed in place, shares the buffer of that input.

    Args:
        sizes: Bytes by value; a missing value counts 0.
        kept: Outputs of the graph, which are live to the end.
    """
    last, outputs = last_reads(nodes, kept), set(kept)
    buffers: dict[str, int] = {}  # by value, the index of its buffer in the three lists
    starts: list[int] = []  # first node
    ends: list[int] = []  # last node
    capacities: list[int] = []  # bytes
    for at, node in enumerate(nodes):
        for k, name in enumerate(node.outputs):
            if not name:
                continue
            end = last.get(name, at)
            buffer = None if k or name in outputs else _shared(node, at, name, sizes, buffers, ends)
            if buffer is None:
                if not k and node.op in VIEWS and name not in outputs and node.inputs[0] not in buffers:
                    continue  # a view of an input or a constant of the graph
                buffer = len(starts)
                starts.append(at)
                ends.append(end)
                capacities.append(sizes.get(name, 0))
            buffers[name] = buffer
            ends[buffer] = max(ends[buffer], end)
    change = [0] * (len(nodes) + 2)
    for start, end, size in zip(starts, ends, capacities, strict=True):
        change[start] += size
        change[end + 1] -= size
    return list(accumulate(change[: len(nodes)]))


def _shared(
    node: Node, at: int, name: str, sizes: Mapping[str, int], buffers: Mapping[str, int], ends: Sequence[int]
) -> int | None:
    """The buffer of the input that an output shares or overwrites, if there is one."""
    if node.op in VIEWS:
        return buffers.get(node.inputs[0])
    candidates = node.inputs[:2] if node.op in _IN_PLACE else ()
    for value in candidates:
        buffer = buffers.get(value)
        if buffer is not None and ends[buffer] <= at and sizes.get(value) == sizes.get(name):
            return buffer
    return None


def gate(graph: Graph, value: str) -> str:
    """A number [1] of int64 that is there as soon as a value is, and that no optimiser knows."""
    flat = graph.emit("Reshape", value, graph.ints(-1))
    return graph.emit("Cast", graph.emit("Gather", flat, graph.ints(0)), attrs={"to": 7})
