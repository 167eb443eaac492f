"""The masked whole graph: what a cut must equal.

Weights stay as they are. Lost channels are multiplied by zero where they are contracted: at the inputs of convolutions,
matrix products, recurrent layers and sums. In between they hold what they hold, since no operator mixes them with kept
ones; zero weights instead would make weights that are normalised in the graph divide by zero. A norm that averages over
channels averages over those that are kept, be it of activations or of weights (weight standardisation, weight norm):
that is what the smaller network does, and all that it can do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ModelError
from fedprune.model.architecture import Axis
from fedprune.model.selection import Selection
from fedprune_export.channels.products import einsum_terms
from fedprune_export.channels.reductions import ADDING
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.pruning.model import Model

Mask = npt.NDArray[np.float32]


def masked(model: Model, selection: Selection) -> Graph:
    """The whole graph with the channels masked that the submodel lacks."""
    graph = model.graph.copy()
    masks = _Masks(model, selection, graph)
    nodes, graph.nodes = graph.nodes, []
    for node in nodes:
        change = None if node.domain else _CHANGES.get(node.op)
        if change is None or not change(masks, node):
            graph.nodes.append(node)
    return graph


class _Masks:
    """Masks of values, and the graph they are written to."""

    def __init__(self, model: Model, selection: Selection, graph: Graph) -> None:
        self.graph = graph
        self._values = model.values
        self._selection = selection
        self._counts: dict[tuple[str, int], Mask | None] = {}

    def rank(self, name: str) -> int:
        return len(self._values[name])

    def axis(self, name: str, axis: int) -> Axis | None:
        return self._values[name][axis]

    def length(self, name: str, axis: int) -> int:
        """Indices of an axis at full width. Raises `ModelError` if the axis follows the batch."""
        found = self.axis(name, axis)
        if found is None:
            raise ModelError(f"a norm averages over axis {axis} of {name}, which follows the batch")
        return found.length

    def of(self, name: str, axis: int) -> Mask | None:
        """Ones for kept indices of an axis, zeros for lost ones; None where nothing is lost."""
        key = (name, axis % self.rank(name))
        if key not in self._counts:
            found = self.axis(*key)
            mask = None
            if found is not None and found.groups:
                mask = np.zeros(found.length, np.float32)
                mask[self._selection.indices(found)] = 1
            self._counts[key] = None if mask is None or mask.all() else mask
        return self._counts[key]

    def apply(self, node: Node, index: int, axes: Iterable[int]) -> None:
        """Multiply a node's input by the masks of these axes."""
        name = node.inputs[index]
        for axis in axes:
            mask = self.of(name, axis)
            if mask is not None:
                node.inputs[index] = self.graph.emit(
                    "Mul", node.inputs[index], self.spread(mask, axis % self.rank(name), self.rank(name))
                )

    def spread(self, mask: Mask, axis: int, rank: int) -> str:
        """A mask as a constant that broadcasts along one of `rank` axes."""
        shape = [1] * rank
        shape[axis] = -1
        return self.graph.constant(mask.reshape(shape), np.float32)


_Change = Callable[[_Masks, Node], bool | None]


def _contract(masks: _Masks, node: Node) -> None:
    masks.apply(node, 0, [1])


def _einsum(masks: _Masks, node: Node) -> None:
    found = einsum_terms(str(node.attrs["equation"]), len(node.inputs))
    if found is not None:
        terms, right = found
        for i, term in enumerate(terms):
            masks.apply(node, i, [axis for axis, letter in enumerate(term) if letter not in right])


def _recurrent(masks: _Masks, node: Node) -> None:
    """The input's channels, and the hidden units that the recurrence reads."""
    masks.apply(node, 0, [2])
    masks.apply(node, 2, [2])


def _sum(masks: _Masks, node: Node) -> None:
    rank = masks.rank(node.inputs[0])
    axes = node.attrs.get("axes")
    if axes is None and len(node.inputs) > 1 and node.inputs[1]:
        axes = masks.graph.initializers[node.inputs[1]].reshape(-1).tolist()
    masks.apply(node, 0, [int(a) % rank for a in (axes or range(rank))])


def _mean(masks: _Masks, node: Node) -> bool:
    """A mean over what is kept of a weight; over data no channels are lost."""
    rank = masks.rank(node.inputs[0])
    axes = sorted({int(a) % rank for a in node.attrs.get("axes", range(rank))})
    found = {a: m for a in axes if (m := masks.of(node.inputs[0], a)) is not None}
    if not found:
        return False
    count = math.prod(float(found[a].sum()) if a in found else masks.length(node.inputs[0], a) for a in axes)
    masks.apply(node, 0, axes)
    attrs = {"keepdims": node.attrs.get("keepdims", 1)}
    total = masks.graph.emit("ReduceSum", node.inputs[0], masks.graph.ints(*axes), attrs=attrs)
    masks.graph.emit("Div", total, masks.graph.scalar(count), out=node.outputs[0])
    return True


def _layer_norm(masks: _Masks, node: Node) -> bool:
    rank = masks.rank(node.inputs[0])
    first = int(node.attrs.get("axis", -1)) % rank
    axes = range(first, rank)
    return _norm(masks, node, axes, {a: m for a in axes if (m := masks.of(node.inputs[0], a)) is not None})


def _instance_norm(masks: _Masks, node: Node) -> bool:
    rank = masks.rank(node.inputs[0])
    axes = range(2, rank)
    return _norm(masks, node, axes, {a: m for a in axes if (m := masks.of(node.inputs[0], a)) is not None})


def _norm(masks: _Masks, node: Node, axes: Sequence[int], found: dict[int, Mask]) -> bool:
    """A norm over axes some of whose indices are lost, written out.

    Returns whether it was: False where nothing is lost.
    """
    if not found:
        return False
    graph, rank = masks.graph, masks.rank(node.inputs[0])
    x, mask = node.inputs[0], ""
    for axis, kept in found.items():
        own = masks.spread(kept, axis, rank)
        mask = graph.emit("Mul", mask, own) if mask else own
    count = graph.scalar(math.prod(float(found[a].sum()) if a in found else masks.length(x, a) for a in axes))

    def mean(value: str) -> str:
        total = graph.emit("ReduceSum", graph.emit("Mul", value, mask), graph.ints(*axes), attrs={"keepdims": 1})
        return graph.emit("Div", total, count)

    y = x if node.op == "RMSNormalization" else graph.emit("Sub", x, mean(x))
    spread = graph.emit("Add", mean(graph.emit("Mul", y, y)), graph.scalar(float(node.attrs.get("epsilon", 1e-5))))
    y = graph.emit("Div", y, graph.emit("Sqrt", spread))
    vectors = [name for name in node.inputs[1:] if name]
    if node.op == "InstanceNormalization":
        vectors = [_column(graph, name, rank) for name in vectors]
    _affine(graph, node, y, vectors)
    return True


def _column(graph: Graph, vector: str, rank: int) -> str:
    """A vector along the second of `rank` axes."""
    return graph.emit("Reshape", vector, graph.ints(1, -1, *[1] * (rank - 2)))


def _affine(graph: Graph, node: Node, y: str, vectors: Sequence[str]) -> None:
    """Scale and shift, under the node's own name."""
    for op, vector in zip(("Mul", "Add"), vectors, strict=False):
        y = graph.emit(op, y, vector)
    graph.emit("Identity", y, out=node.outputs[0])


def _group_norm(masks: _Masks, node: Node) -> bool:
    """Statistics of every norm group over its kept channels; those of a group that is lost as a whole don't matter."""
    graph, x = masks.graph, node.inputs[0]
    kept = masks.of(x, 1)
    if kept is None:
        return False
    groups, rank = int(node.attrs["num_groups"]), masks.rank(x)
    shape = graph.emit("Shape", x)
    inside = kept.reshape(groups, -1)
    rows = graph.emit("Reshape", x, graph.ints(0, groups, inside.shape[1], *([-1] if rank > 2 else [])))
    tail = [1] * (rank > 2)
    mask = graph.constant(inside.reshape(1, *inside.shape, *tail), np.float32)
    places = math.prod(masks.length(x, a) for a in range(2, rank))
    count = graph.constant(np.maximum(inside.sum(1), 1).reshape(1, -1, 1, *tail) * places, np.float32)
    axes = graph.ints(*[2, 3][: 1 + len(tail)])

    def mean(value: str) -> str:
        total = graph.emit("ReduceSum", graph.emit("Mul", value, mask), axes, attrs={"keepdims": 1})
        return graph.emit("Div", total, count)

    y = graph.emit("Sub", rows, mean(rows))
    spread = graph.emit("Add", mean(graph.emit("Mul", y, y)), graph.scalar(float(node.attrs.get("epsilon", 1e-5))))
    y = graph.emit("Reshape", graph.emit("Div", y, graph.emit("Sqrt", spread)), shape)
    _affine(graph, node, y, [_column(graph, name, rank) for name in node.inputs[1:] if name])
    return True


_CHANGES: dict[str, _Change] = {
    "Conv": _contract,
    "ConvTranspose": _contract,
    "Einsum": _einsum,
    "GRU": _recurrent,
    "Gemm": lambda masks, node: masks.apply(node, 0, [0 if node.attrs.get("transA") else 1]),
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LSTM": _recurrent,
    "LayerNormalization": _layer_norm,
    "MatMul": lambda masks, node: masks.apply(node, 0, [-1]),
    "RMSNormalization": _layer_norm,
    "RNN": _recurrent,
    "ReduceMean": _mean,
    **dict.fromkeys(ADDING, _sum),
}
