"""Guesses the roles of tensors in files that don't list their parameters, from the operators that read them."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import NamedTuple

import numpy as np

from fedprune.core.text import first_few
from fedprune_export.ir.graph import Array, Graph, Node
from fedprune_export.ir.operators import REARRANGEMENTS

# The role of a tensor at each input of an operator.
ROLES = {
    **{op: {1: "weight", 2: "bias"} for op in ("Conv", "ConvTranspose", "Gemm")},
    "MatMul": {0: "weight", 1: "weight"},
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
WEIGHTED_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div"})
# Operators whose operand may be a weight, such as a class token that is concatenated with patches, but also a table of
# positions or a normalisation of images.
_DOUBTFUL_OPERATORS = WEIGHTED_ARITHMETIC | {"Concat"}

_PRODUCT_OPERATORS = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum"})
PARAMETERS_HINT = "--parameters FILE lists what is to be trained."
_MAX_MASK_SCORE = -1e4  # a mask adds at most this number to scores that don't count


# Notes on tensors whose roles may be wrong.
_TO_INPUT = "Taken for constants, as they apply straight to the input: {}."
_GRIDS = "Taken for constants, as positions, strides, anchors and bins of boxes are: {}, of whole and half numbers."
_GUESSED = "Trained because they are added, multiplied or concatenated, as constants may be too: {}."


class _Use(NamedTuple):
    """A node that combines a tensor with data, and the tensor's role in it."""

    role: str
    node: Node


class RoleGuesses:
    """Guesses the roles of tensors that no list names, and notes what may be wrong."""

    def __init__(self, graph: Graph, notes: list[str]) -> None:
        self._graph, self._notes = graph, notes
        self._consumers, self._producers = graph.consumers(), graph.producers()
        self._data_values = graph.values_from_inputs()
        self._rescaled_inputs = _rescaled_inputs(graph, self._data_values)
        self._doubts: dict[str, list[str]] = {_TO_INPUT: [], _GRIDS: [], _GUESSED: []}

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
                if u.node.op not in _DOUBTFUL_OPERATORS or is_sole_bias(self._graph, self._producers, u.node, name)
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
            self._doubts[_TO_INPUT].append(name)
            return ""
        # YOLO's heads take a mean over bins by a convolution whose kernel counts them (Li et al. 2020, eq. 5).
        if uses[0].role == "weight" and value.size > 2 and np.array_equal(value.ravel(), np.arange(value.size)):
            self._doubts[_GRIDS].append(name)
            return ""
        # A vector that is added to a product is its bias; anything else may be a table or a normalisation.
        is_vector = max(value.shape, default=1) == value.size
        maker = self._producers.get(data[0])
        is_bias = is_vector and uses[0].node.op == "Add" and maker is not None and maker.op in _PRODUCT_OPERATORS
        if is_doubtful and not is_bias:
            # Several different numbers, all whole or half: training leaves no weights like these.
            if bool((2 * value == np.round(2 * value)).all()) and len(np.unique(value)) > 1:
                self._doubts[_GRIDS].append(name)
                return ""
            self._doubts[_GUESSED].append(name)
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
                elif role := "weight" if node.op == "Concat" else ROLES.get(node.op, {}).get(i, ""):
                    out.append(_Use(role, node))
        return out

    def note_doubts(self) -> None:
        for note, names in self._doubts.items():
            if names:
                self._notes.append(f"{note.format(first_few(names, max_names=3))} {PARAMETERS_HINT}")


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


def _rescaled_inputs(graph: Graph, data_values: set[str]) -> set[str]:
    """The model's input, and values that are computed from it only by rearrangement, shifts and scales."""
    out = {p.name for p in graph.inputs}
    for node in graph.nodes:
        data = data_values.intersection(node.inputs)
        if data and data <= out and not node.domain and node.op in WEIGHTED_ARITHMETIC | REARRANGEMENTS | {"Cast"}:
            out.update(o for o in node.outputs if o)
    return out
