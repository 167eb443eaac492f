"""A model as the compiler holds it: normalised inference graph, weights by name, architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedprune.core.errors import BundleError
from fedprune.model.architecture import Architecture, Axis
from fedprune.model.selection import Selection, Tensors
from fedprune_export.ir.graph import Graph


@dataclass(frozen=True)
class Model:
    """An imported model.

    Attributes:
        graph: The normalised inference graph. Its only input is `x` with a free batch, its only output is `logits`;
            every weight and statistic is an initialiser under its tensor name; all other initialisers are constants.
        architecture: Channel groups, tensors and costs of that graph.
        notes: What the import changed or could not analyse, for people: one sentence each.
        values: Axes of every value at full width; None for an axis that follows the batch.
        frozen: Names of tensors that the model's author froze (`requires_grad=False` in torch).
    """

    graph: Graph
    architecture: Architecture
    notes: tuple[str, ...] = ()
    values: Mapping[str, tuple[Axis | None, ...]] = field(default_factory=dict, repr=False)
    frozen: tuple[str, ...] = ()

    @property
    def tensors(self) -> Tensors:
        """Weights and statistics by name, in the architecture's order."""
        return {t.name: self.graph.initializers[t.name] for t in self.architecture.tensors}

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
