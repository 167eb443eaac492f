"""Operators that move indices about: reshape, transpose, concat, pad, slice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedprune_export.channels.atoms import AtomRow, still
from fedprune_export.channels.rule import Channels, rule
from fedprune_export.graph import Node


@rule("Concat")
def concat(channels: Channels, node: Node) -> None:
    """Rows one after the other along the axis; the other axes are tied."""
    parts = [channels.rows[name] for name in node.inputs]
    axis = int(node.attrs["axis"]) % len(parts[0])
    out = list(parts[0])
    for other in parts[1:]:
        for i, row in enumerate(other):
            if i != axis:
                channels.atoms.tie(out[i], row)
    out[axis] = np.concatenate([p[axis] for p in parts])
    channels.out(node, out)


@rule("Transpose")
def transpose(channels: Channels, node: Node) -> None:
    """Axes change places."""
    x = channels.of(node, 0)
    order = node.attrs.get("perm") or list(range(len(x)))[::-1]
    channels.out(node, [x[i] for i in order])


@rule("Pad")
def pad(channels: Channels, node: Node) -> None:
    """Added indices stay; reflecting or repeating padding of a channel axis fixes it."""
    x = channels.of(node, 0)
    name = node.inputs[1]
    if name not in channels.graph.initializers:
        channels.fix(x)
        channels.out(node, channels.still(node.outputs[0]))
        return
    amounts = channels.graph.initializers[name].reshape(-1).tolist()
    out = []
    for i, row in enumerate(x):
        before, after = int(amounts[i]), int(amounts[i + len(x)])
        if before < 0 or after < 0 or ((before or after) and node.attrs.get("mode", "constant") != "constant"):
            channels.atoms.fix(row)
            row = still(row.size + before + after)
            before = after = 0
        out.append(np.concatenate([still(before), row, still(after)]))
    channels.out(node, out)


@rule("Slice")
def slicing(channels: Channels, node: Node) -> None:
    """Axes of which something is cut out stay; the others pass."""
    x = channels.of(node, 0)
    axes = list(range(channels.shape(node.inputs[1])[0]))
    if channels.has(node, 3):
        given = channels.graph.initializers.get(node.inputs[3])
        axes = list(range(len(x))) if given is None else [int(a) % len(x) for a in given]
    channels.fix([x[a] for a in axes])
    shape = channels.shape(node.outputs[0])
    channels.out(node, [still(shape[i]) if i in axes else row for i, row in enumerate(x)])


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(channels: Channels, node: Node) -> None:
    """Runs of axes that hold the same elements are matched; within a run atoms are spread out or gathered."""
    x, target = channels.of(node, 0), channels.shape(node.outputs[0])
    dims = channels.seen.dims(node.outputs[0])
    out: list[AtomRow] = [still(n) for n in target]
    for olds, news in _runs([r.size for r in x], target):
        carried = _spread([x[i] for i in olds], [target[i] for i in news])
        if carried is None or any(row.any() and dims[i] is None for i, row in zip(news, carried, strict=True)):
            channels.fix([x[i] for i in olds])
            channels.notes.append(f"{node.op} {node.name} mixes channels with other axes: they stay.")
            continue
        for i, row in zip(news, carried, strict=True):
            out[i] = row
    channels.out(node, out)


def _runs(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Shortest runs of old and new axes with equal products, in order."""
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        olds, news, a, b = [], [], 1, 1
        while True:
            if i < len(old) and (a <= b or j >= len(new)):
                a *= old[i]
                olds.append(i)
                i += 1
            elif j < len(new):
                b *= new[j]
                news.append(j)
                j += 1
            if (olds and news and a == b) or (i >= len(old) and j >= len(new)):
                break
        runs.append((olds, news))
    if len(runs) > 1 and not (runs[-1][0] and runs[-1][1]):
        tail = runs.pop()
        runs[-1] = (runs[-1][0] + tail[0], runs[-1][1] + tail[1])
    return runs


def _spread(rows: Sequence[AtomRow], target: Sequence[int]) -> list[AtomRow] | None:
    """Rows of a run's new axes, or None if one index would stand for several atoms or one atom for a mixture."""
    if not any(r.any() for r in rows):
        return [still(n) for n in target]
    carrying = [i for i, r in enumerate(rows) if r.any()]
    if len(carrying) != 1:
        return None
    shape = [r.size for r in rows]
    view = [1] * len(rows)
    view[carrying[0]] = -1
    flat = np.broadcast_to(rows[carrying[0]].reshape(view), shape).reshape(list(target))
    moving = [
        axis
        for axis, size in enumerate(target)
        if size > 1 and not np.array_equal(flat, np.broadcast_to(flat.take([0], axis), flat.shape))
    ]
    if len(moving) != 1:
        return None
    row = np.moveaxis(flat, moving[0], 0).reshape(target[moving[0]], -1)[:, 0]
    return [row.copy() if axis == moving[0] else still(size) for axis, size in enumerate(target)]
