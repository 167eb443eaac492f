"""From a normalised graph to its `Architecture`: channel groups, tensors, cost table, activations.

The rules run over the graph until no choice is left that leaves nothing to cut; what hangs together then is a unit, and
units become groups (see `grouping`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fedprune.core.errors import ModelError
from fedprune.model.architecture import Architecture, Axis, ChannelGroup, TensorKind, TensorSpec
from fedprune.training.step_contract import LOGITS
from fedprune_export.channels.atoms import AtomRow
from fedprune_export.channels.choices import Choices, Prefer
from fedprune_export.channels.cost_table import ValueAxes, activations, layers
from fedprune_export.channels.grouping import grouped
from fedprune_export.channels.rule import Channels, Pick, walk
from fedprune_export.channels.targets import TARGETS
from fedprune_export.ir.graph import Graph
from fedprune_export.ir.shape_arithmetic import follow, origins
from fedprune_export.ir.trace import Trace

_MOST_RUNS = 40
"""Runs of the rules: a choice or two per layer are settled in fewer than ten."""


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


def analyse(graph: Graph, parameters: Mapping[str, str], seen: Trace, name: str, prefer: Prefer = "coarse") -> Analysis:
    """Find the channel groups of a normalised graph.

    Args:
        graph: The graph.
        parameters: Kind of every weight and statistic.
        seen: Shapes of its values.
        name: The architecture's name.
        prefer: Which channels to cut where only one kind can be: "coarse" for whole heads, convolution groups and norm
            groups, "fine" for positions within all of them. Where one leaves nothing to cut, the other is taken.

    Raises:
        ModelError: The output is not one row or map per sample.
    """
    channels, notes = _settle(graph, parameters, seen, prefer)
    unit = _owned(channels)
    rows = {n: tuple(unit[r] for r in value) for n, value in channels.rows.items()}
    picks = [Pick(unit[p.source], p.taken, unit[p.made]) for p in channels.picks]
    groups = grouped(rows, parameters, picks)
    notes += groups.notes
    values: dict[str, tuple[Axis | None, ...]] = {
        n: tuple(None if b else groups.axis(r) for r, b in zip(value, seen.batched(n), strict=True))
        for n, value in rows.items()
    }
    out = seen.dims(LOGITS)
    if not out or out[0] is not None or None in out[1:] or 0 in out:
        raise ModelError("the model's output", expected="one row of logits per sample", got=list(out))
    if not any(TensorKind(kind).trainable for kind in parameters.values()):
        raise ModelError("the model has no trainable tensor that its output depends on")
    architecture = Architecture(
        name=name,
        groups=tuple(ChannelGroup(f"g{i}", s) for i, s in enumerate(groups.sizes)),
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


def _settle(graph: Graph, parameters: Mapping[str, str], seen: Trace, prefer: Prefer) -> tuple[Channels, list[str]]:
    """Run the rules until no choice is left that leaves nothing to cut."""
    choices = Choices(prefer)
    for _ in range(_MOST_RUNS):
        channels = Channels(graph, seen, parameters, choices)
        notes = walk(channels)
        channels.fix(channels.rows[LOGITS])
        notes += _fix_measured(channels)
        unit = channels.atoms.units()
        if not choices.advance(unit, _footprints(channels, unit)):
            break
    return channels, notes


def _footprints(channels: Channels, unit: AtomRow) -> AtomRow:
    """Per unit a number that stands for the axes of tensors that it is on: the same for units that may form a group."""
    rows = [row for name in channels.parameters for row in channels.rows[name] if row.any()]
    out = np.zeros(unit.size, np.int64)
    numbers = np.random.default_rng(0).integers(1, 2**62, len(rows))
    with np.errstate(over="ignore"):
        for row, number in zip(rows, numbers, strict=True):
            np.add.at(out, unit[row], number)
    return out


def _owned(channels: Channels) -> AtomRow:
    """The unit of every atom; what no weight or statistic has stays, because there is nothing to cut."""
    unit = channels.atoms.units()
    owned = np.zeros(unit.size, np.bool_)
    for name in channels.parameters:
        for row in channels.rows[name]:
            owned[unit[row]] = True
    return np.where(owned[unit], unit, 0)


def _fix_measured(channels: Channels) -> list[str]:
    """Fix channels whose number the graph computes with.

    Sizes of targets that `rewrites` writes anew may say it, except where they follow the batch as well.

    Returns:
        A note per place where such a number is read.
    """
    graph, seen = channels.graph, channels.seen
    unit = _owned(channels)
    constants = {n for n in graph.initializers if n not in channels.parameters}
    numbers = follow(graph, seen, constants, lambda name: [bool(unit[r].any()) for r in channels.rows[name]])
    notes, bad = [], {LOGITS} & set(numbers)
    for node in graph.nodes:
        if any(o in numbers for o in node.outputs):
            continue
        for i, name in enumerate(node.inputs):
            if name not in numbers:
                continue
            marks = numbers[name]
            if TARGETS.get(node.op) == i and not node.domain:
                free = [d is None for d in seen.dims(node.outputs[0])]
                marks = marks.reshape(-1) & np.array(free) if marks.size == len(free) else marks
            if marks.any():
                bad.add(name)
                notes.append(f"{node.op} {node.name} computes with a number of channels: these stay.")
    for node in origins(graph, bad):
        channels.fix(channels.rows[node.inputs[0]])
    return notes
