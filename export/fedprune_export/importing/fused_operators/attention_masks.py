"""Numbers that are added to the scores of an attention so that some positions don't count."""

from __future__ import annotations

import numpy as np

from fedprune_export.importing.fused_operators.fused_node import FusedNode

# What a masked score gets by default; onnxruntime's attribute `mask_filter_value`.
_FILTER_VALUE = -10000.0


def causal_scores(fused: FusedNode, queries: int, keys: int, like: str) -> str:
    """0 for keys up to a query's own position, else the lowest number: a constant [queries, keys]."""
    dtype = fused.shapes.dtypes[like]
    lowest = np.finfo(dtype).min if dtype.kind == "f" else _FILTER_VALUE
    later = np.triu(np.ones((queries, keys), bool), 1)
    return fused.graph.constant(np.where(later, lowest, 0), dtype)


def padding_scores(fused: FusedNode, mask: str, keys: int, like: str) -> str:
    """0 for keys that count and `mask_filter_value` for all others, to be added to scores [n, heads, queries, keys].

    A mask is the number of keys of each sample [n], or not above 0 where keys don't count: [n, keys], or
    [n, queries, keys].
    """
    shape, batch = fused.shape(mask), fused.shape(like)[0]
    if len(shape) == 1 and shape[0] == batch:
        positions = fused.graph.constant(np.arange(keys), fused.shapes.dtypes[mask])
        counts = fused.emit("Less", positions, fused.emit("Unsqueeze", mask, fused.graph.ints(1)))
        axes = [1, 2]
    elif len(shape) in (2, 3) and shape[-1] == keys:
        counts = fused.emit("Greater", mask, fused.number(0, mask))
        axes = [1, 2] if len(shape) == 2 else [1]
    else:
        fused.refuse(
            f"its mask has the shape {list(shape)} for {batch} samples",
            f"lengths [n], or [n, {keys}] or [n, queries, {keys}]",
        )
    filter_value = float(fused.node.attrs.get("mask_filter_value", _FILTER_VALUE))
    scores = fused.emit("Where", counts, fused.number(0, like), fused.number(filter_value, like))
    return fused.emit("Unsqueeze", scores, fused.graph.ints(*axes))
