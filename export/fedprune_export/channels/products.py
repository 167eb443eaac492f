"""Operators that contract channels: convolutions, matrix products, einsum, recurrent layers."""

from __future__ import annotations

import numpy as np

from fedprune_export.channels.atoms import AtomRow, still
from fedprune_export.channels.rule import Channels, rule
from fedprune_export.ir.graph import Node

GROUPS, POSITIONS = "groups", "positions"
"""The channels that a grouped operator can lose: whole groups, or the same positions of every group."""


@rule("Conv")
def convolution(channels: Channels, node: Node) -> None:
    """Plain, depthwise (channels tied one to one, or one to several), or grouped."""
    x, weight = channels.of(node, 0)[1], channels.of(node, 1)
    groups = int(node.attrs.get("group", 1))
    if groups == 1:
        channels.atoms.tie(weight[1], x)
        produced = weight[0]
    else:
        produced = _grouped(channels, node, x, weight[0], weight[1], groups)
    _produce(channels, node, produced)


@rule("ConvTranspose")
def transposed_convolution(channels: Channels, node: Node) -> None:
    """Its weight has the input's channels first, then the outputs of one group."""
    x, weight = channels.of(node, 0)[1], channels.of(node, 1)
    groups = int(node.attrs.get("group", 1))
    channels.atoms.tie(weight[0], x)
    produced = weight[1] if groups == 1 else _grouped(channels, node, weight[0], None, weight[1], groups)
    _produce(channels, node, produced)


def _produce(channels: Channels, node: Node, produced: AtomRow) -> None:
    """Tie the bias, fix the kernel's places and those that it moves over, set the output."""
    x = channels.of(node, 0)
    if channels.has(node, 2):
        channels.atoms.tie(channels.of(node, 2)[0], produced)
    if any(row.any() for row in x[2:]):
        channels.notes.append(f"{node.op} {node.name} takes channels for places: they stay.")
    channels.fix([*x[2:], *channels.of(node, 1)[2:]])
    channels.out(node, [x[0], produced, *(still(n) for n in channels.shape(node.outputs[0])[2:])])


def _grouped(
    channels: Channels, node: Node, taken: AtomRow, made: AtomRow | None, inside: AtomRow, groups: int
) -> AtomRow:
    """Tie what a grouped convolution can only lose together.

    Args:
        made: Output channels of all groups, where the weight has an axis of them (Conv).
        inside: The weight's axis of one group's channels: inputs (Conv) or outputs (ConvTranspose).

    Returns:
        The output's channels.
    """
    blocks = taken.reshape(groups, -1)
    outputs = made.reshape(groups, -1) if made is not None else np.tile(inside, (groups, 1))
    options = [GROUPS] if blocks.shape[1] == outputs.shape[1] == 1 else [GROUPS, POSITIONS]
    # Positions of a group of one channel read would keep all channels that are read.
    option = channels.choices.pick(node.outputs[0], options, ranked=blocks.shape[1] == 1)
    if option == GROUPS:
        whole = blocks[:, :1]
        channels.atoms.tie(blocks, whole)
        channels.atoms.fix(inside)
        if made is not None:
            channels.atoms.tie(outputs, whole)
        produced = np.repeat(whole[:, 0], outputs.shape[1])
        kept = [whole[:, 0]]
    elif option == POSITIONS:
        channels.atoms.tie(blocks, blocks[:1])
        if made is not None:
            channels.atoms.tie(inside, blocks[0])
            channels.atoms.tie(outputs, outputs[:1])
        produced = np.tile(outputs[0], groups)
        kept = [blocks[0], outputs[0]]
    else:
        channels.fix([taken, inside, outputs.reshape(-1)])
        return still(outputs.size)
    if len(options) > 1:
        channels.choices.watch(node.outputs[0], option, kept)
    return produced


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


def einsum_terms(equation: str, inputs: int) -> tuple[list[str], str] | None:
    """The letters of an explicit equation's inputs and output; None where it is implicit or takes a diagonal."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    letters = "".join([*terms, right])
    if not arrow or "." in letters or len(terms) != inputs or any(len(set(t)) != len(t) for t in [*terms, right]):
        return None
    return terms, right


@rule("Einsum")
def einsum(channels: Channels, node: Node) -> None:
    """Axes of the same letter are tied; a letter that is repeated from length 1 is not."""
    found = einsum_terms(str(node.attrs["equation"]), len(node.inputs))
    if found is None:
        channels.fix_inputs(node)
        channels.still_outputs(node)
        channels.notes.append(f"Einsum {node.name} is implicit or takes a diagonal: its channels stay.")
        return
    terms, right = found
    held: dict[str, AtomRow] = {}
    for name, term in zip(node.inputs, terms, strict=True):
        for letter, row in zip(term, channels.rows[name], strict=True):
            first = held.setdefault(letter, row)
            if first.size == row.size:
                channels.atoms.tie(first, row)
            elif row.size > first.size:
                held[letter] = row
    channels.out(node, [held[letter] for letter in right])


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
