"""How each operator carries and ties atoms: one small function per operator.

A rule reads the atoms of a node's inputs, ties what must be cut together, and says the atoms of the outputs. To support
an operator, write its rule here (and, if it has arguments that depend on widths, one in `cut`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fedprune_export.atoms import AtomRow, Atoms, still
from fedprune_export.graph import Graph, Node
from fedprune_export.trace import Trace

Rows = tuple[AtomRow, ...]
"""Atoms of a value, one row per axis."""

_ONE_TO_ONE = (
    "Relu",
    "LeakyRelu",
    "Sigmoid",
    "Tanh",
    "Elu",
    "Selu",
    "Celu",
    "HardSigmoid",
    "HardSwish",
    "Softplus",
    "Softsign",
    "ThresholdedRelu",
    "Identity",
    "Dropout",
    "Cast",
    "Neg",
    "Abs",
    "Exp",
    "Log",
    "Sqrt",
    "Reciprocal",
    "Erf",
    "Clip",
)
_MANY_TO_ONE = ("Add", "Sub", "Mul", "Div", "PRelu", "Pow", "Max", "Min", "Sum", "Mean")
ELEMENTWISE = frozenset({*_ONE_TO_ONE, *_MANY_TO_ONE})
"""Operators that compute every index of the output from the same index of the inputs."""


class Channels:
    """What rules read and write: atoms of all values seen so far.

    Args:
        graph: The graph.
        seen: Its shapes.
        parameters: Names of weights and statistics; only these get atoms of their own.
    """

    def __init__(self, graph: Graph, seen: Trace, parameters: Mapping[str, str]) -> None:
        self.graph = graph
        self.seen = seen
        self.parameters = parameters
        self.atoms = Atoms()
        self.notes: list[str] = []
        self.rows: dict[str, Rows] = {}
        for name, value in graph.initializers.items():
            if name in parameters:
                self.rows[name] = tuple(self.atoms.fresh(n) for n in value.shape)
            else:
                self.rows[name] = tuple(still(n) for n in value.shape)
        for port in graph.inputs:
            self.rows[port.name] = self.still(port.name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a value at the first batch size."""
        return self.seen.shapes[name]

    def still(self, name: str) -> Rows:
        """Rows of a value whose indices all stay."""
        return tuple(still(n) for n in self.shape(name))

    def constant(self, name: str) -> bool:
        """Whether a value is a constant of more than one number."""
        value = self.graph.initializers.get(name)
        return value is not None and name not in self.parameters and value.size > 1

    def of(self, node: Node, index: int) -> Rows:
        """Rows of a node's input."""
        return self.rows[node.inputs[index]]

    def has(self, node: Node, index: int) -> bool:
        """Whether a node's optional input is there."""
        return len(node.inputs) > index and bool(node.inputs[index])

    def out(self, node: Node, rows: Sequence[AtomRow], index: int = 0) -> None:
        """Set the rows of a node's output."""
        self.rows[node.outputs[index]] = tuple(rows)

    def fix(self, rows: Sequence[AtomRow]) -> None:
        """All these atoms stay."""
        for row in rows:
            self.atoms.fix(row)


Rule = Callable[[Channels, Node], None]
RULES: dict[str, Rule] = {}
"""Rules by operator."""


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Register a rule for these operators."""

    def register(function: Rule) -> Rule:
        for name in operators:
            RULES[name] = function
        return function

    return register


def walk(channels: Channels) -> list[str]:
    """Apply the rules to all nodes.

    Returns:
        One note per node that had to fix channels for want of a rule or because of a constant.
    """
    for node in channels.graph.nodes:
        known = None if node.domain else RULES.get(node.op)
        if known is not None:
            known(channels, node)
            continue
        rows = [r for name in node.inputs if name for r in channels.rows[name]]
        channels.fix(rows)
        for i, name in enumerate(node.outputs):
            if name:
                channels.out(node, channels.still(name), i)
        if any(r.any() for r in rows):
            called = f"{node.domain}::{node.op}" if node.domain else node.op
            channels.notes.append(f"Operator {called} ({node.name}) has no channel rule: its channels stay.")
    return channels.notes


@rule(*_ONE_TO_ONE)
def elementwise(channels: Channels, node: Node) -> None:
    """One value in, one of the same shape out; bounds and the like stay."""
    for i in range(1, len(node.inputs)):
        if channels.has(node, i):
            channels.fix(channels.of(node, i))
    channels.out(node, channels.of(node, 0))


@rule("Shape", "Size", "ConstantOfShape", "Range")
def measure(channels: Channels, node: Node) -> None:
    """Sizes are not channels: the inputs may be cut, the outputs are plain numbers."""
    for i, name in enumerate(node.outputs):
        channels.out(node, channels.still(name), i)


@rule(*_MANY_TO_ONE)
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
        first = max(rows, key=lambda r: int(np.count_nonzero(r)))
        for other in rows:
            channels.atoms.tie(first, other)
        held = held or bool(first.any() and any(not r.any() for r in rows))
        out.append(first if size > 1 else still(size))
    if held and any(channels.constant(name) for name in node.inputs):
        channels.notes.append(f"{node.op} {node.name} has a constant for each channel: its channels stay.")
    channels.out(node, out)


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


@rule("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "GlobalLpPool")
def pooling(channels: Channels, node: Node) -> None:
    """Channels pass, places stay."""
    x = channels.of(node, 0)
    for i, name in enumerate(node.outputs):
        if name:
            shape = channels.shape(name)
            channels.out(node, [x[0], x[1], *(still(n) for n in shape[2:])], i)


@rule("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin")
def reduction(channels: Channels, node: Node) -> None:
    """What is reduced away stays, because cutting it would change the result; the rest passes."""
    x = channels.of(node, 0)
    axes = node.attrs.get("axes")
    if axes is None and channels.has(node, 1):
        axes = channels.graph.initializers[node.inputs[1]].reshape(-1).tolist()
    gone = {a % len(x) for a in (axes if axes else range(len(x)))}
    channels.fix([x[a] for a in gone])
    if node.attrs.get("keepdims", 1):
        channels.out(node, [still(1) if a in gone else x[a] for a in range(len(x))])
    else:
        channels.out(node, [x[a] for a in range(len(x)) if a not in gone])


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
