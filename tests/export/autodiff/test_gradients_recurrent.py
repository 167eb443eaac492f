"""Gradients of recurrent layers through time against torch in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.core.errors import ModelError
from fedprune.runtime.session import OnnxSession
from fedprune_export.ir.graph import Graph, Node, Port
from support.oracles.differentiation import check, gradient_session, ints, node, normal

pytestmark = pytest.mark.torch

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
# Where torch's gates lie among ONNX's.
TORCHS = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
Results = tuple[torch.Tensor, ...]

# Always the same cases: over many steps rounding adds up, and one draw in hundreds comes near the bound.
few = settings(max_examples=30, deadline=None, derandomize=True)


@st.composite
def layers(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "direction": draw(st.sampled_from(["forward", "reverse", "bidirectional"])),
        "steps": draw(st.integers(1, 6)),
        "inputs": draw(st.integers(2, 4)),
        "hidden": draw(st.integers(3, 6)),
        "bias": draw(st.booleans()),
        "states": draw(st.booleans()),
    }


def tensors(op: str, case: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    gates, count, hidden = GATES[op], 2 if case["direction"] == "bidirectional" else 1, case["hidden"]
    scale = np.float32((3 * hidden) ** -0.5)  # that of torch's first weights
    out = {
        "x": normal(case["steps"], 3, case["inputs"]),
        "w": normal(count, gates * hidden, case["inputs"], seed=1) * scale,
        "r": normal(count, gates * hidden, hidden, seed=2) * scale,
    }
    if case["bias"]:
        out["b"] = normal(count, 2 * gates * hidden, seed=3) * scale
    if case["states"]:
        out["h"] = normal(count, 3, hidden, seed=4)
        if op == "LSTM":
            out["c"] = normal(count, 3, hidden, seed=5)
    return out


def dims(op: str, case: dict[str, Any]) -> dict[str, tuple[int | str, ...]]:
    gates, count = GATES[op], 2 if case["direction"] == "bidirectional" else 1
    return {
        "x": (case["steps"], "N", "i"),
        "w": (count, f"{gates}*h", "i"),
        "r": (count, f"{gates}*h", "h"),
        "b": (count, f"{2 * gates}*h"),
        "h": (count, "N", "h"),
        "c": (count, "N", "h"),
    }


def torchs(op: str, case: dict[str, Any], activation: str = "tanh") -> Callable[..., Results]:
    """Torch's layer with ONNX's tensors: the outputs, the last hidden states, the last cell states."""
    turned, both = case["direction"] == "reverse", case["direction"] == "bidirectional"

    def run(x: torch.Tensor, w: torch.Tensor, r: torch.Tensor, b: Any = None, h: Any = None, c: Any = None) -> Results:
        hidden = r.shape[2]
        order = [k * hidden + j for k in TORCHS[op] for j in range(hidden)]
        flat = []
        for i in range(len(w)):
            flat += [w[i][order], r[i][order]]
            if b is not None:
                half = b.shape[1] // 2
                flat += [b[i][:half][order], b[i][half:][order]]
        zeros = torch.zeros(len(w), x.shape[1], hidden, dtype=x.dtype)
        start = zeros if h is None else h
        state: Any = (start, zeros if c is None else c) if op == "LSTM" else start
        function = {"LSTM": torch.lstm, "GRU": torch.gru, "RNN": getattr(torch, f"rnn_{activation}")}[op]
        y, *last = function(x.flip(0) if turned else x, state, flat, b is not None, 1, 0.0, False, both, False)
        y = y.reshape(*y.shape[:2], len(w), hidden).transpose(1, 2)
        return (y.flip(0) if turned else y, *last)

    return run


def check_layer(op: str, case: dict[str, Any], oracle: Callable[..., Results], **attrs: Any) -> None:
    """All outputs together: their gradients meet in one layer."""
    data, shapes = tensors(op, case), dims(op, case)
    inputs = [n if n in data else "" for n in ("x", "w", "r", "b", "", "h", "c")]
    while not inputs[-1]:
        inputs.pop()
    outputs = ["ys", "hs", "cs"] if op == "LSTM" else ["ys", "hs"]
    attrs = {"direction": case["direction"], "hidden_size": case["hidden"], **attrs}
    nodes = [
        Node(op, inputs, outputs, attrs, f"the_{op}"),
        node("Mul", "hs", outputs[-1], out="both"),
        node("Add", "ys", "both"),
    ]

    def whole(**leaves: torch.Tensor) -> torch.Tensor:
        y, *last = oracle(**leaves)
        return y + last[0] * last[-1]

    check(nodes, whole, data, {n: shapes[n] for n in data}, narrow={"h": 2, "i": 1})


@pytest.mark.parametrize("op", ["LSTM", "RNN"])
@few
@given(case=layers())
def test_layer_through_time(op: str, case: dict[str, Any]) -> None:
    check_layer(op, case, torchs(op, case))


@few
@given(case=layers())
def test_gru_that_resets_after_its_product(case: dict[str, Any]) -> None:
    check_layer("GRU", case, torchs("GRU", case), linear_before_reset=1)


@few
@given(case=layers())
def test_gru_that_resets_before_its_product(case: dict[str, Any]) -> None:
    """Torch has no such layer: step by step, as ONNX defines it."""

    def run(x: torch.Tensor, w: torch.Tensor, r: torch.Tensor, b: Any = None, h: Any = None) -> Results:
        hidden = r.shape[2]
        ys, last = [], []
        for i in range(len(w)):
            state = torch.zeros(x.shape[1], hidden, dtype=x.dtype) if h is None else h[i]
            biases, out = (b[i].chunk(6) if b is not None else [torch.zeros(hidden, dtype=x.dtype)] * 6), []
            wz, wr, wh, rz, rr, rh = *w[i].chunk(3), *r[i].chunk(3)
            backwards = case["direction"] == "reverse" or i == 1
            for step in x.flip(0) if backwards else x:
                z = torch.sigmoid(step @ wz.T + state @ rz.T + biases[0] + biases[3])
                reset = torch.sigmoid(step @ wr.T + state @ rr.T + biases[1] + biases[4])
                state = (1 - z) * torch.tanh(step @ wh.T + (reset * state) @ rh.T + biases[2] + biases[5]) + z * state
                out.append(state)
            ys.append(torch.stack(out[::-1] if backwards else out))
            last.append(state)
        return torch.stack(ys, 1), torch.stack(last)

    check_layer("GRU", case, run)


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_plain_layer_with_relu(direction: str) -> None:
    case = {"direction": direction, "steps": 4, "inputs": 3, "hidden": 4, "bias": True, "states": False}
    names = ["Relu"] * (2 if direction == "bidirectional" else 1)
    check_layer("RNN", case, torchs("RNN", case, "relu"), activations=names)


@pytest.mark.parametrize("op", GATES)
@pytest.mark.parametrize("output", [0, 1, 2])
def test_one_output_alone(op: str, output: int) -> None:
    case = {"direction": "bidirectional", "steps": 3, "inputs": 3, "hidden": 4, "bias": True, "states": True}
    if output == 2 and op != "LSTM":
        output = 1
    data, shapes = tensors(op, case), dims(op, case)
    inputs = [n if n in data else "" for n in ("x", "w", "r", "b", "", "h", "c")]
    outputs = ["y" if i == output else "" for i in range(output + 1)]
    layer = Node(op, inputs, outputs, {"direction": "bidirectional", "hidden_size": 4, "linear_before_reset": 1}, op)
    if op != "GRU":
        del layer.attrs["linear_before_reset"]
    oracle = torchs(op, case)
    check([layer], lambda **leaves: oracle(**leaves)[output], data, {n: shapes[n] for n in data}, narrow={"h": 2})


def test_layers_on_top_of_each_other_share_no_names() -> None:
    case = {"direction": "forward", "steps": 4, "inputs": 3, "hidden": 3, "bias": False, "states": False}
    data = tensors("LSTM", case)
    first = Node("LSTM", ["x", "w", "r"], ["ys"], {"hidden_size": 3}, "first")
    flat = node("Squeeze", "ys", "one", out="between")
    second = Node("LSTM", ["between", "w", "r"], ["", "y"], {"hidden_size": 3}, "second")
    oracle = torchs("LSTM", case)
    stacked = lambda x, w, r: oracle(oracle(x, w, r)[0][:, 0], w, r)[1]  # noqa: E731
    check([first, flat, second], stacked, data, constants={"one": ints(1)})


REFUSED: dict[str, tuple[dict[str, Any], dict[int, Any]]] = {
    "lengths per sample": ({}, {4: np.full(3, 2, np.int32)}),
    "peepholes": ({}, {7: np.zeros((1, 12), np.float32)}),
    "clipping": ({"clip": 3.0}, {}),
    "batch first": ({"layout": 1}, {}),
    "activations": ({"activations": ["Sigmoid", "Relu", "Tanh"]}, {}),
    "forget gate": ({"input_forget": 1}, {}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_rule_is_refused_by_name(what: str) -> None:
    attrs, further = REFUSED[what]
    case = {"direction": "forward", "steps": 3, "inputs": 2, "hidden": 4, "bias": False, "states": False}
    data = tensors("LSTM", case)
    inputs = ["x", "w", "r", "", "", "", "", ""]
    for i in further:
        inputs[i] = f"input{i}"
    layer = Node("LSTM", inputs, ["y"], {"hidden_size": 4, **attrs}, "the_LSTM")
    constants = {f"input{i}": v for i, v in further.items()}
    with pytest.raises(ModelError, match=f"the_LSTM.*{what}"):
        gradient_session([layer], data, {n: a.shape for n, a in data.items()}, constants)


def test_pruning_keeps_what_a_loop_reads() -> None:
    graph = Graph(inputs=[Port("x", np.dtype(np.float32), ("N",))], outputs=[Port("y", np.dtype(np.float32), ("N",))])
    body = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["held", graph.emit("Neg", "x")], ["next"])],
        "body",
        [onnx.helper.make_tensor_value_info(n, 1, None) for n in ("held", "slice")],
        [onnx.helper.make_tensor_value_info("next", 1, None)],
    )
    graph.emit("Scan", "x", "x", attrs={"body": body, "num_scan_inputs": 1}, out="y")
    graph.prune()
    got = OnnxSession(graph.to_bytes()).run({"x": np.ones(3, np.float32)})["y"]
    np.testing.assert_array_equal(got, np.full(3, -2, np.float32))
