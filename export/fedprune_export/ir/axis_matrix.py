"""Matrices of linear operators, measured by a run of the operator on unit vectors: right for every mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune_export.ir.graph import NORMAL_OPSET, Array, Graph
from fedprune_export.ir.trace import run_values

Matrix = npt.NDArray[np.float32]


def run_operator(op: str, x: Array, arguments: Sequence[Array | None], attrs: Mapping[str, Any], opset: int) -> Array:
    """The output of an operator of the standard for x and further inputs, None for those that are left out."""
    graph = Graph(opset=opset)
    output = graph.emit(op, *("" if a is None else graph.constant(a, a.dtype) for a in (x, *arguments)), attrs=attrs)
    return run_values(graph, [output], batch=1)[output]


def axis_matrix(
    attrs: Mapping[str, Any], size: int, scale: float | None, new_size: int, opset: int = NORMAL_OPSET
) -> Matrix:
    """The matrix [new size, size] that a Resize with these attributes applies along one axis.

    The new size follows from `scale`, or is `new_size` if that is None.
    """
    # Axis 1 is resized; along axis 2 lie the unit vectors, which a scale of 1 leaves alone. Four axes, because
    # onnxruntime resizes by cubic curves only maps.
    units = np.eye(size, dtype=np.float32)[None, :, :, None]
    scales = np.array([1, 1, scale, 1], np.float32) if scale is not None else None
    sizes = np.array([1, size, new_size, 1]) if scale is None else None
    columns = run_operator("Resize", units, [None, scales, sizes], attrs, opset)
    return np.ascontiguousarray(columns[0, :, :, 0].T, np.float32)
