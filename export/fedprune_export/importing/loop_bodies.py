"""Reads the bodies of loops: how many iterations follow from counters and constants, and which states they change.

TensorFlow writes a recurrent layer as a loop that goes on while its counter is below the number of steps; tf2onnx keeps
the comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from fedprune.core.errors import ModelError, value_text
from fedprune_export.importing.node_order import inner_graphs
from fedprune_export.ir import shape_inference
from fedprune_export.ir.graph import Array, Graph, read_tensor

_MAX_CONDITION_NODES = 50  # comparisons of counters have under 10; each is computed again for every iteration


def count_iterations(
    body: onnx.GraphProto,
    opsets: Sequence[onnx.OperatorSetIdProto],
    states: Sequence[str],
    outer_constant: Callable[[str], Array | None],
    *,
    starts: bool,
    max_iterations: int,
) -> int | None:
    """How often a loop runs its body, until the condition is false; None if that depends on data.

    Args:
        opsets: Operator sets of the model.
        states: Names of the values that the first iteration gets as states.
        outer_constant: The value of a name around the loop; None if it depends on data.
        starts: The condition before the first iteration.
        max_iterations: The count of a loop whose condition stays true for so long.
    """
    if not starts or max_iterations < 1:
        return 0
    condition = _Condition(body, opsets)
    if not condition.can_compute:
        return None
    values: dict[str, Array | None] = {
        name: outer_constant(states[i - 2] if name == body.input[i].name else name)
        for name, i in condition.reads.items()
        if i < 0 or i > 1
    }
    iteration, on = 0, np.array(True)
    while iteration < max_iterations:
        values[body.input[0].name], values[body.input[1].name] = np.array(iteration, np.int64), on
        results = condition.next_values(values)
        if results is None or results[0].size != 1:
            return None
        iteration += 1
        if not results[0].reshape(-1)[0]:
            return iteration
        # Without a counter or states each iteration finds what the one before found.
        if not condition.reads_counters:
            return max_iterations
        values.update(zip(condition.state_names, results[1:], strict=True))
    return iteration


def repeated_body(node: onnx.NodeProto, attrs: Mapping[str, Any]) -> onnx.GraphProto:
    """The graph that a node repeats. Raises `ModelError` if it has none, or no outputs of its own."""
    body = attrs.get("body")
    if not isinstance(body, onnx.GraphProto) or not any(node.output):
        raise ModelError(f"{node.op_type} {value_text(node.name)} lacks a body or outputs")
    return body


def changed_states(body: onnx.GraphProto, count: int, *, is_loop: bool) -> list[bool]:
    """Of each state, whether an iteration changes it; others hand the same value on, as TensorFlow's weights are."""
    copies = {n.output[0]: n.input[0] for n in body.node if n.op_type == "Identity" and n.input}
    inputs, outputs = body.input[2 if is_loop else 0 :], body.output[1 if is_loop else 0 :]
    changes = []
    for before, after, _ in zip(inputs, outputs, range(count), strict=False):
        name = after.name
        while name != before.name and name in copies:
            name = copies[name]
        changes.append(name != before.name)
    return changes


class _Condition:
    """The part of a loop's body that computes the next condition, and the states that this part reads."""

    def __init__(self, body: onnx.GraphProto, opsets: Sequence[onnx.OperatorSetIdProto]) -> None:
        makers = {o: i for i, n in enumerate(body.node) for o in n.output if o}
        tensors = {t.name: t for t in body.initializer}
        positions = {port.name: i for i, port in enumerate(body.input)}
        # Values that the body reads: the position among its inputs, or -1 for values from around the loop.
        self.reads: dict[str, int] = {}
        self.state_names: list[str] = []
        self._results = [body.output[0].name]
        nodes, visited, pending = set[int](), set[str](), [body.output[0].name]
        model = onnx.ModelProto(opset_import=opsets)
        while pending and len(nodes) <= _MAX_CONDITION_NODES:
            name = pending.pop()
            if name in visited:
                continue
            visited.add(name)
            if name in makers:
                nodes.add(makers[name])
                pending += [i for i in body.node[makers[name]].input if i]
            elif name in tensors:
                model.graph.initializer.append(tensors[name])
            else:
                self.reads[name] = positions.get(name, -1)
                if self.reads[name] > 1:
                    # What a state is next is computed along with the condition.
                    self.state_names.append(name)
                    self._results.append(body.output[positions[name] - 1].name)
                    pending.append(self._results[-1])
        model.graph.node.extend(body.node[i] for i in sorted(nodes))
        has_graphs = any(True for n in model.graph.node for _ in inner_graphs(n))
        self.can_compute = len(nodes) <= _MAX_CONDITION_NODES and not has_graphs
        self.reads_counters = any(position == 0 or position > 1 for position in self.reads.values())
        self._graph = Graph.from_proto(model) if self.can_compute else Graph()
        self._constants = {t.name: read_tensor(t) for t in model.graph.initializer}

    def next_values(self, values: dict[str, Array | None]) -> list[Array] | None:
        """The next condition and states; None if they depend on data."""
        known = shape_inference.InferredShapes()
        for name, value in {**self._graph.initializers, **self._constants, **values}.items():
            if value is None:
                return None
            shape_inference.set_value(known, name, value)
        try:
            for node in self._graph.nodes:
                shape_inference.infer_node(self._graph, known, node, node.outputs)
        except ModelError:  # operators that make no sense
            return None
        results = [known.numbers[name] for name in self._results if name in known.numbers]
        return results if len(results) == len(self._results) else None
