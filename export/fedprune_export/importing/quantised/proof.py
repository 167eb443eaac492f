"""Compares a float model, into which the file's roundings are put back, with the quantised file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx

from fedprune.core.errors import value_text
from fedprune_export.importing.batches.layout import move_batch_first, possible_layouts
from fedprune_export.importing.quantised.rules import FLOAT_MODEL_HINT, Rounding
from fedprune_export.importing.raw_file import RawFile
from fedprune_export.importing.sample_shapes import check_sizes
from fedprune_export.importing.translation import upgrade_model
from fedprune_export.ir.graph import Array, Graph
from fedprune_export.ir.operators import REARRANGEMENTS
from fedprune_export.ir.rounding import check_outputs, round_array
from fedprune_export.ir.sample_inputs import sample_feeds
from fedprune_export.ir.trace import shapes_at_batch

# How far outputs may differ, relative to the largest number: by a step of 8 bits, since floats that are added up in
# another order may be rounded to the next step.
_TOLERANCE = 0.01

# Recurrent layers round their states inside, where nothing is put back: outputs may be as far off as those of the float
# model move once its numbers are rounded to 8 bits.
_RECURRENT, _LEVELS = "DynamicQuantizeLSTM", 256

# Of the samples of several runs, so that a number below 0 is met where a Relu was left out.
_SEEDS = range(3)

# Products of dynamically rounded numbers, which are uint8, and weights.
_DYNAMIC_PRODUCTS = ("ConvInteger", "DynamicQuantize", "MatMulInteger", "QAttention")


class QuantisedProof:
    """Runs of a quantised file, and of what is written from it, on the same random samples.

    Raises `ModelError` if the file has free sizes, or values that would be huge.

    Args:
        write: Makes a model of a graph, with all else that the file has.
    """

    def __init__(
        self, file: Graph, floats: Graph, roundings: Mapping[str, Rounding], write: Callable[[Graph], onnx.ModelProto]
    ) -> None:
        self._floats, self._roundings, self._write = floats, roundings, write
        graph = Graph.from_proto(upgrade_model(write(floats)))
        check_sizes(graph)
        # onnxruntime allocates whatever a file asks for, so all sizes are inferred first: the same in any layout.
        self._layout = next(possible_layouts(graph))
        self._graph = move_batch_first(graph, self._layout)
        shapes_at_batch(self._graph, self._layout.size or 1)
        self._file = without_saturation(file)
        self._sources = {value: r.steps[0].inputs[0] for value, r in roundings.items() if r.range is not None}
        session = self._session(self._file, [*_ends(self._file), *self._sources.values()])
        self._runs = [session.run(self._samples(seed)) for seed in (_SEEDS if self._sources else _SEEDS[:1])]

    def least_numbers(self) -> dict[str, float]:
        """The least number that the file rounds at each rounding with a range, by its output in the float model."""
        return {value: min(float(run[name].min()) for run in self._runs) for value, name in self._sources.items()}

    def check(self) -> None:
        """Raise `ModelError` if the float model computes something else than the file, up to its rounding."""
        probe = _with_roundings(self._floats, self._file, self._roundings)
        levels = _LEVELS if any(node.op == _RECURRENT for node in self._file.nodes) else 0
        feeds, expected = self._samples(_SEEDS[0]), self._runs[0]
        outputs = self._session(probe, _ends(probe)).run(feeds)
        for port, old, new in zip(self._file.outputs, _ends(self._file), _ends(probe), strict=True):

            def rerun(random: np.random.Generator, old: str = old, new: str = new) -> Array:
                floats = self._session(self._floats, [new])
                moved = {name: round_array(x, random, levels) for name, x in feeds.items()}
                moves: Array = floats.with_rounded_weights(random, levels).run(moved)[new] - floats.run(feeds)[new]
                return expected[old] + moves

            subject = f"the float model of a quantised file differs at its output {value_text(port.name)}"
            check_outputs(outputs[new], expected[old], rerun, subject, FLOAT_MODEL_HINT, limit=_TOLERANCE)

    def _session(self, graph: Graph, values: Sequence[str]) -> RawFile:
        model, names = self._write(graph), list(dict.fromkeys(values))
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        return RawFile(model.SerializeToString(), names, self._layout)

    def _samples(self, seed: int) -> dict[str, Array]:
        """Random samples for the file's inputs, within their ranges."""
        feeds = sample_feeds(self._graph, self._layout.size or 2, seed)
        random = np.random.default_rng(seed)
        for rounding in self._roundings.values():
            name = rounding.steps[0].inputs[0]
            if name in feeds and rounding.range is not None:
                feeds[name] = random.uniform(*rounding.range, feeds[name].shape).astype(np.float32)
        return feeds


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
        # Each weight with its zero point, which may be left out.
        signed = [i for i in node.inputs if i in file.initializers and file.initializers[i].dtype == np.int8]
        if node.op.startswith(_DYNAMIC_PRODUCTS) and len(signed) % 2 == 0:
            raised = {i: probe.constant(file.initializers[i].astype(np.int16) + 128, np.uint8) for i in signed}
            node.inputs = [raised.get(i, i) for i in node.inputs]
    return probe
