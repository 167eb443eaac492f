"""Writes a graph that takes batches of one size node by node for batches of any size, and follows the batch in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from typing import NamedTuple

from fedprune.core.errors import ModelError, value_text
from fedprune_export.importing.batches.layout import move_outputs_first
from fedprune_export.ir.graph import Array, Graph, Node, Port, node_label
from fedprune_export.ir.operators import SIZE_OPERATORS
from fedprune_export.ir.shape_inference import InferredShapes, ShapeError, infer_node, set_value
from fedprune_export.ir.trace import run_values, shapes_at_batch

FREE_BATCH_HINT = (
    "Export the model with a dynamic batch (torch: dynamic_shapes, or dynamic_axes of older exporters), and let it "
    "take the batch's size from its input, as x.flatten(1) and x.reshape(len(x), -1) do."
)


class Place(NamedTuple):
    """The axis of a value that holds the batch: its size is `outer` · batch · `inner`."""

    axis: int
    outer: int = 1
    inner: int = 1

    @property
    def is_exact(self) -> bool:
        """Whether the axis holds nothing but the batch."""
        return self.outer == self.inner == 1


class Propagation:
    """A graph whose inputs begin with a batch of one size, while it is written for batches of any size.

    Attributes:
        source: The graph of one batch size, and `graph`, the one that is written.
        batch: The file's batch size, and `trial`, the one at which shapes are inferred.
        before: Shapes of the source by name; `shapes` are those of the written graph at the trial size.
        places: The batch's place in each value that has it.
    """

    def __init__(self, source: Graph, batch: int) -> None:
        self.batch = batch
        self._read(source)
        self._file_shapes = self.before
        # No other size of the graph, so that nothing broadcasts by chance.
        sizes = {batch, *(size for shape in self.before.values() for size in shape)}
        self.trial = next(size for size in count(3, 2) if size not in sizes)
        self.graph = source.copy_without_nodes()
        self.graph.inputs = [Port(p.name, p.dtype, ("N", *p.shape[1:])) for p in source.inputs]
        self.places = {port.name: Place(0) for port in source.inputs}
        self.shapes = InferredShapes(
            {port.name: (self.trial, *self.before[port.name][1:]) for port in source.inputs},
            {port.name: port.dtype for port in source.inputs},
        )

    def _read(self, source: Graph) -> None:
        self.source, inferred = source, shapes_at_batch(source, self.batch)
        self.before, self._numbers = inferred.shapes, inferred.numbers

    def constant_value(self, name: str) -> Array | None:
        """A value of the file that doesn't depend on data; None if it may, or there is none."""
        if name in self.places or not name:
            return None
        if name not in self._numbers:
            with suppress(ModelError):
                self._numbers |= run_values(self.source, [name], self.batch)
        return self._numbers.get(name)

    def accept(self, forms: Iterator[Place | None], node: Node) -> Iterator[bool]:
        """Stop at each form of a node in which the batch has a place in all outputs, in place of the form before.

        Raises `ModelError` if there is no such form, with the first one's reason.
        """
        start, reason, is_accepted = len(self.graph.nodes), None, False
        source = self.source
        for place in forms:
            try:
                for written in self.graph.nodes[start:]:
                    self._infer(written)
                self._locate(node, place)
                self.graph.nodes[-1].name = node.name
            except ShapeError:
                reason = reason or self.error(node, "its sizes fit no other batch")
            except ModelError as error:
                reason = reason or error
            else:
                is_accepted = True
                yield True
            for output in [o for written in self.graph.nodes[start:] for o in written.outputs]:
                for values in (self.shapes.shapes, self.shapes.dtypes, self.shapes.numbers, self.places):
                    values.pop(output, None)
            del self.graph.nodes[start:]
            if self.source is not source:
                self._read(source)
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
        """Find the batch in a node's outputs by their shapes. Raises `ModelError` if samples are combined."""
        data = node.inputs[: 1 if node.op == "CastLike" else 0 if node.op in SIZE_OPERATORS else None]
        is_batched = not self.places.keys().isdisjoint(data)
        factors = {(1, 1), *(self.places[i][1:] for i in node.inputs if i in self.places)}
        for name in filter(None, node.outputs):
            if len(self.before[name]) < len(self.shapes.shapes[name]):
                self._keep_axis(self.graph.nodes[-1])
            before, after = self.before[name], self.shapes.shapes[name]
            if before == after and place is None:
                if is_batched:
                    raise self.error(node, "it combines the samples of a batch")
                continue
            places = [Place(axis, *f) for f in sorted(factors) for axis in range(len(before))]
            fitting = [p for p in ([place] if place else places) if self._has_batch_at(p, before, after)]
            if not fitting:
                raise self.error(node, f"its output {list(before)} has no axis for the batch")
            self.places[name] = fitting[0]

    def _keep_axis(self, written: Node) -> None:
        """Let the source, too, keep an axis that it removes, in the form that is written."""
        source = self.source.copy()
        source.nodes = [written.copy() if n.outputs == written.outputs else n for n in source.nodes]
        source.initializers |= {i: v for i, v in self.graph.initializers.items() if i in written.inputs}
        self._read(source)

    def _has_batch_at(self, place: Place, before: tuple[int, ...], after: tuple[int, ...]) -> bool:
        """Whether a value's shapes, in the file and at the trial size, differ by the batch at this place."""
        axis, factor = place.axis, place.outer * place.inner
        trial_shape = (*before[:axis], factor * self.trial, *before[axis + 1 :])
        return before[axis] == factor * self.batch and after == trial_shape

    def finish(self) -> tuple[Graph, dict[str, int | None]]:
        """The written graph with the batch first in its outputs, and the outputs' axes of it in the file, or None.

        Raises `ModelError` if an output has no axis for the batch.
        """
        freed = self.graph.copy()
        axes: dict[str, int] = {}
        for port in freed.outputs:
            place = self.places.get(port.name)
            if place is None or not place.is_exact:
                raise self.error(self.source.producers()[port.name], f"output {value_text(port.name)} has no such axis")
            axes[port.name] = place.axis
            port.shape = (None,) * len(self.shapes.shapes[port.name])
        move_outputs_first(freed, axes)
        return freed, {n: a if len(self._file_shapes[n]) == len(self.before[n]) else None for n, a in axes.items()}

    def error(self, node: Node, reason: str) -> ModelError:
        """What to raise for a node."""
        return ModelError(
            f"the file is made for batches of {self.batch}, and {node_label(node)} can't take others: {reason}",
            hint=FREE_BATCH_HINT,
        )
