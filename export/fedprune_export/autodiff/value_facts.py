"""What is known of a model's values before a training graph is written: their axes, constants and sizes.

The axes are from the channel analysis (`channels.analysis`). Constants, and what a model computes from sizes alone, are
from the trace (`ir.trace`), which has every shape at two batch sizes: what is equal in both doesn't depend on the
batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ModelError
from fedprune.model.architecture import FIXED, Axis, TensorSpec
from fedprune_export.autodiff.dimensions import BATCH, Dim, Dimensions, Shape
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.trace import BATCH_EXTENT, TRACE_BATCHES, Trace
from fedprune_export.pruning.model import Model

Array = npt.NDArray[Any]


class TracedConstant(NamedTuple):
    """The numbers of a constant at the first traced batch size, and which of them differ at the second."""

    numbers: Array
    follows_batch: npt.NDArray[np.bool_]


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

    def kept_prefix(self, axis: Axis, index: int) -> Dim | None:
        """How many of an axis's first `index` indices a submodel keeps, as a size; None if widths don't say."""
        sizes: list[Dim] = []
        for s in axis.segments:
            if index <= 0:
                break
            if s.length <= index:
                sizes.append(self.axis_dim(Axis((s,)), self._architecture))
            elif s.group == FIXED:
                sizes.append(index)
            else:
                return None
            index -= s.length
        return self.total(sizes)

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
        traced = self._traced_constant(node, index)
        if traced is None:
            return None
        if traced.follows_batch.any():
            raise ModelError(
                f"{describe(node)}: input {index} depends on the batch",
                expected="a constant",
                hint="Only the target of a Reshape may.",
            )
        return traced.numbers

    def target_shape(self, node: Node, index: int) -> Array | None:
        """The target shape at a node's input, with `BATCH_EXTENT` for the batch; None where there is no such input.

        Raises `ModelError` if the input is computed from data, or depends on the batch other than as a multiple.
        """
        traced = self._traced_constant(node, index)
        if traced is None:
            return None
        target, follows_batch = traced
        if not follows_batch.any():
            return target
        # Both batch sizes are primes: an entry that is the same multiple of both follows the batch.
        times, rest = np.divmod(target, TRACE_BATCHES[0])
        second = self._trace.integers_second[node.inputs[index]]
        if np.any(follows_batch & ((rest != 0) | (second != times * TRACE_BATCHES[1]))):
            raise ModelError(
                f"{describe(node)}: its target shape is no multiple of the batch",
                got=f"{target} of {TRACE_BATCHES[0]} samples",
            )
        return np.where(follows_batch, times * BATCH_EXTENT, target)

    def _traced_constant(self, node: Node, index: int) -> TracedConstant | None:
        """A constant or the result of shape arithmetic at a node's input, whether or not it follows the batch."""
        if index >= len(node.inputs) or not node.inputs[index]:
            return None
        name = node.inputs[index]
        if name in self.source.initializers and not self.is_tensor(name):
            constant = self.source.initializers[name]
            return TracedConstant(constant, np.zeros(constant.shape, np.bool_))
        first, second = self._trace.integers.get(name), self._trace.integers_second.get(name)
        if first is None or second is None or first.shape != second.shape:
            raise ModelError(f"{describe(node)}: input {index} is not constant")
        return TracedConstant(first, np.asarray(first != second))

    def traced_shape(self, name: str) -> Shape:
        """A value's shape where only the batch varies: every size is a · N + b for a batch of N.

        Raises `ModelError` if a size follows the batch in another way.
        """
        shape: list[Dim] = []
        first, second = self._trace.shapes[name], self._trace.shapes_second[name]
        for size, second_size in zip(first, second, strict=True):
            slope, rest = divmod(second_size - size, TRACE_BATCHES[1] - TRACE_BATCHES[0])
            if rest:
                raise ModelError(f"a size of value {name} is no linear form of the batch", got=f"{size}, {second_size}")
            shape.append(self.total([self.product([BATCH, slope]), size - slope * TRACE_BATCHES[0]]))
        return tuple(shape)

    def tensor_shape(self, spec: TensorSpec) -> Shape:
        return tuple(self.axis_dim(axis, self._architecture) for axis in spec.axes)

    @property
    def _trace(self) -> Trace:
        return self._model.trace  # made when it is first needed: some models have none


def describe(node: Node) -> str:
    return f"node {node.name or node.outputs[0]} ({node.op})"
