"""What all normalisation layers share: the vectors that scale and shift their output, one number per channel.

If a channel of the input is cut, its entry of each vector is cut, too: `tie_vectors` says so to the channel analysis,
by *atoms* (integers that name the indices of an axis; tied atoms are kept or cut together). `shorten_vectors` rewrites
constant vectors after a cut. `mask_norm` writes a norm over the kept channels only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fedprune_export.autodiff.batch_statistics import column
from fedprune_export.channels.atoms import AtomRow
from fedprune_export.channels.rule import Channels
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.pruning.masked_reference import MaskWriter, mask_rule
from fedprune_export.pruning.rewrites import Sizes, rewrite


def tie_vectors(channels: Channels, node: Node, input_rows: Sequence[AtomRow]) -> None:
    """Tie a norm's vectors (the node's inputs 1 and 2) to the axes of its input, whose atoms are `input_rows`.

    A constant with equal entries fits any width, because `shorten_vectors` shortens it.
    """
    has_fixed = False
    for i in (1, 2):
        if not channels.has_input(node, i) or channels.is_uniform(node.inputs[i]):
            continue
        vector_rows = channels.input_rows(node, i)
        for row, input_row in zip(vector_rows[::-1], input_rows[::-1], strict=False):
            if row.size == input_row.size:
                has_fixed = has_fixed or (channels.is_constant(node.inputs[i]) and bool(input_row.any()))
                channels.atoms.tie(row, input_row)
    if has_fixed:
        channels.notes.append(f"{node.op} {node.name} has a constant for each channel: its channels stay.")


@rewrite("BatchNormalization", "InstanceNormalization", "LayerNormalization", "RMSNormalization")
def shorten_vectors(graph: Graph, node: Node, sizes: Sizes) -> None:
    """Shorten constants that scale or shift all channels alike to the number of channels left."""
    over_last = node.op in ("LayerNormalization", "RMSNormalization")
    for i in (1, 2):
        constant = graph.initializers.get(node.inputs[i]) if len(node.inputs) > i else None
        if constant is None:
            continue
        full_sizes, cut_sizes = sizes.full_sizes(node.inputs[0]), sizes.cut_sizes(node.inputs[0])
        first = len(full_sizes) - constant.ndim if over_last else 1
        shape = [
            after if n == before and after is not None else n
            for n, before, after in zip(constant.shape, full_sizes[first:], cut_sizes[first:], strict=False)
        ]
        if shape != list(constant.shape):
            node.inputs[i] = graph.constant(np.full(shape, constant.reshape(-1)[0]), constant.dtype)


@mask_rule("InstanceNormalization", "LayerNormalization", "RMSNormalization")
def mask_norm(masks: MaskWriter, node: Node) -> bool:
    """Statistics over the kept indices only. Returns False, and writes nothing, where no axis has a mask."""
    graph, x = masks.graph, node.inputs[0]
    rank, is_instance_norm = masks.rank(x), node.op == "InstanceNormalization"
    axes = range(2 if is_instance_norm else int(node.attrs.get("axis", -1)) % rank, rank)
    axis_masks = {a: m for a in axes if (m := masks.mask_of(x, a)) is not None}
    if not axis_masks:
        return False
    mask = ""
    for axis, kept_rows in axis_masks.items():
        channel_mask = masks.broadcast_mask(kept_rows, axis, rank)
        mask = graph.emit("Mul", mask, channel_mask) if mask else channel_mask
    count = graph.scalar(math.prod(float(axis_masks[a].sum()) if a in axis_masks else masks.length(x, a) for a in axes))
    y = normalise_kept(graph, node, x, mask, count, axes)
    vectors = [name for name in node.inputs[1:] if name]
    write_affine(graph, node, y, [column(graph, v, rank) for v in vectors] if is_instance_norm else vectors)
    return True


def normalise_kept(graph: Graph, node: Node, x: str, mask: str, count: str, axes: Sequence[int]) -> str:
    """Normalise over axes whose kept indices have a 1 in the mask; `count`: how many elements are kept."""

    def mean(value: str) -> str:
        total = graph.emit("ReduceSum", graph.emit("Mul", value, mask), graph.ints(*axes), attrs={"keepdims": 1})
        return graph.emit("Div", total, count)

    y = x if node.op == "RMSNormalization" else graph.emit("Sub", x, mean(x))
    variance = mean(graph.emit("Mul", y, y))
    variance = graph.emit("Add", variance, graph.scalar(float(node.attrs.get("epsilon", 1e-5))))
    return graph.emit("Div", y, graph.emit("Sqrt", variance))


def write_affine(graph: Graph, node: Node, y: str, vectors: Sequence[str]) -> None:
    """Scale and shift a normalised value; the result has the name of the node's output."""
    for op, vector in zip(("Mul", "Add"), vectors, strict=False):
        y = graph.emit(op, y, vector)
    graph.emit("Identity", y, out=node.outputs[0])
