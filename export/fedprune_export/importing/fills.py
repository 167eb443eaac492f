"""Filled values: constants that are larger than what they say.

The first state of a recurrent layer is as large as a shape says. Exporters make one for several readers. Every reader
gets its own, because readers share nothing by it: the hidden units of two layers can be cut on their own although both
begin with zeros. A constant that says the same for all channels says it once, so that any number of channels fits it.
"""

from __future__ import annotations

from collections.abc import Collection

from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.operators import MANY_TO_ONE, REARRANGEMENTS
from fedprune_export.ir.shape_arithmetic import SOURCES
from fedprune_export.ir.trace import Trace

_PASSING = REARRANGEMENTS | {"Cast", "Gather", "Slice", "Split", "Concat"}
_MOST_COPIES = 64
"""A value with more readers than that is no state of layers."""


def part_fills(graph: Graph, constants: Collection[str]) -> None:
    """Give every reader of a filled value a copy of the nodes that make it.

    Args:
        graph: The graph.
        constants: Names of initialisers that are constants.
    """
    fixed, sizes = set(constants), set[str]()
    filled: set[str] = set()
    outputs = {p.name for p in graph.outputs}
    for node in graph.nodes:
        if node.domain:
            continue
        reads = [i for i in node.inputs if i]
        if node.op in SOURCES or all(i in sizes or i in fixed for i in reads):
            fills = node.op in ("Expand", "ConstantOfShape") and any(i in sizes for i in reads)
            (filled if fills else sizes).update(o for o in node.outputs if o)
        elif node.op in _PASSING and all(i in filled or i in sizes or i in fixed for i in reads):
            filled.update(o for o in node.outputs if o)
    nodes: list[Node] = []
    readers: dict[str, list[Node]] = {}
    for node in reversed(graph.nodes):
        copies = [node]
        made = [o for o in node.outputs if o]
        if made and filled.issuperset(made) and not outputs.intersection(made):
            reading = list({id(n): n for name in made for n in readers.get(name, [])}.values())
            copies += [_copied(graph, node, reader) for reader in reading[1:_MOST_COPIES]]
        for copy in copies[::-1]:
            nodes.append(copy)
            for name in copy.inputs:
                readers.setdefault(name, []).append(copy)
    graph.nodes = nodes[::-1]


def narrow_constants(graph: Graph, seen: Trace, constants: set[str]) -> None:
    """Shorten constants along axes on which they are all equal, where another operand says how long the axis is.

    Args:
        graph: The graph.
        seen: Its shapes.
        constants: Names of initialisers that are constants; gets those that are new.
    """
    for node in graph.nodes:
        if node.domain or node.op not in MANY_TO_ONE or not all(i in seen.shapes for i in node.inputs):
            continue
        for place, name in enumerate(node.inputs):
            value = graph.initializers.get(name)
            if value is None or name not in constants or value.size < 2:
                continue
            others = [seen.shapes[i] for i in node.inputs if i not in constants]
            short = value
            for axis, size in enumerate(value.shape):
                back = value.ndim - axis
                told = any(len(shape) >= back and shape[-back] == size for shape in others)
                if size > 1 and told and (value == value.take([0], axis)).all():
                    short = short.take([0], axis)
            if short.size < value.size:
                node.inputs[place] = graph.constant(short, short.dtype)
                constants.add(node.inputs[place])


def _copied(graph: Graph, node: Node, reader: Node) -> Node:
    """A copy of a node whose outputs one reader reads instead."""
    names = {name: graph.fresh(node.op) for name in node.outputs if name}
    reader.inputs = [names.get(i, i) for i in reader.inputs]
    outputs = [names.get(o, "") for o in node.outputs]
    return Node(node.op, list(node.inputs), outputs, dict(node.attrs), outputs[0])
