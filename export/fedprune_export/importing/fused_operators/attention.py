"""Attention over several heads, and the rotation of its queries and keys by their positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedprune_export.importing.fused_operators.fused_node import FusedNode, rule

_CACHE_HINT = (
    "Export the model without a cache of keys and values (use_cache=False), which only generating needs; or let it end "
    "at its logits (--output NAME), if it only makes a cache."
)


# What a masked score gets by default; onnxruntime's attribute `mask_filter_value`.
_FILTER_VALUE = -10000.0


class _Projection(NamedTuple):
    """Queries, keys or values: [n, positions, heads · head_dim], or [n, heads, positions, head_dim] if `has_heads`."""

    value: str
    length: int
    width: int
    has_heads: bool = False


@rule("Attention")
def attention(fused: FusedNode) -> None:
    """Attention of a value to itself. One matrix of weights projects it to queries, keys and values."""
    x, weight, bias, mask, past, scores = (fused.input(position) for position in range(6))
    _refuse_cache(fused, past)
    if fused.node.attrs.get("do_rotary", 0):
        fused.refuse("it rotates queries and keys itself")
    length, total = fused.shape(x)[1], fused.shape(weight)[1]
    widths = [int(w) for w in fused.node.attrs.get("qkv_hidden_sizes", [total // 3] * 3)]
    if sum(widths) != total:
        fused.refuse(f"its weights have {total} columns", f"{sum(widths)} for queries, keys and values")
    projected = fused.sum(fused.emit("MatMul", x, weight), bias)
    columns = fused.split(projected, widths, -1)
    query, key, value = (_Projection(name, length, width) for name, width in zip(columns, widths, strict=True))
    _attend(fused, query, key, value, mask, scores)


@rule("MultiHeadAttention")
def multi_head_attention(fused: FusedNode) -> None:
    """Attention of queries to keys and values, which were projected before."""
    query, key, value, bias, mask, scores, past, past_value = (fused.input(position) for position in range(8))
    _refuse_cache(fused, past or past_value or fused.input(9))
    if fused.output(3):
        fused.refuse("its products of queries and keys are read")
    if fused.rank(query) == 5:  # [n, positions, heads, 3, head_dim]
        projections = _unpack(fused, query, 3)
    elif key and fused.rank(key) == 5:  # [n, positions, heads, 2, head_dim]
        projections = [_projection(fused, query), *_unpack(fused, key, 2)]
    elif key and value:
        projections = [_projection(fused, name) for name in (query, key, value)]
    else:
        fused.refuse("its keys or values are left out")
    if bias:
        biases = fused.split(bias, [each.width for each in projections], 0)
        # onnxruntime adds no bias to keys and values that come with an axis for their heads.
        projections = [
            each if each.has_heads else each._replace(value=fused.emit("Add", each.value, vector))
            for each, vector in zip(projections, biases, strict=True)
        ]
    queries, keys, values = projections
    _attend(fused, queries, keys, values, mask, scores)


@rule("RotaryEmbedding")
def rotary_embedding(fused: FusedNode) -> None:
    """Pairs of channels, turned by angles that grow with the position."""
    x, positions, cosines, sines = (fused.input(position) for position in range(4))
    shape, half = fused.shape(x), fused.shape(cosines)[1]
    heads = int(fused.node.attrs.get("num_heads", 0))
    turned_width = int(fused.node.attrs.get("rotary_embedding_dim", 0)) or 2 * half
    if fused.node.attrs.get("is_packed_batching", 0) or float(fused.node.attrs.get("scale", 1.0)) != 1:
        fused.refuse("its samples are packed into one, or its angles are scaled")
    if len(shape) == 3:
        heads = heads or shape[2] // turned_width
        value, length, head_dim = x, shape[1], shape[2] // heads
        value = fused.emit("Reshape", x, fused.graph.ints(0, 0, heads, head_dim))
    else:
        value, length, head_dim = x, shape[2], shape[3]
    if fused.shape(positions) == (1,):  # the position of the first
        start = fused.constant_value(1, "positions")
        first = 0 if start is None else int(start.reshape(-1)[0])
        positions = fused.graph.ints(*range(first, first + length))
    # [positions, half] or [n, positions, half], with an axis for the heads.
    axis = fused.graph.ints(-2 if len(shape) == 3 else -3)
    cosine, sine = (fused.emit("Unsqueeze", fused.emit("Gather", t, positions), axis) for t in (cosines, sines))
    rest = head_dim - turned_width
    turned, *untouched = fused.split(value, [turned_width, rest], -1) if rest else [value]
    is_interleaved = bool(fused.node.attrs.get("interleaved", 0))
    if is_interleaved:
        pairs = fused.emit("Reshape", turned, fused.graph.ints(0, 0, 0, half, 2))
        ends = [fused.emit("Squeeze", end, fused.graph.ints(-1)) for end in fused.split(pairs, [1, 1], -1)]
    else:
        ends = fused.split(turned, [half, half], -1)
    real = fused.emit("Sub", fused.emit("Mul", ends[0], cosine), fused.emit("Mul", ends[1], sine))
    imaginary = fused.emit("Add", fused.emit("Mul", ends[0], sine), fused.emit("Mul", ends[1], cosine))
    if is_interleaved:
        columns = [fused.emit("Unsqueeze", end, fused.graph.ints(-1)) for end in (real, imaginary)]
        pairs = fused.emit("Concat", *columns, axis=-1)
        result = fused.emit("Reshape", pairs, fused.graph.ints(0, 0, 0, turned_width))
    else:
        result = fused.emit("Concat", real, imaginary, axis=-1)
    result = fused.emit("Concat", result, *untouched, axis=-1) if rest else result
    last = fused.graph.ints(0, 0, shape[2]) if len(shape) == 3 else ""
    fused.emit("Reshape" if last else "Identity", result, *([last] if last else []), out=fused.node.outputs[0])


def _attend(
    fused: FusedNode, query: _Projection, key: _Projection, value: _Projection, mask: str, added_scores: str
) -> None:
    """softmax(scale · Q Kᵀ + masks) V, and its heads side by side."""
    heads = int(fused.node.attrs.get("num_heads", 1))
    scale = float(fused.node.attrs.get("scale", 0.0)) or 1 / math.sqrt(query.width // heads)
    like = fused.input(0)
    queries, values = (_with_heads(fused, each, heads, [0, 2, 1, 3]) for each in (query, value))
    keys = _with_heads(fused, key, heads, [0, 2, 3, 1])
    scores = fused.emit("Mul", fused.emit("MatMul", queries, keys), fused.number(scale, like))
    if added_scores:
        scores = fused.emit("Add", scores, added_scores)
    if mask:
        scores = fused.emit("Add", scores, padding_scores(fused, mask, key.length, like))
    if fused.node.attrs.get("unidirectional", 0):
        scores = fused.emit("Add", scores, causal_scores(fused, query.length, key.length, like))
    mixed = fused.emit("MatMul", fused.emit("Softmax", scores, axis=-1), values)
    rows = fused.emit("Transpose", mixed, perm=[0, 2, 1, 3])
    fused.emit("Reshape", rows, fused.graph.ints(0, 0, value.width), out=fused.node.outputs[0])


def _with_heads(fused: FusedNode, projection: _Projection, heads: int, order: Sequence[int]) -> str:
    """A projection with an axis for its heads, transposed from [n, positions, heads, head_dim]."""
    if projection.has_heads:
        # Its axes are those of [n, positions, heads, head_dim] with the middle ones swapped.
        perm = [(0, 2, 1, 3)[axis] for axis in order]
        return projection.value if perm == [0, 1, 2, 3] else fused.emit("Transpose", projection.value, perm=perm)
    rows = fused.emit("Reshape", projection.value, fused.graph.ints(0, 0, heads, projection.width // heads))
    return fused.emit("Transpose", rows, perm=list(order))


def _projection(fused: FusedNode, value: str) -> _Projection:
    shape = fused.shape(value)
    if len(shape) == 4:
        return _Projection(value, shape[2], shape[1] * shape[3], has_heads=True)
    return _Projection(value, shape[1], shape[2])


def _unpack(fused: FusedNode, value: str, count: int) -> list[_Projection]:
    """The projections in [n, positions, heads, count, head_dim], each as [n, positions, heads · head_dim]."""
    _, length, heads, _, head_dim = fused.shape(value)
    target = fused.graph.ints(0, 0, heads * head_dim)
    columns = [fused.emit("Reshape", name, target) for name in fused.split(value, [1] * count, 3)]
    return [_Projection(name, length, heads * head_dim) for name in columns]


def _refuse_cache(fused: FusedNode, past: str) -> None:
    if past or fused.output(1) or fused.output(2):
        fused.refuse("it reads or makes a cache of keys and values (past, present)", hint=_CACHE_HINT)


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
