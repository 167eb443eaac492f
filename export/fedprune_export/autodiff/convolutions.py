"""The choice of the fastest implementation of a convolution for its processor, its feature map and its groups.

A convolution is three maps, each linear in what it is given: the convolution itself, the transposed convolution, and
the gradient of the kernel. The gradient rules of Conv and ConvTranspose use the same three in different roles.
"""

from __future__ import annotations

import math
from typing import Protocol

from fedprune.planning.probe_report import CUDA
from fedprune_export.autodiff.column_convolution import MAX_COLUMNS_AREA, ChannelGroups, ColumnConvolution
from fedprune_export.autodiff.dense_convolution import CUDA_ALGORITHMS, DenseConvolution, choose_algorithms
from fedprune_export.autodiff.depthwise_convolution import DepthwiseConvolution
from fedprune_export.autodiff.sliding_window import Window
from fedprune_export.autodiff.tape import Tape
from fedprune_export.ir.graph import Node


class Convolution(Protocol):
    """A convolution with its window and kernel.

    x is what the window slides over, [N, inputs, ...]; y has one element per position of the window, [N, outputs, ...].
    A bias is a list of one vector, or empty.
    """

    def apply(self, x: str, bias: list[str]) -> str:
        """y = x ∗ kernel + bias."""

    def apply_transposed(self, dy: str, bias: list[str]) -> str:
        """The transposed convolution of dy, which is the gradient of x, + bias."""

    def kernel_gradient(self, x: str, dy: str) -> str:
        """The gradient of the kernel."""


def choose_convolution(tape: Tape, node: Node, w: Window, groups: ChannelGroups) -> Convolution:
    """The fastest implementation of the layer that a Conv or ConvTranspose node is."""
    kernel, shape = tape.value(node.inputs[1]), tape.shape(node.inputs[1])
    if int(node.attrs.get("group", 1)) == 1:
        if tape.graph.unit == CUDA:
            return DenseConvolution(tape.graph, w, kernel, CUDA_ALGORITHMS)
        # On small maps one product of columns is faster than a convolution.
        if math.prod(w.output) > MAX_COLUMNS_AREA:
            return DenseConvolution(tape.graph, w, kernel, choose_algorithms(w, tape.extent(shape[1])))
    elif (groups.inputs, groups.outputs) == (1, 1):
        return DepthwiseConvolution(tape.graph, w, kernel)
    return ColumnConvolution(tape, w, kernel, shape, groups, batch=tape.shape(node.inputs[0])[0])
