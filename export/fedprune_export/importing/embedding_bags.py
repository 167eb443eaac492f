"""Recognises loops over the bags of an EmbeddingBag, and writes each as a lookup and a sum, mean or maximum.

Neither of torch's exporters has an operator for it: they flatten the identifiers [n, length] and repeat a body for each
row, whose number depends on the batch. Like every import, the result is compared with onnxruntime's run of the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from fedprune.core.errors import ModelError
from fedprune_export.importing.graph_writer import GraphWriter
from fedprune_export.importing.node_order import inner_graphs
from fedprune_export.ir.graph import read_tensor

_REDUCTIONS = ("ReduceMax", "ReduceMean", "ReduceSum")  # a body of a mean has a sum, too

# The first opset in which the axes of a maximum and a mean are an input; those of a sum are one from 13 on.
_AXES_INPUT_OPSET = 18

_TRIAL_ROWS = (3, 5)

_MAX_STEPS = 20  # from a reduction back to the table; a bag's has at most 8


def without_embedding_bags(model: onnx.ModelProto, opset: int) -> int:
    """Write loops over bags as lookups; the model is changed. Other loops stay. Returns how many it were."""
    writer = _EmbeddingBags(model, opset)
    writer.write()
    return writer.count


@dataclass(frozen=True)
class _Bag:
    """What a loop computes: a reduction over rows `table[ids]`, each times its weight if there are weights."""

    reduction: str
    table: str
    ids: str  # [n, length]
    weights: str  # [n, length], or empty


class _EmbeddingBags(GraphWriter):
    """Replaces a loop by its lookup: where its rows are stacked, or behind it, where they are concatenated."""

    def __init__(self, model: onnx.ModelProto, opset: int) -> None:
        super().__init__(model, opset)
        self._sequences: dict[str, _Bag] = {}
        self.count = 0
        self._read_counts: dict[str, int] = {}
        for node in _all_nodes(model.graph):
            for name in node.input:
                self._read_counts[name] = self._read_counts.get(name, 0) + 1
        for output in model.graph.output:
            self._read_counts[output.name] = self._read_counts.get(output.name, 0) + 1

    def rewrite_node(self, node: onnx.NodeProto) -> Sequence[onnx.NodeProto]:
        if node.op_type == "ConcatFromSequence" and node.input[0] in self._sequences:
            return self._lookup(self._sequences[node.input[0]], node.output[0])
        bag = None
        if node.op_type == "Loop" and node.domain in ("", "ai.onnx"):
            # Other loops may hold operators without the inputs that those of a bag have.
            with suppress(IndexError, ValueError):
                bag = self._match(node)
        read = [o for o in node.output if o and self._read_counts.get(o)]
        if bag is None or len(read) != 1:
            return [node]
        readers = [n for n in self._graph.node if read[0] in n.input]
        if any(n.op_type == "SequenceInsert" for n in _all_nodes(_body(node))):
            if [n.op_type for n in readers] != ["ConcatFromSequence"] or read[0] in self._sequences:
                return [node]
            self._sequences[read[0]] = bag
            return []
        return self._lookup(bag, read[0])

    def _lookup(self, bag: _Bag, target: str) -> list[onnx.NodeProto]:
        self.count += 1
        rows = self._names.fresh(f"{target}.rows")
        nodes = [helper.make_node("Gather", [bag.table, bag.ids], [rows], axis=0)]
        if bag.weights:
            column, product = self._names.fresh(f"{target}.column"), self._names.fresh(f"{target}.product")
            nodes += self._nodes_with_list("Unsqueeze", bag.weights, "axes", [2], [column])
            nodes.append(helper.make_node("Mul", [rows, column], [product]))
            rows = product
        if bag.reduction == "ReduceSum" or self._opset >= _AXES_INPUT_OPSET:
            return nodes + self._nodes_with_list(bag.reduction, rows, "axes", [1], [target], keepdims=0)
        return [*nodes, helper.make_node(bag.reduction, [rows], [target], axes=[1], keepdims=0)]

    def _match(self, loop: onnx.NodeProto) -> _Bag | None:
        """The bag that a loop computes; None if it is another loop."""
        inner = {o: n for n in _all_nodes(_body(loop)) for o in n.output if o}
        reductions = [n for n in inner.values() if n.op_type in _REDUCTIONS]
        if not reductions or any(n.op_type == "Loop" for n in inner.values()):
            return None
        # Products within the loop and before it.
        operations = {n.op_type for n in reductions}
        name, weights, offsets, table = reductions[0].input[0], "", "", ""
        for _ in range(_MAX_STEPS):
            node = inner.get(name) or self._maker(name)
            if node is None:
                return None
            if node.op_type == "Mul":
                sides = [self._weight_rows(inner, side) for side in node.input]
                side = next((i for i, flat in enumerate(sides) if flat is not None), None)
                if side is None or weights:
                    return None
                weights, name = sides[side] or "", node.input[1 - side]
            elif node.op_type == "Slice" and node.output[0] in inner:
                offsets, name = node.input[1], node.input[0]
                if table:
                    break
            elif node.op_type == "Gather" and not table:
                table, name = node.input
                if offsets:
                    break
            elif node.op_type in ("Cast", "Identity"):
                name = node.input[0]
            elif node.op_type == "If":  # the last bag may be told from the others
                branch = next((a.g for a in node.attribute if a.name == "else_branch"), onnx.GraphProto())
                name = branch.output[0].name
            else:
                return None
        else:
            return None
        for _ in range(_MAX_STEPS):
            if offsets in inner:
                offsets = inner[offsets].input[0]
        ids = self._matrix(name)
        if ids is None or not self._are_rows(ids, offsets):
            return None
        matrix = self._matrix(weights) if weights else ""
        return None if matrix is None else _Bag(min(operations, key=_REDUCTIONS.index), table, ids, matrix)

    def _weight_rows(self, inner: dict[str, onnx.NodeProto], name: str) -> str | None:
        """The flat weights that an operand [rows, 1] holds, empty if all are 1; None if it holds something else."""
        node = inner.get(name) or self._maker(name)
        if node is None or node.op_type != "Unsqueeze":
            return None
        flat: str = node.input[0]
        if flat in inner and inner[flat].op_type == "Slice":
            flat = inner[flat].input[0]
        maker = self._maker(flat)
        if maker is not None and maker.op_type == "Expand":
            one = self._tensors.get(maker.input[0])
            return "" if one is not None and bool((read_tensor(one) == 1).all()) else None
        return flat

    def _matrix(self, flat: str) -> str | None:
        """The value [n, length] that a flat one was reshaped from."""
        name = flat
        for _ in range(_MAX_STEPS):
            shape, node = self._shape(name), self._maker(name)
            if shape is not None and len(shape) == 2:
                return name
            if node is None or node.op_type not in ("Cast", "Identity", "Reshape"):
                break
            name = node.input[0]
        return None

    def _are_rows(self, ids: str, offsets: str) -> bool:
        """Whether offsets are where the rows of a matrix begin."""
        rows, length = self._shape(ids) or [None, None]
        try:
            for count in _TRIAL_ROWS if rows is None else (rows,):
                starts = self._value_at_size(offsets, count)
                expected = np.arange(count) * length if length else None
                if starts is None or expected is None or starts.reshape(-1)[:count].tolist() != expected.tolist():
                    return False
        except ModelError:
            return False
        return True


def _body(loop: onnx.NodeProto) -> onnx.GraphProto:
    return next((a.g for a in loop.attribute if a.name == "body"), onnx.GraphProto())


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes of a graph, and of graphs within."""
    for node in graph.node:
        yield node
        for inner in inner_graphs(node):
            yield from _all_nodes(inner)
