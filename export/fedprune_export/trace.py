"""What a graph's values look like: shapes, types and small integers, seen by running it at several batch sizes.

Running beats inferring: shape arithmetic, exotic operators and exporter artefacts all come out right. Axes whose size
differs between runs depend on the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.errors import ModelError
from fedprune.session import Session
from fedprune_export.graph import Graph, Port

Array = npt.NDArray[Any]

BATCHES = (3, 5)
"""Batch sizes of the first two runs; tests use others, so that nothing frozen at one of these goes unnoticed."""

_FURTHER = (1, 8)
"""More runs, for the sake of shapes alone: some sizes follow the batch only where it is small or even."""

_MAX_NUMBERS = 2**24
"""Numbers of one sample, of which several batches are made: four times what a camera's picture has."""

_SMALL = 64


@dataclass(frozen=True)
class Trace:
    """Shapes of every value.

    Attributes:
        shapes: Shape at the first batch size.
        shapes_second: Shape at the second batch size.
        shapes_further: Shapes at further batch sizes.
        dtypes: Type of every value.
        integers: Values of small integer tensors at the first batch size (shape arithmetic).
        integers_second: The same at the second batch size.
    """

    shapes: Mapping[str, tuple[int, ...]]
    shapes_second: Mapping[str, tuple[int, ...]]
    shapes_further: tuple[Mapping[str, tuple[int, ...]], ...]
    dtypes: Mapping[str, np.dtype[Any]]
    integers: Mapping[str, Array]
    integers_second: Mapping[str, Array]

    def batched(self, name: str) -> tuple[bool, ...]:
        """Per axis, whether its size depends on the batch."""
        columns = zip(*(shapes[name] for shapes in self._all), strict=True)
        return tuple(len(set(column)) > 1 for column in columns)

    def dims(self, name: str) -> tuple[int | None, ...]:
        """Sizes, None where they depend on the batch."""
        return tuple(None if b else a for a, b in zip(self.shapes[name], self.batched(name), strict=True))

    @property
    def _all(self) -> tuple[Mapping[str, tuple[int, ...]], ...]:
        return (self.shapes, self.shapes_second, *self.shapes_further)


def sample_input(port: Port, batch: int, seed: int = 0) -> Array:
    """An array of random normal numbers for a graph input.

    Raises:
        ModelError: A dimension other than the first is free or no size, or the array would be huge.
    """
    sizes = [d for d in port.shape[1:] if isinstance(d, int)]
    if len(sizes) + 1 != len(port.shape):
        raise ModelError(
            f"input {port.name} has free dimensions besides the batch",
            expected="fixed sizes from the second dimension on",
            got=list(port.shape),
            hint="Export the model with a fixed input size.",
        )
    if any(d < 1 for d in sizes) or math.prod(sizes) > _MAX_NUMBERS:
        raise ModelError(f"size of input {port.name}", expected=f"1 to {_MAX_NUMBERS} numbers per sample", got=sizes)
    return np.random.default_rng(seed).standard_normal((batch, *sizes), np.float32)


def trace(graph: Graph) -> Trace:
    """Run `graph` at all batch sizes and look at every value.

    Raises:
        ModelError: onnxruntime can't run it, or the batch can't vary.
    """
    for port in graph.inputs:
        if not port.shape or isinstance(port.shape[0], int):
            raise ModelError(
                f"input {port.name} has a fixed batch",
                expected="a free first dimension",
                got=list(port.shape),
                hint="Export the model with a dynamic batch.",
            )
    probe = graph.copy()
    known = {p.name for p in probe.outputs}
    probe.outputs += [Port(o, np.dtype(np.float32), ()) for n in probe.nodes for o in n.outputs if o and o not in known]
    proto = probe.to_proto()
    for value in proto.graph.output:
        value.ClearField("type")
    session = Session(proto.SerializeToString())
    runs = [_run(session, probe, b) for b in BATCHES]
    further = [{k: v.shape for k, v in _run(session, probe, b).items()} for b in _FURTHER]
    for name, value in runs[0].items():
        if any(len(shapes[name]) != value.ndim for shapes in further):
            raise ModelError(
                f"value {name} has another number of axes for one sample than for several",
                hint="Squeeze axes by number, so that an axis of one sample stays.",
            )
    first, second = runs
    return Trace(
        {k: v.shape for k, v in first.items()},
        {k: v.shape for k, v in second.items()},
        tuple(further),
        {k: v.dtype for k, v in first.items()},
        {k: v for k, v in first.items() if v.dtype.kind in "iu" and v.size <= _SMALL},
        {k: v for k, v in second.items() if v.dtype.kind in "iu" and v.size <= _SMALL},
    )


def _run(session: Session, graph: Graph, batch: int) -> dict[str, Array]:
    """All values of a graph at one batch size, inputs and initialisers included."""
    feeds = {p.name: sample_input(p, batch) for p in graph.inputs}
    return {**session.run(feeds), **feeds, **graph.initializers}
