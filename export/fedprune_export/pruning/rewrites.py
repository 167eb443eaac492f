"""The registry of rewrites: how attributes and constants that hold a number of channels change in a cut, by operator.

Entries that depend on the batch are never written as numbers: they would freeze the batch of the analysis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ModelError
from fedprune.model.architecture import Axis
from fedprune.model.selection import Selection
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.operators import registrar
from fedprune_export.pruning.model import Model


class Sizes:
    """Axes of values before and after a cut."""

    def __init__(self, model: Model, widths: Sequence[int]) -> None:
        self._values = model.values
        self._architecture = model.architecture
        self._widths = widths

    def full_sizes(self, name: str) -> list[int | None]:
        """Sizes of a value's axes at full width; None where they follow the batch."""
        return [a.length if a is not None else None for a in self._axes(name)]

    def cut_sizes(self, name: str) -> list[int | None]:
        """Sizes of a value's axes at the widths of the cut; None where they follow the batch."""
        full = self._architecture.sizes
        return [a.size(self._widths, full) if a is not None else None for a in self._axes(name)]

    def is_shorter(self, name: str, axis: int) -> bool:
        """Whether an axis is shorter than it was."""
        return self.full_sizes(name)[axis] != self.cut_sizes(name)[axis]

    def kept_indices(self, name: str, axis: int) -> npt.NDArray[np.int64]:
        """The indices of an axis that are left where the first channels of every group are kept.

        A selection may keep other channels, in another order, but always this many, at these positions of the axis.
        """
        value_axis = self._axes(name)[axis]
        if value_axis is None:
            raise ModelError(f"axis {axis} of {name} follows the batch")
        return self._selection.indices(value_axis)

    @cached_property
    def _selection(self) -> Selection:
        return Selection.of(self._architecture, self._widths)

    def _axes(self, name: str) -> tuple[Axis | None, ...]:
        axes = self._values.get(name)
        if axes is None:
            raise ModelError(f"value {name} was not analysed", hint="Import the model again.")
        return axes


Rewrite = Callable[[Graph, Node, Sizes], None]


REWRITES: dict[str, Rewrite] = {}  # rewrites by operator

rewrite = registrar(REWRITES, "rewrite")  # register a rewrite for operators
