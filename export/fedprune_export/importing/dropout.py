"""Writes the dropouts of an imported model in the compiler's form (`ir.dropout`)."""

from __future__ import annotations

from fedprune.core.text import quantity
from fedprune_export.importing.simplification import bypass
from fedprune_export.ir.dropout import dropout_ratio, is_dropout, read_draws
from fedprune_export.ir.graph import Graph, Node


def rewrite_dropouts(graph: Graph, notes: list[str]) -> None:
    """Write dropouts in the compiler's form, and remove those that drop nothing.

    If other operators read a dropout's mask, they get one that is all true. `notes` gets a sentence on what was done.
    """
    ratios: list[float] = []
    draws = read_draws(graph.metadata)
    outputs = {p.name for p in graph.outputs}
    readers = graph.consumers()
    nodes: list[Node] = []
    idle: list[Node] = []
    for node in graph.nodes:
        nodes.append(node)
        if not is_dropout(node) or node.name in draws:
            continue
        ratio = dropout_ratio(graph, node)
        mask = node.outputs[1] if len(node.outputs) > 1 else ""
        if mask and (mask in readers or mask in outputs):
            # The input equals itself, in the right shape at any batch size; only NaN doesn't.
            nodes.append(Node("Equal", [node.inputs[0], node.inputs[0]], [mask], {}, mask))
            notes.append(f"The mask of Dropout {node.name} is read by other operators: it is all true.")
        if ratio is None:
            notes.append(f"The ratio of Dropout {node.name} is computed: it drops nothing in training, either.")
        if ratio:
            ratios.append(ratio)
            node.inputs = [node.inputs[0], graph.scalar(ratio)]
        else:
            node.inputs = node.inputs[:1]
            idle.append(node)
        node.outputs, node.attrs = node.outputs[:1], {}
    graph.nodes = nodes
    for node in idle:
        bypass(graph, node, outputs)
    if ratios:
        shares = ", ".join(f"{ratio:g}" for ratio in sorted(set(ratios)))
        notes.append(f"Boards train with {quantity(len(ratios), 'dropout')} of the model (ratio {shares}).")
