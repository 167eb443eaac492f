"""Rewrites how a graph stores and uses constants, so that they fit layers of any width.

- `fold_constants`: values that depend neither on data nor on weights are computed and stored.
- `guard_zero_norms`: divides by 1 where the norm of a direction (weight norm) is 0, which would give NaN.
"""

from __future__ import annotations

from collections.abc import Container

import numpy as np

from fedprune.core.errors import ModelError
from fedprune_export.importing.refusals import RANDOM_OPERATORS
from fedprune_export.ir.dropout import is_dropout
from fedprune_export.ir.graph import Array, Graph, Node
from fedprune_export.ir.shape_arithmetic import size_marks
from fedprune_export.ir.trace import Trace, run_values


def constant_input(graph: Graph, node: Node, index: int, what: str) -> Array | None:
    """The constant at an input of a node; None where it is left out. Raises `ModelError` if it is computed."""
    if len(node.inputs) <= index or not node.inputs[index]:
        return None
    if node.inputs[index] not in graph.initializers:
        raise ModelError(f"operator {node.op} ({node.name}) takes computed {what}", expected=f"constant {what}")
    return graph.initializers[node.inputs[index]]


def guard_zero_norms(graph: Graph, constants: Container[str]) -> None:
    """Divide by 1 where the L2 norm of a parameter is 0, as that of a direction (weight norm) under a mask may be.

    0 / 0 is NaN, also in PyTorch. Where the norm is not 0, value and gradient stay the same.
    """
    makers = graph.producers()
    nodes: list[Node] = []
    for node in graph.nodes:
        length = makers.get(node.inputs[1]) if node.op == "Div" and not node.domain else None
        if length is not None and length.op == "ReduceL2" and not length.domain:
            source, divisor = length.inputs[0], node.inputs[1]
            if source in graph.initializers and source not in constants:
                empty, node.inputs[1] = graph.fresh("Equal"), graph.fresh("Where")
                nodes.append(Node("Equal", [divisor, graph.scalar(0)], [empty], {}, empty))
                choice = [empty, graph.scalar(1), divisor]
                nodes.append(Node("Where", choice, [node.inputs[1]], {}, node.inputs[1]))
        nodes.append(node)
    graph.nodes = nodes


def fold_constants(graph: Graph, trace: Trace, constants: set[str], output: str) -> None:
    """Compute values that depend neither on data nor on weights, and store them as constants.

    That includes shape arithmetic that doesn't depend on the batch; it has full widths, also in a cut graph.
    """
    constant_values = {n: graph.initializers[n] for n in constants if n in graph.initializers}
    # A mark says that a size depends on the batch.
    for name, marks in size_marks(graph, trace, constant_values, trace.batched).items():
        if name in trace.integers and not marks.any():
            constant_values[name] = trace.integers[name]
    computable: set[str] = set()
    for node in graph.nodes:
        reads = [i for i in node.inputs if i]
        if (
            # Folding would freeze one draw of random numbers, or remove a dropout.
            node.op not in RANDOM_OPERATORS
            and not is_dropout(node)
            and all(i in constant_values or i in computable for i in reads)
            and not all(o in constant_values for o in node.outputs if o)
        ):
            computable.update(o for o in node.outputs if o)
    if computable:
        computed_nodes = [n for n in graph.copy().nodes if any(o in computable for o in n.outputs)]
        computed = Graph(nodes=computed_nodes, initializers=dict(constant_values), opset=graph.opset)
        constant_values.update(run_values(computed, sorted(computable), batch=1))
    folded = {o for n in graph.nodes for o in n.outputs if o in constant_values and o != output}
    graph.nodes = [n for n in graph.nodes if not all(o in folded for o in n.outputs if o)]
    for name in folded:
        graph.initializers[name] = np.array(constant_values[name], order="C")
        constants.add(name)
