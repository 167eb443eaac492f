"""How operators are written for a free batch whose own form holds the file's batch size. All others stay as they are.

`write_node` writes one node of the file; to support another operator, add a rule to `_RULES`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fedprune_export.importing.batches.propagation import ADDED, Place, Propagation, places_after_reshape
from fedprune_export.ir.graph import Node
from fedprune_export.ir.operators import MANY_TO_ONE, ONE_TO_ONE
from fedprune_export.ir.opset_lowering import REDUCTIONS
from fedprune_export.ir.shape_inference import ShapeError

Rule = Callable[[Propagation, Node], None]

# Operators that compute each number from one number, or along an axis counted from the end.
_POSITIONWISE = frozenset(ONE_TO_ONE) | {
    *("Not", "Floor", "Ceil", "Round", "Sign", "Sin", "Cos", "Tan", "Gelu", "Mish", "IsNaN", "IsInf", "CastLike"),
    *("Shape", "Size"),
}

_BROADCASTING = frozenset(MANY_TO_ONE) | {
    *("And", "Or", "Xor", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Where", "Mod", "MatMul")
}


def plain(state: Propagation, node: Node) -> None:
    if node.op not in _POSITIONWISE and any(state.places.get(i) == ADDED for i in node.inputs):
        state.refuse(node, "the file has removed the axis of the batch before it")
    state.write(node)


def axis_of(state: Propagation, node: Node, default: int, position: int = 0) -> int:
    """The axis in a node's attribute, counted from 0 in the file's value."""
    return int(node.attrs.get("axis", default)) % max(state.rank(node.inputs[position]), 1)


def along_axis(default: int, *, to_end: bool = False) -> Rule:
    """An operator along an axis, or along all axes from it on (`to_end`)."""

    def rule(state: Propagation, node: Node) -> None:
        place = state.places.get(node.inputs[0])
        if place is not None:
            axis = axis_of(state, node, default)
            if place.added:
                node.attrs["axis"] = axis + 1
            elif axis == place.axis or (to_end and axis < place.axis):
                state.refuse(node, "it works along the axis of the batch")
        state.write(node)

    return rule


def own_axis(state: Propagation, node: Node, value: str, axis: int) -> None:
    """End a node whose file has removed a batch of 1: the batch becomes the first axis of its output."""
    order = [axis, *(a for a in range(len(state.shapes.shapes[value])) if a != axis)]
    if axis:
        state.emit("Transpose", value, perm=order, out=node.outputs[0])
    else:
        state.emit("Identity", value, out=node.outputs[0])
    state.places[node.outputs[0]] = ADDED


def gather(state: Propagation, node: Node) -> None:
    data, indices = node.inputs[:2]
    place = state.places.get(data)
    if place is None:
        along_axis(0)(state, node)
        return
    axis = axis_of(state, node, 0)
    if place.added or axis != place.axis:
        if indices in state.places:
            state.refuse(node, "data and indices have the batch")
        along_axis(0)(state, node)
        return
    if _gather_in_samples(state, node):
        return
    if not (state.may_drop and place.is_exact and state.numbers(indices) in ([0], [-1])):
        state.refuse(node, "it takes single samples of the batch")
    if state.rank(indices):
        state.emit("Identity", data, out=node.outputs[0])
        state.locate(node)
    else:
        own_axis(state, node, data, place.axis)


def _gather_in_samples(state: Propagation, node: Node) -> bool:
    """Write a Gather from rows of all samples, [n · size, ...], whose indices are the same in each sample.

    Returns whether they are. Masks of attention are read in this way.
    """
    data, place = node.inputs[0], state.places[node.inputs[0]]
    indices = state.constant_value(node.inputs[1])
    size = place.inner
    if place.axis or place.outer > 1 or place.is_exact or indices is None or indices.shape[:1] != (state.batch,):
        return False
    starts = (np.arange(state.batch) * size).reshape(-1, *[1] * (indices.ndim - 1))
    if np.any(indices != indices[:1] + starts) or indices[0].min() < 0 or indices[0].max() >= size:
        return False
    rows = state.emit("Reshape", data, state.ints(-1, size, *state.shapes.shapes[data][1:]))
    state.emit("Gather", rows, state.constant(indices[0]), out=node.outputs[0], axis=1)
    state.locate(node)
    return True


def gather_nd(state: Propagation, node: Node) -> None:
    """Indices [sample, position] with the same positions in each sample become positions alone."""
    data, place = node.inputs[0], state.places.get(node.inputs[0])
    indices = None if node.attrs.get("batch_dims") else state.constant_value(node.inputs[1])
    if place == Place(0) and indices is not None and indices.shape[-1] == 2 and len(indices) == state.batch:
        samples = np.arange(state.batch).reshape(-1, *[1] * (indices.ndim - 2))
        if np.all(indices[..., 0] == samples) and np.all(indices[..., 1] == indices[:1, ..., 1]):
            state.emit("Gather", data, state.constant(indices[0, ..., 1]), out=node.outputs[0], axis=1)
            state.locate(node)
            return
    indexed(state, node)


def indexed(state: Propagation, node: Node) -> None:
    if node.inputs[1] not in state.places:
        state.refuse(node, "it reads or writes at positions that are numbers of single samples")
    plain(state, node)


def slice_values(state: Propagation, node: Node) -> None:
    data = node.inputs[0]
    place = state.places.get(data)
    if place is None:
        state.refuse(node, "where it cuts depends on the batch")
    starts, ends = (state.numbers(i) for i in node.inputs[1:3])
    axes = state.axes(node, 3, range(len(starts or [])))
    if starts is None or ends is None or axes is None:
        state.refuse(node, "where it cuts depends on the data")
    steps = (state.numbers(node.inputs[4]) if len(node.inputs) > 4 else None) or [1] * len(axes)
    kept = list(range(len(axes)))
    if not place.added and place.axis in axes:
        i, size = axes.index(place.axis), state.fixed.shapes[data][place.axis]
        is_whole = starts[i] in (0, -size) and steps[i] == 1 and ends[i] >= size
        is_single = state.batch == 1 and not state.may_drop
        if not is_whole or (is_single and ends[i] == size):
            state.refuse(node, "it takes single samples of the batch")
        kept.remove(i)
    if not kept:
        state.emit("Identity", data, out=node.outputs[0])
    elif place.added or len(kept) < len(axes):
        parts = (starts, ends, [a + int(place.added) for a in axes], steps)
        node.inputs = [data, *(state.ints(*(part[i] for i in kept)) for part in parts)]
        state.append(node)
    else:
        state.write(node)


def split(state: Propagation, node: Node) -> None:
    place = state.places.get(node.inputs[0])
    if place is not None and not place.added and axis_of(state, node, 0) == place.axis:
        if len(node.outputs) > 1:
            state.refuse(node, "it splits the axis of the batch")
        state.emit("Identity", node.inputs[0], out=node.outputs[0])
        state.locate(node)
        return
    along_axis(0)(state, node)


def reshape(state: Propagation, node: Node) -> None:
    """A node that keeps the order of numbers: the first form that gives the expected shape is written."""
    data, output = node.inputs[0], node.outputs[0]
    if data not in state.places:
        # The shape alone follows the batch.
        state.write(node)
        return
    after = state.fixed.shapes[output]
    place = _place_after(state, node)
    if place.added and state.places[data].axis:
        data = state.to_front(data)
        state.places[data] = Place(0)
    expected, before = place.freed(after, state.trial), state.places[data]
    state.places[output] = place
    if state.shapes.shapes[data] == expected:
        state.emit("Identity", data, out=output)
        return
    if not before.added and not place.added and state.attempt(node, expected):
        return
    target = state.numbers(node.inputs[1]) if node.op == "Reshape" else None
    targets = []
    if target is not None and place == before and not place.added and not node.attrs.get("allowzero"):
        targets.append([*target[: place.axis], 0, *target[place.axis + 1 :]])  # 0 copies the size
    shape = list(place.freed(after, -1)) if place.is_exact else list(after)
    shape[place.axis] = -1
    for numbers in [*targets, shape]:
        if state.attempt(Node("Reshape", [data, state.ints(*numbers)], [output], {}, node.name), expected):
            return
    state.refuse(node, f"its shape {list(after)} has no axis for the batch")


def _place_after(state: Propagation, node: Node) -> Place:
    """Where a reshape takes the batch: to an axis of its own if there is one."""
    before, after = state.fixed.shapes[node.inputs[0]], state.fixed.shapes[node.outputs[0]]
    place = state.places[node.inputs[0]]
    places = places_after_reshape(place, before, after, state.batch)
    # Axes that only hold the batch come first, then those that the reshape has split or merged.
    places.sort(key=lambda p: (not p.is_exact, p.axis != place.axis or place.added, after[p.axis] in before))
    if state.batch == 1 and (place.added or place.is_exact):
        own = sum(p.is_exact for p in places)
        places.insert(own if place.added or node.op == "Squeeze" else len(places), ADDED)
    if not places:
        state.refuse(node, f"its shape {list(after)} has no axis for the batch")
    return state.choose(places)


def squeeze(state: Propagation, node: Node) -> None:
    data = node.inputs[0]
    place, shape = state.places[data], state.fixed.shapes[data]
    axes = state.axes(node, 1, [a for a, size in enumerate(shape) if size == 1])
    if axes is None or place.added or place.axis in axes:
        reshape(state, node)
        return
    # Without axes it would also remove a batch of 1.
    state.write(Node("Squeeze", [data, state.ints(*axes)], list(node.outputs), {}, node.name))


def unsqueeze(state: Propagation, node: Node) -> None:
    place = state.places[node.inputs[0]]
    if place.added or not place.is_exact:
        reshape(state, node)
    else:
        state.write(node)


def write_node(state: Propagation, node: Node) -> None:
    """Write a node for any batch. Raises `FreeingError` if there is no way."""
    rule: Rule = plain
    if (any(name in state.places for name in node.inputs) or node.op == "Expand") and not node.domain:
        rule = _RULES.get(node.op, plain)
    state.option_count = 1
    try:
        rule(state, node)
    except ShapeError:
        state.refuse(node, "its sizes fit no other batch")


# -- values side by side -----------------------------------------------------------------------------------------------


def _broadcast(state: Propagation, node: Node) -> None:
    """An operator on values that are broadcast: those without the batch have one row for all samples."""
    rank = max(state.rank(i) for i in node.inputs if i)
    placed = {i: state.places[i] for i in node.inputs if i in state.places}
    offsets = {p.axis - state.rank(i) for i, p in placed.items() if not p.added}  # from the end
    inputs = []
    for name in node.inputs:
        place = placed.get(name)
        # A vector in a product of matrices becomes a matrix of one row per sample.
        is_vector = node.op == "MatMul" and place == ADDED and state.rank(name) == 1
        if place == ADDED and state.rank(name) < rank and not is_vector:
            # Its batch is the first axis, before all axes of the others; if these have the batch, it is the same axis.
            missing = rank - state.rank(name) - (1 if -rank in offsets else 0)
            name = state.emit("Unsqueeze", name, state.ints(*range(1, 1 + missing))) if missing else name
        elif place is None and name and state.batch > 1:
            for offset in offsets:
                axis = state.rank(name) + offset
                if axis >= 0 and state.shapes.shapes[name][axis] == state.batch:
                    name = state.one_row(name, axis)
        inputs.append(name)
    node.inputs = inputs
    state.write(node)


def _spread_operands(state: Propagation, node: Node) -> None:
    """An operator whose operands have one size on each axis but its own: those without the batch are repeated."""
    axis = axis_of(state, node, 0)
    placed = {i: state.places[i] for i in node.inputs if i in state.places}
    like, place = next(iter(placed.items()))
    if any(p != place for p in placed.values()):
        state.refuse(node, "its inputs have the batch on different axes")
    if not place.added and place.axis == axis:
        state.refuse(node, "it works along the axis of the batch")
    if not place.is_exact:
        state.refuse(node, "the batch is merged with another axis")
    inputs = []
    for name in node.inputs:
        if name not in placed and name:
            if place.added:
                name = state.emit("Unsqueeze", name, state.ints(0))
            name = state.spread(name, place.axis, like)
        inputs.append(name)
    node.inputs = inputs
    if place.added:
        node.attrs["axis"] = axis + 1
    state.write(node)


def _reduce(state: Propagation, node: Node) -> None:
    data = node.inputs[0]
    place, rank = state.places[data], state.rank(data)
    listed = state.axes(node, 1, [] if node.attrs.get("noop_with_empty_axes") else range(rank))
    if listed is None:
        state.refuse(node, "its axes depend on the data")
    axes = listed or ([] if node.attrs.get("noop_with_empty_axes") else list(range(rank)))
    keeps, drops = bool(node.attrs.get("keepdims", 1)), not place.added and place.axis in axes
    if drops and not (state.may_drop and place.is_exact):
        state.refuse(node, "it reduces the axis of the batch")
    rest = [a + int(place.added) for a in axes if place.added or a != place.axis]
    reduced = Node(node.op, [data], list(node.outputs), {"keepdims": int(keeps)}, node.name)
    if "axes" in node.attrs or (node.op != "ReduceSum" and state.graph.opset < 18):
        reduced.attrs["axes"] = rest
    else:
        reduced.inputs.append(state.ints(*rest))
    if not rest:
        reduced = Node("Identity", [data], list(node.outputs), {}, node.name)
    if not drops or keeps:
        state.write(reduced)
        return
    value = data
    if rest:
        value = reduced.outputs[0] = state.graph.fresh(node.outputs[0])
        state.append(reduced)
    own_axis(state, node, value, place.axis - sum(a < place.axis for a in rest))


def _transpose(state: Propagation, node: Node) -> None:
    data, rank = node.inputs[0], state.rank(node.inputs[0])
    if state.places[data].added:
        perm = [int(p) % rank for p in node.attrs.get("perm", range(rank)[::-1])]
        node.attrs["perm"] = [0, *(p + 1 for p in perm)]
    state.write(node)


# -- sizes in arguments ------------------------------------------------------------------------------------------------


def _expand(state: Propagation, node: Node) -> None:
    """A target has 1 in place of the batch, which keeps the size of the input. Rows of the file's batch become one."""
    data, place = node.inputs[0], state.places.get(node.inputs[0])
    target, now = state.numbers(node.inputs[1]), state.shapes.numbers.get(node.inputs[1])
    if place is not None and not place.added and target is not None:
        axis = place.axis - state.rank(data) + len(target)
        if axis >= 0 and target[axis] == state.batch and place.is_exact:
            node.inputs = [data, state.ints(*target[:axis], 1, *target[axis + 1 :])]
    elif place is None and target is not None and now is not None:
        for axis, (before, after) in enumerate(zip(target, now.reshape(-1).tolist(), strict=True)):
            own = axis - len(target) + len(state.shapes.shapes[data])
            if before != after and own >= 0 and state.shapes.shapes[data][own] == before:
                node.inputs[0] = data = state.one_row(data, own)
    plain(state, node)


def _resize(state: Propagation, node: Node) -> None:
    data = node.inputs[0]
    sizes = state.numbers(node.inputs[3]) if len(node.inputs) > 3 else None
    place = state.places.get(data)
    if place == Place(0) and sizes is not None and "axes" not in node.attrs:
        target = state.emit("Concat", state.batch_like(data), state.ints(*sizes[1:]), axis=0)
        node.inputs = [*node.inputs[:3], target]
    plain(state, node)


def _recurrent(state: Propagation, node: Node) -> None:
    """An initial state of zeros is left out; any other is repeated for each sample."""
    axis = 0 if node.attrs.get("layout") else 1
    lengths = state.numbers(node.inputs[4]) if len(node.inputs) > 4 else None
    if lengths is not None and node.inputs[4] not in state.places:
        steps = state.fixed.shapes[node.inputs[0]][1 - axis]
        if any(length != steps for length in lengths):
            state.refuse(node, "the lengths of its sequences are those of single samples")
        node.inputs[4] = ""
    for position in range(5, min(7, len(node.inputs))):
        name = node.inputs[position]
        if name and state.is_zero(name):
            node.inputs[position] = ""
        elif name and name not in state.places:
            node.inputs[position] = state.spread(name, axis, node.inputs[0])
    while not node.inputs[-1]:
        node.inputs.pop()
    plain(state, node)


def _gemm(state: Propagation, node: Node) -> None:
    """Gemm takes matrices only; with an axis more it is a MatMul."""
    data, weight, *bias = node.inputs
    attrs, place = node.attrs, state.places.get(data)
    # A vector that the file made of one sample is a row for each sample.
    is_row = bool(bias) and state.places.get(bias[0]) == ADDED and state.rank(bias[0]) == 1
    if place != ADDED and not (place == Place(0) and is_row):
        plain(state, node)
        return
    if attrs.get("transA") or attrs.get("alpha", 1.0) != 1 or attrs.get("beta", 1.0) != 1 or weight in state.places:
        state.refuse(node, "the file has removed the axis of the batch before it")
    if attrs.get("transB"):
        weight = state.emit("Transpose", weight, perm=[1, 0])
    if bias and bias[0]:
        row = state.emit("Unsqueeze", bias[0], state.ints(1)) if is_row and place == ADDED else bias[0]
        state.emit("Add", state.emit("MatMul", data, weight), row, out=node.outputs[0])
    else:
        state.emit("MatMul", data, weight, out=node.outputs[0])
    state.locate(node)


_RULES: dict[str, Rule] = {
    **dict.fromkeys(_BROADCASTING, _broadcast),
    **dict.fromkeys(("Concat", "GatherElements", "ScatterElements"), _spread_operands),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax", "LpNormalization", "TopK"), along_axis(-1)),
    "LayerNormalization": along_axis(-1, to_end=True),
    "ArgMax": along_axis(0),
    "ArgMin": along_axis(0),
    **dict.fromkeys((*REDUCTIONS, "ReduceSum"), _reduce),
    "Gather": gather,
    "Slice": slice_values,
    "Split": split,
    "Transpose": _transpose,
    **dict.fromkeys(("Reshape", "Flatten"), reshape),
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Expand": _expand,
    "Resize": _resize,
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _recurrent),
    "Gemm": _gemm,
    "GatherND": gather_nd,
    "ScatterND": indexed,
}
