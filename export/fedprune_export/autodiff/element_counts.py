"""Sums over axes, and numbers of elements to divide by, which are computed at run time where a size varies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedprune.planning.probe_report import CUDA
from fedprune_export.autodiff.tape import Dim, Tape
from fedprune_export.ir.graph import Graph


def sum_axes(g: Graph, value: str, axes: list[int], *, keep: bool = True) -> str:
    return g.emit("ReduceSum", value, g.ints(*axes), attrs={"keepdims": int(keep)})


def divide_by_size(tape: Tape, value: str, dims: Sequence[Dim]) -> str:
    """A float value divided by the product of these dimensions, at run time where it varies."""
    g, count = tape.graph, tape.product(dims)
    # A product is cheaper than a quotient, and the constant is known.
    if isinstance(count, int):
        return g.emit("Mul", value, g.scalar(1 / count))
    return g.emit("Div", value, count_of(tape, dims))


def count_of(tape: Tape, dims: Sequence[Dim]) -> str:
    """The product of dimensions as float32: a constant where it is fixed, else of shape [1]."""
    g, count = tape.graph, tape.product(dims)
    if isinstance(count, int):
        return g.scalar(count)
    if g.unit == CUDA:
        return _count_on_gpu(g, tape.size(count), keep=True)
    return g.emit("Cast", tape.size(count), attrs={"to": 1})


def elements_of(g: Graph, value: str) -> str:
    """The number of a value's elements, as float32 of shape []."""
    if g.unit == CUDA:
        return _count_on_gpu(g, g.emit("Shape", value), keep=False)
    return g.emit("Cast", g.emit("Size", value), attrs={"to": 1})


def _count_on_gpu(g: Graph, shape: str, *, keep: bool) -> str:
    """A number of elements, computed on the GPU.

    onnxruntime keeps sizes in the processor's memory. A float that follows from one would be copied to the GPU in every
    step, and a step with copies can't be recorded as a CUDA graph.
    """
    ones = g.emit("ConstantOfShape", shape, attrs={"value": np.ones(1, np.float32)})
    return g.emit("ReduceSum", ones, attrs={"keepdims": int(keep)})
