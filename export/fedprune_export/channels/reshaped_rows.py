"""Channels through a reshape: the rows of atoms that the new axes get from the old axes.

An *atom* is an integer that names an index of an axis. `channels.factors` splits runs of axes into *factors* (sizes
whose products are the axes' sizes, before and after) and lists the assignments of old axes to new axes. Where several
are possible, one is chosen, and tried again with another if it leaves nothing to cut (`channels.choices`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedprune_export.channels.atoms import AtomRow
from fedprune_export.channels.factors import Assignment, AxisRun, assignments
from fedprune_export.channels.rule import Channels
from fedprune_export.ir.graph import Node
from fedprune_export.ir.trace import BATCH_EXTENT, TRACE_BATCHES


def carry_rows(channels: Channels, node: Node, rows: Sequence[AtomRow], run: AxisRun | None) -> dict[int, AtomRow]:
    """Carry the atoms of a run's old axes to its new axes. Returns the rows of those that get atoms.

    Args:
        rows: The atoms of the run's old axes.
        run: None for axes without common factors: their channels stay.
    """
    if not any(row.any() for row in rows):
        return {}
    if run is None:
        fix_mixed_channels(channels, node, rows)
        return {}
    # The factors' sizes in the traced arrays: multiples of `BATCH_EXTENT` stand for multiples of the batch.
    sizes = [f // BATCH_EXTENT * TRACE_BATCHES[0] if f % BATCH_EXTENT == 0 else f for f in run.factors]
    grids = [row.reshape([sizes[f] for f in span]) for row, span in zip(rows, run.old_factors, strict=True)]
    free = [d is None for d in channels.trace.dims(node.outputs[0])]
    options = assignments(run, grids, free)
    if len(options) > 1:
        # Several options: only channels that can still be cut decide between them.
        unit = channels.atoms.units()
        grids = [unit[g] for g in grids]
        options = assignments(run, grids, free)
    if not options:
        fix_mixed_channels(channels, node, grids)
        return {}
    key = f"{node.outputs[0]}:{run.old_axes[0]}"
    option = options[0] if len(options) == 1 else channels.choices.next_option(key, options)
    if option is None:
        if channels.follows_data(node):
            fix_mixed_channels(channels, node, grids)
        channels.fix([g.reshape(-1) for g in grids])
        return {}
    carried_rows = _assign_rows(channels, run, grids, option, sizes)
    if len(options) > 1:
        channels.choices.expect_choice(key, option, list(carried_rows.values()))
    return carried_rows


def _assign_rows(
    channels: Channels, run: AxisRun, grids: Sequence[AtomRow], option: Assignment, sizes: Sequence[int]
) -> dict[int, AtomRow]:
    """The rows of the new axes that take the atoms of old axes by this assignment.

    `grids`: atoms of the old axes, one axis per factor; `sizes`: of the run's factors.
    """
    rows: dict[int, AtomRow] = {}
    for grid, span, new_axis in zip(grids, run.old_factors, option, strict=True):
        if new_axis is None:
            channels.atoms.fix(grid.reshape(-1))
            continue
        target = run.new_factors[run.new_axes.index(new_axis)]
        # Factors of the old axis that the new axis lacks can't tell atoms apart any more, so atoms that differ only
        # along them are tied: kept or cut together.
        reduced = grid
        for axis, factor in enumerate(span):
            if factor not in target:
                reduced = reduced.take([0], axis=axis)
        channels.atoms.tie(grid, reduced)
        view = [grid.shape[f - span.start] if f in span else 1 for f in target]
        rows[new_axis] = np.broadcast_to(reduced.reshape(view), [sizes[f] for f in target]).reshape(-1)
    return rows


def fix_mixed_channels(channels: Channels, node: Node, rows: Sequence[AtomRow]) -> None:
    """Let channels stay that a reshape spreads over several axes or mixes with other ones, with a note."""
    unit = channels.atoms.units()
    if any(unit[row].any() for row in rows):
        channels.notes.append(f"{node.op} {node.name} mixes channels with other axes: they stay.")
    channels.fix([row.reshape(-1) for row in rows])
