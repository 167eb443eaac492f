"""Finds the value of a file from which a model is trained: the last one before what decides or makes probabilities.

Losses take logits. What follows them in a file, such as ArgMax, has no gradient, or is part of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedprune_export.importing.value_inference import graph_shapes
from fedprune_export.ir.graph import Graph, Node, Port
from fedprune_export.ir.operators import REARRANGEMENTS, SOFTMAXES

_DECISIONS = frozenset({"ArgMax", "ArgMin", "Hardmax", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"})
# A model is trained from before the first of these: they decide, or make probabilities, which losses do themselves.
_ENDS = _DECISIONS | SOFTMAXES | {"NonMaxSuppression", "Sigmoid", "TopK"}
# What an output of probabilities may go through on its way and still consist of probabilities.
_CARRIERS = REARRANGEMENTS | {"Cast", "Clip"}
# Further operators that may stand in a head. They have no weights: all other operators belong to the trained part.
_FOLLOWERS = _CARRIERS | frozenset(
    {"Add", "And", "ArrayFeatureExtractor", "Concat", "ConstantOfShape", "Div", "Equal", "Exp", "Expand", "Gather"}
    | {"GatherElements", "GatherND", "LabelEncoder", "Log", "Max", "Min", "Mul", "Neg", "NonZero", "Normalizer", "Not"}
    | {"OneHot", "Or", "Range", "ReduceMax", "ReduceMin", "ReduceSum", "Round", "Shape", "Size", "Slice", "Split"}
    | {"Sub", "Tile", "Where", "ZipMap"}
)
_ARITHMETIC = frozenset({"Add", "Div", "Max", "Min", "Mul", "Sub"})
# Ends over an axis, with the axis that they take by default.
_AXES = {"ArgMax": 0, "ArgMin": 0, "Hardmax": -1, "LogSoftmax": -1, "Softmax": -1, "TopK": -1}

Dims = Sequence[int | None]


@dataclass(frozen=True)
class TrainingEnd:
    """Where training ends in a file, and the head behind it.

    Attributes:
        value: The value from which the model is trained.
        nodes: The nodes of the head, in order: they read the value, constants and each other.
        removed: Nodes of the head that the trained part is left without although it goes on behind them, by their
            outputs: the values that take their places.
        axis: The axis of the value that the classes are on; None where the head doesn't tell.
        dims: The value's sizes; None where they are free.
    """

    value: str
    nodes: tuple[Node, ...]
    removed: Mapping[str, str]
    axis: int | None
    dims: Dims


@dataclass(frozen=True)
class Search:
    """What a search from the outputs backwards has come to.

    Attributes:
        value: The last value from which all outputs are computed, and that an end reads; empty without one.
        nodes: The nodes from it to the outputs, in order.
        frontier: The values at which the search stopped.
    """

    value: str
    nodes: tuple[Node, ...]
    frontier: tuple[str, ...]


def find_training_end(graph: Graph, labels: str) -> TrainingEnd | None:
    """The end of training in a file's graph; None where training ends at the output.

    `labels`: the kind of labels that the loss compares with (`Loss.labels`), where it is known: labels of their own for
    each output make a sigmoid part of the loss, and classes a softmax along any axis.
    """
    is_single_float = len(graph.outputs) == 1 and can_follow(graph, graph.outputs[0])
    if is_single_float:
        ends = _DECISIONS | SOFTMAXES | ({"Sigmoid"} if labels == "multi" else set())
        search = _search_end(graph, ends, _CARRIERS)
    else:
        search = _search_end(graph, _ENDS, _FOLLOWERS)
    # Files without such an end, which are most, needn't be inferred.
    if not search.value:
        return None
    shapes = graph_shapes(graph)
    maker = graph.producers().get(search.value)
    if maker is not None and maker.op in REARRANGEMENTS and len(shapes.get(search.value, ())) == 1:
        # A number per sample without an axis is no output that can be trained; its value before a Squeeze is.
        search = replace(search, value=maker.inputs[0], nodes=(maker, *search.nodes))
    if is_single_float:
        decides = any(n.op in _DECISIONS for n in search.nodes)
        end = _behind_rearrangements(search, shapes) or _at_value(search, shapes)
        # A softmax over places may be an output of its own: attention, or a map.
        return end if end is None or decides or end.axis in (1, None) or labels == "classes" else None
    return _at_value(search, shapes)


def can_follow(graph: Graph, output: Port) -> bool:
    """Whether a loss can follow an output: it consists of floats, and of all of them for each sample."""
    maker = graph.producers().get(output.name)
    is_map = maker is not None and maker.op == "ZipMap"
    return output.dtype == np.float32 and not is_map and not is_behind_suppression(graph, output)


def is_behind_suppression(graph: Graph, output: Port) -> bool:
    """Whether an output is what NonMaxSuppression chooses: only nodes that may stand in a head are between them."""
    makers, pending, visited = graph.producers(), [output.name], set[str]()
    while pending:
        node = makers.get(name := pending.pop())
        if node is None or name in visited:
            continue
        visited.add(name)
        if node.op == "NonMaxSuppression":
            return True
        pending += node.inputs if node.op in _FOLLOWERS else []
    return False


def training_candidates(graph: Graph) -> tuple[str, ...]:
    """Values of a model that a user may train it from, if its outputs are computed from several: rows of numbers."""
    shapes, makers = graph_shapes(graph), graph.producers()
    frontier = _search_end(graph, _ENDS, _FOLLOWERS).frontier
    return tuple(name for name in frontier if name in makers and len(shapes.get(name, ())) > 1)


def nodes_behind(graph: Graph, value: str) -> tuple[Node, ...]:
    """The nodes from a value to the outputs, if they have no weights and read nothing else; empty otherwise."""
    search = _search_end(graph, None, _ENDS | _FOLLOWERS, stop=value)
    return search.nodes if search.value == value else ()


def _search_end(graph: Graph, ends: Collection[str] | None, followers: Collection[str], *, stop: str = "") -> Search:
    """Go back from the outputs through nodes of `ends` and `followers`; a value is an end if an operator of `ends`
    reads it (with None, if it is `stop`).

    NonMaxSuppression reads boxes and scores, so training ends at the last value that both are computed from.
    """
    constants = constant_values(graph)
    inputs = {p.name for p in graph.inputs}
    frontier = {p.name: None for p in graph.outputs if p.name not in constants}
    allowed = {*followers, *(ends or ())}
    nodes: list[Node] = []
    end_value, node_count = "", 0
    for node in reversed(graph.nodes):
        reached = [o for o in node.outputs if o in frontier and o != stop]
        if not reached:
            continue
        sources = [i for i in node.inputs if i and i not in constants]
        # Two values joined by arithmetic are most likely an activation, such as x · sigmoid(x), unless they are boxes.
        joins = node.op in _ARITHMETIC and len(sources) > 1 and not has_suppression(nodes)
        if node.op not in allowed or joins or "num_outputs" in node.attrs:
            break
        for name in reached:
            del frontier[name]
        frontier |= dict.fromkeys(sources)
        nodes.append(node)
        if len(frontier) != 1:
            continue
        value = next(iter(frontier))
        is_end = value == stop if ends is None else any(n.op in ends for n in nodes if value in n.inputs)
        is_detection = ends is not None and has_suppression(nodes)
        if (is_end or is_detection) and value not in inputs:
            end_value, node_count = value, len(nodes)
        if is_detection and end_value:
            break
    return Search(end_value, tuple(nodes[:node_count][::-1]), tuple(frontier))


def has_suppression(nodes: Iterable[Node]) -> bool:
    """Whether boxes are chosen among nodes, of which no loss can follow what comes out."""
    return any(n.op == "NonMaxSuppression" for n in nodes)


def constant_values(graph: Graph) -> set[str]:
    """Names of tensors, and of values that are computed only from them."""
    names = set(graph.initializers)
    for node in graph.nodes:
        if any(node.inputs) and all(i in names for i in node.inputs if i):
            names.update(o for o in node.outputs if o)
    return names


def _at_value(search: Search, shapes: Mapping[str, Dims]) -> TrainingEnd | None:
    """Training ends at the value that was found, if its readers agree on the axis of the classes."""
    dims = shapes.get(search.value)
    if dims is None or len(dims) < 2:
        return None
    axes = {_axis(n, len(dims)) for n in search.nodes if search.value in n.inputs and n.op in _AXES}
    axis = next(iter(axes), None)
    return TrainingEnd(search.value, search.nodes, {}, axis, dims) if len(axes) < 2 and axis != 0 else None


def _behind_rearrangements(search: Search, shapes: Mapping[str, Dims]) -> TrainingEnd | None:
    """Training ends at an output that rearranges probabilities: the same rearrangement is made of logits.

    So the logits have the output's own layout, and their batch is where the output's is.
    """
    ends = [n for n in search.nodes if n.op in SOFTMAXES | {"Sigmoid"}]
    rearranging = [n for n in search.nodes if n.op in REARRANGEMENTS - {"Identity"}]
    dims = shapes.get(search.value)
    sources = [search.value, *(n.outputs[0] for n in search.nodes)]
    is_path = all(node.inputs[0] == source for node, source in zip(search.nodes, sources, strict=False))
    if not rearranging or len(ends) != 1 or dims is None or len(dims) < 2 or not is_path:
        return None
    if any(n.op not in _CARRIERS for n in search.nodes if n is not ends[0]):
        return None
    (end,) = ends
    axis: int | None = 1 if end.op == "Sigmoid" else _axis(end, len(dims))
    value, removed, head = search.value, dict[str, str](), list[Node]()
    for node in search.nodes:
        before, after = shapes.get(node.inputs[0]), shapes.get(node.outputs[0])
        if node not in rearranging:
            head.append(node.copy())
            removed[node.outputs[0]] = removed.get(node.inputs[0], node.inputs[0])
            continue
        if end.op != "Sigmoid":
            axis = None if before is None or after is None or axis is None else _axis_after(node, axis, before, after)
        value = node.outputs[0]
    # Without an axis of its own, such as behind a Squeeze, a number per sample is no output that can be trained.
    dims = shapes.get(value, ())
    if not axis or axis >= len(dims):
        return None
    # The nodes of the head stand one behind the other: each reads the one before it, the first reads the value.
    source = value
    for node in head:
        node.inputs[0], source = source, node.outputs[0]
        if node.op in SOFTMAXES:
            node.attrs = {"axis": axis}
    head[-1].outputs[0] = search.nodes[-1].outputs[0]
    return TrainingEnd(value, tuple(head), removed, axis, dims)


def _axis(node: Node, rank: int) -> int:
    return int(node.attrs.get("axis", _AXES[node.op])) % rank


def _axis_after(node: Node, axis: int, before: Dims, after: Dims) -> int | None:
    """The index of an axis after a node that rearranges values; None if the node merges or splits it."""
    if node.op == "Transpose":
        return [*node.attrs.get("perm", range(len(before))[::-1])].index(axis)
    size, behind = before[axis], _product(before[axis + 1 :])
    # An axis of one class can't be told from the axes of size 1 that Unsqueeze makes.
    if size in (None, 1) or behind is None:
        return None
    return next((i for i, s in enumerate(after) if s == size and _product(after[i + 1 :]) == behind), None)


def _product(dims: Dims) -> int | None:
    sizes = [d for d in dims if d is not None]
    return math.prod(sizes) if len(sizes) == len(dims) else None
