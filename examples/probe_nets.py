"""The nets of the probe: small ones in which each kind of layer occurs at several widths and map sizes.

They are written as graphs, so that no torch is needed, and go through the compiler like any model.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from fedprune.core.rng import keyed_generator
from fedprune_export.ir.graph import Graph, Port

CLASSES = 10


class Net:
    """A graph under construction; every method appends a layer to `value` and follows its shape.

    Args:
        name: The net's name.
        shape: One sample's shape.
    """

    def __init__(self, name: str, *shape: int) -> None:
        self.graph = Graph(name=name)
        self.graph.inputs = [Port("x", np.dtype(np.float32), ("N", *shape))]
        self.value, self.shape = "x", list(shape)
        self._layers = 0

    def weight(self, name: str, *shape: int, scale: float | None = None) -> str:
        """A new weight of the layer under construction."""
        full = f"l{self._layers}.{name}"
        value = keyed_generator(0, full, *shape).standard_normal(shape)
        size = scale if scale is not None else 1 / math.sqrt(max(1, math.prod(shape[1:])))
        self.graph.initializers[full] = (size * value).astype(np.float32)
        return full

    def op(self, op: str, *more: str, shape: list[int] | None = None, **attrs: object) -> Net:
        """Any operator on the value."""
        self.value = self.graph.emit(op, self.value, *more, attrs=attrs)
        self.shape = shape or self.shape
        return self

    def conv(self, out: int, kernel: int = 3, stride: int = 1, *, depthwise: bool = False, bias: bool = False) -> Net:
        """A convolution with padding over all spatial axes."""
        self._layers += 1
        rank, inner = len(self.shape) - 1, self.shape[0]
        out = inner if depthwise else out
        weights = [self.weight("weight", out, 1 if depthwise else inner, *[kernel] * rank)]
        weights += [self.weight("bias", out, scale=0.1)] if bias else []
        return self.op(
            "Conv",
            *weights,
            shape=[out, *((n - 1) // stride + 1 for n in self.shape[1:])],
            kernel_shape=[kernel] * rank,
            strides=[stride] * rank,
            pads=[kernel // 2] * 2 * rank,
            group=inner if depthwise else 1,
        )

    def norm(self) -> Net:
        """A batch normalisation."""
        self._layers += 1
        c = self.shape[0]
        vectors = [self.weight(n, c, scale=0.1) for n in ("scale", "bias", "mean")]
        variance = self.weight("var", c)
        self.graph.initializers[variance] = np.ones(c, np.float32)
        return self.op("BatchNormalization", *vectors, variance, epsilon=1e-5)

    def layer_norm(self) -> Net:
        """A normalisation over the last axis."""
        self._layers += 1
        c = self.shape[-1]
        return self.op(
            "LayerNormalization", self.weight("scale", c, scale=0.1), self.weight("bias", c, scale=0.1), axis=-1
        )

    def pool(self, op: str, size: int) -> Net:
        """A pooling without overlap."""
        rank = len(self.shape) - 1
        shape = [self.shape[0], *(n // size for n in self.shape[1:])]
        return self.op(op, shape=shape, kernel_shape=[size] * rank, strides=[size] * rank)

    def gemm(self, out: int, *, last: bool = False) -> Net:
        """A linear layer over a row."""
        self._layers += 1
        weights = self.weight("weight", out, self.shape[0]), self.weight("bias", out, scale=0.1)
        attrs = {"transB": 1}
        self.value = self.graph.emit("Gemm", self.value, *weights, attrs=attrs, **({"out": "logits"} if last else {}))
        self.shape = [out]
        return self

    def linear(self, out: int) -> Net:
        """A linear layer over the last axis of tokens."""
        self._layers += 1
        self.op("MatMul", self.weight("weight", self.shape[-1], out), shape=[*self.shape[:-1], out])
        return self.op("Add", self.weight("bias", out, scale=0.1))

    def flat(self) -> Net:
        """All axes of a sample as one."""
        return self.op("Flatten", shape=[math.prod(self.shape)], axis=1)

    def mean(self) -> Net:
        """The mean over all places, as a row."""
        self.op("GlobalAveragePool", shape=[self.shape[0], *[1] * (len(self.shape) - 1)])
        return self.flat()

    def done(self) -> bytes:
        """The last layer, and the bytes of the file."""
        self.gemm(CLASSES, last=True)
        self.graph.outputs = [Port("logits", np.dtype(np.float32), ("N", CLASSES))]
        return self.graph.to_bytes()


def plain() -> bytes:
    """Convolutions with biases, pooling, linear layers: LeNet and VGG."""
    net = Net("plain", 3, 32, 32)
    net.conv(32, bias=True).op("Relu").pool("MaxPool", 2)
    net.conv(48, 5, bias=True).op("Relu").pool("MaxPool", 2)
    net.conv(96, bias=True).op("Relu").pool("AveragePool", 2)
    return net.flat().gemm(192).op("Relu").done()


def residual() -> bytes:
    """Convolutions with batch normalisation and shortcuts."""
    net = Net("residual", 3, 32, 32)
    net.conv(16).norm().op("Relu")
    for width, stride in ((24, 1), (48, 2), (64, 2)):
        net.conv(width, 3, stride).norm().op("Relu")
        before = net.value
        net.conv(width).norm().op("Add", before).op("Relu")
    return net.mean().done()


def deep() -> bytes:
    """Many channels on small maps: the end of a VGG. Its weights are more than caches hold."""
    net = Net("deep", 3, 16, 16)
    net.conv(48, 3, 2).norm().op("Relu")
    net.conv(160).norm().op("Relu").conv(256, 3, 2).norm().op("Relu")
    net.conv(448).norm().op("Relu").pool("MaxPool", 2).conv(512).norm().op("Relu")
    return net.flat().done()


def mobile() -> bytes:
    """Inverted residuals: 1×1, depthwise, 1×1."""
    net = Net("mobile", 3, 32, 32)
    limits = net.graph.scalar(0), net.graph.scalar(6)
    net.conv(16).norm().op("Clip", *limits).conv(0, depthwise=True).norm().op("Clip", *limits)
    net.conv(24, 3, 2).norm().op("Clip", *limits)
    blocks = ((96, 32, 2), (192, 32, 1), (192, 64, 2), (384, 96, 1), (576, 160, 2))
    for i, (wide, out, stride) in enumerate(blocks):
        before = net.value
        net.conv(wide, 1).norm().op("Clip", *limits)
        net.conv(0, 5 if i == 2 else 3, stride, depthwise=True).norm()
        net.op("HardSwish") if i == 3 else net.op("Clip", *limits)
        net.conv(out, 1).norm()
        if i == 1:
            net.op("Add", before)
    return net.conv(960, 1).norm().op("Clip", *limits).mean().done()


def gates() -> bytes:
    """Squeeze and excitation, sigmoids, concatenation."""
    net = Net("gates", 3, 24, 24)
    net.conv(32, 3, 2).norm()
    for _ in range(2):
        x, shape = net.value, list(net.shape)
        net.op("Sigmoid").op("Mul", x)
        x = net.value
        net.op("GlobalAveragePool", shape=[shape[0], 1, 1]).conv(12, 1, bias=True).op("Relu")
        net.conv(shape[0], 1, bias=True).op("HardSigmoid").op("Mul", x, shape=shape)
        net.conv(24, 3).norm().op("Concat", x, shape=[24 + shape[0], *shape[1:]], axis=1)
        net.op("Relu").conv(40, 1, stride=2).norm().op("Relu")
    return net.mean().done()


def tokens() -> bytes:
    """Blocks of a transformer over patches."""
    net = Net("tokens", 3, 32, 32)
    net.conv(64, 4, 4, bias=True).op("Reshape", net.graph.ints(0, 0, -1)).op(
        "Transpose", shape=[64, 64], perm=[0, 2, 1]
    )
    for hidden in (160, 96):
        start, tokens_shape = net.value, list(net.shape)
        normal = net.layer_norm().value
        keys = net.linear(48).op("Transpose", perm=[0, 2, 1]).value
        net.value, net.shape = normal, list(tokens_shape)
        values = net.linear(80).value
        net.value, net.shape = normal, list(tokens_shape)
        net.linear(48).op("MatMul", keys, shape=[64, 64]).op("Mul", net.graph.scalar(0.15)).op("Softmax", axis=-1)
        net.op("MatMul", values, shape=[64, 80]).linear(64).op("Add", start)
        start = net.value
        net.layer_norm().linear(hidden).op("Gelu").linear(64).op("Add", start)
    net.op("ReduceMean", shape=[64], axes=[1], keepdims=0)
    return net.done()


def rows() -> bytes:
    """Linear layers alone."""
    net = Net("rows", 64)
    for width in (256, 384, 128):
        net.gemm(width).op("Relu")
    return net.done()


def signals() -> bytes:
    """Convolutions over one axis."""
    net = Net("signals", 6, 128)
    net.conv(32, 5, bias=True).op("Relu").pool("MaxPool", 2).conv(64, 5).norm().op("Relu").pool("MaxPool", 2)
    return net.conv(96, 3, 2).norm().op("Relu").mean().done()


NETS: dict[str, Callable[[], bytes]] = {
    f.__name__: f for f in (plain, residual, deep, mobile, gates, tokens, rows, signals)
}
