"""How each operator carries and ties atoms: one small function per operator.

A rule reads the atoms of a node's inputs, ties what must be cut together, and says the atoms of the outputs. To support
an operator, write its rule in the module of its family (and, if it has arguments that depend on widths, one in
`rewrites`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedprune_export.channels.atoms import AtomRow, Atoms, still
from fedprune_export.channels.choices import Choices
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.registry import registrar
from fedprune_export.ir.trace import Trace

Rows = tuple[AtomRow, ...]
"""Atoms of a value, one row per axis."""


class Pick(NamedTuple):
    """Indices that are taken from an axis.

    Attributes:
        source: Atoms of the axis.
        taken: The indices.
        made: Atoms of what they make.
    """

    source: AtomRow
    taken: npt.NDArray[np.int64]
    made: AtomRow


class Channels:
    """What rules read and write: atoms of all values seen so far.

    Args:
        graph: The graph.
        seen: Its shapes.
        parameters: Names of weights and statistics; only these get atoms of their own.
        choices: Options that were tried before.
    """

    def __init__(
        self, graph: Graph, seen: Trace, parameters: Mapping[str, str], choices: Choices | None = None
    ) -> None:
        self.graph = graph
        self.seen = seen
        self.parameters = parameters
        self.choices = choices or Choices()
        self.choices.begin()
        self.atoms = Atoms()
        self.notes: list[str] = []
        self.rows: dict[str, Rows] = {}
        self.picks: list[Pick] = []
        self.data = {p.name for p in graph.inputs}
        for name, value in graph.initializers.items():
            if name in parameters:
                self.rows[name] = tuple(self.atoms.fresh(n) for n in value.shape)
            else:
                self.rows[name] = tuple(still(n) for n in value.shape)
        for port in graph.inputs:
            self.rows[port.name] = self.still(port.name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a value at the first batch size."""
        return self.seen.shapes[name]

    def still(self, name: str) -> Rows:
        """Rows of a value whose indices all stay."""
        return tuple(still(n) for n in self.shape(name))

    def constant(self, name: str) -> bool:
        """Whether a value is a constant of more than one number."""
        value = self.graph.initializers.get(name)
        return value is not None and name not in self.parameters and value.size > 1

    def uniform(self, name: str) -> bool:
        """Whether a value is a constant whose numbers are all equal: `rewrites` can shorten it."""
        value = self.graph.initializers.get(name)
        if value is None or name in self.parameters or not value.size:
            return False
        return bool((value == value.reshape(-1)[0]).all())

    def number(self, node: Node, index: int) -> npt.NDArray[Any] | None:
        """The constant at a node's input, flattened; None if it is none, or not there."""
        if not self.has(node, index) or node.inputs[index] in self.parameters:
            return None
        value = self.graph.initializers.get(node.inputs[index])
        return None if value is None else value.reshape(-1)

    def of(self, node: Node, index: int) -> Rows:
        """Rows of a node's input."""
        return self.rows[node.inputs[index]]

    def has(self, node: Node, index: int) -> bool:
        """Whether a node's optional input is there."""
        return len(node.inputs) > index and bool(node.inputs[index])

    def out(self, node: Node, rows: Sequence[AtomRow], index: int = 0) -> None:
        """Set the rows of a node's output; the only index of an axis stays, because an axis can't be cut to nothing."""
        if index >= len(node.outputs) or not node.outputs[index]:
            return
        kept = []
        for row in rows:
            if row.size == 1 and row[0]:
                self.atoms.fix(row)
                row = still(1)
            kept.append(row)
        self.rows[node.outputs[index]] = tuple(kept)

    def pick(self, row: AtomRow, taken: npt.NDArray[np.int64]) -> AtomRow:
        """The atoms of the indices that are taken from an axis."""
        made = row[taken]
        if made.any():
            self.picks.append(Pick(row, taken, made))
        return made

    def still_outputs(self, node: Node) -> None:
        """All indices of all outputs stay."""
        for i, name in enumerate(node.outputs):
            if name:
                self.out(node, self.still(name), i)

    def fix(self, rows: Sequence[AtomRow]) -> None:
        """All these atoms stay."""
        for row in rows:
            self.atoms.fix(row)

    def fix_inputs(self, node: Node, start: int = 0) -> None:
        """All atoms of a node's inputs from one on stay."""
        for name in node.inputs[start:]:
            if name:
                self.fix(self.rows[name])

    def resolved(self, row: AtomRow) -> AtomRow:
        """A row with every atom as its unit by the ties so far."""
        return self.atoms.units()[row]

    def follows_data(self, node: Node) -> bool:
        """Whether a node reads something that depends on the graph's input."""
        return bool(self.data.intersection(node.inputs))


Rule = Callable[[Channels, Node], None]
RULES: dict[str, Rule] = {}
"""Rules by operator."""

rule = registrar(RULES, "channel")
"""Register a rule for operators."""


def walk(channels: Channels) -> list[str]:
    """Apply the rules to all nodes.

    Returns:
        One note per node that had to fix channels for want of a rule or because of a constant.
    """
    for node in channels.graph.nodes:
        if channels.follows_data(node):
            channels.data.update(o for o in node.outputs if o)
        known = None if node.domain else RULES.get(node.op)
        if known is not None:
            known(channels, node)
            continue
        rows = [r for name in node.inputs if name for r in channels.rows[name]]
        channels.fix(rows)
        channels.still_outputs(node)
        if any(r.any() for r in rows):
            called = f"{node.domain}::{node.op}" if node.domain else node.op
            channels.notes.append(f"Operator {called} ({node.name}) has no channel rule: its channels stay.")
    return channels.notes
