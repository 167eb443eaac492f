"""The tape: a forward pass in training mode, written node by node, and the pull-backs that reverse it.

Every operator has one *rule*: it writes the operator's forward into the training graph, says what shape comes out,
and returns the pull-back that turns the output's gradient into gradients of the inputs. Shapes are symbolic in the
batch and in every channel dimension, so that what is written serves all widths of an architecture; a rule that would
need a channel count as a number raises.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from fedprune.core.errors import ModelError
from fedprune.model import step_contract
from fedprune_export.autodiff.dimensions import BATCH, Dim, Shape
from fedprune_export.autodiff.static_info import StaticInfo, describe
from fedprune_export.ir.dropout import is_dropout
from fedprune_export.ir.graph import NORMAL_OPSET, Graph, Node, Port
from fedprune_export.ir.operators import load_rules, registrar
from fedprune_export.ir.trace import sample_sizes
from fedprune_export.pruning.model import Model

__all__ = [
    "BATCH",
    "RULES",
    "Dim",
    "Pull",
    "Rule",
    "Shape",
    "Tape",
    "describe",
    "gradient_rule",
    "port",
    "sample_shape",
]

Array = npt.NDArray[Any]

# Takes the gradients of a node's outputs (None for an output without one) and adds those of its inputs. Its
# parameters vary: one per output.
Pull = Callable[..., None]

Rule = Callable[["Tape", Node], "Pull | None"]

RULES: dict[str, Rule] = {}  # rules by operator

gradient_rule = registrar(RULES, "gradient")  # register a rule for operators


# Operators whose gradient is finite wherever their inputs are; roots, logarithms and divisions are not among them.
_FINITE_SLOPES = frozenset(
    {
        *("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Sub", "Mul", "Neg", "Sum", "Mean", "Identity", "Dropout"),
        *("Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Gelu", "Softmax", "LogSoftmax"),
        *("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceSum", "ReduceMax"),
        *("BatchNormalization", "LayerNormalization", "InstanceNormalization", "GroupNormalization"),
        *("Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Concat", "Split", "Slice", "Pad", "Resize"),
        *("Shape", "Gather", "Constant", "ConstantOfShape", "Expand", "Cast"),
    }
)


class Tape(StaticInfo):
    """A training graph in the making.

    Args:
        frozen: Names of tensors that don't train: their gradients are not computed, and a batch normalisation whose
            statistics are frozen normalises by them.
        scaled: Names of values that are multiplied by the input `output_scale` as soon as they are computed.

    Attributes:
        shapes_written: Shapes of values of the training graph, as far as they are known.
    """

    def __init__(
        self, model: Model, graph: Graph, frozen: Collection[str] = (), *, scaled: Collection[str] = ()
    ) -> None:
        super().__init__(model, graph)
        self.graph = graph
        self.shapes_written: dict[str, Shape] = {}
        self._frozen = frozenset(frozen)
        self._scaled = frozenset(scaled)
        self._values: dict[str, str] = {}
        self._shapes: dict[str, Shape] = {}
        self._with_gradient: set[str] = set()
        self._gradients: dict[str, list[str]] = {}
        self._pulls: list[tuple[Node, Pull]] = []
        self._shape_values: dict[str, str] = {}
        self._readers = model.graph.consumers()
        self._producers = model.graph.producers()

    @cached_property
    def finite_slopes(self) -> bool:
        """Whether no operator of the model has an infinite gradient at a finite value, as roots have at 0."""
        return all(not node.domain and node.op in _FINITE_SLOPES for node in self._source.nodes)

    # -- values -----------------------------------------------------------------------------------------------------

    def enter(self, name: str, value: str, shape: Shape, *, needs_gradient: bool = False) -> None:
        """Register a value of the model: its name in the training graph, and its shape."""
        self._values[name] = value
        self._shapes[name] = shape
        self.shapes_written[value] = shape
        self.note_shape(value, shape)
        if needs_gradient and name not in self._frozen:
            self._with_gradient.add(name)

    def value(self, name: str) -> str:
        """The name of a model's value in the training graph; constants are copied on first use.

        A constant over channels is as long as there are channels left, which takes equal entries along that axis.
        Raises `ModelError` if the value is not computed yet, or a constant has another number for each channel.
        """
        if name not in self._values:
            array = self._source.initializers.get(name)
            if array is None:
                self._copy_arithmetic(name)
            else:
                self._enter_constant(name, array)
        return self._values[name]

    def _enter_constant(self, name: str, array: Array) -> None:
        # A training graph computes in float32 alone, whatever precision the model was saved in.
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

    def block_layout(self, node: Node, name: str, index: int, count: int) -> tuple[Dim, Dim]:
        """The blocks of an axis at every width, which at full width are `count` equal ones.

        Either whole blocks are cut (their number varies), or the same positions of every block (their length does).
        Raises `ModelError` if neither is so. Returns how many blocks there are, and how long each is.
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

    def producer(self, name: str) -> Node | None:
        """The node that makes a value, None for inputs and weights."""
        return self._producers.get(name)

    def only_reader(self, name: str) -> Node | None:
        """The one node that reads a value, None where there are more or it is an output."""
        readers = self._readers.get(name, [])
        if len(readers) != 1 or any(p.name == name for p in self._source.outputs):
            return None
        return readers[0][0]

    # -- shapes -----------------------------------------------------------------------------------------------------

    def reshape(self, value: str, shape: Shape, target: Shape) -> str:
        """A value of `shape` reshaped to `target`, by constants as far as possible."""
        if shape == target:
            return value
        # Reshape copies the input's size for an entry of 0, and computes one entry of -1.
        entries = [d if isinstance(d, int) else 0 if shape[i : i + 1] == (d,) else -1 for i, d in enumerate(target)]
        varying = [i for i, e in enumerate(entries) if e == -1]
        if len(varying) > 1:
            # All but one are computed; of the rest a run of numbers is one constant.
            segments: list[str] = []
            run: list[int] = []
            for i, entry in enumerate(entries):
                if i in varying[1:]:
                    segments += ([self.graph.ints(*run)] if run else []) + [self.size(target[i])]
                    run = []
                else:
                    run.append(entry)
            segments += [self.graph.ints(*run)] if run else []
            return self.graph.emit("Reshape", value, self.graph.emit("Concat", *segments, attrs={"axis": 0}))
        return self.graph.emit("Reshape", value, self.graph.ints(*entries))

    def broadcast(self, node: Node, *shapes: Shape) -> Shape:
        """The shape to which these broadcast.

        Raises `ModelError` if they don't, or a constant spans a channel dimension.
        """
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
        """A scale or shift of a value whose last axes have `shape`, as long as these are.

        A constant with equal entries fits every width; others are returned as they are.
        """
        name = node.inputs[index]
        constant = self._source.initializers.get(name)
        if constant is None or self.is_tensor(name) or not any(isinstance(d, str) for d in shape):
            return self.value(name)
        entries = constant.reshape(-1)
        if not entries.size or np.any(entries != entries[0]):
            return self.value(name)
        first = self.graph.constant(np.float32(entries[0]), np.float32)
        return self.graph.emit("Expand", first, self.sizes(shape[len(shape) - constant.ndim :]))

    def shape_of(self, value: str) -> str:
        """A node that gives the run-time shape of a value of the training graph."""
        if value not in self._shape_values:
            self._shape_values[value] = self.graph.emit("Shape", value)
        return self._shape_values[value]

    # -- forward ----------------------------------------------------------------------------------------------------

    def is_frozen(self, name: str) -> bool:
        return name in self._frozen

    def needs_gradient(self, name: str) -> bool:
        return name in self._with_gradient

    def forward(self) -> None:
        """Write the forward pass of all nodes.

        Raises `ModelError` if an operator has no rule, or its rule can't handle this use.
        """
        rules = load_rules(RULES)
        for node in self._source.nodes:
            if self._is_shape_arithmetic(node):
                continue
            function = rules.get(node.op) if node.domain in ("", "ai.onnx") else None
            if function is None:
                raise ModelError(
                    f"{describe(node)} has no gradient rule",
                    expected=f"one of {len(RULES)} operators (`fedprune-export operators` lists them)",
                    hint="Replace the operator, or add a rule for it (docs/add-an-operator.md).",
                )
            pull = function(self, node)
            self._check_shapes(node)
            if pull is not None and node.outputs[0] in self._scaled:
                pull = self._scale(node.outputs[0], pull)
            if pull is not None and any(self.needs_gradient(i) for i in node.inputs if i):
                self._with_gradient.update(o for i, o in enumerate(node.outputs) if o and _can_be_float(node, i))
                self._pulls.append((node, pull))

    def _scale(self, name: str, pull: Pull) -> Pull:
        """Multiply a value by `output_scale`, and its gradient before it is pulled back."""
        self.enter(name, self.graph.emit("Mul", self.value(name), step_contract.OUTPUT_SCALE), self.shape(name))

        def pull_scaled(dy: str) -> None:
            scaled_gradient = self.graph.emit("Mul", dy, step_contract.OUTPUT_SCALE)
            self.shapes_written[scaled_gradient] = self.shape(name)
            pull(scaled_gradient)

        return pull_scaled

    def _check_shapes(self, node: Node) -> None:
        """A rule's output shapes must equal those of the channel analysis."""
        for name in node.outputs:
            analysed, shape = self.analysed_shape(name) if name else None, self._shapes.get(name)
            if analysed is None or shape is None:
                continue
            if len(analysed) != len(shape) or any(k not in (None, d) for k, d in zip(analysed, shape, strict=True)):
                raise ModelError(
                    f"{describe(node)}: the cut and the training graph would differ in shape",
                    expected=list(analysed),
                    got=list(shape),
                    hint="The channel rule and the gradient rule of this operator contradict each other.",
                )

    def _is_shape_arithmetic(self, node: Node) -> bool:
        """Nodes that only compute with shapes are not copied: rules look their results up in a trace."""
        inputs = [i for i in node.inputs if i]
        derived = any(i in self._arithmetic for i in inputs) and all(
            i in self._arithmetic or (i in self._source.initializers and not self.is_tensor(i)) for i in inputs
        )
        # What is as long as there are channels is data, even if it is computed from nothing else: states of zeros.
        has_width = any(isinstance(d, str) for o in node.outputs if o for d in self.analysed_shape(o) or ())
        if node.op in ("Shape", "Size") or (derived and not has_width and not is_dropout(node)):
            self._arithmetic.update(dict.fromkeys(node.outputs, node))
            return True
        return False

    # -- backward ---------------------------------------------------------------------------------------------------

    def add_gradient(self, name: str, gradient: str) -> None:
        """Add to the gradient of a value of the model."""
        self._gradients.setdefault(name, []).append(gradient)
        self.shapes_written[gradient] = self.shape(name)

    def gradient(self, name: str) -> str | None:
        """The sum of a value's gradients; call it when all readers of the value have been pulled back."""
        gradients = self._gradients.get(name)
        if not gradients:
            return None
        # The list keeps the sum, so that a second call writes no further nodes.
        while len(gradients) > 1:
            gradients[:2] = [self.graph.emit("Add", gradients[0], gradients[1])]
            self.shapes_written[gradients[0]] = self.shape(name)
        return gradients[0]

    def backward(self) -> None:
        """Write the backward pass from the gradients that were added to the model's outputs."""
        for node, pull in reversed(self._pulls):
            gradients = [self.gradient(o) if o else None for o in node.outputs]
            if any(gradients):
                pull(*gradients)

    def sum_to_shape(self, gradient: str, shape: Shape, target: Shape) -> str:
        """A gradient of `shape` summed over the axes along which `target` was broadcast."""
        lead = len(shape) - len(target)
        axes = list(range(lead))
        axes += [i + lead for i, d in enumerate(target) if d == 1 and shape[i + lead] != 1]
        if axes:
            gradient = self.graph.emit("ReduceSum", gradient, self.graph.ints(*axes), attrs={"keepdims": 1})
        if lead:
            gradient = self.graph.emit("Squeeze", gradient, self.graph.ints(*range(lead)))
        return gradient


def _can_be_float(node: Node, index: int) -> bool:
    """Whether an output can have a gradient: indices, counts and truths have none, whatever they are computed from."""
    # The schema says so; operators of other domains have none, and count as floats.
    try:
        outputs = onnx.defs.get_schema(node.op, NORMAL_OPSET, node.domain).outputs
    except onnx.defs.SchemaError:
        return True
    return "tensor(float)" in outputs[min(index, len(outputs) - 1)].types


def port(name: str, shape: Shape, dtype: npt.DTypeLike = np.float32) -> Port:
    """An input or output of the training graph."""
    return Port(name, np.dtype(dtype), tuple(shape))


def sample_shape(graph: Graph) -> Shape:
    """The shape of the model's input, with the batch's name."""
    return (BATCH, *sample_sizes(graph.inputs[0]))
