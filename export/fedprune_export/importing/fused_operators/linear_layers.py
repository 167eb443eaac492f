"""Convolutions and products of matrices, with what is fused with them, and layers whose channels are the last axis."""

from __future__ import annotations

from fedprune_export.importing.fused_operators.activations import activate
from fedprune_export.importing.fused_operators.fused_node import FusedNode, rule

_ACTIVATION_ATTRIBUTES = ("activation", "activation_params")
_CHANNELS_FIRST, _CHANNELS_LAST = [0, 3, 1, 2], [0, 2, 3, 1]


@rule("FusedConv")
def fused_conv(fused: FusedNode) -> None:
    """activation(conv(x) + z)."""
    attrs = {name: value for name, value in fused.node.attrs.items() if name not in _ACTIVATION_ATTRIBUTES}
    addend, activation = fused.input(3), fused.node.attrs.get("activation", "")
    inputs = [i for i in fused.node.inputs[:3] if i]
    out = fused.node.outputs[0]
    value = fused.emit("Conv", *inputs, out="" if addend or activation else out, **attrs)
    if addend:
        value = fused.emit("Add", value, addend, out="" if activation else out)
    if activation:
        activate(fused, activation, fused.node.attrs.get("activation_params", []), value, fused.input(0))


@rule("NhwcConv", "NhwcFusedConv")
def nhwc_conv(fused: FusedNode) -> None:
    """A convolution of pictures [n, height, width, channels] by kernels [out, height, width, in]."""
    if fused.rank(fused.input(0)) != 4:
        fused.refuse("its input has no two spatial axes")
    maps = [channels_first(fused, i) if i and p != 2 else i for p, i in enumerate(fused.node.inputs)]
    target = fused.graph.fresh(fused.node.outputs[0])
    node = fused.node.copy()
    node.inputs, node.outputs = maps, [target]
    fused_conv(FusedNode(node, fused.graph, fused.shapes, fused.read_values))
    channels_last(fused, target)


@rule("NhwcMaxPool")
def nhwc_max_pool(fused: FusedNode) -> None:
    if fused.rank(fused.input(0)) != 4:
        fused.refuse("its input has no two spatial axes")
    pooled = fused.emit("MaxPool", channels_first(fused, fused.input(0)), **fused.node.attrs)
    channels_last(fused, pooled)


@rule("ConvTransposeWithDynamicPads")
def conv_transpose(fused: FusedNode) -> None:
    pads = fused.constant_value(2, "pads")
    attrs = dict(fused.node.attrs)
    if pads is not None:
        attrs["pads"] = [int(p) for p in pads.reshape(-1)]
    inputs = [fused.input(0), fused.input(1), *([fused.input(3)] if fused.input(3) else [])]
    fused.emit("ConvTranspose", *inputs, out=fused.node.outputs[0], **attrs)


def channels_first(fused: FusedNode, value: str) -> str:
    return fused.emit("Transpose", value, perm=_CHANNELS_FIRST)


def channels_last(fused: FusedNode, value: str) -> None:
    """End a node whose output has its channels last."""
    fused.emit("Transpose", value, out=fused.node.outputs[0], perm=_CHANNELS_LAST)


@rule("FusedMatMul", "TransposeMatMul")
def fused_matmul(fused: FusedNode) -> None:
    """alpha · A · B, of which each may be transposed."""
    left, right = (_operand(fused, position, side) for position, side in enumerate("AB"))
    alpha, out = float(fused.node.attrs.get("alpha", 1.0)), fused.node.outputs[0]
    if alpha == 1:
        fused.emit("MatMul", left, right, out=out)
    else:
        product = fused.emit("MatMul", left, right)
        fused.emit("Mul", product, fused.number(alpha, fused.input(0)), out=out)


@rule("FusedGemm")
def fused_gemm(fused: FusedNode) -> None:
    names = ("alpha", "beta", "transA", "transB")
    attrs = {name: value for name, value in fused.node.attrs.items() if name in names}
    value = fused.emit("Gemm", *fused.node.inputs, **attrs)
    read = fused.node.attrs.get
    parameters = [p for name in ("alpha", "beta", "gamma") if (p := read(f"activation_{name}")) is not None]
    activate(fused, read("activation", ""), parameters, value, fused.input(0))


def _operand(fused: FusedNode, position: int, side: str) -> str:
    """An operand as the product reads it. `transBatch` moves its first axis to the last but one."""
    value, rank = fused.input(position), fused.rank(fused.input(position))
    if rank < 2:
        return value
    order = list(range(rank))
    if fused.node.attrs.get(f"transBatch{side}", 0):
        order = [*order[1:-1], order[0], order[-1]]
    if fused.node.attrs.get(f"trans{side}", 0):
        order = [*order[:-2], order[-1], order[-2]]
    return value if order == sorted(order) else fused.emit("Transpose", value, perm=order)
