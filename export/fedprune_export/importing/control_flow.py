"""Unrolls loops and inlines branches whose length or condition doesn't depend on data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from fedprune.core.errors import ModelError, shown
from fedprune_export.importing.names import Names
from fedprune_export.importing.sequences import inferred
from fedprune_export.ir.graph import read_tensor

Array = npt.NDArray[Any]

CONTROL_FLOW = frozenset({"If", "Loop", "Scan"})

_DEEPEST = 20  # control flow within control flow

_MOST_STEPS, _LARGE = 200, 2**16  # limits of a length's operators, and of the elements that one reads

_ARITHMETIC = frozenset(
    {
        *("Add", "And", "Cast", "Ceil", "Concat", "Constant", "Div", "Equal", "Floor", "Gather", "Greater"),
        *("GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or"),
        *("ReduceProd", "Reshape", "Shape", "Size", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where"),
    }
)
"""Operators that conditions and lengths are computed with."""

_FAILS = (ArithmeticError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""Errors in evaluating a node of an untrusted file, whose value is then unknown."""

_SIZES = (3, 5)
"""Trial values for sizes that the file leaves open: a result that is equal for both doesn't depend on them."""


def without_control_flow(model: onnx.ModelProto, opset: int, most: int) -> None:
    """Inline branches on constants and unroll loops of a fixed length; the model is changed.

    Control flow that depends on data stays, and is refused by name later.

    Raises `ModelError` if there would be more than `most` operators, or control flow is nested too deeply.
    """
    for _ in range(_DEEPEST):
        writer = _Writer(model, opset, most)
        nodes = [written for node in model.graph.node for written in writer.take(node)]
        if not writer.taken:
            return
        del model.graph.node[:]
        model.graph.node.extend(nodes)
    raise ModelError(f"branches and loops are nested more than {_DEEPEST} deep")


class _Writer:
    """Inlines and unrolls one level of control flow."""

    def __init__(self, model: onnx.ModelProto, opset: int, most: int) -> None:
        self._model, self._graph, self._opset, self._most = model, model.graph, opset, most
        self._made = {o: n for n in model.graph.node for o in n.output if o}
        self._tensors = {t.name: t for t in model.graph.initializer}
        self._shapes: dict[str, list[int | None]] | None = None
        self._names = Names(model.graph)
        self._left = most - len(model.graph.node)
        self.taken = 0

    def take(self, node: onnx.NodeProto) -> Sequence[onnx.NodeProto]:
        """The nodes that replace a node: itself if its condition or length is unknown."""
        rule = {"If": self._if, "Loop": self._loop, "Scan": self._scan}.get(node.op_type)
        if rule is None or node.domain not in ("", "ai.onnx"):
            return [node]
        found = rule(node, {a.name: helper.get_attribute_value(a) for a in node.attribute})
        if found is None:
            return [node]
        self.taken += 1
        return found

    def _if(self, node: onnx.NodeProto, attrs: Mapping[str, Any]) -> list[onnx.NodeProto] | None:
        condition = self._known(node.input[0]) if len(node.input) == 1 else None
        if condition is None:
            return None
        _check_one("condition", node, condition)
        branch = attrs.get("then_branch" if condition.reshape(-1)[0] else "else_branch")
        if branch is None or len(branch.output) != len(node.output):
            raise ModelError(f"If {shown(node.name)} lacks a branch")
        prefix = f"{node.output[0]}."
        return self._written(branch, self._adopted(branch, prefix), {}, prefix, node.output)

    def _loop(self, node: onnx.NodeProto, attrs: Mapping[str, Any]) -> list[onnx.NodeProto] | None:
        count, going, *states = [*node.input, "", ""][: max(2, len(node.input))]
        body, trips = _body(node, attrs), self._known(count) if count else None
        on = self._known(going) if going else np.array(True)
        _check_one("number of turns", node, trips)
        _check_one("condition", node, on)
        wanted = 2 + len(states), 1 + len(node.output)
        if (len(body.input), len(body.output)) != wanted:
            raise ModelError(
                f"the body of Loop {shown(node.name)}",
                expected=f"{wanted[0]} inputs and {wanted[1]} outputs",
                got=f"{len(body.input)} and {len(body.output)}",
            )
        if trips is None or on is None or not self._goes_on(body):
            return None
        times = max(0, int(trips.reshape(-1)[0])) if on.reshape(-1)[0] else 0

        def fed(turn: int) -> tuple[list[onnx.NodeProto], list[str]]:
            made = [self._constant(np.array(turn, np.int64), f"{node.output[0]}.{turn}.turn")]
            made.append(self._constant(np.array(True), f"{node.output[0]}.{turn}.on"))
            return made, [n.output[0] for n in made]

        return self._turns(node, body, times, states, fed, skipped=1, axes=[0] * len(body.output))

    def _scan(self, node: onnx.NodeProto, attrs: Mapping[str, Any]) -> list[onnx.NodeProto] | None:
        body, count = _body(node, attrs), int(attrs.get("num_scan_inputs", 0))
        if self._opset < 9:
            return None
        kept = len(node.input) - count
        made = len(node.output) - kept
        lists = {
            name: list(attrs.get(name, [0] * size))
            for size, *names in (
                (count, "scan_input_axes", "scan_input_directions"),
                (made, "scan_output_axes", "scan_output_directions"),
            )
            for name in names
        }
        if (
            not 0 < count <= len(node.input)
            or made < 0
            or (len(body.input), len(body.output)) != (len(node.input), len(node.output))
            or any(len(values) != (count if "input" in name else made) for name, values in lists.items())
        ):
            raise ModelError(
                f"Scan {shown(node.name)}",
                expected="a value or more to go through, and as many inputs, outputs, axes and directions as its body",
                got=f"{count} of {len(node.input)} inputs to go through, {len(node.output)} outputs, "
                f"and a body with {len(body.input)} and {len(body.output)}",
            )
        states, scanned = list(node.input)[:kept], list(node.input)[kept:]
        axes = lists["scan_input_axes"]
        lengths = {self._size(name, axis) for name, axis in zip(scanned, axes, strict=True)}
        times = lengths.pop()
        if lengths or times is None:
            return None
        self._check_turns(node, body, times)
        backward = lists["scan_input_directions"]
        stem = node.output[0]
        parts = [[self._names.fresh(f"{stem}.{k}.part{t}") for t in range(times)] for k in range(count)]
        before: list[onnx.NodeProto] = []
        for name, axis, names in zip(scanned, axes, parts, strict=True):
            before += self._apart(name, axis, names)

        def fed(turn: int) -> tuple[list[onnx.NodeProto], list[str]]:
            return [], [p[-1 - turn if b else turn] for p, b in zip(parts, backward, strict=True)]

        out_axes = [0] * kept + lists["scan_output_axes"]
        out_backward = [0] * kept + lists["scan_output_directions"]
        turns = self._turns(node, body, times, states, fed, skipped=0, axes=out_axes, backward=out_backward)
        return None if turns is None else before + turns

    def _turns(
        self,
        node: onnx.NodeProto,
        body: onnx.GraphProto,
        times: int,
        states: Sequence[str],
        fed: Any,
        *,
        skipped: int,
        axes: Sequence[int],
        backward: Sequence[int] | None = None,
    ) -> list[onnx.NodeProto] | None:
        """Unroll a body: states pass from one iteration to the next, the other outputs are stacked.

        Args:
            fed: Gives what a turn reads besides the states: nodes, and the names that they make.
            skipped: How many outputs of the body come before the states.
            axes: Along which axis each output is put together.
        """
        self._check_turns(node, body, times)
        self._left -= times * max(1, len(body.node))
        kept, further = len(states), len(body.output) - skipped - len(states)
        if not times and further:
            return None
        stem = f"{node.output[0]}."
        own, out, now = self._adopted(body, stem), list[onnx.NodeProto](), list(states)
        rows: list[list[str]] = [[] for _ in range(further)]
        for turn in range(times):
            prefix = f"{stem}{turn}."
            nodes, given = fed(turn)
            # A loop's turn comes before its states, a scan's parts behind them.
            read = [*given, *now] if skipped else [*now, *given]
            inputs = {port.name: name for port, name in zip(body.input, read, strict=True)}
            results = [self._names.fresh(f"{prefix}out{i}") for i in range(len(body.output))]
            out += nodes + self._written(body, own, inputs, prefix, results)
            now = results[skipped : skipped + kept]
            for row, name in zip(rows, results[skipped + kept :], strict=True):
                row.append(name)
        out += [helper.make_node("Identity", [a], [b]) for a, b in zip(now, node.output[:kept], strict=True) if b]
        for i, (row, target) in enumerate(zip(rows, node.output[kept:], strict=True), kept):
            if target:
                out += self._together(row[::-1] if backward and backward[i] else row, axes[i], target)
        return out

    def _check_turns(self, node: onnx.NodeProto, body: onnx.GraphProto, times: int) -> None:
        if times * max(1, len(body.node)) > self._left:
            raise ModelError(f"{node.op_type} {shown(node.name)}, unrolled", expected=f"at most {self._most} operators")

    # -- graphs within graphs -----------------------------------------------------------------------------------------

    def _adopted(self, body: onnx.GraphProto, prefix: str) -> dict[str, str]:
        """The new names of a body's tensors, which join the graph's once."""
        names = {t.name: self._names.fresh(prefix + t.name) for t in body.initializer}
        for tensor in body.initializer:
            self._graph.initializer.add().CopyFrom(tensor)
            self._graph.initializer[-1].name = names[tensor.name]
        return names

    def _written(
        self,
        body: onnx.GraphProto,
        own: Mapping[str, str],
        inputs: Mapping[str, str],
        prefix: str,
        targets: Sequence[str],
    ) -> list[onnx.NodeProto]:
        """A body's nodes under names of their own.

        Args:
            own: New names of its tensors.
            inputs: What its inputs are.
            targets: What its outputs are called.
        """
        made = dict.fromkeys(o for n in body.node for o in n.output if o)
        moved = {b.name: o for b, o in zip(body.output, targets, strict=True) if b.name in made and o}
        names = {**own, **inputs, **moved, **{o: self._names.fresh(prefix + o) for o in made if o not in moved}}
        out = [onnx.NodeProto() for _ in body.node]
        for copy, inner in zip(out, body.node, strict=True):
            copy.CopyFrom(inner)
            _rename(copy, names)
            copy.name = prefix + inner.name if inner.name else ""
        for value, target in zip(body.output, targets, strict=True):
            if target and names.get(value.name) != target:
                out.append(helper.make_node("Identity", [names.get(value.name, value.name)], [target]))
        return out

    def _goes_on(self, body: onnx.GraphProto) -> bool:
        """Whether the condition that a loop's body ends with is always true."""
        made = {o: n for n in body.node for o in n.output}
        tensors = {t.name: t for t in body.initializer}
        name = body.output[0].name
        while name in made and made[name].op_type == "Identity":
            name = made[name].input[0]
        if name == body.input[1].name:
            return True
        constant = tensors.get(name) or (_constant_of(made[name]) if name in made else self._tensors.get(name))
        return constant is not None and bool(read_tensor(constant).all())

    # -- pieces of tensors --------------------------------------------------------------------------------------------

    def _constant(self, value: Array, name: str) -> onnx.NodeProto:
        name = self._names.fresh(name)
        return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value, name))

    def _apart(self, name: str, axis: int, parts: Sequence[str]) -> list[onnx.NodeProto]:
        """A value's slices along an axis, with the axis removed."""
        rows = [self._names.fresh(f"{p}.row") for p in parts]
        out = self._listing("Split", name, "split", [1] * len(parts), rows, axis=axis)
        for row, part in zip(rows, parts, strict=True):
            out += self._listing("Squeeze", row, "axes", [axis], [part])
        return out

    def _together(self, parts: Sequence[str], axis: int, target: str) -> list[onnx.NodeProto]:
        """Stack values along a new axis."""
        rows = [self._names.fresh(f"{p}.row") for p in parts]
        out = [
            n for p, row in zip(parts, rows, strict=True) for n in self._listing("Unsqueeze", p, "axes", [axis], [row])
        ]
        return [*out, helper.make_node("Concat", rows, [target], axis=axis)]

    def _listing(
        self, op: str, name: str, what: str, values: Sequence[int], outputs: Sequence[str], **attrs: Any
    ) -> list[onnx.NodeProto]:
        """A node that takes a list: an attribute until opset 12, then an input."""
        if self._opset < 13:
            return [helper.make_node(op, [name], outputs, **{**attrs, what: values})]
        listed = self._constant(np.array(values, np.int64), f"{outputs[0]}.{what}")
        return [listed, helper.make_node(op, [name, listed.output[0]], outputs, **attrs)]

    # -- what is known ------------------------------------------------------------------------------------------------

    def _size(self, name: str, axis: int) -> int | None:
        shape = self._shape(name)
        return shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None

    def _shape(self, name: str) -> list[int | None] | None:
        if self._shapes is None:
            self._shapes = inferred(self._model)
        return self._shapes.get(name)

    def _known(self, name: str) -> Array | None:
        """A value that doesn't depend on data, computed from constants and known sizes; None for any other."""
        found = [self._computed(name, size) for size in _SIZES]
        same = all(f is not None and found[0] is not None and np.array_equal(f, found[0]) for f in found)
        return found[0] if same else None

    def _computed(self, name: str, free: int) -> Array | None:
        """The value with `free` for every size that a file leaves open; None if it depends on something else."""
        order = self._arithmetic(name)
        if order is None:
            return None
        from onnx.reference import ReferenceEvaluator  # 12 MB: servers, too, import this module

        values: dict[str, Array] = {}
        for node in order:
            constant = _constant_of(node)
            if constant is not None:
                values[node.output[0]] = read_tensor(constant)
                continue
            if node.op_type == "Shape":
                shape = self._shape(node.input[0])
                attrs = {a.name: a.i for a in node.attribute}
                sizes = [free if d is None else d for d in shape or ()][attrs.get("start", 0) : attrs.get("end")]
                values[node.output[0]] = np.array(sizes, np.int64)
                continue
            read = [values[i] if i in values else read_tensor(self._tensors[i]) for i in node.input if i]
            if math.prod(max(1, r.size) for r in read) > _LARGE:
                return None
            fed = dict(zip([i for i in node.input if i], read, strict=True))
            try:
                results: Any = ReferenceEvaluator(node).run(None, fed)
            except _FAILS:
                return None
            values.update(zip(node.output, results, strict=False))
        return values[name] if name in values else read_tensor(self._tensors[name])

    def _arithmetic(self, name: str) -> list[onnx.NodeProto] | None:
        """The nodes that compute a value, in order; None if it depends on data, or is more than arithmetic."""
        order: dict[int, onnx.NodeProto] = {}
        todo = [(name, False)]
        while todo:
            value, ready = todo.pop()
            node = self._made.get(value)
            if node is None:
                if value not in self._tensors:
                    return None
            elif ready:
                order.setdefault(id(node), node)
            elif id(node) not in order:
                known = node.op_type != "Shape" or self._shape(node.input[0]) is not None
                if len(todo) > _MOST_STEPS or node.op_type not in _ARITHMETIC or not known:
                    return None
                todo.append((value, True))
                todo += [(i, False) for i in node.input if i] if node.op_type != "Shape" else []
        return list(order.values())


def _check_one(what: str, node: onnx.NodeProto, value: Array | None) -> None:
    """Raises `ModelError` if what decides on branches and turns isn't one number."""
    if value is not None and (value.size != 1 or value.dtype.kind not in "biu"):
        got = f"{value.size} of type {value.dtype}"
        raise ModelError(f"the {what} of {node.op_type} {shown(node.name)}", expected="one truth or number", got=got)


def _body(node: onnx.NodeProto, attrs: Mapping[str, Any]) -> onnx.GraphProto:
    """The graph that a node repeats. Raises `ModelError` if it has none, or no outputs of its own."""
    body = attrs.get("body")
    if not isinstance(body, onnx.GraphProto) or not any(node.output):
        raise ModelError(f"{node.op_type} {shown(node.name)} lacks a body or outputs")
    return body


def _constant_of(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The tensor of a Constant node."""
    if node.op_type != "Constant":
        return None
    return next((a.t for a in node.attribute if a.name == "value"), None)


def _rename(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    """Give a node's values other names, also where graphs within read them."""
    node.input[:] = [names.get(i, i) for i in node.input]
    node.output[:] = [names.get(o, o) for o in node.output]
    for attribute in node.attribute:
        for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            for inner in graph.node:
                _rename(inner, names)
            for value in graph.output:
                value.name = names.get(value.name, value.name)
