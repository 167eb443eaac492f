"""Operators of the standard whose outputs have the shapes of fused ones, so that onnx infers what follows them.

Shapes are read before a graph is decomposed: where a file ends in a decision, and where loops are unrolled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import onnx
from onnx import helper

from fedprune_export.ir.graph import read_opset

# Outputs with the shape of the first input; further outputs of these, such as sums, have it, too.
_SHAPE_PRESERVING = frozenset(
    {"BiasAdd", "BiasDropout", "BiasGelu", "BiasSoftmax", "FastGelu", "Gelu", "GroupNorm", "LayerNormalization"}
    | {"MultiHeadAttention", "QuickGelu", "RotaryEmbedding", "SimplifiedLayerNormalization", "SkipGroupNorm"}
    | {"SkipLayerNormalization", "SkipSimplifiedLayerNormalization"}
)
_SUM_OUTPUTS = {"SkipGroupNorm": 1, "SkipLayerNormalization": 3, "SkipSimplifiedLayerNormalization": 3}

_GEMM_ATTRIBUTES = ("alpha", "beta", "transA", "transB")
_ACTIVATION_ATTRIBUTES = ("activation", "activation_params")


FUSED_DOMAIN = "com.microsoft"

# Norms that onnxruntime writes into the standard's domain although the standard has none of them at that opset: the
# opset from which on it has the operator; None if it never has it.
_STANDARD_SINCE = {"LayerNormalization": 17, "SimplifiedLayerNormalization": None}


def put_stand_ins(model: onnx.ModelProto) -> None:
    """Replace fused nodes by operators of the same shapes; those of other shapes stay. The model is changed."""
    name_early_norms(model)
    graph = model.graph
    if all(n.domain != FUSED_DOMAIN for n in graph.node):
        return
    widths = {t.name: tuple(t.dims) for t in graph.initializer}
    nodes = [s for n in graph.node for s in (_stand_ins(n, widths) if n.domain == FUSED_DOMAIN else [n])]
    del graph.node[:]
    graph.node.extend(nodes)


def _stand_ins(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[onnx.NodeProto]:
    attrs: dict[str, Any] = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    op, inputs, out = node.op_type, list(node.input), node.output[0]
    # Queries, keys and values have as many columns as the input that they are made from.
    weights = shapes.get(inputs[1], ()) if op == "Attention" else ()
    if op in _SHAPE_PRESERVING or (len(weights) == 2 and weights[1] == 3 * weights[0]):
        outputs = [out, *node.output[_SUM_OUTPUTS[op] : _SUM_OUTPUTS[op] + 1]] if op in _SUM_OUTPUTS else [out]
        yield from (helper.make_node("Identity", inputs[:1], [name]) for name in outputs if name)
    elif op in ("FusedMatMul", "TransposeMatMul") and not (attrs.get("transBatchA") or attrs.get("transBatchB")):
        left, right = ("ji" if attrs.get("transA") else "ij"), ("kj" if attrs.get("transB") else "jk")
        yield helper.make_node("Einsum", inputs, [out], equation=f"...{left},...{right}->...ik")
    elif op == "GemmFastGelu":
        yield helper.make_node("MatMul", inputs[:2], [out])
    elif op == "FusedGemm":
        yield helper.make_node("Gemm", inputs, [out], **{k: v for k, v in attrs.items() if k in _GEMM_ATTRIBUTES})
    elif op == "FusedConv":
        kept = {k: v for k, v in attrs.items() if k not in _ACTIVATION_ATTRIBUTES}
        yield helper.make_node("Conv", inputs[:3], [out], **kept)
    elif op == "EmbedLayerNormalization":
        names = [out, *node.output[2:3]]
        yield from (helper.make_node("Gather", [inputs[2], inputs[0]], [name], axis=0) for name in names if name)
    else:
        yield node


def name_early_norms(model: onnx.ModelProto) -> bool:
    """Move such norms to onnxruntime's own domain, so that onnx's checker and converter let them pass.

    The model is changed. Returns whether it has any.
    """
    opset = read_opset(model)
    early = {op for op, since in _STANDARD_SINCE.items() if since is None or opset < since}
    nodes = [n for n in model.graph.node if n.op_type in early and n.domain in ("", "ai.onnx")]
    for node in nodes:
        node.domain = FUSED_DOMAIN
    if nodes and all(o.domain != FUSED_DOMAIN for o in model.opset_import):
        model.opset_import.append(helper.make_opsetid(FUSED_DOMAIN, 1))
    return bool(nodes)


def restore_early_norms(model: onnx.ModelProto) -> None:
    """Move such norms back to the standard's domain, where onnxruntime's kernels for them are. The model is changed."""
    for node in model.graph.node:
        if node.op_type in _STANDARD_SINCE and node.domain == FUSED_DOMAIN:
            node.domain = ""
