"""Recurrent layers: LSTM, GRU and RNN, in one direction or both, of any width.

ONNX's operators have the number of hidden units as an attribute, and don't return the gates that the gradient needs. So
a training graph has a layer in primitives, as a loop over the steps (`autodiff.recurrent_cells`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedprune.core.errors import ModelError
from fedprune_export.autodiff.recurrent_cells import CELLS, Backward, Direction
from fedprune_export.autodiff.tape import Pull, Shape, Tape, describe, gradient_rule
from fedprune_export.channels.atoms import AtomRow, fixed_row
from fedprune_export.channels.rule import Channels, channel_rule
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.operators import INPUT, gradient_reads
from fedprune_export.pruning.masked_reference import MaskWriter, mask_rule
from fedprune_export.pruning.rewrites import Sizes, rewrite

gradient_reads(INPUT, "LSTM", "GRU", "RNN")

# Gates per cell, and so blocks of rows in each weight.
_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@channel_rule(*_GATES)
def recurrent_channels(channels: Channels, node: Node) -> None:
    """Tie the gates' rows to the hidden units. Both directions lose the same units: they share one hidden size."""
    if node.attrs.get("layout", 0):
        channels.fix_inputs(node)
        channels.fix_outputs(node)
        channels.notes.append(f"{node.op} {node.name} has the batch first: its channels stay.")
        return
    gates = _GATES[node.op]
    x, weight, recurrence = (channels.input_rows(node, i) for i in range(3))
    hidden = recurrence[2]
    channels.atoms.tie(weight[2], x[2])
    channels.atoms.tie(weight[1].reshape(gates, -1), hidden)
    channels.atoms.tie(recurrence[1].reshape(gates, -1), hidden)
    # Bias, lengths of the sequences, first states, peepholes: what is left are directions, steps and samples.
    for i, rows in ((3, 2 * gates), (5, 1), (6, 1), (7, 3)):
        if channels.has_input(node, i):
            *lead_axes, units = channels.input_rows(node, i)
            channels.atoms.tie(units.reshape(rows, -1), hidden)
            channels.fix(lead_axes)
    channels.fix([weight[0], recurrence[0], x[0], x[1]])
    for i, name in enumerate(node.outputs):
        if name:
            lead: list[AtomRow] = [fixed_row(n) for n in channels.shape(name)[:-1]]
            channels.set_output(node, [*lead, hidden], i)


@rewrite("LSTM", "GRU", "RNN")
def recurrent_rewrite(graph: Graph, node: Node, sizes: Sizes) -> None:
    """Set the hidden size to the columns that the recurrence has left."""
    node.attrs["hidden_size"] = sizes.cut_sizes(node.inputs[2])[2]


@mask_rule("LSTM", "GRU", "RNN")
def mask_recurrent(masks: MaskWriter, node: Node) -> None:
    """The input's channels, and the hidden units that the recurrence reads."""
    masks.apply(node, 0, [2])
    masks.apply(node, 2, [2])


# The activations of each layer's gates that have a gradient.
_ACTIVATIONS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}


@gradient_rule(*_ACTIVATIONS)
def recurrent(tape: Tape, node: Node) -> Pull:
    """A recurrent layer over [steps, N, inputs].

    Raises `ModelError` if it has options that are seldom used: lengths per sample, peepholes, clipping, other
    activations, the batch first.
    """
    return _Recurrent(tape, node).write()


class _Recurrent:
    """One recurrent layer on the tape."""

    def __init__(self, tape: Tape, node: Node) -> None:
        self.tape, self.node, self.g = tape, node, tape.graph
        self.inputs = [*node.inputs, *[""] * (8 - len(node.inputs))]
        self.outputs = [*node.outputs, *[""] * (3 - len(node.outputs))]
        self.count = 2 if node.attrs.get("direction") == "bidirectional" else 1
        _check_trainable(node, self.inputs, self.count)
        self.steps, self.batch, _ = tape.shape(self.inputs[0])
        self.hidden = tape.shape(self.inputs[2])[2]
        self.forward, self.backward = CELLS[node.op]
        self.initial = self.inputs[5:7] if node.op == "LSTM" else self.inputs[5:6]
        self.directions = self.read_directions()

    def read_directions(self) -> list[Direction]:
        g, tape, op = self.g, self.tape, self.node.op
        weights, recurrences = (self.split_directions(tape.value(n), 0) for n in self.inputs[1:3])
        biases = self.split_directions(tape.value(self.inputs[3]), 0) if self.inputs[3] else [""] * self.count
        states = [self.split_directions(tape.value(n), 0) if n else [self.zeros()] * self.count for n in self.initial]
        names = [str(a).title() for a in self.node.attrs.get("activations", [])] or ["Tanh"] * self.count
        kinds = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}
        # ONNX's default; PyTorch exports linear_before_reset = 1.
        resets_early = not int(self.node.attrs.get("linear_before_reset", 0))
        out = []
        for i, backwards in enumerate(kinds[str(self.node.attrs.get("direction", "forward"))]):
            bias = g.emit_many("Split", biases[i], outputs=2, attrs={"axis": 0}) if biases[i] else []
            initial = [s[i] for s in states]
            activation = names[i] if op == "RNN" else ""
            out.append(Direction(g, backwards, weights[i], recurrences[i], bias, initial, activation, resets_early))
        return out

    def write(self) -> Pull:
        tape, count = self.tape, self.count
        x = tape.value(self.inputs[0])
        runs = [self.forward(d, x) for d in self.directions]
        state: Shape = (count, self.batch, self.hidden)
        if self.outputs[0]:
            sequence: Shape = (self.steps, count, self.batch, self.hidden)
            tape.enter(self.outputs[0], self.stack_directions([r[0] for r in runs], 1), sequence)
        for i, name in enumerate(self.outputs[1:]):
            if name:
                tape.enter(name, self.stack_directions([r[1][i] for r in runs], 0), state)
        return self.pull

    def pull(self, dy: str | None, *dlast: str | None) -> None:
        g, tape = self.g, self.tape
        x = tape.value(self.inputs[0])
        dys = self.split_directions(dy, 1) if dy else [""] * self.count
        dlasts = [*dlast, *[None] * (len(self.initial) - len(dlast))][: len(self.initial)]
        lasts = [self.split_directions(v, 0) if v else [self.zeros()] * self.count for v in dlasts]
        backs = [self.backward(d, dys[i], [last[i] for last in lasts]) for i, d in enumerate(self.directions)]
        if tape.needs_gradient(self.inputs[0]):
            gradients = [g.emit("MatMul", b.inputs, d.weight) for b, d in zip(backs, self.directions, strict=True)]
            tape.add_gradient(self.inputs[0], g.emit("Add", *gradients) if len(gradients) > 1 else gradients[0])
        weight, recurrence, bias = self.inputs[1:4]
        rules: list[tuple[str, Callable[[Backward], list[str]]]] = [
            (weight, lambda b: [self.weight_gradient(b.inputs, x)]),
            (recurrence, lambda b: [self.weight_gradient(gates, h) for gates, h in b.recurrent]),
            (bias, lambda b: [self.bias_gradient(gates) for gates in (b.inputs, *(r[0] for r in b.recurrent))]),
        ]
        for name, rule in rules:
            if name and tape.needs_gradient(name):
                tape.add_gradient(name, self.stack_directions([self.concat(rule(b), 0) for b in backs], 0))
        for i, name in enumerate(self.initial):
            if name and tape.needs_gradient(name):
                tape.add_gradient(name, self.stack_directions([b.states[i] for b in backs], 0))

    def weight_gradient(self, gates: str, read: str) -> str:
        """The sum over steps and samples of the outer products."""
        left, right = (self.g.emit("Flatten", v, attrs={"axis": 2}) for v in (gates, read))
        return self.g.emit("Gemm", left, right, attrs={"transA": 1})

    def bias_gradient(self, gates: str) -> str:
        return self.g.emit("Squeeze", self.tape.sum_leading(gates, (self.steps, self.batch)), self.g.ints(0))

    def zeros(self) -> str:
        return self.g.emit("ConstantOfShape", self.tape.sizes((self.batch, self.hidden)))

    def split_directions(self, value: str, axis: int) -> list[str]:
        """Split a value into its directions, which lie on an axis."""
        g = self.g
        pieces = g.emit_many("Split", value, outputs=2, attrs={"axis": axis}) if self.count > 1 else [value]
        return [g.emit("Squeeze", p, g.ints(axis)) for p in pieces]

    def stack_directions(self, values: Sequence[str], axis: int) -> str:
        """Stack the directions of a value on an axis."""
        return self.concat([self.g.emit("Unsqueeze", v, self.g.ints(axis)) for v in values], axis)

    def concat(self, values: Sequence[str], axis: int) -> str:
        return self.g.emit("Concat", *values, attrs={"axis": axis}) if len(values) > 1 else values[0]


def _check_trainable(node: Node, inputs: Sequence[str], count: int) -> None:
    """Refuse options of a layer that have no gradient rule, with a `ModelError`."""
    usual = list(_ACTIVATIONS[node.op]) * count
    activations = [str(a).title() for a in node.attrs.get("activations", usual)]
    # Other activations would need slopes of their own in the loops back.
    fits = set(activations) <= {"Tanh", "Relu"} if node.op == "RNN" else activations == usual
    missing = {
        "lengths per sample": bool(inputs[4]),
        "peepholes": bool(inputs[7]),
        "the batch first": bool(int(node.attrs.get("layout", 0))),
        "clipping": bool(node.attrs.get("clip", 0)),
        "a forget gate that follows from the input's": bool(int(node.attrs.get("input_forget", 0))),
        f"activations {', '.join(activations)}": not fits or len(activations) != len(usual),
    }
    for option, is_set in missing.items():
        if is_set:
            raise ModelError(f"{describe(node)}: {option}", hint="Such a layer can't be trained.")
