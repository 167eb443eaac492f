"""Runs the user's file in onnxruntime as it is, on any number of samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx

from fedprune.core.errors import ModelError, value_text
from fedprune.runtime.session import OnnxSession
from fedprune_export.importing.model_file import parse_model
from fedprune_export.importing.node_order import inner_graphs
from fedprune_export.ir.graph import Array
from fedprune_export.ir.rounding import check_outputs, round_array, round_weights


@dataclass(frozen=True)
class BatchLayout:
    """Where a file has its batch.

    Attributes:
        size: The only number of samples that the file takes at once; None if it takes any.
        inputs: The batch's axis in each input, by name.
        outputs: The batch's axis in each output, by name; None if the output of one sample has no such axis.
        least: The least number of samples for which the file keeps all axes: 2 if it squeezes a batch of 1 away.
    """

    size: int | None = None
    inputs: Mapping[str, int] = field(default_factory=dict)
    outputs: Mapping[str, int | None] = field(default_factory=dict)
    least: int = 1


class RawFile:
    """A session of the user's file that takes any number of samples, with the batch first in all arrays.

    onnxruntime computes its operators one by one: its optimiser takes some norms for others.

    Raises `ModelError` if onnxruntime doesn't load the file.

    Args:
        outputs: The names of the outputs that are computed.
        layout: Where the file has its batch, and of how many samples.
    """

    def __init__(self, raw: bytes, outputs: list[str], layout: BatchLayout) -> None:
        self.layout, self.outputs, self._raw = layout, outputs, raw
        with _hint_at_export():
            self._session = raw_session(raw, outputs, exact=True)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The outputs for samples: all at once, or in batches of the file's own size."""
        size, count = self.layout.size, len(next(iter(feeds.values())))
        if count == size or (size is None and count >= self.layout.least):
            return self._run_batch(feeds)
        size = size or self.layout.least
        batches = []
        for first in range(0, count, size):
            # The last batch is filled up with samples that were run before.
            rows = np.arange(first, first + size) % count
            batches.append(self._run_batch({name: value[rows] for name, value in feeds.items()}))
        return {name: np.concatenate([batch[name] for batch in batches])[:count] for name in self.outputs}

    def with_rounded_weights(self, random: np.random.Generator, levels: int = 0) -> RawFile:
        """The same file with its weights moved by a rounding (`round_weights`)."""
        return RawFile(round_weights(self._raw, random, levels), self.outputs, self.layout)

    def check(self, feeds: Mapping[str, Array], outputs: Mapping[str, Array], subject: str, hint: str = "") -> None:
        """Compare outputs that were computed of these samples with the file's. Raises `ModelError` if one is farther
        away than rounding explains (`check_outputs`)."""

        def rerun(name: str, random: np.random.Generator) -> Array:
            return self.with_rounded_weights(random).run({n: round_array(x, random) for n, x in feeds.items()})[name]

        for name, expected in self.run(feeds).items():
            what = f"{subject}: output {value_text(name)} differs"
            check_outputs(outputs[name], expected, partial(rerun, name), what, hint)

    def _run_batch(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        moved = {name: np.moveaxis(value, 0, self.layout.inputs.get(name, 0)) for name, value in feeds.items()}
        with _hint_at_export():
            values = self._session.run({k: np.ascontiguousarray(v) for k, v in moved.items()}, self.outputs)
        for name, axis in self.layout.outputs.items():
            values[name] = values[name][None] if axis is None else np.moveaxis(values[name], axis, 0)
        return values


@contextmanager
def _hint_at_export() -> Iterator[None]:
    """Say what to do about a file that onnxruntime itself doesn't run. Raises `ModelError` as its session does."""
    try:
        yield
    except ModelError as error:
        raise ModelError(
            f"the file as it is: {error.what}",
            hint="Export it again in a form that onnxruntime runs: at opset 17 or 18, or by torch's other exporter.",
        ) from error


def bypass_nodes(model: onnx.ModelProto, removed: Mapping[str, str]) -> bytes:
    """A model, which may be changed, as a file whose nodes read other values in the place of removed ones."""
    for node in model.graph.node:
        node.input[:] = [removed.get(name, name) for name in node.input]
    file: bytes = model.SerializeToString(deterministic=True)
    return file


def raw_session(raw: bytes, outputs: list[str], *, exact: bool = False) -> OnnxSession:
    """A session of a file, reduced to what these of its outputs and inner values depend on. Raises `ModelError` if
    onnxruntime refuses it.

    `exact`: whether it isn't optimised, as in `OnnxSession`.

    Dead nodes could ask for any amount of memory, because the import bounds only sizes of live values. Names of nodes
    and declared shapes are removed: they compute nothing, but may be duplicate or wrong.
    """
    model = parse_model(raw, run_checker=False)
    for value in [o for o in model.graph.output if o.name not in outputs]:
        model.graph.output.remove(value)
    declared = {o.name for o in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs if name not in declared)
    for dim in [d for i in model.graph.input for d in i.type.tensor_type.shape.dim]:
        if dim.HasField("dim_value") and dim.dim_value in (0, -1):
            dim.Clear()  # some exporters' way of writing a free axis
    for scope in (model.graph, *model.functions):
        _drop_dead(scope)
    return OnnxSession(model.SerializeToString(), exact=exact)


def _drop_dead(scope: Any) -> set[str]:
    """Keep the nodes of a graph or function that its outputs depend on, also in sub-graphs.

    Returns the names that it reads from the graph around it.
    """
    needed = {o if isinstance(o, str) else o.name for o in scope.output}
    live_nodes = []
    for node in reversed(scope.node):
        if not needed.intersection(node.output):
            continue
        node.ClearField("name")
        if node.op_type == "Dropout" and node.domain in ("", "ai.onnx"):
            del node.input[2:]  # whether it trains: the model is compared as it predicts
        needed.difference_update(node.output)
        needed.update(i for i in node.input if i)
        for inner in inner_graphs(node):
            needed |= _drop_dead(inner)
        live_nodes.append(node)
    del scope.node[: len(scope.node)]
    scope.node.extend(live_nodes[::-1])
    del scope.value_info[:]
    input_names = {v if isinstance(v, str) else v.name for v in scope.input}
    return needed - input_names - {t.name for t in getattr(scope, "initializer", ())}
