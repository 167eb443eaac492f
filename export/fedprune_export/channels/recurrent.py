"""Recurrent layers: a hidden unit is one row of every gate, one column of the recurrence, one channel of the output."""

from __future__ import annotations

from fedprune_export.channels.atoms import AtomRow, still
from fedprune_export.channels.rule import Channels, rule
from fedprune_export.graph import Node

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@rule(*_GATES)
def recurrent(channels: Channels, node: Node) -> None:
    """Both directions of a layer have the same number of hidden units, so that they lose the same ones."""
    if node.attrs.get("layout", 0):
        channels.fix_inputs(node)
        channels.still_outputs(node)
        channels.notes.append(f"{node.op} {node.name} has the batch first: its channels stay.")
        return
    gates = _GATES[node.op]
    x, weight, recurrence = (channels.of(node, i) for i in range(3))
    hidden = recurrence[2]
    channels.atoms.tie(weight[2], x[2])
    channels.atoms.tie(weight[1].reshape(gates, -1), hidden)
    channels.atoms.tie(recurrence[1].reshape(gates, -1), hidden)
    if channels.has(node, 3):
        channels.atoms.tie(channels.of(node, 3)[1].reshape(2 * gates, -1), hidden)
    for i in (5, 6):
        if channels.has(node, i):
            channels.atoms.tie(channels.of(node, i)[2], hidden)
    if channels.has(node, 7):
        channels.atoms.tie(channels.of(node, 7)[1].reshape(3, -1), hidden)
    channels.fix([weight[0], recurrence[0], x[0], x[1]])
    for i, name in enumerate(node.outputs):
        if name:
            rows: list[AtomRow] = [still(n) for n in channels.shape(name)[:-1]]
            channels.out(node, [*rows, hidden], i)
