"""Removes control flow: inlines branches on constants, and unrolls loops of a fixed length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from fedprune.core.errors import ModelError, value_text
from fedprune_export.importing.graph_writer import GraphWriter, names_within
from fedprune_export.importing.loop_bodies import changed_states, count_iterations, repeated_body
from fedprune_export.importing.metadata import REPEATED_KEY, write_properties
from fedprune_export.importing.node_order import inner_graphs
from fedprune_export.importing.parameter_roles import CONSTANT_PREFIX
from fedprune_export.ir.graph import Array, read_tensor

CONTROL_FLOW = frozenset({"If", "Loop", "Scan"})

_MAX_DEPTH = 20  # control flow within control flow


def without_control_flow(model: onnx.ModelProto, opset: int, max_nodes: int) -> None:
    """Inline branches on constants and unroll loops of a fixed length; the model is changed.

    Control flow that depends on data stays, and is refused by name later. Raises `ModelError` if there would be more
    than `max_nodes` operators, or control flow is nested too deeply.
    """
    # Each pass removes one level; the next pass removes the level within it.
    repeated = set[str]()
    for _ in range(_MAX_DEPTH):
        writer = _ControlFlow(model, opset, max_nodes)
        writer.write()
        repeated |= writer.repeated_tensors
        if not writer.replaced_count:
            if repeated:
                write_properties(model, {REPEATED_KEY: "\n".join(sorted(repeated))})
            return
    raise ModelError(f"branches and loops are nested more than {_MAX_DEPTH} deep")


class _ControlFlow(GraphWriter):
    """Inlines and unrolls one level of control flow."""

    def __init__(self, model: onnx.ModelProto, opset: int, max_nodes: int) -> None:
        super().__init__(model, opset)
        self._max_nodes, self._nodes_left = max_nodes, max_nodes - len(model.graph.node)
        self.replaced_count = 0
        self.repeated_tensors: set[str] = set()
        # By a stacked output's name, its axis and what is stacked along it.
        self._stacks: dict[str, tuple[int, list[str]]] = {}

    def rewrite_node(self, node: onnx.NodeProto) -> Sequence[onnx.NodeProto]:
        """The nodes that replace a node; the node itself if its condition or length depends on data."""
        rule = {"If": self._if, "Loop": self._loop, "Scan": self._scan, "Slice": self._slice}.get(node.op_type)
        if rule is None or node.domain not in ("", "ai.onnx"):
            return [node]
        replacement = rule(node, {a.name: helper.get_attribute_value(a) for a in node.attribute})
        if replacement is None:
            return [node]
        self.replaced_count += 1
        return replacement

    def _if(self, node: onnx.NodeProto, attrs: Mapping[str, Any]) -> list[onnx.NodeProto] | None:
        condition = self._constant_value(node.input[0]) if len(node.input) == 1 else None
        if condition is None:
            return None
        _check_single_number("condition", node, condition)
        branch = attrs.get("then_branch" if condition.reshape(-1)[0] else "else_branch")
        if branch is None or len(branch.output) != len(node.output):
            raise ModelError(f"If {value_text(node.name)} lacks a branch")
        prefix = f"{node.output[0]}."
        return self._copy_body(branch, self._add_body_tensors(branch, prefix), {}, prefix, node.output)

    def _loop(self, node: onnx.NodeProto, attrs: Mapping[str, Any]) -> list[onnx.NodeProto] | None:
        count, condition, *states = [*node.input, "", ""][: max(2, len(node.input))]
        body, trips = repeated_body(node, attrs), self._constant_value(count) if count else None
        starts = self._constant_value(condition) if condition else np.array(True)
        _check_single_number("number of iterations", node, trips)
        _check_single_number("condition", node, starts)
        counts = 2 + len(states), 1 + len(node.output)
        if (len(body.input), len(body.output)) != counts:
            raise ModelError(
                f"the body of Loop {value_text(node.name)}",
                expected=f"{counts[0]} inputs and {counts[1]} outputs",
                got=f"{len(body.input)} and {len(body.output)}",
            )
        # Without a number of iterations the condition alone ends the loop.
        if starts is None or (count and trips is None):
            return None
        # One more than may be written out, so that a loop that is too long is refused as such.
        max_iterations = 1 + self._nodes_left // max(1, len(body.node))
        if trips is not None:
            max_iterations = min(max_iterations, int(trips.reshape(-1)[0]))
        iteration_count = count_iterations(
            body,
            self._model.opset_import,
            states,
            self._constant_value,
            starts=bool(starts.reshape(-1)[0]),
            max_iterations=max_iterations,
        )
        if iteration_count is None:
            return None

        def iteration_inputs(iteration: int) -> tuple[list[onnx.NodeProto], list[str]]:
            nodes = [self._constant(np.array(iteration, np.int64), f"{node.output[0]}.{iteration}.turn")]
            nodes.append(self._constant(np.array(True), f"{node.output[0]}.{iteration}.on"))
            return nodes, [n.output[0] for n in nodes]

        return self._unroll(
            node, body, iteration_count, states, iteration_inputs, skipped=1, axes=[0] * len(body.output)
        )

    def _scan(self, node: onnx.NodeProto, attrs: Mapping[str, Any]) -> list[onnx.NodeProto] | None:
        body, count = repeated_body(node, attrs), int(attrs.get("num_scan_inputs", 0))
        # Before opset 9 a Scan had a batch axis and lengths of sequences.
        if self._opset < 9:
            return None
        state_count = len(node.input) - count
        stacked_count = len(node.output) - state_count
        lists = {
            name: list(attrs.get(name, [0] * size))
            for size, *names in (
                (count, "scan_input_axes", "scan_input_directions"),
                (stacked_count, "scan_output_axes", "scan_output_directions"),
            )
            for name in names
        }
        if (
            not 0 < count <= len(node.input)
            or stacked_count < 0
            or (len(body.input), len(body.output)) != (len(node.input), len(node.output))
            or any(len(values) != (count if "input" in name else stacked_count) for name, values in lists.items())
        ):
            raise ModelError(
                f"Scan {value_text(node.name)}",
                expected="a value or more to go through, and as many inputs, outputs, axes and directions as its body",
                got=f"{count} of {len(node.input)} inputs to go through, {len(node.output)} outputs, "
                f"and a body with {len(body.input)} and {len(body.output)}",
            )
        states, scanned = list(node.input)[:state_count], list(node.input)[state_count:]
        axes = lists["scan_input_axes"]
        lengths = {self._size(name, axis) for name, axis in zip(scanned, axes, strict=True)}
        iteration_count = lengths.pop()
        # Inputs of different lengths are left to the checks that name the operator.
        if lengths or iteration_count is None:
            return None
        self._check_size(node, body, iteration_count)
        backward = lists["scan_input_directions"]
        stem = node.output[0]
        elements = [[self._names.fresh(f"{stem}.{k}.part{t}") for t in range(iteration_count)] for k in range(count)]
        before: list[onnx.NodeProto] = []
        for name, axis, names in zip(scanned, axes, elements, strict=True):
            before += self._unstack(name, axis, names)

        def iteration_inputs(iteration: int) -> tuple[list[onnx.NodeProto], list[str]]:
            return [], [p[-1 - iteration if b else iteration] for p, b in zip(elements, backward, strict=True)]

        out_axes = [0] * state_count + lists["scan_output_axes"]
        out_backward = [0] * state_count + lists["scan_output_directions"]
        unrolled = self._unroll(
            node, body, iteration_count, states, iteration_inputs, skipped=0, axes=out_axes, backward=out_backward
        )
        return None if unrolled is None else before + unrolled

    def _unroll(
        self,
        node: onnx.NodeProto,
        body: onnx.GraphProto,
        iteration_count: int,
        states: Sequence[str],
        iteration_inputs: Any,
        *,
        skipped: int,
        axes: Sequence[int],
        backward: Sequence[int] | None = None,
    ) -> list[onnx.NodeProto] | None:
        """Unroll a body: states pass from one iteration to the next, the other outputs are stacked.

        Args:
            iteration_inputs: Returns what one iteration reads besides the states: nodes, and their outputs' names.
            skipped: How many outputs of the body come before the states.
            axes: The axis along which each output is stacked.
        """
        self._check_size(node, body, iteration_count)
        self._nodes_left -= iteration_count * max(1, len(body.node))
        state_count, stacked_count = len(states), len(body.output) - skipped - len(states)
        # A stacked output of no iterations would be an empty tensor of unknown shape.
        if not iteration_count and stacked_count:
            return None
        stem = f"{node.output[0]}."
        tensor_names, out, current_states = self._add_body_tensors(body, stem), list[onnx.NodeProto](), list(states)
        read_names = {*tensor_names.values(), *names_within(body), *node.input}
        self.repeated_tensors |= read_names & (self._tensors.keys() | tensor_names.values())
        rows: list[list[str]] = [[] for _ in range(stacked_count)]
        for i, changes in enumerate(changed_states(body, state_count, is_loop=bool(skipped))):
            # A recurrent layer begins with zeros, which no optimiser trains.
            tensor = self._tensors.get(states[i])
            if changes and tensor is not None and not read_tensor(tensor).any():
                out.append(self._constant(read_tensor(tensor), f"{CONSTANT_PREFIX}{states[i]}"))
                current_states[i] = out[-1].output[0]
        for iteration in range(iteration_count):
            prefix = f"{stem}{iteration}."
            nodes, iteration_names = iteration_inputs(iteration)
            # A loop has the iteration before its states, a scan its elements behind them.
            read = [*iteration_names, *current_states] if skipped else [*current_states, *iteration_names]
            inputs = {port.name: name for port, name in zip(body.input, read, strict=True)}
            results = [self._names.fresh(f"{prefix}out{i}") for i in range(len(body.output))]
            out += nodes + self._copy_body(body, tensor_names, inputs, prefix, results)
            current_states = results[skipped : skipped + state_count]
            for row, name in zip(rows, results[skipped + state_count :], strict=True):
                row.append(name)
        out += [
            helper.make_node("Identity", [a], [b])
            for a, b in zip(current_states, node.output[:state_count], strict=True)
            if b
        ]
        for i, (row, target) in enumerate(zip(rows, node.output[state_count:], strict=True), state_count):
            if target:
                elements = row[::-1] if backward and backward[i] else row
                self._stacks[target] = axes[i], elements
                out += self._stack(elements, axes[i], target)
        return out

    def _slice(self, node: onnx.NodeProto, _: Mapping[str, Any]) -> list[onnx.NodeProto] | None:
        """Stack only what is read of a stacked output: most recurrent layers return their last state."""
        axis, elements = self._stacks.get(node.input[0], (0, []))
        bounds = [self._constant_value(name) for name in node.input[1:]]
        numbers = [int(b.reshape(-1)[0]) for b in bounds if b is not None and b.size == 1]
        if not elements or len(bounds) not in (3, 4) or len(numbers) < len(bounds):
            return None
        start, end, sliced_axis, step = [*numbers, 1][:4]
        picked = elements[start:end:step] if sliced_axis == axis and step else []
        return self._stack(picked, axis, node.output[0]) if picked else None

    def _check_size(self, node: onnx.NodeProto, body: onnx.GraphProto, iteration_count: int) -> None:
        if iteration_count * max(1, len(body.node)) > self._nodes_left:
            what = f"{node.op_type} {value_text(node.name)}, unrolled"
            raise ModelError(what, expected=f"at most {self._max_nodes} operators")

    def _add_body_tensors(self, body: onnx.GraphProto, prefix: str) -> dict[str, str]:
        """Add a body's tensors to the graph, once for all iterations. Returns their new names."""
        names = {t.name: self._names.fresh(prefix + t.name) for t in body.initializer}
        for tensor in body.initializer:
            self._graph.initializer.add().CopyFrom(tensor)
            self._graph.initializer[-1].name = names[tensor.name]
        return names

    def _copy_body(
        self,
        body: onnx.GraphProto,
        tensor_names: Mapping[str, str],
        inputs: Mapping[str, str],
        prefix: str,
        targets: Sequence[str],
    ) -> list[onnx.NodeProto]:
        """A copy of a body's nodes, with new names for tensors, inputs, outputs (`targets`) and all other values."""
        value_names = dict.fromkeys(o for n in body.node for o in n.output if o)
        result_names = {b.name: o for b, o in zip(body.output, targets, strict=True) if b.name in value_names and o}
        names = {
            **tensor_names,
            **inputs,
            **result_names,
            **{o: self._names.fresh(prefix + o) for o in value_names if o not in result_names},
        }
        out = [onnx.NodeProto() for _ in body.node]
        for copy, inner in zip(out, body.node, strict=True):
            copy.CopyFrom(inner)
            _rename(copy, names)
            copy.name = prefix + inner.name if inner.name else ""
        for value, target in zip(body.output, targets, strict=True):
            if target and names.get(value.name) != target:
                out.append(helper.make_node("Identity", [names.get(value.name, value.name)], [target]))
        return out


def _check_single_number(what: str, node: onnx.NodeProto, value: Array | None) -> None:
    """Make sure that a condition or a number of iterations is one number. Raises `ModelError` if it isn't."""
    if value is not None and (value.size != 1 or value.dtype.kind not in "biu"):
        got = f"{value.size} of type {value.dtype}"
        subject = f"the {what} of {node.op_type} {value_text(node.name)}"
        raise ModelError(subject, expected="one truth or number", got=got)


def _rename(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    """Rename a node's values, also in its sub-graphs."""
    node.input[:] = [names.get(i, i) for i in node.input]
    node.output[:] = [names.get(o, o) for o in node.output]
    # A branch may read values of the graph around it without declaring them.
    for graph in inner_graphs(node):
        for inner in graph.node:
            _rename(inner, names)
        for value in graph.output:
            value.name = names.get(value.name, value.name)
