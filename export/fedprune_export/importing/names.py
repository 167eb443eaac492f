"""Names for what an import writes into a file, which nothing in the file has."""

from __future__ import annotations

from collections.abc import Iterator

import onnx


class Names:
    """The names of all values of a graph, and of graphs within."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._taken = set(_names(graph))
        self._next = dict[str, int]()

    def fresh(self, name: str) -> str:
        """This name, with a number appended if it is taken; it is taken from then on."""
        unique, number = name, self._next.get(name, 0)
        while unique in self._taken:
            number += 1
            unique = f"{name}_{number}"
        self._next[name] = number
        self._taken.add(unique)
        return unique


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    for values in (graph.input, graph.output, graph.initializer):
        yield from (value.name for value in values)
    for node in graph.node:
        yield from node.input
        yield from node.output
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _names(inner)
