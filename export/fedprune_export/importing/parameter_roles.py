"""Roles of initialisers: weights, statistics and constants.

A file's metadata may list the weights; otherwise they are recognised by their use.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet

import numpy as np
import onnx

from fedprune.core.errors import ModelError
from fedprune.core.text import first_few
from fedprune_export.ir.graph import Array, Graph, Node
from fedprune_export.ir.operators import REARRANGEMENTS

CONSTANT_PREFIX = "const~"  # initialisers whose names begin so are constants: `Graph.constant` names them

_ROLES = {
    "Conv": {1: "weight", 2: "bias"},
    "Gemm": {1: "weight", 2: "bias"},
    "MatMul": {0: "weight", 1: "weight"},
    "ConvTranspose": {1: "weight", 2: "bias"},
    "Gather": {0: "weight"},
    "Einsum": {0: "weight", 1: "weight", 2: "weight"},
    **{op: {1: "weight", 2: "weight", 3: "bias", 7: "weight"} for op in ("LSTM", "GRU", "RNN")},
    **{f"{kind}Normalization": {1: "norm_scale", 2: "norm_bias"} for kind in ("Layer", "Group", "Instance")},
    "RMSNormalization": {1: "norm_scale"},
    "BatchNormalization": {1: "norm_scale", 2: "norm_bias", 3: "stat_mean", 4: "stat_var"},
    "PRelu": {1: "weight"},
    "Add": {0: "bias", 1: "bias"},
    "Sub": {0: "bias", 1: "bias"},
    "Mul": {0: "norm_scale", 1: "norm_scale"},
    "Div": {1: "norm_scale"},
}
# Operators whose operand may be a weight, but also a table of positions or a normalisation of images.
_WEIGHTED_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div"})

_LAYER_OPERATORS = frozenset({"Conv", "ConvTranspose", "Gemm", "GRU", "LSTM", "MatMul", "RNN"})
_PRODUCT_OPERATORS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum"})
_PARAMETERS_HINT = "--parameters FILE lists what is to be trained."
_MAX_MASK_SCORE = -1e4  # what a mask adds to scores that don't count is this or less
_STATISTICS = ("stat_mean", "stat_var")


def constants_of(model: onnx.ModelProto, graph: Graph, notes: list[str]) -> set[str]:
    """The values of a file's Constant nodes; none if all its weights are such nodes.

    Several exporters write weights as such nodes; others write only what the author has written as a number.

    Args:
        notes: Gets a sentence on tensors that may be weights and are taken for constants.
    """
    constants = {o for n in model.graph.node if n.op_type == "Constant" for o in n.output}
    weights = {
        name
        for node in graph.nodes
        if node.op in _LAYER_OPERATORS and not node.domain
        for i, name in enumerate(node.inputs)
        if _ROLES[node.op].get(i) == "weight" and name in graph.initializers
    }
    # A file whose weights are all Constant nodes says nothing about what its author made constant.
    if weights and not weights - constants:
        return set()
    doubtful = [n for n in sorted(weights & constants) if graph.initializers[n].dtype == np.float32]
    if doubtful:
        notes.append(
            f"Taken for constants, as Constant nodes hold them: {first_few(doubtful, max_names=3)}. {_PARAMETERS_HINT}"
        )
    return constants


def untie(graph: Graph, constants: set[str], notes: list[str]) -> None:
    """Give every node its own copy of an initialiser that exporters merged only because the values were equal.

    Uniform vectors (fresh norms) are merged by value; a matrix that several nodes read is truly tied.
    """
    uses: dict[str, int] = {}
    used_names = {*graph.initializers, *(o for n in graph.nodes for o in n.outputs), *(p.name for p in graph.inputs)}
    for node in graph.nodes:
        for i, name in enumerate(node.inputs):
            value = graph.initializers.get(name)
            if value is None or name in constants or value.dtype != np.float32:
                continue
            uses[name] = uses.get(name, 0) + 1
            # A PRelu slope with one number is one parameter for the model's author, too: several layers may use it.
            slope = node.op == "PRelu" and value.size == 1
            if uses[name] > 1 and not slope and np.all(value == value.reshape(-1)[0]):
                clone = f"{name}_{uses[name]}"
                while clone in used_names:
                    clone += "_"
                used_names.add(clone)
                graph.initializers[clone] = value
                node.inputs[i] = clone
                notes.append(f"Tensor {name} was shared; {node.op} {node.name} has its own copy {clone}.")


def find_kinds(graph: Graph, constants: set[str], listed: set[str] | None, notes: list[str]) -> dict[str, str]:
    """The role of every parameter, by its use; all other initialisers are constants.

    Statistics of batch norms are always parameters. Vectors that scale a norm's output are parameters unless they are
    known constants. A tensor that is added to the model's input, or multiplied by it, normalises data: a constant.
    Raises `ModelError` if a parameter is not float32.

    Args:
        listed: The parameters, where the source knows them: then each counts, scalars and those of unknown use too.
        notes: Gets a sentence for every tensor that could be a weight and is taken for a constant, and one for all that
            could be constants and are taken for weights.
    """
    consumers, data_values = graph.consumers(), graph.values_from_inputs()
    rescaled_inputs, producers = _rescaled_inputs(graph, data_values), graph.producers()
    applied_to_input: list[str] = []
    guessed: list[str] = []
    norms = {
        name: _ROLES[node.op][i]
        for node in graph.nodes
        if node.op == "BatchNormalization" and not node.domain
        for i, name in enumerate(node.inputs)
        if i and name in graph.initializers
    }
    kinds: dict[str, str] = {}
    for name in _read_order(graph):
        value = graph.initializers.get(name)
        if value is None:
            continue
        is_parameter = name not in constants if listed is None else name in listed
        # Batch statistics are buffers in PyTorch, so a list of parameters may leave them out.
        if not is_parameter and norms.get(name) not in _STATISTICS:
            continue
        if value.dtype != np.float32:
            if listed is not None:
                raise ModelError(f"parameter {name}", expected="float32", got=value.dtype)
            continue
        uses = _roles_of_uses(consumers, data_values, name)
        if listed is not None or name in norms:
            kinds[name] = norms.get(name) or (uses[0][0] if uses else "weight")
            continue
        # A single number is a weight as a slope or as the bias of one output. One that scales or shifts is more often
        # the author's constant.
        if value.size == 1:
            uses = [
                u for u in uses if u[1].op not in _WEIGHTED_ARITHMETIC or is_sole_bias(graph, producers, u[1], name)
            ]
            if not uses:
                continue
        other_operands = [n.inputs[1 - i] if n.op in _WEIGHTED_ARITHMETIC else "" for _, n, i in uses]
        if _is_mask(value, {n.op for n, _ in consumers[name]}):
            notes.append(f"Tensor {name} is a mask, of two numbers: a constant, and not trained.")
        elif not uses:
            notes.append(f"Tensor {name} is taken for a constant and not trained: its use doesn't make it a weight.")
        elif all(o in rescaled_inputs for o in other_operands):
            applied_to_input.append(name)
        else:
            kinds[name] = uses[0][0]
            other_makers = [producers[o].op if o in producers else "" for o in other_operands]
            # A vector that is added to a product is its bias; anything else may be a table or a normalisation.
            is_vector = max(value.shape, default=1) == value.size
            if all(other_operands) and not (
                is_vector and uses[0][1].op == "Add" and other_makers[0] in _PRODUCT_OPERATORS
            ):
                guessed.append(name)
    if applied_to_input:
        notes.append(
            f"Taken for constants, as they apply straight to the input: {first_few(applied_to_input, max_names=3)}. "
            f"{_PARAMETERS_HINT}"
        )
    if guessed:
        notes.append(
            f"Trained because they are added or multiplied, as constants may be too: {first_few(guessed, max_names=3)}."
            f" {_PARAMETERS_HINT}"
        )
    return kinds


def _is_mask(value: Array, readers: AbstractSet[str]) -> bool:
    """Whether a tensor is a mask: of 0 and one very low number, which are added to scores, or of factors 1 and 0."""
    low, high = value.min(initial=np.inf), value.max(initial=-np.inf)
    if not ((value == low) | (value == high)).all():
        return False
    added = bool(low <= _MAX_MASK_SCORE and high == 0) and readers <= {"Add", "Sub"}
    return added or (value.ndim > 1 and bool(low == 0 and high == 1) and readers == {"Mul"})


def is_sole_bias(graph: Graph, producers: Mapping[str, Node], node: Node, name: str) -> bool:
    """Whether a single number is the bias of a product with one output. A number without axes is none."""
    if node.op != "Add" or node.domain or name not in node.inputs or not graph.initializers[name].ndim:
        return False
    product = producers.get(node.inputs[1 - node.inputs.index(name)])
    if product is None or product.domain or len(product.inputs) < 2:
        return False
    weight = graph.initializers.get(product.inputs[1])
    if weight is None or weight.ndim < 2:
        return False
    if product.op == "ConvTranspose":
        return int(weight.shape[1]) * int(product.attrs.get("group", 1)) == 1
    axis = {"MatMul": -1, "Conv": 0, "Gemm": 0 if product.attrs.get("transB") else 1}.get(product.op)
    return axis is not None and int(weight.shape[axis]) == 1


def note_scalars(graph: Graph, scalars: set[str], notes: list[str]) -> None:
    """A note on single numbers that scale or shift and aren't trained.

    `scalars`: names of numbers that are taken for constants and could be weights.
    """
    data_values, readers = graph.values_from_inputs(), graph.consumers()
    used = [
        s
        for s in _read_order(graph)
        if s in scalars
        and any(n.op in _WEIGHTED_ARITHMETIC and data_values.intersection(n.outputs) for n, _ in readers[s])
    ]
    if used:
        notes.append(f"Single numbers that are taken for constants: {first_few(used, max_names=3)}. {_PARAMETERS_HINT}")


def _rescaled_inputs(graph: Graph, data_values: set[str]) -> set[str]:
    """The model's input and what is computed from it by rearrangement, shifts and scales only."""
    out = {p.name for p in graph.inputs}
    for node in graph.nodes:
        data = data_values.intersection(node.inputs)
        if data and data <= out and not node.domain and node.op in _WEIGHTED_ARITHMETIC | REARRANGEMENTS | {"Cast"}:
            out.update(o for o in node.outputs if o)
    return out


def _roles_of_uses(
    consumers: Mapping[str, list[tuple[Node, int]]], data_values: set[str], start: str
) -> list[tuple[str, Node, int]]:
    """The roles in which an initialiser, or a value computed from it and other weights, is combined with data.

    Each comes with the node and the index of its input.
    """
    out: list[tuple[str, Node, int]] = []
    visited, pending = {start}, [start]
    while pending:
        for node, i in consumers.get(pending.pop(0), []):
            if node.domain:
                continue
            met = data_values.intersection(node.outputs)
            if not met or (node.op in REARRANGEMENTS and i == 0):
                further = [o for o in node.outputs if o and o not in visited]
                visited.update(further)
                pending += further
            elif role := _ROLES.get(node.op, {}).get(i, ""):
                out.append((role, node, i))
    return out


def name_constants(graph: Graph, kinds: Mapping[str, str]) -> None:
    """Give constants the compiler's prefix, so that a second import finds the same parameters."""
    names: dict[str, str] = {}
    for name in _read_order(graph):
        if name in graph.initializers and name not in kinds:
            value = graph.initializers[name]
            names[name] = name if name.startswith(CONSTANT_PREFIX) else graph.constant(value, value.dtype)
    for node in graph.nodes:
        node.inputs = [names.get(i, i) for i in node.inputs]
    # Parameters first, in the order of first use, so that a second import lists the same order.
    order = {**dict.fromkeys(kinds), **dict.fromkeys(names.values())}
    graph.initializers = {n: graph.initializers[n] for n in order}
    graph.prune()


def _read_order(graph: Graph) -> Iterable[str]:
    return dict.fromkeys(i for n in graph.nodes for i in n.inputs if i)
