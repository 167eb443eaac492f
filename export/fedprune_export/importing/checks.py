"""Checks an imported graph before and after it is normalised.

`check_nodes` and `check_indices` refuse graphs that both onnx's checker and onnxruntime accept, although they make one
of them crash or differ from the standard. `compare_with_original` and `check_rewriting` compare what was written with
the user's file.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import onnx

from fedprune.core.errors import ModelError, value_text
from fedprune.model.step_contract import LOGITS, X
from fedprune.runtime.session import OnnxSession
from fedprune_export.importing.batches.layout import move_batch_first, possible_layouts
from fedprune_export.importing.raw_file import BatchLayout, RawFile
from fedprune_export.importing.sample_shapes import check_sizes
from fedprune_export.ir.graph import Array, Graph, Node, Port
from fedprune_export.ir.probabilities import last_node
from fedprune_export.ir.rounding import MAX_DISTANCE, check_outputs, round_array
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


# onnxruntime's Sigmoid rounds to parts of 1: small numbers may be all rounding.
_SIGMOID_ROUNDING = 2.0**-22
# Batch sizes at which outputs are compared. At the first one shapes are compared, too.
_BATCH_SIZES = (2, 1, 8)

# Elements in all values of one sample above which the last batch size is left out, since it would take seconds.
_MAX_ELEMENTS_FOR_ALL_BATCHES = 2**22

_NO_NUMBERS = (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING)  # types of outputs: sequences and texts

_SHAPE_PREFIX = "shape~of~"

_REWRITING_HINT = "Export it again at opset 17 or 18; if that doesn't help, please report this with the model."
_OPTIMISER_SUBJECT = "onnxruntime's optimiser, which boards use, takes a part of the model for another one"
_OPTIMISER_HINT = (
    "It knows norms by their operators, and not by their exponents: write powers other than squares as products of "
    "their factors, and export the model again."
)


class Original:
    """The user's file as it is, run on samples of the import: no function is inlined, no loop is unrolled.

    Raises `ModelError` if onnxruntime doesn't load the file.

    Args:
        inputs: The names of the file's inputs.
        row: A graph whose only input is the import's, and which computes the file's inputs, batch first, from it.
        layout: Where the file has its batch.
    """

    def __init__(self, raw: bytes, inputs: list[str], outputs: list[str], row: Graph, layout: BatchLayout) -> None:
        self._file, self._inputs, self._row_name = RawFile(raw, outputs, layout), inputs, row.inputs[0].name
        feeder = row.copy()
        # The row may be an input of the file itself, when it has only one.
        feeder.outputs = [Port(name, np.dtype(np.float32), ()) for name in inputs if name != self._row_name]
        self._feeder: OnnxSession | None = None
        if feeder.outputs:
            feeder.prune()
            proto = feeder.to_proto()
            for value in proto.graph.output:
                value.ClearField("type")  # of any type and shape
            self._feeder = OnnxSession(proto.SerializeToString())

    def run(self, x: Array, random: np.random.Generator | None = None) -> Array:
        """The outputs for samples, a row for each if there are several; `random` moves samples and weights by a
        rounding."""
        file = self._file if random is None else self._file.with_rounded_weights(random)
        x = x if random is None else round_array(x, random)
        feeds = {self._row_name: x, **(self._feeder.run({self._row_name: x}) if self._feeder is not None else {})}
        values = list(file.run({name: feeds[name] for name in self._inputs}).values())
        return values[0] if len(values) == 1 else np.concatenate([value.reshape(len(x), -1) for value in values], 1)


def check_rewriting(raw: bytes, rewritten: onnx.ModelProto) -> None:
    """Compare the outputs of a user's file with those of a model that was written from it, on random numbers.

    Raises `ModelError` if they differ. A file that doesn't run on these is not compared.
    """
    graph = Graph.from_proto(rewritten)
    check_sizes(graph)
    layout = next(possible_layouts(graph))
    outputs = [o.name for o in rewritten.graph.output if o.type.tensor_type.elem_type not in _NO_NUMBERS]
    feeds = sample_feeds(move_batch_first(graph, layout), layout.size or 2)
    try:
        file = RawFile(raw, outputs, layout)
        file.run(feeds)
    except ModelError:
        return
    values = RawFile(rewritten.SerializeToString(), outputs, layout).run(feeds)
    file.check(feeds, values, "the file's functions and branches are written out wrongly")


def compare_with_original(original: Original, graph: Graph) -> tuple[str, ...]:
    """Compare the outputs of file and graph on random numbers, and the graph's shapes with the inferred ones.

    Returns notes. Raises `ModelError` if outputs or shapes differ, or an output is not finite.
    """
    inference = shapes_at_batch(graph, _BATCH_SIZES[0])
    values = [o for n in graph.nodes for o in n.outputs if o]
    probe = graph.copy()
    for value in values:
        probe.emit("Shape", value, out=_SHAPE_PREFIX + value)
        probe.outputs.append(Port(_SHAPE_PREFIX + value, np.dtype(np.int64), (len(inference.shapes[value]),)))
    unoptimised, optimised = OnnxSession(probe.to_bytes(), exact=True), OnnxSession(graph.to_bytes())
    # Sizes of values grow with the batch, and so does the time of a run.
    large = sum(math.prod(inference.shapes[v]) for v in values) > _BATCH_SIZES[0] * _MAX_ELEMENTS_FOR_ALL_BATCHES
    last, distances = last_node(graph), []
    least_scale = _SIGMOID_ROUNDING / MAX_DISTANCE if last is not None and last.op == "Sigmoid" else 1e-6
    for batch in _BATCH_SIZES[:2] if large else _BATCH_SIZES:
        x = sample_feeds(graph, batch, seed=batch)[X]
        expected = original.run(x)
        if expected.dtype.kind != "f" or not np.isfinite(expected).all():
            raise ModelError(
                "the model's output is not finite for random inputs",
                expected="finite numbers",
                hint="Look for a division by 0, a logarithm or root of what isn't above 0, and scores that are all "
                "masked.",
            )
        rerun = partial(original.run, x)
        # One by one first: then a difference of the optimised graph, which boards run, is the optimiser's.
        outputs = unoptimised.run({X: x}, [LOGITS])[LOGITS]
        subject, hint = "the normalised model's outputs differ", _REWRITING_HINT
        check_outputs(outputs, expected, rerun, subject, hint, least_scale=least_scale)
        outputs = optimised.run({X: x})[LOGITS]
        subject, hint = _OPTIMISER_SUBJECT, _OPTIMISER_HINT
        distances.append(check_outputs(outputs, expected, rerun, subject, hint, least_scale=least_scale))
    x = sample_feeds(graph, _BATCH_SIZES[0])[X]
    shapes = unoptimised.run({X: x}, [_SHAPE_PREFIX + v for v in values])
    for value in values:
        shape = tuple(shapes[_SHAPE_PREFIX + value].tolist())
        if shape != inference.shapes[value]:
            raise ModelError(f"shape of value {value}", expected=inference.shapes[value], got=shape)
    return max(distances, key=lambda distance: distance.value).notes
