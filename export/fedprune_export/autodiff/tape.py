"""The tape: it writes the forward pass of a model into a training graph, and then the backward pass.

Every operator has one *gradient rule* (in `operators`): it writes the operator's forward, says what shape comes out,
and returns the *pull*, the function that writes the gradients of the inputs from those of the outputs (a
vector-Jacobian product). `backward` calls the pulls in reverse order. Shapes are symbolic in the batch and in every
channel dimension, so that one graph serves all widths of an architecture; a rule that would need a channel count as a
number raises.

The tape inherits what rules ask for: values and shapes (`tape_values`), facts (`value_facts`) and sizes that vary
(`dimensions`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cached_property

import numpy as np
import numpy.typing as npt
import onnx

from fedprune.core.errors import ModelError
from fedprune.model import step_contract
from fedprune_export.autodiff.dimensions import BATCH, Dim, Shape
from fedprune_export.autodiff.tape_values import TapeValues
from fedprune_export.autodiff.value_facts import describe
from fedprune_export.ir.graph import NORMAL_OPSET, Graph, Node, Port
from fedprune_export.ir.operators import load_rules, registrar
from fedprune_export.ir.sample_inputs import sample_sizes
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

# Takes the gradients of a node's outputs (None for an output without one), one parameter each, and adds those of its
# inputs.
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


class Tape(TapeValues):
    """A training graph in the making.

    Args:
        frozen: Names of tensors that don't train: their gradients are not computed, and a batch normalisation whose
            statistics are frozen normalises by them.
        scaled: Names of values that are multiplied by the input `output_scale` as soon as they are computed.
    """

    def __init__(
        self, model: Model, graph: Graph, frozen: Collection[str] = (), *, scaled: Collection[str] = ()
    ) -> None:
        super().__init__(model, graph, frozen)
        self._scaled = frozenset(scaled)
        self._gradients: dict[str, list[str]] = {}
        self._pulls: list[tuple[Node, Pull]] = []

    @cached_property
    def finite_slopes(self) -> bool:
        """Whether no operator of the model has an infinite gradient at a finite value, as roots have at 0."""
        return all(not node.domain and node.op in _FINITE_SLOPES for node in self.source.nodes)

    # -- forward ----------------------------------------------------------------------------------------------------

    def forward(self) -> None:
        """Write the forward pass of all nodes.

        Raises `ModelError` if an operator has no rule, or its rule can't handle this use.
        """
        rules = load_rules(RULES)
        for node in self.source.nodes:
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
        return lambda dy: pull(self.graph.emit("Mul", dy, step_contract.OUTPUT_SCALE))

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

    # -- backward ---------------------------------------------------------------------------------------------------

    def add_gradient(self, name: str, gradient: str) -> None:
        """Add to the gradient of a value of the model."""
        # A constant is copied here at the latest: names of later nodes, and so the graph's bytes, depend on when it is.
        self.value(name)
        self._gradients.setdefault(name, []).append(gradient)

    def gradient(self, name: str) -> str | None:
        """The sum of a value's gradients; call it when all readers of the value have been pulled back."""
        gradients = self._gradients.get(name)
        if not gradients:
            return None
        # The list keeps the sum, so that a second call writes no further nodes.
        while len(gradients) > 1:
            gradients[:2] = [self.graph.emit("Add", gradients[0], gradients[1])]
        return gradients[0]

    def backward(self) -> None:
        """Write the backward pass, from the gradients that were added to the model's outputs."""
        for node, pull in reversed(self._pulls):
            gradients = [self.gradient(o) if o else None for o in node.outputs]
            if any(gradients):
                pull(*gradients)

    def stops_behind(self, name: str) -> list[Node]:
        """The nodes behind a value that let no gradient through, such as roundings and comparisons."""
        pulled = {id(node) for node, _ in self._pulls}
        used = {*self._readers, *(p.name for p in self.source.outputs)}
        pending, visited, stops = [name], {name}, dict[int, Node]()
        while pending:
            for node, _ in self._readers.get(pending.pop(), []):
                if node.outputs[0] in self._arithmetic:  # it reads only the shape
                    continue
                outputs = [o for o in node.outputs if o in used]
                passed = [o for o in outputs if id(node) in pulled and self.needs_gradient(o)]
                if len(passed) < len(outputs):
                    stops[id(node)] = node
                pending += [o for o in passed if o not in visited]
                visited.update(passed)
        return list(stops.values())


def _can_be_float(node: Node, index: int) -> bool:
    """Whether an output can have a gradient: indices, counts, booleans have none, whatever they are computed from."""
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
