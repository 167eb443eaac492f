"""What neither onnx's checker nor onnxruntime refuses, and what makes one of them crash or differ from the standard."""

from __future__ import annotations

import onnx

from fedprune.core.errors import ModelError, shown
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.trace import Trace

_FLAGS = frozenset({"keepdims", "is_causal", "linear_before_reset", "layout", "count_include_pad", "ceil_mode"})
_LONGEST = 20_000
_INDEXED = frozenset({"Gather", "GatherElements", "ScatterElements"})


def check_nodes(graph: Graph) -> None:
    """Make sure that operators leave out only what may be left out, that flags are 0 or 1, and that there is
    a group at least.

    Raises:
        ModelError: Something else is the case.
    """
    for node in graph.nodes:
        for name, value in node.attrs.items():
            if name in _FLAGS and value not in (0, 1):
                raise ModelError(f"attribute {name} of {_label(node)}", expected="0 or 1", got=shown(value))
        if node.op in ("Conv", "ConvTranspose") and node.attrs.get("group", 1) < 1:
            raise ModelError(f"attribute group of {_label(node)}", expected="1 or more", got=node.attrs["group"])
        if max(map(len, (*node.inputs, *node.outputs, node.name)), default=0) > _LONGEST:
            raise ModelError(f"a name of {_label(node)}", expected=f"at most {_LONGEST} characters")
        if not any(node.outputs):
            raise ModelError(f"{_label(node)} has no output")
        if "" in node.inputs:
            _check_missing(graph, node)


def check_indices(graph: Graph, seen: Trace) -> None:
    """Make sure that constant places lie within what they are places of.

    Raises:
        ModelError: One doesn't.
    """
    for node in graph.nodes:
        places = graph.initializers.get(node.inputs[1]) if node.op in _INDEXED and len(node.inputs) > 1 else None
        if places is None or not places.size or node.domain:
            continue
        dims, axis = seen.dims(node.inputs[0]), int(node.attrs.get("axis", 0))
        size = dims[axis] if -len(dims) <= axis < len(dims) else None
        low, high = int(places.min()), int(places.max())
        if size is not None and not -size <= low <= high < size:
            raise ModelError(
                f"an index of {_label(node)}", expected=f"from {-size} to {size - 1}", got=high if high >= size else low
            )


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
