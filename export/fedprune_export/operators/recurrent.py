"""Recurrent layers: LSTM, GRU and plain ones, in one direction or both, of any width.

ONNX's operators have the number of hidden units as an attribute, and don't return the gates that the gradient needs. So
a training graph has a layer in primitives: one matrix product with the input over the whole sequence, and a loop (a
Scan node) for the recurrence. Backwards a second loop does only what depends on the next step; the gradient of each
parameter is then one product over the whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from onnx import TensorProto, helper, numpy_helper

from fedprune.core.errors import ModelError
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


# Writes one step of a loop into its body: takes the names of states and of slices of the inputs, and returns those of
# the next states and of slices of the outputs. It may read values of the graph around the body.
Step = Callable[[Graph, list[str], list[str]], tuple[list[str], list[str]]]


def scan(
    g: Graph, states: Sequence[str], sliced: Sequence[str], step: Step, *, backwards: bool = False
) -> tuple[list[str], list[str]]:
    """Take one step per index of the first axis.

    Args:
        states: What is carried from step to step.
        sliced: Values of which each step gets one index of the first axis.
        step: The step; all of its values are float32.
        backwards: Whether it goes from the last index to the first; the outputs are in the order of the inputs.

    Returns:
        The last states, and the slices that went out, stacked.
    """
    # Names continue those of the outer graph, because a body sees its values.
    body = Graph(name="step", _counter=g._counter)
    states_in, slices_in = (
        [body.fresh(stem) for _ in values] for stem, values in (("state", states), ("slice", sliced))
    )
    following, written = step(body, states_in, slices_in)
    # An output of a sub-graph can be neither two outputs nor an input.
    used_names = {*states_in, *slices_in}
    outputs: list[str] = []
    for name in [*following, *written]:
        outputs.append(body.emit("Identity", name) if name in used_names else name)
        used_names.add(name)
    g._counter = body._counter
    proto = helper.make_graph(
        [n.to_proto() for n in body.nodes],
        body.name,
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in [*states_in, *slices_in]],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
        [numpy_helper.from_array(v, k) for k, v in body.initializers.items()],
    )
    attrs = {
        "body": proto,
        "num_scan_inputs": len(sliced),
        "scan_input_directions": [int(backwards)] * len(sliced),
        "scan_output_directions": [int(backwards)] * len(written),
    }
    names = g.emit_many("Scan", *states, *sliced, outputs=len(outputs), attrs=attrs)
    return names[: len(following)], names[len(following) :]


@dataclass
class Backward:
    """The result of a direction's backpropagation through time.

    Attributes:
        inputs: Gradient of the gates' part that depends on the input: [T, N, gates · H].
        recurrent: Pairs of the gradient of the gates' part that depends on the recurrence, and the states that it
            reads, in the order of the gates.
        states: Gradients of the initial states.
    """

    inputs: str
    recurrent: list[tuple[str, str]]
    states: list[str]


@dataclass
class Direction:
    """One direction of a layer.

    Attributes:
        is_reversed: Whether it runs from the last step to the first.
        weight: [gates · H, I].
        recurrence: [gates · H, H].
        bias: Biases of the input's and of the recurrence's part, [gates · H] each, or none.
        states: Initial states, [N, H] each.
        activation: The activation of a plain layer.
        forward_values: Values of the forward pass that the backward pass reads.
    """

    g: Graph
    is_reversed: bool
    weight: str
    recurrence: str
    bias: list[str]
    states: list[str]
    activation: str
    forward_values: dict[str, str] = field(default_factory=dict)

    def run_steps(self, projection: str, step: Step) -> tuple[list[str], list[str]]:
        """Take the step for each index of the projected input, from the last one on in a reversed direction."""
        return scan(self.g, self.states, [projection], step, backwards=self.is_reversed)

    def input_projection(self, x: str, *, both: bool = True) -> str:
        """The gates' part that depends on the input, with its bias; `both` adds the recurrence's bias as well."""
        g = self.g
        out = g.emit("MatMul", x, transpose_matrix(g, self.weight))
        if not self.bias:
            return out
        return g.emit("Add", out, g.emit("Add", *self.bias) if both else self.bias[0])

    def states_before(self, sequence: str, initial: str) -> str:
        """The states that each step started from: [T, N, H]."""
        g = self.g
        start = g.emit("Unsqueeze", initial, g.ints(0))
        if self.is_reversed:
            rest = g.emit("Slice", sequence, g.ints(1), g.ints(2**31), g.ints(0))
            return g.emit("Concat", rest, start, attrs={"axis": 0})
        rest = g.emit("Slice", sequence, g.ints(0), g.ints(-1), g.ints(0))
        return g.emit("Concat", start, rest, attrs={"axis": 0})


def transpose_matrix(g: Graph, matrix: str) -> str:
    return g.emit("Transpose", matrix, attrs={"perm": [1, 0]})


def _lstm_forward(direction: Direction, x: str) -> tuple[str, list[str]]:
    """i, o, f = σ, g = tanh of the gates; c' = f · c + i · g; h' = o · tanh(c')."""
    recurrence = transpose_matrix(direction.g, direction.recurrence)

    def step(body: Graph, states: list[str], slices: list[str]) -> tuple[list[str], list[str]]:
        gates = body.emit("Add", body.emit("MatMul", states[0], recurrence), slices[0])
        preactivations = body.emit_many("Split", gates, outputs=4, attrs={"axis": 1})
        # n is the candidate. The letters name the values that the way back reads.
        i, o, f, n = (body.emit("Tanh" if k == 3 else "Sigmoid", value) for k, value in enumerate(preactivations))
        c = body.emit("Add", body.emit("Mul", f, states[1]), body.emit("Mul", i, n))
        t = body.emit("Tanh", c)
        h = body.emit("Mul", o, t)
        return [h, c], [h, c, i, o, f, n, t]

    last, sequences = direction.run_steps(direction.input_projection(x), step)
    direction.forward_values = dict(zip("hciofnt", sequences, strict=True))
    return sequences[0], last


def _lstm_backward(direction: Direction, dy: str, last: list[str]) -> Backward:
    """With dh = dy + (what comes back): dc = dh · o · (1 − t²) + (what comes back); all gates' gradients follow."""
    g, values = direction.g, direction.forward_values
    previous_h, previous_c = (
        direction.states_before(values["h"], direction.states[0]),
        direction.states_before(values["c"], direction.states[1]),
    )
    h_to_c = g.emit("Mul", values["o"], _tanh_slope(g, values["t"]))
    # What the gradients of c, h, c, c are multiplied by for the four gates.
    slopes = g.emit(
        "Concat",
        g.emit("Mul", values["n"], _sigmoid_slope(g, values["i"])),
        g.emit("Mul", values["t"], _sigmoid_slope(g, values["o"])),
        g.emit("Mul", previous_c, _sigmoid_slope(g, values["f"])),
        g.emit("Mul", values["i"], _tanh_slope(g, values["n"])),
        attrs={"axis": 2},
    )

    def step(body: Graph, states: list[str], slices: list[str]) -> tuple[list[str], list[str]]:
        to_c, slope, forget = slices[:3]
        dh = body.emit("Add", states[0], slices[3]) if dy else states[0]
        dc = body.emit("Add", body.emit("Mul", dh, to_c), states[1])
        gates = body.emit("Mul", body.emit("Concat", dc, dh, dc, dc, attrs={"axis": 1}), slope)
        return [body.emit("MatMul", gates, direction.recurrence), body.emit("Mul", dc, forget)], [gates]

    sliced = [h_to_c, slopes, values["f"], *([dy] if dy else [])]
    states, (gates,) = scan(g, last, sliced, step, backwards=not direction.is_reversed)
    return Backward(gates, [(gates, previous_h)], states)


def _gru_forward(direction: Direction, x: str) -> tuple[str, list[str]]:
    """z, r = σ, n = tanh(input part + r · recurrent part); h' = n + z · (h − n)."""
    recurrence = transpose_matrix(direction.g, direction.recurrence)

    def step(body: Graph, states: list[str], slices: list[str]) -> tuple[list[str], list[str]]:
        (h,) = states
        product = body.emit("MatMul", h, recurrence)
        if direction.bias:
            product = body.emit("Add", product, direction.bias[1])
        recurrent_gates = body.emit_many("Split", product, outputs=3, attrs={"axis": 1})
        input_gates = body.emit_many("Split", slices[0], outputs=3, attrs={"axis": 1})
        z, r = (
            body.emit("Sigmoid", body.emit("Add", p, q))
            for p, q in zip(input_gates[:2], recurrent_gates[:2], strict=True)
        )
        n = body.emit("Tanh", body.emit("Add", input_gates[2], body.emit("Mul", r, recurrent_gates[2])))
        after = body.emit("Add", n, body.emit("Mul", z, body.emit("Sub", h, n)))
        return [after], [after, z, r, n, recurrent_gates[2]]

    last, sequences = direction.run_steps(direction.input_projection(x, both=False), step)
    direction.forward_values = dict(zip("hzrnq", sequences, strict=True))
    return sequences[0], last


def _gru_backward(direction: Direction, dy: str, last: list[str]) -> Backward:
    """Every gate's gradient is dh times a factor that is computed before the loop."""
    g, values = direction.g, direction.forward_values
    previous = direction.states_before(values["h"], direction.states[0])
    update = g.emit("Mul", g.emit("Sub", previous, values["n"]), _sigmoid_slope(g, values["z"]))
    hidden = g.emit("Mul", g.emit("Sub", g.scalar(1), values["z"]), _tanh_slope(g, values["n"]))
    reset = g.emit("Mul", g.emit("Mul", hidden, values["q"]), _sigmoid_slope(g, values["r"]))
    slopes = g.emit("Concat", update, reset, g.emit("Mul", hidden, values["r"]), attrs={"axis": 2})

    def step(body: Graph, states: list[str], slices: list[str]) -> tuple[list[str], list[str]]:
        slope, z = slices[:2]
        dh = body.emit("Add", states[0], slices[2]) if dy else states[0]
        gates = body.emit("Mul", body.emit("Concat", dh, dh, dh, attrs={"axis": 1}), slope)
        to_previous = body.emit("Add", body.emit("MatMul", gates, direction.recurrence), body.emit("Mul", dh, z))
        return [to_previous], [dh, gates]

    states, (dh, gates) = scan(
        g, last, [slopes, values["z"], *([dy] if dy else [])], step, backwards=not direction.is_reversed
    )
    inputs = g.emit("Concat", *[g.emit("Mul", dh, s) for s in (update, reset, hidden)], attrs={"axis": 2})
    return Backward(inputs, [(gates, previous)], states)


def _gru_early_forward(direction: Direction, x: str) -> tuple[str, list[str]]:
    """The same with n = tanh(input part + (r · h) through the recurrence): the reset comes before the product."""
    recurrence = transpose_matrix(direction.g, direction.recurrence)
    gating, hidden = _split_gates(direction.g, recurrence, axis=1)

    def step(body: Graph, states: list[str], slices: list[str]) -> tuple[list[str], list[str]]:
        (h,) = states
        recurrent_gates = body.emit_many("Split", body.emit("MatMul", h, gating), outputs=2, attrs={"axis": 1})
        input_gates = body.emit_many("Split", slices[0], outputs=3, attrs={"axis": 1})
        z, r = (
            body.emit("Sigmoid", body.emit("Add", p, q)) for p, q in zip(input_gates[:2], recurrent_gates, strict=True)
        )
        n = body.emit("Tanh", body.emit("Add", input_gates[2], body.emit("MatMul", body.emit("Mul", r, h), hidden)))
        after = body.emit("Add", n, body.emit("Mul", z, body.emit("Sub", h, n)))
        return [after], [after, z, r, n]

    last, sequences = direction.run_steps(direction.input_projection(x), step)
    direction.forward_values = dict(zip("hzrn", sequences, strict=True))
    return sequences[0], last


def _gru_early_backward(direction: Direction, dy: str, last: list[str]) -> Backward:
    """The hidden gate's gradient goes through its own product before it reaches the reset."""
    g, values = direction.g, direction.forward_values
    previous = direction.states_before(values["h"], direction.states[0])
    gating, across = _split_gates(g, direction.recurrence, axis=0)
    update = g.emit("Mul", g.emit("Sub", previous, values["n"]), _sigmoid_slope(g, values["z"]))
    hidden = g.emit("Mul", g.emit("Sub", g.scalar(1), values["z"]), _tanh_slope(g, values["n"]))
    reset = g.emit("Mul", previous, _sigmoid_slope(g, values["r"]))

    def step(body: Graph, states: list[str], slices: list[str]) -> tuple[list[str], list[str]]:
        to_update, to_hidden, to_reset, z, r = slices[:5]
        dh = body.emit("Add", states[0], slices[5]) if dy else states[0]
        n = body.emit("Mul", dh, to_hidden)
        dgated = body.emit("MatMul", n, across)
        gates = body.emit(
            "Concat", body.emit("Mul", dh, to_update), body.emit("Mul", dgated, to_reset), attrs={"axis": 1}
        )
        back = body.emit("Add", body.emit("Mul", dh, z), body.emit("Mul", dgated, r))
        return [body.emit("Add", back, body.emit("MatMul", gates, gating))], [gates, n]

    sliced = [update, hidden, reset, values["z"], values["r"], *([dy] if dy else [])]
    states, (gates, n) = scan(g, last, sliced, step, backwards=not direction.is_reversed)
    both = g.emit("Concat", gates, n, attrs={"axis": 2})
    return Backward(both, [(gates, previous), (n, g.emit("Mul", values["r"], previous))], states)


def _split_gates(g: Graph, value: str, axis: int) -> tuple[str, str]:
    """The first two gates, and the third."""
    first, second, third = g.emit_many("Split", value, outputs=3, attrs={"axis": axis})
    return g.emit("Concat", first, second, attrs={"axis": axis}), third


def _plain_forward(direction: Direction, x: str) -> tuple[str, list[str]]:
    """h' = tanh or ReLU of the sum of both parts."""
    recurrence = transpose_matrix(direction.g, direction.recurrence)

    def step(body: Graph, states: list[str], slices: list[str]) -> tuple[list[str], list[str]]:
        total = body.emit("Add", body.emit("MatMul", states[0], recurrence), slices[0])
        h = body.emit(direction.activation, total)
        return [h], [h, total]

    last, (h, total) = direction.run_steps(direction.input_projection(x), step)
    direction.forward_values = {"h": h, "total": total}
    return h, last


def _plain_backward(direction: Direction, dy: str, last: list[str]) -> Backward:
    """The gate's gradient is dh · tanh'(total), or dh where the total is positive."""
    g, h, total = direction.g, direction.forward_values["h"], direction.forward_values["total"]
    if direction.activation == "Tanh":
        # 4s / (1 + s)² with s = exp(−2 · |total|), because 1 − h² has few digits where h is nearly 1.
        s = g.emit("Exp", g.emit("Mul", g.emit("Abs", total), g.scalar(-2)))
        denominator = g.emit("Add", s, g.scalar(1))
        slope = g.emit("Div", g.emit("Mul", s, g.scalar(4)), g.emit("Mul", denominator, denominator))
    else:
        slope = g.emit("Cast", g.emit("Greater", total, g.scalar(0)), attrs={"to": 1})

    def step(body: Graph, states: list[str], slices: list[str]) -> tuple[list[str], list[str]]:
        gate = body.emit("Mul", body.emit("Add", states[0], slices[1]) if dy else states[0], slices[0])
        return [body.emit("MatMul", gate, direction.recurrence)], [gate]

    states, (gate,) = scan(g, last, [slope, *([dy] if dy else [])], step, backwards=not direction.is_reversed)
    return Backward(gate, [(gate, direction.states_before(h, direction.states[0]))], states)


def _sigmoid_slope(g: Graph, y: str) -> str:
    """y · (1 − y)."""
    return g.emit("Mul", y, g.emit("Sub", g.scalar(1), y))


def _tanh_slope(g: Graph, y: str) -> str:
    """1 − y²."""
    return g.emit("Sub", g.scalar(1), g.emit("Mul", y, y))


# How each kind of cell goes forward and back.
CELLS = {
    "LSTM": (_lstm_forward, _lstm_backward),
    "GRU": (_gru_forward, _gru_backward),
    "early GRU": (_gru_early_forward, _gru_early_backward),
    "RNN": (_plain_forward, _plain_backward),
}


_ACTIVATIONS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}


@gradient_rule(*_ACTIVATIONS)
def recurrent(tape: Tape, node: Node) -> Pull:
    """A recurrent layer over [steps, N, inputs].

    Raises `ModelError` if it has what is seldom used: lengths per sample, peepholes, clipping, other activations, the
    batch first.
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
        # ONNX's default; PyTorch exports linear_before_reset = 1.
        early = node.op == "GRU" and not int(node.attrs.get("linear_before_reset", 0))
        self.forward, self.backward = CELLS["early GRU" if early else node.op]
        self.initial = self.inputs[5:7] if node.op == "LSTM" else self.inputs[5:6]
        self.directions = self.read_directions()

    def read_directions(self) -> list[Direction]:
        g, tape, op = self.g, self.tape, self.node.op
        weights, recurrences = (self.split_directions(tape.value(n), 0) for n in self.inputs[1:3])
        biases = self.split_directions(tape.value(self.inputs[3]), 0) if self.inputs[3] else [""] * self.count
        states = [self.split_directions(tape.value(n), 0) if n else [self.zeros()] * self.count for n in self.initial]
        names = [str(a).title() for a in self.node.attrs.get("activations", [])] or ["Tanh"] * self.count
        kinds = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}
        out = []
        for i, backwards in enumerate(kinds[str(self.node.attrs.get("direction", "forward"))]):
            bias = g.emit_many("Split", biases[i], outputs=2, attrs={"axis": 0}) if biases[i] else []
            initial = [s[i] for s in states]
            activation = names[i] if op == "RNN" else ""
            out.append(Direction(g, backwards, weights[i], recurrences[i], bias, initial, activation))
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
        direction_gradients = self.split_directions(dy, 1) if dy else [""] * self.count
        dlasts = [*dlast, *[None] * (len(self.initial) - len(dlast))][: len(self.initial)]
        lasts = [self.split_directions(v, 0) if v else [self.zeros()] * self.count for v in dlasts]
        backs = [
            self.backward(d, direction_gradients[i], [last[i] for last in lasts]) for i, d in enumerate(self.directions)
        ]
        if tape.needs_gradient(self.inputs[0]):
            input_gradients = [
                g.emit("MatMul", b.inputs, d.weight) for b, d in zip(backs, self.directions, strict=True)
            ]
            tape.add_gradient(
                self.inputs[0], g.emit("Add", *input_gradients) if len(input_gradients) > 1 else input_gradients[0]
            )
        if tape.needs_gradient(self.inputs[1]):
            gradients = [self.weight_gradient(b.inputs, x) for b in backs]
            tape.add_gradient(self.inputs[1], self.stack_directions(gradients, 0))
        if tape.needs_gradient(self.inputs[2]):
            products = [[self.weight_gradient(gates, h) for gates, h in b.recurrent] for b in backs]
            tape.add_gradient(self.inputs[2], self.stack_directions([self.concat(p, 0) for p in products], 0))
        if self.inputs[3] and tape.needs_gradient(self.inputs[3]):
            sums = [
                [self.bias_gradient(b.inputs), *(self.bias_gradient(gates) for gates, _ in b.recurrent)] for b in backs
            ]
            tape.add_gradient(self.inputs[3], self.stack_directions([self.concat(s, 0) for s in sums], 0))
        for i, name in enumerate(self.initial):
            if name and tape.needs_gradient(name):
                tape.add_gradient(name, self.stack_directions([b.states[i] for b in backs], 0))

    def weight_gradient(self, gates: str, read: str) -> str:
        """The sum over steps and samples of the outer products."""
        left, right = (self.g.emit("Flatten", v, attrs={"axis": 2}) for v in (gates, read))
        return self.g.emit("Gemm", left, right, attrs={"transA": 1})

    def bias_gradient(self, gates: str) -> str:
        return self.g.emit("ReduceSum", gates, self.g.ints(0, 1), attrs={"keepdims": 0})

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
    for what, there in missing.items():
        if there:
            raise ModelError(f"{describe(node)}: {what}", hint="Such a layer can't be trained.")
