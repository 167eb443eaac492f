"""Forms the channel groups of a model from its units (channels that can only be kept or cut together).

Units on the same axes of the same tensors form a group: they have the same *footprint*. Submodels store a group's
channels in rank order, so every axis must list all channels of a group in the same order, once or several times. Groups
for which that fails are split by the runs (units side by side on an axis) in which their units occur. Units that don't
fit even then are not cut. A group needs at least two channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedprune.model.architecture import FIXED, Axis, Segment
from fedprune_export.channels.atoms import AtomRow
from fedprune_export.channels.rule import Pick

Rows = Mapping[str, Sequence[AtomRow]]  # per value its axes


@dataclass(frozen=True)
class Grouping:
    """Channel groups.

    `group_of`: per atom its group, -1 for atoms that stay; `position`: per atom its channel in the group.
    """

    group_of: AtomRow
    position: AtomRow
    sizes: list[int]
    notes: list[str] = field(default_factory=list)
    _axes: dict[bytes, Axis] = field(default_factory=dict, repr=False)

    def axis(self, row: AtomRow) -> Axis:
        # Most axes of a graph repeat a few; forming an axis is the slow part.
        groups, positions = self.group_of[row], self.position[row]
        key = groups.tobytes() + positions.tobytes()
        if key not in self._axes:
            self._axes[key] = _build_axis(groups, positions)
        return self._axes[key]


def form_groups(rows: Rows, parameters: Iterable[str], picks: Sequence[Pick], unit: AtomRow) -> Grouping:
    """Form groups of units. `picks`: where nodes take indices from an axis; `unit`: of every atom, 0 for those that
    stay."""
    names = list(parameters)
    stay_counts: dict[str, int] = {}
    while True:
        axes = list({r.tobytes(): r for value in rows.values() for row in value if (r := unit[row]).any()}.values())
        candidate, unfit, alone = _divide_into_groups(axes, unit.size)
        reason = "the number of kept channels can't be read from any tensor's shape"
        rejected_group = _group_without_width(
            {frozenset(candidate.group_of[unit[r]].tolist()) for n in names for r in rows[n]}, candidate.sizes
        )
        # Which channels a node takes can only be judged once all widths can be read.
        if rejected_group is None:
            reason = "a node such as Gather or Slice takes different parts of different channels"
            unit_picks = [Pick(unit[p.source], p.indices, unit[p.atoms]) for p in picks]
            rejected_group = _find_uneven_pick(candidate, unit_picks)
        if rejected_group is None:
            break
        stay_counts[reason] = stay_counts.get(reason, 0) + candidate.sizes[rejected_group]
        unit = np.where(candidate.group_of[unit] == rejected_group, 0, unit)
    if unfit:
        stay_counts = {"their order differs between layers": unfit, **stay_counts}
    notes = [f"{count} channels stay, because {reason}." for reason, count in stay_counts.items()]
    if alone:
        notes.append(f"{alone} sets of channels stay, because each could only be kept or cut as a whole.")
    return Grouping(candidate.group_of[unit], candidate.position[unit], candidate.sizes, notes)


def _find_uneven_pick(grouping: Grouping, picks: Sequence[Pick]) -> int | None:
    """The first group from whose channels a node takes different indices; None if there is no such group.

    The indices would then depend on which channels are kept, so that no single graph could serve all selections.
    """
    for pick in picks:
        groups = grouping.group_of[pick.atoms]
        if not (groups != FIXED).any():
            continue
        offsets, source_offsets = (_channel_offsets(grouping.axis(atoms)) for atoms in (pick.atoms, pick.source))
        pairs = np.stack([offsets, source_offsets[pick.indices]])
        pairs = np.unique(pairs[:, groups != FIXED], axis=1)
        target_offsets, count = np.unique(pairs[0], return_counts=True)
        if (count > 1).any():
            index = np.flatnonzero(_channel_offsets(grouping.axis(pick.atoms)) == target_offsets[count > 1][0])[0]
            return int(groups[index])
    return None


def _channel_offsets(axis: Axis) -> AtomRow:
    """Each index's offset within its channel, plus its segment's offset.

    Corresponding indices of a segment's channels have equal ones.
    """
    offsets, offset = [], 0
    for s in axis.segments:
        inner = np.arange(s.inner if s.group != FIXED else s.length, dtype=np.int64) + offset
        offsets.append(np.tile(inner, s.count) if s.group != FIXED else inner)
        offset += s.length
    return np.concatenate(offsets) if offsets else np.zeros(0, np.int64)


def _divide_into_groups(axes: Sequence[AtomRow], size: int) -> tuple[Grouping, int, int]:
    """Form groups that every axis lists completely, once or several times.

    Returns the groups; how many units had to be fixed because of their order, and how many because they were alone.
    """
    # Units of equal keys are tried as one group. Footprints come first; runs are added to them where that fails.
    hashes = footprints(axes, size).tolist()
    # By first appearance, which is graph order; 0 stands for all that stays.
    units_in_order = list(dict.fromkeys(u for row in axes for u in np.unique(row).tolist() if u))
    group_keys: dict[int, object] = {u: hashes[u] for u in units_in_order}
    divided: set[int] = set()
    unfit = alone = 0
    while True:
        members: dict[object, list[int]] = {}
        for u in units_in_order:
            if u in group_keys:
                members.setdefault(group_keys[u], []).append(u)
        groups = list(members.values())
        group_of, position = np.full(size, FIXED, np.int64), np.zeros(size, np.int64)
        for g, units in enumerate(groups):
            group_of[units], position[units] = g, np.arange(len(units))
        runs, broken = _find_runs(axes, group_of, position, [len(m) for m in groups])
        # A group of one channel could not lose any: an axis can't be cut to nothing.
        single = {g for g, units in enumerate(groups) if len(units) == 1}
        if not broken and not single:
            return Grouping(group_of, position, [len(m) for m in groups]), unfit, alone
        for g in broken - single:
            runs_of_units = {u: runs.get(u, ()) for u in groups[g]}
            # Units in different runs may be groups of their own: they are tried again with the runs as part of the key.
            if len(set(runs_of_units.values())) > 1:
                for u, run in runs_of_units.items():
                    group_keys[u] = (group_keys[u], run)
                divided.update(runs_of_units)
                continue
            unfit += len(groups[g])
            for u in groups[g]:
                del group_keys[u]
        for g in single:
            unfit += groups[g][0] in divided
            alone += groups[g][0] not in divided
            del group_keys[groups[g][0]]


def footprints(axes: Sequence[AtomRow], size: int) -> AtomRow:
    """Per unit a hash of the axes on which it occurs, and how often on each: equal for units that may form a group."""
    hashes = np.zeros(size, np.int64)
    # A sum of random numbers, one per axis: other axes give another sum, and the order of axes doesn't matter. The seed
    # is fixed, so that the same model always gets the same groups.
    numbers = np.random.default_rng(0).integers(1, 2**62, len(axes))
    with np.errstate(over="ignore"):
        for row, number in zip(axes, numbers, strict=True):
            np.add.at(hashes, row, number)
    return hashes


def _group_without_width(axes: Iterable[frozenset[int]], sizes: Sequence[int]) -> int | None:
    """The smallest of the groups whose widths don't follow from the shapes of tensors; None if all do.

    A training graph serves all widths: it reads them off the shapes of the tensors that are its inputs. `axes`: the
    groups on every axis of a tensor.
    """
    readable = {FIXED}
    while True:
        # An axis with one unknown width gives it: its size minus the others'. That may settle further axes.
        solved = {g for axis in axes if len(axis - readable) == 1 for g in axis - readable}
        if not solved:
            break
        readable |= solved
    return min((g for g in range(len(sizes)) if g not in readable), key=lambda g: sizes[g], default=None)


def _find_runs(
    axes: Sequence[AtomRow], group_of: AtomRow, position: AtomRow, sizes: Sequence[int]
) -> tuple[dict[int, tuple[tuple[int, int], ...]], set[int]]:
    """The groups that some axis doesn't list completely and in order, and the runs in which units occur."""
    broken: set[int] = set()
    occurrences: dict[int, list[tuple[int, int]]] = {}
    for i, row in enumerate(axes):
        run_number = 0
        for g, start, stop in _equal_stretches(group_of[row]):
            if g == FIXED:
                continue
            runs, positions = [row[start:stop]], position[row[start:stop]]
            if _count_passes(positions, sizes[g]) is None:
                broken.add(g)
                # Where the order breaks, another run begins: its units may form a group of their own.
                step = np.diff(positions)
                runs = np.split(row[start:stop], np.flatnonzero((step != 0) & (step != 1)) + 1)
            for run in runs:
                run_number += 1
                for u in np.unique(run).tolist():
                    occurrences.setdefault(u, []).append((i, run_number))
    return {u: tuple(s) for u, s in occurrences.items()}, broken


def _equal_stretches(groups: AtomRow) -> Iterable[tuple[int, int, int]]:
    """Runs of equal numbers as (number, start, stop)."""
    if not groups.size:
        return
    cuts = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), groups.size]
    for start, stop in itertools.pairwise(cuts):
        yield int(groups[start]), start, stop


def _count_passes(positions: AtomRow, size: int) -> tuple[int, int] | None:
    """The number of times that a run lists all positions in order, and of repetitions of each; None if it doesn't."""
    inner = int(np.argmax(positions != positions[0])) if (positions != positions[0]).any() else positions.size
    if positions.size % (inner * size):
        return None
    passes = positions.size // (inner * size)
    if not np.array_equal(positions, np.tile(np.repeat(np.arange(size), inner), passes)):
        return None
    return passes, inner


def _build_axis(groups: AtomRow, positions: AtomRow) -> Axis:
    segments: list[Segment] = []
    for g, start, stop in _equal_stretches(groups):
        if g == FIXED:
            segments.append(Segment(FIXED, 0, stop - start))
            continue
        run = positions[start:stop]
        size = int(run.max()) + 1
        passes, inner = _count_passes(run, size) or (1, 1)
        segments += [Segment(g, 0, size, inner)] * passes
    return Axis(tuple(segments)) if segments else Axis.fixed(0)
