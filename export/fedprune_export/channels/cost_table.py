"""Writes the cost table of an architecture: a row per node that takes time, and per activation that takes memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fedprune.model.architecture import Activation, Axis, LayerRow, Volume
from fedprune.model.random_inputs import MASK
from fedprune.model.step_contract import LOGITS, X
from fedprune_export.ir import operators
from fedprune_export.ir.dropout import is_dropout, mask_axes, node_draw
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.trace import Trace

# Per value its axes at full width; None for an axis that follows the batch.
ValueAxes = Mapping[str, tuple[Axis | None, ...]]

# Operators that take no time worth a row: most copy nothing, or compute with a few numbers.
_UNCOUNTED = operators.VIEWS | {"Constant", "ConstantOfShape", "Shape", "Size", "Dropout", "Range"}

# Layers whose weights aren't used at every step of a sequence.
LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# Of each recurrent layer the gates, which the training graph computes and differentiates as one array over all steps,
# and the arrays of the size of its output that its gradient keeps in addition to it.
_RECURRENT = {"LSTM": (4, 6), "GRU": (3, 4), "RNN": (1, 1)}


class _WeightUse(NamedTuple):
    """A weight of a node, its axis that makes the output's channels, and how often a sample uses each number."""

    name: str = ""
    output_axis: int = 0
    positions: int = 0


def layer_rows(graph: Graph, parameters: Mapping[str, str], values: ValueAxes, trace: Trace) -> Iterable[LayerRow]:
    """A row per weight of a node, and per other node that takes time, in the order of the graph."""
    producers = graph.producers()
    for node in graph.nodes:
        weights = [] if node.domain else list(_weights_of(node, parameters, producers, trace))
        if not weights and (node.op in _UNCOUNTED or not _is_sample_data(node.outputs[0], values, trace)):
            continue
        row = _unweighted_row(node, values, trace, bool(weights))
        for use in weights or [_WeightUse()]:
            yield replace(row, weight=use.name, positions=use.positions, output_axis=use.output_axis)
            # A recurrent node's second weight moves no data: its first row has the node's input and output.
            row = replace(row, input_volume=Volume(), output_volume=Volume())


def _is_sample_data(name: str, values: ValueAxes, trace: Trace) -> bool:
    """Whether a value holds floats of every sample."""
    return name in values and None in values[name] and trace.dtypes[name].kind == "f"


def _weights_of(
    node: Node, parameters: Mapping[str, str], producers: Mapping[str, Node], trace: Trace
) -> Iterable[_WeightUse]:
    if node.op in _RECURRENT:
        length = int(trace.shapes[node.inputs[0]][1 if node.attrs.get("layout") else 0])
        for input_index in (1, 2):
            sources = _source_weights(node.inputs[input_index], parameters, producers)
            # A layer's own weights; torch's two directions come as one array made of two.
            yield from (_WeightUse(w, min(1, len(trace.shapes[w]) - 2), length) for w in sources)
        return
    if node.op not in LAYERS:
        return
    # The weight is usually the second factor; a MatMul may have it first.
    for input_index in (1, 0):
        weight, axis = _weight_origin(node, input_index, producers, trace)
        if weight not in parameters:
            continue
        # A transposed convolution uses its weights at every position of its input.
        value = node.inputs[0] if node.op == "ConvTranspose" else node.outputs[0]
        per_sample = [1 if b else n for n, b in zip(trace.shapes[value], trace.batched(node.outputs[0]), strict=True)]
        positions_of_map = per_sample[2:] if node.op.startswith("Conv") else per_sample[:-1]
        output_axis = min(axis, max(0, len(trace.shapes[weight]) - 1))
        yield _WeightUse(weight, output_axis, int(np.prod(positions_of_map, dtype=np.int64)))
        return


def _source_weights(name: str, parameters: Mapping[str, str], producers: Mapping[str, Node]) -> list[str]:
    """The weights that a value is assembled from, each once."""
    if name in parameters:
        return [name]
    producer = producers.get(name)
    if (
        producer is None
        or producer.domain
        or producer.op not in operators.REARRANGEMENTS | {"Slice", "Split", "Concat", "Gather"}
    ):
        return []
    inputs = producer.inputs if producer.op == "Concat" else producer.inputs[:1]
    return list(dict.fromkeys(w for input_name in inputs for w in _source_weights(input_name, parameters, producers)))


def _unweighted_row(node: Node, values: ValueAxes, trace: Trace, weighted: bool) -> LayerRow:
    """A row of the table without its weight."""
    data_inputs = [i for i in node.inputs if i and _is_sample_data(i, values, trace)]
    window = node.attrs.get("kernel_shape", ())
    if not window and node.op.startswith("Conv"):
        window = trace.shapes[node.inputs[1]][2:]
    inner = Axis(())
    if node.op == "MatMul" and not weighted and data_inputs:
        last = values[node.inputs[0]][-1]
        inner = last if last is not None else Axis.fixed(1)
    return LayerRow(
        node.name,
        node.op,
        weight="",
        positions=0,
        input_volume=_volume(data_inputs[0], values) if data_inputs else Volume(),
        output_volume=_volume(node.outputs[0], values),
        kernel=max(1, math.prod(map(int, window))),
        stride=max(1, math.prod(map(int, node.attrs.get("strides", ())))),
        groups=max(1, int(node.attrs.get("group", 1))),
        inner=inner,
    )


def _volume(name: str, values: ValueAxes) -> Volume:
    """A value as channel axes and the rest."""
    axes = [a for a in values.get(name, ()) if a is not None]
    rest = math.prod(a.length for a in axes if not a.groups)
    return Volume(tuple(a for a in axes if a.groups), rest)


def _weight_origin(node: Node, input_index: int, producers: Mapping[str, Node], trace: Trace) -> tuple[str, int]:
    """The initialiser that a layer's input is arranged or computed from, and its axis that makes the output's channels.

    The operator's attributes give the axis of its input; transpositions before it are followed back to the weight.
    """
    name = node.inputs[input_index]
    rank = len(trace.shapes[name])
    axis = channel_axis(node, rank, input_index)
    while name in producers and not producers[name].domain:
        producer = producers[name]
        if producer.op in operators.REARRANGEMENTS:
            if producer.op == "Transpose":
                perm = list(producer.attrs.get("perm", range(rank)[::-1]))
                axis = int(perm[axis]) if axis < len(perm) else axis
            name = producer.inputs[0]
        elif producer.op in operators.ELEMENTWISE:  # a scaled or squashed weight
            same_shape = [i for i in producer.inputs if i and trace.shapes[i] == trace.shapes[name]]
            if not same_shape:
                break
            name = same_shape[0]
        else:
            break
    return name, axis


def channel_axis(layer: Node, rank: int, input_index: int = 1) -> int:
    """The axis of a layer's weight that makes the output's channels; the weight is this input, of this rank."""
    if layer.op in ("Conv", "ConvTranspose"):
        return 0 if layer.op == "Conv" else 1
    if layer.op == "Gemm":
        return (0 if layer.attrs.get("transB") else 1) if input_index else (1 if layer.attrs.get("transA") else 0)
    return rank - 1 if input_index == 1 else max(0, rank - 2)


def activation_rows(graph: Graph, values: ValueAxes, trace: Trace) -> Iterable[Activation]:
    """A row per value that follows the batch; views share the memory of the value that they view, and its row."""
    view_sources = {
        n.outputs[0]: n.inputs[0]
        for n in graph.nodes
        if n.op in operators.VIEWS and not n.domain and n.outputs[0] != LOGITS
    }
    dropouts = {n.outputs[0]: n for n in graph.nodes if is_dropout(n)}
    # Drawn numbers are fed in place of the mean that evaluation reads, and stay until the step ends.
    noise = {o: n.inputs[0] for o, n in dropouts.items() if (draw := node_draw(graph, n)) and draw.kind != MASK}
    view_sources |= noise
    kept_names = _names_kept_for_backward(graph, view_sources) | set(noise.values())
    sequences = {n.outputs[0]: n.op for n in graph.nodes if n.op in _RECURRENT and not n.domain}
    for name in (X, *(o for n in graph.nodes for o in n.outputs if o)):
        axes = values[name]
        if name in view_sources or None not in axes or trace.dtypes[name].kind != "f":
            continue
        channels, positions = _channels_and_positions(axes)
        value = Activation(name, channels, positions, name in kept_names)
        yield value
        if name in dropouts:
            # A mask is fed, so it stays until the step ends; along some axes it may have one number.
            own_axes = mask_axes(graph, dropouts[name])
            spanned = [a for i, a in enumerate(axes) if own_axes is None or i in own_axes]
            if None in spanned:  # one for each sample
                channels, positions = _channels_and_positions(spanned)
                yield Activation(f"{name}~mask", channels, positions, is_kept=True)
        if op := sequences.get(name):
            gate_count, kept_count = _RECURRENT[op]
            yield replace(value, name=f"{name}~gates", positions=gate_count * value.positions, is_kept=False)
            for i in range(kept_count):
                yield replace(value, name=f"{name}~{i}", is_kept=True)


def _names_kept_for_backward(graph: Graph, view_sources: Mapping[str, str]) -> set[str]:
    """The values that gradients read; for a view, the value that it views."""

    def viewed_value(name: str) -> str:
        while name in view_sources:
            name = view_sources[name]
        return name

    kept_names, gradient_reads = set[str](), operators.load_rules(operators.GRADIENT_READS)
    for node in graph.nodes:
        read = operators.BOTH if node.domain else gradient_reads.get(node.op)
        if read in (operators.INPUT, operators.BOTH):
            # Their other inputs are bounds, weights and statistics, which aren't activations.
            reads = node.inputs[:1] if node.op in ("Clip", "BatchNormalization") else node.inputs
            kept_names.update(viewed_value(i) for i in reads if i)
        if read in (operators.OUTPUT, operators.BOTH):
            kept_names.update(viewed_value(o) for o in node.outputs if o)
    return kept_names


def _channels_and_positions(axes: Sequence[Axis | None]) -> tuple[Axis, int]:
    """The axis of a value's channels, and the product of its other sizes, without the batch."""
    channel_index = next((i for i, a in enumerate(axes) if a is not None and a.groups), None)
    # Without an axis of channels: the first after the batch stands for them.
    if channel_index is None:
        channel_index = next((i for i, a in enumerate(axes) if i and a is not None), None)
    channels = axes[channel_index] if channel_index is not None else None
    positions = math.prod(a.length for i, a in enumerate(axes) if a is not None and i != channel_index)
    return channels or Axis.fixed(1), positions
