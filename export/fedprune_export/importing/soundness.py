"""What neither onnx's checker nor onnxruntime refuses, and what makes one of them crash or differ from the standard."""

from __future__ import annotations

import onnx

from fedprune.errors import ModelError, shown
from fedprune_export.graph import Graph, Node

_FLAGS = frozenset({"keepdims", "is_causal", "linear_before_reset", "layout", "count_include_pad", "ceil_mode"})
_LONGEST = 20_000


def check_nodes(graph: Graph) -> None:
    """Make sure that operators leave out only what may be left out, and that flags are 0 or 1.

    Raises:
        ModelError: Something else is the case.
    """
    for node in graph.nodes:
        for name, value in node.attrs.items():
            if name in _FLAGS and value not in (0, 1):
                raise ModelError(f"attribute {name} of {_label(node)}", expected="0 or 1", got=shown(value))
        if max(map(len, (*node.inputs, *node.outputs, node.name)), default=0) > _LONGEST:
            raise ModelError(f"a name of {_label(node)}", expected=f"at most {_LONGEST} characters")
        if not any(node.outputs):
            raise ModelError(f"{_label(node)} has no output")
        if "" in node.inputs:
            _check_missing(graph, node)


def _check_missing(graph: Graph, node: Node) -> None:
    try:
        schema = onnx.defs.get_schema(node.op, graph.opset, node.domain)
    except onnx.defs.SchemaError:
        return
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    for i, name in enumerate(node.inputs):
        formal = schema.inputs[min(i, len(schema.inputs) - 1)] if schema.inputs else None
        if not name and formal is not None and formal.option != optional:
            raise ModelError(f"{_label(node)} lacks an input", expected=formal.name)


def _label(node: Node) -> str:
    return f"{shown(node.op)} {shown(node.name)}"
