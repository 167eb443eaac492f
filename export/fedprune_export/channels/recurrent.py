"""Recurrent layers: a hidden unit is one row of every gate, one column of the recurrence, one channel of the output."""

from __future__ import annotations

from fedprune_export.channels.atoms import AtomRow, still
from fedprune_export.channels.rule import Channels, rule
from fedprune_export.ir.graph import Node

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
    # Bias, lengths of the sequences, first states, peepholes: what is left are directions, steps and samples.
    for i, rows in ((3, 2 * gates), (5, 1), (6, 1), (7, 3)):
        if channels.has(node, i):
            *others, units = channels.of(node, i)
            channels.atoms.tie(units.reshape(rows, -1), hidden)
            channels.fix(others)
    channels.fix([weight[0], recurrence[0], x[0], x[1]])
    for i, name in enumerate(node.outputs):
        if name:
            lead: list[AtomRow] = [still(n) for n in channels.shape(name)[:-1]]
            channels.out(node, [*lead, hidden], i)
