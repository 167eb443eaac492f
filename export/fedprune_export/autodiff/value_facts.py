"""What is known of a model's values before a training graph is written: their axes, constants and sizes.

The axes are from the channel analysis (`channels.analysis`). Constants, and what a model computes from sizes alone, are
from the trace (`ir.trace`), which has every shape at two batch sizes: what is equal in both doesn't depend on the
batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ModelError
from fedprune.model.architecture import Axis, TensorSpec
from fedprune_export.autodiff.dimensions import BATCH, Dim, Dimensions, Shape
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.trace import TRACE_BATCHES, Trace
from fedprune_export.pruning.model import Model

Array = npt.NDArray[Any]


class ValueFacts(Dimensions):
    """Facts about a model's values, by their names in its graph (`source`), in dimensions of the training graph."""

    def __init__(self, model: Model, graph: Graph) -> None:
        super().__init__(graph)
        self._model = model
        self.source = model.graph
        self._architecture = model.architecture
        self._analysed = model.values
        # Nodes that compute with sizes and constants only, by their outputs; the tape enters them as it meets them.
        self._arithmetic: dict[str, Node] = {}

    def is_width(self, dim: Dim) -> bool:
        """Whether a size follows from the batch and the widths of channel groups."""
        widths = {BATCH, *(g.name for g in self._architecture.groups)}
        return all(symbol in widths for monomial in self.polynomial(dim) for symbol in monomial)

    def analysed_shape(self, name: str) -> tuple[Dim | None, ...] | None:
        """A value's dimensions by the channel analysis, None for an axis that follows the batch.

        None for a value that was not analysed.
        """
        axes = self._analysed.get(name)
        if axes is None:
            return None
        return tuple(None if a is None else self.axis_dim(a, self._architecture) for a in axes)

    def axis(self, name: str, index: int) -> Axis | None:
        """The axis of a value at full width; None where it follows the batch or was not analysed."""
        axes = self._analysed.get(name)
        return axes[index] if axes is not None else None

    def is_tensor(self, name: str) -> bool:
        """Whether a name is that of a weight or statistic of the model, and not of a constant."""
        return name in self._architecture.by_name

    def is_number(self, name: str) -> bool:
        """Whether a value is one constant number, without axes."""
        constant = self.source.initializers.get(name)
        return constant is not None and not constant.ndim and not self.is_tensor(name)

    def constant(self, node: Node, index: int) -> Array | None:
        """The constant at a node's input, None where it is computed from data or a parameter, or is not there."""
        if index >= len(node.inputs) or not node.inputs[index]:
            return None
        name = node.inputs[index]
        if name in self._arithmetic or (name in self.source.initializers and not self.is_tensor(name)):
            return self.required_constant(node, index)
        return None

    def required_constant(self, node: Node, index: int) -> Array | None:
        """The constant at a node's input, None where there is no such input.

        Raises `ModelError` if the input is computed from data, or depends on the batch.
        """
        numbers = self._traced_numbers(node, index)
        if numbers is None:
            return None
        first, second = numbers
        if np.any(first != second):
            raise ModelError(
                f"{describe(node)}: input {index} depends on the batch",
                expected="a constant",
                hint="Only the target of a Reshape may.",
            )
        return first

    def size_input(self, node: Node, index: int) -> Shape | None:
        """The sizes at a node's input, which may follow the batch; None where there is no such input.

        Raises `ModelError` if the input is computed from data, or a size follows the batch in another way than
        a · N + b.
        """
        numbers = self._traced_numbers(node, index)
        if numbers is None:
            return None
        pairs = zip(*(n.reshape(-1).tolist() for n in numbers), strict=True)
        return tuple(self._linear_size(node, *pair) for pair in pairs)

    def _traced_numbers(self, node: Node, index: int) -> tuple[Array, Array] | None:
        """A constant or the result of shape arithmetic at a node's input, at both traced batch sizes."""
        if index >= len(node.inputs) or not node.inputs[index]:
            return None
        name = node.inputs[index]
        if name in self.source.initializers and not self.is_tensor(name):
            return (self.source.initializers[name],) * 2
        first, second = self._trace.integers.get(name), self._trace.integers_second.get(name)
        if first is None or second is None or first.shape != second.shape:
            raise ModelError(f"{describe(node)}: input {index} is not constant")
        return first, second

    def output_shape(self, node: Node, index: int = 0) -> Shape:
        """The shape of a node's output by the analysis, and by the trace along axes that follow the batch.

        There a size is as at full width; it raises `ModelError` if that is no a · N + b.
        """
        name = node.outputs[index]
        first, second = self._trace.shapes[name], self._trace.shapes_second[name]
        analysed = self.analysed_shape(name) or (None,) * len(first)
        return tuple(
            self._linear_size(node, *sizes) if d is None else d
            for d, *sizes in zip(analysed, first, second, strict=True)
        )

    def _linear_size(self, node: Node, first: int, second: int) -> Dim:
        """The size a · N + b that has these numbers at the traced batch sizes."""
        slope, rest = divmod(second - first, TRACE_BATCHES[1] - TRACE_BATCHES[0])
        if rest:
            raise ModelError(f"{describe(node)}: a size is no linear form of the batch", got=f"{first}, {second}")
        return self.total([self.product([BATCH, slope]), first - slope * TRACE_BATCHES[0]])

    def tensor_shape(self, spec: TensorSpec) -> Shape:
        return tuple(self.axis_dim(axis, self._architecture) for axis in spec.axes)

    @property
    def _trace(self) -> Trace:
        return self._model.trace  # made when it is first needed: some models have none


def describe(node: Node) -> str:
    return f"node {node.name or node.outputs[0]} ({node.op})"
