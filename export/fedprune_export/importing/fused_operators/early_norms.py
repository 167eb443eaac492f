"""Norms that onnxruntime writes into the standard's domain although the standard has none of them at that opset."""

from __future__ import annotations

import onnx
from onnx import helper

from fedprune_export.ir.graph import read_opset

FUSED_DOMAIN = "com.microsoft"

# The opset from which on the standard has the operator; None if it never has it.
_STANDARD_SINCE = {"LayerNormalization": 17, "SimplifiedLayerNormalization": None}


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
