"""Sorts the nodes of a file, which onnxruntime runs in any order and onnx takes only after those that they read."""

from __future__ import annotations

from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from heapq import heappop, heappush

import onnx


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Put nodes behind those whose values they read, otherwise in their order.

    onnxruntime's converter to float16 appends its Casts at the end of the file. Nodes in a circle stay where they are.
    """
    for node in graph.node:
        for inner in inner_graphs(node):
            sort_nodes(inner)
    makers = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    reads = [{makers[name] for name in _read_names(node) if name in makers} for node in graph.node]
    if all(max(sources, default=-1) < i for i, sources in enumerate(reads)):
        return
    sorter, ready, nodes = TopologicalSorter(dict(enumerate(reads))), list[int](), list[onnx.NodeProto]()
    try:
        sorter.prepare()
    except CycleError:
        return
    while sorter.is_active():
        for i in sorter.get_ready():
            heappush(ready, i)
        first = heappop(ready)
        nodes.append(graph.node[first])
        sorter.done(first)
    del graph.node[:]
    graph.node.extend(nodes)


def _read_names(node: onnx.NodeProto) -> Iterator[str]:
    """The names that a node and the graphs within it read."""
    yield from (name for name in node.input if name)
    for graph in inner_graphs(node):
        for inner in graph.node:
            yield from _read_names(inner)
        yield from (output.name for output in graph.output)


def inner_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs within a node, such as the body of a loop."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs
