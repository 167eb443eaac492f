"""Small ONNX files whose nodes are written in onnx's text form."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper


def text_file(
    body: str,
    tensors: Mapping[str, Any],
    x: str = "float[N,6] x",
    y: str = "float[N,4] y",
    *,
    opset: int = 17,
    constants: Mapping[str, Any] | None = None,
) -> bytes:
    """A file of nodes from `x` to `y`, with Constant nodes of `constants`; `ms` is the domain of onnxruntime."""
    opsets = f'["" : {opset}, "com.microsoft" : 1, "ai.onnx.ml" : 3]'
    nodes = body.replace("ms.", "com.microsoft.")
    proto = onnx.parser.parse_model(f"<ir_version: 8, opset_import: {opsets}> net ({x}) => ({y}) {{ {nodes} }}")
    proto.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), name) for name, v in tensors.items())
    for name, value in (constants or {}).items():
        proto.graph.node.insert(0, helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value)))
    raw: bytes = proto.SerializeToString()
    return raw
