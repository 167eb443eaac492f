"""Why a training step takes what it takes: each piece's form, its bounds, and what it took."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedprune import __version__
from fedprune.core.text import amount, quantity
from fedprune.model.selection import Selection
from fedprune.runtime import session
from fedprune.runtime.blocks import check_block
from fedprune.runtime.session import KernelTimes, kernel_times
from fedprune.terminal.tables import Column
from fedprune.training.recipe import Recipe
from fedprune_export.checks.step_feeds import random_labels, step_feeds
from fedprune_export.formulation import Forms
from fedprune_export.ir.graph import Graph
from fedprune_export.ir.trace import sample_feeds
from fedprune_export.profiling.machine_peak import Speed
from fedprune_export.profiling.roofline_layers import KINDS, Piece, pieces
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph

_NODE = re.compile(r".*?~[0-9]+")
"""The name of a node at the beginning of one that onnxruntime has made of it."""


@dataclass(frozen=True)
class Explained:
    """A piece with its bounds.

    Attributes:
        piece: The piece.
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
    def bound_s(self) -> float:
        """The least time."""
        return max(self.compute_s, self.memory_s)

    @property
    def binds(self) -> str:
        """Which bound that is."""
        return "compute" if self.compute_s > self.memory_s else "memory"

    @property
    def gap(self) -> float | None:
        """How many times the bound it took; None where the two are of different machines."""
        if self.measured_s is None or not self.bound_s or not self.comparable:
            return None
        return self.measured_s / self.bound_s

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
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
        model: The model's name.
        widths: Channels of every group.
        batch: Samples of the step.
        forms: How layers were to be computed; None for the graph that serves every width.
        speed: The machine's bounds.
        pieces: All pieces in the order in which they are computed.
        step_s: What a whole step took; None if nothing was measured.
        unknown_s: Of that, what belongs to no piece.
    """

    model: str
    widths: tuple[int, ...]
    batch: int
    forms: Forms | None
    speed: Speed
    pieces: tuple[Explained, ...]
    step_s: float | None = None
    unknown_s: float = 0.0

    @property
    def bound_s(self) -> float:
        """The least time of the step: the sum of its pieces'."""
        return sum(p.bound_s for p in self.pieces)

    def shares(self) -> dict[str, float]:
        """What share of the measured time was spent on what; empty if nothing was measured."""
        spent = {kind: sum(p.spent.get(kind, 0.0) for p in self.pieces) for kind in KINDS}
        spent["other"] += self.unknown_s
        whole = sum(spent.values())
        return {kind: seconds / whole for kind, seconds in spent.items()} if whole else {}

    def rows(self, *, fold: bool = False) -> list[tuple[str, ...]]:
        """The table for people, a cell for each of `columns`.

        Args:
            fold: Give pieces that take less than a hundredth of the step (measured, else by their bounds) one row.
        """
        shown, folded = list(self.pieces), []
        if fold:
            whole = sum(map(_seconds, self.pieces))
            folded = [p for p in self.pieces if _seconds(p) < _FOLDED * whole]
        if len(folded) > 1:
            shown = [p for p in self.pieces if _seconds(p) >= _FOLDED * whole]
        rows = [self._row((p.piece.title, p.piece.op, p.piece.part, p.piece.form), [p], p.binds) for p in shown]
        if len(folded) > 1:
            rows.append(self._row((f"{len(folded)} others", "", "", ""), folded, ""))
        return rows

    def _row(self, words: Sequence[str], pieces: Sequence[Explained], binds: str) -> tuple[str, ...]:
        bound = sum(p.bound_s for p in pieces)
        row = [*(word or "–" for word in words), f"{sum(p.piece.macs for p in pieces):,}"]
        row += [amount(sum(p.piece.bytes for p in pieces), "bytes"), amount(bound, "s"), binds or "–"]
        if self.step_s is not None:
            took = sum(p.measured_s or 0.0 for p in pieces)
            row.append(amount(took, "s"))
            if self.speed.here:
                row.append(f"{took / bound:.1f}" if bound else "–")
        return tuple(row)

    @property
    def columns(self) -> tuple[Column, ...]:
        """The table's columns; those of measured times only where there are some."""
        if self.step_s is None:
            return _COLUMNS
        return (*_COLUMNS, *(_MEASURED if self.speed.here else (Column("measured here", right=True),)))

    def summary(self) -> list[str]:
        """What there is to say of the whole step, line by line."""
        speed = f"{self.speed.flops / 1e9:,.1f} GFLOP/s and {self.speed.bytes_s / 1e9:,.1f} GB/s"
        lines = [f"bounds: {speed} ({self.speed.source})"]
        macs = sum(p.piece.macs for p in self.pieces)
        step = f"a step of {quantity(self.batch, 'sample')}"
        least = f"{step}: {macs:,} MACs, at least {amount(self.bound_s, 's')}"
        if self.step_s is None:
            return [*lines, least]
        if self.speed.here:
            lines.append(f"{least}; measured {amount(self.step_s, 's')}, {self.step_s / self.bound_s:.1f} times that")
        else:
            lines.append(f"{least} on that board")
            lines.append(f"measured on this machine, which is another: {amount(self.step_s, 's')}")
        parts = (f"{_KINDS[kind]} {share:.0%}" for kind, share in self.shares().items())
        return [*lines, f"spent on: {', '.join(parts)}"]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        body: dict[str, Any] = {
            "format": "fedprune.explanation/1",
            "fedprune": __version__,
            "onnxruntime": session.version(),
            "model": self.model,
            "widths": list(self.widths),
            "batch": self.batch,
            "block": None if self.forms is None else self.forms.block,
            "bounds": {"flops": self.speed.flops, "bytes_s": self.speed.bytes_s, "source": self.speed.source},
            "bound_s": self.bound_s,
            "pieces": [p.to_dict() for p in self.pieces],
        }
        if self.step_s is not None:
            body |= {"step_s": self.step_s, "unknown_s": self.unknown_s, "shares": self.shares()}
        return body


_FOLDED = 0.01
"""Pieces with a smaller share of the step share a row of the printed table."""

_COLUMNS = (
    Column("layer", wrap=12),
    Column("operator", drop=4),
    Column("part"),
    Column("form", drop=6),
    Column("MACs", right=True, drop=3),
    Column("moves", right=True, drop=5),
    Column("bound", right=True),
    Column("binds", drop=2),
)
_MEASURED = Column("measured", right=True), Column("gap", right=True, drop=1)
_KINDS = {
    "products": "convolutions and products",
    "norms": "norms",
    "layout": "changes of layout",
    "update": "update of weights",
    "other": "all else",
}


def explain(
    model: Model,
    widths: Sequence[int],
    recipe: Recipe,
    speed: Speed,
    *,
    batch: int = 32,
    forms: Forms | None = None,
    runs: int = 0,
    threads: int = 1,
) -> Explanation:
    """Explain a training step.

    Args:
        model: The whole model.
        widths: Channels of every group.
        recipe: How it is trained.
        speed: The machine's bounds.
        batch: Samples of the step.
        forms: How layers are computed; None for the graph that serves every width.
        runs: How many steps are timed on this machine; none by default.
        threads: Threads inside an operator.

    Raises:
        ModelError: The model can't be trained, or this machine can't run its step.
        BundleError: The widths don't fit the model.
    """
    selection = Selection.of(model.architecture, widths)
    features = recipe.features
    fixed = None if forms is None else selection.widths
    graph = training_graph(model, features, widths=fixed, forms=forms)
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
    return Explanation(name, selection.widths, batch, forms, speed, explained, whole, unknown)


def _timed(
    model: Model, graph: Graph, selection: Selection, recipe: Recipe, batch: int, runs: int, threads: int
) -> KernelTimes:
    """A step of random samples, timed.

    Raises:
        ModelError: It is for other blocks of channels than this processor's, or onnxruntime doesn't run it.
    """
    check_block(graph.metadata)
    inputs, outputs = [p.name for p in graph.inputs], model.architecture.classes
    x = sample_feeds(model.graph, batch)[model.graph.inputs[0].name]
    tensors = selection.gather(model.tensors)
    feeds = step_feeds(inputs, recipe, tensors, x, random_labels(recipe, batch, outputs), outputs)
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


def _seconds(piece: Explained) -> float:
    return piece.bound_s if piece.measured_s is None else piece.measured_s


_AROUND = frozenset({"If", "Loop", "Scan"})
"""Operators whose time is that of the operators inside them."""
