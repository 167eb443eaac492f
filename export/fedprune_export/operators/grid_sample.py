"""GridSample: samples of maps at computed positions.

Each sample lies between pixels: along an axis it has two neighbours with weights that sum to 1 (one if nearest). The
gradient of a map goes to the neighbours by these weights, the gradient of a position follows from their slopes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from fedprune.core.errors import ModelError
from fedprune_export.autodiff.scattered_gradients import index_range
from fedprune_export.autodiff.tape import Pull, Shape, Tape, describe, gradient_rule
from fedprune_export.ir.graph import Graph, Node


@gradient_rule("GridSample")
def grid_sample(tape: Tape, node: Node) -> Pull:
    """Bilinear or nearest samples of maps. dy goes back to the sampled pixels, and to the grid if bilinear.

    Raises `ModelError` if samples are cubic or of volumes, or positions outside of a map are reflected into it.
    """
    name, grid = node.inputs
    sampling = _Sampling(tape, node)
    out = (*sampling.shape[:2], *sampling.grid_shape[1:3])
    y = tape.graph.emit("GridSample", sampling.x, sampling.positions, attrs=node.attrs)
    tape.enter(node.outputs[0], y, out)

    def pull(dy: str) -> None:
        corners = sampling.corners()
        rows = sampling.pixel_rows(dy, out)
        if tape.needs_gradient(name):
            tape.add_gradient(name, sampling.map_gradient(rows, corners))
        if tape.needs_gradient(grid) and sampling.mode == "bilinear":
            tape.add_gradient(grid, sampling.grid_gradient(rows, corners))

    return pull


class _Corner(NamedTuple):
    """One of the pixels around each sample: its row in the flattened maps, and its neighbours along both axes."""

    pixel: str
    row: _Neighbour
    column: _Neighbour


class _Sampling:
    """A GridSample on the tape. Raises `ModelError` for a form without a gradient."""

    def __init__(self, tape: Tape, node: Node) -> None:
        self.tape, self.node, self.g = tape, node, tape.graph
        name, grid = node.inputs
        self.x, self.positions = tape.value(name), tape.value(grid)
        self.shape, self.grid_shape = tape.shape(name), tape.shape(grid)
        self.mode = str(node.attrs.get("mode", "bilinear"))
        self.padding = str(node.attrs.get("padding_mode", "zeros"))
        if self.mode not in ("bilinear", "nearest"):
            raise ModelError(f"{describe(node)}: mode", expected=["bilinear", "nearest"], got=self.mode)
        if self.padding not in ("zeros", "border"):
            raise ModelError(f"{describe(node)}: padding", expected=["zeros", "border"], got=self.padding)
        if len(self.shape) != 4:
            raise ModelError(f"{describe(node)}: what it samples", expected="maps [N, C, H, W]", got=list(self.shape))
        self.height, self.width = tape.static(node, self.shape[2:])
        tape.static(node, self.grid_shape[1:])
        self.samples = tape.product(self.grid_shape[:3])
        self.map_samples = tape.product(self.grid_shape[1:3])

    def pixel_rows(self, value: str, dims: Shape) -> str:
        """Maps [N, C, H, W] as rows [N·H·W, C]."""
        last = self.g.emit("Transpose", value, attrs={"perm": [0, 2, 3, 1]})
        rows = self.tape.product([dims[0], *dims[2:]])
        return self.tape.reshape(last, (dims[0], dims[2], dims[3], dims[1]), (rows, dims[1]))

    def corners(self) -> list[_Corner]:
        """The pixels around each sample: four, or one if nearest."""
        g, tape = self.g, self.tape
        flat = tape.reshape(self.positions, self.grid_shape, (self.samples, 2))
        across, down = g.emit_many("Split", flat, g.ints(1, 1), outputs=2, attrs={"axis": 1})
        aligned = bool(self.node.attrs.get("align_corners", 0))
        neighbours = [
            _neighbours(g, coordinate, size, self.mode, self.padding, aligned)
            for coordinate, size in ((down, self.height), (across, self.width))
        ]
        # Maps are flattened to one row per pixel: a sample's pixels begin at the row where its map does.
        offsets = g.emit("Mul", index_range(tape, self.shape[0]), g.ints(self.height * self.width))
        offsets = g.emit("Expand", g.emit("Unsqueeze", offsets, g.ints(1)), tape.sizes([1, self.map_samples]))
        offsets = tape.reshape(offsets, (self.shape[0], self.map_samples), (self.samples, 1))
        corners = []
        for row, column in product(*neighbours):
            in_map = g.emit("Add", g.emit("Mul", row.index, g.ints(self.width)), column.index)
            corners.append(_Corner(g.emit("Add", offsets, in_map), row, column))
        return corners

    def map_gradient(self, dy: str, corners: list[_Corner]) -> str:
        """The gradient of the maps: each pixel sums the rows of dy at the samples around it, by its weights."""
        g, tape, (batch, channels, *_) = self.g, self.tape, self.shape
        shares = [g.emit("Mul", dy, g.emit("Mul", c.row.weight, c.column.weight)) for c in corners]
        indices, added = (
            g.emit("Concat", *v, attrs={"axis": 0}) if len(v) > 1 else v[0]
            for v in ([c.pixel for c in corners], shares)
        )
        pixels = tape.product([batch, self.height * self.width])
        zeros = g.emit("ConstantOfShape", tape.sizes([pixels, channels]))
        total = g.emit("ScatterND", zeros, indices, added, attrs={"reduction": "add"})
        total = tape.reshape(total, (pixels, channels), (batch, self.height, self.width, channels))
        return g.emit("Transpose", total, attrs={"perm": [0, 3, 1, 2]})

    def grid_gradient(self, dy: str, corners: list[_Corner]) -> str:
        """The gradient of the positions, along both axes: dy · pixel, times the slopes of the weights."""
        g, values, dgrid = self.g, self.pixel_rows(self.x, self.shape), ["", ""]
        for pixel, row, column in corners:
            value = g.emit("Gather", values, g.emit("Squeeze", pixel, g.ints(1)), attrs={"axis": 0})
            dot = g.emit("ReduceSum", g.emit("Mul", dy, value), g.ints(1), attrs={"keepdims": 1})
            slopes = g.emit("Mul", row.weight, column.slope), g.emit("Mul", row.slope, column.weight)
            for axis, slope in enumerate(slopes):
                change = g.emit("Mul", dot, slope)
                dgrid[axis] = g.emit("Add", dgrid[axis], change) if dgrid[axis] else change
        both = g.emit("Concat", *dgrid, attrs={"axis": 1})
        return self.tape.reshape(both, (self.samples, 2), self.grid_shape)


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
