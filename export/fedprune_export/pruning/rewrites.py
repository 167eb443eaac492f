"""Attributes and constants that depend on a number of channels, rewritten by operator in a cut.

Entries that depend on the batch are never written as numbers: they would freeze the batch of the analysis. To support
an operator that says a number of channels, add a function here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ModelError
from fedprune.model.architecture import Axis
from fedprune.model.selection import Selection
from fedprune_export.channels.rule import TARGETS
from fedprune_export.channels.shapes import sliced
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.pruning.model import Model


class Sizes:
    """Axes of values before and after a cut."""

    def __init__(self, model: Model, widths: Sequence[int]) -> None:
        self._values = model.values
        self._architecture = model.architecture
        self._widths = widths

    def before(self, name: str) -> list[int | None]:
        """Sizes of a value's axes at full width; None where they follow the batch."""
        return [a.length if a is not None else None for a in self._axes(name)]

    def after(self, name: str) -> list[int | None]:
        """The same at these widths."""
        full = self._architecture.sizes
        return [a.size(self._widths, full) if a is not None else None for a in self._axes(name)]

    def changed(self, name: str, axis: int) -> bool:
        """Whether an axis is shorter than it was."""
        return self.before(name)[axis] != self.after(name)[axis]

    def kept(self, name: str, axis: int) -> npt.NDArray[np.int64]:
        """Which indices of an axis are left where the first channels of every group are kept.

        Other channels may be kept, in another order; but always this many, and at these places of the axis.
        """
        found = self._axes(name)[axis]
        if found is None:
            raise ModelError(f"axis {axis} of {name} follows the batch")
        return self._selection.indices(found)

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


def rewrite(*operators: str) -> Callable[[Rewrite], Rewrite]:
    """Register a rewrite for these operators."""

    def register(function: Rewrite) -> Rewrite:
        for name in operators:
            REWRITES[name] = function
        return function

    return register


@rewrite("Conv")
def _convolution(graph: Graph, node: Node, sizes: Sizes) -> None:
    """As many groups as the channels that are read fill."""
    if int(node.attrs.get("group", 1)) > 1:
        node.attrs["group"] = (sizes.after(node.inputs[0])[1] or 0) // (sizes.after(node.inputs[1])[1] or 1)


@rewrite("ConvTranspose")
def _transposed_convolution(graph: Graph, node: Node, sizes: Sizes) -> None:
    """As many groups as make the channels that come out."""
    if int(node.attrs.get("group", 1)) > 1:
        node.attrs["group"] = (sizes.after(node.outputs[0])[1] or 0) // (sizes.after(node.inputs[1])[1] or 1)


@rewrite("BatchNormalization", "InstanceNormalization", "LayerNormalization", "RMSNormalization")
def _norm(graph: Graph, node: Node, sizes: Sizes) -> None:
    """A constant that scales or shifts all channels alike is as long as there are channels left."""
    over_last = node.op in ("LayerNormalization", "RMSNormalization")
    for i in (1, 2):
        constant = graph.initializers.get(node.inputs[i]) if len(node.inputs) > i else None
        if constant is None:
            continue
        first = len(sizes.before(node.inputs[0])) - constant.ndim if over_last else 1
        shape = [
            after if n == before and after is not None else n
            for n, before, after in zip(
                constant.shape, sizes.before(node.inputs[0])[first:], sizes.after(node.inputs[0])[first:], strict=False
            )
        ]
        if shape != list(constant.shape):
            node.inputs[i] = graph.constant(np.full(shape, constant.reshape(-1)[0]), constant.dtype)


@rewrite("GroupNormalization")
def _group_norm(graph: Graph, node: Node, sizes: Sizes) -> None:
    """As many norm groups as something is left of; what is left of each is equally much."""
    _norm(graph, node, sizes)
    if sizes.changed(node.inputs[0], 1):
        channels = sizes.before(node.inputs[0])[1] or 0
        kept = sizes.kept(node.inputs[0], 1) * int(node.attrs["num_groups"]) // channels
        found, counts = np.unique(kept, return_counts=True)
        if np.any(counts != counts[0]):
            raise ModelError(f"{node.op} {node.name}: norm groups of unequal size are left", got=counts.tolist())
        node.attrs["num_groups"] = int(found.size)


@rewrite(*TARGETS)
def _target(graph: Graph, node: Node, sizes: Sizes) -> None:
    """A target shape: known sizes as numbers, one batch-dependent entry as -1, several as computed before."""
    place = TARGETS[node.op]
    if len(node.inputs) <= place or not node.inputs[place]:
        return
    before, after = sizes.before(node.outputs[0]), sizes.after(node.outputs[0])
    if before == after:
        return
    free = [i for i, n in enumerate(after) if n is None]
    if len(free) <= 1 and node.op == "Reshape":
        node.inputs[place] = graph.ints(*(-1 if n is None else n for n in after))
        return
    old = node.inputs[place]
    # An expansion's target may be shorter than its output: it is aligned at the end.
    known = graph.initializers.get(old)
    lead = len(after) - (known.size if known is not None else sizes.before(old)[0] or 0)
    if not free:
        node.inputs[place] = graph.ints(*(n or 0 for n in after[lead:]))
        return
    parts = [
        graph.ints(n) if n is not None else graph.emit("Gather", old, graph.ints(i), attrs={"axis": 0})
        for i, n in enumerate(after[lead:])
    ]
    node.inputs[place] = graph.emit("Concat", *parts, attrs={"axis": 0})


@rewrite("Split")
def _split(graph: Graph, node: Node, sizes: Sizes) -> None:
    """The parts are as long as what is left of each."""
    axis = int(node.attrs.get("axis", 0))
    if sizes.changed(node.inputs[0], axis):
        parts = [sizes.after(name)[axis] if name else None for name in node.outputs]
        if None in parts:
            raise ModelError(f"Split {node.name} has a part without a name")
        node.inputs[1:] = [graph.ints(*(n or 0 for n in parts))]
        node.attrs.pop("num_outputs", None)


def _moved(sizes: Sizes, node: Node, taken: npt.NDArray[np.int64], axis: int, out_axis: int) -> npt.NDArray[np.int64]:
    """Indices of an axis after the cut for what is left of those taken before it."""
    kept = sizes.kept(node.inputs[0], axis)
    place = np.full(int(max(kept.max(), taken.max())) + 1, -1, np.int64)
    place[kept] = np.arange(kept.size)
    moved = place[taken[sizes.kept(node.outputs[0], out_axis)]]
    if np.any(moved < 0):
        raise ModelError(f"{node.op} {node.name} takes channels that are cut")
    return moved


@rewrite("Slice")
def _slice(graph: Graph, node: Node, sizes: Sizes) -> None:
    """Along an axis that is cut, what is left of the indices: as a slice where they follow each other."""
    rank = len(sizes.before(node.inputs[0]))
    taken = sliced(graph, node, rank) or {}
    cut = [axis for axis in taken if sizes.changed(node.inputs[0], axis)]
    if not cut:
        return
    parts = dict(taken)
    for axis in cut:
        full = np.arange(sizes.before(node.inputs[0])[axis] or 0)
        moved = _moved(sizes, node, full[taken[axis]], axis, axis)
        if np.all(np.diff(moved) == 1):
            parts[axis] = slice(int(moved[0]), int(moved[-1]) + 1, 1)
        else:
            node.inputs[0] = graph.emit("Gather", node.inputs[0], graph.ints(*moved.tolist()), attrs={"axis": axis})
            del parts[axis]
    if not parts:
        node.op, node.inputs = "Identity", node.inputs[:1]
        return
    starts = [p.start for p in parts.values()]
    stops = [-(2**62) if p.stop is None else p.stop for p in parts.values()]
    steps = [p.step for p in parts.values()]
    node.inputs[1:] = [graph.ints(*starts), graph.ints(*stops), graph.ints(*parts), graph.ints(*steps)]


@rewrite("Gather")
def _gather(graph: Graph, node: Node, sizes: Sizes) -> None:
    """Along an axis that is cut, the places that are left of those taken."""
    axis = int(node.attrs.get("axis", 0)) % len(sizes.before(node.inputs[0]))
    constant = graph.initializers.get(node.inputs[1])
    if constant is None or not sizes.changed(node.inputs[0], axis):
        return
    taken = constant % (sizes.before(node.inputs[0])[axis] or 1)
    if constant.ndim == 1:
        node.inputs[1] = graph.ints(*_moved(sizes, node, taken, axis, axis).tolist())
    else:
        (place,) = np.flatnonzero(sizes.kept(node.inputs[0], axis) == taken)
        node.inputs[1] = graph.constant(int(place), np.int64)


@rewrite("LSTM", "GRU", "RNN")
def _recurrent(graph: Graph, node: Node, sizes: Sizes) -> None:
    """As many hidden units as the recurrence has columns."""
    node.attrs["hidden_size"] = sizes.after(node.inputs[2])[2]
