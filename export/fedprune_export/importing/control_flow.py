"""Removes branches on constants and loops of a constant length: their bodies become functions that are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from fedprune.core.errors import ModelError, value_text
from fedprune_export.importing.graph_writer import GraphWriter, operator_of, write_out_functions
from fedprune_export.importing.metadata import REPEATED_KEY, write_properties
from fedprune_export.importing.node_order import read_names
from fedprune_export.importing.parameter_roles import CONSTANT_PREFIX
from fedprune_export.ir.graph import Array, read_tensor

CONTROL_FLOW = frozenset({"If", "Loop"})

_DOMAIN = "fedprune.bodies"
_MAX_DEPTH = 20  # control flow within control flow
_MAX_BYTES = 2**28  # copies of a body, which may hold constants of bodies within it


def without_control_flow(model: onnx.ModelProto, opset: int, max_nodes: int) -> onnx.ModelProto:
    """The model, which may be changed, with branches on constants and loops of a constant length written out.

    Control flow that depends on data stays, and is refused by name later. Raises `ModelError` if there would be more
    than `max_nodes` operators, or control flow is nested too deeply.
    """
    # Each pass removes one level; the next pass removes the level within it.
    repeated = set[str]()
    for _ in range(_MAX_DEPTH + 1):
        writer = _ControlFlow(model, opset, max_nodes)
        writer.write()
        repeated |= writer.repeated
        if not writer.functions:
            if repeated:
                write_properties(model, {REPEATED_KEY: "\n".join(sorted(repeated))})
            return model
        opsets = [*model.opset_import]
        model.functions.extend(writer.functions)
        model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
        model = write_out_functions(model)
        del model.opset_import[:]
        model.opset_import.extend(opsets)
    raise ModelError(f"branches and loops are nested more than {_MAX_DEPTH} deep")


class _ControlFlow(GraphWriter):
    """Writes one level of control flow as calls.

    Attributes:
        functions: The bodies that are called.
        repeated: Values and tensors that each iteration of a loop reads.
    """

    def __init__(self, model: onnx.ModelProto, opset: int, max_nodes: int) -> None:
        super().__init__(model, opset)
        self._max_nodes, self._nodes_left = max_nodes, max_nodes - len(model.graph.node)
        self._outer_names = {*self._makers, *self._tensors, *(port.name for port in model.graph.input)}
        self.functions: list[onnx.FunctionProto] = []
        self.repeated: set[str] = set()

    def rewrite_node(self, node: onnx.NodeProto) -> Sequence[onnx.NodeProto]:
        """The calls that replace a node; the node itself if its condition or length depends on data."""
        rule = {("", "If"): self._if, ("", "Loop"): self._loop}.get(operator_of(node))
        if rule is None:
            return [node]
        replacement = rule(node, {a.name: helper.get_attribute_value(a) for a in node.attribute})
        return [node] if replacement is None else replacement

    def _if(self, node: onnx.NodeProto, attrs: Mapping[str, Any]) -> list[onnx.NodeProto] | None:
        condition = self._number(node.input[0])
        branch = attrs.get("then_branch" if condition else "else_branch")
        if condition is None or branch is None or len(branch.output) != len(node.output):
            return None
        function, reads, constants = self._add_function(branch, node.output[0])
        return [*constants, helper.make_node(function.name, reads, node.output, domain=_DOMAIN)]

    def _loop(self, node: onnx.NodeProto, attrs: Mapping[str, Any]) -> list[onnx.NodeProto] | None:
        count, condition, *states = [*node.input, "", ""][: max(2, len(node.input))]
        body = attrs.get("body", onnx.GraphProto())
        trips, starts = self._number(count), self._number(condition)
        counts = 2 + len(states), 1 + len(node.output)
        # A damaged loop stays, too, and is refused by name.
        if (len(body.input), len(body.output)) != counts or not any(node.output):
            return None
        if (count and trips is None) or (condition and starts is None):
            return None
        # One more than may be written out, so that a loop that is too long is refused as such.
        limit = 1 + self._nodes_left // max(1, len(body.node))
        limit = 0 if starts == 0 else limit if trips is None else min(limit, trips)
        iteration_count = self._count_iterations(body, states, limit)
        # A stacked output of no iterations would be an empty tensor of unknown shape.
        if iteration_count is None or (iteration_count < 1 and len(node.output) > len(states)):
            return None
        self._nodes_left -= iteration_count * max(1, len(body.node))
        if self._nodes_left < 0:
            raise ModelError(_unrolled_loop(node), expected=f"at most {self._max_nodes} operators")
        return self._unroll(node, body, states, iteration_count)

    def _unroll(
        self, loop: onnx.NodeProto, body: onnx.GraphProto, states: list[str], iteration_count: int
    ) -> list[onnx.NodeProto]:
        """A call per iteration: states pass from one to the next, the other outputs are stacked."""
        stem = loop.output[0]
        function, reads, nodes = self._add_function(body, stem)
        if function.ByteSize() * iteration_count > _MAX_BYTES:
            raise ModelError(_unrolled_loop(loop), expected=f"at most {_MAX_BYTES} bytes")
        self.repeated |= {*states, *reads}
        copies = {n.output[0]: n.input[0] for n in body.node if n.op_type == "Identity" and n.input}
        for i, state in enumerate(states):
            after = body.output[1 + i].name
            while after in copies:
                after = copies[after]
            # A recurrent layer begins with zeros, which no optimiser trains. States that don't change are weights, as
            # TensorFlow hands them on.
            tensor = self._tensors.get(state)
            if after != body.input[2 + i].name and tensor is not None and not read_tensor(tensor).any():
                nodes.append(self._constant(read_tensor(tensor), f"{CONSTANT_PREFIX}{state}"))
                states[i] = nodes[-1].output[0]
        rows: list[list[str]] = [[] for _ in body.output[1 + len(states) :]]
        for iteration in range(iteration_count):
            turn = self._constant(np.array(iteration, np.int64), f"{stem}.{iteration}.turn")
            on = self._constant(np.array(True), f"{stem}.{iteration}.on")
            results = [self._names.fresh(f"{stem}.{iteration}.out{i}") for i in range(len(body.output))]
            inputs = [turn.output[0], on.output[0], *states, *reads]
            nodes += [turn, on, helper.make_node(function.name, inputs, results, domain=_DOMAIN)]
            states = results[1 : 1 + len(states)]
            for row, name in zip(rows, results[1 + len(states) :], strict=True):
                row.append(name)
        for state, target in zip(states, loop.output, strict=False):
            nodes += [helper.make_node("Identity", [state], [target])] if target else []
        for row, target in zip(rows, loop.output[len(states) :], strict=True):
            nodes += self._stack(row, 0, target) if target else []
        return nodes

    def _add_function(
        self, body: onnx.GraphProto, stem: str
    ) -> tuple[onnx.FunctionProto, list[str], list[onnx.NodeProto]]:
        """Add a function that computes what a body does.

        Returns it, the names of the values around the body that it takes behind the body's own inputs, and the body's
        constants, which are among these values: once for all iterations.
        """
        made = {o for n in body.node for o in n.output}
        read = dict.fromkeys(name for node in body.node for name in read_names(node))
        read |= dict.fromkeys(port.name for port in body.output)
        outer_names = self._outer_names - made - {port.name for port in body.input}
        outer = {name: name for name in read if name in outer_names}
        for tensor in body.initializer:
            outer[tensor.name] = self._names.fresh(f"{stem}.{tensor.name}")
            stored = self._graph.initializer.add()
            stored.CopyFrom(tensor)
            stored.name = outer[tensor.name]
            self._tensors[stored.name] = stored
        constants = list[onnx.NodeProto]()
        nodes = [node for node in body.node if operator_of(node) != ("", "Constant")]
        for node in body.node:
            if operator_of(node) == ("", "Constant"):
                outer[node.output[0]] = self._names.fresh(f"{stem}.{node.output[0]}")
                constants.append(onnx.NodeProto())
                constants[-1].CopyFrom(node)
                constants[-1].output[0] = outer[node.output[0]]
        # Each output of a function is made by a node of its own.
        made, outputs = {o for n in nodes for o in n.output}, list[str]()
        for i, port in enumerate(body.output):
            outputs.append(port.name)
            if port.name not in made or port.name in outputs[:-1]:
                outputs[-1] = f"{port.name}.same{i}"
                nodes.append(helper.make_node("Identity", [port.name], outputs[-1:]))
        function = helper.make_function(
            _DOMAIN,
            f"body{len(self.functions)}",
            [*(port.name for port in body.input), *outer],
            outputs,
            nodes,
            self._model.opset_import,
        )
        self.functions.append(function)
        return function, list(outer.values()), constants

    def _count_iterations(self, body: onnx.GraphProto, states: Sequence[str], limit: int) -> int | None:
        """How often a loop runs its body, at most `limit` times; None if that depends on data.

        TensorFlow writes a recurrent layer as a loop that goes on while a counter is below the number of steps.
        """
        if limit < 1:
            return 0
        inner = GraphWriter(onnx.ModelProto(graph=body, opset_import=self._model.opset_import), self._opset)
        turn, on, *ports = (port.name for port in body.input)
        goes_on, *results = (port.name for port in body.output)
        outer_names = {name for node in body.node for name in read_names(node)} | {goes_on}
        constants = self._numbers({name: name for name in outer_names if name in self._outer_names})
        constants[on] = np.array(True)
        always = inner._constant_value(goes_on, constants)
        if always is not None:
            return limit if always.any() else 1
        counters = self._numbers(dict(zip(ports, states, strict=True)))
        for iteration in range(limit):
            known = constants | counters | {turn: np.array(iteration, np.int64)}
            condition = inner._constant_value(goes_on, known)
            if condition is None:
                return None
            if not condition.any():
                return iteration + 1
            after = ((port, inner._constant_value(results[ports.index(port)], known)) for port in counters)
            counters = {port: value for port, value in after if value is not None}
        return limit

    def _numbers(self, names: Mapping[str, str]) -> dict[str, Array]:
        """The values of those names that stand for one constant number."""
        sizes = {name: np.prod(tensor.dims) for name, tensor in self._tensors.items()}
        values = ((key, self._constant_value(name)) for key, name in names.items() if sizes.get(name, 1) == 1)
        return {key: value for key, value in values if value is not None and value.size == 1}

    def _number(self, name: str) -> int | None:
        """A constant condition or number of iterations; None if it is left out, computed or something else."""
        value = self._constant_value(name) if name else None
        return None if value is None or value.size != 1 or value.dtype.kind not in "biu" else int(value.reshape(-1)[0])


def _unrolled_loop(loop: onnx.NodeProto) -> str:
    return f"Loop {value_text(loop.name)}, unrolled"
