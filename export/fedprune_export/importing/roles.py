"""Which initialisers are weights, what each is for, and which are constants.

An author who knows says so in the file's metadata; otherwise weights are recognised by their use.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from fedprune.errors import ModelError
from fedprune_export.graph import Graph, Node
from fedprune_export.operators import REARRANGEMENTS

CONSTANT_PREFIX = "const~"
"""Initialisers whose names begin so are constants: `Graph.constant` names them."""

_ROLES = {
    "Conv": {1: "weight", 2: "bias"},
    "Gemm": {1: "weight", 2: "bias"},
    "MatMul": {0: "weight", 1: "weight"},
    "ConvTranspose": {1: "weight", 2: "bias"},
    "Gather": {0: "weight"},
    "Einsum": {0: "weight", 1: "weight", 2: "weight"},
    **{op: {1: "weight", 2: "weight", 3: "bias", 7: "weight"} for op in ("LSTM", "GRU", "RNN")},
    **{f"{kind}Normalization": {1: "norm_scale", 2: "norm_bias"} for kind in ("Layer", "Group", "Instance")},
    "RMSNormalization": {1: "norm_scale"},
    "BatchNormalization": {1: "norm_scale", 2: "norm_bias", 3: "stat_mean", 4: "stat_var"},
    "PRelu": {1: "weight"},
    "Add": {0: "bias", 1: "bias"},
    "Sub": {0: "bias", 1: "bias"},
    "Mul": {0: "norm_scale", 1: "norm_scale"},
    "Div": {1: "norm_scale"},
}
_STATISTICS = ("stat_mean", "stat_var")


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


def find_kinds(graph: Graph, constants: set[str], listed: set[str] | None, notes: list[str]) -> dict[str, str]:
    """What every weight is for, by its use; the rest are constants.

    Statistics of batch norms always count. Vectors that scale a norm's output do unless they are known constants.

    Args:
        graph: The graph.
        constants: Names known to be constants.
        listed: The parameters, where the source knows them: then each counts, scalars and those of unknown use too.
        notes: Gets a sentence for every tensor that could be a weight and is taken for a constant.

    Raises:
        ModelError: A parameter is not float32.
    """
    consumers, made = graph.consumers(), _from_data(graph)
    norms = {
        name: _ROLES[node.op][i]
        for node in graph.nodes
        if node.op == "BatchNormalization" and not node.domain
        for i, name in enumerate(node.inputs)
        if i and name in graph.initializers
    }
    kinds: dict[str, str] = {}
    for name in _in_order(graph):
        value = graph.initializers.get(name)
        if value is None:
            continue
        known = name not in constants if listed is None else name in listed
        if not known and norms.get(name) not in _STATISTICS:
            continue
        if value.dtype != np.float32:
            if listed is not None:
                raise ModelError(f"parameter {name}", expected="float32", got=value.dtype)
            continue
        if listed is not None or name in norms:
            kinds[name] = norms.get(name) or _role(consumers, made, name) or "weight"
        elif value.size > 1:
            if kind := _role(consumers, made, name):
                kinds[name] = kind
            else:
                notes.append(
                    f"Tensor {name} is taken for a constant and not trained: its use doesn't make it a weight."
                )
    return kinds


def _from_data(graph: Graph) -> set[str]:
    """Values that depend on the input."""
    made = {p.name for p in graph.inputs}
    for node in graph.nodes:
        if made.intersection(node.inputs):
            made.update(o for o in node.outputs if o)
    return made


def _role(consumers: Mapping[str, list[tuple[Node, int]]], made: set[str], start: str) -> str:
    """The role of an initialiser where it first meets data; what is computed from weights alone is followed."""
    seen, waiting = {start}, [start]
    while waiting:
        for node, i in consumers.get(waiting.pop(0), []):
            if node.domain:
                continue
            met = made.intersection(node.outputs)
            if not met or (node.op in REARRANGEMENTS and i == 0):
                further = [o for o in node.outputs if o and o not in seen]
                seen.update(further)
                waiting += further
            elif role := _ROLES.get(node.op, {}).get(i, ""):
                return role
    return ""


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
