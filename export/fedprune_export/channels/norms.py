"""Channel rules of normalisations. If a norm averages over channels, it averages over those that are kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedprune_export.channels.atoms import AtomRow
from fedprune_export.channels.products import GROUPS, POSITIONS
from fedprune_export.channels.rule import Channels, rule
from fedprune_export.ir.graph import Node


def _vectors(channels: Channels, node: Node, indices: Sequence[int], rows: Sequence[AtomRow]) -> None:
    """Tie a norm's vectors to the axes of its input; a constant with equal entries fits any width (`rewrites` shortens
    it)."""
    held = False
    for i in indices:
        if not channels.has(node, i) or channels.uniform(node.inputs[i]):
            continue
        own = channels.of(node, i)
        for row, along in zip(own[::-1], rows[::-1], strict=False):
            if row.size == along.size:
                held = held or (channels.constant(node.inputs[i]) and bool(along.any()))
                channels.atoms.tie(row, along)
    if held:
        channels.notes.append(f"{node.op} {node.name} has a constant for each channel: its channels stay.")


@rule("BatchNormalization")
def batch_norm(channels: Channels, node: Node) -> None:
    """Scale, shift, mean and variance along the channels; each channel keeps its own statistics."""
    x = channels.of(node, 0)
    _vectors(channels, node, (1, 2), x[1:2])
    held = False
    for i in (3, 4):
        held = held or (channels.constant(node.inputs[i]) and bool(x[1].any()))
        channels.atoms.tie(channels.of(node, i)[0], x[1])
    if held:
        channels.notes.append(f"{node.op} {node.name} has constant statistics: its channels stay.")
    channels.out(node, x)
    for i in range(1, len(node.outputs)):
        channels.out(node, [x[1]], i)


@rule("InstanceNormalization")
def instance_norm(channels: Channels, node: Node) -> None:
    """Scale and shift along the channels; each channel is normalised over its own positions."""
    x = channels.of(node, 0)
    _vectors(channels, node, (1, 2), x[1:2])
    channels.out(node, x)


@rule("LayerNormalization", "RMSNormalization")
def layer_norm(channels: Channels, node: Node) -> None:
    """Scale and shift along the last axes, over which it averages."""
    x = channels.of(node, 0)
    axis = int(node.attrs.get("axis", -1)) % len(x)
    _vectors(channels, node, (1, 2), x[axis:])
    channels.out(node, x)
    for i in range(1, len(node.outputs)):
        if node.outputs[i]:
            channels.out(node, [*x[:axis], *(np.zeros(1, np.int64) for _ in x[axis:])], i)


@rule("GroupNormalization")
def group_norm(channels: Channels, node: Node) -> None:
    """Whole norm groups are cut, or the same positions of every group; places, over which it averages, too, stay."""
    x = channels.of(node, 0)
    if any(r.any() for r in x[2:]):
        channels.notes.append(f"{node.op} {node.name} takes channels for places: they stay.")
    channels.fix(x[2:])
    row = x[1]
    groups = int(node.attrs["num_groups"])
    blocks = row.reshape(groups, -1)
    options = ([GROUPS] if groups > 1 else []) + ([POSITIONS] if blocks.shape[1] > 1 else [])
    if row.any():
        option = channels.choices.pick(node.outputs[0], options) if len(options) > 1 else options[0]
        if option == GROUPS:
            channels.atoms.tie(blocks, blocks[:, :1])
            row = np.repeat(blocks[:, 0], blocks.shape[1])
        elif option == POSITIONS:
            channels.atoms.tie(blocks, blocks[:1])
            row = np.tile(blocks[0], groups)
        else:
            channels.atoms.fix(row)
            row = np.zeros_like(row)
        if len(options) > 1 and option is not None:
            channels.choices.watch(node.outputs[0], option, [row])
    _vectors(channels, node, (1, 2), [row])
    channels.out(node, [x[0], row, *(np.zeros_like(r) for r in x[2:])])


@rule("LRN")
def local_response_norm(channels: Channels, node: Node) -> None:
    """Channels are averaged with their neighbours: they stay."""
    _hold(channels, node, [1], "averages over neighbouring channels")


@rule("LpNormalization", "Softmax", "LogSoftmax", "Hardmax")
def over_one_axis(channels: Channels, node: Node) -> None:
    """The axis over which numbers are compared or added up stays; the others pass."""
    _hold(channels, node, [int(node.attrs.get("axis", -1))], "compares or averages channels")


@rule("MeanVarianceNormalization")
def mean_variance_norm(channels: Channels, node: Node) -> None:
    """The axes over which it averages stay."""
    _hold(channels, node, [int(a) for a in node.attrs.get("axes", [0, 2, 3])], "averages over channels")


def _hold(channels: Channels, node: Node, axes: Sequence[int], why: str) -> None:
    x = list(channels.of(node, 0))
    gone = {a % len(x) for a in axes}
    if any(x[a].any() for a in gone):
        channels.notes.append(f"{node.op} {node.name} {why}: they stay.")
    for a in gone:
        channels.atoms.fix(x[a])
        x[a] = np.zeros_like(x[a])
    channels.out(node, x)
