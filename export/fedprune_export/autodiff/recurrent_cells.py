"""The cells of recurrent layers (LSTM, GRU, plain), forward and backward, in one direction of a layer.

Forward is one matrix product with the input over the whole sequence, and a loop (`scan`) for the recurrence.
Backward a second loop does only what depends on the next step; the gradient of each parameter is then one product over
the whole sequence. Shapes: T steps, N samples, I inputs, H hidden units. Letters as in the formulas: h and c states,
i, o, f, z, r gates, n the candidate of a new state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from onnx import TensorProto, helper, numpy_helper

from fedprune_export.ir.graph import Graph

# Writes one step of a loop into its body: takes the names of states and of slices of the inputs, and returns those of
# the next states and of slices of the outputs. It may read values of the graph around the body.
Step = Callable[[Graph, list[str], list[str]], tuple[list[str], list[str]]]


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
        bias: Biases of the input's and of the recurrence's part, [gates · H] each; empty without any.
        states: Initial states, [N, H] each.
        activation: The activation of a plain layer.
        resets_early: Whether a GRU resets its state before the product with the recurrence, and not after it.
        forward_values: Values of the forward pass that the backward pass reads.
    """

    g: Graph
    is_reversed: bool
    weight: str
    recurrence: str
    bias: list[str]
    states: list[str]
    activation: str
    resets_early: bool
    forward_values: dict[str, str] = field(default_factory=dict)

    def run_steps(self, projection: str, step: Step) -> tuple[list[str], list[str]]:
        """Take the step for each index of the projected input, from the last one on in a reversed direction."""
        return scan(self.g, self.states, [projection], step, backwards=self.is_reversed)

    def run_back(self, last: list[str], sliced: list[str], dy: str, step: Step) -> tuple[list[str], list[str]]:
        """Take the step for each index from the other end on. `states[0]` has the gradient of the hidden state.

        `last`: gradients of the last states; `dy`: of the states that went out, if any did.
        """

        def add_output_gradient(body: Graph, states: list[str], slices: list[str]) -> tuple[list[str], list[str]]:
            dh = body.emit("Add", states[0], slices[-1]) if dy else states[0]
            return step(body, [dh, *states[1:]], slices[: len(sliced)])

        slices = [*sliced, dy] if dy else sliced
        return scan(self.g, last, slices, add_output_gradient, backwards=not self.is_reversed)

    def input_projection(self, x: str, *, both: bool = True) -> str:
        """The gates' part that depends on the input, with its bias; `both` adds the recurrence's bias as well."""
        g = self.g
        bias = [g.emit("Add", *self.bias) if both else self.bias[0]] if self.bias else []
        out = g.emit("Gemm", g.emit("Flatten", x, attrs={"axis": 2}), self.weight, *bias, attrs={"transB": 1})
        shape = g.emit("Concat", g.emit("Shape", x, attrs={"end": 2}), g.ints(-1), attrs={"axis": 0})
        return g.emit("Reshape", out, shape)

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
    """i, o, f = σ, n = tanh of the gates; c' = f · c + i · n; h' = o · tanh(c')."""
    g = direction.g
    recurrence = transpose_matrix(g, direction.recurrence)
    lengths = g.emit("Mul", g.emit("Shape", direction.recurrence, attrs={"start": 1}), g.ints(3, 1))

    def step(body: Graph, states: list[str], slices: list[str]) -> tuple[list[str], list[str]]:
        gates = body.emit("Gemm", states[0], recurrence, slices[0])
        sigmoids, n = body.emit_many("Split", gates, lengths, outputs=2, attrs={"axis": 1})
        sigmoids, n = body.emit("Sigmoid", sigmoids), body.emit("Tanh", n)
        i, o, f = body.emit_many("Split", sigmoids, outputs=3, attrs={"axis": 1})
        kept, added = body.emit("Mul", f, states[1]), body.emit("Mul", i, n)
        c = body.emit("Add", kept, added)
        t = body.emit("Tanh", c)
        return [body.emit("Mul", o, t), c], [sigmoids, n, t, kept, added]

    # States that also went out step by step would be copied in each; h follows from what goes out.
    last, (sigmoids, n, t, kept, added) = direction.run_steps(direction.input_projection(x), step)
    i, o, f = g.emit_many("Split", sigmoids, outputs=3, attrs={"axis": 2})
    h = g.emit("Mul", o, t)
    direction.forward_values = {
        **dict(zip("hiofnt", (h, i, o, f, n, t), strict=True)),
        "sigmoids": sigmoids,
        "kept": kept,
        "added": added,
    }
    return h, last


def _lstm_backward(direction: Direction, dy: str, last: list[str]) -> Backward:
    """With dh = dy + (what comes back): dc = dh · o · (1 − t²) + (what comes back); all gates' gradients follow."""
    g, values = direction.g, direction.forward_values
    previous_h = direction.states_before(values["h"], direction.states[0])
    h_to_c = g.emit("Mul", values["o"], _tanh_slope(g, values["t"]))
    # What the gradients of c, h, c, c are multiplied by for the four gates. y · (1 − y) of each sigmoid y is a factor,
    # and what y multiplies is another: y · it was computed forward.
    products = g.emit("Concat", values["added"], values["h"], values["kept"], attrs={"axis": 2})
    slopes = g.emit(
        "Concat",
        g.emit("Mul", products, g.emit("Sub", g.scalar(1), values["sigmoids"])),
        g.emit("Mul", values["i"], _tanh_slope(g, values["n"])),
        attrs={"axis": 2},
    )

    def step(body: Graph, states: list[str], slices: list[str]) -> tuple[list[str], list[str]]:
        (dh, dc), (to_c, slope, forget) = states, slices
        dc = body.emit("Add", body.emit("Mul", dh, to_c), dc)
        gates = body.emit("Mul", body.emit("Concat", dc, dh, dc, dc, attrs={"axis": 1}), slope)
        return [body.emit("MatMul", gates, direction.recurrence), body.emit("Mul", dc, forget)], [gates]

    states, (gates,) = direction.run_back(last, [h_to_c, slopes, values["f"]], dy, step)
    return Backward(gates, [(gates, previous_h)], states)


def _gru_forward(direction: Direction, x: str) -> tuple[str, list[str]]:
    """z, r = σ, n = tanh(input part + r · recurrent part); h' = n + z · (h − n).

    With an early reset the recurrent part of n is (r · h) through the recurrence.
    """
    recurrence, early = transpose_matrix(direction.g, direction.recurrence), direction.resets_early
    gating, hidden = _split_gates(direction.g, recurrence, axis=1) if early else (recurrence, "")

    def step(body: Graph, states: list[str], slices: list[str]) -> tuple[list[str], list[str]]:
        (h,) = states
        product = body.emit("MatMul", h, gating) if early else body.emit("Gemm", h, gating, *direction.bias[1:])
        recurrent_gates = body.emit_many("Split", product, outputs=2 if early else 3, attrs={"axis": 1})
        input_gates = body.emit_many("Split", slices[0], outputs=3, attrs={"axis": 1})
        pairs = zip(input_gates[:2], recurrent_gates[:2], strict=True)
        z, r = (body.emit("Sigmoid", body.emit("Add", *pair)) for pair in pairs)
        part = body.emit("MatMul", body.emit("Mul", r, h), hidden) if early else body.emit("Mul", r, recurrent_gates[2])
        n = body.emit("Tanh", body.emit("Add", input_gates[2], part))
        after = body.emit("Add", n, body.emit("Mul", z, body.emit("Sub", h, n)))
        return [after], [after, z, r, n, *recurrent_gates[2:]]

    last, sequences = direction.run_steps(direction.input_projection(x, both=early), step)
    direction.forward_values = dict(zip("hzrnq", sequences, strict=False))
    return sequences[0], last


def _gru_backward(direction: Direction, dy: str, last: list[str]) -> Backward:
    """Every gate's gradient is dh times a factor that is computed before the loop."""
    if direction.resets_early:
        return _gru_early_backward(direction, dy, last)
    g, values = direction.g, direction.forward_values
    previous = direction.states_before(values["h"], direction.states[0])
    update = g.emit("Mul", g.emit("Sub", previous, values["n"]), _sigmoid_slope(g, values["z"]))
    hidden = g.emit("Mul", g.emit("Sub", g.scalar(1), values["z"]), _tanh_slope(g, values["n"]))
    reset = g.emit("Mul", g.emit("Mul", hidden, values["q"]), _sigmoid_slope(g, values["r"]))
    slopes = g.emit("Concat", update, reset, g.emit("Mul", hidden, values["r"]), attrs={"axis": 2})

    def step(body: Graph, states: list[str], slices: list[str]) -> tuple[list[str], list[str]]:
        (dh,), (slope, z) = states, slices
        gates = body.emit("Mul", body.emit("Concat", dh, dh, dh, attrs={"axis": 1}), slope)
        return [body.emit("Gemm", gates, direction.recurrence, body.emit("Mul", dh, z))], [dh, gates]

    states, (dh, gates) = direction.run_back(last, [slopes, values["z"]], dy, step)
    inputs = g.emit("Concat", *[g.emit("Mul", dh, s) for s in (update, reset, hidden)], attrs={"axis": 2})
    return Backward(inputs, [(gates, previous)], states)


def _gru_early_backward(direction: Direction, dy: str, last: list[str]) -> Backward:
    """The hidden gate's gradient goes through its own product before it reaches the reset."""
    g, values = direction.g, direction.forward_values
    previous = direction.states_before(values["h"], direction.states[0])
    gating, across = _split_gates(g, direction.recurrence, axis=0)
    update = g.emit("Mul", g.emit("Sub", previous, values["n"]), _sigmoid_slope(g, values["z"]))
    hidden = g.emit("Mul", g.emit("Sub", g.scalar(1), values["z"]), _tanh_slope(g, values["n"]))
    reset = g.emit("Mul", previous, _sigmoid_slope(g, values["r"]))

    def step(body: Graph, states: list[str], slices: list[str]) -> tuple[list[str], list[str]]:
        (dh,), (to_update, to_hidden, to_reset, z, r) = states, slices
        n = body.emit("Mul", dh, to_hidden)
        dgated = body.emit("MatMul", n, across)
        gates = body.emit(
            "Concat", body.emit("Mul", dh, to_update), body.emit("Mul", dgated, to_reset), attrs={"axis": 1}
        )
        back = body.emit("Add", body.emit("Mul", dh, z), body.emit("Mul", dgated, r))
        return [body.emit("Add", back, body.emit("MatMul", gates, gating))], [gates, n]

    sliced = [update, hidden, reset, values["z"], values["r"]]
    states, (gates, n) = direction.run_back(last, sliced, dy, step)
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
        total = body.emit("Gemm", states[0], recurrence, slices[0])
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
        gate = body.emit("Mul", states[0], slices[0])
        return [body.emit("MatMul", gate, direction.recurrence)], [gate]

    states, (gate,) = direction.run_back(last, [slope], dy, step)
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
    "RNN": (_plain_forward, _plain_backward),
}


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
