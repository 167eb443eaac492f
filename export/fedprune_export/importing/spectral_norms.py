"""Folds spectral norms into the weights that they divide.

A weight is divided by its largest singular value, σ = uᵀ W v, where u and v are vectors that only training updates; at
inference they are constants (https://arxiv.org/abs/1802.05957). They have a number per channel, so as long as they are
there no channel can be cut. Weight norm needs no folding: its length and direction are trained and cut as they are.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

import numpy as np

from fedprune.core.text import first_few
from fedprune_export.importing.parameter_roles import stored_name
from fedprune_export.ir.graph import Array, Graph, Node
from fedprune_export.ir.trace import run_values


def fold_spectral_norms(
    graph: Graph, constants: Container[str], listed: Container[str] | None, notes: list[str]
) -> None:
    """Divide each weight by the number that a graph computes from it and from vectors, and drop the division.

    Adds a note on the weights. `listed` are the parameters, where the source knows them: vectors that are trained are
    none of a spectral norm.
    """
    data_values, makers = graph.values_from_inputs(), graph.producers()
    divisions = [
        (node, weight, scale)
        for node in graph.nodes
        if node.op in ("Div", "Mul") and not node.domain and node.outputs[0] not in data_values
        for value, scale in ([node.inputs] if node.op == "Div" else [node.inputs, node.inputs[::-1]])
        if (weight := _rearranged_weight(graph, makers, value)) and weight not in constants
        if _is_scaled_by_itself(graph, node, weight, scale, listed or ())
    ]
    if not divisions:
        return
    scale_names = list(dict.fromkeys(scale for _, _, scale in divisions))
    scales = run_values(graph, scale_names, batch=1)
    folded = []
    for node, weight, scale in divisions:
        # A number per channel is another norm.
        if scales[scale].size != 1:
            continue
        number = scales[scale].reshape(())
        value = graph.initializers[weight]
        graph.initializers[weight] = (value / number if node.op == "Div" else value * number).astype(np.float32)
        node.inputs = [name for name in node.inputs if name != scale]
        node.op = "Identity"
        folded.append(weight)
    graph.prune()
    if folded:
        names = first_few(folded, max_names=3)
        notes.append(
            f"Divided by their largest singular value (spectral norm) once, and trained without it: {names}. "
            "A torch module that shall load them must have its norm removed."
        )


def _rearranged_weight(graph: Graph, makers: Mapping[str, Node], value: str) -> str | None:
    """The initialiser of several numbers that a value has in another form."""
    weight = stored_name(value, makers)
    array = graph.initializers.get(weight)
    return weight if array is not None and array.dtype == np.float32 and array.size > 1 else None


def _is_scaled_by_itself(graph: Graph, node: Node, weight: str, scale: str, trained: Container[str]) -> bool:
    """Whether a value's scale is computed from a weight and other vectors, which aren't trained, and nothing else reads
    the weight."""
    sources = {name: graph.initializers[name] for name in _upstream(graph, scale) if name in graph.initializers}
    # Exporters store the matrix of a kernel beside it.
    copies = {name for name, value in sources.items() if _holds_same_numbers(value, graph.initializers[weight])}
    vectors = [n for n, v in sources.items() if v.dtype == np.float32 and v.size > 1 and n not in copies]
    if not copies or not vectors or any(n in trained for n in sources if n not in copies):
        return False
    return weight not in _upstream(graph, *(port.name for port in graph.outputs), without=node)


def _holds_same_numbers(value: Array, other: Array) -> bool:
    """Whether an array is another one, reshaped or transposed."""
    if value.size != other.size or value.dtype != other.dtype:
        return False
    return bool(np.array_equal(np.sort(value, axis=None), np.sort(other, axis=None)))


def _upstream(graph: Graph, *values: str, without: Node | None = None) -> set[str]:
    """Values, and all that they are computed from; but for what only one node reads."""
    out = {*values}
    for node in reversed(graph.nodes):
        if node is not without and not out.isdisjoint(node.outputs):
            out.update(filter(None, node.inputs))
    return out
