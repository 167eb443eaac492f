"""Operators that move elements, and those that compute shapes.

Shapes are vectors on the CPU, wherever the data is.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from fedprune_export.eager.arithmetic import together
from fedprune_export.eager.context import Context, Tensor, numbers, operator, unsupported
from fedprune_export.ir.graph import Node


@operator("Shape")
def _shape(run: Context, node: Node, x: Tensor) -> Tensor:
    return torch.tensor(list(x.shape)[node.attrs.get("start", 0) : node.attrs.get("end")], dtype=torch.int64)


@operator("ConstantOfShape")
def _filled(run: Context, node: Node, shape: Tensor) -> Tensor:
    value = torch.from_numpy(np.atleast_1d(np.array(node.attrs.get("value", np.zeros(1, np.float32)))))
    if value.is_floating_point():
        value = value.to(torch.float32)
    return value.reshape(()).expand(numbers(shape)).clone()


@operator("Range")
def _range(run: Context, node: Node, start: Tensor, stop: Tensor, step: Tensor) -> Tensor:
    return torch.arange(start.item(), stop.item(), step.item(), dtype=start.dtype)


@operator("Reshape")
def _reshape(run: Context, node: Node, x: Tensor, target: Tensor) -> Tensor:
    sizes = numbers(target)
    if not node.attrs.get("allowzero"):
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return x.reshape(sizes)


@operator("Flatten")
def _flatten(run: Context, node: Node, x: Tensor) -> Tensor:
    axis = int(node.attrs.get("axis", 1))
    axis += x.ndim if axis < 0 else 0
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@operator("Squeeze")
def _squeeze(run: Context, node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    named = [i for i, n in enumerate(x.shape) if n == 1] if axes is None else [a % x.ndim for a in numbers(axes)]
    return x.reshape([n for i, n in enumerate(x.shape) if i not in named])


@operator("Unsqueeze")
def _unsqueeze(run: Context, node: Node, x: Tensor, axes: Tensor) -> Tensor:
    rank = x.ndim + axes.numel()
    added = {a % rank for a in numbers(axes)}
    sizes = iter(x.shape)
    return x.reshape([1 if i in added else next(sizes) for i in range(rank)])


@operator("Transpose")
def _transpose(run: Context, node: Node, x: Tensor) -> Tensor:
    return x.permute(node.attrs.get("perm", list(range(x.ndim))[::-1]))


@operator("Concat")
def _concat(run: Context, node: Node, *values: Tensor) -> Tensor:
    return torch.cat(together(*values), int(node.attrs["axis"]))


@operator("Split")
def _split(run: Context, node: Node, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = int(node.attrs.get("axis", 0))
    if sizes is not None:
        return torch.split(x, numbers(sizes), axis)
    return torch.split(x, -(-x.shape[axis] // len(node.outputs)), axis)


@operator("Slice")
def _slice(
    run: Context,
    node: Node,
    x: Tensor,
    starts: Tensor,
    stops: Tensor,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    first, last = numbers(starts), numbers(stops)
    which = list(range(len(first))) if axes is None else [a % x.ndim for a in numbers(axes)]
    strides = [1] * len(first) if steps is None else numbers(steps)
    for axis, start, stop, stride in zip(which, first, last, strides, strict=True):
        size = x.shape[axis]
        if stride > 0:
            taken = range(*slice(start, stop, stride).indices(size))
        else:
            # Python reads a negative stop from the end; before the first element there is none.
            taken = range(*slice(start, None if stop < -size else stop, stride).indices(size))
        if stride == 1:
            x = x.narrow(axis, taken.start if len(taken) else 0, len(taken))
        else:
            x = x.index_select(axis, torch.tensor(list(taken), dtype=torch.int64, device=x.device))
    return x


def _places(indices: Tensor, size: int, like: Tensor) -> Tensor:
    """Indices of which negative ones count from the end, where the data is."""
    indices = indices.to(like.device)
    return torch.where(indices < 0, indices + size, indices)


@operator("Gather")
def _gather(run: Context, node: Node, x: Tensor, indices: Tensor) -> Tensor:
    axis = int(node.attrs.get("axis", 0)) % x.ndim
    places = _places(indices.to(torch.int64), x.shape[axis], x)
    if x.ndim == 2 and axis == 0 and x.is_floating_point():
        return torch.nn.functional.embedding(places, x)
    return x.index_select(axis, places.reshape(-1)).reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


@operator("GatherElements")
def _gather_elements(run: Context, node: Node, x: Tensor, indices: Tensor) -> Tensor:
    axis = int(node.attrs.get("axis", 0))
    return x.gather(axis, _places(indices, x.shape[axis], x))


@operator("GatherND")
def _gather_nd(run: Context, node: Node, x: Tensor, indices: Tensor) -> Tensor:
    if node.attrs.get("batch_dims", 0):
        raise unsupported(node, "batch_dims")
    return x[tuple(_places(part, x.shape[i], x) for i, part in enumerate(indices.unbind(-1)))]


@operator("ScatterElements")
def _scatter_elements(run: Context, node: Node, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    if node.attrs.get("reduction", "none") != "none":
        raise unsupported(node, f"reduction {node.attrs['reduction']!r}")
    axis = int(node.attrs.get("axis", 0))
    return x.scatter(axis, _places(indices, x.shape[axis], x), updates)


@operator("ScatterND")
def _scatter_nd(run: Context, node: Node, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    if node.attrs.get("reduction", "none") != "none":
        raise unsupported(node, f"reduction {node.attrs['reduction']!r}")
    places = tuple(_places(part, x.shape[i], x) for i, part in enumerate(indices.unbind(-1)))
    return x.index_put(places, updates)


@operator("OneHot")
def _one_hot(run: Context, node: Node, indices: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    count, rank = int(depth.reshape(()).item()), indices.ndim + 1
    axis = int(node.attrs.get("axis", -1)) % rank
    off, on = values.to(indices.device).unbind(0)
    shape = [1] * rank
    shape[axis] = count
    places = torch.arange(count, device=indices.device).reshape(shape)
    return torch.where(_places(indices.to(torch.int64), count, indices).unsqueeze(axis) == places, on, off)


@operator("TopK")
def _top(run: Context, node: Node, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    found = torch.topk(
        x, int(k.reshape(()).item()), int(node.attrs.get("axis", -1)), bool(node.attrs.get("largest", 1))
    )
    return found.values, found.indices


@operator("Expand")
def _expand(run: Context, node: Node, x: Tensor, shape: Tensor) -> Tensor:
    wanted = numbers(shape)
    lead = [1] * (len(wanted) - x.ndim)
    own = [1] * (x.ndim - len(wanted)) + wanted
    return x.expand([n if size == 1 else size for size, n in zip([*lead, *x.shape], own, strict=True)])


@operator("Tile")
def _tile(run: Context, node: Node, x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(numbers(repeats))


@operator("Trilu")
def _triangle(run: Context, node: Node, x: Tensor, k: Tensor | None = None) -> Tensor:
    diagonal = 0 if k is None else int(k.item())
    return torch.triu(x, diagonal) if node.attrs.get("upper", 1) else torch.tril(x, diagonal)


@operator("Pad")
def _pad(
    run: Context, node: Node, x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    amounts, mode = numbers(pads), str(node.attrs.get("mode", "constant"))
    which = list(range(x.ndim)) if axes is None else [a % x.ndim for a in numbers(axes)]
    for i, axis in enumerate(which):
        before, after, size = amounts[i], amounts[i + len(which)], x.shape[axis]
        if not before and not after:
            continue
        if mode == "constant":
            # torch wants pairs from the last axis on.
            sides = [0] * (2 * (x.ndim - axis - 1)) + [before, after]
            x = torch.nn.functional.pad(x, sides, value=0.0 if value is None else value.item())
            continue
        at = np.arange(-before, size + after)
        if mode == "edge":
            at = at.clip(0, size - 1)
        elif mode == "wrap":
            at = at % size
        elif mode == "reflect":
            at = np.abs(at)
            at = np.where(at >= size, 2 * (size - 1) - at, at)
        else:
            raise unsupported(node, f"mode {mode!r}")
        x = x.index_select(axis, torch.from_numpy(at).to(x.device))
    return x


@operator("DepthToSpace")
def _depth_to_space(run: Context, node: Node, x: Tensor) -> Tensor:
    size, (n, c, h, w) = int(node.attrs["blocksize"]), x.shape
    if node.attrs.get("mode", "DCR") == "CRD":
        return torch.nn.functional.pixel_shuffle(x, size)
    depth = c // size**2
    parts = x.reshape(n, size, size, depth, h, w)
    return parts.permute(0, 3, 4, 1, 5, 2).reshape(n, depth, h * size, w * size)


@operator("SpaceToDepth")
def _space_to_depth(run: Context, node: Node, x: Tensor) -> Tensor:
    size, (n, c, h, w) = int(node.attrs["blocksize"]), x.shape
    parts = x.reshape(n, c, h // size, size, w // size, size)
    return parts.permute(0, 3, 5, 1, 2, 4).reshape(n, c * size**2, h // size, w // size)
