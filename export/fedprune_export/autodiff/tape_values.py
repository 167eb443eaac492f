"""The values of a model in a training graph: under which name each is written there, and with which symbolic shape.

The gradient rules of operators register what they write (`enter`) and read what was written before (`value`, `shape`).
Constants and shape arithmetic (nodes that compute with sizes and constants only) are copied when a rule first reads
them. Rules also broadcast, reshape and sum values whose sizes vary with batch and widths: constants are written where
sizes are fixed, and the others are computed at run time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from fedprune.core.errors import ModelError
from fedprune.model.architecture import FIXED, Axis
from fedprune.planning.probe_report import CUDA
from fedprune_export.autodiff.dimensions import Dim, Shape
from fedprune_export.autodiff.value_facts import Array, ValueFacts, describe
from fedprune_export.ir.dropout import is_dropout
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.pruning.model import Model


class TapeValues(ValueFacts):
    """The values that a training graph has so far, and operations on their shapes.

    `graph`: the training graph; `frozen`: names of tensors that don't train.
    """

    def __init__(self, model: Model, graph: Graph, frozen: Collection[str] = ()) -> None:
        super().__init__(model, graph)
        self.graph = graph
        self._frozen = frozenset(frozen)
        self._values: dict[str, str] = {}
        self._shapes: dict[str, Shape] = {}
        self._shape_values: dict[str, str] = {}
        self._ones: dict[Dim, str] = {}
        self._with_gradient: set[str] = set()
        self._readers = model.graph.consumers()
        self._producers = model.graph.producers()

    def is_frozen(self, name: str) -> bool:
        return name in self._frozen

    def needs_gradient(self, name: str) -> bool:
        return name in self._with_gradient

    def enter(self, name: str, value: str, shape: Shape, *, needs_gradient: bool = False) -> None:
        """Register a value of the model: its name in the training graph (`value`), and its shape."""
        self._values[name] = value
        self._shapes[name] = shape
        self.note_shape(value, shape)
        if needs_gradient and name not in self._frozen:
            self._with_gradient.add(name)

    def value(self, name: str) -> str:
        """The name of a model's value in the training graph; constants are copied on first use.

        A constant over channels is written as long as there are channels left, so that its entries along them must be
        equal. Raises `ModelError` if they aren't, or the value is not computed yet.
        """
        if name not in self._values:
            array = self.source.initializers.get(name)
            if array is None:
                self._copy_arithmetic(name)
            else:
                self._enter_constant(name, array)
        return self._values[name]

    def _enter_constant(self, name: str, array: Array) -> None:
        # A training graph computes in float32 only, whatever precision the model was saved in.
        if array.dtype in (np.float16, np.float64):
            array = array.astype(np.float32)
        analysed = self.analysed_shape(name)
        shape: Shape = (
            array.shape if analysed is None or None in analysed else tuple(d for d in analysed if d is not None)
        )
        varying = [i for i, d in enumerate(shape) if isinstance(d, str)]
        reduced_array = array
        for axis in varying:
            reduced_array = reduced_array.take([0], axis)
        if varying and not np.array_equal(np.broadcast_to(reduced_array, array.shape), array):
            raise ModelError(
                f"constant {name} has another number for each channel",
                expected="equal numbers along axes that are cut, or a parameter",
                got=f"axes {list(shape)}",
            )
        value = self.graph.constant(reduced_array, array.dtype)
        if varying:
            value = self.graph.emit("Expand", value, self.sizes(shape))
        self.enter(name, value, shape)

    def _copy_arithmetic(self, name: str) -> None:
        """Copy shape arithmetic that data is computed with, so that it computes with the sizes at run time."""
        node = self._arithmetic.get(name)
        if node is None:
            raise ModelError(f"value {name} is read before it is computed")
        inputs = [self.value(i) if i else "" for i in node.inputs]
        outputs = self.graph.emit_many(node.op, *inputs, outputs=len(node.outputs), attrs=node.attrs)
        for i, (output, value) in enumerate(zip(node.outputs, outputs, strict=True)):
            if output:
                self.enter(output, value, self.output_shape(node, i))

    def shape(self, name: str) -> Shape:
        self.value(name)
        return self._shapes[name]

    def shape_of(self, value: str) -> str:
        """A node that gives the run-time shape of a value of the training graph."""
        if value not in self._shape_values:
            self._shape_values[value] = self.graph.emit("Shape", value)
        return self._shape_values[value]

    def static(self, node: Node, dims: Sequence[Dim]) -> tuple[int, ...]:
        """The dimensions as numbers. Raises `ModelError` if one of them is a channel or batch dimension."""
        if not all(isinstance(d, int) for d in dims):
            raise ModelError(
                f"{describe(node)} needs a fixed size where the batch or a channel dimension varies",
                got=list(dims),
                hint="One training graph serves all widths; this operator can't be a part of it.",
            )
        return tuple(d for d in dims if isinstance(d, int))

    def kept_prefix(self, name: str, index: int, count: int) -> Dim | None:
        """How many of the first `count` indices of a value's axis a submodel keeps; None if widths don't say."""
        if isinstance(self.shape(name)[index], int):
            return count
        axis = self.axis(name, index)
        if axis is None:
            return None
        sizes: list[Dim] = []
        for s in axis.segments:
            if count <= 0:
                break
            if s.length <= count:
                sizes.append(self.axis_dim(Axis((s,)), self._architecture))
            elif s.group == FIXED:
                sizes.append(count)
            else:
                return None
            count -= s.length
        return self.total(sizes)

    def block_layout(self, node: Node, name: str, index: int, count: int) -> tuple[Dim, Dim]:
        """How many blocks an axis has at every width, and how long each is; at full width there are `count`.

        Either whole blocks are cut, so that their number varies, or the same positions of every block, so that their
        length does. Raises `ModelError` otherwise.
        """
        dim = self.shape(name)[index]
        length, rest = divmod(self.extent(dim), count)
        if not rest:
            ends = [self.kept_prefix(name, index, i * length) for i in range(count + 1)]
            first = ends[1]
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
        dims = [target[i] if i in varying[1:] else e for i, e in enumerate(entries)]
        return self.graph.emit("Reshape", value, self.sizes(dims))

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

    def producer(self, name: str) -> Node | None:
        """The node that makes a value, None for inputs and weights."""
        return self._producers.get(name)

    def only_reader(self, name: str) -> Node | None:
        """The only node that reads a value; None where there are more or it is an output."""
        readers = self._readers.get(name, [])
        if len(readers) != 1 or any(p.name == name for p in self.source.outputs):
            return None
        return readers[0][0]

    def _is_shape_arithmetic(self, node: Node) -> bool:
        """Whether a node only computes with shapes. It isn't copied: rules look its results up in a trace."""
        inputs = [i for i in node.inputs if i]
        derived = any(i in self._arithmetic for i in inputs) and all(
            i in self._arithmetic or (i in self.source.initializers and not self.is_tensor(i)) for i in inputs
        )
        # A value as long as there are channels is data, even if it is computed from sizes only, such as states of
        # zeros.
        has_width = any(isinstance(d, str) for o in node.outputs if o for d in self.analysed_shape(o) or ())
        if node.op in ("Shape", "Size") or (derived and not has_width and not is_dropout(node)):
            self._arithmetic.update(dict.fromkeys(node.outputs, node))
            return True
        return False
