"""Operators that onnxruntime's optimiser writes, each as the operators of opset 17 that it stands for.

An operator is a rule of `RULES`. It reads a node of domain com.microsoft, whose missing inputs and unread outputs are
empty names, and the sizes that onnxruntime infers; it emits what takes the node's place. The import is compared with
onnxruntime's run of the file, as every import is. Operators that onnxruntime has for GPUs only have no rule: a file
with them can't be run here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import numpy as np
import onnx
from onnx import helper

from fedprune.core.errors import ModelError, value_text
from fedprune.core.text import first_few
from fedprune_export.ir.drafts import NORMAL_OPSET
from fedprune_export.ir.graph import Graph, Node, node_label, read_opset
from fedprune_export.ir.opset_lowering import lower_to_opset

FUSED_DOMAIN = "com.microsoft"
# Norms that onnxruntime writes into the standard's domain: the opset from which on the standard has them.
EARLY_NORMS = {"LayerNormalization": 17, "SimplifiedLayerNormalization": math.inf}

# Sizes by value; None where they are free or unknown.
Sizes = Mapping[str, Sequence[int | None]]

_HINT = (
    "Give the file as it was before it was optimised, or optimise it with graph_optimization_level = ORT_ENABLE_BASIC."
)
_CACHE_HINT = (
    "Export the model without a cache of keys and values (use_cache=False), which only generating needs; or let it end "
    "at its logits (--output NAME), if it only makes a cache."
)
_MAX_INPUTS, _MAX_OUTPUTS = 10, 4


def is_fused(node: onnx.NodeProto, opset: int) -> bool:
    """Whether onnx doesn't know a node of a file of an opset, and onnxruntime does."""
    return node.domain == FUSED_DOMAIN or _is_early_norm(node, opset)


def _is_early_norm(node: onnx.NodeProto, opset: int) -> bool:
    return node.domain in ("", "ai.onnx") and opset < EARLY_NORMS.get(node.op_type, 0)


def name_early_norms(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which such norms are in onnxruntime's own domain, so that onnx's checker and converter let them pass;
    the same object if it has none. onnxruntime itself has no kernels for them there."""
    opset = read_opset(model)
    if not any(_is_early_norm(n, opset) for n in model.graph.node):
        return model
    named = onnx.ModelProto()
    named.CopyFrom(model)
    for node in named.graph.node:
        node.domain = FUSED_DOMAIN if _is_early_norm(node, opset) else node.domain
    if all(o.domain != FUSED_DOMAIN for o in named.opset_import):
        named.opset_import.append(helper.make_opsetid(FUSED_DOMAIN, 1))
    return named


def take_apart(graph: Graph, sizes: Callable[[Graph], Sizes], notes: list[str]) -> Graph:
    """The graph in which each fused node is the operators that it stands for; itself if it has none.

    Raises `ModelError` if a node is in a form that can't be taken apart.
    """
    if not any(n.domain.startswith(FUSED_DOMAIN) for n in graph.nodes):
        return graph
    graph.prune()
    fused = [n for n in graph.nodes if n.domain.startswith(FUSED_DOMAIN)]
    read = {p.name for p in graph.outputs} | {i for n in graph.nodes for i in n.inputs}
    shapes = {**sizes(graph), **{name: value.shape for name, value in graph.initializers.items()}}
    for node in fused:
        if node.op not in RULES or node.domain != FUSED_DOMAIN:
            _refuse(node, "it has no rule, as what an optimiser writes for one kind of processor or use")
        node.inputs += [""] * (_MAX_INPUTS - len(node.inputs))
        node.outputs = [o if o in read else "" for o in node.outputs] + [""] * (_MAX_OUTPUTS - len(node.outputs))
    graph.rewrite(RULES, shapes, domain=FUSED_DOMAIN)
    operators, were = (f"{len(fused)} fused operators", "were") if len(fused) > 1 else ("A fused operator", "was")
    notes.append(f"{operators} ({first_few(sorted({n.op for n in fused}))}) {were} taken apart.")
    # Nodes of opsets 13 to 16 mean the same at 17, which has LayerNormalization.
    graph.opset = max(graph.opset, NORMAL_OPSET)
    return graph if graph.opset == NORMAL_OPSET else lower_to_opset(graph, graph.opset)


_Rule = Callable[[Graph, Node, Sizes], None]


def _refuse(node: Node, reason: str, expected: str | None = None, hint: str = _HINT) -> NoReturn:
    raise ModelError(f"{node_label(node)} can't be taken apart: {reason}", expected=expected, hint=hint)


def _sum(graph: Graph, *values: str, out: str = "") -> str:
    """The sum of those values that aren't left out."""
    total, *others = [v for v in values if v]
    for position, value in enumerate(others, 1):
        total = graph.emit("Add", total, value, out=out if position == len(others) else None)
    return graph.emit("Identity", total, out=out) if out and not others else total


def _split(graph: Graph, value: str, parts: Sequence[int], axis: int) -> list[str]:
    return graph.emit_many("Split", value, graph.ints(*parts), outputs=len(parts), attrs={"axis": axis})


# -- activations -------------------------------------------------------------------------------------------------------


def _gelu(graph: Graph, node: Node, sizes: Sizes) -> None:
    """Gelu of the sum with a bias, where there is one; FastGelu is its form by tanh."""
    form = "tanh" if node.op == "FastGelu" else "none"
    graph.emit("Gelu", _sum(graph, *node.inputs), attrs={"approximate": form}, out=node.outputs[0])


def _quick_gelu(graph: Graph, node: Node, sizes: Sizes) -> None:
    """x · sigmoid(alpha · x)."""
    x, alpha = node.inputs[0], float(node.attrs.get("alpha", 1.702))
    scaled = x if alpha == 1 else graph.emit("Mul", x, graph.scalar(alpha))
    graph.emit("Mul", x, graph.emit("Sigmoid", scaled), out=node.outputs[0])


# -- layers ------------------------------------------------------------------------------------------------------------

# Activations that are fused with a layer. Their parameters are the attributes alpha and beta, or bounds: a list of a
# convolution, and attributes of a Gemm.
_LAYER_ACTIVATIONS = frozenset(
    {"Clip", "Elu", "HardSigmoid", "LeakyRelu", "Relu", "Sigmoid", "Softplus", "Softsign", "Tanh", "ThresholdedRelu"}
)


def _layer(graph: Graph, node: Node, sizes: Sizes) -> None:
    """activation(layer + z); z is the fourth input of a convolution."""
    attrs = {k: v for k, v in node.attrs.items() if not k.startswith("activation")}
    value = graph.emit(node.op.removeprefix("Fused"), *filter(None, node.inputs[:3]), attrs=attrs)
    name = node.attrs.get("activation", "Identity")
    if name not in _LAYER_ACTIVATIONS | {"Identity"}:
        _refuse(node, f"its activation is {name}", f"one of {', '.join(sorted(_LAYER_ACTIVATIONS))}")
    single = (node.attrs[f"activation_{key}"] for key in ("alpha", "beta") if f"activation_{key}" in node.attrs)
    parameters = [float(number) for number in node.attrs.get("activation_params", single)]
    bounds = [graph.scalar(number) for number in parameters] if name == "Clip" else []
    activation = {} if bounds else dict(zip(("alpha", "beta"), parameters, strict=False))
    graph.emit(name, _sum(graph, value, node.inputs[3]), *bounds, attrs=activation, out=node.outputs[0])


def _matmul(graph: Graph, node: Node, sizes: Sizes) -> None:
    """alpha · A · B, of which each may be transposed; `transBatch` moves its first axis to the last but one."""
    operands, alpha = node.inputs[:2], float(node.attrs.get("alpha", 1.0))
    for position, side in enumerate("AB"):
        axes = order = list(range(len(_shape(node, sizes, operands[position]))))
        if node.attrs.get(f"transBatch{side}") and len(axes) > 1:
            order = [*order[1:-1], order[0], order[-1]]
        if node.attrs.get(f"trans{side}") and len(axes) > 1:
            order = [*order[:-2], order[-1], order[-2]]
        if order != axes:
            operands[position] = graph.emit("Transpose", operands[position], attrs={"perm": order})
    product = graph.emit("MatMul", *operands, out=node.outputs[0] if alpha == 1 else None)
    if alpha != 1:
        graph.emit("Mul", product, graph.scalar(alpha), out=node.outputs[0])


# -- norms -------------------------------------------------------------------------------------------------------------


def _norm(graph: Graph, node: Node, sizes: Sizes) -> None:
    """The standard's norm, which an optimiser has written at an opset without it."""
    _emit_norm(graph, node, node.inputs[0], *node.inputs[1:3], epsilon=1e-5)


def _skip_norm(graph: Graph, node: Node, sizes: Sizes) -> None:
    """The norm of x + bias + skip; the sum may be an output, too."""
    x, skip, scale, *vectors = node.inputs[:5]
    bias, *vectors = vectors if "Simplified" in node.op else vectors[::-1]
    _emit_norm(graph, node, _sum(graph, x, bias, skip, out=node.outputs[3]), scale, vectors[0])


def _embed_norm(graph: Graph, node: Node, sizes: Sizes) -> None:
    """The norm of the sum of embeddings of words, positions and segments."""
    words, segments, word_table, position_table, segment_table, scale, bias, mask, positions = node.inputs[:9]
    positions = positions or graph.ints(*range(_size(node, sizes, words, 1)))
    values = [graph.emit("Gather", word_table, words), graph.emit("Gather", position_table, positions)]
    if segments and segment_table:
        values.append(graph.emit("Gather", segment_table, segments))
    _, count, total, _ = node.outputs
    _emit_norm(graph, node, _sum(graph, *values, out=total), scale, bias)
    if count:  # how many positions of each sample a mask leaves in, of which only ones are counted; 0 without one
        ones = graph.emit("Equal", mask, graph.constant(1, np.int32)) if mask else graph.emit("Less", words, words)
        number = graph.emit("Cast", ones, attrs={"to": onnx.TensorProto.INT64})
        number = graph.emit("ReduceSum", number, graph.ints(1), attrs={"keepdims": 0})
        graph.emit("Cast", number, attrs={"to": onnx.TensorProto.INT32}, out=count)


def _emit_norm(graph: Graph, node: Node, value: str, *vectors: str, epsilon: float = 1e-12) -> None:
    """End a node with its norm, whose epsilon has this default; simplified, it is without the mean."""
    if any(node.outputs[1:3]) and not node.op.startswith("Embed"):
        _refuse(node, "its mean or deviation is read", "an output that only its training needs to stay unread")
    attrs = {"axis": int(node.attrs.get("axis", -1)), "epsilon": float(node.attrs.get("epsilon", epsilon))}
    op = "RMSNormalization" if "Simplified" in node.op else "LayerNormalization"
    if node.outputs[0]:
        graph.emit(op, value, *filter(None, vectors), attrs=attrs, out=node.outputs[0])


# -- attention ---------------------------------------------------------------------------------------------------------

_FILTER_VALUE = -10000.0  # what a masked score gets by default


def _attention(graph: Graph, node: Node, sizes: Sizes) -> None:
    """Attention of a value to itself. One matrix of weights projects it to queries, keys and values."""
    x, weight, bias, mask, past, scores = node.inputs[:6]
    _refuse_cache(node, past, *node.outputs[1:])
    if node.attrs.get("do_rotary"):
        _refuse(node, "it rotates queries and keys itself")
    total = _size(node, sizes, weight, 1)
    widths = [int(w) for w in node.attrs.get("qkv_hidden_sizes", [total // 3] * 3)]
    if sum(widths) != total:
        _refuse(node, f"its weights have {total} columns", f"{sum(widths)} for queries, keys and values")
    columns = _split(graph, _sum(graph, graph.emit("MatMul", x, weight), bias), widths, -1)
    _attend(graph, node, sizes, columns, widths[0], (x, x), mask, scores)


def _multi_head_attention(graph: Graph, node: Node, sizes: Sizes) -> None:
    """Attention of queries to keys and values, which were projected before."""
    query, key, value, bias, mask, scores = node.inputs[:6]
    _refuse_cache(node, *node.inputs[6:], *node.outputs[1:])
    columns = [query, key, value]
    if any(len(sizes.get(name, ())) != 3 for name in columns):
        _refuse(node, "its queries, keys and values aren't apart, or have an axis for heads", "three of three axes")
    widths = [_size(node, sizes, name, 2) for name in columns]
    if bias:
        biases = _split(graph, bias, widths, 0)
        columns = [graph.emit("Add", *pair) for pair in zip(columns, biases, strict=True)]
    _attend(graph, node, sizes, columns, widths[0], (query, key), mask, scores)


def _attend(
    graph: Graph,
    node: Node,
    sizes: Sizes,
    columns: Sequence[str],
    width: int,
    sources: tuple[str, str],
    mask: str,
    added_scores: str,
) -> None:
    """softmax(scale · Q Kᵀ + masks) V, and its heads side by side.

    `columns` are queries, `width` wide, keys and values [n, positions, heads · head_dim]; `sources` are values with the
    positions of queries and keys.
    """
    heads = int(node.attrs.get("num_heads", 1))
    scale = float(node.attrs.get("scale", 0.0)) or 1 / math.sqrt(width // heads)
    rows = [graph.emit("Reshape", column, graph.ints(0, 0, heads, -1)) for column in columns]
    orders = ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
    queries, keys, values = (
        graph.emit("Transpose", row, attrs={"perm": order}) for row, order in zip(rows, orders, strict=True)
    )
    product = graph.emit("Mul", graph.emit("MatMul", queries, keys), graph.scalar(scale))
    masks = [_padding_scores(graph, node, sizes, mask, sources[1])] if mask else []
    if node.attrs.get("unidirectional"):
        later = np.triu(np.ones([_size(node, sizes, source, 1) for source in sources], bool), 1)
        masks.append(graph.constant(np.where(later, np.finfo(np.float32).min, 0), np.float32))
    scores = _sum(graph, product, added_scores, *masks)
    mixed = graph.emit("MatMul", graph.emit("Softmax", scores, attrs={"axis": -1}), values)
    together = graph.emit("Transpose", mixed, attrs={"perm": [0, 2, 1, 3]})
    graph.emit("Reshape", together, graph.ints(0, 0, -1), out=node.outputs[0])


def _padding_scores(graph: Graph, node: Node, sizes: Sizes, mask: str, source: str) -> str:
    """0 for keys that count and `mask_filter_value` for all others, to be added to scores [n, heads, queries, keys].

    A mask is the number of keys of each sample [n], or not above 0 where keys don't count: [n, keys], or
    [n, queries, keys].
    """
    shape, (batch, keys, *_) = (_shape(node, sizes, name) for name in (mask, source))
    if len(shape) == 1 and shape[0] == batch:
        positions = graph.constant(range(_size(node, sizes, source, 1)), np.int32)
        counts, axes = graph.emit("Less", positions, graph.emit("Unsqueeze", mask, graph.ints(1))), [1, 2]
    elif len(shape) in (2, 3) and shape[-1] in (keys, None):
        counts = graph.emit("Greater", mask, graph.constant(0, np.int32))
        axes = [1, 2] if len(shape) == 2 else [1]
    else:
        expected = f"lengths [n], or [n, {keys}] or [n, queries, {keys}]"
        _refuse(node, f"its mask has the shape {list(shape)} for {batch or 'n'} samples", expected)
    excluded = graph.scalar(float(node.attrs.get("mask_filter_value", _FILTER_VALUE)))
    return graph.emit("Unsqueeze", graph.emit("Where", counts, graph.scalar(0), excluded), graph.ints(*axes))


def _refuse_cache(node: Node, *values: str) -> None:
    if any(values):
        _refuse(node, "it reads or makes a cache of keys and values (past, present)", hint=_CACHE_HINT)


def _shape(node: Node, sizes: Sizes, name: str) -> Sequence[int | None]:
    if name not in sizes:
        _refuse(node, f"the shape of {value_text(name)} isn't known")
    return sizes[name]


def _size(node: Node, sizes: Sizes, name: str, axis: int) -> int:
    size = _shape(node, sizes, name)[axis]
    if size is None:
        _refuse(node, f"the size of axis {axis} of {value_text(name)} isn't known")
    return size


RULES: dict[str, _Rule] = {
    **dict.fromkeys(("BiasGelu", "FastGelu", "Gelu"), _gelu),
    **dict.fromkeys(("FusedConv", "FusedGemm"), _layer),
    **dict.fromkeys(("LayerNormalization", "SimplifiedLayerNormalization"), _norm),
    **dict.fromkeys(("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"), _skip_norm),
    "Attention": _attention,
    "EmbedLayerNormalization": _embed_norm,
    "FusedMatMul": _matmul,
    "MultiHeadAttention": _multi_head_attention,
    "QuickGelu": _quick_gelu,
}
