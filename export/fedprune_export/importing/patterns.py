"""Recognises norms and activations in primitives by what they compute, and replaces each by a single operator.

A region is what computes a value from a single other one, besides constants and weights. Regions with the operators of
a norm or activation in them are run on samples, next to the operator that they may be: equal numbers, from very small
to large samples, are a match. How a region is written doesn't matter. Its last node is replaced; the others stay if
something else reads them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx

from fedprune.runtime.session import OnnxSession
from fedprune_export.ir.graph import Array, Graph, Node
from fedprune_export.ir.trace import Trace

_NORM_OPERATORS = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Reciprocal", "ReduceMean", "Reshape", "InstanceNormalization"}
)
_ACTIVATION_OPERATORS = frozenset({"Add", "Mul", "Div", "Pow", "Erf", "Tanh", "Softplus", "Where", "Greater"})
_LAST_OPERATORS = frozenset({"Add", "Mul", "Div", "Reshape", "Where"})
_RESHAPES = frozenset({"Reshape", "Squeeze", "Unsqueeze"})
_MAX_NODES = 16  # of a region: a norm with both vectors has up to 12
_ACTIVATION_SAMPLE = (4, 1000)
# Of samples: from 17 on a softplus is its input, in float32, and no bound of a model's author is as large as the last.
_LARGE_SCALES = (10.0, 1e18)
_TOLERANCE = 1e-5  # relative to a value, or to 1 where that is larger


class _Match(NamedTuple):
    """An operator that a region may be.

    `axes`: those of a norm, which are the last ones of the operator; of a GroupNormalization the channels.
    `vectors`: the names of its scale and bias by the operators that apply them, "Mul" and "Add".
    `sample`: the shape on which region and operator are compared.
    """

    x: str
    nodes: list[Node]  # from the last to the first
    op: str
    attrs: dict[str, Any]
    axes: Sequence[int]
    vectors: dict[str, str]
    sample: tuple[int, ...]


def replace_patterns(graph: Graph, trace: Trace, constants: Container[str]) -> int:
    """Replace norms and activations in primitives by the operators; returns how many."""
    constant_values = {name: value for name, value in graph.initializers.items() if name in constants}
    candidates = [(c, _signature(c, constant_values, trace)) for c in _candidates(graph, trace, constant_values)]
    # Layers repeat.
    distinct = {signature: candidate for candidate, signature in candidates}
    equal = dict(zip(distinct, _compare_numbers([*distinct.values()], constant_values, trace), strict=True))
    # Of several regions with one end the last is the largest.
    matches = {c.nodes[0].outputs[0]: c for c, signature in candidates if equal[signature]}
    reads = Counter(i for n in graph.nodes for i in n.inputs)
    for output, match in reversed([*matches.items()]):
        smaller = [n.outputs[0] for n in match.nodes[1:] if n.outputs[0] in matches]
        # A norm that something else reads, too, would be computed twice with the vectors that follow it.
        is_shared = any(reads[name] > 1 for name in smaller)
        for name in (output,) if is_shared else smaller:
            matches.pop(name, None)
    makers, nodes, graph.nodes = graph.producers(), graph.nodes, []
    for node in nodes:
        if node.outputs[0] in matches:
            _replace(graph, matches[node.outputs[0]], makers, trace, constant_values)
        else:
            graph.nodes.append(node)
    if matches:
        graph.prune()
    return len(matches)


def _candidates(graph: Graph, trace: Trace, constants: Mapping[str, Array]) -> Iterator[_Match]:
    """What regions may be by their operators, in the graph's order; of those with one end the largest last."""
    # Earlier passes have made values without a trace.
    makers = {n.outputs[0]: n for n in graph.nodes if not n.domain and n.outputs[0] in trace.shapes}
    order = {n.outputs[0]: i for i, n in enumerate(graph.nodes)}
    from_data = graph.values_from_inputs()
    for last in graph.nodes:
        if last.domain or last.op not in _LAST_OPERATORS or trace.dtypes.get(last.outputs[0]) != np.float32:
            continue
        for operators in (_NORM_OPERATORS, _ACTIVATION_OPERATORS):
            nodes, open_values = list[Node](), {last.outputs[0]}
            # Backwards, from the value that is made last.
            while len(nodes) < _MAX_NODES and open_values:
                value = max(open_values, key=lambda name: order.get(name, -1))
                maker = makers.get(value)
                if maker is None or maker.op not in operators:
                    break
                nodes.append(maker)
                open_values = (open_values - {value}) | {i for i in maker.inputs if i in from_data}
                x = next(iter(open_values), "")
                if len(open_values) == 1 and x in trace.shapes and trace.dims(x) == trace.dims(last.outputs[0]):
                    match = _activation(constants, x, nodes) or _norm(trace, constants, x, nodes)
                    if match is not None:
                        yield match


def _activation(constants: Mapping[str, Array], x: str, nodes: Sequence[Node]) -> _Match | None:
    operators, leaves = {n.op for n in nodes}, _leaves(x, nodes)
    if any(name not in constants or constants[name].size != 1 for _, name in leaves):
        return None
    if "Softplus" in operators:
        op, attrs = "Mish" if "Tanh" in operators else "Softplus", dict[str, Any]()
    elif operators & {"Erf", "Tanh"}:
        op, attrs = "Gelu", {"approximate": "none" if "Erf" in operators else "tanh"}
    else:
        return None
    return _Match(x, list(nodes), op, attrs, (), {}, _ACTIVATION_SAMPLE)


def _norm(trace: Trace, constants: Mapping[str, Array], x: str, nodes: Sequence[Node]) -> _Match | None:
    shape, vectors, epsilons = trace.shapes[x], dict[str, str](), list[float]()
    for node, name in _leaves(x, nodes):
        if name in constants and constants[name].size == 1:
            epsilons += [constants[name].item()] if node.op == "Add" else []
        elif node.op in ("Mul", "Add") and node.op not in vectors and name in trace.shapes:
            vectors[node.op] = name
        elif name not in constants:
            return None
    means = [n for n in nodes if n.op == "ReduceMean"]
    instance_norm = next((n for n in nodes if n.op == "InstanceNormalization"), None)
    if means:
        axes = sorted({a % len(shape) for n in means for a in n.attrs.get("axes", ())})
        op = "RMSNormalization" if len(means) == 1 else "LayerNormalization"
        attrs: dict[str, Any] = {"axis": -len(axes), "epsilon": next((e for e in epsilons if 0 < e < 1), None)}
    elif instance_norm is not None and len(shape) > 2 and None not in trace.dims(x)[1:]:
        groups = trace.shapes[instance_norm.inputs[0]][1]
        axes, op = [1], "GroupNormalization"
        attrs = {"num_groups": groups, "epsilon": instance_norm.attrs.get("epsilon", 1e-5)}
    else:
        return None
    # A mean over the batch belongs to a batch norm.
    if attrs["epsilon"] is None or not axes or axes[0] == 0 or (op == "RMSNormalization" and "Add" in vectors):
        return None
    if any(trace.shapes[n.inputs[0]] != shape for n in means) or shape[1] % attrs.get("num_groups", 1):
        return None
    size = math.prod(shape[a] for a in axes)
    if any(math.prod(trace.shapes[name]) != size for name in vectors.values()):
        return None
    return _Match(x, list(nodes), op, attrs, axes, vectors, shape)


def _leaves(x: str, nodes: Sequence[Node]) -> list[tuple[Node, str]]:
    """What a region reads besides x: constants, weights, and what is computed from them."""
    inside = {x, *(n.outputs[0] for n in nodes)}
    return [(n, name) for n in nodes for name in n.inputs if name and name not in inside]


def _signature(match: _Match, constants: Mapping[str, Array], trace: Trace) -> str:
    """What is the same for regions that compute the same of their inputs."""
    names = {match.x: "x", **{name: f"{op} {trace.shapes[name]}" for op, name in match.vectors.items()}}
    names |= {n.outputs[0]: str(i) for i, n in enumerate(match.nodes)}
    reads = [
        [names[i] if i in names else (constants[i].dtype, constants[i].tolist()) for i in n.inputs] for n in match.nodes
    ]
    return repr((match.op, match.attrs, match.sample, [(n.op, sorted(n.attrs.items())) for n in match.nodes], reads))


def _compare_numbers(candidates: Sequence[_Match], constants: Mapping[str, Array], trace: Trace) -> list[bool]:
    """Whether each region computes what its operator computes, by a run of all of them on samples."""
    probe, feeds, generator = Graph(), dict[str, Array](), np.random.default_rng(0)
    for match in candidates:
        # Where squares are as small as epsilon, it counts how epsilon is added.
        large = _LARGE_SCALES[:1] if match.axes else _LARGE_SCALES  # no norm has a bound, nor squares as large
        scales = np.array([1, math.sqrt(match.attrs.get("epsilon", 0.01)), *large], np.float32)
        names = {match.x: f"{match.sample} by {scales}"}
        if names[match.x] not in feeds:
            row_scales = np.resize(scales, [match.sample[0], *[1] * (len(match.sample) - 1)])
            feeds[names[match.x]] = row_scales * generator.standard_normal(match.sample, np.float32)
        for op, name in match.vectors.items():
            names[name] = f"{op} {trace.shapes[name]}"
            feeds.setdefault(names[name], generator.standard_normal(trace.shapes[name], np.float32))
        for node in match.nodes[::-1]:
            for leaf in set(node.inputs) - names.keys():
                names[leaf] = probe.constant(constants[leaf], constants[leaf].dtype)
            names[node.outputs[0]] = probe.emit(node.op, *(names[i] for i in node.inputs), attrs=node.attrs)
        sizes = [match.sample[a] for a in match.axes]
        vectors = {op: probe.emit("Reshape", names[v], probe.ints(*sizes)) for op, v in match.vectors.items()}
        value, expected = names[match.nodes[0].outputs[0]], probe.fresh(match.op)
        _emit(probe, match, names[match.x], vectors, expected)
        scale = probe.emit("Max", probe.emit("Abs", expected), probe.scalar(1))
        distance, bound = probe.emit("Abs", probe.emit("Sub", value, expected)), probe.scalar(_TOLERANCE)
        # A number that is none isn't within any bound.
        fits = probe.emit("LessOrEqual", distance, probe.emit("Mul", scale, bound))
        fits = probe.emit("Cast", fits, attrs={"to": onnx.TensorProto.FLOAT})
        probe.add_output(probe.emit("ReduceMin", fits, attrs={"keepdims": 0}))
    if not candidates:
        return []
    for name, feed in feeds.items():
        probe.add_input(name, feed.shape)
    values = OnnxSession(probe.to_bytes(), exact=True).run(feeds)
    return [bool(values[p.name]) for p in probe.outputs]


def _replace(
    graph: Graph, match: _Match, makers: Mapping[str, Node], trace: Trace, constants: Mapping[str, Array]
) -> None:
    """Write an operator in place of the last node of its region."""
    sizes, vectors = tuple(match.sample[a] for a in match.axes), dict[str, str]()
    for op, name in match.vectors.items():
        # Back through reshapes to the stored vector.
        stored = name
        while trace.shapes[stored] != sizes and (maker := makers.get(stored)) is not None and maker.op in _RESHAPES:
            stored = maker.inputs[0]
        if trace.shapes[stored] == sizes:
            vectors[op] = stored
        elif name in constants:
            vectors[op] = graph.constant(constants[name].reshape(sizes), np.float32)
        else:
            vectors[op] = graph.emit("Reshape", name, graph.ints(*sizes))
    _emit(graph, match, match.x, vectors, match.nodes[0].outputs[0])


def _emit(graph: Graph, match: _Match, x: str, vectors: Mapping[str, str], out: str) -> None:
    """Write an operator, with ones and zeros for vectors that it needs and the region lacks."""
    inputs, rank, sizes = list[str](), len(match.sample), [match.sample[a] for a in match.axes]
    if match.axes:
        inputs.append(vectors.get("Mul") or graph.constant(np.ones(sizes), np.float32))
    if "Add" in vectors or match.op == "GroupNormalization":
        inputs.append(vectors.get("Add") or graph.constant(np.zeros(sizes), np.float32))
    order = [*(a for a in range(rank) if a not in match.axes), *match.axes]
    if match.op == "GroupNormalization" or order == sorted(order):
        graph.emit(match.op, x, *inputs, attrs=match.attrs, out=out)
    else:
        normal = graph.emit(match.op, graph.emit("Transpose", x, attrs={"perm": order}), *inputs, attrs=match.attrs)
        graph.emit("Transpose", normal, attrs={"perm": np.argsort(order).tolist()}, out=out)
