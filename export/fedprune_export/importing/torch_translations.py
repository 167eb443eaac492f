"""Translates torch operators to ONNX where torch's exporter has no translation, or one that can't be cut or trained."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import onnx

_SMALLEST_NORMAL = 2.0**-126  # of float32; a division by less may overflow


class TorchTranslations:
    """Functions that write a torch operator in ONNX, each with the arguments of the operator.

    The exporter passes most arguments by position and calls with the values of the graph that it writes.
    """

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._ops: Any = importlib.import_module("onnxscript").opset18
        self._library: Any = importlib.import_module("onnxscript.function_libs.torch_lib.ops.core")

    def table(self) -> dict[Any, Callable[..., Any]]:
        """The translations by torch operator."""
        aten = self._torch.ops.aten
        methods: dict[Any, Callable[..., Any]] = {
            aten.as_strided.default: self.as_strided,
            aten.conv3d.default: self.conv3d,
            aten.clamp.default: self.clamp,
            aten.clamp_min.default: lambda x, low: self.clamp(x, low),
            aten.clamp_max.default: lambda x, high: self.clamp(x, None, high),
            aten.detach.default: self.detach,
            aten.log_sigmoid.default: self.log_sigmoid,
            aten.log1p.default: self.log1p,
            aten.expm1.default: self.expm1,
            aten.logaddexp.default: lambda x, y: self.log_add_exp(x, y, math.e),
            aten.logaddexp2.default: lambda x, y: self.log_add_exp(x, y, 2),
            aten.bernoulli.p: self.bernoulli,
            aten.uniform.default: self.uniform,
            aten._cdist_forward.default: self.cdist,
            aten._adaptive_avg_pool3d.default: self.adaptive_avg_pool3d,
        }
        # The exporter sets an attribute on each function, which a bound method doesn't allow.
        return {operator: functools.wraps(method)(functools.partial(method)) for operator, method in methods.items()}

    def as_strided(self, x: Any, size: Any, stride: Any, storage_offset: int = 0) -> Any:
        """A view of memory as a reshape, if it is contiguous: then it reads its data in order.

        The exporter gathers by computed indices, which no analysis can follow. Pooling channels-last data to one
        position ends in such a view.
        """
        if storage_offset or not _is_contiguous(size, stride):
            return self._library.aten_as_strided(x, size, stride, storage_offset)
        ops = self._ops
        if all(isinstance(d, int) for d in size):
            return ops.Reshape(x, ops.Constant(value_ints=list(size)))
        one = ops.Constant(value_ints=[1])
        sizes = [ops.Constant(value_ints=[d]) if isinstance(d, int) else ops.Reshape(d, one) for d in size]
        return ops.Reshape(x, ops.Concat(*sizes, axis=0))

    def conv3d(self, x: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Any:
        """A convolution whose missing bias is one zero per channel: the exporter's zeros are a matrix."""
        if bias is None:
            bias = self._ops.Expand(self._ops.CastLike(0.0, x), self._ops.Shape(weight, start=0, end=1))
        return self._library.aten_conv3d(x, weight, bias, *args, **kwargs)

    def clamp(self, x: Any, low: Any = None, high: Any = None, **bounds: Any) -> Any:
        """A clamp as a maximum and a minimum: a Clip would look like a hardtanh, whose gradient at a bound is 0."""
        for extreme, bound in ((self._ops.Max, bounds.get("min", low)), (self._ops.Min, bounds.get("max", high))):
            x = x if bound is None else extreme(x, self._ops.CastLike(bound, x))
        return x

    def cdist(self, x: Any, y: Any, p: float = 2.0, *_: Any) -> Any:
        """Distances of all pairs as L1 or L2 norms of differences; the exporter has no translation of them."""
        if p not in (1.0, 2.0):
            raise NotImplementedError(f"cdist with p = {p}")
        ops = self._ops
        rows, columns = ops.Constant(value_ints=[-2]), ops.Constant(value_ints=[-3])
        differences = ops.Sub(ops.Unsqueeze(x, rows), ops.Unsqueeze(y, columns))
        norm = ops.ReduceL1 if p == 1.0 else ops.ReduceL2
        return norm(differences, ops.Constant(value_ints=[-1]), keepdims=0)

    def adaptive_avg_pool3d(self, x: Any, output_size: Any) -> Any:
        """Means over the windows of a volume, which the exporter lacks.

        Windows of equal size are an average pool; others are products with a matrix along each axis.
        """
        ops = self._ops
        sizes = list(zip([int(n) for n in x.shape[2:]], output_size, strict=True))
        if not any(old % new for old, new in sizes):
            windows = [old // new for old, new in sizes]
            return ops.AveragePool(x, kernel_shape=windows, strides=windows)
        # Each product brings the next axis to the end, so that after three the axes are in their order again.
        for old, new in sizes:
            shares = self._torch.zeros(old, new)
            for i in range(new):
                start, end = i * old // new, -(-(i + 1) * old // new)
                shares[start:end, i] = 1 / (end - start)
            matrix = ops.Constant(value=onnx.numpy_helper.from_array(shares.numpy()))
            x = ops.MatMul(ops.Transpose(x, perm=[0, 1, 3, 4, 2]), matrix)
        return x

    def bernoulli(self, x: Any, p: float = 0.5, **_: Any) -> Any:
        """Draws with one probability, which the exporter would compare uniform numbers with: so its mean is known."""
        ops = self._ops
        return ops.Bernoulli(ops.Expand(ops.CastLike(p, x), ops.Shape(x)))

    def uniform(self, x: Any, low: float = 0.0, high: float = 1.0, **_: Any) -> Any:
        """Uniform draws, which the exporter lacks."""
        return self._ops.RandomUniformLike(x, low=low, high=high)

    def log_sigmoid(self, x: Any) -> Any:
        """The logarithm of a sigmoid as −softplus(−x), which stays finite where the sigmoid is 0."""
        return self._ops.Neg(self._ops.Softplus(self._ops.Neg(x)))

    def log1p(self, x: Any) -> Any:
        """log(1 + x), exact also near 0, where 1 + x rounds digits of x away."""
        ops = self._ops
        one = ops.CastLike(1.0, x)
        shifted = ops.Add(one, x)
        rounded = ops.Sub(x, ops.Sub(shifted, one))  # what 1 + x lacks, by which log(1 + x) grows to first order
        divisor = ops.Max(shifted, ops.CastLike(_SMALLEST_NORMAL, x))
        return ops.Add(ops.Log(shifted), ops.Div(rounded, divisor))

    def expm1(self, x: Any) -> Any:
        """e^x − 1, exact also near 0, where the difference has few digits."""
        ops = self._ops
        half, one = ops.CastLike(0.5, x), ops.CastLike(1.0, x)
        power = ops.Exp(x)
        # e^x − 1 = tanh(x/2) · (e^x + 1), which loses no digits near 0.
        near = ops.Mul(ops.Tanh(ops.Mul(half, x)), ops.Add(power, one))
        return ops.Where(ops.Less(ops.Abs(x), half), near, ops.Sub(power, one))

    def log_add_exp(self, x: Any, y: Any, base: float) -> Any:
        """The logarithm of a sum of powers: the larger exponent and log(1 + base^−distance), which stays finite."""
        ops = self._ops
        scale = ops.CastLike(math.log(base), x)
        distance = ops.Mul(scale, ops.Abs(ops.Sub(x, y)))
        apart = ops.Add(ops.Max(x, y), ops.Div(ops.Softplus(ops.Neg(distance)), scale))
        # The distance of two equal infinities is NaN, so equal numbers have a formula of their own.
        mean = ops.Mul(ops.CastLike(0.5, x), ops.Add(x, y))
        equal = ops.Add(mean, ops.CastLike(math.log(2, base), x))
        return ops.Where(ops.Equal(x, y), equal, apart)

    def detach(self, x: Any) -> Any:
        """A Shrink by 0, which returns its input and has a gradient of 0; the exporter would drop the operator."""
        return self._ops.Shrink(x, bias=0.0, lambd=0.0) if x.dtype.is_floating_point() else self._ops.Identity(x)


def _is_contiguous(size: Sequence[Any], stride: Sequence[Any]) -> bool:
    """Whether strides are those of a contiguous array; the first size may be computed."""
    step = 1
    for d, s in reversed(list(zip(size, stride, strict=True))[1:]):
        if not isinstance(d, int) or (d != 1 and s != step):
            return False
        step *= d
    return bool(stride) and isinstance(stride[0], int) and stride[0] == step
