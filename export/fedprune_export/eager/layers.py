"""Operators with windows and normalisations: convolutions, poolings, resizing, norms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional

from fedprune_export.autodiff.rules.resampling import axis_matrix
from fedprune_export.eager.context import Context, Tensor, numbers, operator, unsupported
from fedprune_export.ir.graph import Node

_CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)
_TRANSPOSED = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)
_MAXIMA = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)
_AVERAGES = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)


def _sides(node: Node, sizes: Sequence[int], kernel: Sequence[int]) -> list[tuple[int, int]]:
    """Padding before and after each spatial axis."""
    rank = len(kernel)
    mode = str(node.attrs.get("auto_pad", "NOTSET"))
    if mode == "NOTSET":
        flat = [int(p) for p in node.attrs.get("pads", [0] * 2 * rank)]
        return list(zip(flat[:rank], flat[rank:], strict=True))
    if mode == "VALID":
        return [(0, 0)] * rank
    out = []
    strides, dilations = node.attrs.get("strides", [1] * rank), node.attrs.get("dilations", [1] * rank)
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max(0, (math.ceil(size / stride) - 1) * stride + dilation * (k - 1) + 1 - size)
        less, more = total // 2, total - total // 2
        out.append((less, more) if mode == "SAME_UPPER" else (more, less))
    return out


def _padded(x: Tensor, sides: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    if not any(map(any, sides)):
        return x
    return functional.pad(x, [n for pair in reversed(list(sides)) for n in pair], value=value)


@operator("Conv")
def _convolve(run: Context, node: Node, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    rank = w.ndim - 2
    sides = _sides(node, x.shape[2:], w.shape[2:])
    pads = [before for before, _ in sides]
    if any(before != after for before, after in sides):
        x, pads = _padded(x, sides), [0] * rank
    return _CONVOLUTIONS[rank - 1](
        x,
        w,
        b,
        node.attrs.get("strides", [1] * rank),
        pads,
        node.attrs.get("dilations", [1] * rank),
        int(node.attrs.get("group", 1)),
    )


@operator("ConvTranspose")
def _convolve_back(run: Context, node: Node, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    rank = w.ndim - 2
    if node.attrs.get("auto_pad", "NOTSET") != "NOTSET" or node.attrs.get("output_shape"):
        raise unsupported(node, "padding that follows from the output's size")
    sides, more = _sides(node, x.shape[2:], w.shape[2:]), node.attrs.get("output_padding", [0] * rank)
    out = _TRANSPOSED[rank - 1](
        x,
        w,
        b,
        node.attrs.get("strides", [1] * rank),
        0,
        more,
        int(node.attrs.get("group", 1)),
        node.attrs.get("dilations", [1] * rank),
    )
    for axis, (before, after) in enumerate(sides, 2):
        out = out.narrow(axis, before, out.shape[axis] - before - after)
    return out


class _Window:
    """A pooling's window over a map.

    Attributes:
        kernel: Its sizes.
        strides: Its steps.
        dilations: Steps inside it.
        sides: Padding before and after, per axis, as the node says.
        beyond: What a size that is rounded up adds after that.
    """

    def __init__(self, node: Node, x: Tensor) -> None:
        self.kernel = [int(k) for k in node.attrs["kernel_shape"]]
        rank = len(self.kernel)
        self.strides = [int(s) for s in node.attrs.get("strides", [1] * rank)]
        self.dilations = [int(d) for d in node.attrs.get("dilations", [1] * rank)]
        self.sides = _sides(node, x.shape[2:], self.kernel)
        self.beyond = [(0, 0)] * rank
        if not node.attrs.get("ceil_mode"):
            return
        for i, (before, after) in enumerate(self.sides):
            size, stride = x.shape[2 + i], self.strides[i]
            room = size + before + after - (self.dilations[i] * (self.kernel[i] - 1) + 1)
            # One window more, if it starts inside the map or the padding before it.
            if room % stride and (room // stride + 1) * stride < size + before:
                self.beyond[i] = (0, stride - room % stride)

    @property
    def plain(self) -> bool:
        """Whether there is no padding at all."""
        return not any(map(any, (*self.sides, *self.beyond)))

    def widened(self, x: Tensor, value: float) -> Tensor:
        """The map with all its padding."""
        return _padded(_padded(x, self.sides, value), self.beyond, value)


@operator("MaxPool")
def _max_pool(run: Context, node: Node, x: Tensor) -> Tensor:
    if len(node.outputs) > 1 and node.outputs[1]:
        raise unsupported(node, "indices of a pooling")
    window = _Window(node, x)
    wide = window.widened(x, -math.inf)
    out: Tensor = _MAXIMA[len(window.kernel) - 1](wide, window.kernel, window.strides, 0, window.dilations)
    return out


@operator("AveragePool")
def _average_pool(run: Context, node: Node, x: Tensor) -> Tensor:
    window = _Window(node, x)
    if any(d != 1 for d in window.dilations):
        raise unsupported(node, "dilation of an average")
    average = _AVERAGES[len(window.kernel) - 1]
    out: Tensor = average(window.widened(x, 0.0), window.kernel, window.strides)
    if window.plain:
        return out
    counted = torch.ones((1, 1, *x.shape[2:]), device=x.device)
    counted = _padded(counted, window.sides, 1.0 if node.attrs.get("count_include_pad") else 0.0)
    return out / average(_padded(counted, window.beyond), window.kernel, window.strides)


@operator("LpPool")
def _norm_pool(run: Context, node: Node, x: Tensor) -> Tensor:
    window, power = _Window(node, x), int(node.attrs.get("p", 2))
    if any(map(any, window.beyond)) or any(d != 1 for d in window.dilations):
        raise unsupported(node, "dilation or a rounded-up size")
    average = _AVERAGES[len(window.kernel) - 1]
    mean = average(window.widened(x.abs() ** power, 0.0), window.kernel, window.strides)
    total = mean * math.prod(window.kernel)
    return total if power == 1 else _root(total, power)


def _root(total: Tensor, power: int) -> Tensor:
    """The root, whose gradient at 0 is taken to be 0."""
    positive = total > 0
    return torch.where(positive, torch.where(positive, total, torch.ones_like(total)) ** (1 / power), total)


@operator("GlobalAveragePool")
def _global_average(run: Context, node: Node, x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


@operator("GlobalMaxPool")
def _global_maximum(run: Context, node: Node, x: Tensor) -> Tensor:
    # The first of equal values gets the gradient, unlike with amax.
    return x.flatten(2).max(2).values.reshape((*x.shape[:2], *[1] * (x.ndim - 2)))


@operator("GlobalLpPool")
def _global_norm(run: Context, node: Node, x: Tensor) -> Tensor:
    power = int(node.attrs.get("p", 2))
    total = (x.abs() ** power).sum(tuple(range(2, x.ndim)), keepdim=True)
    return total if power == 1 else _root(total, power)


@operator("Resize")
def _resize(
    run: Context,
    node: Node,
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Tensor:
    """Every way of resizing is linear along each axis, so it is a product with a matrix, or a choice of places."""
    if node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise unsupported(node, "a cropped region")
    factors = numbers(scales) if scales is not None and scales.numel() else None
    wanted = numbers(sizes) if factors is None and sizes is not None else [0] * x.ndim
    for axis in range(x.ndim):
        factor = None if factors is None else float(factors[axis])
        if factor == 1 or (factor is None and wanted[axis] in (0, x.shape[axis])):
            continue
        matrix = torch.from_numpy(axis_matrix(node, x.shape[axis], factor, wanted[axis])).to(x.device)
        place = matrix.argmax(1)
        if bool((matrix.sum(1) == 1).all()) and bool((matrix.max(1).values == 1).all()):
            x = x.index_select(axis, place)
        else:
            x = torch.movedim(functional.linear(torch.movedim(x, axis, -1), matrix), -1, axis)
    return x


@operator("BatchNormalization")
def _batch_norm(run: Context, node: Node, x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """By the batch in training, which is measured; by the statistics as they are at inference, and where they don't
    move."""
    epsilon = float(node.attrs.get("epsilon", 1e-5))
    mean_name, var_name = node.inputs[3:5]
    if not run.training or mean_name not in run.moving or var_name not in run.moving:
        if not {mean_name, var_name} <= run.statistics:  # the graph computes them, so that a gradient passes
            column = [1, -1] + [1] * (x.ndim - 2)
            scale = w * torch.rsqrt(var + epsilon)
            return x * scale.reshape(column) + (b - mean * scale).reshape(column)
        return functional.batch_norm(x, mean, var, w, b, False, 0.0, epsilon)
    axes = (0, *range(2, x.ndim))
    area = math.prod(x.shape[2:])
    if run.present is None:
        count = x.shape[0] * area
        # A momentum of 1 leaves the batch's own statistics, with the unbiased variance.
        batch_mean, batch_var = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1])
        out = torch.batch_norm(x, w, b, batch_mean, batch_var, True, 1.0, epsilon, x.is_cuda)
        run.measured[mean_name] = batch_mean
        run.measured[var_name] = batch_var if count > 1 else torch.zeros_like(batch_var)
        return out
    column = [1, -1] + [1] * (x.ndim - 2)
    there = run.present.reshape([-1] + [1] * (x.ndim - 1))
    total = run.present.sum() * area
    centre = (x * there).sum(axes) / total
    centred = x - centre.reshape(column)
    spread = (centred.square() * there).sum(axes) / total
    run.measured[mean_name] = centre.detach()
    run.measured[var_name] = (spread * (total / (total - 1).clamp(min=1))).detach()
    return centred * (w * torch.rsqrt(spread + epsilon)).reshape(column) + b.reshape(column)


@operator("LayerNormalization")
def _layer_norm(run: Context, node: Node, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    shape = x.shape[int(node.attrs.get("axis", -1)) % x.ndim :]
    bias = None if b is None else b.expand(shape)
    return functional.layer_norm(x, shape, w.expand(shape), bias, float(node.attrs.get("epsilon", 1e-5)))


@operator("RMSNormalization")
def _rms_norm(run: Context, node: Node, x: Tensor, w: Tensor) -> Tensor:
    axes = tuple(range(int(node.attrs.get("axis", -1)) % x.ndim, x.ndim))
    size = x.square().mean(axes, keepdim=True) + float(node.attrs.get("epsilon", 1e-5))
    return x * torch.rsqrt(size) * w


@operator("GroupNormalization")
def _group_norm(run: Context, node: Node, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return functional.group_norm(x, int(node.attrs["num_groups"]), w, b, float(node.attrs.get("epsilon", 1e-5)))


@operator("InstanceNormalization")
def _instance_norm(run: Context, node: Node, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return functional.group_norm(x, x.shape[1], w, b, float(node.attrs.get("epsilon", 1e-5)))


@operator("LRN")
def _local_norm(run: Context, node: Node, x: Tensor) -> Tensor:
    size = int(node.attrs["size"])
    around = functional.pad(x.square().movedim(1, -1), [(size - 1) // 2, size - 1 - (size - 1) // 2])
    total = around.unfold(-1, size, 1).sum(-1).movedim(-1, 1)
    alpha, beta = float(node.attrs.get("alpha", 1e-4)), float(node.attrs.get("beta", 0.75))
    return x / (float(node.attrs.get("bias", 1.0)) + alpha / size * total) ** beta
