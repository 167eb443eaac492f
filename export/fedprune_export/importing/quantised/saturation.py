"""Rewrites products of signed weights as products of unsigned ones, which no processor computes with saturation.

On x86 processors with AVX2 and without VNNI, onnxruntime adds up pairs of products of uint8 and int8 in 16 bits, which
saturate (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html). Weights and their zero points
that are 128 higher come to the same sums.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

# By operator: the place of the other factor's zero point, or None where that factor is uint8, and the places of weights
# and their zero points.
_PLACES: dict[str, tuple[int | None, tuple[tuple[int, int], ...]]] = {
    "QLinearConv": (2, ((3, 5),)),
    "QLinearMatMul": (2, ((3, 5),)),
    "QGemm": (2, ((3, 5),)),
    "MatMulInteger": (2, ((1, 3),)),
    "ConvInteger": (2, ((1, 3),)),
    "MatMulIntegerToFloat": (4, ((1, 5),)),
    "DynamicQuantizeMatMul": (None, ((1, 3),)),
    "DynamicQuantizeLSTM": (None, ((1, 9), (2, 11))),
    "QAttention": (6, ((1, 7),)),
}


def avoid_saturation(graph: onnx.GraphProto) -> None:
    """Give the graph's products of uint8 and constant int8 numbers weights in uint8."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    unsigned = {name for name, tensor in constants.items() if tensor.data_type == onnx.TensorProto.UINT8}
    unsigned |= {name for node in graph.node if node.op_type == "DynamicQuantizeLinear" for name in node.output}
    for node in graph.node:
        other, places = _PLACES.get(node.op_type, (None, ()))
        if other is not None and (len(node.input) <= other or node.input[other] not in unsigned):
            continue
        for weight, zero in places:
            _raise_weight(graph, node, constants, weight, zero)


def _raise_weight(
    graph: onnx.GraphProto, node: onnx.NodeProto, constants: dict[str, onnx.TensorProto], weight: int, zero: int
) -> None:
    zero_name = node.input[zero] if zero < len(node.input) else ""
    tensors = [constants.get(node.input[weight]), constants.get(zero_name) if zero_name else None]
    if tensors[0] is None or tensors[0].data_type != onnx.TensorProto.INT8 or (zero_name and tensors[1] is None):
        return
    node.input.extend([""] * (zero + 1 - len(node.input)))
    for place, tensor in zip((weight, zero), tensors, strict=True):
        values = np.zeros((), np.int8) if tensor is None else numpy_helper.to_array(tensor)
        # Their own names: others may read the same weights.
        name = f"raised/{len(graph.initializer)}"
        raised = numpy_helper.from_array((values.astype(np.int16) + 128).astype(np.uint8), name)
        graph.initializer.append(raised)
        node.input[place] = name
