"""Any ONNX model as a graph of few operators: one input `x`, one output `logits`, opset 17, constants folded.

What the rest of the compiler need not know is taken out here: names that clash with ours, shape arithmetic, operators
that do nothing at inference, forms of an operator that differ between opsets. Weights keep their names and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from fedprune.errors import ModelError
from fedprune.session import Session
from fedprune.step import LOGITS, RESERVED, X
from fedprune_export.graph import TRAINING_OPSET, Graph, Node, Port
from fedprune_export.trace import BATCHES, Trace, sample_input, trace

Array = npt.NDArray[Any]

CONSTANT_PREFIX = "const~"
"""Initialisers whose names begin so are constants: `Graph.constant` names them."""

_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
)
_REDUCTIONS = frozenset(
    {
        "ReduceMean",
        "ReduceMax",
        "ReduceMin",
        "ReduceProd",
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSum",
        "ReduceLogSumExp",
        "ReduceSumSquare",
    }
)
_TOLERANCE = 1e-4

_ROLES = {
    "Conv": {1: "weight", 2: "bias"},
    "Gemm": {1: "weight", 2: "bias"},
    "MatMul": {0: "weight", 1: "weight"},
    "BatchNormalization": {1: "norm_scale", 2: "norm_bias", 3: "stat_mean", 4: "stat_var"},
    "PRelu": {1: "weight"},
    "Add": {0: "bias", 1: "bias"},
    "Sub": {0: "bias", 1: "bias"},
    "Mul": {0: "norm_scale", 1: "norm_scale"},
    "Div": {1: "norm_scale"},
}
_CARRIERS = frozenset({"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten"})


@dataclass
class Normalised:
    """A graph that the compiler understands.

    Attributes:
        graph: The graph.
        parameters: Kind of every weight and statistic (a `TensorKind` value), in the order of first use.
        trace: Shapes and types of its values.
        notes: What was changed that a user may want to know.
    """

    graph: Graph
    parameters: dict[str, str]
    trace: Trace
    notes: list[str] = field(default_factory=list)


def normalise(model: onnx.ModelProto, parameters: frozenset[str] | None = None) -> Normalised:
    """Bring a model into the compiler's form and check that it still computes the same.

    Args:
        model: The model.
        parameters: Names of the trainable initialisers where the source knows them; then initialisers shared by several
            nodes are truly tied. Otherwise parameters are recognised by their use.

    Raises:
        ModelError: It has several inputs or outputs, a fixed batch, control flow, other types than float32, or
            operators that opset 17 has no form of.
    """
    if not model.graph.node:
        raise ModelError("the model has no operators")
    constants = {o for n in model.graph.node if n.op_type == "Constant" for o in n.output}
    graph = Graph.from_proto(_upgraded(model))
    constants |= {n for n in graph.initializers if n.startswith(CONSTANT_PREFIX)}
    notes: list[str] = []
    _check_ports(graph)
    _name_nodes(graph)
    reference = graph.copy()
    _drop_idle(graph)
    _rename(graph, constants, notes)
    if parameters is not None:
        constants |= {n for n in graph.initializers if n not in parameters}
    softmax = _drop_output_softmax(graph, notes)
    graph.prune()
    seen = trace(graph)
    _drop_casts(graph, seen)
    _fold(graph, seen, constants)
    _lower(graph, notes)
    _drop_idle(graph)
    _simplify(graph, seen, constants)
    graph.prune()
    if parameters is None:
        _untie(graph, constants, notes)
    kinds = _kinds(graph, constants, parameters is not None)
    _name_constants(graph, kinds)
    _name_nodes(graph)
    seen = trace(graph)
    _check_types(graph, seen)
    _check_same(reference, graph, softmax)
    return Normalised(graph, kinds, seen, notes)


def _upgraded(model: onnx.ModelProto) -> onnx.ModelProto:
    versions = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    if not versions or versions[0] >= TRAINING_OPSET:
        return model
    try:
        from onnx import version_converter

        upgraded: onnx.ModelProto = version_converter.convert_version(model, TRAINING_OPSET)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"the model's opset {versions[0]} can't be raised to {TRAINING_OPSET} ({reason})",
            hint=f"Export it again with opset_version={TRAINING_OPSET} or later.",
        ) from error
    return upgraded


def _check_ports(graph: Graph) -> None:
    if len(graph.inputs) != 1 or len(graph.outputs) != 1:
        names = [p.name for p in (graph.inputs if len(graph.inputs) != 1 else graph.outputs)]
        raise ModelError(
            "the model's inputs and outputs",
            expected="one input and one output",
            got=f"{len(graph.inputs)} and {len(graph.outputs)} ({', '.join(names)})",
            hint="Export a model that maps one tensor to logits.",
        )
    port = graph.inputs[0]
    if port.dtype.kind not in "fiu" or port.dtype == np.float64 or port.dtype == np.float16:
        raise ModelError(f"type of input {port.name}", expected="float32", got=port.dtype)
    if not port.shape or isinstance(port.shape[0], int):
        raise ModelError(
            f"input {port.name} has a fixed batch",
            expected="a free first dimension",
            got=list(port.shape),
            hint="Export the model with a dynamic batch.",
        )
    sample_input(port, 1)


def _substitute(graph: Graph, old: str, new: str) -> None:
    """Let every reader of `old` read `new`; an output keeps its name, so its producer takes it over."""
    for node in graph.nodes:
        node.inputs = [new if i == old else i for i in node.inputs]


def _drop_idle(graph: Graph) -> None:
    """Take out Identity and Dropout."""
    outputs = {p.name for p in graph.outputs}
    for node in list(graph.nodes):
        if node.domain or node.op not in ("Identity", "Dropout"):
            continue
        if node.op == "Dropout" and len(node.outputs) > 1 and node.outputs[1] in graph.consumers():
            continue
        _bypass(graph, node, outputs)


def _bypass(graph: Graph, node: Node, outputs: set[str]) -> None:
    """Remove a node whose first output is its first input."""
    source, target = node.inputs[0], node.outputs[0]
    if target in outputs:
        producer = graph.producers().get(source)
        if producer is None or source in outputs:
            return  # an output that is an input or initialiser keeps its Identity
        producer.outputs = [target if o == source else o for o in producer.outputs]
        _substitute(graph, source, target)
    else:
        _substitute(graph, target, source)
    graph.nodes = [n for n in graph.nodes if n is not node]


def _drop_casts(graph: Graph, seen: Trace) -> None:
    """Take out casts to the type that a value already has; what a CastLike takes its type from doesn't matter."""
    outputs = {p.name for p in graph.outputs}
    for node in list(graph.nodes):
        if node.domain or node.op not in ("Cast", "CastLike"):
            continue
        before, after = seen.dtypes[node.inputs[0]], seen.dtypes[node.outputs[0]]
        if before == after:
            _bypass(graph, node, outputs)
        elif node.op == "CastLike":
            node.op, node.inputs = "Cast", node.inputs[:1]
            node.attrs = {"to": int(onnx.helper.np_dtype_to_tensor_dtype(after))}


def _lower(graph: Graph, notes: list[str]) -> None:
    """Rewrite operators of later opsets in the forms of opset 17."""
    for node in graph.nodes:
        if node.domain:
            continue
        rule = _LOWERING.get(node.op)
        if rule is not None:
            rule(graph, node)
        if graph.opset > TRAINING_OPSET:
            _check_form(node)
    if graph.opset > TRAINING_OPSET:
        notes.append(f"Lowered from opset {graph.opset} to {TRAINING_OPSET}.")
        graph.opset = TRAINING_OPSET


def _check_form(node: Node) -> None:
    """Operators of later opsets are kept where they use only what opset 17 has."""
    try:
        schema = onnx.defs.get_schema(node.op, TRAINING_OPSET, "")
    except onnx.defs.SchemaError as error:
        raise ModelError(
            f"operator {node.op} ({node.name}) does not exist in opset {TRAINING_OPSET}",
            hint=f"Export the model with opset_version={TRAINING_OPSET} or 18.",
        ) from error
    extra = sorted(set(node.attrs) - set(schema.attributes))
    used = len(node.inputs)
    while used and not node.inputs[used - 1]:
        used -= 1
    if extra or used > schema.max_input:
        raise ModelError(
            f"operator {node.op} ({node.name}) is in a form that opset {TRAINING_OPSET} doesn't have",
            got=", ".join(extra) or f"{used} inputs",
            hint=f"Export the model with opset_version={TRAINING_OPSET} or 18.",
        )


def _static(graph: Graph, name: str, node: Node) -> Array:
    """An integer argument of an operator, which must be known when the model is imported."""
    if name in graph.initializers:
        return graph.initializers[name]
    raise ModelError(f"operator {node.op} ({node.name}) takes computed axes", expected="constant axes")


def _lower_reduction(graph: Graph, node: Node) -> None:
    """Axes as an attribute; empty axes with noop set mean that nothing is reduced."""
    if len(node.inputs) > 1 and node.inputs[1]:
        axes = _static(graph, node.inputs[1], node).reshape(-1).tolist()
        if axes or not node.attrs.get("noop_with_empty_axes"):
            node.inputs = node.inputs[:1]
            node.attrs.pop("noop_with_empty_axes", None)
            if axes:
                node.attrs["axes"] = axes
            return
        node.op, node.inputs, node.attrs = "Identity", node.inputs[:1], {}
        return
    if node.attrs.pop("noop_with_empty_axes", 0):
        node.op, node.attrs = "Identity", {}
    node.inputs = node.inputs[:1]


def _lower_pooling(graph: Graph, node: Node) -> None:
    """Dilations of 1 are the only ones that AveragePool knows in opset 17."""
    if node.op == "AveragePool" and all(d == 1 for d in node.attrs.get("dilations", [])):
        node.attrs.pop("dilations", None)


def _lower_cast(graph: Graph, node: Node) -> None:
    """The newer attributes of casts concern types below 16 bits only."""
    node.attrs.pop("saturate", None)
    node.attrs.pop("round_mode", None)


def _lower_reshape(graph: Graph, node: Node) -> None:
    if not node.attrs.get("allowzero"):
        node.attrs.pop("allowzero", None)


def _lower_batch_norm(graph: Graph, node: Node) -> None:
    if node.attrs.get("training_mode"):
        raise ModelError(
            f"batch normalisation {node.name} is in training mode",
            hint="Export the model in evaluation mode (module.eval()).",
        )
    node.attrs.pop("training_mode", None)
    node.attrs.pop("momentum", None)
    node.attrs.pop("spatial", None)
    node.outputs = node.outputs[:1]


_LOWERING: dict[str, Callable[[Graph, Node], None]] = {
    **dict.fromkeys(_REDUCTIONS, _lower_reduction),
    "AveragePool": _lower_pooling,
    "Cast": _lower_cast,
    "CastLike": _lower_cast,
    "Reshape": _lower_reshape,
    "BatchNormalization": _lower_batch_norm,
}


def _rename(graph: Graph, constants: set[str], notes: list[str]) -> None:
    """Name input and output as the contract says, and everything that clashes with a reserved name another way."""
    taken = {*graph.initializers, *(o for n in graph.nodes for o in n.outputs), graph.inputs[0].name}
    names: dict[str, str] = {}
    renamed: list[str] = []
    for old in [*graph.initializers, *(o for n in graph.nodes for o in n.outputs)]:
        new = old.replace("::", "__")
        while old and (new in RESERVED or new == "__metadata__" or (new != old and new in taken)):
            new += "_"
        if new != old:
            names[old] = new
            taken.add(new)
            if old in graph.initializers and old not in constants:
                renamed.append(f"{old} is called {new}")
    if renamed:
        more = f", and {len(renamed) - 3} more" if len(renamed) > 3 else ""
        notes.append(f"Tensors with reserved names were renamed: {', '.join(renamed[:3])}{more}.")
    output = graph.outputs[0].name
    names.pop(output, None)
    names[graph.inputs[0].name] = X
    if output == graph.inputs[0].name or output in graph.initializers:
        raise ModelError("the model's output is not computed from its input", got=output)
    names[output] = LOGITS
    graph.inputs[0].name = X
    graph.inputs[0].shape = ("N", *graph.inputs[0].shape[1:])
    graph.outputs[0].name = LOGITS
    graph.initializers = {names.get(k, k): v for k, v in graph.initializers.items()}
    constants.update(names[c] for c in list(constants) if c in names)
    for node in graph.nodes:
        node.inputs = [names.get(i, i) for i in node.inputs]
        node.outputs = [names.get(o, o) for o in node.outputs]


def _drop_output_softmax(graph: Graph, notes: list[str]) -> str:
    """A softmax over classes at the end belongs to the loss; it doesn't change which class wins.

    Returns:
        The operator that was removed, empty if none.
    """
    last = graph.producers().get(LOGITS)
    if last is None or last.domain or last.op not in ("Softmax", "LogSoftmax"):
        return ""
    if last.inputs[0] not in graph.producers() or LOGITS in graph.consumers():
        return ""
    if last.attrs.get("axis", -1) not in (-1, len(graph.outputs[0].shape) - 1):
        return ""
    notes.append(f"The {last.op} at the end was removed: the output is logits.")
    _bypass(graph, last, {LOGITS})
    return last.op


def _fold(graph: Graph, seen: Trace, constants: set[str]) -> None:
    """Turn what depends neither on the data nor on weights into constants.

    Small integers that came out the same at both batch sizes are constants whatever made them: shape arithmetic.
    """
    known = {n: graph.initializers[n] for n in constants if n in graph.initializers}
    for node in graph.nodes:
        for name in node.outputs:
            first, second = seen.integers.get(name), seen.integers_second.get(name)
            if first is not None and second is not None and np.array_equal(first, second):
                known[name] = first
    static: set[str] = set()
    for node in graph.nodes:
        reads = [i for i in node.inputs if i]
        if (
            node.op not in _RANDOM
            and all(i in known or i in static for i in reads)
            and not all(o in known for o in node.outputs if o)
        ):
            static.update(o for o in node.outputs if o)
    if static:
        known.update(_evaluate(graph, known, static, seen))
    found = {o for n in graph.nodes for o in n.outputs if o in known and o != LOGITS}
    graph.nodes = [n for n in graph.nodes if not all(o in found for o in n.outputs if o)]
    for name in found:
        graph.initializers[name] = np.array(known[name], order="C")
        constants.add(name)


def _evaluate(graph: Graph, known: Mapping[str, Array], static: set[str], seen: Trace) -> dict[str, Array]:
    names = sorted(static)
    part = Graph(
        outputs=[Port(n, seen.dtypes[n], seen.shapes[n]) for n in names],
        nodes=[n for n in graph.copy().nodes if any(o in static for o in n.outputs)],
        initializers=dict(known),
        opset=graph.opset,
    )
    part.prune()
    return Session(part.to_bytes()).run({}, names)


def _simplify(graph: Graph, seen: Trace, constants: set[str]) -> None:
    """Bring operators that can be written in several ways into one."""
    for node in graph.nodes:
        if node.domain:
            continue
        if node.op == "Conv" and len(node.inputs) > 2 and node.inputs[2] in constants:
            if not np.any(graph.initializers[node.inputs[2]]):
                node.inputs = node.inputs[:2]
        elif node.op == "Reshape":
            _simplify_reshape(graph, node, seen)
        elif node.op in ("Squeeze", "Unsqueeze") and len(node.inputs) == 2:
            target = node.inputs[1]
            if target in graph.initializers:
                node.inputs[1] = graph.ints(*graph.initializers[target].reshape(-1).tolist())


def _simplify_reshape(graph: Graph, node: Node, seen: Trace) -> None:
    """Write a flatten as Flatten, and at most one batch-dependent entry of a target as -1."""
    source, target = seen.dims(node.inputs[0]), seen.dims(node.outputs[0])
    flat = len(target) == 2 and len(source) >= 2 and source[0] is None and None not in source[1:]
    if flat and target[0] is None and target[1] is not None:
        node.op, node.inputs, node.attrs = "Flatten", node.inputs[:1], {"axis": 1}
        return
    if sum(d is None for d in target) <= 1 and 0 not in target:
        node.inputs = [node.inputs[0], graph.ints(*(-1 if d is None else d for d in target))]
        node.attrs.pop("allowzero", None)


def _untie(graph: Graph, constants: set[str], notes: list[str]) -> None:
    """Give every node its own copy of an initialiser that exporters merged only because the values were equal.

    Uniform vectors (fresh norms) are merged by value; a matrix that several nodes read is truly tied.
    """
    uses: dict[str, int] = {}
    for node in graph.nodes:
        for i, name in enumerate(node.inputs):
            value = graph.initializers.get(name)
            if value is None or name in constants or value.dtype != np.float32:
                continue
            uses[name] = uses.get(name, 0) + 1
            if uses[name] > 1 and value.size > 1 and np.all(value == value.reshape(-1)[0]):
                clone = f"{name}_{uses[name]}"
                while clone in graph.initializers:
                    clone += "_"
                graph.initializers[clone] = value
                node.inputs[i] = clone
                notes.append(f"Tensor {name} was shared; {node.op} {node.name} has its own copy {clone}.")


def _kinds(graph: Graph, constants: set[str], explicit: bool) -> dict[str, str]:
    """What every weight is for, by its use; the rest are constants.

    Args:
        graph: The graph.
        constants: Names known to be constants.
        explicit: Whether every initialiser that is not a constant is a parameter, scalars too.
    """
    consumers = graph.consumers()
    kinds: dict[str, str] = {}
    for node in graph.nodes:
        for i, name in enumerate(node.inputs):
            value = graph.initializers.get(name)
            if value is None or name in kinds or value.dtype != np.float32:
                continue
            norm = node.op == "BatchNormalization"
            if (name in constants and not norm) or not (explicit or norm or value.size > 1):
                continue
            role = _role(consumers, node, i)
            if role:
                kinds[name] = role
    return kinds


def _role(consumers: Mapping[str, list[tuple[Node, int]]], node: Node, index: int) -> str:
    if node.domain:
        return ""
    if node.op in _CARRIERS and index == 0:
        for reader, i in consumers.get(node.outputs[0], []):
            role = _role(consumers, reader, i)
            if role:
                return role
        return ""
    return _ROLES.get(node.op, {}).get(index, "")


def _name_constants(graph: Graph, kinds: Mapping[str, str]) -> None:
    """Name constants as ours, so that importing this graph again finds the same parameters."""
    names: dict[str, str] = {}
    for name in _in_order(graph):
        if name in graph.initializers and name not in kinds:
            value = graph.initializers[name]
            names[name] = name if name.startswith(CONSTANT_PREFIX) else graph.constant(value, value.dtype)
    for node in graph.nodes:
        node.inputs = [names.get(i, i) for i in node.inputs]
    order = {**dict.fromkeys(kinds), **dict.fromkeys(names.values())}
    graph.initializers = {n: graph.initializers[n] for n in order}
    graph.prune()


def _in_order(graph: Graph) -> Iterable[str]:
    return dict.fromkeys(i for n in graph.nodes for i in n.inputs if i)


def _name_nodes(graph: Graph) -> None:
    seen: set[str] = set()
    for node in graph.nodes:
        if not node.name or node.name in seen:
            node.name = node.outputs[0]
        while node.name in seen:
            node.name += "_"
        seen.add(node.name)


def _check_types(graph: Graph, seen: Trace) -> None:
    for node in graph.nodes:
        for name in node.outputs:
            if name and seen.dtypes[name] in (np.dtype(np.float16), np.dtype(np.float64)):
                raise ModelError(
                    f"{node.op} {node.name} computes in {seen.dtypes[name]}",
                    expected="float32",
                    hint="Convert the model to float32 before exporting it.",
                )


def _check_same(reference: Graph, graph: Graph, softmax: str) -> None:
    """Compare the outputs before and after on random numbers."""
    before, after = Session(reference.to_bytes()), Session(graph.to_bytes())
    x = sample_input(graph.inputs[0], BATCHES[0] + BATCHES[1], seed=1)
    old = before.run({reference.inputs[0].name: x})[reference.outputs[0].name]
    new = after.run({X: x})[LOGITS]
    if softmax:
        new = new - new.max(-1, keepdims=True)
        new = new - np.log(np.exp(new).sum(-1, keepdims=True))
        new = np.exp(new) if softmax == "Softmax" else new
    scale = max(float(np.abs(old).max(initial=0)), 1e-6)
    worst = float(np.abs(old - new).max(initial=0)) / scale if old.shape == new.shape else float("inf")
    if not worst <= _TOLERANCE and np.isfinite(old).all():
        raise ModelError(
            "the model computes something else after normalisation",
            expected=f"outputs equal to {_TOLERANCE:g}",
            got=f"{worst:.2g}",
            hint="Please report this with the model.",
        )
