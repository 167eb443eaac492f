"""The pass over a training graph that writes every operator in the layout and form that is chosen for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from fedprune.model import step_contract
from fedprune_export.autodiff.dimensions import BATCH
from fedprune_export.autodiff.intents import Intentions
from fedprune_export.formulation.forms import Forms
from fedprune_export.formulation.layouts import Layouts, Sizes
from fedprune_export.ir.graph import Graph, Node, Port
from fedprune_export.ir.operators import registrar

Rule = Callable[["Formulator", Node], bool]
"""Writes a node's operators; if it returns False, the node is copied with its inputs in plain layout."""

RULES: dict[str, Rule] = {}
rule = registrar(RULES, "formulation")
"""Register a rule for operators."""


class Formulator:
    """A graph on its way from intents to operators.

    Args:
        shapes: Shapes of its values, as far as they are known.

    Attributes:
        graph: What is written.
        layouts: Its values.
        state: What a rule leaves for the rule of a later node, by the name of a value.
    """

    def __init__(self, source: Graph, shapes: Mapping[str, Sizes], forms: Forms) -> None:
        self.forms = forms
        self.graph = source.bare()
        known = {**shapes, **{n: v.shape for n, v in source.initializers.items()}}
        self.layouts = Layouts(self.graph, known, max(forms.block, 1), forms.batch)
        self.state: dict[str, object] = {}
        self._nodes = source.nodes
        self._readers = source.consumers()
        self._outputs = {p.name for p in source.outputs}
        self._done: set[int] = set()

    def run(self) -> Graph:
        """Write all nodes."""
        for node in self._nodes:
            if id(node) in self._done:
                continue
            self.graph.purpose = node.purpose
            function = RULES.get(node.op)
            if function is None or not function(self, node):
                self.copy(node)
        for name in sorted(self._outputs):
            if self.layouts.in_blocks(name):
                self.graph.emit("Identity", self.layouts.plain(name), out=name)
        if self.forms.block:
            self.graph.metadata[step_contract.BLOCK] = str(self.forms.block)
            self.graph.inputs = [self._of_batch(p) for p in self.graph.inputs]
        self.graph.prune()
        return self.graph

    def _of_batch(self, port: Port) -> Port:
        """An input whose batch has a number."""
        return replace(port, shape=tuple(self.forms.batch if d == BATCH else d for d in port.shape))

    def copy(self, node: Node) -> None:
        """Write a node as it is."""
        copied = node.copy()
        copied.inputs = [self.layouts.plain(i) if i else i for i in node.inputs]
        self.graph.nodes.append(copied)

    def readers(self, name: str) -> list[Node]:
        """The nodes that read a value."""
        return [node for node, _ in self._readers.get(name, [])]

    def only_reader(self, name: str) -> Node | None:
        """The one node that reads a value, None where there are more or it leaves the graph."""
        found = self._readers.get(name, [])
        return found[0][0] if len(found) == 1 and name not in self._outputs else None

    def skip(self, node: Node) -> None:
        """Leave out a later node, because another's rule has written it, too."""
        self._done.add(id(node))

    def name(self, value: str, name: str) -> None:
        """Give a value in plain layout the name that the source has for it."""
        self.layouts.rename(name, value)
        if name in self._outputs:
            self.graph.emit("Identity", value, out=name)


def intended(forms: Forms) -> Intentions:
    """The intents with which a graph may be written that is to be computed in these forms."""
    return Intentions(group_norms=forms.full if forms.block else None)


def formulated(graph: Graph, shapes: Mapping[str, Sizes], forms: Forms) -> Graph:
    """A training graph with intents as one without.

    Args:
        graph: The graph, whose widths are fixed.
        shapes: Shapes of its values, as far as they are known: all numbers but the batch.
    """
    return Formulator(graph, shapes, forms).run()
