"""Gradient rules of recurrent layers: LSTM, GRU and plain ones, in one direction or both, of any width.

The operators have the number of hidden units as an attribute, and give none of the gates that the gradient needs: what
the training graph holds of a layer is written out.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedprune.core.errors import ModelError
from fedprune_export.autodiff.cells import CELLS, Direction
from fedprune_export.autodiff.tape import Pull, Shape, Tape, describe, rule
from fedprune_export.ir.graph import Node

_ACTIVATIONS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}


@rule(*_ACTIVATIONS)
def recurrent(tape: Tape, node: Node) -> Pull:
    """A recurrent layer over [steps, N, inputs].

    Raises:
        ModelError: It has what is seldom used: lengths per sample, peepholes, clipping, other activations, the batch
            first.
    """
    return _Recurrent(tape, node).write()


class _Recurrent:
    """One recurrent layer on the tape."""

    def __init__(self, tape: Tape, node: Node) -> None:
        self.tape, self.node, self.g = tape, node, tape.graph
        self.inputs = [*node.inputs, *[""] * (8 - len(node.inputs))]
        self.outputs = [*node.outputs, *[""] * (3 - len(node.outputs))]
        self.count = 2 if node.attrs.get("direction") == "bidirectional" else 1
        _check(node, self.inputs, self.count)
        self.steps, self.batch, _ = tape.shape(self.inputs[0])
        self.hidden = tape.shape(self.inputs[2])[2]
        early = node.op == "GRU" and not int(node.attrs.get("linear_before_reset", 0))
        self.forward, self.backward = CELLS["early GRU" if early else node.op]
        self.initial = self.inputs[5:7] if node.op == "LSTM" else self.inputs[5:6]
        self.directions = self.parted()

    def parted(self) -> list[Direction]:
        g, tape, op = self.g, self.tape, self.node.op
        weights, recurrences = (self.apart(tape.value(n), 0) for n in self.inputs[1:3])
        biases = self.apart(tape.value(self.inputs[3]), 0) if self.inputs[3] else [""] * self.count
        states = [self.apart(tape.value(n), 0) if n else [self.zeros()] * self.count for n in self.initial]
        names = [str(a).title() for a in self.node.attrs.get("activations", [])] or ["Tanh"] * self.count
        kinds = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}
        out = []
        for i, backwards in enumerate(kinds[str(self.node.attrs.get("direction", "forward"))]):
            bias = g.emit_many("Split", biases[i], outputs=2, attrs={"axis": 0}) if biases[i] else []
            own = [s[i] for s in states]
            activation = names[i] if op == "RNN" else ""
            out.append(Direction(g, backwards, weights[i], recurrences[i], bias, own, activation))
        return out

    def write(self) -> Pull:
        tape, count = self.tape, self.count
        x = tape.value(self.inputs[0])
        runs = [self.forward(d, x) for d in self.directions]
        state: Shape = (count, self.batch, self.hidden)
        if self.outputs[0]:
            sequence: Shape = (self.steps, count, self.batch, self.hidden)
            tape.enter(self.outputs[0], self.together([r[0] for r in runs], 1), sequence)
        for i, name in enumerate(self.outputs[1:]):
            if name:
                tape.enter(name, self.together([r[1][i] for r in runs], 0), state)
        return self.pull

    def pull(self, dy: str | None, *dlast: str | None) -> None:
        g, tape = self.g, self.tape
        x = tape.value(self.inputs[0])
        dys = self.apart(dy, 1) if dy else [""] * self.count
        wanted = [*dlast, *[None] * (len(self.initial) - len(dlast))][: len(self.initial)]
        lasts = [self.apart(v, 0) if v else [self.zeros()] * self.count for v in wanted]
        backs = [self.backward(d, dys[i], [last[i] for last in lasts]) for i, d in enumerate(self.directions)]
        if tape.wants(self.inputs[0]):
            parts = [g.emit("MatMul", b.inputs, d.weight) for b, d in zip(backs, self.directions, strict=True)]
            tape.add(self.inputs[0], g.emit("Add", *parts) if len(parts) > 1 else parts[0])
        if tape.wants(self.inputs[1]):
            tape.add(self.inputs[1], self.together([self.contracted(b.inputs, x) for b in backs], 0))
        if tape.wants(self.inputs[2]):
            products = [[self.contracted(gates, h) for gates, h in b.recurrent] for b in backs]
            tape.add(self.inputs[2], self.together([self.joined(p, 0) for p in products], 0))
        if self.inputs[3] and tape.wants(self.inputs[3]):
            sums = [[self.summed(b.inputs), *(self.summed(gates) for gates, _ in b.recurrent)] for b in backs]
            tape.add(self.inputs[3], self.together([self.joined(s, 0) for s in sums], 0))
        for i, name in enumerate(self.initial):
            if name and tape.wants(name):
                tape.add(name, self.together([b.states[i] for b in backs], 0))

    def contracted(self, gates: str, read: str) -> str:
        """The sum over steps and samples of the outer products."""
        left, right = (self.g.emit("Flatten", v, attrs={"axis": 2}) for v in (gates, read))
        return self.g.emit("Gemm", left, right, attrs={"transA": 1})

    def summed(self, gates: str) -> str:
        return self.g.emit("ReduceSum", gates, self.g.ints(0, 1), attrs={"keepdims": 0})

    def zeros(self) -> str:
        return self.g.emit("ConstantOfShape", self.tape.sizes((self.batch, self.hidden)))

    def apart(self, value: str, axis: int) -> list[str]:
        """The directions of a value that has them on an axis."""
        g = self.g
        parts = g.emit_many("Split", value, outputs=2, attrs={"axis": axis}) if self.count > 1 else [value]
        return [g.emit("Squeeze", p, g.ints(axis)) for p in parts]

    def together(self, values: Sequence[str], axis: int) -> str:
        """The reverse."""
        return self.joined([self.g.emit("Unsqueeze", v, self.g.ints(axis)) for v in values], axis)

    def joined(self, values: Sequence[str], axis: int) -> str:
        return self.g.emit("Concat", *values, attrs={"axis": axis}) if len(values) > 1 else values[0]


def _check(node: Node, inputs: Sequence[str], count: int) -> None:
    """Raise ModelError for what has no rule."""
    usual = list(_ACTIVATIONS[node.op]) * count
    given = [str(a).title() for a in node.attrs.get("activations", usual)]
    fits = set(given) <= {"Tanh", "Relu"} if node.op == "RNN" else given == usual
    missing = {
        "lengths per sample": bool(inputs[4]),
        "peepholes": bool(inputs[7]),
        "the batch first": bool(int(node.attrs.get("layout", 0))),
        "clipping": bool(node.attrs.get("clip", 0)),
        "a forget gate that follows from the input's": bool(int(node.attrs.get("input_forget", 0))),
        f"activations {', '.join(given)}": not fits or len(given) != len(usual),
    }
    for what, there in missing.items():
        if there:
            raise ModelError(f"{describe(node)}: {what}", hint="Such a layer can't be trained.")
