"""Finds the value of a file from which a model is trained: the last one before what decides or makes probabilities.

Losses take logits. What follows them in a file, such as ArgMax, has no gradient, or is part of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx
from onnx import helper

from fedprune_export.importing.graph_writer import FLOAT_TYPES
from fedprune_export.importing.node_order import inner_graphs
from fedprune_export.ir.operators import REARRANGEMENTS

_DECISIONS = frozenset({"ArgMax", "ArgMin", "Hardmax", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"})
_SOFTMAXES = frozenset({"Softmax", "LogSoftmax"})
# A model is trained from before the first of these: they decide, or make probabilities, which losses do themselves.
_ENDS = _DECISIONS | _SOFTMAXES | {"NonMaxSuppression", "Sigmoid", "TopK"}
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
    """

    value: str
    nodes: tuple[onnx.NodeProto, ...]
    removed: Mapping[str, str]
    axis: int | None


@dataclass(frozen=True)
class Search:
    """What a search from the outputs backwards has come to.

    Attributes:
        value: The last value from which all outputs are computed, and that an end reads; empty without one.
        nodes: The nodes from it to the outputs, in order.
        frontier: The values at which the search stopped.
    """

    value: str
    nodes: tuple[onnx.NodeProto, ...]
    frontier: tuple[str, ...]


def find_training_end(proto: onnx.ModelProto, shapes: Mapping[str, Dims], labels: str) -> TrainingEnd | None:
    """The end of training in a model without functions; None where training ends at the output.

    `labels`: the kind of labels that the loss compares with (`Loss.labels`), where it is known: labels of their own for
    each output make a sigmoid part of the loss, and classes a softmax along any axis.
    """
    search = _search(proto, labels)
    maker = next((n for n in proto.graph.node if search.value in n.output), None)
    if maker is not None and maker.op_type in REARRANGEMENTS and len(shapes.get(search.value, ())) == 1:
        # A number per sample without an axis is no output that can be trained; its value before a Squeeze is.
        search = replace(search, value=maker.input[0], nodes=(maker, *search.nodes))
    if is_single_float(proto):
        decides = any(n.op_type in _DECISIONS for n in search.nodes)
        end = _behind_rearrangements(search, shapes) or _at_value(search, shapes)
        # A softmax over places may be an output of its own: attention, or a map.
        return end if end is None or decides or end.axis in (1, None) or labels == "classes" else None
    return _at_value(search, shapes)


def may_end(proto: onnx.ModelProto, labels: str) -> bool:
    """Whether training may end before the outputs, as far as is known without shapes."""
    return bool(_search(proto, labels).value)


def _search(proto: onnx.ModelProto, labels: str) -> Search:
    if not is_single_float(proto):
        return search_end(proto, _ENDS, _FOLLOWERS)
    return search_end(proto, _DECISIONS | _SOFTMAXES | ({"Sigmoid"} if labels == "multi" else set()), _CARRIERS)


def is_single_float(proto: onnx.ModelProto) -> bool:
    return len(proto.graph.output) == 1 and can_follow(proto, proto.graph.output[0])


def can_follow(proto: onnx.ModelProto, output: onnx.ValueInfoProto) -> bool:
    """Whether a loss can follow an output: it consists of floats, and of all of them for each sample."""
    is_float = output.type.tensor_type.elem_type in FLOAT_TYPES
    return is_float and not has_suppression(needed_nodes(proto.graph.node, [output.name]))


def training_candidates(proto: onnx.ModelProto, shapes: Mapping[str, Dims]) -> tuple[str, ...]:
    """Values of a model that a user may train it from, if its outputs are computed from several: rows of numbers."""
    makers = {o for n in proto.graph.node for o in n.output}
    frontier = search_end(proto, _ENDS, _FOLLOWERS).frontier
    return tuple(name for name in frontier if name in makers and len(shapes.get(name, ())) > 1)


def nodes_behind(proto: onnx.ModelProto, value: str) -> tuple[onnx.NodeProto, ...]:
    """The nodes from a value to the outputs, if they have no weights and read nothing else; empty otherwise."""
    search = search_end(proto, None, _ENDS | _FOLLOWERS, stop=value)
    return search.nodes if search.value == value else ()


def search_end(
    proto: onnx.ModelProto, ends: Collection[str] | None, followers: Collection[str], *, stop: str = ""
) -> Search:
    """Go back from the outputs through nodes of `ends` and `followers`; a value is an end if an operator of `ends`
    reads it (with None, if it is `stop`).

    NonMaxSuppression reads boxes and scores, so training ends at the last value that both are computed from.
    """
    constants = constant_values(proto)
    inputs = {i.name for i in proto.graph.input}
    frontier = {o.name: None for o in proto.graph.output if o.name not in constants}
    allowed = {*followers, *(ends or ())}
    nodes: list[onnx.NodeProto] = []
    found_value, found_count = "", 0
    for node in reversed(proto.graph.node):
        made = [o for o in node.output if o in frontier and o != stop]
        if not made:
            continue
        sources = [i for i in node.input if i and i not in constants]
        # Two values joined by arithmetic are most likely an activation, such as x · sigmoid(x), unless they are boxes.
        joins = node.op_type in _ARITHMETIC and len(sources) > 1 and not has_suppression(nodes)
        if node.op_type not in allowed or joins or any(a.name == "num_outputs" for a in node.attribute):
            break
        for name in made:
            del frontier[name]
        frontier |= dict.fromkeys(sources)
        nodes.append(node)
        if len(frontier) != 1:
            continue
        value = next(iter(frontier))
        is_end = value == stop if ends is None else any(n.op_type in ends for n in nodes if value in n.input)
        is_detection = ends is not None and has_suppression(nodes)
        if (is_end or is_detection) and value not in inputs:
            found_value, found_count = value, len(nodes)
        if is_detection and found_value:
            break
    return Search(found_value, tuple(nodes[:found_count][::-1]), tuple(frontier))


def has_suppression(nodes: Iterable[onnx.NodeProto]) -> bool:
    """Whether boxes are chosen among nodes, of which no loss can follow what comes out."""
    return any(n.op_type == "NonMaxSuppression" for n in nodes)


def ends_in_suppression(proto: onnx.ModelProto) -> bool:
    """Whether an output is behind NonMaxSuppression, and only nodes that may stand in a head are between them."""
    makers = {o: n for n in proto.graph.node for o in n.output}
    pending, visited = [o.name for o in proto.graph.output], set[str]()
    while pending:
        node = makers.get(name := pending.pop())
        if node is None or name in visited:
            continue
        visited.add(name)
        if node.op_type == "NonMaxSuppression":
            return True
        pending += node.input if node.op_type in _FOLLOWERS else []
    return False


def needed_nodes(nodes: Sequence[onnx.NodeProto], values: Iterable[str]) -> list[onnx.NodeProto]:
    """The nodes that values are computed by, in order."""
    makers = {o: i for i, n in enumerate(nodes) for o in n.output}
    pending, needed = list(values), set[int]()
    while pending:
        index = makers.get(pending.pop())
        if index is None or index in needed:
            continue
        needed.add(index)
        if any(inner_graphs(nodes[index])):
            return list(nodes)  # sub-graphs read further values
        pending += nodes[index].input
    return [n for i, n in enumerate(nodes) if i in needed]


def constant_values(proto: onnx.ModelProto) -> set[str]:
    """Names of tensors, and of values that are computed only from them."""
    names = {t.name for t in proto.graph.initializer}
    for node in proto.graph.node:
        is_computed = any(node.input) and all(i in names for i in node.input if i)
        if is_computed or node.op_type == "Constant":
            names.update(o for o in node.output if o)
    return names


def _at_value(search: Search, shapes: Mapping[str, Dims]) -> TrainingEnd | None:
    """Training ends at the value that was found, if its readers agree on the axis of the classes."""
    dims = shapes.get(search.value)
    if not search.value or dims is None or len(dims) < 2:
        return None
    axes = {_axis(n, len(dims)) for n in search.nodes if search.value in n.input and n.op_type in _AXES}
    axis = next(iter(axes), None)
    return TrainingEnd(search.value, search.nodes, {}, axis) if len(axes) < 2 and axis != 0 else None


def _behind_rearrangements(search: Search, shapes: Mapping[str, Dims]) -> TrainingEnd | None:
    """Training ends at an output that rearranges probabilities: the same rearrangement is made of logits.

    So the logits have the output's own layout, and their batch is where the output's is.
    """
    ends = [n for n in search.nodes if n.op_type in _SOFTMAXES | {"Sigmoid"}]
    rearranging = [n for n in search.nodes if n.op_type in REARRANGEMENTS - {"Identity"}]
    dims = shapes.get(search.value)
    sources = [search.value, *(n.output[0] for n in search.nodes)]
    is_path = all(node.input[0] == source for node, source in zip(search.nodes, sources, strict=False))
    if not rearranging or len(ends) != 1 or dims is None or len(dims) < 2 or not is_path:
        return None
    if any(n.op_type not in _CARRIERS for n in search.nodes if n is not ends[0]):
        return None
    (end,) = ends
    axis: int | None = 1 if end.op_type == "Sigmoid" else _axis(end, len(dims))
    value, removed, head = search.value, dict[str, str](), list[onnx.NodeProto]()
    for node in search.nodes:
        before, after = shapes.get(node.input[0]), shapes.get(node.output[0])
        if node not in rearranging:
            head.append(node)
            removed[node.output[0]] = value
            continue
        if end.op_type != "Sigmoid":
            axis = None if before is None or after is None or axis is None else _axis_after(node, axis, before, after)
        value = node.output[0]
    # Without an axis of its own, such as behind a Squeeze, a number per sample is no output that can be trained.
    if not axis or axis >= len(shapes.get(value) or ()):
        return None
    copies = _path(head, value, axis)
    copies[-1].output[0] = search.nodes[-1].output[0]
    return TrainingEnd(value, tuple(copies), removed, axis)


def _path(nodes: Iterable[onnx.NodeProto], value: str, axis: int) -> list[onnx.NodeProto]:
    """Copies of nodes that stand one behind the other: each reads the one before it, the first reads a value."""
    copies = []
    for node in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[0] = value
        value = copy.output[0]
        if copy.op_type in _SOFTMAXES:
            del copy.attribute[:]
            copy.attribute.append(helper.make_attribute("axis", axis))
        copies.append(copy)
    return copies


def _axis(node: onnx.NodeProto, rank: int) -> int:
    return int(next((a.i for a in node.attribute if a.name == "axis"), _AXES[node.op_type])) % rank


def _axis_after(node: onnx.NodeProto, axis: int, before: Dims, after: Dims) -> int | None:
    """The index of an axis after a node that rearranges values; None if the node merges or splits it."""
    if node.op_type == "Transpose":
        order = next((list(a.ints) for a in node.attribute if a.name == "perm"), list(range(len(before)))[::-1])
        return order.index(axis)
    size, behind = before[axis], _product(before[axis + 1 :])
    # An axis of one class can't be told from the axes of size 1 that Unsqueeze makes.
    if size in (None, 1) or behind is None:
        return None
    return next((i for i, s in enumerate(after) if s == size and _product(after[i + 1 :]) == behind), None)


def _product(dims: Dims) -> int | None:
    sizes = [d for d in dims if d is not None]
    return math.prod(sizes) if len(sizes) == len(dims) else None
