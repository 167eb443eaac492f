"""Activations, with the additions that are fused with them."""

from __future__ import annotations

from collections.abc import Sequence

from fedprune_export.importing.fused_operators.fused_node import FusedNode, rule

# Activations that are fused with a layer, and the attributes that its parameters are, in this order.
_LAYER_ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "Relu": (),
    "Tanh": (),
    "Sigmoid": (),
    "Softplus": (),
    "Softsign": (),
    "LeakyRelu": ("alpha",),
    "Elu": ("alpha",),
    "ThresholdedRelu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
    "Clip": ("min", "max"),
}


def activate(fused: FusedNode, name: str, parameters: Sequence[float], value: str, like: str) -> None:
    """End a layer with the activation that is fused with it; `like` is a value of the same type."""
    out = fused.node.outputs[0]
    attributes = _LAYER_ACTIVATIONS.get(name)
    if attributes is None:
        fused.refuse(f"its activation is {name}", f"one of {', '.join(sorted(_LAYER_ACTIVATIONS))}")
    if name == "Clip":
        # Bounds are attributes of the fused node, and inputs of the operator.
        bounds = [fused.number(float(p), like) for p in parameters]
        fused.emit("Clip", value, *bounds, out=out)
    else:
        fused.emit(name, value, out=out, **dict(zip(attributes, map(float, parameters), strict=False)))


@rule("Gelu", "BiasGelu", "FastGelu", "GemmFastGelu")
def gelu(fused: FusedNode) -> None:
    """Gelu of the sum with a bias, where there is one; of a product before it (Gemm), by tanh (Fast)."""
    op, value, bias = fused.node.op, fused.input(0), fused.input(1)
    if op == "GemmFastGelu":
        value, bias = fused.emit("MatMul", value, bias), fused.input(2)
    form = "tanh" if "Fast" in op else "none"
    fused.emit("Gelu", fused.sum(value, bias), out=fused.node.outputs[0], approximate=form)


@rule("QuickGelu")
def quick_gelu(fused: FusedNode) -> None:
    """x · sigmoid(alpha · x)."""
    x, alpha = fused.input(0), float(fused.node.attrs.get("alpha", 1.702))
    scaled = x if alpha == 1 else fused.emit("Mul", x, fused.number(alpha, x))
    fused.emit("Mul", x, fused.emit("Sigmoid", scaled), out=fused.node.outputs[0])


@rule("BiasSplitGelu")
def bias_split_gelu(fused: FusedNode) -> None:
    """The first half of the channels, times the Gelu of the second."""
    half = fused.shape(fused.input(0))[-1] // 2
    left, right = fused.split(fused.sum(fused.input(0), fused.input(1)), [half, half], -1)
    fused.emit("Mul", left, fused.emit("Gelu", right, approximate="none"), out=fused.node.outputs[0])


@rule("BiasAdd")
def bias_add(fused: FusedNode) -> None:
    fused.sum(fused.input(0), fused.input(1), fused.input(2), out=fused.node.outputs[0])


@rule("BiasDropout")
def bias_dropout(fused: FusedNode) -> None:
    """Dropout of the sum with a bias, plus a residual."""
    if fused.output(1):
        fused.refuse("its mask is read")
    value = fused.sum(fused.input(0), fused.input(1))
    inputs = [value, *([fused.input(3)] if fused.input(3) else [])]
    residual = fused.input(2)
    out = fused.node.outputs[0]
    dropped = fused.emit("Dropout", *inputs, out="" if residual else out)
    if residual:
        fused.emit("Add", dropped, residual, out=out)


@rule("BiasSoftmax")
def bias_softmax(fused: FusedNode) -> None:
    """A softmax of the sum with a mask, over all axes from `axis` on."""
    x, out = fused.input(0), fused.node.outputs[0]
    rank = fused.rank(x)
    axis = int(fused.node.attrs.get("axis", 1)) % rank
    total = fused.sum(x, fused.input(1))
    if axis == rank - 1:
        fused.emit("Softmax", total, out=out, axis=-1)
    else:
        rows = fused.emit("Softmax", fused.emit("Flatten", total, axis=axis), axis=-1)
        fused.emit("Reshape", rows, fused.emit("Shape", x), out=out)
