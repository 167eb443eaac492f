"""A product of int8 whose sums overflow 16 bits."""

from functools import cache

import numpy as np
from onnx import TensorProto, helper

from fedprune.runtime.session import OnnxSession

WIDE_SUM = 130_000.0
"""4 · 255 · 127, in steps of 1,000."""


def wide_sum(*, exact: bool) -> float:
    """The sum as onnxruntime computes it here."""
    make = helper.make_node
    nodes = [
        make("QuantizeLinear", ["a", "one", "zero_a"], ["a8"]),
        make("DequantizeLinear", ["a8", "one", "zero_a"], ["a32"]),
        make("DequantizeLinear", ["b8", "one", "zero_b"], ["b32"]),
        make("MatMul", ["a32", "b32"], ["c32"]),
        make("QuantizeLinear", ["c32", "step", "zero_a"], ["c8"]),
        make("DequantizeLinear", ["c8", "step", "zero_a"], ["c"]),
    ]
    constants = [
        helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]),
        helper.make_tensor("step", TensorProto.FLOAT, [], [1000.0]),
        helper.make_tensor("zero_a", TensorProto.UINT8, [], [0]),
        helper.make_tensor("zero_b", TensorProto.INT8, [], [0]),
        helper.make_tensor("b8", TensorProto.INT8, [4, 1], [127] * 4),
    ]
    a = helper.make_tensor_value_info("a", TensorProto.FLOAT, [1, 4])
    c = helper.make_tensor_value_info("c", TensorProto.FLOAT, [1, 1])
    opset = helper.make_opsetid("", 17)
    model = helper.make_model(helper.make_graph(nodes, "sum", [a], [c], constants), opset_imports=[opset], ir_version=8)
    feeds = {"a": np.full((1, 4), 255, np.float32)}
    return float(OnnxSession(model.SerializeToString(), exact=exact).run(feeds)["c"][0, 0])


@cache
def saturates() -> bool:
    """Whether onnxruntime adds products of int8 in 16 bits here, as on x86 processors without VNNI."""
    return wide_sum(exact=False) != WIDE_SUM
