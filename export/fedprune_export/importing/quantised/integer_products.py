"""Rules for products of integers whose sums are scaled afterwards, as dynamic quantisation writes them."""

from __future__ import annotations

import numpy as np

from fedprune_export.importing.quantised.numbers import Quantisation, refuse
from fedprune_export.importing.quantised.rewriter import Rewriter, Rule
from fedprune_export.ir.graph import Node

_PRODUCTS = {"MatMulInteger": "MatMul", "ConvInteger": "Conv"}


def _sum(state: Rewriter, node: Node) -> None:
    """Sums have no float form of their own: the product with the scales does (`scaled_sum`)."""
    state.sums.add(node.outputs[0])


def scaled_sum(state: Rewriter, node: Node) -> bool:
    """Write a product of sums with their scales as a product of numbers. Returns False if it is something else."""
    if node.op != "Mul" or node.domain or len(node.inputs) != 2:
        return False
    for position in (0, 1):
        cast = state.makers.get(node.inputs[position])
        source = state.makers.get(cast.inputs[0]) if cast is not None and cast.op == "Cast" else None
        if source is not None and source.op in _PRODUCTS and not source.domain:
            _write_product(state, node, source, node.inputs[1 - position])
            return True
    return False


def _write_product(state: Rewriter, node: Node, product: Node, scales: str) -> None:
    x, y, x_zero, y_zero = [*product.inputs, "", ""][:4]
    x_scale = _scale_of(state, x, scales)
    second_scale = _other_scale(state, scales, x_scale) if x_scale else None
    if x_scale is None or second_scale is None:
        raise refuse(node, "doesn't scale the sums by the product of both scales")
    first = state.number(x, Quantisation(x_scale, x_zero))
    axis = 0 if product.op == "ConvInteger" else -1
    second = state.number(y, Quantisation(second_scale, y_zero, axis))
    attrs = dict(product.attrs) if product.op == "ConvInteger" else {}
    state.emit(_PRODUCTS[product.op], first, second, attrs=attrs, out=node.outputs[0])


def _scale_of(state: Rewriter, integers: str, scales: str) -> str | None:
    """The scale of integers: that by which they were rounded. Those of a stored tensor, such as the rows of an
    embedding, have it only in the product of both scales, in which it comes first, or where they are dequantised."""
    if integers in state.quantisations:
        return state.quantisations[integers].scale
    maker = state.makers.get(scales)
    if maker is not None:
        return maker.inputs[0] if maker.op == "Mul" and len(maker.inputs) == 2 else None
    readers = (n for n in state.file.nodes if n.op == "DequantizeLinear")
    return next((n.inputs[1] for n in readers if _origin(state, n.inputs[0]) == _origin(state, integers)), None)


def _origin(state: Rewriter, integers: str) -> str:
    """The tensor or value whose numbers are rearranged."""
    while (maker := state.makers.get(integers)) is not None and state.is_rearranging(maker):
        integers = maker.inputs[0]
    return integers


def _other_scale(state: Rewriter, scales: str, first: str) -> str | None:
    """The scale that a product of scales has besides the first; None if it is no such product."""
    maker = state.makers.get(scales)
    if maker is not None and maker.op == "Mul" and first in maker.inputs:
        return maker.inputs[1 - maker.inputs.index(first)]
    product, scale = state.constant(scales), state.constant(first)
    if product is None or scale is None or scale.size != 1 or not scale.any():
        return None
    return state.file.constant(np.asarray(product, np.float32).reshape(-1) / scale.reshape(()), np.float32)


def _to_float(state: Rewriter, node: Node) -> None:
    """MatMulIntegerToFloat: A, B, scale of A, scale of B, zero point of A, zero point of B, bias."""
    a, b, a_scale, b_scale, a_zero, b_zero, bias = [*node.inputs, "", "", ""][:7]
    first = state.number(a, Quantisation(a_scale, a_zero, -2))
    state.write_product(node, first, state.number(b, Quantisation(b_scale, b_zero, -1)), bias)


def _dynamic_matmul(state: Rewriter, node: Node) -> None:
    """DynamicQuantizeMatMul: A, B, scale of B, zero point of B, bias. It rounds A inside."""
    a, b, b_scale, b_zero, bias = [*node.inputs, "", "", ""][:5]
    integers, scale, zero = state.file.emit_many("DynamicQuantizeLinear", a, outputs=3)
    state.makers[integers] = state.file.nodes[-1]
    state.round_dynamically(integers, a, Quantisation(scale, zero))
    first = state.number(integers, Quantisation(scale, zero))
    state.write_product(node, first, state.number(b, Quantisation(b_scale, b_zero, -1)), bias)


def _attention(state: Rewriter, node: Node) -> None:
    """QAttention: input, weight, bias, scale of input, scale of weight, mask, zero point of both, past.

    It is onnxruntime's Attention on numbers: input, weight, bias, mask, past.
    """
    names = [*node.inputs, *[""] * 9][:9]
    first = state.number(names[0], Quantisation(names[3], names[6]))
    inputs = [first, state.number(names[1], Quantisation(names[4], names[7], -1)), names[2], names[5], names[8]]
    while not inputs[-1]:
        inputs.pop()
    state.graph.nodes.append(Node("Attention", inputs, list(node.outputs), dict(node.attrs), node.name, node.domain))


def _lstm(state: Rewriter, node: Node) -> None:
    """DynamicQuantizeLSTM: X, W, R, B, lengths, first states, P, and scale and zero point of W and of R.

    W and R are [directions, features, 4 · units]; LSTM has their last two axes the other way round.
    """
    names = [*node.inputs, *[""] * 12][:12]
    weights = [_lstm_weight(state, node, names[i], names[s], names[s + 1]) for i, s in ((1, 8), (2, 10))]
    inputs = [names[0], *weights, *names[3:8]]
    while not inputs[-1]:
        inputs.pop()
    attrs = {k: v for k, v in node.attrs.items() if k != "layout"}
    outputs = [state.graph.fresh(o) if o else "" for o in node.outputs]
    state.graph.nodes.append(Node("LSTM", inputs, outputs, attrs, outputs[0] or node.name))
    for value, output in zip(outputs, node.outputs, strict=True):
        if output:
            state.round_inside(value, output)


def _lstm_weight(state: Rewriter, node: Node, name: str, scale_name: str, zero_name: str) -> str:
    integers, scale, zero = state.constant(name), state.constant(scale_name), state.constant(zero_name)
    if integers is None or scale is None or integers.ndim != 3:
        raise refuse(node, "has weights that the file computes")
    directions, _, columns = integers.shape
    shape = (directions, 1, columns) if scale.size == directions * columns else (directions, 1, 1)
    if scale.size != np.prod(shape) or (zero is not None and zero.size != scale.size):
        raise refuse(node, "has other scales than one for each direction or column")
    spread_zero = np.zeros(shape) if zero is None else zero.reshape(shape).astype(np.float64)
    numbers = (integers.astype(np.float64) - spread_zero) * scale.reshape(shape)
    return state.add_tensor(name, np.ascontiguousarray(numbers.swapaxes(1, 2), np.float32))


PRODUCT_RULES: dict[str, Rule] = {
    "MatMulInteger": _sum,
    "ConvInteger": _sum,
    "MatMulIntegerToFloat": _to_float,
    "DynamicQuantizeMatMul": _dynamic_matmul,
    "DynamicQuantizeLSTM": _lstm,
    "QAttention": _attention,
}
