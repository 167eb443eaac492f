"""Writes a quantised graph on floats: a table of rules says what is written in a quantised operator's place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from fedprune.core.errors import ModelError
from fedprune_export.ir.graph import Array, Graph, Node, node_label
from fedprune_export.ir.operators import REARRANGEMENTS
from fedprune_export.ir.trace import run_values

_AXIS_OPSET = 13  # from which on DequantizeLinear reads a scale for each channel

FLOAT_MODEL_HINT = (
    "Give the float32 model that it was made from, or quantise that one with quant_format=QuantFormat.QDQ "
    "(onnxruntime.quantization)."
)

# What means the same on integers as on the numbers that these stand for.
_REARRANGING = REARRANGEMENTS | {"Gather", "MaxPool", "Slice", "Split"}

_PRODUCTS = {"MatMulInteger": "MatMul", "ConvInteger": "Conv"}


def refuse(node: Node, reason: str) -> ModelError:
    """The error for a node of a quantised file that has no float form here."""
    return ModelError(f"the file is quantised, and {node_label(node)} {reason}", hint=FLOAT_MODEL_HINT)


@dataclass(frozen=True)
class Rounding:
    """A place where the file rounds a number to integers, and the float model doesn't.

    Attributes:
        steps: The file's operators from the number to what the integers stand for.
        range: The least and greatest number that the integers stand for; None if it follows from the numbers, differs
            by channel, or is that of a weight.
    """

    steps: list[Node]
    range: tuple[float, float] | None


class FloatWriter:
    """Writes the nodes of a quantised graph on floats.

    Attributes:
        graph: The graph that is written. A rounding is an Identity in it.
        roundings: The roundings, by the outputs of these.
        weights: The names of dequantised tensors.
    """

    def __init__(self, file: Graph) -> None:
        self.graph = file.copy_without_nodes()
        self.makers: dict[str, Node] = {}
        self.roundings: dict[str, Rounding] = {}
        self._aliases: dict[str, str] = {}  # by a value that isn't written, the number that stands for it
        self._numbers: dict[tuple[object, ...], str] = {}
        self._stems: dict[str, str] = {}  # by a dequantised tensor's name, the one that it had before the quantiser
        for original in file.nodes:
            node = original.copy()
            node.inputs = [self._aliases.get(i, i) for i in node.inputs]
            self.makers |= dict.fromkeys(node.outputs, node)
            RULES.get(node.op, FloatWriter.keep)(self, node)
        graph, names = self.graph, dict[str, str]()
        graph.prune()  # what computed integers
        taken = {*graph.initializers, *(p.name for p in graph.inputs), *(o for n in graph.nodes for o in n.outputs)}
        for name in [n for n in self._stems if n in graph.initializers]:
            names[name] = name if self._stems[name] in taken else self._stems[name]
            taken.add(names[name])
        graph.rename(names)
        self.weights = list(names.values())

    def keep(self, node: Node) -> None:
        """Write a node as it is."""
        self.graph.nodes.append(node)

    def constant(self, name: str) -> Array | None:
        """A tensor of the file, also behind Identity; None if the value is computed or left out."""
        while (node := self.makers.get(name)) is not None and node.op == "Identity":
            name = node.inputs[0]
        return self.graph.initializers.get(name)

    def end(self, node: Node, number: str) -> None:
        """Let a number stand for the output of a node."""
        if any(port.name == node.outputs[0] for port in self.graph.outputs):
            self.graph.emit("Identity", number, out=node.outputs[0])
        else:
            self._aliases[node.outputs[0]] = number

    def add_weight(self, integers: str, values: Array) -> str:
        """Store a dequantised tensor."""
        name = self.graph.fresh(integers)
        self.graph.initializers[name], self._stems[name] = values, integers.removesuffix("_quantized")
        return name

    def number(self, integers: str, scale: str, zero: str = "", axis: int = 1, block: int = 0) -> str:
        """The name of the numbers that integers stand for: (integer - zero point) · scale.

        Raises `ModelError` if the file gives them another meaning elsewhere, or computes them in a way that has no form
        on floats.

        Args:
            axis: The axis of channels or blocks, if the scale has several numbers.
            block: How many numbers along the axis share a scale; 0 if each channel has its own.
        """
        scales, stored, node = self.constant(scale), self.constant(integers), self.makers.get(integers)
        is_single = scales is not None and scales.size == 1
        key = (integers, scale, zero, *([] if is_single else [axis]))
        if key in self._numbers:
            return self._numbers[key]
        attrs = {} if scales is None or is_single else {"axis": axis, **({"block_size": block} if block else {})}
        reads = [integers, scale, *filter(None, [zero])]
        reader = Node("DequantizeLinear", reads, [self.graph.fresh(integers)], attrs)
        if scales is not None and not (
            scales.size and np.isfinite(scales).all() and (stored is not None or scales.all())
        ):
            raise refuse(next(n for n in self.makers.values() if scale in n.inputs), "has a scale of 0, or none")
        if stored is not None:
            values = self._run([reader], {})
            if values is None:
                raise refuse(reader, "has a scale that the file computes")
            number = self.add_weight(integers, values)
        elif node is None and is_single:
            number, *offset = (self.graph.emit("Cast", i, attrs={"to": onnx.TensorProto.FLOAT}) for i in reads[::2])
            number = self.graph.emit("Sub", number, *offset) if offset else number
            number = self.graph.emit("Mul", number, scale)
        elif node is not None and node.op in _REARRANGING and is_single:
            copy = node.copy()
            copy.inputs[0] = self.number(node.inputs[0], scale, zero)
            copy.outputs = [self.graph.fresh(o) for o in node.outputs]
            self.keep(copy)
            number = copy.outputs[node.outputs.index(integers)]
        else:
            number = self._pass(reader)
        self._numbers[key] = number
        return number

    def _pass(self, reader: Node) -> str:
        """The number that a rounding reads, which stands for its integers."""
        node = self.makers.get(reader.inputs[0], reader)
        # torch writes a Clip of integers for fewer of them than the type has.
        source = self.makers.get(node.inputs[0], node) if node.op == "Clip" else node
        if source.op not in ("QuantizeLinear", "DynamicQuantizeLinear"):
            raise refuse(node, "computes with integers")
        own = [*(source.inputs if source.op == "QuantizeLinear" else source.outputs)[1:3], ""]
        for one, other in zip(own, [*reader.inputs[1:], ""], strict=False):
            left, right = (self.constant(name) if name else np.zeros(()) for name in (one, other))
            if one != other and (left is None or right is None or (left != right).any()):
                raise refuse(node, "is read with another scale than it writes")
        read = source.inputs[0]
        value = self.graph.emit("Identity", read)
        steps = [source, node, reader] if node is not source else [source, reader]
        scale, ends = self.constant(reader.inputs[1]), None
        is_weight = self.constant(read) is not None
        if scale is not None and scale.size == 1 and source.op == "QuantizeLinear" and not is_weight:
            ends = self._run(steps, {read: np.array([-np.inf, np.inf], scale.dtype)})
        self.roundings[value] = Rounding(steps, None if ends is None else (float(ends.min()), float(ends.max())))
        return value

    def _run(self, nodes: list[Node], given: Mapping[str, Array]) -> Array | None:
        """What operators in a row make of constants; None if they read a value that the file computes."""
        made = {o for n in nodes for o in n.outputs}
        arrays = {i: given.get(i, self.constant(i)) for n in nodes for i in n.inputs if i and i not in made}
        constants = {name: array for name, array in arrays.items() if array is not None}
        if len(constants) < len(arrays):
            return None
        end, opset = nodes[-1].outputs[0], max(self.graph.opset, _AXIS_OPSET)
        return run_values(Graph(nodes=nodes, initializers=constants, opset=opset), [end], batch=1)[end]


def _dequantize(state: FloatWriter, node: Node) -> None:
    integers, scale, zero = [*node.inputs, ""][:3]
    axis, block = int(node.attrs.get("axis", 1)), int(node.attrs.get("block_size", 0))
    state.end(node, state.number(integers, scale, zero, axis, block))


def _scale_sums(state: FloatWriter, node: Node) -> None:
    """A product of integers whose sums are cast, and multiplied by the product of both scales."""
    for sums, scales in (node.inputs, node.inputs[::-1]):
        cast, factors = state.makers.get(sums), state.makers.get(scales)
        product = state.makers.get(cast.inputs[0]) if cast is not None and cast.op == "Cast" else None
        if product is None or product.op not in _PRODUCTS:
            continue
        if factors is None or factors.op != "Mul":
            raise refuse(node, "doesn't scale the sums by the product of both scales")
        (a, b), (a_zero, b_zero) = product.inputs[:2], [*product.inputs[2:], "", ""][:2]
        first = state.number(a, factors.inputs[0], a_zero)
        second = state.number(b, factors.inputs[1], b_zero, 0 if product.op == "ConvInteger" else -1)
        state.end(node, state.graph.emit(_PRODUCTS[product.op], first, second, attrs=product.attrs))
        return
    state.keep(node)


def _attention(state: FloatWriter, node: Node) -> None:
    """Input, weight, bias, scale of input, scale of weight, mask, zero point of both, past: onnxruntime's Attention,
    which has neither scales nor zero points, on integers."""
    x, weight, bias, x_scale, scale, mask, x_zero, zero, past = [*node.inputs, *[""] * 9][:9]
    numbers = state.number(x, x_scale, x_zero), state.number(weight, scale, zero, -1)
    state.keep(Node("Attention", [*numbers, bias, mask, past], node.outputs, node.attrs, node.name, node.domain))


def _lstm(state: FloatWriter, node: Node) -> None:
    """X, W, R, B, lengths, first states, P, and scale and zero point of W and of R. It rounds its states inside.

    W and R are [directions, features, 4 · units]; LSTM has their last two axes the other way round.
    """
    inputs = list(node.inputs)
    for position, parameters in ((1, node.inputs[8:10]), (2, node.inputs[10:12])):
        stored = [state.constant(name) for name in (inputs[position], *parameters)]
        integers, *scales = (array.astype(np.float64) for array in stored if array is not None)
        # A scale for each direction, or for each of its columns.
        scale, zero = (array.reshape(len(integers), 1, -1) for array in scales)
        numbers = np.ascontiguousarray(((integers - zero) * scale).swapaxes(1, 2), np.float32)
        inputs[position] = state.add_weight(inputs[position], numbers)
    state.keep(Node("LSTM", inputs[:8], node.outputs, node.attrs, node.name))


# Other operators stay as they are.
RULES: dict[str, Callable[[FloatWriter, Node], None]] = {
    "DequantizeLinear": _dequantize,
    "Mul": _scale_sums,
    "DynamicQuantizeLSTM": _lstm,
    "QAttention": _attention,
}
