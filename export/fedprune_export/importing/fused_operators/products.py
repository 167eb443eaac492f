"""Products of matrices, with the transpositions, factors and activations that are fused with them."""

from __future__ import annotations

from fedprune_export.importing.fused_operators.activations import activate
from fedprune_export.importing.fused_operators.fused_node import FusedNode, rule


@rule("FusedMatMul", "TransposeMatMul")
def fused_matmul(fused: FusedNode) -> None:
    """alpha · A · B, of which each may be transposed."""
    left, right = (_operand(fused, position, side) for position, side in enumerate("AB"))
    alpha, out = float(fused.node.attrs.get("alpha", 1.0)), fused.node.outputs[0]
    if alpha == 1:
        fused.emit("MatMul", left, right, out=out)
    else:
        product = fused.emit("MatMul", left, right)
        fused.emit("Mul", product, fused.number(alpha, fused.input(0)), out=out)


@rule("FusedGemm")
def fused_gemm(fused: FusedNode) -> None:
    names = ("alpha", "beta", "transA", "transB")
    attrs = {name: value for name, value in fused.node.attrs.items() if name in names}
    value = fused.emit("Gemm", *fused.node.inputs, **attrs)
    read = fused.node.attrs.get
    parameters = [p for name in ("alpha", "beta", "gamma") if (p := read(f"activation_{name}")) is not None]
    activate(fused, read("activation", ""), parameters, value, fused.input(0))


def _operand(fused: FusedNode, position: int, side: str) -> str:
    """An operand as the product reads it. `transBatch` moves its first axis to the last but one."""
    value, rank = fused.input(position), fused.rank(fused.input(position))
    if rank < 2:
        return value
    order = list(range(rank))
    if fused.node.attrs.get(f"transBatch{side}", 0):
        order = [*order[1:-1], order[0], order[-1]]
    if fused.node.attrs.get(f"trans{side}", 0):
        order = [*order[:-2], order[-1], order[-2]]
    return value if order == sorted(order) else fused.emit("Transpose", value, perm=order)
