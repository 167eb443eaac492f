"""Why a training step takes what it takes: each piece's form, its bounds, and what it took."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedprune import __version__
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.model.step_contract import Y
from fedprune.runtime import session
from fedprune.runtime.session import KernelTimes, kernel_times
from fedprune_export.checks.step_feeds import random_labels, step_feeds
from fedprune_export.ir.graph import Graph
from fedprune_export.ir.trace import sample_feeds
from fedprune_export.profiling.machine_peak import Speed
from fedprune_export.profiling.roofline_layers import KINDS, Piece, pieces
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_step

_NODE = re.compile(r".*?~[0-9]+")  # the name of a node at the beginning of one that onnxruntime has made of it


@dataclass(frozen=True)
class Explained:
    """A piece with its bounds.

    Attributes:
        compute_s: What its MACs take at the machine's peak.
        memory_s: What its bytes take at the speed of main memory.
        measured_s: What it took; None if nothing was measured.
        spent: Of that, seconds by kind (`roofline_layers.KINDS`).
        comparable: Whether the bounds are those of the machine that measured.
    """

    piece: Piece
    compute_s: float
    memory_s: float
    measured_s: float | None = None
    spent: Mapping[str, float] = field(default_factory=dict)
    comparable: bool = True

    @property
    def seconds(self) -> float:
        """The measured time; without a measurement the least time."""
        return self.bound_s if self.measured_s is None else self.measured_s

    @property
    def bound_s(self) -> float:
        return max(self.compute_s, self.memory_s)

    @property
    def binds(self) -> str:
        return "compute" if self.compute_s > self.memory_s else "memory"

    @property
    def gap(self) -> float | None:
        """How many times the bound it took; None where the two are of different machines."""
        if self.measured_s is None or not self.bound_s or not self.comparable:
            return None
        return self.measured_s / self.bound_s

    def to_dict(self) -> dict[str, Any]:
        p = self.piece
        body: dict[str, Any] = {"layer": p.title, "op": p.op, "part": p.part, "form": p.form}
        body |= {"macs": p.macs, "bytes": p.bytes, "compute_s": self.compute_s, "memory_s": self.memory_s}
        body |= {"bound_s": self.bound_s, "binds": self.binds}
        if self.measured_s is not None:
            body |= {"measured_s": self.measured_s, "gap": self.gap, "spent": dict(self.spent)}
        return body


@dataclass(frozen=True)
class Explanation:
    """A training step, explained.

    Attributes:
        pieces: All pieces in the order in which they are computed.
        step_s: What a whole step took; None if nothing was measured.
        unknown_s: Of that, what belongs to no piece.
    """

    model: str
    widths: tuple[int, ...]
    batch: int
    speed: Speed
    pieces: tuple[Explained, ...]
    step_s: float | None = None
    unknown_s: float = 0.0

    @property
    def bound_s(self) -> float:
        """The least time of the step: the sum of its pieces'."""
        return sum(p.bound_s for p in self.pieces)

    def shares(self) -> dict[str, float]:
        """The share of each kind in the measured time; empty without a measurement."""
        spent = {kind: sum(p.spent.get(kind, 0.0) for p in self.pieces) for kind in KINDS}
        spent["other"] += self.unknown_s
        whole = sum(spent.values())
        return {kind: seconds / whole for kind, seconds in spent.items()} if whole else {}

    def to_dict(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "format": "fedprune.explanation/1",
            "fedprune": __version__,
            "onnxruntime": session.version(),
            "model": self.model,
            "widths": list(self.widths),
            "batch": self.batch,
            "bounds": {"flops": self.speed.flops, "bytes_s": self.speed.bytes_s, "source": self.speed.source},
            "bound_s": self.bound_s,
            "pieces": [p.to_dict() for p in self.pieces],
        }
        if self.step_s is not None:
            body |= {"step_s": self.step_s, "unknown_s": self.unknown_s, "shares": self.shares()}
        return body


def explain(
    model: Model,
    widths: Sequence[int],
    recipe: Recipe,
    speed: Speed,
    *,
    batch: int = 32,
    runs: int = 0,
    threads: int = 1,
) -> Explanation:
    """Explain a training step.

    Args:
        runs: How many steps are timed on this machine; none by default.

    Raises:
        ModelError: The model can't be trained, or this machine can't run its step.
        BundleError: The widths don't fit the model.
    """
    selection = Selection.of(model.architecture, widths)
    graph = training_step(model, recipe.features)
    found = pieces(model, graph, selection.widths, batch)
    times = _timed(model, graph, selection, recipe, batch, runs, threads) if runs else None
    spent, unknown = _spent(found, times) if times is not None else ([], 0.0)
    explained = tuple(
        Explained(
            piece,
            2 * piece.macs / speed.flops,
            piece.bytes / speed.bytes_s,
            sum(spent[i].values()) if times is not None else None,
            spent[i] if times is not None else {},
            speed.here,
        )
        for i, piece in enumerate(found)
    )
    whole = None if times is None else times.run
    name = model.architecture.name
    return Explanation(name, selection.widths, batch, speed, explained, whole, unknown)


def _timed(
    model: Model, graph: Graph, selection: Selection, recipe: Recipe, batch: int, runs: int, threads: int
) -> KernelTimes:
    """A step of random samples, timed. Raises `ModelError` if onnxruntime doesn't run it."""
    inputs, classes = {p.name: ("", p.shape) for p in graph.inputs}, model.architecture.classes
    x = sample_feeds(model.graph, batch)[model.graph.inputs[0].name]
    tensors = selection.gather(model.tensors)
    if model.base is not None:
        tensors |= model.base.tensors(model.graph.initializers)
    y = next(p for p in graph.inputs if p.name == Y)
    labels = random_labels(recipe, batch, classes, ("tensor(int64)" if y.dtype.kind == "i" else "", y.shape))
    feeds = step_feeds(inputs, recipe, tensors, x, labels, classes)
    return kernel_times(graph.to_bytes(), feeds, threads=threads, runs=runs, training=True)


def _spent(found: Sequence[Piece], times: KernelTimes) -> tuple[list[dict[str, float]], float]:
    """Seconds of every piece by kind, and seconds that belong to none."""
    owners = {name: i for i, piece in enumerate(found) for name in piece.nodes}
    spent: list[dict[str, float]] = [{} for _ in found]
    unknown = 0.0
    for name, (operator, seconds) in times.kernels.items():
        begins = _NODE.match(name)
        owner = owners.get(name, owners.get(begins.group()) if begins else None)
        if owner is not None:
            kind = found[owner].kind(operator)
            spent[owner][kind] = spent[owner].get(kind, 0.0) + seconds
        elif operator not in _AROUND:
            unknown += seconds
    return spent, unknown


_AROUND = frozenset({"If", "Loop", "Scan"})  # operators whose time is that of the operators inside them
