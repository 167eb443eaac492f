"""Recognises which initialisers of a graph are weights, statistics and constants.

The role of a parameter (a `TensorKind` value, such as `weight` or `norm_scale`) follows from the operators that read
it. A file's metadata may list the parameters; otherwise they, too, are recognised by their use.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet

import numpy as np

from fedprune.core.errors import ModelError
from fedprune.core.text import first_few
from fedprune_export.importing.metadata import CONSTANTS_KEY
from fedprune_export.importing.role_guesses import (
    PARAMETERS_HINT,
    ROLES,
    WEIGHTED_ARITHMETIC,
    RoleGuesses,
    is_sole_bias,
)
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.operators import REARRANGEMENTS

CONSTANT_PREFIX = "const~"  # initialisers whose names begin so are constants: `Graph.constant` names them

_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Clip", "Max", "Min"})
# Operators through which no gradient passes: what only they read isn't trained.
_UNTRAINED_READERS = frozenset({"EyeLike", "Range", "Shape", "Size"})
_LAYER_OPERATORS = frozenset({"Conv", "ConvTranspose", "Gemm", "GRU", "LSTM", "MatMul", "RNN"})
_STATISTICS = ("stat_mean", "stat_var")


def constants_of(graph: Graph, notes: list[str]) -> set[str]:
    """The values of a file's Constant nodes, whose names are taken out of the metadata; none if all its weights are
    such nodes.

    Several exporters write weights as Constant nodes; others write only numbers in the author's code as such nodes.
    `notes` gets a sentence on tensors that may be weights and are taken for constants.
    """
    constants = {*graph.metadata.pop(CONSTANTS_KEY, "").split("\n")} - {""}
    makers = graph.producers()
    weights = {
        name
        for node in graph.nodes
        if node.op in _LAYER_OPERATORS and not node.domain
        for i, read in enumerate(node.inputs)
        if ROLES[node.op].get(i) == "weight" and (name := stored_name(read, makers)) in graph.initializers
        # The import has made these itself.
        if not name.startswith(CONSTANT_PREFIX)
    }
    # A file whose weights are all Constant nodes says nothing about what its author made constant.
    if weights and not weights - constants:
        return set()
    doubtful = [n for n in sorted(weights & constants) if graph.initializers[n].dtype == np.float32]
    if doubtful:
        notes.append(
            f"Taken for constants, as Constant nodes hold them: {first_few(doubtful, max_names=3)}. {PARAMETERS_HINT}"
        )
    return constants


def stored_name(name: str, makers: Mapping[str, Node]) -> str:
    """The value that this one is, only rearranged or cast."""
    while (node := makers.get(name)) is not None and node.op in REARRANGEMENTS | {"Cast"} and not node.domain:
        name = node.inputs[0]
    return name


def untie(graph: Graph, kept: AbstractSet[str], notes: list[str]) -> None:
    """Give every node its own copy of an initialiser that exporters merged only because the values were equal.

    Uniform vectors (fresh norms) are merged by value; a matrix that several nodes read is truly tied. Tensors of `kept`
    stay as they are.
    """
    uses: dict[str, int] = {}
    used_names = {*graph.initializers, *(o for n in graph.nodes for o in n.outputs), *(p.name for p in graph.inputs)}
    for node in graph.nodes:
        for i, name in enumerate(node.inputs):
            value = graph.initializers.get(name)
            if value is None or name in kept or value.dtype != np.float32:
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


def find_roles(
    graph: Graph, constants: AbstractSet[str], listed: AbstractSet[str] | None, notes: list[str]
) -> dict[str, str]:
    """The role of every parameter, by its use; all other initialisers are constants.

    Statistics of batch norms are always parameters. Raises `ModelError` if a parameter is not float32.

    Args:
        listed: The parameters, where the source knows them, also single numbers and tensors of unknown use.
        notes: Gets a sentence on every tensor that could be a weight and is taken for a constant, and one on all that
            could be constants and are taken for weights.
    """
    readers = graph.consumers()
    guesses = RoleGuesses(graph, notes)
    roles: dict[str, str] = {}
    for name in _read_order(graph):
        value = graph.initializers.get(name)
        if value is None:
            continue
        is_parameter = name not in constants if listed is None else name in listed
        # Batch statistics are buffers in PyTorch, so a list of parameters may leave them out.
        if not is_parameter and not any(ROLES.get(n.op, {}).get(i) in _STATISTICS for n, i in readers[name]):
            continue
        if value.dtype != np.float32:
            if listed is not None:
                raise ModelError(f"parameter {name}", expected="float32", got=value.dtype)
            continue
        if listed is not None:
            uses = guesses.uses(name)
            role = uses[0].role if uses else "weight"
        else:
            role = guesses.guess_role(name, value)
        if role:
            roles[name] = role
    guesses.note_doubts()
    return roles


def note_scalars(graph: Graph, scalars: set[str], notes: list[str]) -> None:
    """Note which of these single numbers scale or shift data: they could be weights and are taken for constants."""
    data_values, readers = graph.values_from_inputs(), graph.consumers()
    used = [
        s
        for s in _read_order(graph)
        if s in scalars
        and any(n.op in WEIGHTED_ARITHMETIC and data_values.intersection(n.outputs) for n, _ in readers[s])
    ]
    if used:
        notes.append(f"Single numbers that are taken for constants: {first_few(used, max_names=3)}. {PARAMETERS_HINT}")


def name_constants(graph: Graph, roles: Mapping[str, str]) -> None:
    """Give constants the compiler's prefix, so that a second import finds the same parameters."""
    names: dict[str, str] = {}
    for name in _read_order(graph):
        if name in graph.initializers and name not in roles:
            value = graph.initializers[name]
            names[name] = name if name.startswith(CONSTANT_PREFIX) else graph.constant(value, value.dtype)
    for node in graph.nodes:
        node.inputs = [names.get(i, i) for i in node.inputs]
    # Parameters first, in the order of first use, so that a second import lists the same order.
    order = {**dict.fromkeys(roles), **dict.fromkeys(names.values())}
    graph.initializers = {n: graph.initializers[n] for n in order}
    graph.prune()


def _read_order(graph: Graph) -> Iterable[str]:
    return dict.fromkeys(i for n in graph.nodes for i in n.inputs if i)


def plain_numbers(graph: Graph) -> set[str]:
    """Initialisers that are constants by their kind: integers, what no gradient reaches, and single numbers that scale,
    shift or bound.

    The bias of a product with one output is a single number, too, but it trains.
    """
    readers, producers = graph.consumers(), graph.producers()

    def is_untrained(name: str) -> bool:
        return bool(readers.get(name)) and all(n.op in _UNTRAINED_READERS and not n.domain for n, _ in readers[name])

    def is_plain(name: str) -> bool:
        uses = [n for n, _ in readers.get(name, [])]
        # Anything but arithmetic, such as a PRelu, may train a single number.
        return all(n.op in _ARITHMETIC and not n.domain for n in uses) and not any(
            is_sole_bias(graph, producers, n, name) for n in uses
        )

    return {
        name
        for name, value in graph.initializers.items()
        if value.dtype != np.float32 or is_untrained(name) or (value.size == 1 and is_plain(name))
    }
