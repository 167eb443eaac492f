"""Sorts the nodes of a file, which onnxruntime runs in any order and onnx takes only after those that they read."""

from __future__ import annotations

from collections.abc import Iterator

import onnx


def sort_nodes(graph: onnx.GraphProto) -> bool:
    """Move nodes behind those whose values they read, as few as possible. Returns whether any was moved.

    onnxruntime's converter to float16 appends its Casts at the end of the file. Nodes in a circle stay where they are.
    """
    moved = False
    for node in graph.node:
        for inner in inner_graphs(node):
            moved = sort_nodes(inner) or moved
    makers = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    reads = [sorted({makers[n] for n in read_names(node) if n in makers}) for node in graph.node]
    if all(not sources or sources[-1] < i for i, sources in enumerate(reads)):
        return moved
    order: dict[int, None] = {}
    visited: set[int] = set()
    pending = list(range(len(reads)))[::-1]
    while pending:
        i = pending[-1]
        missing = [source for source in reads[i] if source not in order and source not in visited]
        # A node is looked at again after those that it reads were placed; in a circle they never all are.
        if i in order or i in visited or not missing:
            pending.pop()
            order.setdefault(i)
            continue
        visited.add(i)
        pending += missing[::-1]
    nodes = [onnx.NodeProto() for _ in order]
    for node, i in zip(nodes, order, strict=True):
        node.CopyFrom(graph.node[i])
    del graph.node[:]
    graph.node.extend(nodes)
    return True


def read_names(node: onnx.NodeProto) -> Iterator[str]:
    """The names that a node and the graphs within it read."""
    yield from (name for name in node.input if name)
    for graph in inner_graphs(node):
        for inner in graph.node:
            yield from read_names(inner)
        yield from (output.name for output in graph.output)


def inner_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs within a node, such as the body of a loop."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs
