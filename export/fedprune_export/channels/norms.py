"""Normalisations."""

from __future__ import annotations

from fedprune_export.channels.rule import Channels, rule
from fedprune_export.graph import Node


@rule("BatchNormalization")
def batch_norm(channels: Channels, node: Node) -> None:
    """Four vectors along the channels; a constant one with equal entries fits any channels (`cut` shortens it)."""
    x = channels.of(node, 0)
    held = False
    for i in range(1, 5):
        constant = channels.constant(node.inputs[i])
        if i < 3 and constant and len(set(channels.graph.initializers[node.inputs[i]].tolist())) == 1:
            continue
        held = held or (constant and bool(x[1].any()))
        channels.atoms.tie(channels.of(node, i)[0], x[1])
    if held:
        channels.notes.append(f"{node.op} {node.name} has a constant for each channel: its channels stay.")
    channels.out(node, x)
