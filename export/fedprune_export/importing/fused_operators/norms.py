"""Norms, with the additions, lookups and activations that are fused with them."""

from __future__ import annotations

import numpy as np

from fedprune_export.importing.fused_operators.fused_node import FusedNode, rule
from fedprune_export.importing.fused_operators.linear_layers import channels_first, channels_last

# The domain's norms of a sum have another default than the standard's 1e-5.
_SKIP_EPSILON = 1e-12


@rule("LayerNormalization", "SimplifiedLayerNormalization")
def layer_norm(fused: FusedNode) -> None:
    """The standard's, which an optimiser has written at an opset without it; simplified, it is without its mean."""
    _refuse_statistics(fused)
    op = "LayerNormalization" if fused.node.op == "LayerNormalization" else "RMSNormalization"
    attrs = {"axis": int(fused.node.attrs.get("axis", -1)), "epsilon": float(fused.node.attrs.get("epsilon", 1e-5))}
    fused.emit(op, *filter(None, fused.node.inputs), out=fused.node.outputs[0], **attrs)


@rule("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
def skip_layer_norm(fused: FusedNode) -> None:
    """The norm of x + bias + skip, simplified without its mean; the sum may be an output, too."""
    _refuse_statistics(fused)
    x, skip, *vectors = (fused.input(position) for position in range(5))
    op = "LayerNormalization"
    if fused.node.op == "SkipSimplifiedLayerNormalization":
        op, vectors = "RMSNormalization", [vectors[0], "", vectors[1]]
    total = fused.sum(x, vectors.pop(), skip, out=fused.output(3))
    _normalise(fused, op, total, *vectors)


@rule("EmbedLayerNormalization")
def embed_layer_norm(fused: FusedNode) -> None:
    """The norm of the sum of embeddings of words, positions and segments."""
    words, segments, word_table, position_table, segment_table, scale, bias, mask, positions = (
        fused.input(position) for position in range(9)
    )
    if not positions:
        positions = fused.graph.ints(*range(fused.shape(words)[1]))
    values = [fused.emit("Gather", word_table, words), fused.emit("Gather", position_table, positions)]
    if segments and segment_table:
        values.append(fused.emit("Gather", segment_table, segments))
    _normalise(fused, "LayerNormalization", fused.sum(*values, out=fused.output(2)), scale, bias)
    if fused.output(1):
        _count_positions(fused, mask)


@rule("GroupNorm")
def group_norm(fused: FusedNode) -> None:
    _group_norm(fused, fused.input(0))


@rule("SkipGroupNorm")
def skip_group_norm(fused: FusedNode) -> None:
    """The norm of x + skip + bias; the sum may be an output, too."""
    x, skip, bias = fused.input(0), fused.input(3), fused.input(4)
    if fused.rank(skip) == 2:  # one number per channel of a sample
        is_last = bool(fused.node.attrs.get("channels_last", 1))
        skip = fused.emit("Unsqueeze", skip, fused.graph.ints(*([1, 2] if is_last else [2, 3])))
    if bias and not fused.node.attrs.get("channels_last", 1):
        bias = fused.emit("Unsqueeze", bias, fused.graph.ints(1, 2))
    _group_norm(fused, fused.sum(x, skip, bias, out=fused.output(1)))


def _normalise(fused: FusedNode, op: str, value: str, *vectors: str) -> None:
    """A norm over the last axis."""
    if not fused.output(0):
        return
    attrs = {"axis": -1, "epsilon": float(fused.node.attrs.get("epsilon", _SKIP_EPSILON))}
    fused.emit(op, value, *(v for v in vectors if v), out=fused.node.outputs[0], **attrs)


def _refuse_statistics(fused: FusedNode) -> None:
    if fused.output(1) or fused.output(2):
        fused.refuse("its mean or deviation is read", "an output that only its training needs to stay unread")


def _count_positions(fused: FusedNode, mask: str) -> None:
    """The number of positions of each sample that a mask leaves in, int32; 0 without a mask."""
    out = fused.node.outputs[1]
    words = fused.input(0)
    if mask:
        # Only ones are counted.
        ones = fused.as_type(fused.emit("Equal", mask, fused.number(1, mask)), np.int64)
    else:
        ones = fused.as_type(fused.emit("Mul", words, fused.number(0, words)), np.int64)
    count = fused.emit("ReduceSum", ones, fused.graph.ints(1), keepdims=0)
    fused.emit("Identity", fused.as_type(count, np.int32), out=out)


def _group_norm(fused: FusedNode, value: str) -> None:
    """A norm of groups of channels, and with `activation` 1 x · sigmoid(x) of it."""
    attrs, out = fused.node.attrs, fused.node.outputs[0]
    is_last, swish = attrs.get("channels_last", 1), attrs.get("activation", 0)
    if fused.rank(fused.input(0)) != 4:
        fused.refuse("its input has no two spatial axes")
    if swish not in (0, 1):
        fused.refuse(f"its activation is {swish}", "0 (none) or 1 (x · sigmoid(x))")
    maps = channels_first(fused, value) if is_last else value
    attrs = {"num_groups": int(attrs.get("groups", 1)), "epsilon": float(attrs.get("epsilon", 1e-5))}
    normal = fused.emit(
        "GroupNormalization", maps, fused.input(1), fused.input(2), out="" if is_last or swish else out, **attrs
    )
    if swish:
        normal = fused.emit("Mul", normal, fused.emit("Sigmoid", normal), out="" if is_last else out)
    if is_last:
        channels_last(fused, normal)
