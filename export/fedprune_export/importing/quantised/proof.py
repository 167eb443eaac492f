"""Compares a float model, into which the file's roundings are put back, with the quantised file."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx

from fedprune.core.errors import ModelError, value_text
from fedprune_export.importing.batches.layout import move_batch_first, possible_layouts
from fedprune_export.importing.original import random_feeds
from fedprune_export.importing.quantised.rules import FLOAT_MODEL_HINT, Rounding
from fedprune_export.importing.raw_file import raw_session
from fedprune_export.importing.sample_shapes import check_sizes
from fedprune_export.importing.translation import upgrade_model
from fedprune_export.ir.graph import Graph
from fedprune_export.ir.operators import REARRANGEMENTS
from fedprune_export.ir.rounding import relative_distance
from fedprune_export.ir.sample_inputs import vocabulary_size
from fedprune_export.ir.shape_inference import ShapeError
from fedprune_export.ir.trace import shapes_at_batch

# How far outputs may differ, relative to the largest number: by a step of 8 bits, since floats that are added up in
# another order may be rounded to the next step. With a range of their own, numbers often lie just between two steps,
# and a recurrent layer rounds its states inside, where nothing is put back.
_TOLERANCE, _DYNAMIC_TOLERANCE = 0.01, 0.05

# Products of dynamically rounded numbers, which are uint8, and weights.
_DYNAMIC_PRODUCTS = ("ConvInteger", "DynamicQuantize", "MatMulInteger", "QAttention")


def prove(
    file: Graph, floats: Graph, roundings: Mapping[str, Rounding], write: Callable[[Graph], onnx.ModelProto]
) -> None:
    """Raise `ModelError` if a float model computes something else than the quantised file, up to its rounding.

    `write` makes a model of a graph, with all else that the file has.
    """
    graph = Graph.from_proto(upgrade_model(write(floats)))
    check_sizes(graph)
    _infer_sizes(graph)
    feeds = random_feeds(write(floats).graph, seed=0, below=vocabulary_size(graph))
    for rounding in roundings.values():
        name = rounding.steps[0].inputs[0]
        if name in feeds and rounding.range is not None:
            feeds[name] = np.random.default_rng(0).uniform(*rounding.range, feeds[name].shape).astype(np.float32)
    results = []
    for probe in (without_saturation(file), _with_roundings(floats, file, roundings)):
        ends, model = _ends(probe), write(probe)
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(ends))
        values = raw_session(model.SerializeToString(), ends, exact=True).run(feeds)
        results.append([values[name] for name in ends])
    is_dynamic = any(n.op.startswith("DynamicQuantize") for n in file.nodes)
    tolerance = _DYNAMIC_TOLERANCE if is_dynamic else _TOLERANCE
    for port, old, new in zip(file.outputs, *results, strict=True):
        distance = relative_distance(old, new)
        if not distance <= tolerance:
            raise ModelError(
                f"the float model of a quantised file differs at its output {value_text(port.name)}",
                expected=f"what the file computes from the same numbers, to {tolerance:g}",
                got=f"{distance:.2g}",
                hint=FLOAT_MODEL_HINT,
            )


def _infer_sizes(graph: Graph) -> None:
    """Infer the sizes of all values, since onnxruntime allocates whatever a file asks for (`ModelError`)."""
    errors: list[ModelError] = []
    for layout in possible_layouts(graph):
        try:
            shapes_at_batch(move_batch_first(graph, layout), layout.size or 1)
        except ShapeError as error:  # noqa: PERF203
            errors.append(error)
        else:
            return
    raise errors[0]


def _ends(graph: Graph) -> list[str]:
    """The outputs of a graph, or what whole numbers among them are decided by: scores that differ by a rounding error
    may decide otherwise."""
    makers, ends = graph.producers(), list[str]()
    for port in graph.outputs:
        name = port.name
        while port.dtype.kind != "f" and makers[name].op in REARRANGEMENTS | {"Cast"}:
            name = makers[name].inputs[0]
        ends.append(name if port.dtype.kind == "f" else makers[name].inputs[0])
    return ends


def _with_roundings(floats: Graph, file: Graph, roundings: Mapping[str, Rounding]) -> Graph:
    """The float model with the file's roundings, each behind the Identity, Relu or Clip in its place."""
    probe = floats.copy_without_nodes()
    probe.initializers = file.initializers | probe.initializers
    for node in floats.copy().nodes:
        probe.nodes.append(node)
        if (rounding := roundings.get(node.outputs[0])) is None:
            continue
        names = {rounding.steps[0].inputs[0]: probe.fresh(node.op)}
        end, node.outputs = node.outputs, [*names.values()]
        for step in rounding.steps:
            copy = step.copy()
            copy.inputs = [names.get(i, i) for i in step.inputs]
            copy.outputs = end if step is rounding.steps[-1] else [probe.fresh(o) for o in step.outputs]
            names |= dict(zip(step.outputs, copy.outputs, strict=True))
            probe.nodes.append(copy)
    probe.prune()
    return probe


def without_saturation(file: Graph) -> Graph:
    """The file with weights of uint8 in products of dynamically rounded numbers.

    On x86 processors with AVX2 and without VNNI, onnxruntime adds up pairs of products of uint8 and int8 in 16 bits,
    which saturate (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html). Weights and their
    zero points that are 128 higher come to the same sums.
    """
    probe = file.copy()
    for node in probe.nodes:
        found = {i: file.initializers[i] for i in node.inputs if i in file.initializers}
        signed = {name: value for name, value in found.items() if value.dtype == np.int8}
        # Each weight with its zero point, which may be left out.
        if node.op.startswith(_DYNAMIC_PRODUCTS) and sum(i in signed for i in node.inputs) % 2 == 0:
            raised = {name: probe.constant(value.astype(np.int16) + 128, np.uint8) for name, value in signed.items()}
            node.inputs = [raised.get(i, i) for i in node.inputs]
    return probe
