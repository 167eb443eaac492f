"""Element-wise operators: every index of the output comes from the same index of the inputs."""

from __future__ import annotations

import numpy as np

from fedprune_export.channels.atoms import AtomRow, still
from fedprune_export.channels.rule import Channels, rule
from fedprune_export.ir.graph import Node
from fedprune_export.ir.operators import MANY_TO_ONE, ONE_TO_ONE

_ALONE = (
    *("Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Ceil", "Cos", "Cosh", "Floor", "Gelu"),
    *("IsInf", "IsNaN", "Mish", "Not", "Round", "Shrink", "Sign", "Sin", "Sinh", "Swish", "Tan"),
)
_TOGETHER = (
    *("And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Equal", "Greater", "GreaterOrEqual", "Less"),
    *("LessOrEqual", "Mod", "Or", "Where", "Xor"),
)


@rule(*dict.fromkeys([*ONE_TO_ONE, *_ALONE]))
def elementwise(channels: Channels, node: Node) -> None:
    """One value in, one of the same shape out; bounds and the like stay."""
    channels.fix_inputs(node, 1)
    for i in range(len(node.outputs)):
        channels.out(node, channels.of(node, 0), i)


@rule(*dict.fromkeys([*MANY_TO_ONE, *_TOGETHER]))
def broadcast(channels: Channels, node: Node) -> None:
    """Axes of equal length are tied; an axis of length 1 that is repeated is not."""
    shape = channels.shape(node.outputs[0])
    out: list[AtomRow] = []
    held = False
    for axis, size in enumerate(shape):
        rows = []
        for name in node.inputs:
            place = axis - (len(shape) - len(channels.rows[name]))
            if place >= 0 and channels.rows[name][place].size == size:
                rows.append(channels.rows[name][place])
        first = rows[0]
        for other in rows[1:]:
            channels.atoms.tie(first, other)
        held = held or bool(any(r.any() for r in rows) and any(not r.any() for r in rows))
        # Any of several tied atoms represents all; the fixed one is preferred.
        out.append(np.minimum.reduce(rows) if size > 1 else still(size))
    if held and any(channels.constant(name) for name in node.inputs):
        channels.notes.append(f"{node.op} {node.name} has a constant for each channel: its channels stay.")
    channels.out(node, out)
