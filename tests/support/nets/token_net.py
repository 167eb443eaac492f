"""A small net that reads token identifiers, as an ONNX file without torch."""

import numpy as np
import onnx
from onnx import helper, numpy_helper


def token_net(vocabulary: int) -> bytes:
    """A net that reads three identifiers below `vocabulary` and tells 5 classes apart."""
    random = np.random.default_rng(1)
    shapes = {"table": (vocabulary, 6), "hidden": (18, 8), "head": (8, 5)}
    nodes = [
        helper.make_node("Gather", ["table", "x"], ["e"]),
        helper.make_node("Flatten", ["e"], ["f"]),
        helper.make_node("MatMul", ["f", "hidden"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "head"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tokens",
        [helper.make_tensor_value_info("x", onnx.TensorProto.INT64, ["N", 3])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 5])],
        [numpy_helper.from_array(random.standard_normal(v).astype(np.float32), n) for n, v in shapes.items()],
    )
    raw: bytes = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    return raw
