"""The cost table of an architecture: nodes that take time, and activations that take memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fedprune.model.architecture import Activation, Axis, Layer, Volume
from fedprune.model.step_contract import LOGITS, X
from fedprune_export.ir.dropout import is_dropout, mask_axes
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.operators import (
    BOTH,
    ELEMENTWISE,
    GRADIENT_READS,
    INPUT,
    OUTPUT,
    REARRANGEMENTS,
    VIEWS,
    with_rules,
)
from fedprune_export.ir.trace import Trace

ValueAxes = Mapping[str, tuple[Axis | None, ...]]
"""Per value its axes at full width; None for an axis that follows the batch."""

_UNCOUNTED = VIEWS | {"Constant", "ConstantOfShape", "Shape", "Size", "Dropout", "Range"}
"""Operators that take no time worth a row."""

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_RECURRENT = ("LSTM", "GRU", "RNN")
_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
"""Gates of a recurrent layer, which the training graph computes and differentiates as one array over all steps."""

_STEP_VALUES = {"LSTM": 6, "GRU": 4, "RNN": 1}
"""Arrays of the size of its output that a recurrent layer's gradient keeps in addition to it."""


def layers(graph: Graph, parameters: Mapping[str, str], values: ValueAxes, seen: Trace) -> Iterable[Layer]:
    """A row per node that takes time, in the order of the graph: what multiplies by a weight, and all else."""
    producers = graph.producers()
    for node in graph.nodes:
        weights = [] if node.domain else list(_weights(node, parameters, producers, seen))
        if not weights and (node.op in _UNCOUNTED or not _moving(node.outputs[0], values, seen)):
            continue
        work = _work(node, values, seen, bool(weights))
        for weight, axis, positions in weights or [("", 0, 0)]:
            yield Layer(node.name, node.op, weight, positions, axis, **work)
            work = {**work, "reads": Volume(), "makes": Volume()}  # a recurrent node's second weight moves nothing


def _moving(name: str, values: ValueAxes, seen: Trace) -> bool:
    """Whether a value is numbers of every sample."""
    return name in values and None in values[name] and seen.dtypes[name].kind == "f"


def _weights(
    node: Node, parameters: Mapping[str, str], producers: Mapping[str, Node], seen: Trace
) -> Iterable[tuple[str, int, int]]:
    """The weights of a node: name, axis that makes its output, and how often a sample uses each number."""
    if node.op in _RECURRENT:
        length = int(seen.shapes[node.inputs[0]][1 if node.attrs.get("layout") else 0])
        for place in (1, 2):
            found = _sources(node.inputs[place], parameters, producers)
            # A layer's own weights; torch's two directions come as one array made of two.
            yield from ((w, min(1, len(seen.shapes[w]) - 2), length) for w in found)
        return
    if node.op not in _WEIGHTED:
        return
    for place in (1, 0):
        weight, axis = _origin(node, place, producers, seen)
        if weight not in parameters:
            continue
        # A transposed convolution uses its weights at every place of its input.
        value = node.inputs[0] if node.op == "ConvTranspose" else node.outputs[0]
        per_sample = [1 if b else n for n, b in zip(seen.shapes[value], seen.batched(node.outputs[0]), strict=True)]
        places = per_sample[2:] if node.op.startswith("Conv") else per_sample[:-1]
        yield weight, min(axis, max(0, len(seen.shapes[weight]) - 1)), int(np.prod(places, dtype=np.int64))
        return


def _sources(name: str, parameters: Mapping[str, str], producers: Mapping[str, Node]) -> list[str]:
    """The weights of which a value is put together, each once."""
    if name in parameters:
        return [name]
    maker = producers.get(name)
    if maker is None or maker.domain or maker.op not in REARRANGEMENTS | {"Slice", "Split", "Concat", "Gather"}:
        return []
    parts = maker.inputs if maker.op == "Concat" else maker.inputs[:1]
    return list(dict.fromkeys(w for part in parts for w in _sources(part, parameters, producers)))


def _work(node: Node, values: ValueAxes, seen: Trace, weighted: bool) -> dict[str, Any]:
    """A row of the table without its weight."""
    moved = [i for i in node.inputs if i and _moving(i, values, seen)]
    window = node.attrs.get("kernel_shape", ())
    if not window and node.op.startswith("Conv"):
        window = seen.shapes[node.inputs[1]][2:]
    inner = Axis(())
    if node.op == "MatMul" and not weighted and moved:
        last = values[node.inputs[0]][-1]
        inner = last if last is not None else Axis.fixed(1)
    return {
        "reads": _volume(moved[0], values) if moved else Volume(),
        "makes": _volume(node.outputs[0], values),
        "kernel": max(1, math.prod(map(int, window))),
        "stride": max(1, math.prod(map(int, node.attrs.get("strides", ())))),
        "groups": max(1, int(node.attrs.get("group", 1))),
        "inner": inner,
    }


def _volume(name: str, values: ValueAxes) -> Volume:
    """A value as channel axes and the rest."""
    axes = [a for a in values.get(name, ()) if a is not None]
    rest = math.prod(a.length for a in axes if not a.groups)
    return Volume(tuple(a for a in axes if a.groups), rest)


def _origin(node: Node, place: int, producers: Mapping[str, Node], seen: Trace) -> tuple[str, int]:
    """The initialiser that a layer's input is arranged or computed from, and its axis that makes the output's channels.

    The operator's attributes give the axis of its input; transpositions before it are followed back to the weight.
    """
    name = node.inputs[place]
    rank = len(seen.shapes[name])
    if node.op == "Conv":
        axis = 0
    elif node.op == "ConvTranspose":
        axis = 1
    elif node.op == "Gemm":
        axis = (0 if node.attrs.get("transB") else 1) if place else (1 if node.attrs.get("transA") else 0)
    else:
        axis = rank - 1 if place == 1 else max(0, rank - 2)
    while name in producers and not producers[name].domain:
        maker = producers[name]
        if maker.op in REARRANGEMENTS:
            if maker.op == "Transpose":
                perm = list(maker.attrs.get("perm", range(rank)[::-1]))
                axis = int(perm[axis]) if axis < len(perm) else axis
            name = maker.inputs[0]
        elif maker.op in ELEMENTWISE:  # a scaled or squashed weight
            alike = [i for i in maker.inputs if i and seen.shapes[i] == seen.shapes[name]]
            if not alike:
                break
            name = alike[0]
        else:
            break
    return name, axis


def activations(graph: Graph, values: ValueAxes, seen: Trace) -> Iterable[Activation]:
    """All values that follow the batch, views counted with what they look at."""
    viewed = {
        n.outputs[0]: n.inputs[0] for n in graph.nodes if n.op in VIEWS and not n.domain and n.outputs[0] != LOGITS
    }

    def home(name: str) -> str:
        while name in viewed:
            name = viewed[name]
        return name

    sequences = {n.outputs[0]: n.op for n in graph.nodes if n.op in _RECURRENT and not n.domain}
    dropouts = {n.outputs[0] for n in graph.nodes if is_dropout(n) and mask_axes(graph, n) is None}
    kept, gradient_reads = set[str](), with_rules(GRADIENT_READS)
    for node in graph.nodes:
        read = BOTH if node.domain else gradient_reads.get(node.op)
        if read in (INPUT, BOTH):
            reads = node.inputs[:1] if node.op in ("Clip", "BatchNormalization") else node.inputs
            kept.update(home(i) for i in reads if i)
        if read in (OUTPUT, BOTH):
            kept.update(home(o) for o in node.outputs if o)
    for name in (X, *(o for n in graph.nodes for o in n.outputs if o)):
        axes = values[name]
        if name in viewed or None not in axes or seen.dtypes[name].kind != "f":
            continue
        sizes = [a.length if a is not None else 1 for a in axes]
        place = next((i for i, a in enumerate(axes) if a is not None and a.groups), None)
        if place is None:
            place = next((i for i, a in enumerate(axes) if i and a is not None), None)
        channels = axes[place] if place is not None else None
        others = [n for i, n in enumerate(sizes) if i != place]
        value = Activation(name, channels or Axis.fixed(1), int(np.prod(others, dtype=np.int64)), name in kept)
        yield value
        if name in dropouts:
            yield replace(value, name=f"{name}~mask", kept=True)
        if op := sequences.get(name):
            yield replace(value, name=f"{name}~gates", positions=_GATES[op] * value.positions, kept=False)
            for i in range(_STEP_VALUES[op]):
                yield replace(value, name=f"{name}~{i}", kept=True)
