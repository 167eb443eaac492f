"""A fused node as rules see it: what they read of it, and how they write the operators that it stands for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from onnx import helper

from fedprune.core.errors import ModelError
from fedprune_export.ir.graph import Array, Graph, Node, node_label
from fedprune_export.ir.operators import registrar
from fedprune_export.ir.shape_inference import InferredShapes

UNFUSED_HINT = "Give the file as it was before it was optimised, or optimise it without this fusion."


@dataclass(frozen=True)
class FusedNode:
    """One fused node, and the graph that its operators are written to, in the forms of opset 17.

    Attributes:
        read_values: Values of the file that a node reads, and its outputs.
        shapes: Shapes, types and small numbers of the values before the node, at some batch size.
    """

    node: Node
    graph: Graph
    shapes: InferredShapes
    read_values: frozenset[str]

    # -- what rules read ---------------------------------------------------------------------------------------------

    def input(self, position: int) -> str:
        """The name of an input; empty where it is left out."""
        return self.node.inputs[position] if position < len(self.node.inputs) else ""

    def output(self, position: int) -> str:
        """The name of an output; empty where nothing reads it."""
        name = self.node.outputs[position] if position < len(self.node.outputs) else ""
        return name if name in self.read_values else ""

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes.shapes[name]

    def rank(self, name: str) -> int:
        return len(self.shape(name))

    def constant_value(self, position: int, what: str) -> Array | None:
        """The numbers at an input, which mustn't depend on data; None where it is left out."""
        name = self.input(position)
        if name and name not in self.graph.initializers and name not in self.shapes.numbers:
            self.refuse(f"its {what} depend on the data", f"constant {what}")
        value = self.graph.initializers.get(name)
        return self.shapes.numbers.get(name) if value is None else value

    def refuse(self, reason: str, expected: str | None = None, hint: str = UNFUSED_HINT) -> NoReturn:
        raise ModelError(f"{node_label(self.node)} can't be taken apart: {reason}", expected=expected, hint=hint)

    # -- what rules write --------------------------------------------------------------------------------------------

    def emit(self, op: str, *inputs: str, out: str = "", **attrs: object) -> str:
        """Append an operator with one output."""
        return self.graph.emit(op, *inputs, attrs=attrs, out=out or None)

    def split(self, value: str, sizes: Sequence[int], axis: int) -> list[str]:
        return self.graph.emit_many("Split", value, self.graph.ints(*sizes), outputs=len(sizes), attrs={"axis": axis})

    def number(self, value: float, like: str) -> str:
        """A constant of the type of another value."""
        return self.graph.constant(value, self.shapes.dtypes[like])

    def sum(self, *values: str, out: str = "") -> str:
        """The sum of those values that aren't left out."""
        first, *others = [v for v in values if v]
        if not others:
            return self.emit("Identity", first, out=out) if out else first
        for value in others[:-1]:
            first = self.emit("Add", first, value)
        return self.emit("Add", first, others[-1], out=out)

    def as_type(self, value: str, dtype: type[np.generic]) -> str:
        return self.emit("Cast", value, to=int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype))))


Rule = Callable[[FusedNode], None]

# What each fused operator stands for, by its name in onnxruntime's domain.
RULES: dict[str, Rule] = {}
rule = registrar(RULES, "decomposition")
