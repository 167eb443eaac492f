"""Resize and Upsample, and the exchange of space and channels (DepthToSpace, SpaceToDepth).

Every way of resizing is linear along each axis on its own, so its gradient is a product with the transposed matrix of
each axis. The matrices are measured by running the operator on unit vectors, so they are right for every mode.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedprune.core.errors import ModelError
from fedprune_export.autodiff.tape import Dim, Pull, Shape, Tape, describe, gradient_rule
from fedprune_export.channels.atoms import AtomRow, fixed_row
from fedprune_export.channels.rule import Channels, channel_rule
from fedprune_export.ir.axis_matrix import Matrix, axis_matrix
from fedprune_export.ir.graph import Node


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
    scales, sizes = tape.required_constant(node, 2), tape.size_input(node, 3)
    scales = scales if scales is not None and scales.size else None
    matrices: dict[int, Matrix] = {}
    for axis in range(len(shape)):
        factor = float(scales[axis]) if scales is not None else None
        target_size = tape.extent(sizes[axis]) if sizes is not None else 0
        # Axes that keep their size need no matrix, also those of a width that varies.
        if factor == 1 or (factor is None and target_size in (0, tape.extent(shape[axis]))):
            continue
        (size,) = tape.static(node, shape[axis : axis + 1])
        matrices[axis] = axis_matrix(node.attrs, size, factor, target_size)
    out: Shape = tuple(matrices[a].shape[0] if a in matrices else d for a, d in enumerate(shape))
    amounts = ["", g.constant(scales, np.float32)] if scales is not None else ["", "", tape.sizes(out)]
    tape.enter(node.outputs[0], g.emit("Resize", x, *amounts, attrs=node.attrs), out)

    return lambda dy: tape.add_gradient(name, _resize_gradient(tape, dy, out, shape, matrices))


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
