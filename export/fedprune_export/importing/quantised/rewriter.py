"""Writes a quantised graph on floats: what each integer stands for, where it is read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx

from fedprune_export.importing.quantised.numbers import Quantisation, dequantised, integer_range, refuse
from fedprune_export.importing.quantised.quantised_file import QuantisedFile
from fedprune_export.ir.graph import Array, Node, node_label

_CLIP_INPUTS_OPSET = 11  # from which on Clip takes its bounds as inputs

# Operators that only rearrange numbers, or choose among them, and their inputs that hold these (None: all). They mean
# the same on integers as on the numbers that these stand for.
_REARRANGING: dict[str, tuple[int, ...] | None] = {
    **dict.fromkeys(("DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity"), (0,)),
    **dict.fromkeys(("MaxPool", "Pad", "Reshape", "Resize", "Slice", "SpaceToDepth", "Split", "Squeeze"), (0,)),
    **dict.fromkeys(("Tile", "Transpose", "Unsqueeze", "Upsample"), (0,)),
    **dict.fromkeys(("Concat", "Max", "Min"), None),
    "Where": (1, 2),
}
# Operators whose result is no quantised number, and the same for integers and numbers.
_INDEXING = frozenset({"ArgMax", "ArgMin", "Shape", "Size"})


# How far the outputs of an operator that rounds inside may be from those of its float form, as a share of the largest:
# a recurrent layer rounds its state at every step, to 8 bits.
INNER_SHARE = 0.1

# How far the number that goes into a rounding may be from what the file has behind it, in steps: rounding itself moves
# it by half a step. An operator on integers rounds its intermediate results, too.
ROUNDING_STEPS, OPERATOR_STEPS = 0.5, 1.5


# Upper ends of usual clips: ReLU6, Clip to 1, and DeepSpeech's. Any other end is only the largest number that was seen.
_CLIP_ENDS = (1.0, 6.0, 20.0)
_END_TOLERANCE = 1e-5  # a scale in float32 gives the range's end to about 1e-7

# The least number that these operators can give, whatever they read.
_LEAST = {
    **dict.fromkeys(("Abs", "Exp", "HardSigmoid", "ReduceL1", "ReduceL2", "ReduceSumSquare", "Relu", "Sigmoid"), 0.0),
    **dict.fromkeys(("Softmax", "Softplus", "Sqrt", "ThresholdedRelu"), 0.0),
    **dict.fromkeys(("Cos", "Erf", "Sin", "Softsign", "Tanh"), -1.0),
}
# Operators whose output isn't less than their least input; the first input has the data of most.
_PASSING = frozenset(
    {"AveragePool", "Cast", "DepthToSpace", "Dropout", "Expand", "Flatten", "Gather", "GatherElements", "GatherND"}
    | {"GlobalAveragePool", "GlobalMaxPool", "Identity", "MaxPool", "ReduceMax", "ReduceMean", "ReduceMin", "Reshape"}
    | {"Resize", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
)
_PASSING_ALL = frozenset({"Concat", "Max", "Min"})


@dataclass(frozen=True)
class Rounding:
    """A place where the file rounds a number and the float model doesn't.

    Attributes:
        value: The number, in the float model.
        passed: The same number behind the rounding, which the float model reads instead of `integers`.
        integers: What the file has there; `quantisation` says what they stand for. Without one they are the file's own
            numbers, behind an operator that rounds inside.
        bounds: The least and greatest integer; None if the range follows from the numbers.
        steps: How far value and integers may be apart, in steps; without a quantisation, as a share of the largest.
    """

    value: str
    passed: str
    integers: str
    quantisation: Quantisation | None
    bounds: tuple[int, int] | None
    steps: float


@dataclass(frozen=True)
class Clipping:
    """A Relu, or a Clip up to a number, that a rounding did, and what made its input."""

    maker: str
    end: float | None


class Rewriter(QuantisedFile):
    """Reads a quantised graph node by node, and writes `graph` on floats.

    Attributes:
        roundings: Where the file rounds activations.
        weights: The names of dequantised tensors.
        clippings: Where a rounding clipped, too.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        super().__init__(proto)
        self.graph = self.file.copy_without_nodes()
        self.emit = self.graph.emit
        self._inputs = {p.name for p in self.file.inputs}
        self.roundings: list[Rounding] = []
        self.weights: list[str] = []
        self.clippings: list[Clipping] = []
        self.quantisations: dict[str, Quantisation] = {}  # of integers that the file computes
        self.sums: set[str] = set()  # int32 sums, which a product with scales turns into numbers
        self._least_outputs: dict[str, float] = {}
        self._indexed_nodes = 0
        self._numbers: dict[str, tuple[str, str]] = {}  # of integers: the number before and behind the rounding
        self._rearranged: dict[tuple[str, Quantisation], str] = {}
        self._tensors: dict[tuple[str, Quantisation], str] = {}

    def keep(self, node: Node) -> None:
        """Write a node that stays; raises `ModelError` if it reads integers and means something else on floats."""
        integers = [i for i in node.inputs if i in self.quantisations]
        sums = [i for i in node.inputs if i in self.sums]
        if sums and node.op == "Cast" and not node.domain:
            self.sums.add(node.outputs[0])
            return
        if sums:
            raise refuse(node, "reads a sum of integers that no Cast and Mul turns into numbers")
        if not integers:
            self.graph.nodes.append(node.copy())
            return
        if node.domain or (node.op not in _REARRANGING and node.op not in _INDEXING and node.op != "Clip"):
            raise refuse(node, "computes with quantised integers")
        if node.op in _INDEXING:
            source = node.inputs[0]
            self.emit(node.op, self.number(source, self.quantisations[source]), attrs=node.attrs, out=node.outputs[0])
            return
        # It is written where its result is read.
        self.quantisations |= dict.fromkeys(filter(None, node.outputs), self.quantisations[integers[0]])

    def write_product(self, node: Node, first: str, second: str, bias: str) -> None:
        """End a node that multiplies two numbers' matrices, and adds a bias where there is one."""
        product = self.emit("MatMul", first, second, out=None if bias else node.outputs[0])
        if bias:
            self.emit("Add", product, bias, out=node.outputs[0])

    @staticmethod
    def is_rearranging(node: Node) -> bool:
        """Whether a node only rearranges the numbers of its first input."""
        return not node.domain and 0 in (_REARRANGING.get(node.op, ()) or ())

    def number(self, integers: str, quantisation: Quantisation) -> str:
        """The name of the numbers that integers stand for, under a quantisation. Raises `ModelError` if the file gives
        them another meaning elsewhere, or computes them in a way that has no form on floats."""
        quantisation = self.canonical(quantisation)
        if integers in self._numbers:
            maker = self.makers[integers]
            if not self.is_equal(self.quantisations[integers], quantisation):
                raise refuse(maker, "is read with another scale than it writes")
            return self._numbers[integers][1]
        if integers in self.file.initializers:
            return self.tensor(integers, quantisation)
        node = self.makers.get(integers)
        if node is None:
            return self._input_number(integers, quantisation)
        if not node.domain and node.op == "Clip":
            return self._narrowed(node, quantisation)
        if node.domain or node.op not in _REARRANGING:
            raise refuse(node, "makes integers in a way that isn't known")
        key = (integers, quantisation)
        if key not in self._rearranged:
            self._rearrange(node, quantisation)
        return self._rearranged[key]

    def tensor(self, name: str, quantisation: Quantisation, output: str = "") -> str:
        """A dequantised tensor of the file. `output`: the value that it is, if that has the tensor's name."""
        quantisation = self.canonical(quantisation)
        key = (name, quantisation)
        if key not in self._tensors:
            scale, zero = self.constant(quantisation.scale), self.constant(quantisation.zero)
            if scale is None or (quantisation.zero and zero is None):
                raise refuse(self.reader(name), "dequantises a tensor by a scale that the file computes")
            values = dequantised(self.file.initializers[name], scale, zero, quantisation.axis, quantisation.block)
            self._tensors[key] = self.add_tensor(name, values, output)
        return self._tensors[key]

    def add_tensor(self, integers: str, values: Array, output: str = "") -> str:
        """Store a dequantised tensor, under the name that the quantiser derived that of the integers from."""
        name = integers.removesuffix("_quantized")
        if name in self.weights or (name not in (integers, output) and self._is_taken(name)):
            name = self.graph.fresh(name)
        self.graph.initializers[name] = values
        self.weights.append(name)
        return name

    def _number_name(self, integers: str) -> str:
        """A free name for the numbers that integers stand for: that from which the quantiser derived theirs."""
        name = integers.removesuffix("_quantized")
        return self.graph.fresh(name) if self._is_taken(name) else name

    def _is_taken(self, name: str) -> bool:
        """Whether a value of the file or of the float graph has a name."""
        self._index_nodes()
        in_file = name in self.makers or name in self.file.initializers or name in self._inputs
        return in_file or name in self.graph.initializers or name in self._least_outputs

    def round(self, node: Node, value: str, quantisation: Quantisation, *, steps: float, output: int = 0) -> None:
        """Let a number stand for the integers that a node writes. If rounding clipped it at 0, a Relu or Clip does."""
        integers = node.outputs[output]
        bounds = integer_range(self.integer_type(node, quantisation))
        self._round(integers, value, quantisation, bounds, steps)

    def round_inside(self, value: str, output: str) -> None:
        """Let a number stand for an output of an operator that rounds inside, where no rounding can be followed."""
        self.emit("Identity", value, out=output)
        self.roundings.append(Rounding(value, output, output, None, None, INNER_SHARE))

    def round_dynamically(self, integers: str, value: str, quantisation: Quantisation) -> None:
        """As `round`, by a scale that follows from the numbers and never clips them."""
        self._round(integers, value, quantisation, None, ROUNDING_STEPS)

    def _round(
        self, integers: str, value: str, quantisation: Quantisation, bounds: tuple[int, int] | None, steps: float
    ) -> None:
        if value not in self.graph.initializers and bounds is not None:
            value = self._clipped(integers, value, quantisation, bounds)
        passed = self.emit("Identity", value, out=self._number_name(integers))
        self._numbers[integers] = (value, passed)
        self.quantisations[integers] = self._with_axis(integers, value, quantisation)
        self.roundings.append(Rounding(value, passed, integers, self.quantisations[integers], bounds, steps))

    def _clipped(self, integers: str, value: str, quantisation: Quantisation, bounds: tuple[int, int]) -> str:
        """A value behind the Relu or Clip that its rounding did."""
        scale, zero = self.constant(quantisation.scale), self.constant(quantisation.zero)
        if scale is None or scale.size != 1:
            return value
        offset = 0 if zero is None else int(zero.reshape(-1)[0])
        self._index_nodes()
        if offset != bounds[0] or self._least(value) >= 0:
            return value
        end = clip_end(float(scale.reshape(-1)[0]) * (bounds[1] - offset))
        self.clippings.append(Clipping(node_label(self.makers.get(value, self.makers[integers])), end))
        if end is None:
            return self.emit("Relu", value)
        if self.graph.opset < _CLIP_INPUTS_OPSET:
            return self.emit("Clip", value, attrs={"min": 0.0, "max": end})
        return self.emit("Clip", value, self.graph.scalar(0), self.graph.scalar(end))

    def _least(self, name: str) -> float:
        """A bound below all numbers of a value. Inputs of a file count as positive: their range is that of the data."""
        tensor = self.graph.initializers.get(name)
        if tensor is not None and tensor.size:
            return float(np.asarray(tensor, np.float64).min())
        return self._least_outputs.get(name, 0.0 if name in self._inputs else -math.inf)

    def _index_nodes(self) -> None:
        """Bound the outputs of the nodes that were written since."""
        for node in self.graph.nodes[self._indexed_nodes :]:
            self._least_outputs |= dict.fromkeys(filter(None, node.outputs), least_output(node, self._least))
        self._indexed_nodes = len(self.graph.nodes)

    def _narrowed(self, node: Node, quantisation: Quantisation) -> str:
        """What torch writes for fewer integers than the type has: a Clip of integers."""
        source, output = node.inputs[0], node.outputs[0]
        bounds = [self.constant(name) for name in [*node.inputs[1:3], "", ""][:2]]
        is_known = all(b is not None or not name for b, name in zip(bounds, node.inputs[1:3], strict=False))
        if source not in self._numbers or not is_known:
            raise refuse(node, "clips integers in a way that isn't known")
        if not self.is_equal(self.quantisations[source], quantisation):
            raise refuse(node, "is read with another scale than its input has")
        limits = integer_range(self.integer_type(self.makers[source], quantisation))
        low, high = (limit if b is None else int(b) for b, limit in zip(bounds, limits, strict=True))
        self._round(output, self._numbers[source][0], quantisation, (low, high), ROUNDING_STEPS)
        return self._numbers[output][1]

    def _rearrange(self, node: Node, quantisation: Quantisation) -> None:
        """Write a rearranging operator on numbers."""
        chosen = _REARRANGING[node.op]
        inputs = list(node.inputs)
        for i in range(len(inputs)) if chosen is None else chosen:
            inputs[i] = self.number(inputs[i], self._before(node, quantisation))
        attrs = dict(node.attrs)
        if node.op == "Pad" and attrs.get("mode", "constant") == "constant":
            inputs = self._padded(node, inputs, quantisation)
        outputs = [self._number_name(o) if o else "" for o in node.outputs]
        self.graph.nodes.append(Node(node.op, inputs, outputs, attrs, outputs[0]))
        exact = node.op != "Resize" or attrs.get("mode", "nearest") == "nearest"
        for old, new in zip(node.outputs, outputs, strict=True):
            if old and exact:
                self._rearranged[old, quantisation] = new
            elif old:  # integers between integers are rounded
                self._round(old, new, quantisation, None, OPERATOR_STEPS)
                self._rearranged[old, quantisation] = self._numbers[old][1]

    def _before(self, node: Node, quantisation: Quantisation) -> Quantisation:
        """The quantisation of a rearranging operator's input: a Transpose moves the axis of channels."""
        scale = self.constant(quantisation.scale)
        if scale is None or scale.size == 1:
            return quantisation
        perm = node.attrs.get("perm")
        if node.op != "Transpose" or not perm:
            raise refuse(node, "rearranges integers with a scale for each channel")
        axis = int(perm[quantisation.axis % len(perm)])
        return Quantisation(quantisation.scale, quantisation.zero, axis, quantisation.block)

    def _padded(self, node: Node, inputs: list[str], quantisation: Quantisation) -> list[str]:
        """The inputs of a Pad on numbers: a border of integers is one of the numbers that they stand for."""
        if len(inputs) < 2:  # before opset 11, border and sizes are attributes
            raise refuse(node, "pads integers in the form of an early opset")
        given = inputs[2] if len(inputs) > 2 else ""
        border = self.constant(given) if given else np.zeros((), np.int64)
        scale, zero = self.constant(quantisation.scale), self.constant(quantisation.zero)
        if border is None or scale is None:
            raise refuse(node, "pads integers by a number that the file computes")
        number = (float(border.reshape(-1)[0]) - (0 if zero is None else float(zero.reshape(-1)[0]))) * float(scale)
        return [*inputs[:2], self.graph.constant(number, np.float32), *inputs[3:]]

    def _input_number(self, name: str, quantisation: Quantisation) -> str:
        """The numbers of an input of integers."""
        scale, zero = self.constant(quantisation.scale), self.constant(quantisation.zero)
        if scale is None or scale.size != 1:
            raise refuse(self.reader(name), "reads an input by several scales")
        number = self.emit("Cast", name, attrs={"to": 1})
        if zero is not None and zero.any():
            number = self.emit("Sub", number, self.graph.constant(float(zero.reshape(-1)[0]), np.float32))
        return self.emit("Mul", number, self.graph.constant(float(scale.reshape(-1)[0]), np.float32))

    def _with_axis(self, integers: str, value: str, quantisation: Quantisation) -> Quantisation:
        """The quantisation with its axis counted from the end, so that the comparison can spread the scales."""
        scale = self.constant(quantisation.scale)
        if scale is None or scale.size == 1 or quantisation.axis < 0:
            return quantisation
        rank = self.graph.initializers[value].ndim if value in self.graph.initializers else self.rank(integers)
        if rank is None:
            raise refuse(self.makers[integers], "rounds by several scales a value whose shape isn't known")
        return Quantisation(quantisation.scale, quantisation.zero, quantisation.axis - rank, quantisation.block)


Rule = Callable[[Rewriter, Node], None]


# A quantiser measures the range of an activation's output, and rounding to integers ends at both ends of the range. So
# onnxruntime's quantiser leaves out a Relu or Clip before it: the zero point of such a range is the type's least
# integer. A range always contains 0, so a least number of 0 says that none below it was seen.
def least_output(node: Node, least: Callable[[str], float]) -> float:
    """A bound below all numbers that a node can give, from such bounds of its inputs."""
    if node.domain:
        return -math.inf
    if node.op in _LEAST:
        return _LEAST[node.op]
    if node.op == "Clip":
        if len(node.inputs) > 1 and node.inputs[1]:
            return least(node.inputs[1])
        return float(node.attrs.get("min", -math.inf))
    if node.op in _PASSING:
        return least(node.inputs[0])
    if node.op == "Pad":
        return min(least(i) for i in (node.inputs[0], *filter(None, node.inputs[2:3])))
    bounds = [least(i) for i in node.inputs]
    if node.op in _PASSING_ALL:
        return min(bounds)
    if node.op in ("Add", "Sum"):
        return sum(bounds)
    return 0.0 if node.op in ("Mul", "Div", "ReduceSum") and min(bounds[:2]) >= 0 else -math.inf


def clip_end(upper: float) -> float | None:
    """The upper end of the Clip that a range from 0 to a number stands for; None for a Relu."""
    return next((end for end in _CLIP_ENDS if abs(upper - end) <= _END_TOLERANCE * end), None)
