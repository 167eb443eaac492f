"""The matrix of a Resize along one axis, measured by a run of the operator on unit vectors: right for every mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.runtime.session import OnnxSession
from fedprune_export.ir.graph import NORMAL_OPSET, Graph, Node, Port

Matrix = npt.NDArray[np.float32]


def axis_matrix(
    attrs: Mapping[str, Any], size: int, scale: float | None, new_size: int, opset: int = NORMAL_OPSET
) -> Matrix:
    """The matrix [new size, size] that a Resize with these attributes applies along one axis.

    The new size follows from `scale`, or is `new_size` if that is None.
    """
    # Axis 1 is resized; along axis 2 lie the unit vectors, which a scale of 1 leaves alone. Four axes, because
    # onnxruntime resizes by cubic curves only maps.
    graph = Graph(nodes=[Node("Resize", ["x", ""], ["y"], dict(attrs))], opset=opset)
    graph.inputs, graph.outputs = (
        [Port("x", np.dtype(np.float32), (1, size, size, 1))],
        [Port("y", np.dtype(np.float32), (None,) * 4)],
    )
    if scale is not None:
        graph.nodes[0].inputs.append(graph.constant([1, 1, scale, 1], np.float32))
    else:
        graph.nodes[0].inputs += ["", graph.ints(1, size, new_size, 1)]
    columns = OnnxSession(graph.to_bytes()).run({"x": np.eye(size, dtype=np.float32)[None, :, :, None]})["y"]
    return np.ascontiguousarray(columns[0, :, :, 0].T, np.float32)
