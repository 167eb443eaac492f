"""Removes nodes that return their input."""

from __future__ import annotations

from collections.abc import Iterable

from fedprune_export.ir.graph import Graph, Node


def drop_identities(graph: Graph) -> None:
    bypass(graph, [n for n in graph.nodes if n.op == "Identity" and not n.domain])


def bypass(graph: Graph, nodes: Iterable[Node]) -> None:
    """Remove nodes, in the graph's order, whose first output is their first input; readers get the latter."""
    outputs, makers = {p.name for p in graph.outputs}, graph.producers()
    names, removed = dict[str, str](), set[int]()
    for node in nodes:
        source, target = names.get(node.inputs[0], node.inputs[0]), node.outputs[0]
        if target not in outputs:
            names[target] = source
        elif source in makers and source not in outputs:
            names[source] = target  # the name of an output must stay, so its producer takes it over
        else:  # an output that is an input, an initialiser or another output
            node.op, node.inputs, node.attrs = "Identity", [source], {}
            continue
        removed.add(id(node))
    for name in names:
        while names[name] in names:
            names[name] = names[names[name]]
    graph.nodes = [n for n in graph.nodes if id(n) not in removed]
    graph.rename(names)
