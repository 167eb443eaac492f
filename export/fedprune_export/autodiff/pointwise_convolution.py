"""Convolution with a kernel of 1 on maps whose size varies, such as a layer along the tokens of an MLP."""

from __future__ import annotations

from fedprune_export.autodiff.tape import Dim, Tape


class PointwiseConvolution:
    """A convolution in one group with a kernel of 1 (see `convolution.Convolution`): no size of the map is needed.

    `rank`: the number of spatial axes.
    """

    def __init__(self, tape: Tape, kernel: str, batch: Dim, rank: int) -> None:
        self.tape, self.g, self.kernel, self.batch, self.rank = tape, tape.graph, kernel, batch, rank

    def apply(self, x: str, bias: list[str]) -> str:
        return self.g.emit("Conv", x, self.kernel, *bias)

    def apply_transposed(self, dy: str, bias: list[str]) -> str:
        order = [1, 0, *range(2, self.rank + 2)]
        return self.g.emit("Conv", dy, self.g.emit("Transpose", self.kernel, attrs={"perm": order}), *bias)

    def kernel_gradient(self, x: str, dy: str) -> str:
        g = self.g
        # 0 copies the batch and the channels.
        rows_x, rows_dy = (g.emit("Reshape", value, g.ints(0, 0, -1)) for value in (x, dy))
        products = g.emit("MatMul", rows_dy, g.emit("Transpose", rows_x, attrs={"perm": [0, 2, 1]}))
        total = self.tape.sum_leading(products, (self.batch,))
        return g.emit("Reshape", total, self.tape.shape_of(self.kernel))
