"""Shapes in a training graph: broadcasting, reshaping and summing values whose sizes vary with batch and widths.

The gradient rules of operators call these. They write constants where sizes are fixed, and compute the others at run
time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedprune.core.errors import ModelError
from fedprune.planning.probe_report import CUDA
from fedprune_export.autodiff.dimensions import Dim, Shape
from fedprune_export.autodiff.tape_values import TapeValues
from fedprune_export.autodiff.value_facts import describe
from fedprune_export.ir.graph import Node


class TapeShapes(TapeValues):
    """The values of a training graph, and operations on their shapes."""

    def static(self, node: Node, dims: Sequence[Dim]) -> tuple[int, ...]:
        """The dimensions as numbers. Raises `ModelError` if one of them is a channel or batch dimension."""
        if not all(isinstance(d, int) for d in dims):
            raise ModelError(
                f"{describe(node)} needs a fixed size where the batch or a channel dimension varies",
                got=list(dims),
                hint="One training graph serves all widths; this operator can't be a part of it.",
            )
        return tuple(d for d in dims if isinstance(d, int))

    def block_layout(self, node: Node, name: str, index: int, count: int) -> tuple[Dim, Dim]:
        """How many blocks an axis has at every width, and how long each is; at full width there are `count`.

        Either whole blocks are cut, so that their number varies, or the same positions of every block, so that their
        length does. Raises `ModelError` otherwise.
        """
        dim = self.shape(name)[index]
        length, rest = divmod(self.extent(dim), count)
        axis = self.axis(name, index)
        if not rest:
            if isinstance(dim, int):
                return count, length
            ends = [self.kept_prefix(axis, i * length) for i in range(count + 1)] if axis is not None else [None]
            first = ends[1] if len(ends) > 1 else None
            if first is not None and all(e == self.product([i, first]) for i, e in enumerate(ends)):
                return count, first
            number = self.quotient(dim, length)
            if number is not None:
                return number, length
        raise ModelError(f"{describe(node)}: its blocks are cut unevenly", expected=f"{count} equal blocks", got=dim)

    def reshape(self, value: str, shape: Shape, target: Shape) -> str:
        """Reshape a value from `shape` to `target`, by a constant where sizes allow it."""
        if shape == target:
            return value
        # Reshape copies the input's size for an entry of 0, and computes one entry of -1.
        entries = [d if isinstance(d, int) else 0 if shape[i : i + 1] == (d,) else -1 for i, d in enumerate(target)]
        varying = [i for i, e in enumerate(entries) if e == -1]
        if len(varying) > 1:
            # All but one are computed; numbers side by side are one constant.
            segments: list[str] = []
            numbers: list[int] = []
            for i, entry in enumerate(entries):
                if i in varying[1:]:
                    segments += ([self.graph.ints(*numbers)] if numbers else []) + [self.size(target[i])]
                    numbers = []
                else:
                    numbers.append(entry)
            segments += [self.graph.ints(*numbers)] if numbers else []
            return self.graph.emit("Reshape", value, self.graph.emit("Concat", *segments, attrs={"axis": 0}))
        return self.graph.emit("Reshape", value, self.graph.ints(*entries))

    def broadcast(self, node: Node, *shapes: Shape) -> Shape:
        """The shape that these shapes broadcast to. Raises `ModelError` if they don't fit each other at every width."""
        rank = max(map(len, shapes))
        shape: list[Dim] = []
        for column in zip(*[(1,) * (rank - len(s)) + s for s in shapes], strict=True):
            sizes = [d for d in dict.fromkeys(column) if d != 1]
            if len(sizes) > 1:
                raise ModelError(
                    f"{describe(node)}: sizes don't fit each other at every width", expected=sizes[0], got=sizes[1]
                )
            shape.append(sizes[0] if sizes else 1)
        return tuple(shape)

    def fit_to_width(self, node: Node, index: int, shape: Shape) -> str:
        """A node's input that scales or shifts a value whose last axes have `shape`, at the length of these axes.

        A constant with equal entries is written for every width; any other value is returned as it is.
        """
        name = node.inputs[index]
        constant = self.source.initializers.get(name)
        if constant is None or self.is_tensor(name) or not any(isinstance(d, str) for d in shape):
            return self.value(name)
        entries = constant.reshape(-1)
        if not entries.size or np.any(entries != entries[0]):
            return self.value(name)
        first = self.graph.constant(np.float32(entries[0]), np.float32)
        return self.graph.emit("Expand", first, self.sizes(shape[len(shape) - constant.ndim :]))

    def sum_leading(self, value: str, lead: Shape) -> str:
        """A value summed over its first axes, whose sizes are `lead`: [1, all others]."""
        g, rows = self.graph, self.product(lead)
        matrix = g.emit("Flatten", value, attrs={"axis": len(lead)})
        if g.unit == CUDA:
            return g.emit("ReduceSum", matrix, g.ints(0), attrs={"keepdims": 1})
        # onnxruntime's ReduceSum over leading axes takes up to twice as long as a product with a row of ones, and up to
        # twenty times as long once several threads share it.
        if rows not in self._ones:
            self.note_shape(matrix, (rows,))
            attrs = {"value": np.ones(1, np.float32)}
            self._ones[rows] = g.emit("ConstantOfShape", self.sizes((1, rows)), attrs=attrs)
        return g.emit("MatMul", self._ones[rows], matrix)

    def sum_to_shape(self, gradient: str, shape: Shape, target: Shape) -> str:
        """Sum a gradient of `shape` over the axes along which a value of shape `target` was broadcast to it."""
        lead = len(shape) - len(target)
        axes = list(range(lead))
        axes += [i + lead for i, d in enumerate(target) if d == 1 and shape[i + lead] != 1]
        if self.graph.unit != CUDA and axes == list(range(len(axes))) and 0 < len(axes) < len(shape):
            total = self.sum_leading(gradient, shape[: len(axes)])
            return self.reshape(total, (1, self.product(shape[len(axes) :])), target)
        if axes:
            gradient = self.graph.emit("ReduceSum", gradient, self.graph.ints(*axes), attrs={"keepdims": 1})
        if lead:
            gradient = self.graph.emit("Squeeze", gradient, self.graph.ints(*range(lead)))
        return gradient
