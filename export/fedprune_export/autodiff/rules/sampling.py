"""Gradient rule of sampling maps at places that are computed, such as those of spatial transformers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from fedprune.core.errors import ModelError
from fedprune_export.autodiff.rules.indexing import counted
from fedprune_export.autodiff.tape import Pull, Tape, describe, rule
from fedprune_export.ir.graph import Graph, Node


@rule("GridSample")
def grid_sample(tape: Tape, node: Node) -> Pull:
    """Bilinear or nearest samples of maps; dy goes back to where they were taken, and moves the grid if bilinear.

    Raises `ModelError` if samples are cubic or of volumes, or places outside of a map are reflected into it.
    """
    name, grid = node.inputs
    x, places, shape, where, g = tape.value(name), tape.value(grid), tape.shape(name), tape.shape(grid), tape.graph
    mode, padding = str(node.attrs.get("mode", "bilinear")), str(node.attrs.get("padding_mode", "zeros"))
    for what, found, known in (("mode", mode, ["bilinear", "nearest"]), ("padding", padding, ["zeros", "border"])):
        if found not in known:
            raise ModelError(f"{describe(node)}: {what}", expected=known, got=found)
    if len(shape) != 4:
        raise ModelError(f"{describe(node)}: what it samples", expected="maps [N, C, H, W]", got=list(shape))
    height, width = tape.static(node, shape[2:])
    tape.static(node, where[1:])
    out = (*shape[:2], *where[1:3])
    tape.enter(node.outputs[0], g.emit("GridSample", x, places, attrs=node.attrs), out)
    rows, maps = tape.product(where[:3]), tape.product([shape[0], height * width])

    def by_row(value: str, dims: tuple[int | str, ...]) -> str:
        """Maps [N, C, H, W] as rows [N·H·W, C]."""
        last = g.emit("Transpose", value, attrs={"perm": [0, 2, 3, 1]})
        return tape.reshape(last, (dims[0], dims[2], dims[3], dims[1]), (tape.product([dims[0], *dims[2:]]), dims[1]))

    def pull(dy: str) -> None:
        flat = tape.reshape(places, where, (rows, 2))
        across, down = g.emit_many("Split", flat, g.ints(1, 1), outputs=2, attrs={"axis": 1})
        aligned = bool(node.attrs.get("align_corners", 0))
        along = [_ends(g, c, n, mode, padding, aligned) for c, n in ((down, height), (across, width))]
        number = g.emit("Mul", counted(tape, shape[0]), g.ints(height * width))
        first = g.emit("Expand", g.emit("Unsqueeze", number, g.ints(1)), tape.sizes([1, tape.product(where[1:3])]))
        first = tape.reshape(first, (shape[0], tape.product(where[1:3])), (rows, 1))
        corners = list(product(*along))
        places_of = [
            g.emit("Add", first, g.emit("Add", g.emit("Mul", j.place, g.ints(width)), i.place)) for j, i in corners
        ]
        slopes = by_row(dy, out)
        if tape.wants(name):
            parts = [g.emit("Mul", slopes, g.emit("Mul", j.weight, i.weight)) for j, i in corners]
            at, added = (g.emit("Concat", *v, attrs={"axis": 0}) if len(v) > 1 else v[0] for v in (places_of, parts))
            zeros = g.emit("ConstantOfShape", tape.sizes([maps, shape[1]]))
            total = g.emit("ScatterND", zeros, at, added, attrs={"reduction": "add"})
            total = tape.reshape(total, (maps, shape[1]), (shape[0], height, width, shape[1]))
            tape.add(name, g.emit("Transpose", total, attrs={"perm": [0, 3, 1, 2]}))
        if tape.wants(grid) and mode == "bilinear":
            values, moved = by_row(x, shape), ["", ""]
            for (j, i), at in zip(corners, places_of, strict=True):
                value = g.emit("Gather", values, g.emit("Squeeze", at, g.ints(1)), attrs={"axis": 0})
                each = g.emit("ReduceSum", g.emit("Mul", slopes, value), g.ints(1), attrs={"keepdims": 1})
                for k, factor in enumerate((g.emit("Mul", j.weight, i.slope), g.emit("Mul", j.slope, i.weight))):
                    part = g.emit("Mul", each, factor)
                    moved[k] = g.emit("Add", moved[k], part) if moved[k] else part
            tape.add(grid, tape.reshape(g.emit("Concat", *moved, attrs={"axis": 1}), (rows, 2), where))

    return pull


@dataclass(frozen=True)
class _End:
    """One of the neighbours of samples along an axis.

    `place`: its index, within the map; `weight`: its share of the sample, 0 outside; `slope`: the derivative of that
    by the grid.
    """

    place: str
    weight: str
    slope: str


def _ends(g: Graph, coordinate: str, size: int, mode: str, padding: str, aligned: bool) -> list[_End]:
    """The neighbours of samples along an axis whose ends are -1 and 1: middles of places if `aligned`, else borders."""
    scale = (size - 1) / 2 if aligned else size / 2
    # In the order of onnxruntime and torch, so that a sample near a place is on the same side of it.
    at = g.emit("Mul", g.emit("Add", coordinate, g.scalar(1)), g.scalar(scale))
    if not aligned:
        at = g.emit("Sub", at, g.scalar(0.5))
    slope = g.scalar(scale)
    if padding == "border":
        within = _both(g, g.emit("Greater", at, g.scalar(0)), g.emit("Less", at, g.scalar(size - 1)))
        slope = g.emit("Mul", within, slope)
        at = g.emit("Clip", at, g.scalar(0), g.scalar(size - 1))
    if mode == "nearest":
        return [_end(g, g.emit("Round", at), size, g.scalar(1), "")]
    low = g.emit("Floor", at)
    share = g.emit("Sub", at, low)
    return [
        _end(g, low, size, g.emit("Sub", g.scalar(1), share), g.emit("Neg", slope)),
        _end(g, g.emit("Add", low, g.scalar(1)), size, share, slope),
    ]


def _end(g: Graph, place: str, size: int, weight: str, slope: str) -> _End:
    there = _both(g, g.emit("Greater", place, g.scalar(-0.5)), g.emit("Less", place, g.scalar(size - 0.5)))
    index = g.emit("Cast", g.emit("Clip", place, g.scalar(0), g.scalar(size - 1)), attrs={"to": 7})
    return _End(index, g.emit("Mul", weight, there), g.emit("Mul", slope, there) if slope else "")


def _both(g: Graph, one: str, other: str) -> str:
    """1 where both hold, else 0."""
    return g.emit("Cast", g.emit("And", one, other), attrs={"to": 1})
