"""Writes out what no later pass reads: branches on constants, loops of a constant length, sequences, reversals of whole
axes, and scalers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from fedprune.core.errors import ModelError, value_text
from fedprune_export.importing.metadata import REPEATED_KEY, write_properties
from fedprune_export.importing.model_file import check_valid_onnx
from fedprune_export.importing.node_order import inner_graphs
from fedprune_export.importing.node_writer import NodeWriter, operator_of
from fedprune_export.importing.parameter_roles import CONSTANT_PREFIX
from fedprune_export.ir.graph import Array, read_tensor

_Attributes = Mapping[str, Any]

ML_DOMAIN = "ai.onnx.ml"

# Operators of control flow, and of sequences, which exporters emit for chunk, unbind and stack: what becomes of them.
WRITTEN_OUT = {
    **dict.fromkeys(("If", "Loop"), "unrolled on import, if it doesn't depend on the data"),
    "SplitToSequence": "becomes Split on import",
    "ConcatFromSequence": "becomes Concat on import",
    **dict.fromkeys(("SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceInsert"), "removed on import"),
}

# Every element of a sequence becomes a value of its own. A split into more is most likely a damaged file.
_MAX_ELEMENTS = 4096

_REVERSED_END = -(2**63) + 1  # the end of a reversed axis, as torch's exporters write it


def write_out(model: onnx.ModelProto, max_nodes: int) -> onnx.ModelProto:
    """The model without what `RULES` write out; itself if it has none.

    Control flow that depends on data stays, and is refused by name later. Raises `ModelError` if there would be more
    than `max_nodes` operators, the length of a sequence isn't known, or an estimator can't be trained.
    """
    if not any(operator_of(node) in RULES and node.op_type != "Slice" for node in model.graph.node):
        return model
    check_valid_onnx(model)
    unrolling = _Unrolling(model, max_nodes)
    unrolling.write(model.graph.node)
    written = unrolling.written_model()
    if unrolling.repeated:
        write_properties(written, {REPEATED_KEY: "\n".join(sorted(unrolling.repeated))})
    return written


class _Unrolling(NodeWriter):
    """Writes the nodes of a graph, and those of a body wherever it is run, under names of its own."""

    def __init__(self, model: onnx.ModelProto, max_nodes: int) -> None:
        super().__init__(model)
        self._max_nodes = max_nodes
        self._scope: Mapping[str, str] = {}  # what values of the bodies that are being written are called
        self._sequences: dict[str, list[str]] = {}
        self._stacks: dict[str, list[str]] = {}  # rows that are stacked along axis 0, by what they become
        # Bodies by their ids, with the names of their constants outside.
        self._stored: dict[int, tuple[onnx.GraphProto, dict[str, str]]] = {}
        self.repeated: set[str] = set()

    def write(self, nodes: Iterable[onnx.NodeProto]) -> None:
        """Write nodes of a graph or body, or what they stand for."""
        names = self._scope
        for node in nodes:
            # Attributes may be large bodies, which are copied only if the node stays.
            own = onnx.NodeProto(op_type=node.op_type, domain=node.domain, name=node.name)
            own.input.extend(names.get(i, i) for i in node.input)
            own.output.extend(names.get(o, o) for o in node.output)
            rule = RULES.get(operator_of(node))
            if rule is not None and rule(self, own, {a.name: helper.get_attribute_value(a) for a in node.attribute}):
                continue
            elements = next((self._sequences[i] for i in own.input if i in self._sequences), None)
            if elements is not None and node.op_type == "Identity":
                self._emit_copies(own.input, own.output)
                continue
            if elements is not None:
                hint = "Export it without loops over lists, or give its torch module itself."
                raise ModelError(f"{_label(node)} reads a sequence", hint=hint)
            own.attribute.extend(node.attribute)
            for graph in inner_graphs(own):
                _rename(graph, names)
            self.add(own)

    # -- control flow --------------------------------------------------------------------------------------------------

    def branch(self, node: onnx.NodeProto, attrs: _Attributes) -> bool:
        condition = self.number(node.input[0])
        branch = attrs.get("then_branch" if condition else "else_branch")
        if condition is None or branch is None or len(branch.output) != len(node.output):
            return False
        self._emit_copies(self._write_body(branch, {}, node, node.output[0]), node.output)
        return True

    def loop(self, node: onnx.NodeProto, attrs: _Attributes) -> bool:
        count, condition, *states = [*node.input, "", ""][: max(2, len(node.input))]
        body, stem = attrs.get("body", onnx.GraphProto()), next(filter(None, node.output), "")
        trips, goes_on = self.number(count), self.number(condition) if condition else 1
        counts = 2 + len(states), 1 + len(node.output)
        # A damaged loop stays, too, and is refused by name.
        if (len(body.input), len(body.output)) != counts or not stem:
            return False
        if (count and trips is None) or goes_on is None:
            return False
        copies = {n.output[0]: n.input[0] for n in body.node if n.op_type == "Identity" and n.input}
        after = [port.name for port in body.output]
        while any(name in copies for name in after):
            after = [copies.get(name, name) for name in after]
        stays = [name == port.name for name, port in zip(after, body.input[1:], strict=False)]
        if stays[0] and goes_on and trips is not None:
            self._check_length(node, trips * max(1, len(body.node)))
        first, iteration, rows = len(self.nodes), 0, [list[str]() for _ in node.output[len(states) :]]
        states = [s if stays[1 + i] else self._first_state(s) for i, s in enumerate(states)]
        on = self.emit_constant(np.array(True), f"{stem}.on")
        while goes_on != 0 and iteration != trips:
            turn = self.emit_constant(np.array(iteration, np.int64), f"{stem}.{iteration}.turn")
            ports = dict(zip((port.name for port in body.input), [turn, on, *states], strict=True))
            on_output, *results = self._write_body(body, ports, node, f"{stem}.{iteration}")
            goes_on = goes_on if stays[0] else self.number(on_output)
            if goes_on is None:
                break
            states, iteration = results[: len(states)], iteration + 1
            for row, name in zip(rows, results[len(states) :], strict=True):
                row.append(name)
        # A stacked output of no iterations would be an empty tensor of unknown shape.
        if goes_on is None or not all(rows):
            self.nodes[first:] = [n for n in self.nodes[first:] if n.op_type == "Constant"]
            return False
        outputs = {o for written in self.nodes[first:] for o in written.output}
        self.repeated.update(i for written in self.nodes[first:] for i in written.input if i not in outputs)
        self._emit_copies(states, node.output)
        for row, target in zip(rows, node.output[len(states) :], strict=True):
            if target:
                self._emit_stack(row, 0, target)
        return True

    def _first_state(self, state: str) -> str:
        """A state that changes, before the first iteration: a constant if it is stored zeros, with which a recurrent
        layer begins, and which no optimiser trains. States that stay are weights, as TensorFlow hands them on."""
        tensor = next((t for t in self.model.graph.initializer if t.name == state), None)
        zeros = None if tensor is None else read_tensor(tensor)
        return state if zeros is None or zeros.any() else self.emit_constant(zeros, f"{CONSTANT_PREFIX}{state}")

    def _write_body(
        self, body: onnx.GraphProto, ports: Mapping[str, str], node: onnx.NodeProto, stem: str
    ) -> list[str]:
        """Write the nodes of a body whose inputs are these values. Returns the names of its outputs."""
        outer_scope, nodes, constants = self._scope, list[onnx.NodeProto](), list[onnx.NodeProto]()
        for inner in body.node:
            (constants if operator_of(inner) == ("", "Constant") else nodes).append(inner)
        # Its constants are stored once, however often it runs.
        if id(body) not in self._stored:
            stored = [*(t.name for t in body.initializer), *(n.output[0] for n in constants)]
            names = {name: self.names.fresh(f"{node.output[0]}.{name}") for name in stored}
            self._stored[id(body)] = body, names
            for tensor in body.initializer:
                self.add_tensor(tensor, names[tensor.name])
            self._scope = names
            self.write(constants)
        outputs = {o: self.names.fresh(f"{stem}.{o}") for n in nodes for o in n.output if o}
        self._scope = {**outer_scope, **self._stored[id(body)][1], **ports, **outputs}
        self.write(nodes)
        self._check_length(node, len(self.nodes))
        results = [self._scope.get(port.name, port.name) for port in body.output]
        self._scope = outer_scope
        return results

    def _check_length(self, node: onnx.NodeProto, operators: int) -> None:
        if operators > self._max_nodes:
            raise ModelError(f"{_label(node)}, unrolled", expected=f"at most {self._max_nodes} operators")

    # -- sequences -----------------------------------------------------------------------------------------------------

    def construct(self, node: onnx.NodeProto, attrs: _Attributes) -> bool:
        self._sequences[node.output[0]] = list(node.input)
        return True

    def insert(self, node: onnx.NodeProto, attrs: _Attributes) -> bool:
        elements = list(self._elements(node))
        elements.insert(self._position(node, 2, len(elements) + 1), node.input[1])
        self._sequences[node.output[0]] = elements
        return True

    def take(self, node: onnx.NodeProto, attrs: _Attributes) -> bool:
        elements = self._elements(node)
        self._emit_copies([elements[self._position(node, 1, len(elements))]], node.output)
        return True

    def split(self, node: onnx.NodeProto, attrs: _Attributes) -> bool:
        x, axis, split = node.input[0], int(attrs.get("axis", 0)), self._integers(node, 1)
        if split is not None and split.ndim:
            sizes = split.tolist()
        else:
            total, chunk_size = self.size(x, axis), 1 if split is None else int(split)
            if total is None:
                raise ModelError(f"{_label(node)} splits an axis of unknown size")
            starts = range(0, total, chunk_size) if chunk_size > 0 else range(0)
            sizes = [min(chunk_size, total - start) for start in starts[: 1 + _MAX_ELEMENTS]]
        if not 0 < len(sizes) <= _MAX_ELEMENTS:
            raise ModelError(f"parts of {_label(node)}", expected=f"1 to {_MAX_ELEMENTS}", got=len(sizes))
        elements = self._sequences[node.output[0]] = [self.names.fresh(f"{node.output[0]}_0") for _ in sizes]
        has_axis = split is not None or attrs.get("keepdims", 1)
        rows = elements if has_axis else [self.names.fresh(f"{element}.row") for element in elements]
        self.emit_with_list("Split", x, "split", sizes, rows, axis=axis)
        for row, element in zip(rows, elements, strict=True):
            if not has_axis:
                self.emit_with_list("Squeeze", row, "axes", [axis], [element])
        return True

    def concatenate(self, node: onnx.NodeProto, attrs: _Attributes) -> bool:
        elements, axis = self._elements(node), int(attrs.get("axis", 0))
        if attrs.get("new_axis", 0):
            self._emit_stack(elements, axis, node.output[0])
        else:
            self.emit("Concat", elements, node.output, axis=axis)
        return True

    def _elements(self, node: onnx.NodeProto) -> list[str]:
        if node.input[0] not in self._sequences:
            raise ModelError(f"{_label(node)} reads a sequence of unknown length")
        return self._sequences[node.input[0]]

    def _position(self, node: onnx.NodeProto, index: int, count: int) -> int:
        """The position among so many that a node reads or writes, by default the last."""
        numbers = self._integers(node, index)
        position = -1 if numbers is None else int(numbers.reshape(-1)[0]) if numbers.size == 1 else count
        if not -count <= position < count:
            raise ModelError(_label(node), expected=f"an index into {count} elements", got=position)
        return position % count

    def _integers(self, node: onnx.NodeProto, index: int) -> Array | None:
        """The constant integers at an input; None where it is left out."""
        if len(node.input) <= index or not node.input[index]:
            return None
        numbers = self.value(node.input[index])
        if numbers is None or numbers.dtype.kind not in "iu":
            got = "computed ones" if numbers is None else numbers.dtype
            raise ModelError(f"numbers that {_label(node)} takes", expected="constant integers", got=got)
        return numbers

    # -- other operators -----------------------------------------------------------------------------------------------

    def slice(self, node: onnx.NodeProto, attrs: _Attributes) -> bool:
        """Stack only what is read of stacked states: most recurrent layers return their last one."""
        rows = self._stacks.get(node.input[0])
        if rows is None or len(node.input) < 4:
            return False
        start, end, axis, step = [*map(self.number, node.input[1:]), 1][:4]
        if axis != 0 or not step or start is None or end is None or not rows[start:end:step]:
            return False
        self.emit("Concat", rows[start:end:step], node.output, axis=0)
        return True

    def reverse(self, node: onnx.NodeProto, attrs: _Attributes) -> bool:
        """A Slice for a ReverseSequence of full lengths: TensorFlow has no other operator to reverse an axis, so
        tf2onnx writes a backward layer with as many equal lengths as there are samples."""
        axis, (x, lengths) = int(attrs.get("time_axis", 0)), node.input
        for inferred in self.inferences():
            shape, numbers = inferred.shapes.get(x, ()), inferred.numbers.get(lengths)
            if axis >= len(shape) or numbers is None or (numbers != shape[axis]).any():
                return False
        bounds = [self.emit_constant(np.array([number]), node.output[0]) for number in (-1, _REVERSED_END, axis, -1)]
        self.emit("Slice", [x, *bounds], node.output, name=node.name)
        return True

    def scale(self, node: onnx.NodeProto, attrs: _Attributes) -> bool:
        """Scikit-learn's StandardScaler."""
        stem = node.output[0]
        floats, centred = self.names.fresh(f"{stem}.floats"), self.names.fresh(f"{stem}.centred")
        offset, scale = (
            self.emit_constant(np.array(attrs[key], np.float32), f"{CONSTANT_PREFIX}{stem}.{key}")
            for key in ("offset", "scale")
        )
        self.emit("Cast", node.input, [floats], to=onnx.TensorProto.FLOAT)
        self.emit("Sub", [floats, offset], [centred])
        self.emit("Mul", [centred, scale], [stem])
        return True

    def refuse_estimator(self, node: onnx.NodeProto, attrs: _Attributes) -> bool:
        raise ModelError(
            f"{_label(node)} is an estimator whose parameters no gradient trains",
            expected="a network",
            hint="Fit scikit-learn's MLPClassifier or MLPRegressor to the same data (a linear model is one with "
            "hidden_layer_sizes=()), and export that.",
        )

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def _emit_copies(self, values: Sequence[str], outputs: Sequence[str]) -> None:
        for value, output in zip(values, outputs, strict=False):
            if value in self._sequences:
                self._sequences[output] = self._sequences[value]
            elif output:
                self.emit("Identity", [value], [output])

    def _emit_stack(self, elements: Sequence[str], axis: int, output: str) -> None:
        rows = [self.names.fresh(f"{element}.row") for element in elements]
        for element, row in zip(elements, rows, strict=True):
            self.emit_with_list("Unsqueeze", element, "axes", [axis], [row])
        self.emit("Concat", rows, [output], axis=axis)
        if axis == 0:
            self._stacks[output] = rows


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Let a body that stays read values around it by their new names."""
    for node in graph.node:
        node.input[:] = [names.get(i, i) for i in node.input]
        for inner in inner_graphs(node):
            _rename(inner, names)
    for port in graph.output:
        port.name = names.get(port.name, port.name)


def _label(node: onnx.NodeProto) -> str:
    return f"{node.op_type} {value_text(node.name or next(iter(node.output), ''))}"


RULES: dict[tuple[str, str], Callable[[_Unrolling, onnx.NodeProto, _Attributes], bool]] = {
    ("", "If"): _Unrolling.branch,
    ("", "Loop"): _Unrolling.loop,
    ("", "SplitToSequence"): _Unrolling.split,
    ("", "SequenceConstruct"): _Unrolling.construct,
    ("", "SequenceEmpty"): _Unrolling.construct,
    ("", "SequenceInsert"): _Unrolling.insert,
    ("", "SequenceAt"): _Unrolling.take,
    ("", "ConcatFromSequence"): _Unrolling.concatenate,
    ("", "ReverseSequence"): _Unrolling.reverse,
    ("", "Slice"): _Unrolling.slice,
    (ML_DOMAIN, "Scaler"): _Unrolling.scale,
    **{
        (ML_DOMAIN, name): _Unrolling.refuse_estimator
        for name in (
            *("LinearClassifier", "LinearRegressor", "SVMClassifier", "SVMRegressor"),
            *("TreeEnsemble", "TreeEnsembleClassifier", "TreeEnsembleRegressor"),
        )
    },
}
