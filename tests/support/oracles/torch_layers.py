"""What the operators of a normalised graph do, in torch: convolutions, pooling, normalisations, recurrent layers."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from support.oracles.torch_operators import Tensor, operator, pad_axes


def _pads(a: Mapping[str, Any], x: Tensor, kernel: list[int]) -> list[tuple[int, int]]:
    """Padding before and after each spatial axis."""
    n = len(kernel)
    strides, dilations = a.get("strides", [1] * n), a.get("dilations", [1] * n)
    automatic = a.get("auto_pad", "NOTSET")
    if automatic in ("SAME_UPPER", "SAME_LOWER"):
        out = []
        for size, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True):
            total = max(0, (-(-size // s) - 1) * s + (k - 1) * d + 1 - size)
            low = total // 2 if automatic == "SAME_UPPER" else total - total // 2
            out.append((low, total - low))
        return out
    pads = [0] * 2 * n if automatic == "VALID" else a.get("pads", [0] * 2 * n)
    return [(pads[i], pads[i + n]) for i in range(n)]


@operator("Conv")
def _conv(a: Mapping[str, Any], x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    function = (functional.conv1d, functional.conv2d, functional.conv3d)[w.ndim - 3]
    n = w.ndim - 2
    x = pad_axes(x, _pads(a, x, list(w.shape[2:])))
    return function(x, w, b, a.get("strides", [1] * n), 0, a.get("dilations", [1] * n), a.get("group", 1))


@operator("ConvTranspose")
def _conv_transpose(a: Mapping[str, Any], x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    function = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[w.ndim - 3]
    n = w.ndim - 2
    out = function(
        x, w, b, a.get("strides", [1] * n), 0, a.get("output_padding", 0), a.get("group", 1), a.get("dilations", 1)
    )
    for i, (low, high) in enumerate(_pads(a, x, list(w.shape[2:]))):
        out = out.narrow(2 + i, low, out.shape[2 + i] - low - high)
    return out


@operator("MaxPool")
def _max_pool(a: Mapping[str, Any], x: Tensor) -> Tensor:
    kernel = a["kernel_shape"]
    function = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[len(kernel) - 1]
    ones = [1] * len(kernel)
    x = pad_axes(x, _pads(a, x, kernel), -math.inf)
    return function(x, kernel, a.get("strides", ones), 0, a.get("dilations", ones), bool(a.get("ceil_mode")))


@operator("AveragePool")
def _average_pool(a: Mapping[str, Any], x: Tensor) -> Tensor:
    kernel = a["kernel_shape"]
    function = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[len(kernel) - 1]
    strides, pads = a.get("strides", [1] * len(kernel)), _pads(a, x, kernel)
    beyond = [(0, 0)] * len(kernel)
    if a.get("ceil_mode"):
        sizes = [n + low + high for n, (low, high) in zip(x.shape[2:], pads, strict=True)]
        beyond = [(0, -(n - k) % s) for n, k, s in zip(sizes, kernel, strides, strict=True)]
    inside = torch.ones(1, 1, *x.shape[2:], dtype=x.dtype)
    inside = pad_axes(inside, pads, 1.0 if a.get("count_include_pad") else 0.0)
    return function(pad_axes(pad_axes(x, pads), beyond), kernel, strides) / function(
        pad_axes(inside, beyond), kernel, strides
    )


@operator("BatchNormalization")
def _batch_norm(a: Mapping[str, Any], x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    if a["_training"]:
        return functional.batch_norm(x, None, None, w, b, True, 0.0, a.get("epsilon", 1e-5))
    return functional.batch_norm(x, mean, var, w, b, False, 0.0, a.get("epsilon", 1e-5))


@operator("LayerNormalization")
def _layer_norm(a: Mapping[str, Any], x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    shape = x.shape[a.get("axis", -1) % x.ndim :]
    return functional.layer_norm(
        x, shape, w.expand(shape), None if b is None else b.expand(shape), a.get("epsilon", 1e-5)
    )


@operator("RMSNormalization")
def _rms_norm(a: Mapping[str, Any], x: Tensor, w: Tensor) -> Tensor:
    axes = tuple(range(a.get("axis", -1) % x.ndim, x.ndim))
    return x * torch.rsqrt(x.square().mean(axes, keepdim=True) + a.get("epsilon", 1e-5)) * w


@operator("GroupNormalization")
def _group_norm(a: Mapping[str, Any], x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return functional.group_norm(x, a["num_groups"], w, b, a.get("epsilon", 1e-5))


@operator("InstanceNormalization")
def _instance_norm(a: Mapping[str, Any], x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return functional.group_norm(x, x.shape[1], w, b, a.get("epsilon", 1e-5))


@operator("DepthToSpace")
def _depth_to_space(a: Mapping[str, Any], x: Tensor) -> Tensor:
    b, (n, c, h, w) = a["blocksize"], x.shape
    if a.get("mode", "DCR") == "DCR":
        return x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // b**2, h * b, w * b)
    return functional.pixel_shuffle(x, b)


@operator("SpaceToDepth")
def _space_to_depth(a: Mapping[str, Any], x: Tensor) -> Tensor:
    b, (n, c, h, w) = a["blocksize"], x.shape
    return x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b * b, h // b, w // b)


@operator("Resize")
def _resize(
    a: Mapping[str, Any],
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Tensor:
    target = [int(n) for n in (sizes if sizes is not None else torch.floor(torch.tensor(x.shape) * scales)).tolist()]
    mode, coordinate_mode = a.get("mode", "nearest"), a.get("coordinate_transformation_mode", "half_pixel")
    if mode == "nearest":
        for axis in range(2, x.ndim):
            n, m = x.shape[axis], target[axis]
            at = torch.arange(m, dtype=torch.float64)
            ratio = m / n if scales is None else float(scales[axis])
            at = (at + 0.5) / ratio - 0.5 if coordinate_mode.endswith("half_pixel") else at / ratio
            rounding = a.get("nearest_mode", "round_prefer_floor")
            at = {"floor": at.floor(), "ceil": at.ceil(), "round_prefer_ceil": (at + 0.5).floor()}.get(
                rounding, (at - 0.5).ceil()
            )
            x = x.index_select(axis, at.to(torch.int64).clamp(0, n - 1))
        return x
    kinds = {("linear", 3): "linear", ("linear", 4): "bilinear", ("linear", 5): "trilinear", ("cubic", 4): "bicubic"}
    return functional.interpolate(
        x, target[2:], mode=kinds[mode, x.ndim], align_corners=coordinate_mode == "align_corners"
    )


@operator("LSTM")
def _lstm(
    a: Mapping[str, Any],
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    *rest: Tensor | None,
) -> tuple[Tensor, ...]:
    steps, batch, _ = x.shape
    hidden = r.shape[2]
    both, last_h, last_c = [], [], []
    for d in range(w.shape[0]):
        bias = 0 if b is None else b[d].reshape(2, -1).sum(0)
        h = x.new_zeros(batch, hidden) if h0 is None else h0[d]
        c = x.new_zeros(batch, hidden) if c0 is None else c0[d]
        out: list[Tensor] = [h] * steps
        for t in _order(a, d, steps):
            i, o, f, g = (x[t] @ w[d].T + h @ r[d].T + bias).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            out[t] = h
        both.append(torch.stack(out))
        last_h.append(h)
        last_c.append(c)
    return torch.stack(both, 1), torch.stack(last_h), torch.stack(last_c)


@operator("GRU")
def _gru(
    a: Mapping[str, Any],
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h0: Tensor | None = None,
) -> tuple[Tensor, ...]:
    if not a.get("linear_before_reset"):
        raise NotImplementedError("GRU with the reset before the product")
    steps, batch, _ = x.shape
    hidden = r.shape[2]
    both, last = [], []
    for d in range(w.shape[0]):
        first, second = (0, 0) if b is None else b[d].reshape(2, -1)
        h = x.new_zeros(batch, hidden) if h0 is None else h0[d]
        out: list[Tensor] = [h] * steps
        for t in _order(a, d, steps):
            u, v = (x[t] @ w[d].T + first).chunk(3, 1), (h @ r[d].T + second).chunk(3, 1)
            z, reset = torch.sigmoid(u[0] + v[0]), torch.sigmoid(u[1] + v[1])
            h = (1 - z) * torch.tanh(u[2] + reset * v[2]) + z * h
            out[t] = h
        both.append(torch.stack(out))
        last.append(h)
    return torch.stack(both, 1), torch.stack(last)


def _order(a: Mapping[str, Any], direction: int, steps: int) -> range:
    backwards = direction == 1 or a.get("direction", "forward") == "reverse"
    return range(steps)[::-1] if backwards else range(steps)
