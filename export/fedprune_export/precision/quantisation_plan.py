"""The plan of an int8 quantisation: which layers and activations get 8 bits, and the graph that measures their ranges.

Layers with weights come first. Operators between two of them are quantised if all their inputs are already; all others
stay in float32. `lowering` writes what is planned here.

An activation's *range* (smallest and largest number) gives its *scale*. An operator that only rearranges numbers shares
the scale of its input, which is then its *scale owner*.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedprune.runtime.bundle import WEIGHTS
from fedprune.runtime.precision import RANGES
from fedprune_export.bundles.inference import refer_to_files, zero_weights
from fedprune_export.ir.graph import Port
from fedprune_export.precision.lowered_graph import LoweredGraph, is_layer
from fedprune_export.pruning.cut import at_widths
from fedprune_export.pruning.model import Model

_QUANTISABLE_LAYERS = frozenset({"Conv", "Gemm", "MatMul"})
# A clamp after a layer costs nothing: the range of its output ends where the clamp does, and rounding clamps.
_CLAMPING_OPERATORS = frozenset({"Relu", "Clip"})

# Operators whose output holds numbers of their input, and so has its scale.
_REARRANGING_OPERATORS = frozenset({"MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze"})

# Operators that onnxruntime computes on 8 bits; their output has a scale of its own.
_QUANTISED_OPERATORS = frozenset({"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid"})


@dataclass
class QuantisationPlan:
    """The parts to quantise.

    Attributes:
        layers: Outputs of the layers with weights.
        values: Activations with a range of their own, in the graph's order: rows of the ranges.
        scale_owners: Per quantised activation, the activation whose scale it has.
    """

    layers: list[str] = field(default_factory=list)
    values: list[str] = field(default_factory=list)
    scale_owners: dict[str, str] = field(default_factory=dict)


def plan_quantisation(lowered: LoweredGraph, keep: Collection[str] = ()) -> QuantisationPlan:
    """Choose the parts of a folded graph to quantise. `keep`: outputs of layers that stay in float32."""
    graph, tensors, output_names = lowered.graph, lowered.tensors(), lowered.output_names()
    consumers = graph.consumers()

    def value_after_clamp(name: str) -> str:
        """The value whose range counts: that after a clamp, if nothing else reads the value before it."""
        readers = consumers.get(name, [])
        clamp = readers[0][0] if len(readers) == 1 and name not in output_names else None
        return clamp.outputs[0] if clamp is not None and clamp.op in _CLAMPING_OPERATORS and not clamp.domain else name

    layers = [
        n
        for n in graph.nodes
        if n.op in _QUANTISABLE_LAYERS
        and is_layer(lowered, n, tensors)
        and lowered.is_float(n.inputs[0])
        and n.outputs[0] not in tensors
        and n.outputs[0] not in keep
    ]
    # Values that get a range of their own.
    ranged = {n.inputs[0] for n in layers}
    ranged |= {value_after_clamp(n.outputs[0]) for n in layers if n.op == "Conv"} - output_names
    scale_owners = {p.name: p.name for p in graph.inputs if p.name in ranged}
    for node in graph.nodes:
        reads = [i for i in node.inputs if i and i not in tensors and i not in graph.initializers]
        reads_quantised = bool(reads) and not node.domain and set(reads) <= scale_owners.keys()
        is_inner = len(node.outputs) == 1 and node.outputs[0] not in output_names
        if reads_quantised and node.op in _REARRANGING_OPERATORS and is_inner:
            scale_owners[node.outputs[0]] = scale_owners[reads[0]]
            continue
        floats = {i for i in node.inputs if i and lowered.is_float(i)}
        if reads_quantised and node.op in _QUANTISED_OPERATORS and floats == set(reads):
            ranged |= {value_after_clamp(node.outputs[0])} - output_names
        scale_owners |= {o: o for o in node.outputs if o in ranged}
    values = [v for v, owner in scale_owners.items() if owner == v]
    return QuantisationPlan([n.outputs[0] for n in layers], values, scale_owners)


def calibration_graph(model: Model, widths: Sequence[int], plan: QuantisationPlan) -> bytes:
    """The inference graph with the smallest and largest numbers of activations as its output, float32 [n, 2].

    Its weights are those of the inference graph, in the same file. Raises `BundleError` if the widths don't fit the
    architecture. `plan`: which activations, in this order.
    """
    graph = at_widths(model, widths)
    rows = []
    for name in plan.values:
        bounds = [graph.emit(op, name, attrs={"keepdims": 0}) for op in ("ReduceMin", "ReduceMax")]
        row = graph.emit("Concat", *(graph.emit("Unsqueeze", b, graph.ints(0)) for b in bounds), attrs={"axis": 0})
        rows.append(graph.emit("Unsqueeze", row, graph.ints(0)))
    graph.emit("Concat", *rows, out=RANGES, attrs={"axis": 0})
    graph.outputs = [Port(RANGES, np.dtype(np.float32), (len(rows), 2))]
    graph.prune()
    return refer_to_files(graph.to_proto(), {WEIGHTS: zero_weights(model, widths)})
