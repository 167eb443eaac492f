"""Graphs that read the frozen base (frozen weights in low precision) and dequantise it right before each layer.

The stored numbers are inputs of a training graph, and external data of an inference graph.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedprune.core.errors import ModelError
from fedprune.model.step_contract import base_name, base_scale_name
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.pruning.frozen_base import FrozenBase

# A frozen tensor, maybe transposed: its name and the order of its axes.
_Layout = tuple[str, tuple[int, ...]]


def write_base_reads(graph: Graph, frozen: FrozenBase) -> None:
    """Rewrite a graph so that it reads its base in the stored precision.

    The caller adds inputs or external data of these names.

    Each reader gets a dequantised copy of its own, so that none lives longer than a layer. It waits for the reader's
    other input (`_gate_value`): onnxruntime would otherwise merge copies of one weight, and might make all of them
    before the first layer. Rows of embeddings are looked up before they are dequantised.
    """
    ranks = {n: len(graph.initializers[n].shape) for n in frozen.axes if n in graph.initializers}
    layouts: dict[str, _Layout] = {n: (n, tuple(range(rank))) for n, rank in ranks.items()}
    available = {p.name for p in graph.inputs} | set(graph.initializers)
    nodes, graph.nodes = graph.nodes, []
    for node in nodes:
        if node.op == "Transpose" and node.inputs[0] in layouts:
            name, order = layouts[node.inputs[0]]
            perm = node.attrs.get("perm") or list(reversed(range(len(order))))
            layouts[node.outputs[0]] = name, tuple(order[i] for i in perm)
            continue
        if node.op == "Gather" and node.inputs[0] in layouts and _write_look_up(graph, frozen, node, layouts):
            continue
        computed_inputs = [i for i in node.inputs if i and i not in layouts and i not in available]
        node.inputs = [_read(graph, frozen, layouts[i], computed_inputs) if i in layouts else i for i in node.inputs]
        graph.nodes.append(node)
    for name in ranks:
        del graph.initializers[name]
    for port in graph.outputs:
        if port.name in layouts:
            raise ModelError(f"an output of the model is a frozen weight: {layouts[port.name][0]}")


def _write_look_up(graph: Graph, frozen: FrozenBase, node: Node, layouts: Mapping[str, _Layout]) -> bool:
    """Write the look-up of an embedding's rows, dequantised afterwards.

    Returns False, and writes nothing, where the whole matrix has to be dequantised first.
    """
    name, order = layouts[node.inputs[0]]
    rank, axis = len(order), frozen.axes[name]
    if node.attrs.get("axis", 0) != 0 or order != tuple(range(rank)) or rank < 2 or axis == 0:
        return False
    rows = graph.emit("Gather", base_name(name), node.inputs[1], attrs={"axis": 0})
    _dequantise(graph, name, rows, None if axis is None else axis - rank, node.outputs[0])
    return True


def _read(graph: Graph, frozen: FrozenBase, layout: _Layout, computed_inputs: list[str]) -> str:
    """A dequantised copy of a frozen tensor, for a node with these other inputs that are computed."""
    name, order = layout
    rank, axis, stored = len(order), frozen.axes[name], base_name(name)
    if rank < 2:
        return stored
    if computed_inputs:
        zeros = graph.emit("Mul", _gate_value(graph, computed_inputs[0]), graph.ints(*[0] * rank))
        stored = graph.emit("Reshape", stored, zeros)
    if order != tuple(range(rank)):
        # Transposed before it is dequantised: the stored array is half or a quarter as large as float32 numbers.
        stored = graph.emit("Transpose", stored, attrs={"perm": list(order)})
    return _dequantise(graph, name, stored, None if axis is None else order.index(axis))


def _gate_value(graph: Graph, value: str) -> str:
    """An int64 number [1] that exists once a value is computed; no optimiser can fold it into a constant."""
    flat = graph.emit("Reshape", value, graph.ints(-1))
    return graph.emit("Cast", graph.emit("Gather", flat, graph.ints(0)), attrs={"to": 7})


def _dequantise(graph: Graph, name: str, numbers: str, axis: int | None, out: str | None = None) -> str:
    """Dequantise numbers whose scales are along `axis`."""
    if axis is None:
        return graph.emit("Cast", numbers, attrs={"to": 1}, out=out)
    return graph.emit("DequantizeLinear", numbers, base_scale_name(name), attrs={"axis": axis}, out=out)
