"""The state and the registry of channel rules: one small function per operator carries and ties atoms.

A rule reads the atoms of a node's inputs, ties those that must be cut together, and sets the atoms of the outputs. To
support an operator, write its rule in its file in `operators`.

Operators whose channels can be cut in more than one way are *choices*, of which only one fits a rectangular tensor. An
axis of heads × dims loses whole heads, or the same dims of every head; a grouped convolution whole groups, or the same
position in every group. Each such node offers its options, coarsest first. The rules run over the whole graph with
one option per node; a node whose option left fewer than two channels to choose from is advanced to its next one, and
the rules run again. Every run is right in itself: another option only makes more channels prunable.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from fedprune_export.channels.atoms import AtomRow, Atoms, fixed_row
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.operators import load_rules, registrar
from fedprune_export.ir.trace import Trace

Prefer = Literal["coarse", "fine"]  # which option comes first: whole heads and groups, or positions within all of them

Option = TypeVar("Option", bound=Hashable)

# The channels that a grouped operator can lose: whole groups, or the same positions of every group.
GROUPS, POSITIONS = "groups", "positions"

# How often a node may go through its options: the first time it may have failed for another node's choice.
_MAX_PASSES = 2


class Choices:
    """The options that were tried, per node, over all runs.

    `prefer`: whether the coarsest option is tried first, or the finest.
    """

    def __init__(self, prefer: Prefer = "coarse") -> None:
        self._reverse = prefer == "fine"
        self._tried: dict[str, set[Hashable]] = {}
        self._offered: dict[str, int] = {}
        self._passes_left: dict[str, int] = {}
        self._watched: dict[str, tuple[Hashable, list[AtomRow]]] = {}
        self._exhausted: set[str] = set()

    def begin(self) -> None:
        """Begin a new run: forget the rows that were watched in the last one."""
        self._watched, self._exhausted = {}, set()

    def next_option(self, key: str, options: Sequence[Option], *, ranked: bool = False) -> Option | None:
        """The first option of a node that hasn't failed yet; None if all have failed: then its channels stay.

        `options`: all options of the node, coarsest first; `ranked`: whether the first one is the best whatever is
        preferred.
        """
        tried = self._tried.setdefault(key, set())
        self._offered[key] = len(options)
        for option in reversed(options) if self._reverse and not ranked else options:
            if option not in tried:
                return option
        self._exhausted.add(key)
        return None

    def watch(self, key: str, option: Hashable, rows: Sequence[AtomRow]) -> None:
        """Register the rows in which the node's present option must leave channels to choose from."""
        self._watched[key] = (option, list(rows))

    def advance(self, unit: AtomRow, footprint: AtomRow) -> bool:
        """Advance the nodes none of whose rows has two units that could be a group; returns whether to run again.

        Of several only those with the most options left are advanced: queries that can lose heads or dimensions wait
        until keys and values in one tensor no longer choose between keys and values. A node that has run out of options
        gets one more round, since it may have failed for another one's choice.
        `unit`: the unit of every atom after this run; `footprint`: per unit a number that is the same for units on the
        same axes of tensors.
        """
        failed = [
            (key, option)
            for key, (option, rows) in self._watched.items()
            if not any(_could_be_group(unit[row], footprint) for row in rows)
        ]
        options_left = {key: self._offered[key] - len(self._tried[key]) for key, _ in failed}
        for key, option in failed:
            if options_left[key] == max(options_left.values()):
                self._tried[key].add(option)
        runs_again = bool(failed)
        if not runs_again:
            for key in self._exhausted:
                passes = self._passes_left.setdefault(key, _MAX_PASSES - 1)
                if passes:
                    self._passes_left[key] = passes - 1
                    self._tried[key] = set()
                    runs_again = True
        return runs_again


def _could_be_group(row: AtomRow, footprint: AtomRow) -> bool:
    """Whether two units of a row could be channels of one group."""
    units = np.unique(row[row > 0])
    return bool(np.unique(footprint[units]).size < units.size)


# Per operator the input that is the shape of its output: a number of channels there is rewritten in a cut.
SHAPE_INPUTS = {"ConstantOfShape": 0, "Expand": 1, "Reshape": 1, "Resize": 3}


Rows = tuple[AtomRow, ...]  # atoms of a value, one row per axis


class Pick(NamedTuple):
    """Indices that a node takes from an axis. `source`: atoms of the axis; `atoms`: atoms of the new axis."""

    source: AtomRow
    indices: npt.NDArray[np.int64]
    atoms: AtomRow


class Channels:
    """The state that rules read and write: atoms of all values seen so far.

    Args:
        parameters: Names of weights and statistics; only these get atoms of their own.
        uncut: Parameters whose indices all stay.
    """

    def __init__(
        self,
        graph: Graph,
        trace: Trace,
        parameters: Mapping[str, str],
        choices: Choices | None = None,
        uncut: Collection[str] = (),
    ) -> None:
        self.graph = graph
        self.trace = trace
        self.parameters = parameters
        self.choices = choices or Choices()
        self.choices.begin()
        self.atoms = Atoms()
        self.notes: list[str] = []
        self.rows: dict[str, Rows] = {}
        self.picks: list[Pick] = []
        self.data_values = {p.name for p in graph.inputs}
        for name, value in graph.initializers.items():
            if name in parameters and name not in uncut:
                self.rows[name] = tuple(self.atoms.fresh(n) for n in value.shape)
            else:
                self.rows[name] = tuple(fixed_row(n) for n in value.shape)
        for port in graph.inputs:
            self.rows[port.name] = self.fixed_rows(port.name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a value at the first batch size."""
        return self.trace.shapes[name]

    def fixed_rows(self, name: str) -> Rows:
        """Rows of a value whose indices all stay."""
        return tuple(fixed_row(n) for n in self.shape(name))

    def is_constant(self, name: str) -> bool:
        """Whether a value is a constant of more than one number."""
        value = self.graph.initializers.get(name)
        return value is not None and name not in self.parameters and value.size > 1

    def is_uniform(self, name: str) -> bool:
        """Whether a value is a constant whose numbers are all equal: `rewrites` can shorten it."""
        value = self.graph.initializers.get(name)
        if value is None or name in self.parameters or not value.size:
            return False
        return bool((value == value.reshape(-1)[0]).all())

    def constant_input(self, node: Node, index: int) -> npt.NDArray[Any] | None:
        """The constant at a node's input, flattened; None if it is missing or not a constant."""
        if not self.has_input(node, index) or node.inputs[index] in self.parameters:
            return None
        value = self.graph.initializers.get(node.inputs[index])
        return None if value is None else value.reshape(-1)

    def input_rows(self, node: Node, index: int) -> Rows:
        """Rows of a node's input."""
        return self.rows[node.inputs[index]]

    def has_input(self, node: Node, index: int) -> bool:
        """Whether a node's optional input is there."""
        return len(node.inputs) > index and bool(node.inputs[index])

    def set_output(self, node: Node, rows: Sequence[AtomRow], index: int = 0) -> None:
        """Set the rows of a node's output; the only index of an axis stays, because an axis can't be cut to nothing."""
        if index >= len(node.outputs) or not node.outputs[index]:
            return
        new_rows = []
        for row in rows:
            if row.size == 1 and row[0]:
                self.atoms.fix(row)
                row = fixed_row(1)
            new_rows.append(row)
        self.rows[node.outputs[index]] = tuple(new_rows)

    def take(self, row: AtomRow, indices: npt.NDArray[np.int64]) -> AtomRow:
        """The atoms of the indices that are taken from an axis."""
        atoms = row[indices]
        if atoms.any():
            self.picks.append(Pick(row, indices, atoms))
        return atoms

    def fix_outputs(self, node: Node) -> None:
        """Fix all indices of all outputs."""
        for i, name in enumerate(node.outputs):
            if name:
                self.set_output(node, self.fixed_rows(name), i)

    def fix(self, rows: Sequence[AtomRow]) -> None:
        """Let all these atoms stay."""
        for row in rows:
            self.atoms.fix(row)

    def fix_inputs(self, node: Node, start: int = 0) -> None:
        """Let all atoms of a node's inputs from `start` on stay."""
        for name in node.inputs[start:]:
            if name:
                self.fix(self.rows[name])

    def follows_data(self, node: Node) -> bool:
        """Whether a node reads something that depends on the graph's input."""
        return bool(self.data_values.intersection(node.inputs))


Rule = Callable[[Channels, Node], None]
RULES: dict[str, Rule] = {}  # rules by operator

channel_rule = registrar(RULES, "channel")  # register a rule for operators


def apply_channel_rules(channels: Channels) -> list[str]:
    """Apply the rules to all nodes.

    Returns one note per node that had to fix channels for want of a rule or because of a constant.
    """
    # Values that were computed from inputs and constants alone, before any weight.
    samples = {p.name for p in channels.graph.inputs}
    constants = channels.graph.initializers.keys() - channels.parameters.keys()
    rules = load_rules(RULES)
    for node in channels.graph.nodes:
        reads = {i for i in node.inputs if i}
        of_samples = not samples.isdisjoint(reads) and node.op not in ("Shape", "Size")
        if of_samples and reads <= samples | constants:
            samples.update(node.outputs)
        # The axes of samples stay in every model: the node that reads them is not to blame.
        channels.atoms.cause = "" if of_samples else f"{node.op} {node.name}"
        if channels.follows_data(node):
            channels.data_values.update(o for o in node.outputs if o)
        rule = None if node.domain else rules.get(node.op)
        if rule is not None:
            rule(channels, node)
            continue
        rows = [r for name in node.inputs if name for r in channels.rows[name]]
        channels.fix(rows)
        channels.fix_outputs(node)
        if any(r.any() for r in rows):
            operator = f"{node.domain}::{node.op}" if node.domain else node.op
            channels.notes.append(f"Operator {operator} ({node.name}) has no channel rule: its channels stay.")
    channels.atoms.cause = ""
    return channels.notes
