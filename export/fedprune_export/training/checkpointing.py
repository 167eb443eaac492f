"""Activation checkpointing: values are computed a second time instead of being kept, less memory for more work.

The backward pass reads what the forward pass has made, layers earlier. A value that waits for that is dropped, and its
node (and those before it, up to values that are there) is written a second time right before the value is read again.
What is dropped is chosen one by one: of the values that wait while most memory is taken, the one that frees most bytes
for its work, until the step fits a limit. (Chen et al. 2016, "Training deep nets with sublinear memory cost", drop
whole segments of a chain; a choice by bytes and work needs no chain. Jain et al. 2020, "Checkmate", choose by an
integer program, which is better and takes minutes.)

Two things would undo it: onnxruntime merges nodes that compute the same from the same inputs, and it may run a node as
soon as its inputs are there. So the second computation reads its inputs through a `Reshape` to their own shape, which
copies nothing and whose shape depends on what was computed just before.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedprune.model.architecture import Architecture
from fedprune.model.dropout import BATCH, sized
from fedprune.model.step_contract import X, is_dropout_mask
from fedprune_export.ir.drafts import Node
from fedprune_export.ir.graph import Graph
from fedprune_export.ir.liveness import execution_order, gate, last_reads, live_bytes, reads
from fedprune_export.ir.operators import VIEWS
from fedprune_export.ir.shape_inference import Inferred, follow, hold


@dataclass(frozen=True)
class ValueSizes:
    """Sizes of the values of a training graph.

    Attributes:
        shapes: Shapes by name. A value of which onnx can't tell the shape is missing.
    """

    shapes: Mapping[str, tuple[int, ...]]
    bytes: Mapping[str, int]


def value_sizes(graph: Graph, architecture: Architecture, widths: tuple[int, ...], batch: int) -> ValueSizes:
    """The sizes of all values of a training graph.

    Raises `ModelError` if an operator is in a form that onnx doesn't allow. `batch`: samples that are worked on at
    once.
    """
    shapes = architecture.shapes(widths)
    names = {BATCH: batch, **{g.name: width for g, width in zip(architecture.groups, widths, strict=True)}}
    out = Inferred()
    for port in graph.inputs:
        owner = port.name.rpartition("::")[0] if port.name not in shapes and port.shape else port.name
        # Besides weights and what goes with them only masks of dropout have channels.
        out.shapes[port.name] = (
            sized(port.shape, names)
            if is_dropout_mask(port.name)
            else shapes[owner]
            if owner in shapes and len(port.shape) == len(shapes[owner])
            else tuple(d if isinstance(d, int) else batch for d in port.shape)
        )
        out.dtypes[port.name] = port.dtype
    if X in out.shapes:
        out.shapes[X] = (batch, *architecture.input_shape)
    for name, value in graph.initializers.items():
        hold(out, name, value)
    for node in graph.nodes:
        follow(graph, out, node, [o for o in node.outputs if o and o not in out.shapes])
    return ValueSizes(out.shapes, {n: math.prod(s) * out.dtypes[n].itemsize for n, s in out.shapes.items()})


_NEVER = frozenset({"If", "Loop", "Scan", "Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomUniform"})
"""Operators that aren't run twice: control flow, and what draws random numbers."""

_SMALL = 64  # a value is small compared with one of this many times its bytes: it is kept for a second computation

_DEEPEST = 400  # nodes that are written a second time for one value

_PER_BYTE, _PER_CALL, _PER_PRODUCT = 0.2, 2000.0, 0.04
"""Nanoseconds of work: per byte moved, per node, per multiplication. Only ratios count."""


@dataclass
class Recomputed:
    """A graph some of whose values are computed twice.

    `live_bytes`: most bytes of values that live at once; `work`: the second computations' share of the whole step's
    work, as it is estimated.
    """

    graph: Graph
    live_bytes: int
    work: float
    values: int
    bytes: Mapping[str, int]


def recomputed(graph: Graph, sizes: ValueSizes, limit: int, *, most_work: float = math.inf) -> Recomputed:
    """A training graph whose values take at most `limit` bytes, or as few as possible above it.

    Args:
        sizes: Sizes of its values, at the widths and batch for which the limit is meant.
        limit: Bytes of values that may live at once; 0 for as few as can be.
        most_work: Work that may be added, as a share of the step's.
    """
    search = _Search(graph, sizes)
    search.run(limit, most_work)
    if not search.dropped:
        return Recomputed(graph, search.peak, 0.0, 0, sizes.bytes)
    written = search.written()
    kept = [p.name for p in graph.outputs]
    peak = max(live_bytes(execution_order(written), search.bytes, kept), default=0)
    return Recomputed(written, peak, search.added / search.whole, search.dropped, search.bytes)


@dataclass
class _Drop:
    """One value that may be dropped while most memory is taken."""

    value: str
    at: int  # where it is read next
    copies: list[Node] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    work: float = 0.0
    lengthened: int = 0  # bytes of dead values that must live on for it


class _Search:
    """The order of a graph's nodes, to which second computations are added one by one."""

    def __init__(self, graph: Graph, sizes: ValueSizes) -> None:
        self.graph = graph.copy()
        self.shapes, self.bytes = dict(sizes.shapes), dict(sizes.bytes)
        self.nodes = execution_order(self.graph)
        self.kept = [p.name for p in graph.outputs]
        self.given = {p.name for p in graph.inputs} | set(graph.initializers)
        self.copied: set[int] = set()
        self.origin: dict[str, str] = {}
        self.dropped, self.added = 0, 0.0
        self.whole = sum(self._work(n) for n in self.nodes)
        self._refused: set[tuple[str, str]] = set()
        self._learn()

    def _learn(self) -> None:
        self.live = live_bytes(self.nodes, self.bytes, self.kept)
        self.peak = max(self.live, default=0)
        self.last = last_reads(self.nodes, self.kept)
        self.made = {o: i for i, n in enumerate(self.nodes) for o in n.outputs if o}
        self.versions: dict[str, list[str]] = {}
        for copy, source in self.origin.items():
            self.versions.setdefault(source, [source]).append(copy)

    def run(self, limit: int, most_work: float) -> None:
        """Drop values until the limit is met, or nothing helps."""
        while self.peak > limit:
            top = max(range(len(self.live)), key=self.live.__getitem__)
            drops = (self._drop(value, top) for value in self._waiting(top))
            found = [d for d in drops if d is not None and self.added + d.work <= most_work * self.whole]
            found.sort(key=lambda d: d.work / (self.bytes[d.value] - d.lengthened))
            if not any(map(self._apply, found)):
                return

    # -- what may be dropped ------------------------------------------------------------------------------------------

    def _waiting(self, top: int) -> list[str]:
        """Values that live while a node runs that neither reads nor makes them."""
        used = set(reads(self.nodes[top])) | set(self.nodes[top].outputs)
        least = self.peak // 500
        return [
            name
            for name, at in self.made.items()
            if at < top < self.last.get(name, at)
            and self.last[name] < len(self.nodes)
            and self.bytes.get(name, 0) > least
            and name not in used
        ]

    def _drop(self, value: str, top: int) -> _Drop | None:
        at = next(i for i in range(top + 1, len(self.nodes)) if value in reads(self.nodes[i]))
        if (value, self.nodes[at].outputs[0]) in self._refused:
            return None
        drop = _Drop(value, at)
        if not self._second(value, drop, top, forced=True):
            return None
        return drop if self.bytes[value] > drop.lengthened else None

    def _second(self, value: str, drop: _Drop, top: int, *, forced: bool = False) -> bool:
        """Write the nodes that make a value a second time; False where that is out of the question."""
        if value in drop.names or value in self.given:
            return True
        source = self.origin.get(value, value)
        if not forced:
            for version in reversed(self.versions.get(source, [source])):
                if version == drop.value:
                    continue
                if self.made[version] < drop.at <= self.last.get(version, -1):
                    drop.names[value] = version
                    return True
                if top < self.last.get(version, -1) and self.made[version] < drop.at:
                    drop.names[value] = version  # it lives at the top as it is; for the rest the peak is looked at
                    return True
        node = self.nodes[self.made[value]]
        small = self.bytes.get(value, 0) * _SMALL <= self.bytes[drop.value]
        if not forced and small:
            drop.lengthened += self.bytes.get(value, 0)
            return True
        if node.op in _NEVER or len(drop.copies) > _DEEPEST or any(o in self.kept for o in node.outputs[:1]):
            return False
        if not all(self._second(i, drop, top) for i in reads(node)):
            return False
        outputs = [self.graph.fresh(node.op) if o else "" for o in node.outputs]
        copy = Node(node.op, [drop.names.get(i, i) for i in node.inputs], outputs, dict(node.attrs), "", node.domain)
        copy.name = copy.outputs[0]
        drop.names.update((o, n) for o, n in zip(node.outputs, outputs, strict=True) if o)
        drop.copies.append(copy)
        drop.work += self._work(node)
        return True

    def _apply(self, drop: _Drop) -> bool:
        """Drop a value if that lowers the memory; returns whether it did."""
        copies = {id(c) for c in drop.copies}
        fresh = {n: o for o, n in drop.names.items() if n not in self.made}
        for copy, value in fresh.items():
            self.bytes[copy] = self.bytes.get(value, 0)
            self.shapes[copy] = self.shapes.get(value, ())
        renamed = drop.names[drop.value]
        later = [
            Node(n.op, [renamed if i == drop.value else i for i in n.inputs], n.outputs, n.attrs, n.name, n.domain)
            if drop.value in n.inputs
            else n
            for n in self.nodes[drop.at :]
        ]
        nodes = [*self.nodes[: drop.at], *drop.copies, *later]
        live = live_bytes(nodes, self.bytes, self.kept)
        # The peak falls, or is reached less often: one of them must get smaller, or the search wouldn't end.
        if (max(live), live.count(self.peak)) >= (self.peak, self.live.count(self.peak)):
            self._refused.add((drop.value, self.nodes[drop.at].outputs[0]))
            return False
        swapped = dict(zip(map(id, self.nodes[drop.at :]), map(id, later), strict=True))
        self.copied = {swapped.get(i, i) for i in self.copied} | copies
        self.nodes = nodes
        self.origin |= {copy: self.origin.get(value, value) for copy, value in fresh.items()}
        self.dropped += 1
        self.added += drop.work
        self._learn()
        return True

    def _work(self, node: Node) -> float:
        moved = sum(self.bytes.get(n, 0) for n in (*reads(node), *node.outputs) if n)
        made = math.prod(self.shapes.get(node.outputs[0], ()))
        shape = self.shapes.get(node.inputs[1], ()) if len(node.inputs) > 1 else ()
        products = 0
        if node.op == "Conv":
            products = made * math.prod(shape[1:])
        elif node.op == "ConvTranspose":
            products = math.prod(self.shapes.get(node.inputs[0], ())) * math.prod(shape[1:])
        elif node.op in ("MatMul", "Gemm") and shape:
            products = made * shape[-1 if node.attrs.get("transB") else -2 if len(shape) > 1 else 0]
        return _PER_CALL + (0 if node.op in VIEWS else _PER_BYTE * moved) + _PER_PRODUCT * products

    # -- the graph ----------------------------------------------------------------------------------------------------

    def written(self) -> Graph:
        """The graph with second computations held back until what runs just before them has run.

        The file keeps its order, in which copies come right before what reads them: onnxruntime chooses by it.
        """
        out = self.graph
        place = {n.outputs[0]: float(i) for i, n in enumerate(out.nodes)}
        groups = self._groups(place)
        keyed: list[tuple[float, Node]] = []
        for before, key, copies in groups:
            out.nodes = []
            waits = gate(out, before) if before else ""
            held: dict[str, str] = {}
            for copy in copies:
                inputs = copy.inputs
                free = [i for i in inputs if self.shapes.get(i) and i not in self.origin and i not in out.initializers]
                name = max(free, key=lambda i: self.made.get(i, -1), default="")
                if name and waits:
                    if name not in held:
                        zeros = out.emit("Mul", waits, out.ints(*[0] * len(self.shapes[name])))
                        held[name] = out.emit("Reshape", name, zeros)
                        self.bytes[held[name]] = self.bytes.get(name, 0)
                    inputs = [held[name] if i == name else i for i in inputs]
                out.nodes.append(Node(copy.op, inputs, copy.outputs, copy.attrs, copy.name, copy.domain))
            keyed += [(key, n) for n in out.nodes]
        keyed += [(place[n.outputs[0]], n) for n in self.nodes if id(n) not in self.copied]
        out.nodes = _sorted(keyed)
        out.prune()
        return out

    def _groups(self, place: dict[str, float]) -> list[tuple[str, float, list[Node]]]:
        """The copies that run one after the other: what runs before them, where they belong in the file, and they."""
        out: list[tuple[str, float, list[Node]]] = []
        seen: list[str] = []
        taken: set[str] = set()
        copies: list[Node] = []
        for node in self.nodes:
            if id(node) in self.copied:
                copies.append(node)
                continue
            if copies:
                key = place[node.outputs[0]] - 0.5
                # Each group waits for another value: what waits for the same one may be merged.
                before = next((v for v in reversed(seen) if place[v] < key and v not in taken), "")
                taken.add(before)
                out.append((before, key, copies))
                copies = []
            if self.bytes.get(node.outputs[0]):
                seen.append(node.outputs[0])
        return out


def _sorted(keyed: list[tuple[float, Node]]) -> list[Node]:
    """Nodes by their keys, but each after those that it reads."""
    makers = {o: i for i, (_, n) in enumerate(keyed) for o in n.outputs if o}
    waiting: list[int] = []
    readers: list[list[int]] = [[] for _ in keyed]
    for i, (_, node) in enumerate(keyed):
        sources = {makers[r] for r in reads(node) if r in makers}
        waiting.append(len(sources))
        for source in sources:
            readers[source].append(i)
    ready = [(key, i) for i, (key, _) in enumerate(keyed) if not waiting[i]]
    heapq.heapify(ready)
    out: list[Node] = []
    while ready:
        _, i = heapq.heappop(ready)
        out.append(keyed[i][1])
        for reader in readers[i]:
            waiting[reader] -= 1
            if not waiting[reader]:
                heapq.heappush(ready, (keyed[reader][0], reader))
    return out
