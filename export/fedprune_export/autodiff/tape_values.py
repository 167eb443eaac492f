"""The values of a model in a training graph: under which name each is written there, and with which symbolic shape.

The gradient rules of operators register what they write (`enter`) and read what was written before (`value`, `shape`).
Constants and shape arithmetic (nodes that compute with sizes and constants only) are copied when a rule first reads
them.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from fedprune.core.errors import ModelError
from fedprune_export.autodiff.dimensions import Dim, Shape
from fedprune_export.autodiff.value_facts import Array, ValueFacts
from fedprune_export.ir.dropout import is_dropout
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.pruning.model import Model


class TapeValues(ValueFacts):
    """The values that a training graph has so far.

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
        for output, value in zip(node.outputs, outputs, strict=True):
            if output:
                dims = self.analysed_shape(output)
                if dims is None or None in dims:
                    dims = self.traced_shape(output)
                self.enter(output, value, tuple(d for d in dims if d is not None))

    def shape(self, name: str) -> Shape:
        self.value(name)
        return self._shapes[name]

    def shape_of(self, value: str) -> str:
        """A node that gives the run-time shape of a value of the training graph."""
        if value not in self._shape_values:
            self._shape_values[value] = self.graph.emit("Shape", value)
        return self._shape_values[value]

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
