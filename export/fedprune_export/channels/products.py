"""Operators that contract channels: convolutions and matrix products."""

from __future__ import annotations

from fedprune_export.channels.atoms import AtomRow, still
from fedprune_export.channels.rule import Channels, rule
from fedprune_export.graph import Node


@rule("Conv")
def convolution(channels: Channels, node: Node) -> None:
    """Plain, depthwise (channels tied one to one, or one to several), or grouped (whole groups)."""
    x, weight = channels.of(node, 0), channels.of(node, 1)
    groups = int(node.attrs.get("group", 1))
    produced = weight[0]
    if groups == 1:
        channels.atoms.tie(weight[1], x[1])
    else:
        channels.fix([weight[1]])
        inside = x[1].reshape(groups, -1)
        channels.atoms.tie(inside, inside[:, :1])
        channels.atoms.tie(produced.reshape(groups, -1), inside[:, :1])
    if channels.has(node, 2):
        channels.atoms.tie(channels.of(node, 2)[0], produced)
    channels.fix(weight[2:])
    shape = channels.shape(node.outputs[0])
    channels.out(node, [still(shape[0]), produced, *(still(n) for n in shape[2:])])


@rule("MatMul")
def matmul(channels: Channels, node: Node) -> None:
    """The contracted axes are tied, the others carried; leading axes broadcast."""
    a, b = channels.of(node, 0), channels.of(node, 1)
    channels.atoms.tie(a[-1], b[-2] if len(b) > 1 else b[0])
    rank = max(len(a), len(b)) - 2
    lead: list[AtomRow] = []
    for axis in range(max(rank, 0)):
        rows = [r[axis - (rank - len(r) + 2)] for r in (a, b) if axis - (rank - len(r) + 2) >= 0]
        longest = max(rows, key=lambda r: r.size)
        for other in rows:
            if other.size == longest.size:
                channels.atoms.tie(longest, other)
        lead.append(longest)
    out = lead + ([a[-2]] if len(a) > 1 else []) + ([b[-1]] if len(b) > 1 else [])
    channels.out(node, out)


@rule("Gemm")
def gemm(channels: Channels, node: Node) -> None:
    """A matrix product with optional transposition and an addend that may broadcast."""
    a, b = channels.of(node, 0), channels.of(node, 1)
    if node.attrs.get("transA"):
        a = a[::-1]
    if node.attrs.get("transB"):
        b = b[::-1]
    channels.atoms.tie(a[1], b[0])
    if channels.has(node, 2):
        addend = channels.of(node, 2)
        if addend and addend[-1].size == b[1].size:
            channels.atoms.tie(addend[-1], b[1])
        channels.fix(addend[:-1])
    channels.out(node, [a[0], b[1]])
