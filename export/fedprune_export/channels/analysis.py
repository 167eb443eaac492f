"""From a normalised graph to its `Architecture`: channel groups, tensors, cost table, activations.

The channel rules (`rule`) run over the graph, with other choices each time, until every choice leaves something to cut.
They give every index of every axis an *atom* (an integer name), and tie the atoms that can only be kept or cut
together. Atoms that are tied in the end are a *unit*; `grouping` forms groups of units.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from fedprune.core.errors import ModelError
from fedprune.core.text import first_few
from fedprune.model.architecture import Architecture, Axis, ChannelGroup, TensorKind, TensorSpec
from fedprune.model.step_contract import LOGITS
from fedprune_export.channels.atoms import AtomRow
from fedprune_export.channels.choices import Choices
from fedprune_export.channels.cost_table import ValueAxes, activation_rows, layer_rows
from fedprune_export.channels.grouping import footprints, form_groups
from fedprune_export.channels.rule import SHAPE_INPUTS, Channels, apply_channel_rules
from fedprune_export.ir.graph import Graph
from fedprune_export.ir.shape_arithmetic import size_marks, size_origins
from fedprune_export.ir.trace import Trace
from fedprune_export.model_options import Prefer

# Passes over the rules. Fewer than ten settle one or two choices per layer; the bound guards against endless passes.
_MAX_RUNS = 40


@dataclass(frozen=True)
class Analysis:
    """The result of the channel analysis. `values`: axes of every value of the graph, initialisers included."""

    architecture: Architecture
    values: ValueAxes
    notes: list[str] = field(default_factory=list)


def analyse(
    graph: Graph,
    parameters: Mapping[str, str],
    trace: Trace,
    name: str,
    prefer: Prefer = "coarse",
    uncut: Collection[str] = (),
) -> Analysis:
    """Find the channel groups of a normalised graph.

    Raises `ModelError` if the output is not one row or map per sample.

    Args:
        prefer: Which channels to cut where only one kind can be: "coarse" for whole heads, convolution groups and norm
            groups, "fine" for positions within all of them. Where one leaves nothing to cut, the other is taken.
        uncut: Names of tensors whose channels all stay.
    """
    channels, notes = _settle_choices(graph, parameters, trace, prefer, uncut)
    groups = form_groups(channels.rows, parameters, channels.picks, _units_in_tensors(channels))
    notes += groups.notes
    if not groups.sizes and not notes and not uncut and channels.atoms.fix_causes:
        causes = first_few(list(channels.atoms.fix_causes), max_names=3)
        notes.append(f"No channels can be cut: {causes} keep those that they read.")
    values: dict[str, tuple[Axis | None, ...]] = {
        n: tuple(None if b else groups.axis(r) for r, b in zip(value, trace.batched(n), strict=True))
        for n, value in channels.rows.items()
    }
    output_dims = trace.dims(LOGITS)
    if not output_dims or output_dims[0] is not None or None in output_dims[1:] or 0 in output_dims:
        raise ModelError("the model's output", expected="one row of logits per sample", got=list(output_dims))
    if not any(TensorKind(kind).is_trainable for kind in parameters.values()):
        raise ModelError("the model has no trainable tensor that its output depends on")
    architecture = Architecture(
        name=name,
        groups=tuple(ChannelGroup(f"g{i}", s) for i, s in enumerate(groups.sizes)),
        tensors=tuple(
            TensorSpec(n, TensorKind(kind), tuple(a for a in values[n] if a is not None))
            for n, kind in parameters.items()
        ),
        layers=tuple(layer_rows(graph, parameters, values, trace)),
        activations=tuple(activation_rows(graph, values, trace)),
        input_shape=tuple(int(d) for d in graph.inputs[0].shape[1:] if isinstance(d, int)),
        output_shape=tuple(int(d) for d in output_dims[1:] if d is not None),
    )
    architecture.validate()
    return Analysis(architecture, values, notes)


def _settle_choices(
    graph: Graph, parameters: Mapping[str, str], trace: Trace, prefer: Prefer, uncut: Collection[str]
) -> tuple[Channels, list[str]]:
    """Run the rules until every choice leaves something to cut."""
    # Ties can't be undone, so that each pass begins with fresh atoms; only the choices are carried over.
    choices = Choices(prefer)
    for _ in range(_MAX_RUNS):
        channels = Channels(graph, trace, parameters, choices, uncut)
        notes = apply_channel_rules(channels)
        channels.fix(channels.rows[LOGITS])
        notes += _fix_counts_in_use(channels)
        unit = channels.atoms.units()
        axes = [unit[row] for name in parameters for row in channels.rows[name] if row.any()]
        if not choices.reject_failed_options(unit, footprints(axes, unit.size)):
            break
    return channels, notes


def _units_in_tensors(channels: Channels) -> AtomRow:
    """The unit of every atom; units that occur in no weight or statistic are fixed, because there is nothing to cut."""
    unit = channels.atoms.units()
    in_tensors = np.zeros(unit.size, np.bool_)
    for name in channels.parameters:
        for row in channels.rows[name]:
            in_tensors[unit[row]] = True
    return np.where(in_tensors[unit], unit, 0)


def _fix_counts_in_use(channels: Channels) -> list[str]:
    """Fix channels whose count the graph uses as a value. The count may occur in a shape input that `rewrites`
    replaces, unless that entry also depends on the batch. Returns a note per node that reads such a count."""
    graph, trace = channels.graph, channels.trace
    unit = _units_in_tensors(channels)
    constants = {n for n in graph.initializers if n not in channels.parameters}
    numbers = size_marks(graph, trace, constants, lambda name: [bool(unit[r].any()) for r in channels.rows[name]])
    notes, measured_names = [], {LOGITS} & set(numbers)
    for node in graph.nodes:
        if any(o in numbers for o in node.outputs):
            continue
        for i, name in enumerate(node.inputs):
            if name not in numbers:
                continue
            marks = numbers[name]
            if SHAPE_INPUTS.get(node.op) == i and not node.domain:
                follows_batch = [d is None for d in trace.dims(node.outputs[0])]
                marks = marks.reshape(-1) & np.array(follows_batch) if marks.size == len(follows_batch) else marks
            if marks.any():
                measured_names.add(name)
                notes.append(f"{node.op} {node.name} uses a number of channels as a value: these channels stay.")
    for node in size_origins(graph, measured_names):
        channels.fix(channels.rows[node.inputs[0]])
    return notes
