"""Writes a graph that takes batches of one size node by node for batches of any size, and follows the batch in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from fedprune.core.errors import ModelError, value_text
from fedprune_export.importing.batches.layout import end_with, move_outputs_first
from fedprune_export.ir.graph import Array, Graph, Node, Port, node_label
from fedprune_export.ir.operators import SIZE_OPERATORS
from fedprune_export.ir.shape_inference import InferredShapes, ShapeError, infer_node, set_value
from fedprune_export.ir.trace import run_values, shapes_at_batch

FREE_BATCH_HINT = (
    "Export the model with a dynamic batch (torch: dynamic_shapes, or dynamic_axes of older exporters), and let it "
    "take the batch's size from its input, as x.flatten(1) and x.reshape(len(x), -1) do."
)


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

    def with_batch(self, shape: Sequence[int], batch: int) -> tuple[int, ...]:
        """The shape of a value with a batch of this size, from the shape in the file; -1 leaves the axis open."""
        size = batch if batch < 0 else self.outer * batch * self.inner
        return (size, *shape) if self.added else (*shape[: self.axis], size, *shape[self.axis + 1 :])


ADDED = Place(0, added=True)


class FreeingError(ModelError):
    """A node for which the batch can't be made free."""


class Propagation:
    """A graph whose inputs begin with a batch of one size, while it is written for batches of any size.

    Attributes:
        source: The graph of one batch size, and `graph`, the one that is written.
        batch: The file's batch size, and `trial`, the one at which shapes are inferred.
        before: Shapes of the source by name; `shapes` are those of the written graph at the trial size.
        places: The batch's place in each value that has it.
        narrowings: Tensors that forms have narrowed to one row, by name as they were, in order.
        may_drop: Whether what the file does along an axis of its batch may be left out, as it does nothing.
    """

    def __init__(self, source: Graph, batch: int, *, may_drop: bool) -> None:
        self.source, self.batch, self.may_drop = source, batch, may_drop or batch > 1
        inferred = shapes_at_batch(source, batch)
        self.before, self._numbers = inferred.shapes, inferred.numbers
        # No other size of the graph, so that nothing broadcasts by chance.
        sizes = {batch, *(size for shape in self.before.values() for size in shape)}
        self.trial = next(size for size in count(3, 2) if size not in sizes)
        self.graph = source.copy_without_nodes()
        self.graph.inputs = [Port(p.name, p.dtype, ("N", *p.shape[1:])) for p in source.inputs]
        self.places = {port.name: Place(0) for port in source.inputs}
        self.narrowings: list[tuple[str, Array]] = []
        self.shapes = InferredShapes(
            {port.name: (self.trial, *self.before[port.name][1:]) for port in source.inputs},
            {port.name: port.dtype for port in source.inputs},
        )

    def constant_value(self, name: str) -> Array | None:
        """A value of the file that doesn't depend on data; None if it may, or there is none."""
        if name in self.places or not name:
            return None
        if name not in self._numbers:
            self._numbers |= run_values(self.source, [name], self.batch)
        return self._numbers[name]

    def accept(self, forms: Iterator[Place | None], node: Node) -> Iterator[bool]:
        """Stop at each form of a node in which the batch has a place in all outputs, in place of the form before.

        Raises `FreeingError` if there is no such form, with the first one's reason.
        """
        start, reason, is_accepted = len(self.graph.nodes), None, False
        narrowing_count = len(self.narrowings)
        for place in forms:
            try:
                for written in self.graph.nodes[start:]:
                    self._infer(written)
                self._locate(node, place)
                self.graph.nodes[-1].name = node.name
            except ShapeError:
                reason = reason or self.error(node, "its sizes fit no other batch")
            except FreeingError as error:
                reason = reason or error
            else:
                is_accepted = True
                yield True
            for output in [o for written in self.graph.nodes[start:] for o in written.outputs]:
                for known in (self.shapes.shapes, self.shapes.dtypes, self.shapes.numbers, self.places):
                    known.pop(output, None)
            del self.graph.nodes[start:]
            while len(self.narrowings) > narrowing_count:
                name, value = self.narrowings.pop()
                self.graph.initializers[name] = value
                set_value(self.shapes, name, value)
        if not is_accepted:
            raise reason or self.error(node, "it has no form for other batches")

    def _infer(self, node: Node) -> None:
        for name in self.graph.initializers.keys() & set(node.inputs) - self.shapes.shapes.keys():
            set_value(self.shapes, name, self.graph.initializers[name])
        outputs = [o for o in node.outputs if o]
        infer_node(self.graph, self.shapes, node, outputs)
        if self.shapes.missing:
            self.shapes.missing.clear()
            for name, value in run_values(self.graph, outputs, self.trial).items():
                set_value(self.shapes, name, value)

    def _locate(self, node: Node, place: Place | None) -> None:
        """Find the batch in a node's outputs by their shapes. Raises `FreeingError` if samples are combined."""
        data = node.inputs[: 1 if node.op == "CastLike" else 0 if node.op in SIZE_OPERATORS else None]
        is_batched = not self.places.keys().isdisjoint(data)
        parts = {(1, 1), *((p.outer, p.inner) for p in map(self.places.get, node.inputs) if p)}
        for name in filter(None, node.outputs):
            before, after = self.before[name], self.shapes.shapes[name]
            if before == after and place is None:
                if is_batched:
                    raise self.error(node, "it combines the samples of a batch")
                continue
            places = [ADDED] if self.batch == 1 else []
            places += [
                Place(a, *p) for p in sorted(parts) for a, d in enumerate(before) if d == p[0] * p[1] * self.batch
            ]
            found = [p for p in (places if place is None else [place]) if p.with_batch(before, self.trial) == after]
            if not found:
                raise self.error(node, f"its output {list(before)} has no axis for the batch")
            self.places[name] = found[0]

    def finish(self) -> tuple[Graph, dict[str, int | None]]:
        """The written graph with the batch first in its outputs, and the outputs' axes of it in the file.

        Raises `FreeingError` if an output has no axis for the batch.
        """
        freed = self.graph.copy()
        axes: dict[str, int | None] = {}
        for port in freed.outputs:
            place = self.places.get(port.name)
            if place is None or not place.is_exact:
                raise self.error(self.source.producers()[port.name], f"output {value_text(port.name)} has no such axis")
            axes[port.name] = None if place.added else place.axis
            port.shape = (None,) * len(self.shapes.shapes[port.name])
            # An output [1, classes] of one sample: the 1 stands for the batch, wherever it comes from.
            if place.added and len(port.shape) > 2 and self.before[port.name][0] == 1:
                end_with(freed, port, "Squeeze", freed.ints(1))
                axes[port.name], port.shape = 0, port.shape[1:]
        move_outputs_first(freed, axes)
        return freed, axes

    def error(self, node: Node, reason: str) -> FreeingError:
        """What to raise for a node."""
        return FreeingError(
            f"the file is made for batches of {self.batch}, and {node_label(node)} can't take others: {reason}",
            hint=FREE_BATCH_HINT,
        )
