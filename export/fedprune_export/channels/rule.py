"""The registry of channel rules, and the state that they read and write.

Every operator has one *channel rule*, in its file in `operators`. It reads the *atoms* of a node's inputs (integers
that name the indices of an axis), ties those that can only be kept or cut together, fixes those that must stay, and
sets the atoms of the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedprune_export.channels.atoms import AtomRow, Atoms, fixed_row
from fedprune_export.channels.choices import Choices
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.operators import load_rules, registrar
from fedprune_export.ir.trace import Trace

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

    def _constant(self, name: str) -> npt.NDArray[Any] | None:
        """A constant, flattened; None for other values."""
        value = None if name in self.parameters else self.graph.initializers.get(name)
        return None if value is None else value.reshape(-1)

    def is_constant(self, name: str) -> bool:
        """Whether a value is a constant of more than one number."""
        value = self._constant(name)
        return value is not None and value.size > 1

    def is_uniform(self, name: str) -> bool:
        """Whether a value is a constant whose numbers are all equal: `rewrites` can shorten it."""
        value = self._constant(name)
        return value is not None and value.size > 0 and bool((value == value[0]).all())

    def constant_input(self, node: Node, index: int) -> npt.NDArray[Any] | None:
        """The constant at a node's input, flattened; None if it is missing or not a constant."""
        return self._constant(node.inputs[index]) if self.has_input(node, index) else None

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
