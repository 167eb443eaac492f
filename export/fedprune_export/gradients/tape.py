"""The tape: a forward pass in training mode, written node by node, and the pull-backs that reverse it.

Every operator has one *rule*: it writes the operator's forward into the training graph, says what shape comes out,
and returns the pull-back that turns the output's gradient into gradients of the inputs. Shapes are symbolic in the
batch and in every channel dimension, so that what is written serves all widths of an architecture; a rule that would
need a channel count as a number raises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.architecture import FIXED, Architecture, Axis, TensorSpec
from fedprune.errors import ModelError
from fedprune_export.graph import Graph, Node, Port
from fedprune_export.imported import Model
from fedprune_export.trace import BATCHES, Trace, trace

Array = npt.NDArray[Any]
Dim = int | str
Shape = tuple[Dim, ...]

BATCH = "N"
"""The name of the batch dimension."""

_BATCH_EXTENT = 1_000_003
"""Stands for the batch where sizes are matched by arithmetic: a prime that no model's dimension is a multiple of."""

Pull = Callable[..., None]
"""Takes the gradients of a node's outputs (None where there is none) and adds those of its inputs."""

Rule = Callable[["Tape", Node], "Pull | None"]

RULES: dict[str, Rule] = {}
"""Rules by operator."""


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Register a rule for these operators."""

    def register(function: Rule) -> Rule:
        for operator in operators:
            RULES[operator] = function
        return function

    return register


class Tape:
    """A training graph in the making.

    Args:
        model: The model to differentiate.
        graph: The graph that is written to.
    """

    def __init__(self, model: Model, graph: Graph) -> None:
        self.graph = graph
        self._source = model.graph
        self._architecture = model.architecture
        self._values: dict[str, str] = {}
        self._shapes: dict[str, Shape] = {}
        self._extents: dict[str, int] = {BATCH: _BATCH_EXTENT}
        self._wanted: set[str] = set()
        self._gradients: dict[str, list[str]] = {}
        self._pulls: list[tuple[Node, Pull]] = []
        self._shape_values: dict[str, str] = {}
        self._arithmetic: set[str] = set()
        self._readers = model.graph.consumers()
        self._producers = model.graph.producers()

    # -- values -----------------------------------------------------------------------------------------------------

    def enter(self, name: str, value: str, shape: Shape, *, wanted: bool = False) -> None:
        """Make a value of the model known: what it is called in the training graph, and its shape."""
        self._values[name] = value
        self._shapes[name] = shape
        if wanted:
            self._wanted.add(name)

    def tensor_shape(self, spec: TensorSpec) -> Shape:
        """The symbolic shape of a tensor of the architecture."""
        out: list[Dim] = []
        for axis in spec.axes:
            dim = axis_name(axis, self._architecture)
            out.append(self.symbol(dim, axis.length) if isinstance(dim, str) else dim)
        return tuple(out)

    def symbol(self, name: str, extent: int) -> Dim:
        """A dimension whose size varies, and its size at full width."""
        self._extents[name] = extent
        return name

    def value(self, name: str) -> str:
        """What a value of the model is called in the training graph; constants are copied on first use."""
        if name not in self._values:
            array = self._source.initializers.get(name)
            if array is None:
                raise ModelError(f"value {name} is read before it is computed")
            self._values[name] = self.graph.constant(array, array.dtype)
            self._shapes[name] = array.shape
        return self._values[name]

    def shape(self, name: str) -> Shape:
        """Symbolic shape of a value of the model."""
        self.value(name)
        return self._shapes[name]

    def is_tensor(self, name: str) -> bool:
        """Whether a value is a weight or statistic."""
        return name in self._architecture.by_name

    def number(self, node: Node, index: int) -> Array | None:
        """The constant at a node's input, None where there is no such input.

        Raises:
            ModelError: The input is computed from data, or depends on the batch.
        """
        number = self._traced(node, index)
        if number is None:
            return None
        out, changing = number
        if changing.any():
            raise ModelError(
                f"{describe(node)}: input {index} depends on the batch",
                expected="a constant",
                hint="Only the target of a Reshape may.",
            )
        return out

    def target_shape(self, node: Node, index: int) -> Array | None:
        """The target shape at a node's input with multiples of the batch at its `extent`, None where there is none.

        Raises:
            ModelError: The input is computed from data, or depends on the batch in another way than as a multiple.
        """
        number = self._traced(node, index)
        if number is None:
            return None
        out, changing = number
        if not changing.any():
            return out
        times, rest = np.divmod(out, BATCHES[0])
        second = self._trace.integers_second[node.inputs[index]]
        if np.any(changing & ((rest != 0) | (second != times * BATCHES[1]))):
            raise ModelError(
                f"{describe(node)}: its target shape is no multiple of the batch", got=f"{out} of {BATCHES[0]} samples"
            )
        return np.where(changing, times * _BATCH_EXTENT, out)

    def _traced(self, node: Node, index: int) -> tuple[Array, npt.NDArray[np.bool_]] | None:
        """A constant or the result of shape arithmetic, and where it depends on the batch."""
        if index >= len(node.inputs) or not node.inputs[index]:
            return None
        name = node.inputs[index]
        if name in self._source.initializers and not self.is_tensor(name):
            constant = self._source.initializers[name]
            return constant, np.zeros(constant.shape, np.bool_)
        first, second = self._trace.integers.get(name), self._trace.integers_second.get(name)
        if first is None or second is None or first.shape != second.shape:
            raise ModelError(f"{describe(node)}: input {index} is not constant")
        return first, np.asarray(first != second)

    @cached_property
    def _trace(self) -> Trace:
        return trace(self._source)

    def producer(self, name: str) -> Node | None:
        """The node that makes a value, None for inputs and weights."""
        return self._producers.get(name)

    def only_reader(self, name: str) -> Node | None:
        """The one node that reads a value, None where there are more or it is an output."""
        readers = self._readers.get(name, [])
        if len(readers) != 1 or any(p.name == name for p in self._source.outputs):
            return None
        return readers[0][0]

    # -- dimensions -------------------------------------------------------------------------------------------------

    def extent(self, dim: Dim) -> int:
        """A dimension's size at full width (for the batch a large prime)."""
        return dim if isinstance(dim, int) else self._extents[dim]

    def product(self, dims: Sequence[Dim]) -> Dim:
        """The dimension that merging these gives."""
        symbols = [d for d in dims if isinstance(d, str)]
        factor = math.prod(d for d in dims if isinstance(d, int))
        if not symbols:
            return factor
        name = "*".join(symbols) + (f"*{factor}" if factor != 1 else "")
        return self.symbol(name, math.prod(self._extents[s] for s in symbols) * factor)

    def total(self, dims: Sequence[Dim]) -> Dim:
        """The dimension that concatenating these gives."""
        if all(isinstance(d, int) for d in dims):
            return sum(self.extent(d) for d in dims)
        name = "+".join(map(str, dims))
        return self.symbol(name, sum(self.extent(d) for d in dims))

    def static(self, node: Node, dims: Sequence[Dim]) -> tuple[int, ...]:
        """These dimensions as numbers.

        Raises:
            ModelError: One of them is a channel or batch dimension.
        """
        if not all(isinstance(d, int) for d in dims):
            raise ModelError(
                f"{describe(node)} needs a fixed size where the batch or a channel dimension varies",
                got=list(dims),
                hint="One training graph serves all widths; this operator can't be a part of it.",
            )
        return tuple(d for d in dims if isinstance(d, int))

    def broadcast(self, node: Node, *shapes: Shape) -> Shape:
        """The shape to which these broadcast.

        Raises:
            ModelError: They don't, or a constant spans a channel dimension.
        """
        rank = max(map(len, shapes))
        out: list[Dim] = []
        for column in zip(*[(1,) * (rank - len(s)) + s for s in shapes], strict=True):
            best: Dim = 1
            for dim in column:
                if dim == 1 or dim == best:
                    continue
                same_kind = isinstance(best, int) == isinstance(dim, int)
                if best != 1 and not (same_kind and self.extent(best) == self.extent(dim)):
                    raise ModelError(
                        f"{describe(node)}: a fixed size meets a channel dimension", expected=best, got=dim
                    )
                best = dim
            out.append(best)
        return tuple(out)

    def shape_of(self, value: str) -> str:
        """A node that gives the run-time shape of a value of the training graph."""
        if value not in self._shape_values:
            self._shape_values[value] = self.graph.emit("Shape", value)
        return self._shape_values[value]

    # -- forward ----------------------------------------------------------------------------------------------------

    def wants(self, name: str) -> bool:
        """Whether the gradient of a value is needed."""
        return name in self._wanted

    def forward(self) -> None:
        """Write the forward pass of all nodes.

        Raises:
            ModelError: An operator has no rule, or its rule can't handle this use.
        """
        for node in self._source.nodes:
            if self._is_shape_arithmetic(node):
                continue
            function = RULES.get(node.op) if node.domain in ("", "ai.onnx") else None
            if function is None:
                raise ModelError(
                    f"{describe(node)} has no gradient rule",
                    expected=", ".join(sorted(RULES)),
                    hint="Replace the operator, or add a rule for it.",
                )
            pull = function(self, node)
            if any(self.wants(i) for i in node.inputs if i):
                self._wanted.update(o for o in node.outputs if o)
                if pull is not None:
                    self._pulls.append((node, pull))

    def _is_shape_arithmetic(self, node: Node) -> bool:
        """Nodes that only compute with shapes are not copied: rules look their results up in a trace."""
        inputs = [i for i in node.inputs if i]
        derived = any(i in self._arithmetic for i in inputs) and all(
            i in self._arithmetic or (i in self._source.initializers and not self.is_tensor(i)) for i in inputs
        )
        if node.op in ("Shape", "Size") or derived:
            self._arithmetic.update(node.outputs)
            return True
        return False

    # -- backward ---------------------------------------------------------------------------------------------------

    def add(self, name: str, gradient: str) -> None:
        """Add to the gradient of a value of the model."""
        self._gradients.setdefault(name, []).append(gradient)

    def gradient(self, name: str) -> str | None:
        """The whole gradient of a value; call it when everything that reads the value has been pulled back."""
        parts = self._gradients.get(name)
        if not parts:
            return None
        while len(parts) > 1:
            parts[:2] = [self.graph.emit("Add", parts[0], parts[1])]
        return parts[0]

    def backward(self) -> None:
        """Write the backward pass from the gradients that were added to the model's outputs."""
        for node, pull in reversed(self._pulls):
            gradients = [self.gradient(o) if o else None for o in node.outputs]
            if any(gradients):
                pull(*gradients)

    def reduced(self, gradient: str, shape: Shape, target: Shape) -> str:
        """A gradient of `shape` summed over the axes along which `target` was broadcast."""
        lead = len(shape) - len(target)
        axes = list(range(lead))
        axes += [i + lead for i, d in enumerate(target) if d == 1 and shape[i + lead] != 1]
        if axes:
            gradient = self.graph.emit("ReduceSum", gradient, self.graph.ints(*axes), attrs={"keepdims": 1})
        if lead:
            gradient = self.graph.emit("Squeeze", gradient, self.graph.ints(*range(lead)))
        return gradient


def axis_name(axis: Axis, architecture: Architecture) -> Dim:
    """A dimension's name: by its channel groups, or its size where it is fixed."""
    if not axis.groups:
        return axis.length
    parts = []
    for s in axis.segments:
        if s.group == FIXED:
            parts.append(str(s.length))
            continue
        group = architecture.groups[s.group]
        span = "" if s.count == group.size else f"[{s.start}:{s.start + s.count}]"
        parts.append(f"{group.name}{span}" + (f"*{s.inner}" if s.inner != 1 else ""))
    return "+".join(parts)


def describe(node: Node) -> str:
    """A node in words, for messages."""
    return f"node {node.name or node.outputs[0]} ({node.op})"


def port(name: str, shape: Shape, dtype: npt.DTypeLike = np.float32) -> Port:
    """An input or output of the training graph."""
    return Port(name, np.dtype(dtype), tuple(shape))


def sample_shape(graph: Graph) -> Shape:
    """The shape of the model's input, with the batch's name.

    Raises:
        ModelError: It has free dimensions besides the batch.
    """
    source = graph.inputs[0]
    sizes = [d for d in source.shape[1:] if isinstance(d, int)]
    if len(sizes) + 1 != len(source.shape):
        raise ModelError(
            f"input {source.name} has free dimensions besides the batch",
            expected="fixed sizes from the second dimension on",
            got=list(source.shape),
        )
    return (BATCH, *sizes)
