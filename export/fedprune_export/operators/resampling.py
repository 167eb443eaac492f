"""Resizing of maps, sampling at computed positions, and exchange of space and channels.

Every way of resizing is linear along each axis on its own, so its gradient is a product with the transposed matrix of
each axis. The matrices are measured by running the operator on unit vectors, so they are right for every mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from fedprune.core.errors import ModelError
from fedprune_export.autodiff.tape import Dim, Pull, Shape, Tape, describe, gradient_rule
from fedprune_export.channels.atoms import AtomRow, fixed_row
from fedprune_export.channels.rule import Channels, channel_rule
from fedprune_export.ir.axis_matrix import Matrix, axis_matrix
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.operators.indexing import index_range


@channel_rule("Resize", "Upsample", "GridSample")
def resample_channels(channels: Channels, node: Node) -> None:
    """Batch and channels pass; spatial axes stay."""
    x = channels.input_rows(node, 0)
    channels.fix_inputs(node, 1)
    shape = channels.shape(node.outputs[0])
    resized = node.op == "Resize" and node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    passed = [i < 2 and not resized and row.size == n for i, (row, n) in enumerate(zip(x, shape, strict=True))]
    channels.fix([row for row, passes in zip(x, passed, strict=True) if not passes])
    rows = [row if passes else fixed_row(n) for row, n, passes in zip(x, shape, passed, strict=True)]
    channels.set_output(node, rows)


@channel_rule("DepthToSpace")
def depth_to_space_channels(channels: Channels, node: Node) -> None:
    """Tie the input channels of which an output channel is made: neighbours (CRD), or one of each part (DCR)."""
    x = channels.input_rows(node, 0)
    times = int(node.attrs["blocksize"]) ** 2
    channels.fix(x[2:])
    # CRD: the blocks of a channel lie side by side; DCR: all channels once per position.
    crd = node.attrs.get("mode", "DCR") == "CRD"
    blocks = x[1].reshape(-1, times) if crd else x[1].reshape(times, -1).T
    channels.atoms.tie(blocks, blocks[:, :1])
    _set_spatial_output(channels, node, blocks[:, 0])


@channel_rule("SpaceToDepth")
def space_to_depth_channels(channels: Channels, node: Node) -> None:
    """The output has all channels once for every position of a block."""
    x = channels.input_rows(node, 0)
    channels.fix(x[2:])
    _set_spatial_output(channels, node, np.tile(x[1], int(node.attrs["blocksize"]) ** 2))


def _set_spatial_output(channels: Channels, node: Node, row: AtomRow) -> None:
    shape: Sequence[int] = channels.shape(node.outputs[0])
    channels.set_output(node, [fixed_row(shape[0]), row, *(fixed_row(n) for n in shape[2:])])


@gradient_rule("Resize")
def resize(tape: Tape, node: Node) -> Pull:
    """Nearest, linear and cubic resizing of axes whose size is fixed.

    Raises `ModelError` if a region is cropped, or the batch or channels are resized.
    """
    name = node.inputs[0]
    x, shape, g = tape.value(name), tape.shape(name), tape.graph
    if node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise ModelError(f"{describe(node)} crops a region", expected="resizing of the whole map")
    scales, sizes = tape.required_constant(node, 2), tape.target_shape(node, 3)
    scales = scales if scales is not None and scales.size else None
    matrices: dict[int, Matrix] = {}
    for axis in range(len(shape)):
        factor = float(scales[axis]) if scales is not None else None
        target_size = int(sizes[axis]) if sizes is not None else 0
        # Axes that keep their size need no matrix, also those of a width that varies.
        if factor == 1 or (factor is None and target_size in (0, tape.extent(shape[axis]))):
            continue
        (size,) = tape.static(node, shape[axis : axis + 1])
        matrices[axis] = axis_matrix(node.attrs, size, factor, target_size)
    out: Shape = tuple(matrices[a].shape[0] if a in matrices else d for a, d in enumerate(shape))
    amounts = ["", g.constant(scales, np.float32)] if scales is not None else ["", "", tape.sizes(out)]
    tape.enter(node.outputs[0], g.emit("Resize", x, *amounts, attrs=node.attrs), out)

    def pull(dy: str) -> None:
        tape.add_gradient(name, _resize_gradient(tape, dy, out, shape, matrices))

    return pull


def _resize_gradient(tape: Tape, dy: str, out: Shape, shape: Shape, matrices: dict[int, Matrix]) -> str:
    """The gradient of the resized input: each axis multiplied by its transposed matrix."""
    g, rank = tape.graph, len(shape)
    repeats = [_repeats(matrices[a]) if a in matrices else 1 for a in range(2, rank)]
    if rank > 2 and not {0, 1} & set(matrices) and all(repeats):
        # Integer upsampling by repetition: a pooling sums each block.
        window = {"kernel_shape": repeats, "strides": repeats}
        return g.emit("Mul", g.emit("AveragePool", dy, attrs=window), g.scalar(float(np.prod(repeats))))
    value, sizes = dy, list(out)
    # Axes that the gradient shrinks most come first, so that later products are smaller.
    for axis, matrix in sorted(matrices.items(), key=lambda item: item[1].shape[1] / item[1].shape[0]):
        before, after = tape.product(sizes[:axis]), tape.product(sizes[axis + 1 :])
        tall: Shape = (before, sizes[axis], after)
        value = tape.reshape(value, tuple(sizes), tall if after != 1 else tall[:2])
        sizes[axis] = matrix.shape[1]
        if after == 1:
            value = g.emit("MatMul", value, g.constant(matrix, np.float32))
            value = tape.reshape(value, (before, sizes[axis]), tuple(sizes))
        else:
            value = g.emit("MatMul", g.constant(matrix.T, np.float32), value)
            value = tape.reshape(value, (before, sizes[axis], after), tuple(sizes))
    return value


def _repeats(matrix: Matrix) -> int:
    """The repetition factor if the matrix repeats every position equally often; else 0."""
    times, rest = divmod(matrix.shape[0], matrix.shape[1])
    same = not rest and np.array_equal(matrix, np.repeat(np.eye(matrix.shape[1], dtype=np.float32), times, axis=0))
    return times if same else 0


@gradient_rule("DepthToSpace", "SpaceToDepth")
def space_and_depth(tape: Tape, node: Node) -> Pull:
    """Moves blocks of channels to spatial blocks, or the reverse; each is the other's gradient."""
    name = node.inputs[0]
    x, shape, g = tape.value(name), tape.shape(name), tape.graph
    size, deep = int(node.attrs["blocksize"]), node.op == "SpaceToDepth"
    height, width = tape.static(node, shape[2:])
    if deep:
        out: Shape = (shape[0], tape.product([shape[1], size * size]), height // size, width // size)
    else:
        channels: Dim | None = tape.quotient(shape[1], size * size)
        if channels is None:
            raise ModelError(f"{describe(node)}: its blocks of channels are cut unevenly", got=shape[1])
        out = (shape[0], channels, height * size, width * size)
    tape.enter(node.outputs[0], g.emit(node.op, x, attrs=node.attrs), out)

    def pull(dy: str) -> None:
        if deep:
            dx = g.emit("DepthToSpace", dy, attrs={"blocksize": size})
        elif node.attrs.get("mode", "DCR") == "DCR":
            dx = g.emit("SpaceToDepth", dy, attrs={"blocksize": size})
        else:
            apart = g.emit("Reshape", dy, g.ints(0, 0, height, size, width, size))
            apart = g.emit("Transpose", apart, attrs={"perm": [0, 1, 3, 5, 2, 4]})
            dx = g.emit("Reshape", apart, g.ints(0, -1, height, width))
        tape.add_gradient(name, dx)

    return pull


@gradient_rule("GridSample")
def grid_sample(tape: Tape, node: Node) -> Pull:
    """Bilinear or nearest samples of maps. dy goes back to the sampled pixels, and to the grid if bilinear.

    Raises `ModelError` if samples are cubic or of volumes, or positions outside of a map are reflected into it.
    """
    name, grid = node.inputs
    x, positions, g = tape.value(name), tape.value(grid), tape.graph
    shape, grid_shape = tape.shape(name), tape.shape(grid)
    mode, padding = str(node.attrs.get("mode", "bilinear")), str(node.attrs.get("padding_mode", "zeros"))
    for what, value, supported in (("mode", mode, ["bilinear", "nearest"]), ("padding", padding, ["zeros", "border"])):
        if value not in supported:
            raise ModelError(f"{describe(node)}: {what}", expected=supported, got=value)
    if len(shape) != 4:
        raise ModelError(f"{describe(node)}: what it samples", expected="maps [N, C, H, W]", got=list(shape))
    height, width = tape.static(node, shape[2:])
    tape.static(node, grid_shape[1:])
    out = (*shape[:2], *grid_shape[1:3])
    tape.enter(node.outputs[0], g.emit("GridSample", x, positions, attrs=node.attrs), out)
    rows, maps = tape.product(grid_shape[:3]), tape.product([shape[0], height * width])

    def by_row(value: str, dims: tuple[int | str, ...]) -> str:
        """Maps [N, C, H, W] as rows [N·H·W, C]."""
        last = g.emit("Transpose", value, attrs={"perm": [0, 2, 3, 1]})
        return tape.reshape(last, (dims[0], dims[2], dims[3], dims[1]), (tape.product([dims[0], *dims[2:]]), dims[1]))

    def pull(dy: str) -> None:
        flat = tape.reshape(positions, grid_shape, (rows, 2))
        across, down = g.emit_many("Split", flat, g.ints(1, 1), outputs=2, attrs={"axis": 1})
        aligned = bool(node.attrs.get("align_corners", 0))
        axis_ends = [_neighbours(g, c, n, mode, padding, aligned) for c, n in ((down, height), (across, width))]
        # Maps are flattened to one row per pixel: a sample's pixels begin at the row where its map does.
        offsets = g.emit("Mul", index_range(tape, shape[0]), g.ints(height * width))
        sample_offsets = g.emit(
            "Expand", g.emit("Unsqueeze", offsets, g.ints(1)), tape.sizes([1, tape.product(grid_shape[1:3])])
        )
        sample_offsets = tape.reshape(sample_offsets, (shape[0], tape.product(grid_shape[1:3])), (rows, 1))
        corners = list(product(*axis_ends))
        corner_indices = [
            g.emit("Add", sample_offsets, g.emit("Add", g.emit("Mul", row.index, g.ints(width)), column.index))
            for row, column in corners
        ]
        slopes = by_row(dy, out)
        if tape.needs_gradient(name):
            shares = [g.emit("Mul", slopes, g.emit("Mul", row.weight, column.weight)) for row, column in corners]
            indices, added = (
                g.emit("Concat", *v, attrs={"axis": 0}) if len(v) > 1 else v[0] for v in (corner_indices, shares)
            )
            zeros = g.emit("ConstantOfShape", tape.sizes([maps, shape[1]]))
            total = g.emit("ScatterND", zeros, indices, added, attrs={"reduction": "add"})
            total = tape.reshape(total, (maps, shape[1]), (shape[0], height, width, shape[1]))
            tape.add_gradient(name, g.emit("Transpose", total, attrs={"perm": [0, 3, 1, 2]}))
        if tape.needs_gradient(grid) and mode == "bilinear":
            values, dgrid = by_row(x, shape), ["", ""]
            for (row, column), indices in zip(corners, corner_indices, strict=True):
                value = g.emit("Gather", values, g.emit("Squeeze", indices, g.ints(1)), attrs={"axis": 0})
                product_sum = g.emit("ReduceSum", g.emit("Mul", slopes, value), g.ints(1), attrs={"keepdims": 1})
                for direction, factor in enumerate(
                    (g.emit("Mul", row.weight, column.slope), g.emit("Mul", row.slope, column.weight))
                ):
                    change = g.emit("Mul", product_sum, factor)
                    dgrid[direction] = g.emit("Add", dgrid[direction], change) if dgrid[direction] else change
            tape.add_gradient(grid, tape.reshape(g.emit("Concat", *dgrid, attrs={"axis": 1}), (rows, 2), grid_shape))

    return pull


@dataclass(frozen=True)
class _Neighbour:
    """One of the neighbours of samples along an axis."""

    index: str  # its index, moved into the map if it lies outside
    weight: str  # its share of the sample, 0 outside of the map
    slope: str  # the derivative of the weight with respect to the grid


def _neighbours(g: Graph, coordinate: str, size: int, mode: str, padding: str, aligned: bool) -> list[_Neighbour]:
    """The neighbours of samples along an axis with ends at −1 and 1: centres of pixels if `aligned`, else edges."""
    scale = (size - 1) / 2 if aligned else size / 2
    # In the order of onnxruntime and torch, so that a sample near a pixel's centre is on the same side of it.
    position = g.emit("Mul", g.emit("Add", coordinate, g.scalar(1)), g.scalar(scale))
    if not aligned:
        position = g.emit("Sub", position, g.scalar(0.5))
    slope = g.scalar(scale)
    if padding == "border":
        is_within = _both_hold(
            g, g.emit("Greater", position, g.scalar(0)), g.emit("Less", position, g.scalar(size - 1))
        )
        slope = g.emit("Mul", is_within, slope)
        position = g.emit("Clip", position, g.scalar(0), g.scalar(size - 1))
    if mode == "nearest":
        return [_neighbour(g, g.emit("Round", position), size, g.scalar(1), "")]
    low = g.emit("Floor", position)
    share = g.emit("Sub", position, low)
    return [
        _neighbour(g, low, size, g.emit("Sub", g.scalar(1), share), g.emit("Neg", slope)),
        _neighbour(g, g.emit("Add", low, g.scalar(1)), size, share, slope),
    ]


def _neighbour(g: Graph, position: str, size: int, weight: str, slope: str) -> _Neighbour:
    is_inside = _both_hold(
        g, g.emit("Greater", position, g.scalar(-0.5)), g.emit("Less", position, g.scalar(size - 0.5))
    )
    # 7 is int64. A neighbour outside the map is moved into it and has weight 0.
    index = g.emit("Cast", g.emit("Clip", position, g.scalar(0), g.scalar(size - 1)), attrs={"to": 7})
    return _Neighbour(index, g.emit("Mul", weight, is_inside), g.emit("Mul", slope, is_inside) if slope else "")


def _both_hold(g: Graph, first: str, second: str) -> str:
    """1 where both hold, else 0."""
    return g.emit("Cast", g.emit("And", first, second), attrs={"to": 1})
