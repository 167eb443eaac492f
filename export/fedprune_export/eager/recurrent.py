"""Recurrent layers, step by step: LSTM, GRU and plain ones, in one direction or both."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from fedprune_export.eager.context import Context, Tensor, operator, unsupported
from fedprune_export.ir.graph import Node

Cell = Callable[[Tensor, list[Tensor]], list[Tensor]]
"""From a step's input and the states to the next states; the first of them is the step's output."""

_DIRECTIONS = {"forward": [1], "reverse": [-1], "bidirectional": [1, -1]}
_GATES = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}


@operator("LSTM", "GRU", "RNN")
def _recurrent(
    run: Context,
    node: Node,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    *more: Tensor | None,
) -> tuple[Tensor, ...]:
    """X [steps, N, inputs] to the sequence [steps, directions, N, hidden] and the last states."""
    directions = _DIRECTIONS[str(node.attrs.get("direction", "forward"))]
    names = _check(node, len(directions), lengths, more)
    count = 2 if node.op == "LSTM" else 1
    given = [*more, None, None][:count]
    sequences, lasts = [], []
    for i, direction in enumerate(directions):
        biases = (None, None) if b is None else b[i].chunk(2)
        zeros = x.new_zeros(x.shape[1], r.shape[2])
        states = [zeros if state is None else state[i].to(x.device) for state in given]
        cell = _CELLS[node.op](node, names[i] if node.op == "RNN" else "", w[i], r[i], *biases)
        outputs = []
        for at in range(x.shape[0])[::direction]:
            states = cell(x[at], states)
            outputs.append(states[0])
        sequences.append(torch.stack(outputs[::direction]))
        lasts.append(states)
    return (torch.stack(sequences, 1), *(torch.stack([last[k] for last in lasts]) for k in range(count)))


def _check(node: Node, directions: int, lengths: Tensor | None, more: tuple[Tensor | None, ...]) -> list[str]:
    """The activations; raises ModelError for what is not supported."""
    usual = _GATES[node.op] * directions
    names = [str(a).title() for a in node.attrs.get("activations", usual)]
    seldom = {
        "lengths per sample": lengths is not None,
        "peepholes": len(more) > 2 and more[2] is not None,
        "the batch first": bool(node.attrs.get("layout")),
        "clipping": bool(node.attrs.get("clip")),
        "a forget gate that follows from the input's": bool(node.attrs.get("input_forget")),
        f"activations {', '.join(names)}": names != usual and (node.op != "RNN" or not {*names} <= {"Tanh", "Relu"}),
    }
    for what, there in seldom.items():
        if there:
            raise unsupported(node, what)
    return names


def _lstm(node: Node, name: str, w: Tensor, r: Tensor, before: Tensor | None, after: Tensor | None) -> Cell:
    bias = None if before is None or after is None else before + after

    def cell(x: Tensor, states: list[Tensor]) -> list[Tensor]:
        h, c = states
        i, o, f, n = (functional.linear(x, w, bias) + functional.linear(h, r)).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(n)
        return [torch.sigmoid(o) * torch.tanh(c), c]

    return cell


def _gru(node: Node, name: str, w: Tensor, r: Tensor, before: Tensor | None, after: Tensor | None) -> Cell:
    late = bool(node.attrs.get("linear_before_reset"))
    hidden = r.shape[1]

    def cell(x: Tensor, states: list[Tensor]) -> list[Tensor]:
        (h,) = states
        update, reset, new = functional.linear(x, w, before).chunk(3, 1)
        if late:
            mine = functional.linear(h, r, after).chunk(3, 1)
            z, gate = torch.sigmoid(update + mine[0]), torch.sigmoid(reset + mine[1])
            n = torch.tanh(new + gate * mine[2])
        else:
            first = None if after is None else after[: 2 * hidden]
            last = None if after is None else after[2 * hidden :]
            mine = functional.linear(h, r[: 2 * hidden], first).chunk(2, 1)
            z, gate = torch.sigmoid(update + mine[0]), torch.sigmoid(reset + mine[1])
            n = torch.tanh(new + functional.linear(gate * h, r[2 * hidden :], last))
        return [n + z * (h - n)]

    return cell


def _plain(node: Node, name: str, w: Tensor, r: Tensor, before: Tensor | None, after: Tensor | None) -> Cell:
    bias = None if before is None or after is None else before + after
    activation = torch.relu if name == "Relu" else torch.tanh

    def cell(x: Tensor, states: list[Tensor]) -> list[Tensor]:
        return [activation(functional.linear(x, w, bias) + functional.linear(states[0], r))]

    return cell


_CELLS = {"LSTM": _lstm, "GRU": _gru, "RNN": _plain}
