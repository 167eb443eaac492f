"""Checks an imported graph before and after it is normalised.

`check_nodes` and `check_indices` refuse graphs that both onnx's checker and onnxruntime accept, although they make one
of them crash or differ from the standard. `compare_with_original` compares a normalised graph's outputs with those of
the user's file, and its shapes with the inferred ones.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import onnx

from fedprune.core.errors import ModelError, value_text
from fedprune.model.step_contract import LOGITS, X
from fedprune.runtime.session import OnnxSession
from fedprune_export.importing.original import Original, relative_distance
from fedprune_export.ir.graph import Graph, Node, Port
from fedprune_export.ir.sample_inputs import sample_feeds
from fedprune_export.ir.trace import Trace, shapes_at_batch

# ONNX declares these as integers and reads them as booleans.
_FLAGS = frozenset({"keepdims", "is_causal", "linear_before_reset", "layout", "count_include_pad", "ceil_mode"})
# Domains of onnx and onnxruntime; operators of others are custom ones, for which a library of their author is needed.
_KNOWN_DOMAINS = ("", "ai.onnx", "com.microsoft", "com.ms.internal", "org.pytorch.aten")
_MAX_NAME_LENGTH = 20_000
_INDEXED_OPERATORS = frozenset({"Gather", "GatherElements", "ScatterElements"})


def check_nodes(graph: Graph) -> None:
    """Raise `ModelError` if a required input is missing, a flag isn't 0 or 1, a convolution has no group, or the
    standard has no such operator, or only its author's library has it."""
    for node in graph.nodes:
        if not any(node.domain == known or (known and node.domain.startswith(f"{known}.")) for known in _KNOWN_DOMAINS):
            raise ModelError(
                f"{_label(node)} is a custom operator, of domain {value_text(node.domain)}",
                expected="operators of ONNX",
                hint="Export the model without it: write what it computes with standard operators, or as a function of "
                "the file (docs/add-an-operator.md says how fedprune learns operators of ONNX).",
            )
        # onnx's checker lets experimental operators of early versions pass, such as ConstantFill.
        if not node.domain and not onnx.defs.has(node.op):
            hint = "Export the model again by a later version of what made it, at opset 17 or 18."
            raise ModelError(f"{_label(node)} is no operator of ONNX", hint=hint)
        for name, value in node.attrs.items():
            if name in _FLAGS and value not in (0, 1):
                raise ModelError(f"attribute {name} of {_label(node)}", expected="0 or 1", got=value_text(value))
        if node.op in ("Conv", "ConvTranspose") and node.attrs.get("group", 1) < 1:
            raise ModelError(f"attribute group of {_label(node)}", expected="1 or more", got=node.attrs["group"])
        if max(map(len, (*node.inputs, *node.outputs, node.name)), default=0) > _MAX_NAME_LENGTH:
            raise ModelError(f"a name of {_label(node)}", expected=f"at most {_MAX_NAME_LENGTH} characters")
        if not any(node.outputs):
            raise ModelError(f"{_label(node)} has no output")
        if "" in node.inputs:
            _check_missing(graph, node)


def check_indices(graph: Graph, trace: Trace) -> None:
    """Make sure that constant indices are within range; raises `ModelError` if one isn't."""
    for node in graph.nodes:
        has_indices = node.op in _INDEXED_OPERATORS and len(node.inputs) > 1
        indices = graph.initializers.get(node.inputs[1]) if has_indices else None
        if indices is None or not indices.size or node.domain:
            continue
        dims, axis = trace.dims(node.inputs[0]), int(node.attrs.get("axis", 0))
        size = dims[axis] if -len(dims) <= axis < len(dims) else None
        low, high = int(indices.min()), int(indices.max())
        if size is not None and not -size <= low <= high < size:
            bad = high if high >= size else low
            raise ModelError(f"an index of {_label(node)}", expected=f"from {-size} to {size - 1}", got=bad)


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
    return f"{value_text(node.op)} {value_text(node.name)}"


_TOLERANCE = 1e-4
# Batch sizes at which outputs are compared. At the first one shapes are compared, too.
_BATCH_SIZES = (2, 1, 8)

# Elements in all values of one sample above which the last batch size is left out, since it would take seconds.
_MAX_ELEMENTS_FOR_ALL_BATCHES = 2**22

_SHAPE_PREFIX = "shape~of~"


def compare_with_original(original: Original, graph: Graph) -> None:
    """Compare the outputs of file and graph on random numbers, and the graph's shapes with the inferred ones.

    Raises `ModelError` if outputs or shapes differ, or an output is not finite.
    """
    inference = shapes_at_batch(graph, _BATCH_SIZES[0])
    values = [o for n in graph.nodes for o in n.outputs if o]
    probe = graph.copy()
    for value in values:
        probe.emit("Shape", value, out=_SHAPE_PREFIX + value)
        probe.outputs.append(Port(_SHAPE_PREFIX + value, np.dtype(np.int64), (len(inference.shapes[value]),)))
    after = OnnxSession(probe.to_bytes())
    # Sizes of values grow with the batch, and so does the time of a run.
    large = sum(math.prod(inference.shapes[v]) for v in values) > _BATCH_SIZES[0] * _MAX_ELEMENTS_FOR_ALL_BATCHES
    for batch in _BATCH_SIZES[:2] if large else _BATCH_SIZES:
        x = sample_feeds(graph, batch, seed=batch)[X]
        old = original.run(x)
        output_names = [LOGITS, *(_SHAPE_PREFIX + v for v in values)] if batch == _BATCH_SIZES[0] else [LOGITS]
        outputs = after.run({X: x}, output_names)
        _check_close(old, outputs[LOGITS], batch)
        for value in values if len(output_names) > 1 else ():
            shape = tuple(outputs[_SHAPE_PREFIX + value].tolist())
            if shape != inference.shapes[value]:
                raise ModelError(f"shape of value {value}", expected=inference.shapes[value], got=shape)


def _check_close(old: npt.NDArray[np.float32], new: npt.NDArray[np.float32], batch: int) -> None:
    if old.dtype.kind != "f" or not np.isfinite(old).all():
        raise ModelError(
            "the model's output is not finite for random inputs",
            expected="finite numbers",
            hint="Look for a division by 0, a logarithm or root of what isn't above 0, and scores that are all masked.",
        )
    # Rounding errors grow with the largest number.
    worst = relative_distance(old, new)
    if not worst <= _TOLERANCE:
        raise ModelError(
            "the normalised model's outputs differ",
            expected=f"outputs that agree to {_TOLERANCE:g} for {batch} samples",
            got=f"{worst:.2g}",
            hint="Please report this with the model.",
        )
