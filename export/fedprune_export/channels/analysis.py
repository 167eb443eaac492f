"""From a normalised graph to its `Architecture`: channel groups, tensors, cost table, activations.

Units (what can be cut on its own) with the same footprint form a group. Submodels lay a group's channels out in rank
order, so every axis must hold a group as whole passes over its channels in one and the same order; units for which that
fails are split into smaller groups by the runs in which they occur, and stay where even that doesn't help.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedprune.architecture import (
    FIXED,
    Architecture,
    Axis,
    ChannelGroup,
    Segment,
    TensorKind,
    TensorSpec,
)
from fedprune.errors import ModelError
from fedprune.step import LOGITS
from fedprune_export.channels.atoms import AtomRow
from fedprune_export.channels.cost_table import ValueAxes, activations, layers
from fedprune_export.channels.rule import Channels, walk
from fedprune_export.graph import Graph
from fedprune_export.shape_arithmetic import follow, origins
from fedprune_export.trace import Trace


@dataclass(frozen=True)
class Analysis:
    """What the channel analysis found.

    Attributes:
        architecture: The result.
        values: Axes of every value of the graph, initialisers included.
        notes: Operators that fixed channels.
    """

    architecture: Architecture
    values: ValueAxes
    notes: list[str] = field(default_factory=list)


def analyse(graph: Graph, parameters: Mapping[str, str], seen: Trace, name: str) -> Analysis:
    """Find the channel groups of a normalised graph.

    Args:
        graph: The graph.
        parameters: Kind of every weight and statistic.
        seen: Shapes of its values.
        name: The architecture's name.

    Raises:
        ModelError: The output is not one row or map per sample.
    """
    channels = Channels(graph, seen, parameters)
    notes = walk(channels)
    channels.fix(channels.rows[LOGITS])
    notes += _fix_measured(channels)
    unit = channels.atoms.units()
    rows = {n: tuple(unit[r] for r in value) for n, value in channels.rows.items()}
    group_of, position, sizes, unfit = _groups(rows)
    if unfit:
        notes.append(f"{unfit} channels stay, because their order differs between layers.")
    batched = {n: seen.batched(n) for n in rows}
    values: dict[str, tuple[Axis | None, ...]] = {
        n: tuple(None if b else _axis(group_of[r], position[r]) for r, b in zip(value, batched[n], strict=True))
        for n, value in rows.items()
    }
    out = seen.dims(LOGITS)
    if not out or out[0] is not None or None in out[1:] or 0 in out:
        raise ModelError("the model's output", expected="one row of logits per sample", got=list(out))
    if not any(TensorKind(kind).trainable for kind in parameters.values()):
        raise ModelError("the model has no trainable tensor that its output depends on")
    architecture = Architecture(
        name=name,
        groups=tuple(ChannelGroup(f"g{i}", s) for i, s in enumerate(sizes)),
        tensors=tuple(
            TensorSpec(n, TensorKind(kind), tuple(a for a in values[n] if a is not None))
            for n, kind in parameters.items()
        ),
        layers=tuple(layers(graph, parameters, values, seen)),
        activations=tuple(activations(graph, values, seen)),
        input_shape=tuple(int(d) for d in graph.inputs[0].shape[1:] if isinstance(d, int)),
        classes=int(out[1] or 0) if len(out) == 2 else 0,
    )
    architecture.validate()
    return Analysis(architecture, values, notes)


def _fix_measured(channels: Channels) -> list[str]:
    """Fix channels whose number the graph computes with.

    Targets of reshapes whose sizes are known aren't computed any more once a graph is normalised: `cut` rewrites them.

    Returns:
        A note per place where such a number is read.
    """
    graph, seen = channels.graph, channels.seen
    unit = channels.atoms.units()
    constants = {n for n in graph.initializers if n not in channels.parameters}
    numbers = follow(graph, seen, constants, lambda name: [bool(unit[r].any()) for r in channels.rows[name]])
    notes, bad = [], {LOGITS} & set(numbers)
    for node in graph.nodes:
        if any(o in numbers for o in node.outputs):
            continue
        for name in node.inputs:
            if name in numbers and numbers[name].any():
                bad.add(name)
                notes.append(f"{node.op} {node.name} computes with a number of channels: these stay.")
    for node in origins(graph, bad):
        channels.fix(channels.rows[node.inputs[0]])
    return notes


def _groups(rows: Mapping[str, Sequence[AtomRow]]) -> tuple[AtomRow, AtomRow, list[int], int]:
    """Form groups of units.

    Returns:
        Per unit label: its group (-1 fixed) and its position in it; the groups' sizes; how many units had to be fixed.
    """
    size = 1 + max((int(r.max(initial=0)) for value in rows.values() for r in value), default=0)
    axes = [r for value in rows.values() for r in value if r.any()]
    footprint: dict[int, list[tuple[int, int]]] = {}
    for i, row in enumerate(axes):
        found, counts = np.unique(row, return_counts=True)
        for u, n in zip(found.tolist(), counts.tolist(), strict=True):
            if u:
                footprint.setdefault(u, []).append((i, n))
    fixed: set[int] = set()
    keys: dict[int, object] = {u: tuple(f) for u, f in footprint.items()}
    order = list(footprint)  # by first appearance: graph order
    while True:
        members: dict[object, list[int]] = {}
        for u in order:
            if u not in fixed:
                members.setdefault(keys[u], []).append(u)
        group_of, position = np.full(size, FIXED, np.int64), np.zeros(size, np.int64)
        for g, units in enumerate(members.values()):
            group_of[units], position[units] = g, np.arange(len(units))
        runs, broken = _check_passes(axes, group_of, position, [len(m) for m in members.values()])
        if not broken:
            return group_of, position, [len(m) for m in members.values()], len(fixed)
        lists = list(members.values())
        for g in broken:
            parts = {u: runs.get(u, ()) for u in lists[g]}
            if len(set(parts.values())) > 1:
                for u, part in parts.items():
                    keys[u] = (keys[u], part)
            else:
                fixed.update(lists[g])


def _check_passes(
    axes: Sequence[AtomRow], group_of: AtomRow, position: AtomRow, sizes: Sequence[int]
) -> tuple[dict[int, tuple[tuple[int, int], ...]], set[int]]:
    """Which groups are not whole passes in order on some axis, and in which runs their units occur."""
    broken: set[int] = set()
    spots: dict[int, list[tuple[int, int]]] = {}
    for i, row in enumerate(axes):
        for at, (g, start, stop) in enumerate(_stretches(group_of[row])):
            if g == FIXED:
                continue
            if _passes(position[row[start:stop]], sizes[g]) is None:
                broken.add(g)
            for u in np.unique(row[start:stop]).tolist():
                spots.setdefault(u, []).append((i, at))
    return {u: tuple(s) for u, s in spots.items()}, broken


def _stretches(groups: AtomRow) -> Iterable[tuple[int, int, int]]:
    """Runs of equal numbers as (number, start, stop)."""
    if not groups.size:
        return
    cuts = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), groups.size]
    for start, stop in itertools.pairwise(cuts):
        yield int(groups[start]), start, stop


def _passes(positions: AtomRow, size: int) -> tuple[int, int] | None:
    """How often and with which inner length a run goes over all positions in order; None if it doesn't."""
    inner = int(np.argmax(positions != positions[0])) if (positions != positions[0]).any() else positions.size
    if positions.size % (inner * size):
        return None
    passes = positions.size // (inner * size)
    if not np.array_equal(positions, np.tile(np.repeat(np.arange(size), inner), passes)):
        return None
    return passes, inner


def _axis(groups: AtomRow, positions: AtomRow) -> Axis:
    segments: list[Segment] = []
    for g, start, stop in _stretches(groups):
        if g == FIXED:
            segments.append(Segment(FIXED, 0, stop - start))
            continue
        run = positions[start:stop]
        size = int(run.max()) + 1
        passes, inner = _passes(run, size) or (1, 1)
        segments += [Segment(g, 0, size, inner)] * passes
    return Axis(tuple(segments)) if segments else Axis.fixed(0)
