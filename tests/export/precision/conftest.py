"""int8 on processors that can't add its products."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from onnx import TensorProto, helper

from fedprune.runtime.session import Session


@cache
def saturates() -> bool:
    """Whether onnxruntime adds products of 8 bits in 16 bits here, as on x86 processors without VNNI."""
    node = helper.make_node("MatMulInteger", ["a", "b"], ["c"])
    a = helper.make_tensor_value_info("a", TensorProto.UINT8, [1, 4])
    b = helper.make_tensor_value_info("b", TensorProto.INT8, [4, 1])
    c = helper.make_tensor_value_info("c", TensorProto.INT32, [1, 1])
    opset = helper.make_opsetid("", 17)
    model = helper.make_model(helper.make_graph([node], "sum", [a, b], [c]), opset_imports=[opset], ir_version=8)
    ones = {"a": np.full((1, 4), 255, np.uint8), "b": np.full((4, 1), 127, np.int8)}
    return int(Session(model.SerializeToString()).run(ones)["c"][0, 0]) != 4 * 255 * 127


@pytest.fixture(autouse=True)
def _exact_int8(request: pytest.FixtureRequest) -> None:
    node = request.node
    if ("int8" in node.name or node.get_closest_marker("exact_int8")) and saturates():
        pytest.skip("this processor saturates sums of int8 products: no VNNI")
