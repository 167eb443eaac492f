"""The pieces of a training step: what each layer computes forward and backward, in which form, and the least it moves.

A piece is one part of one layer. Its MACs and bytes are those of the mathematics: every value that it needs
is read once from memory, every result written once, whatever form computes it. Values of a small layer may stay in a
processor's cache; then less is moved.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedprune.planning.costs import layer_macs
from fedprune_export.channels.cost_table import READS_INPUT, READS_OUTPUT
from fedprune_export.ir.drafts import FORWARD, INPUT_GRADIENT, UPDATE, WEIGHT_GRADIENT
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.operators import VIEWS
from fedprune_export.ir.opset_lowering import at_opset
from fedprune_export.ir.trace import inferred
from fedprune_export.pruning.cut import pinned
from fedprune_export.pruning.model import Model

BACKWARD = "backward"  # all gradients of a layer whose parts are computed together

PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN"})
NORMS = frozenset(
    {
        *("BatchNormalization", "LayerNormalization", "GroupNormalization", "RMSNormalization"),
        *("InstanceNormalization", "LpNormalization", "LRN"),
    }
)
LAYOUT = frozenset(
    {
        *("Transpose", "Pad", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice"),
        *("Split", "Concat", "Expand", "Tile", "Identity", "Gather", "GatherND", "GatherElements", "Shape"),
    }
)
"""Operators that compute nothing, but move numbers to where others read them."""

KINDS = ("products", "norms", "layout", "update", "other")
"""Kinds of work in a step's time: convolutions and matrix products, norms, changes of layout, moving the weights, and
all else."""

_VIEWS = VIEWS | {"Shape"}


@dataclass(frozen=True)
class Piece:
    """A part of a layer, or of the step where it belongs to no layer.

    Attributes:
        title: The layer's weight, else its node; empty for the loss and the update.
        bytes: Read and written at least.
        nodes: Names of the graph's nodes that compute it.
    """

    title: str
    op: str
    part: str
    form: str
    macs: int
    bytes: int
    nodes: tuple[str, ...]

    def kind(self, operator: str) -> str:
        """The kind of an operator's work, one of `KINDS`."""
        if operator in LAYOUT:
            return "layout"
        if self.part == UPDATE:
            return "update"
        if self.op in NORMS:
            return "norms"
        return "products" if self.op in PRODUCTS else "other"


def pieces(model: Model, graph: Graph, widths: Sequence[int], batch: int) -> list[Piece]:
    """The pieces of a step in the order in which they are computed; a part that is computed with another's is left out.

    `graph`: its training graph, as `training_graph` made it.
    """
    layers = _Layers(model, widths, batch)
    found: dict[tuple[str, str], list[Node]] = {}
    for node in at_opset(graph, graph.opset).nodes:
        if node.purpose is not None:
            found.setdefault((node.purpose.layer, layers.part(node.purpose.layer, node.purpose.part)), []).append(node)
    out = []
    for (layer, part), nodes in found.items():
        running = [r for n in nodes for r in _running(n)]
        names, operators = tuple(name for name, _ in running), [operator for _, operator in running]
        if not layer:
            moved = layers.update_bytes(graph) if part == UPDATE else layers.logit_bytes
            out.append(Piece("", "", part, "", 0, moved, names))
        elif layer in layers.nodes and not _VIEWS.issuperset(operators):
            out.append(
                Piece(
                    layers.title(layer),
                    layers.nodes[layer].op,
                    part,
                    form(layers.nodes[layer].op, part, operators, depthwise=layers.depthwise(layer)),
                    layers.macs(layer, part),
                    layers.bytes(layer, part),
                    names,
                )
            )
    return out


def form(op: str, part: str, operators: Sequence[str], *, depthwise: bool = False) -> str:
    """How a part of a layer is computed, in the words of `autodiff.dense` and `autodiff.depthwise`.

    `depthwise`: whether every channel has a filter of its own.
    """
    counts = Counter(operators)
    if op not in PRODUCTS:
        return "plain"
    if op not in ("Conv", "ConvTranspose"):
        return "product" if counts["MatMul"] or counts["Gemm"] else "plain"
    products = counts["MatMul"]
    if depthwise and products:
        return "lines"
    if part == WEIGHT_GRADIENT:
        if counts["Conv"]:
            return "convolution"
        return "taps" if counts["ReduceSum"] >= products > 0 and not counts["Gemm"] else "columns"
    if counts["Conv"]:
        return "plain" if part == FORWARD else "flipped"
    if counts["ConvTranspose"]:
        return "transposed" if part == INPUT_GRADIENT else "plain"
    return "columns"


class _Layers:
    """Known facts about the model's nodes at these widths."""

    def __init__(self, model: Model, widths: Sequence[int], batch: int) -> None:
        held = pinned(model, widths)
        seen = inferred(held.graph, batch)
        self.nodes = {n.name or n.outputs[0]: n for n in held.graph.nodes}
        self._held, self._batch = held, batch
        self._sizes = {n: math.prod(s) * seen.dtypes[n].itemsize for n, s in seen.shapes.items()}
        self._sizes |= {n: v.nbytes for n, v in held.graph.initializers.items()}
        self._constants = set(held.graph.initializers)
        architecture, shapes = model.architecture, model.architecture.shapes(widths)
        self._macs: Counter[str] = Counter()
        self._weights: dict[str, str] = {}
        for layer in architecture.layers:
            self._macs[layer.name] += batch * layer_macs(architecture, layer, widths, shapes)
            self._weights.setdefault(layer.name, layer.weight)
        self._tensors = set(architecture.by_name)
        self.logit_bytes = 2 * self._sizes[held.graph.outputs[0].name]

    def part(self, layer: str, part: str) -> str:
        """A part of a layer, whose gradients are one where it doesn't multiply."""
        gradient = part in (INPUT_GRADIENT, WEIGHT_GRADIENT)
        products = layer in self.nodes and self.nodes[layer].op in PRODUCTS
        return BACKWARD if gradient and layer and not products else part

    def title(self, layer: str) -> str:
        """A layer's name in tables: its weight's, else its node's."""
        node = self.nodes[layer]
        weight = self._weights.get(layer) or next((i for i in node.inputs if i in self._tensors), "")
        return weight.removesuffix(".weight") or layer

    def depthwise(self, layer: str) -> bool:
        """Whether a convolution has a filter per channel."""
        node = self.nodes[layer]
        return int(node.attrs.get("group", 1)) > 1 and self._held.graph.initializers[node.inputs[1]].shape[1] == 1

    def macs(self, layer: str, part: str) -> int:
        """MACs: every gradient takes as many as the forward pass."""
        if part in (FORWARD, WEIGHT_GRADIENT) or self._weights.get(layer):
            return self._macs[layer] if part != BACKWARD else 0
        moved = [i for i in self.nodes[layer].inputs if i and i not in self._constants]
        return self._macs[layer] * max(1, len(moved)) if part == INPUT_GRADIENT else 0

    def bytes(self, layer: str, part: str) -> int:
        """The bytes to read and write."""
        node = self.nodes[layer]
        inputs = [i for i in dict.fromkeys(node.inputs) if i]
        held = self._total(i for i in inputs if i in self._constants)
        moved = self._total(i for i in inputs if i not in self._constants)
        made = self._total(o for o in node.outputs[:1] if o)
        if part == FORWARD:
            return held + moved + made
        if part == WEIGHT_GRADIENT:  # x and dy in, dw out
            return held + moved + made
        if part == INPUT_GRADIENT:  # dy and w in, dx out; of products of two values these and their gradients
            return made + (held if held else moved) + moved
        kept = moved if node.op in READS_INPUT else made if node.op in READS_OUTPUT else 0
        return made + kept + moved

    def update_bytes(self, graph: Graph) -> int:
        """All weights and states are read and written, and the gradients read."""
        sizes = {t.name: 4 * math.prod(a.length for a in t.axes) for t in self._held.architecture.tensors}
        state = [p.name.partition("::")[0] for p in (*graph.inputs, *graph.outputs) if p.shape]
        trained = {p.name.partition("::")[0] for p in graph.outputs}
        kept = [n for n in state if n in sizes and n in trained]
        return sum(sizes[n] for n in kept) + sum(sizes[n] for n in trained if n in sizes)

    def _total(self, names: Iterable[str]) -> int:
        return int(np.sum([self._sizes.get(n, 0) for n in names], dtype=np.int64))


def _running(node: Node) -> Iterator[tuple[str, str]]:
    """Names and operators of what a node runs: of a loop its body, which the profiler times separately."""
    if not node.bodies:
        yield node.name, node.op
    for body in node.bodies:
        yield from ((inner.name, inner.op_type) for inner in body.node)
