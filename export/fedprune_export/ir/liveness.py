"""What lives in memory while onnxruntime runs a graph node by node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

from fedprune_export.ir.drafts import Node
from fedprune_export.ir.graph import Graph

SAME = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
"""Operators whose output is their first input, seen otherwise: nothing is copied."""

_IN_PLACE = frozenset(
    {
        *("Abs", "Add", "Cast", "Ceil", "Clip", "Div", "Elu", "Erf", "Exp", "Floor", "HardSigmoid", "HardSwish"),
        *("LeakyRelu", "Log", "Mul", "Neg", "Not", "Pow", "Reciprocal", "Relu", "Sigmoid", "Softplus", "Softsign"),
        *("Sqrt", "Sub", "Sum", "Tanh"),
    }
)
"""Operators that write over an input of the output's size that nothing else reads."""


def reads(node: Node) -> list[str]:
    """Names of the values that a node reads, those that its loop's body reads of the graph around it included."""
    return [i for i in node.inputs if i] + sorted(node.read_inside())


def execution_order(graph: Graph) -> list[Node]:
    """The nodes in the order in which onnxruntime runs them by default.

    It goes from the last node that nothing reads back to all that this needs, the inputs that are made by later nodes
    first, and so on with the other ones (`Graph::ReverseDFSFrom` with `NodeCompare` in onnxruntime's
    core/graph/graph.cc). So nothing is computed long before it is needed, whatever the order of the file.
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
    """Where in an order every value is read last; what is kept is read at its end."""
    last = {name: at for at, node in enumerate(nodes) for name in reads(node)}
    return last | dict.fromkeys(kept, len(nodes))


def live_bytes(nodes: Sequence[Node], sizes: Mapping[str, int], kept: Sequence[str]) -> list[int]:
    """Bytes of values that live while each node runs, without inputs and constants of the graph.

    Args:
        sizes: Bytes by value; one that is missing counts nothing.
        kept: Outputs of the graph, which live on.
    """
    last, leaving = last_reads(nodes, kept), set(kept)
    buffers: dict[str, int] = {}
    starts: list[int] = []
    ends: list[int] = []
    taken: list[int] = []
    for at, node in enumerate(nodes):
        for k, name in enumerate(node.outputs):
            if not name:
                continue
            end = last.get(name, at)
            buffer = None if k or name in leaving else _shared(node, at, name, sizes, buffers, ends)
            if buffer is None:
                if not k and node.op in SAME and name not in leaving and node.inputs[0] not in buffers:
                    continue  # an input or a constant, seen otherwise
                buffer = len(starts)
                starts.append(at)
                ends.append(end)
                taken.append(sizes.get(name, 0))
            buffers[name] = buffer
            ends[buffer] = max(ends[buffer], end)
    change = [0] * (len(nodes) + 2)
    for start, end, size in zip(starts, ends, taken, strict=True):
        change[start] += size
        change[end + 1] -= size
    return list(accumulate(change[: len(nodes)]))


def _shared(
    node: Node, at: int, name: str, sizes: Mapping[str, int], buffers: Mapping[str, int], ends: Sequence[int]
) -> int | None:
    """The buffer of an input that an output is written into, if there is one."""
    if node.op in SAME:
        return buffers.get(node.inputs[0])
    candidates = node.inputs[:2] if node.op in _IN_PLACE else ()
    for value in candidates:
        buffer = buffers.get(value)
        if buffer is not None and ends[buffer] <= at and sizes.get(value) == sizes.get(name):
            return buffer
    return None
