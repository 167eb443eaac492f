"""Rewrites of an imported graph: each operator gets one form, and operators that do nothing are removed.

Each function changes the graph in place; its outputs stay the same. The module `normalise` calls them in this order:

- `drop_identities` removes Identity nodes.
- `simplify` brings reshapes, squeezes and reductions into one form each, and removes products with one, sums with zero
  and other operators that return their input.
- `merge_transpositions` finds transpositions in disguise: axes that a reshape merges, that are transposed, and that a
  reshape splits again. PyTorch writes the keys of an attention in this way: it merges (batch, heads, positions, dims)
  to (batch × heads, positions, dims), transposes that, and splits it. In one transposition no axis of heads is
  merged with the batch, so that heads can be cut.
- `guard_lengths` divides by 1 where the length of a direction (weight norm) is 0, which would give NaN.
- `copy_fills` gives each reader of a filled value a copy of its own. A filled value is a number that is repeated to a
  computed size, such as the zeros with which a recurrent layer begins. Exporters make one value for several layers,
  whose hidden units could then only be cut together.
- `narrow_constants` stores a constant with equal numbers for all channels as one number, which fits any number of
  channels.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Container, Mapping, Sequence

import numpy as np
import onnx

from fedprune.core.errors import ModelError
from fedprune_export.channels.factors import common_factors, extents
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.operators import MANY_TO_ONE, REARRANGEMENTS
from fedprune_export.ir.shape_arithmetic import SIZE_OPERATORS
from fedprune_export.ir.trace import BATCH_EXTENT, Trace


def store_as_float32(graph: Graph) -> None:
    """Store as float32 what the file stores in another precision and casts to float32 before anything reads it."""
    readers = graph.consumers()
    for name, value in list(graph.initializers.items()):
        casts = [node for node, _ in readers.get(name, [])]
        if value.dtype == np.float32 or value.dtype.kind not in "fV" or not casts:
            continue
        if all(n.op == "Cast" and not n.domain and n.attrs.get("to") == onnx.TensorProto.FLOAT for n in casts):
            graph.initializers[name] = value.astype(np.float32)
            for node in casts:
                node.op, node.attrs = "Identity", {}


def merge_transpositions(graph: Graph, trace: Trace) -> None:
    """Write a reshape, transpositions and a reshape as one transposition of all factors, where that is the same."""
    makers = {name: node for name, node in graph.producers().items() if not node.domain}
    nodes, graph.nodes = graph.nodes, []
    for node in nodes:
        if node.op == "Reshape" and not node.domain:
            _merge_transposition(graph, node, makers, trace)
        graph.nodes.append(node)
    graph.prune()


def _merge_transposition(graph: Graph, node: Node, makers: Mapping[str, Node], trace: Trace) -> None:
    """Merge this reshape with the transpositions and the reshape before it, where they are one transposition."""
    after = _extents_or_none(trace, node.outputs[0])
    name, perm = node.inputs[0], list(range(len(_extents_or_none(trace, node.inputs[0]) or [])))
    # Backwards to the reshape before this one; the transpositions between are composed into one.
    while True:
        maker = makers.get(name)
        if maker is None or maker.op not in ("Reshape", "Transpose"):
            return
        before, between = _extents_or_none(trace, maker.inputs[0]), _extents_or_none(trace, name)
        if before is None or between is None or after is None or len(between) != len(perm):
            return
        if maker.op == "Transpose":
            step = list(maker.attrs.get("perm", range(len(perm))[::-1]))
            perm = [step[i] for i in perm]
        elif before != between:
            break
        name = maker.inputs[0]
    common = common_factors(before, between)
    if common is None or perm == sorted(perm):
        return
    factors, spans = common
    order = [factor for axis in perm for factor in spans[axis]]
    transposed = [factors[f] for f in order]
    exact = transposed == after
    frees_batch = _merges_batch(before, between) and not _merges_batch(factors, after)
    if not exact and not (frees_batch and _regroups_whole_axes(transposed, after)):
        return
    # The target of a reshape has one −1, so only one factor can depend on the batch.
    if sum(f % BATCH_EXTENT == 0 for f in factors) > 1:
        return
    source = maker.inputs[0]
    if factors != before:
        source = graph.emit("Reshape", source, _reshape_target(graph, factors))
    if exact:
        node.op, node.inputs, node.attrs = "Transpose", [source], {"perm": order}
    else:
        node.inputs = [graph.emit("Transpose", source, attrs={"perm": order}), _reshape_target(graph, after)]
        node.attrs.pop("allowzero", None)


def _merges_batch(before: Sequence[int], between: Sequence[int]) -> bool:
    """Whether a reshape merges the batch with another axis."""
    return any(b % BATCH_EXTENT == 0 and b not in before for b in between)


def _regroups_whole_axes(fine: Sequence[int], coarse: Sequence[int]) -> bool:
    """Whether every coarse axis is a product of consecutive fine axes."""
    common = common_factors(fine, coarse)
    return common is not None and common[0] == list(fine)


def _reshape_target(graph: Graph, sizes: Sequence[int]) -> str:
    """The target of a reshape to these sizes, with −1 for the one that depends on the batch."""
    return graph.ints(*(-1 if n % BATCH_EXTENT == 0 else n for n in sizes))


def _extents_or_none(trace: Trace, name: str) -> list[int] | None:
    """The sizes of a value as `channels.factors` compares them; None if it wasn't traced."""
    return extents(trace, name) if name in trace.shapes else None


_FILL_PRESERVING = REARRANGEMENTS | {"Cast", "Gather", "Slice", "Split", "Concat"}
_MAX_COPIES = 64  # a value with more readers is hardly a layer's first state


def copy_fills(graph: Graph, constants: Collection[str]) -> None:
    """Give every reader of a filled value a copy of the nodes that make it."""
    # `sizes` are values that shapes are computed from; `filled` are numbers repeated to such a shape.
    constant_names, sizes = set(constants), set[str]()
    filled: set[str] = set()
    outputs = {p.name for p in graph.outputs}
    for node in graph.nodes:
        if node.domain:
            continue
        reads = [i for i in node.inputs if i]
        if node.op in SIZE_OPERATORS or all(i in sizes or i in constant_names for i in reads):
            fills = node.op in ("Expand", "ConstantOfShape") and any(i in sizes for i in reads)
            (filled if fills else sizes).update(o for o in node.outputs if o)
        elif node.op in _FILL_PRESERVING and all(i in filled or i in sizes or i in constant_names for i in reads):
            filled.update(o for o in node.outputs if o)
    nodes: list[Node] = []
    readers: dict[str, list[Node]] = {}
    # Readers come before what they read, so that the inputs of a copy are copied in turn.
    for node in reversed(graph.nodes):
        copies = [node]
        output_names = [o for o in node.outputs if o]
        if output_names and filled.issuperset(output_names) and not outputs.intersection(output_names):
            reader_nodes = list({id(n): n for name in output_names for n in readers.get(name, [])}.values())
            copies += [_copy_for_reader(graph, node, reader) for reader in reader_nodes[1:_MAX_COPIES]]
        for copy in copies[::-1]:
            nodes.append(copy)
            for name in copy.inputs:
                readers.setdefault(name, []).append(copy)
    graph.nodes = nodes[::-1]


def guard_lengths(graph: Graph, constants: Container[str]) -> None:
    """Divide by 1 where the L2 norm of a parameter is 0, as that of a direction (weight norm) under a mask may be.

    0 / 0 is NaN, also in PyTorch. Where the norm is not 0, value and gradient stay the same.
    """
    makers = graph.producers()
    nodes: list[Node] = []
    for node in graph.nodes:
        length = makers.get(node.inputs[1]) if node.op == "Div" and not node.domain else None
        if length is not None and length.op == "ReduceL2" and not length.domain:
            source, divisor = length.inputs[0], node.inputs[1]
            if source in graph.initializers and source not in constants:
                empty, node.inputs[1] = graph.fresh("Equal"), graph.fresh("Where")
                nodes.append(Node("Equal", [divisor, graph.scalar(0)], [empty], {}, empty))
                choice = [empty, graph.scalar(1), divisor]
                nodes.append(Node("Where", choice, [node.inputs[1]], {}, node.inputs[1]))
        nodes.append(node)
    graph.nodes = nodes


def narrow_constants(graph: Graph, trace: Trace, constants: set[str]) -> None:
    """Shorten constants along axes on which all their numbers are equal, if another operand gives the axis its size.

    Args:
        constants: Names of initialisers that are constants; gets those that are new.
    """
    for node in graph.nodes:
        if node.domain or node.op not in MANY_TO_ONE or not all(i in trace.shapes for i in node.inputs):
            continue
        for position, name in enumerate(node.inputs):
            value = graph.initializers.get(name)
            if value is None or name not in constants or value.size < 2:
                continue
            operand_shapes = [trace.shapes[i] for i in node.inputs if i not in constants]
            shortened = value
            for axis, size in enumerate(value.shape):
                from_end = value.ndim - axis
                is_given = any(len(shape) >= from_end and shape[-from_end] == size for shape in operand_shapes)
                # Without another operand of this size the result itself would become shorter.
                if size > 1 and is_given and (value == value.take([0], axis)).all():
                    shortened = shortened.take([0], axis)
            if shortened.size < value.size:
                node.inputs[position] = graph.constant(shortened, shortened.dtype)
                constants.add(node.inputs[position])


def _copy_for_reader(graph: Graph, node: Node, reader: Node) -> Node:
    """Copy a node, and let one of its readers read the copy."""
    names = {name: graph.fresh(node.op) for name in node.outputs if name}
    reader.inputs = [names.get(i, i) for i in reader.inputs]
    outputs = [names.get(o, "") for o in node.outputs]
    return Node(node.op, list(node.inputs), outputs, dict(node.attrs), outputs[0])


_KEEPDIMS_REDUCTIONS = frozenset(
    {"ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare"}
)
# A slice with an end from here on goes to the end of its axis: exporters write 2^31 − 1 or 2^63 − 1.
_MIN_OPEN_END = 2**31 - 1

# The neutral second operand of an operator; also the first, if the operator is commutative.
_NEUTRAL_OPERANDS = {"Mul": 1.0, "Div": 1.0, "Add": 0.0, "Sub": 0.0, "Pow": 1.0}

_COMMUTATIVE = ("Mul", "Add")


def _substitute(graph: Graph, old: str, new: str) -> None:
    """Let every reader of `old` read `new`; an output keeps its name, so its producer takes it over."""
    for node in graph.nodes:
        node.inputs = [new if i == old else i for i in node.inputs]


def drop_identities(graph: Graph) -> None:
    outputs = {p.name for p in graph.outputs}
    for node in list(graph.nodes):
        if node.op == "Identity" and not node.domain:
            bypass(graph, node, outputs)


def bypass(graph: Graph, node: Node, outputs: set[str]) -> None:
    """Remove a node whose first output is its first input."""
    source, target = node.inputs[0], node.outputs[0]
    if target in outputs:
        # The name of an output must stay, so its producer takes it over.
        producer = graph.producers().get(source)
        if producer is None or source in outputs:
            return  # an output that is an input or initialiser keeps its Identity
        producer.outputs = [target if o == source else o for o in producer.outputs]
        _substitute(graph, source, target)
    else:
        _substitute(graph, target, source)
    graph.nodes = [n for n in graph.nodes if n is not node]


def simplify(graph: Graph, trace: Trace, constants: Container[str]) -> None:
    """Bring operators that can be written in several ways into one.

    Raises `ModelError` if a reduction takes computed axes.
    """
    for node in graph.nodes:
        if node.domain:
            continue
        traced = {i for i in [*node.inputs, *node.outputs] if i} <= trace.shapes.keys()
        if node.op == "Conv" and len(node.inputs) > 2 and node.inputs[2] in constants:
            # Exporters give a convolution without a bias one of zeros. A constant with a number per channel keeps all
            # channels.
            if not np.any(graph.initializers[node.inputs[2]]):
                node.inputs = node.inputs[:2]
        elif node.op == "Reshape" and traced:
            _settle_reshape(graph, node, trace)
        elif node.op == "ReduceSum":
            _settle_sum_axes(graph, node)
        elif node.op == "Squeeze" and len(node.inputs) < 2 and traced:
            axes = [i for i, d in enumerate(trace.dims(node.inputs[0])) if d == 1]
            node.inputs = [node.inputs[0], graph.ints(*axes)]
        elif node.op in ("Squeeze", "Unsqueeze") and len(node.inputs) == 2:
            target = node.inputs[1]
            if target in graph.initializers:
                node.inputs[1] = graph.ints(*graph.initializers[target].reshape(-1).tolist())
    _merge_reshapes(graph)
    _keep_reduced_axes(graph, trace)
    _drop_neutral(graph, trace, constants)


def _settle_reshape(graph: Graph, node: Node, trace: Trace) -> None:
    """Write a reshape that flattens samples as Flatten; in others write the entry that depends on the batch as −1."""
    source, target = trace.dims(node.inputs[0]), trace.dims(node.outputs[0])
    flat = len(target) == 2 and len(source) >= 2 and source[0] is None and None not in source[1:]
    if flat and target[0] is None and target[1] == math.prod(d or 1 for d in source[1:]):
        node.op, node.inputs, node.attrs = "Flatten", node.inputs[:1], {"axis": 1}
        return
    if sum(d is None for d in target) <= 1 and 0 not in target:
        node.inputs = [node.inputs[0], graph.ints(*(-1 if d is None else d for d in target))]
        node.attrs.pop("allowzero", None)


def _settle_sum_axes(graph: Graph, node: Node) -> None:
    """Make the axes of a ReduceSum constant; without any it reduces all.

    It is the only reduction whose axes are an input at opset 17. Raises `ModelError` if they are computed.
    """
    axes: list[int] = []
    if len(node.inputs) > 1 and node.inputs[1]:
        if node.inputs[1] not in graph.initializers:
            raise ModelError(f"operator {node.op} ({node.name}) takes computed axes", expected="constant axes")
        axes = graph.initializers[node.inputs[1]].reshape(-1).tolist()
    nothing = node.attrs.pop("noop_with_empty_axes", 0)
    if axes:
        node.inputs[1:] = [graph.ints(*axes)]
    else:
        node.inputs = node.inputs[:1]
        if nothing:
            node.op, node.attrs = "Identity", {}


def _merge_reshapes(graph: Graph) -> None:
    """Let a reshape of a reshape read the input of the first."""
    makers = graph.producers()
    for node in graph.nodes:
        # A 0 in the target copies a size of the input, which would be another one after the merge.
        if node.domain or node.op != "Reshape" or 0 in graph.initializers.get(node.inputs[1], np.zeros(1)):
            continue
        before = makers.get(node.inputs[0])
        while before is not None and before.op == "Reshape" and not before.domain:
            node.inputs[0] = before.inputs[0]
            before = makers.get(node.inputs[0])
    graph.prune()


def _keep_reduced_axes(graph: Graph, trace: Trace) -> None:
    """Let a reduction keep its axes, where a reshape inserts them again."""
    makers, readers = graph.producers(), graph.consumers()
    outputs = {p.name for p in graph.outputs}
    for node in graph.nodes:
        if node.domain or node.op not in ("Reshape", "Unsqueeze") or node.outputs[0] not in trace.shapes:
            continue
        before = makers.get(node.inputs[0])
        if before is None or before.domain or before.op not in _KEEPDIMS_REDUCTIONS or before.attrs.get("keepdims", 1):
            continue
        axes = before.attrs.get("axes")
        if before.op == "ReduceSum" and len(before.inputs) > 1 and before.inputs[1] in graph.initializers:
            axes = graph.initializers[before.inputs[1]].tolist()
        reduced = before.outputs[0]
        if not axes or reduced in outputs or len(readers[reduced]) != 1 or before.inputs[0] not in trace.shapes:
            continue
        source = trace.dims(before.inputs[0])
        reduced_axes = {a % len(source) for a in axes}
        # Only where the reshape puts a 1 in the place of each reduced axis is it what keepdims gives.
        same = trace.dims(node.outputs[0]) == tuple(1 if i in reduced_axes else d for i, d in enumerate(source))
        if same and all(source[a] is not None for a in reduced_axes):
            before.attrs["keepdims"], before.outputs = 1, list(node.outputs)
            node.outputs = []
    graph.nodes = [n for n in graph.nodes if n.outputs]


def _drop_neutral(graph: Graph, trace: Trace, constants: Container[str]) -> None:
    """Remove products with one, sums with zero, expansions to a value's own shape, and slices of everything."""
    outputs = {p.name for p in graph.outputs}
    for node in list(graph.nodes):
        value = None if node.domain else _unchanged_input(graph, trace, constants, node)
        if value is not None:
            node.inputs = [value]
            bypass(graph, node, outputs)


def _unchanged_input(graph: Graph, trace: Trace, constants: Container[str], node: Node) -> str | None:
    """The input that a node returns unchanged; None if it computes something."""
    if (node.op == "Slice" and _takes_everything(graph, trace, node)) or (
        node.op == "Concat" and len(node.inputs) == 1
    ):
        return node.inputs[0]
    if (node.op == "Where" and _takes_second(graph, trace, node)) or (
        node.op == "ScatterND" and _overwrites_everything(trace, node)
    ):
        return node.inputs[2]
    if len(node.inputs) != 2 or node.outputs[0] not in trace.shapes:
        return None
    for x, operand in (node.inputs, node.inputs[::-1]):
        is_first = operand != node.inputs[1]
        if (
            x not in trace.shapes
            or trace.dims(x) != trace.dims(node.outputs[0])
            or (is_first and node.op not in _COMMUTATIVE)
        ):
            continue
        value = graph.initializers.get(operand) if operand in constants and node.op in _NEUTRAL_OPERANDS else None
        if node.op == "Expand" or (
            value is not None and value.dtype == np.float32 and bool((value == _NEUTRAL_OPERANDS[node.op]).all())
        ):
            return x
    return None


def _takes_everything(graph: Graph, trace: Trace, node: Node) -> bool:
    """Whether a slice takes everything."""
    arguments = [graph.initializers.get(i) for i in node.inputs[1:] if i]
    if any(a is None for a in arguments) or not {node.inputs[0], node.outputs[0]} <= trace.shapes.keys():
        return False
    starts, ends = (a.tolist() for a in arguments[:2] if a is not None)
    steps = graph.initializers[node.inputs[4]] if len(node.inputs) > 4 and node.inputs[4] else np.ones(1)
    unbounded = all(s == 0 and e >= _MIN_OPEN_END for s, e in zip(starts, ends, strict=True))
    sizes = trace.dims(node.inputs[0])
    return bool((steps == 1).all()) and (unbounded or (None not in sizes and sizes == trace.dims(node.outputs[0])))


def _takes_second(graph: Graph, trace: Trace, node: Node) -> bool:
    """Whether a Where takes its second value everywhere, because its condition is constant and false."""
    condition, _, second = node.inputs
    never = condition in graph.initializers and not graph.initializers[condition].any()
    alike = {second, node.outputs[0]} <= trace.shapes.keys() and trace.dims(second) == trace.dims(node.outputs[0])
    return never and alike


def _overwrites_everything(trace: Trace, node: Node) -> bool:
    """Whether a scatter replaces every row of its data in order, as PyTorch's `x[:] = y` does."""
    data, indices, updates = node.inputs
    if node.attrs.get("reduction", "none") != "none" or not {data, updates} <= trace.shapes.keys():
        return False
    runs = [(trace.integers.get(indices), trace.shapes), (trace.integers_second.get(indices), trace.shapes_second)]
    return trace.dims(data) == trace.dims(updates) and all(
        rows is not None and np.array_equal(rows, np.arange(shapes[data][0])[:, None]) for rows, shapes in runs
    )
