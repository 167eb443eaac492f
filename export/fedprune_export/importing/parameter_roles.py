"""Recognises which initialisers of a graph are weights, statistics and constants.

The role of a parameter (a `TensorKind` value, such as `weight` or `norm_scale`) follows from the operators that read
it. A file's metadata may list the parameters; otherwise they, too, are recognised by their use.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import NamedTuple

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
_WEIGHTED_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div"})
# Operators whose operand may be a weight, such as a class token that is concatenated with patches, but also a table of
# positions or a normalisation of images.
_DOUBTFUL_OPERATORS = _WEIGHTED_ARITHMETIC | {"Concat"}

_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Clip", "Max", "Min"})
# Operators through which no gradient passes: what only they read isn't trained.
_UNTRAINED_READERS = frozenset({"EyeLike", "Range", "Shape", "Size"})
_LAYER_OPERATORS = frozenset({"Conv", "ConvTranspose", "Gemm", "GRU", "LSTM", "MatMul", "RNN"})
_PRODUCT_OPERATORS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum"})
_PARAMETERS_HINT = "--parameters FILE lists what is to be trained."
_MAX_MASK_SCORE = -1e4  # a mask adds at most this number to scores that don't count
_STATISTICS = ("stat_mean", "stat_var")


def constants_of(model: onnx.ModelProto, graph: Graph, notes: list[str]) -> set[str]:
    """The values of a file's Constant nodes; none if all its weights are such nodes.

    Several exporters write weights as Constant nodes; others write only numbers in the author's code as such nodes.
    `notes` gets a sentence on tensors that may be weights and are taken for constants.
    """
    constants = {o for n in model.graph.node if n.op_type == "Constant" for o in n.output}
    makers = graph.producers()
    weights = {
        name
        for node in graph.nodes
        if node.op in _LAYER_OPERATORS and not node.domain
        for i, read in enumerate(node.inputs)
        if _ROLES[node.op].get(i) == "weight" and (name := _stored_name(read, makers)) in graph.initializers
        # The import has made these itself.
        if not name.startswith(CONSTANT_PREFIX)
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


def _stored_name(name: str, makers: Mapping[str, Node]) -> str:
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


class _Use(NamedTuple):
    """A node that combines a tensor with data: the tensor's role in it, and its position among the node's inputs."""

    role: str
    node: Node
    position: int


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
    norm_roles = {
        name: _ROLES[node.op][i]
        for node in graph.nodes
        if node.op == "BatchNormalization" and not node.domain
        for i, name in enumerate(node.inputs)
        if i and name in graph.initializers
    }
    guesses = _RoleGuesses(graph, notes)
    roles: dict[str, str] = {}
    for name in _read_order(graph):
        value = graph.initializers.get(name)
        if value is None:
            continue
        is_parameter = name not in constants if listed is None else name in listed
        # Batch statistics are buffers in PyTorch, so a list of parameters may leave them out.
        if not is_parameter and norm_roles.get(name) not in _STATISTICS:
            continue
        if value.dtype != np.float32:
            if listed is not None:
                raise ModelError(f"parameter {name}", expected="float32", got=value.dtype)
            continue
        if name in norm_roles:
            role = norm_roles[name]
        elif listed is not None:
            uses = guesses.uses(name)
            role = uses[0].role if uses else "weight"
        else:
            role = guesses.guess_role(name, value)
        if role:
            roles[name] = role
    guesses.note_doubts()
    return roles


class _RoleGuesses:
    """Guesses the roles of tensors that no list names, and notes what may be wrong."""

    def __init__(self, graph: Graph, notes: list[str]) -> None:
        self._graph, self._notes = graph, notes
        self._consumers, self._producers = graph.consumers(), graph.producers()
        self._data_values = graph.values_from_inputs()
        self._rescaled_inputs = _rescaled_inputs(graph, self._data_values)
        self._applied_to_input: list[str] = []
        self._guessed: list[str] = []
        self._grids: list[str] = []

    def guess_role(self, name: str, value: Array) -> str:
        """The role of a tensor; empty if it is taken for a constant.

        A tensor that is added to the model's input, or multiplied by it, normalises data: it is a constant.
        """
        uses = self.uses(name)
        # A single number is a weight as a slope or as the bias of one output. One that scales or shifts is more often
        # the author's constant.
        if value.size == 1:
            uses = [
                u
                for u in uses
                if u.node.op not in _DOUBTFUL_OPERATORS or _is_sole_bias(self._graph, self._producers, u.node, name)
            ]
            if not uses:
                return ""
        if _is_mask(value, {n.op for n, _ in self._consumers[name]}):
            self._notes.append(f"Tensor {name} is a mask, of two numbers: a constant, and not trained.")
            return ""
        if not uses:
            self._notes.append(
                f"Tensor {name} is taken for a constant and not trained: its use doesn't make it a weight."
            )
            return ""
        is_doubtful = all(u.node.op in _DOUBTFUL_OPERATORS for u in uses)
        data = [i for u in uses for i in u.node.inputs if i in self._data_values]
        if is_doubtful and self._rescaled_inputs.issuperset(data):
            self._applied_to_input.append(name)
            return ""
        # YOLO's heads take a mean over bins by a convolution whose kernel counts them (Li et al. 2020, eq. 5).
        if uses[0].role == "weight" and value.size > 2 and np.array_equal(value.ravel(), np.arange(value.size)):
            self._grids.append(name)
            return ""
        # A vector that is added to a product is its bias; anything else may be a table or a normalisation.
        is_vector = max(value.shape, default=1) == value.size
        maker = self._producers.get(data[0])
        is_bias = is_vector and uses[0].node.op == "Add" and maker is not None and maker.op in _PRODUCT_OPERATORS
        if is_doubtful and not is_bias:
            if _is_grid(value):
                self._grids.append(name)
                return ""
            self._guessed.append(name)
        return uses[0].role

    def uses(self, start: str) -> list[_Use]:
        """Where a tensor, or a value computed from it and other weights, is combined with data."""
        out: list[_Use] = []
        visited, pending = {start}, [start]
        while pending:
            for node, i in self._consumers.get(pending.pop(0), []):
                if node.domain:
                    continue
                reaches_data = self._data_values.intersection(node.outputs)
                if not reaches_data or (node.op in REARRANGEMENTS and i == 0):
                    further = [o for o in node.outputs if o and o not in visited]
                    visited.update(further)
                    pending += further
                elif role := "weight" if node.op == "Concat" else _ROLES.get(node.op, {}).get(i, ""):
                    out.append(_Use(role, node, i))
        return out

    def note_doubts(self) -> None:
        if self._applied_to_input:
            names = first_few(self._applied_to_input, max_names=3)
            self._notes.append(f"Taken for constants, as they apply straight to the input: {names}. {_PARAMETERS_HINT}")
        if self._grids:
            names = first_few(self._grids, max_names=3)
            self._notes.append(
                f"Taken for constants, as positions, strides, anchors and bins of boxes are: {names}, of whole and "
                f"half numbers. {_PARAMETERS_HINT}"
            )
        if self._guessed:
            names = first_few(self._guessed, max_names=3)
            self._notes.append(
                "Trained because they are added, multiplied or concatenated, as constants may be too: "
                f"{names}. {_PARAMETERS_HINT}"
            )


def _is_grid(value: Array) -> bool:
    """Whether a tensor has several different numbers, all whole or half: training leaves no weights like these."""
    doubled = 2 * value
    return bool((doubled == np.round(doubled)).all()) and len(np.unique(value)) > 1


def _is_mask(value: Array, readers: AbstractSet[str]) -> bool:
    """Whether a tensor is a mask: of 0 and one very low number, which are added to scores, or of factors 1 and 0."""
    low, high = value.min(initial=np.inf), value.max(initial=-np.inf)
    if not ((value == low) | (value == high)).all():
        return False
    added = bool(low <= _MAX_MASK_SCORE and high == 0) and readers <= {"Add", "Sub"}
    return added or (value.ndim > 1 and bool(low == 0 and high == 1) and readers == {"Mul"})


def _is_sole_bias(graph: Graph, producers: Mapping[str, Node], node: Node, name: str) -> bool:
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
    """Note which of these single numbers scale or shift data: they could be weights and are taken for constants."""
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
    """The model's input, and values that are computed from it only by rearrangement, shifts and scales."""
    out = {p.name for p in graph.inputs}
    for node in graph.nodes:
        data = data_values.intersection(node.inputs)
        if data and data <= out and not node.domain and node.op in _WEIGHTED_ARITHMETIC | REARRANGEMENTS | {"Cast"}:
            out.update(o for o in node.outputs if o)
    return out


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
            _is_sole_bias(graph, producers, n, name) for n in uses
        )

    return {
        name
        for name, value in graph.initializers.items()
        if value.dtype != np.float32 or is_untrained(name) or (value.size == 1 and is_plain(name))
    }
