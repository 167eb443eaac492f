"""Which initialisers are weights, what each is for, and which are constants.

An author who knows says so in the file's metadata; otherwise weights are recognised by their use.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from fedprune_export.graph import Graph, Node

CONSTANT_PREFIX = "const~"
"""Initialisers whose names begin so are constants: `Graph.constant` names them."""

_ROLES = {
    "Conv": {1: "weight", 2: "bias"},
    "Gemm": {1: "weight", 2: "bias"},
    "MatMul": {0: "weight", 1: "weight"},
    "BatchNormalization": {1: "norm_scale", 2: "norm_bias", 3: "stat_mean", 4: "stat_var"},
    "PRelu": {1: "weight"},
    "Add": {0: "bias", 1: "bias"},
    "Sub": {0: "bias", 1: "bias"},
    "Mul": {0: "norm_scale", 1: "norm_scale"},
    "Div": {1: "norm_scale"},
}
_CARRIERS = frozenset({"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten"})


def untie(graph: Graph, constants: set[str], notes: list[str]) -> None:
    """Give every node its own copy of an initialiser that exporters merged only because the values were equal.

    Uniform vectors (fresh norms) are merged by value; a matrix that several nodes read is truly tied.
    """
    uses: dict[str, int] = {}
    for node in graph.nodes:
        for i, name in enumerate(node.inputs):
            value = graph.initializers.get(name)
            if value is None or name in constants or value.dtype != np.float32:
                continue
            uses[name] = uses.get(name, 0) + 1
            if uses[name] > 1 and value.size > 1 and np.all(value == value.reshape(-1)[0]):
                clone = f"{name}_{uses[name]}"
                while clone in graph.initializers:
                    clone += "_"
                graph.initializers[clone] = value
                node.inputs[i] = clone
                notes.append(f"Tensor {name} was shared; {node.op} {node.name} has its own copy {clone}.")


def find_kinds(graph: Graph, constants: set[str], explicit: bool) -> dict[str, str]:
    """What every weight is for, by its use; the rest are constants.

    Args:
        graph: The graph.
        constants: Names known to be constants.
        explicit: Whether every initialiser that is not a constant is a parameter, scalars too.
    """
    consumers = graph.consumers()
    kinds: dict[str, str] = {}
    for node in graph.nodes:
        for i, name in enumerate(node.inputs):
            value = graph.initializers.get(name)
            if value is None or name in kinds or value.dtype != np.float32:
                continue
            norm = node.op == "BatchNormalization"
            if (name in constants and not norm) or not (explicit or norm or value.size > 1):
                continue
            role = _role(consumers, node, i)
            if role:
                kinds[name] = role
    return kinds


def _role(consumers: Mapping[str, list[tuple[Node, int]]], node: Node, index: int) -> str:
    if node.domain:
        return ""
    if node.op in _CARRIERS and index == 0:
        for reader, i in consumers.get(node.outputs[0], []):
            role = _role(consumers, reader, i)
            if role:
                return role
        return ""
    return _ROLES.get(node.op, {}).get(index, "")


def name_constants(graph: Graph, kinds: Mapping[str, str]) -> None:
    """Name constants as ours, so that importing this graph again finds the same parameters."""
    names: dict[str, str] = {}
    for name in _in_order(graph):
        if name in graph.initializers and name not in kinds:
            value = graph.initializers[name]
            names[name] = name if name.startswith(CONSTANT_PREFIX) else graph.constant(value, value.dtype)
    for node in graph.nodes:
        node.inputs = [names.get(i, i) for i in node.inputs]
    order = {**dict.fromkeys(kinds), **dict.fromkeys(names.values())}
    graph.initializers = {n: graph.initializers[n] for n in order}
    graph.prune()


def _in_order(graph: Graph) -> Iterable[str]:
    return dict.fromkeys(i for n in graph.nodes for i in n.inputs if i)
