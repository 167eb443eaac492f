"""What a graph's values look like: shapes, types and small integers, seen by running it at two batch sizes.

Running beats inferring: shape arithmetic, exotic operators and exporter artefacts all come out right. Axes whose size
differs between the two runs depend on the batch.
"""

from __future__ import annotations

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
"""Batch sizes of the two runs; tests use others, so that nothing frozen at one of these goes unnoticed."""

_SMALL = 64


@dataclass(frozen=True)
class Trace:
    """Shapes of every value.

    Attributes:
        shapes: Shape at the first batch size.
        shapes_second: Shape at the second batch size.
        dtypes: Type of every value.
        integers: Values of small integer tensors at the first batch size (shape arithmetic).
        integers_second: The same at the second batch size.
    """

    shapes: Mapping[str, tuple[int, ...]]
    shapes_second: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype[Any]]
    integers: Mapping[str, Array]
    integers_second: Mapping[str, Array]

    def batched(self, name: str) -> tuple[bool, ...]:
        """Per axis, whether its size depends on the batch."""
        return tuple(a != b for a, b in zip(self.shapes[name], self.shapes_second[name], strict=True))

    def dims(self, name: str) -> tuple[int | None, ...]:
        """Sizes, None where they depend on the batch."""
        return tuple(None if a != b else a for a, b in zip(self.shapes[name], self.shapes_second[name], strict=True))


def sample_input(port: Port, batch: int, seed: int = 0) -> Array:
    """A random array for a graph input: normal numbers, or zeros for integers.

    Raises:
        ModelError: A dimension other than the first is free.
    """
    shape = [batch if i == 0 and not isinstance(d, int) else d for i, d in enumerate(port.shape)]
    if not all(isinstance(d, int) for d in shape):
        raise ModelError(
            f"input {port.name} has free dimensions besides the batch",
            expected="fixed sizes from the second dimension on",
            got=list(port.shape),
            hint="Export the model with a fixed input size.",
        )
    sizes = [int(d) for d in shape if isinstance(d, int)]
    if np.issubdtype(port.dtype, np.floating):
        return np.random.default_rng(seed).standard_normal(sizes).astype(port.dtype)
    return np.zeros(sizes, port.dtype)


def trace(graph: Graph) -> Trace:
    """Run `graph` at both batch sizes and look at every value.

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
    runs = [session.run({p.name: sample_input(p, b) for p in probe.inputs}) for b in BATCHES]
    for run, batch in zip(runs, BATCHES, strict=True):
        run.update({p.name: sample_input(p, batch) for p in probe.inputs})
        run.update(probe.initializers)
    first, second = runs
    return Trace(
        {k: v.shape for k, v in first.items()},
        {k: v.shape for k, v in second.items()},
        {k: v.dtype for k, v in first.items()},
        {k: v for k, v in first.items() if v.dtype.kind in "iu" and v.size <= _SMALL},
        {k: v for k, v in second.items() if v.dtype.kind in "iu" and v.size <= _SMALL},
    )
