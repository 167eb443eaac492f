"""Follows the batch through a graph that takes batches of one size, and writes the graph for batches of any size.

Each node is written in turn, and its shapes are inferred at another batch size. Where they aren't those of the file
with another batch, a rule (`rules`) writes the node in another way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from fedprune.core.errors import ModelError
from fedprune_export.ir.graph import Array, Graph, Node, Port, node_label
from fedprune_export.ir.shape_inference import InferredShapes, ShapeError, infer_node, set_value
from fedprune_export.ir.trace import run_values, shapes_at_batch

FREE_BATCH_HINT = (
    "Export the model with a dynamic batch (torch: dynamic_shapes, or dynamic_axes of older exporters), and let it "
    "take the batch's size from its input, as x.flatten(1) and x.reshape(len(x), -1) do."
)

# Operators whose output consists of numbers of the first input, or of all.
_MOVING = frozenset({"Cast", "Concat", "Expand", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze"}) | {
    *("Transpose", "Unsqueeze", "Tile")
}

# Batch sizes for shapes. The first that is no other size of the graph is taken, so that nothing broadcasts by chance.
_TRIAL_SIZES = (3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47)


@dataclass(frozen=True)
class Place:
    """The axis of a value that holds the batch.

    Attributes:
        axis: The axis, of size `outer` · batch · `inner`.
        added: Whether the file's own value lacks this axis, which is the first: the file has removed its batch of 1.
    """

    axis: int
    outer: int = 1
    inner: int = 1
    added: bool = False

    @property
    def is_exact(self) -> bool:
        """Whether the axis holds nothing but the batch."""
        return self.outer == self.inner == 1

    def freed(self, shape: Sequence[int], batch: int) -> tuple[int, ...]:
        """The shape of a value with a batch of this size, from the shape in the file."""
        if self.added:
            return (batch, *shape)
        return (*shape[: self.axis], self.outer * batch * self.inner, *shape[self.axis + 1 :])


ADDED = Place(0, added=True)


def places_after_reshape(place: Place, before: Sequence[int], after: Sequence[int], batch: int) -> list[Place]:
    """All places that the batch can have after a reshape of a file's value; several if `batch` is 1."""
    # A reshape keeps the order of numbers, so samples lie as far apart after it as before.
    stride = math.prod(before) if place.added else place.inner * math.prod(before[place.axis + 1 :])
    places = []
    for axis, size in enumerate(after):
        right = math.prod(after[axis + 1 :])
        if not size or not right or stride % right:
            continue
        inner = stride // right
        if inner and size % (inner * batch) == 0:
            places.append(Place(axis, size // (inner * batch), inner))
    return places


class FreeingError(ModelError):
    """A node for which the batch can't be made free."""


class Propagation:
    """Writes a graph, whose inputs begin with a batch of one size, for batches of any size.

    Attributes:
        graph: The graph that is written.
        batch: The file's batch size, and `trial`, the one at which shapes are inferred.
        fixed: Shapes of the file; `shapes` are those of the written graph at the trial size.
        places: The batch's place in each value that has it.
        option: Which of the places to take that the next node leaves to its output, and `option_count`, how many.
        may_drop: Whether the file itself takes one sample only, so that what it does along a batch of 1 does nothing.
    """

    def __init__(self, source: Graph, batch: int, *, may_drop: bool) -> None:
        self.batch, self.may_drop = batch, may_drop and batch == 1
        self._source = source
        self.fixed: InferredShapes = shapes_at_batch(source, batch)
        sizes = {d for shape in self.fixed.shapes.values() for d in shape} | {batch}
        self.trial = next((t for t in _TRIAL_SIZES if t not in sizes), _TRIAL_SIZES[-1])
        self.graph = source.copy_without_nodes()
        self.graph.inputs = [Port(p.name, p.dtype, ("N", *p.shape[1:])) for p in source.inputs]
        self.shapes = InferredShapes()
        self.places: dict[str, Place] = {}
        self.option, self.option_count = 0, 1
        for port in self.graph.inputs:
            shape = self.fixed.shapes[port.name]
            self.shapes.shapes[port.name], self.shapes.dtypes[port.name] = (self.trial, *shape[1:]), port.dtype
            self.places[port.name] = Place(0)
        for name, value in source.initializers.items():
            set_value(self.shapes, name, value)

    # -- what rules read ---------------------------------------------------------------------------------------------

    def rank(self, name: str) -> int:
        """The number of axes of a value in the file."""
        return len(self.fixed.shapes[name])

    def numbers(self, name: str) -> list[int] | None:
        """The integers of a value in the file; None if they depend on data."""
        value = self.fixed.numbers.get(name) if name else None
        return None if value is None else [int(v) for v in value.reshape(-1)]

    def constant_value(self, name: str) -> Array | None:
        """A value of the file that doesn't depend on the batch; None if it does."""
        if name in self.places:
            return None
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        if name not in self.fixed.numbers:
            self.fixed.numbers |= run_values(self._source, [name], self.batch)
        return self.fixed.numbers[name]

    def axes(self, node: Node, position: int, default: Sequence[int] | None = None) -> list[int] | None:
        """The axes in a node's attribute or input, counted from 0; None if they depend on data."""
        rank = self.rank(node.inputs[0])
        if "axes" in node.attrs:
            listed: Sequence[int] | None = node.attrs["axes"]
        elif len(node.inputs) > position and node.inputs[position]:
            listed = self.numbers(node.inputs[position])
        else:
            listed = default
        return None if listed is None else [int(a) % max(rank, 1) for a in listed]

    # -- what rules write --------------------------------------------------------------------------------------------

    def constant(self, value: Array) -> str:
        name = self.graph.constant(value, value.dtype)
        set_value(self.shapes, name, self.graph.initializers[name])
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def emit(self, op: str, *inputs: str, out: str | None = None, **attrs: object) -> str:
        """Append a node that the file lacks, and infer its shape."""
        name = out or self.graph.fresh(op)
        self.append(Node(op, list(inputs), [name], dict(attrs), self.graph.fresh(op) if out else name))
        return name

    def append(self, node: Node) -> None:
        """Append a node and infer its shapes. Raises `ShapeError` if they don't fit."""
        outputs = [o for o in node.outputs if o]
        infer_node(self.graph, self.shapes, node, outputs)
        self.graph.nodes.append(node)
        missing = [o for o in outputs if o not in self.shapes.shapes]
        if missing:
            for name, value in run_values(self.graph, missing, self.trial).items():
                set_value(self.shapes, name, value)
            self.shapes.missing.clear()

    def attempt(self, node: Node, shape: Sequence[int]) -> bool:
        """Append a node with one output if it then has this shape."""
        output = node.outputs[0]
        try:
            self.append(node)
        except ShapeError:
            return False
        if self.shapes.shapes[output] == tuple(shape):
            return True
        place = self.places.get(output)
        self.roll_back(len(self.graph.nodes) - 1)
        if place is not None:
            self.places[output] = place
        return False

    def roll_back(self, count: int) -> None:
        """Remove all nodes but the first `count`, and what is known of their outputs."""
        for node in self.graph.nodes[count:]:
            for output in node.outputs:
                for known in (self.shapes.shapes, self.shapes.dtypes, self.shapes.numbers, self.places):
                    known.pop(output, None)
        del self.graph.nodes[count:]

    def choose(self, places: Sequence[Place]) -> Place:
        """One of the places that a node leaves to its output, the most likely first."""
        self.option_count = len(places)
        return places[min(self.option, len(places) - 1)]

    def to_front(self, name: str) -> str:
        """A value with its exact batch as the first axis."""
        axis, rank = self.places[name].axis, len(self.shapes.shapes[name])
        if not axis:
            return name
        return self.emit("Transpose", name, perm=[axis, *(a for a in range(rank) if a != axis)])

    def batch_like(self, name: str) -> str:
        """The batch's size as a vector of one number, from a value that has it."""
        axis = self.places[name].axis
        return self.emit("Slice", self.emit("Shape", name), self.ints(axis), self.ints(axis + 1), self.ints(0))

    def one_row(self, name: str, axis: int) -> str:
        """A value without the batch, whose axis has the file's batch size or 1, with size 1 there."""
        if self.shapes.shapes[name][axis] == 1:
            return name
        makers = self.graph.producers()
        maker = makers.get(name)
        # The file has repeated it for its batch; then what is repeated is what counts.
        if maker is not None and maker.op == "Expand" and not maker.domain:
            shape, before = self.shapes.shapes[name], self.shapes.shapes[maker.inputs[0]]
            if before == (*shape[:axis], 1, *shape[axis + 1 :]):
                return maker.inputs[0]
        tensor, is_read = self.graph.initializers.get(name), any(name in node.inputs for node in self.graph.nodes)
        if tensor is not None and not is_read and np.array_equal(tensor, np.roll(tensor, 1, axis)):
            # It keeps its name, by which it may be listed as a parameter.
            self.graph.initializers[name] = np.take(tensor, [0], axis)
            set_value(self.shapes, name, self.graph.initializers[name])
            return name
        return self.emit("Slice", name, self.ints(0), self.ints(1), self.ints(axis))

    def is_zero(self, name: str) -> bool:
        """Whether a value consists of zeros, also if the file computes them."""
        maker = self.graph.producers().get(name)
        if name in self.graph.initializers or name in self.shapes.numbers:
            return not np.any(self.graph.initializers.get(name, self.shapes.numbers.get(name)))
        if maker is None or maker.domain:
            return False
        if maker.op == "ConstantOfShape":
            return not np.any(maker.attrs.get("value", 0))
        return maker.op in _MOVING and all(self.is_zero(i) for i in maker.inputs[: None if maker.op == "Concat" else 1])

    def spread(self, name: str, axis: int, like: str) -> str:
        """A value without the batch, repeated for each sample along an axis of the file's batch size."""
        row = self.one_row(name, axis)
        shape = self.shapes.shapes[row]
        sizes = [self.ints(*part) for part in (shape[:axis], shape[axis + 1 :])]
        parts = [*sizes[: int(axis > 0)], self.batch_like(like), *(sizes[1:] if axis + 1 < len(shape) else [])]
        target = self.emit("Concat", *parts, axis=0) if len(parts) > 1 else parts[0]
        return self.emit("Expand", row, target)

    # -- the walk ----------------------------------------------------------------------------------------------------

    def write(self, node: Node) -> None:
        """Append a node, and find the batch in its outputs."""
        self.append(node)
        self.locate(node)

    def locate(self, node: Node) -> None:
        """Find the batch in a node's outputs by their shapes. Raises `FreeingError` if samples are combined."""
        for name in filter(None, node.outputs):
            before, after = self.fixed.shapes[name], self.shapes.shapes[name]
            axes = [a for a, (b, n) in enumerate(zip(before, after, strict=False)) if b != n]
            if self.batch == 1 and after == ADDED.freed(before, self.trial):
                self.places[name] = ADDED
            elif len(before) != len(after) or len(axes) > 1:
                self.refuse(node, f"its output {list(before)} has no axis for the batch")
            elif axes:
                self.places[name] = self._merged_place(node, axes[0], before[axes[0]], after[axes[0]])
            elif any(i in self.places for i in _data_inputs(node)):
                self.refuse(node, "it combines the samples of a batch")

    def _merged_place(self, node: Node, axis: int, before: int, after: int) -> Place:
        times, rest = divmod(after, self.trial)
        if rest or before != times * self.batch:
            self.refuse(node, f"its output has {before} on axis {axis} for {self.batch} samples")
        if times == 1:
            return Place(axis)
        for name in node.inputs:
            place = self.places.get(name)
            if place is not None and place.outer * place.inner == times:
                return Place(axis, place.outer, place.inner)
        return self.refuse(node, f"its output mixes the batch with another axis ({before})")

    def refuse(self, node: Node, reason: str) -> NoReturn:
        """Raise `FreeingError` for a node."""
        raise FreeingError(
            f"the file is made for batches of {self.batch}, and {node_label(node)} can't take others: {reason}",
            hint=FREE_BATCH_HINT,
        )


def _data_inputs(node: Node) -> list[str]:
    """The inputs whose numbers a node reads: not those of which it reads the size or type alone."""
    if node.op in ("Shape", "Size") and not node.domain:
        return []
    return node.inputs[:1] if node.op == "CastLike" and not node.domain else node.inputs
