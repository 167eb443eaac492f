"""A model as the compiler holds it: normalised inference graph, weights by name, architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from fedprune.core.errors import BundleError
from fedprune.model.architecture import Architecture, Axis
from fedprune.model.recipe import Features
from fedprune.model.selection import Selection, Tensors
from fedprune_export.ir.graph import Graph
from fedprune_export.ir.trace import Trace, trace
from fedprune_export.pruning.groups import Groups


@dataclass(frozen=True, repr=False)
class Model:
    """An imported model.

    Attributes:
        graph: The normalised inference graph. Its only input is `x` with a free batch, its only output is `logits`;
            every weight and statistic is an initialiser under its tensor name; all other initialisers are constants.
        architecture: Channel groups, tensors and costs of that graph.
        notes: What the import changed or could not analyse, for people: one sentence each.
        values: Axes of every value at full width; None for an axis that follows the batch.
        frozen: Names of tensors that the model's author froze (`requires_grad=False` in torch).
        training_graphs: Training graphs that were derived from it (`training.step_graph.training_step`).
    """

    graph: Graph
    architecture: Architecture
    notes: tuple[str, ...] = ()
    values: Mapping[str, tuple[Axis | None, ...]] = field(default_factory=dict, repr=False)
    frozen: tuple[str, ...] = ()
    training_graphs: dict[Features, Graph] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __repr__(self) -> str:
        a = self.architecture
        sizes = f"{len(a.tensors)} tensors, {len(a.groups)} channel groups"
        return f"Model({a.name}: {list(a.input_shape)} to {a.classes} outputs, {sizes})"

    @property
    def tensors(self) -> Tensors:
        """Weights and statistics by name, in the architecture's order."""
        return {t.name: self.graph.initializers[t.name] for t in self.architecture.tensors}

    @cached_property
    def trace(self) -> Trace:
        """Shapes and types of the graph's values at several batch sizes.

        Raises:
            ModelError: The batch can't vary, a value would be huge, or an operator makes no sense.
        """
        return trace(self.graph)

    @property
    def groups(self) -> Groups:
        """The channels that can only be kept or cut together, and what stays; prints as text."""
        return Groups(self.architecture, self.notes)

    def check(self, selection: Selection) -> None:
        """Make sure that a selection is one of this model's channels.

        Raises:
            BundleError: It belongs to another architecture.
        """
        if selection.architecture.digest != self.architecture.digest:
            raise BundleError(
                "selection belongs to another architecture",
                expected=self.architecture.digest[:12],
                got=selection.architecture.digest[:12],
            )
