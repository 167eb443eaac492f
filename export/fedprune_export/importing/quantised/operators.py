"""Rules for operators on integers: what each computes on floats."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedprune_export.importing.quantised.numbers import Quantisation, dequantised, refuse, unpack_blocks
from fedprune_export.importing.quantised.rewriter import OPERATOR_STEPS, ROUNDING_STEPS, Rewriter, Rule
from fedprune_export.ir.graph import Node


def _quantize(state: Rewriter, node: Node) -> None:
    given = state.parameters(node, 1, int(node.attrs.get("axis", 1)))
    block = int(node.attrs.get("block_size", 0))
    if block:
        raise refuse(node, "rounds activations in blocks")
    state.round(node, node.inputs[0], given, steps=ROUNDING_STEPS)


def _dequantize(state: Rewriter, node: Node) -> None:
    given = state.parameters(node, 1, int(node.attrs.get("axis", 1)))
    quantisation = Quantisation(given.scale, given.zero, given.axis, int(node.attrs.get("block_size", 0)))
    integers, output = node.inputs[0], node.outputs[0]
    is_tensor = integers in state.file.initializers
    number = state.tensor(integers, quantisation, output) if is_tensor else state.number(integers, quantisation)
    if number != output:
        state.emit("Identity", number, out=output)


def _dynamic_quantize(state: Rewriter, node: Node) -> None:
    integers, scale, zero = node.outputs
    state.round_dynamically(integers, node.inputs[0], Quantisation(scale, zero))


def _read(state: Rewriter, node: Node, start: int, axis: int = 1) -> str:
    """The numbers of a triple of inputs: integers, scale, zero point."""
    return state.number(node.inputs[start], state.parameters(node, start + 1, axis))


def _finish(state: Rewriter, node: Node, value: str, start: int) -> None:
    """Let a value stand for a node's output, whose scale and zero point are inputs."""
    state.round(node, value, state.parameters(node, start), steps=OPERATOR_STEPS)


def _bias(state: Rewriter, node: Node, index: int, scales: tuple[int, int], factor: float = 1.0) -> list[str]:
    """A bias of int32 at the product of both scales; an empty list without one."""
    if len(node.inputs) <= index or not node.inputs[index]:
        return []
    name = node.inputs[index]
    bias = state.constant(name)
    first, second = (state.constant(node.inputs[i]) for i in scales)
    if bias is None or first is None or second is None:
        raise refuse(node, "has a bias that the file computes")
    product = np.asarray(first, np.float64).reshape(-1) * np.asarray(second, np.float64).reshape(-1) * factor
    return [state.add_tensor(name, dequantised(bias, np.asarray(product, np.float32), None, -1))]


def _conv(state: Rewriter, node: Node) -> None:
    if node.attrs.get("channels_last", 0):
        raise refuse(node, "has its channels last")
    x, w = _read(state, node, 0), _read(state, node, 3, axis=0)
    attrs = {k: v for k, v in node.attrs.items() if k != "channels_last"}
    _finish(state, node, state.emit("Conv", x, w, *_bias(state, node, 8, (1, 4)), attrs=attrs), 6)


def _matmul(state: Rewriter, node: Node) -> None:
    _finish(state, node, state.emit("MatMul", _read(state, node, 0, -2), _read(state, node, 3, -1)), 6)


def _gemm(state: Rewriter, node: Node) -> None:
    attrs = {k: v for k, v in node.attrs.items() if k in ("alpha", "transA", "transB")}
    w = _read(state, node, 3, axis=0 if attrs.get("transB") else 1)
    bias = _bias(state, node, 6, (1, 4), float(attrs.get("alpha", 1.0)))
    has_output_scale = len(node.inputs) > 7 and bool(node.inputs[7])
    out = None if has_output_scale else node.outputs[0]
    value = state.emit("Gemm", _read(state, node, 0), w, *bias, attrs=attrs, out=out)
    if has_output_scale:
        _finish(state, node, value, 7)


def _plain(op: str, attributes: tuple[str, ...] = (), *, operands: int = 1) -> Rule:
    """An operator of numbers with these of its attributes, whose operands are triples of inputs."""

    def rule(state: Rewriter, node: Node) -> None:
        if node.attrs.get("channels_last", 0):
            raise refuse(node, "has its channels last")
        attrs: dict[str, Any] = {k: v for k, v in node.attrs.items() if k in attributes}
        numbers = [_read(state, node, 3 * i) for i in range(operands)]
        _finish(state, node, state.emit(op, *numbers, attrs=attrs), 3 * operands)

    return rule


def _concat(state: Rewriter, node: Node) -> None:
    values = [_read(state, node, i) for i in range(2, len(node.inputs), 3)]
    _finish(state, node, state.emit("Concat", *values, attrs={"axis": int(node.attrs["axis"])}), 0)


def _where(state: Rewriter, node: Node) -> None:
    value = state.emit("Where", node.inputs[0], _read(state, node, 1), _read(state, node, 4))
    _finish(state, node, value, 7)


def _softmax(state: Rewriter, node: Node) -> None:
    opset = int(node.attrs.get("opset", state.graph.opset))
    if (opset < 13) != (state.graph.opset < 13):
        raise refuse(node, f"means that of opset {opset} in a file of opset {state.graph.opset}")
    axis = int(node.attrs.get("axis", -1 if opset >= 13 else 1))
    _finish(state, node, state.emit("Softmax", _read(state, node, 0), attrs={"axis": axis}), 3)


def _reduce_mean(state: Rewriter, node: Node) -> None:
    axes, keep = [int(a) for a in node.attrs.get("axes", [])], int(node.attrs.get("keepdims", 1))
    x = _read(state, node, 0)
    if state.graph.opset < 18:
        value = state.emit("ReduceMean", x, attrs={"axes": axes, "keepdims": keep} if axes else {"keepdims": keep})
    else:
        value = state.emit("ReduceMean", x, *([state.graph.ints(*axes)] if axes else []), attrs={"keepdims": keep})
    _finish(state, node, value, 3)


def _matmul_nbits(state: Rewriter, node: Node) -> None:
    """A product with weights of few bits in blocks: [columns, blocks, bytes]."""
    bits, block = int(node.attrs.get("bits", 4)), int(node.attrs.get("block_size", 0))
    rows, columns = int(node.attrs.get("K", 0)), int(node.attrs.get("N", 0))
    packed, scales = state.constant(node.inputs[1]), state.constant(node.inputs[2])
    names = [*node.inputs[3:], "", "", ""]
    zeros = state.constant(names[0])
    if packed is None or scales is None or (names[0] and zeros is None):
        raise refuse(node, "has weights that the file computes")
    if bits not in (2, 4, 8) or block < 1 or names[1] or (zeros is not None and zeros.dtype != np.uint8):
        raise refuse(node, "has weights in an order or type that isn't read")
    blocks = -(-rows // block)
    if packed.size != columns * blocks * (block * bits // 8) or scales.size != columns * blocks:
        raise refuse(node, "has weights of another size than it says")
    integers = unpack_blocks(packed.reshape(columns, -1), bits, blocks * block)
    zero_points = np.full((columns, blocks), 2 ** (bits - 1), np.uint8)
    if zeros is not None:
        zero_points = unpack_blocks(zeros.reshape(columns, -1), bits, blocks)
    values = dequantised(integers, scales.reshape(columns, blocks), zero_points, 1, block)[:, :rows]
    weight = state.add_tensor(node.inputs[1], np.ascontiguousarray(values.T))
    state.write_product(node, node.inputs[0], weight, names[2])


_POOL = ("kernel_shape", "strides", "pads", "auto_pad", "ceil_mode", "count_include_pad", "dilations")

OPERATOR_RULES: dict[str, Rule] = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "DynamicQuantizeLinear": _dynamic_quantize,
    "QLinearConv": _conv,
    "QLinearMatMul": _matmul,
    "QGemm": _gemm,
    "QLinearAdd": _plain("Add", operands=2),
    "QLinearMul": _plain("Mul", operands=2),
    "QLinearSigmoid": _plain("Sigmoid"),
    "QLinearLeakyRelu": _plain("LeakyRelu", ("alpha",)),
    "QLinearAveragePool": _plain("AveragePool", _POOL),
    "QLinearGlobalAveragePool": _plain("GlobalAveragePool"),
    "QLinearReduceMean": _reduce_mean,
    "QLinearConcat": _concat,
    "QLinearWhere": _where,
    "QLinearSoftmax": _softmax,
    "MatMulNBits": _matmul_nbits,
}
