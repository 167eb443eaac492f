"""Finds the tensors whose channels are a sum, and not the output of the layer that wrote to their group last.

For example a pre-activation block computes

    y = x + Conv2(ReLU(Norm(Conv1(x))));   z = Norm'(y)

Norm' comes after Conv2 in the graph, but its channels are the sum of x and Conv2's output. So are those of the norms of
transformers, and the bias and norm of a depthwise layer that reads a sum.

The table of layers has rows of additions and norms, but doesn't say which tensors are theirs. Tensors and rows between
two layers' weights are in the same order, that of the graph, so they are matched by it.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedprune.model.architecture import Architecture, LayerRow, TensorKind, TensorSpec
from fedprune.strategies.optimal_transport.layer_order import LayerStep, groups_on

_SUM_OPERATORS = ("Add", "Sub", "Sum")
_NORM_OPERATORS = tuple(f"{kind}Normalization" for kind in ("Batch", "Layer", "Group", "Instance", "RMS"))

# Operators that add their bias themselves; a MatMul's bias is an addition of its own.
_BIAS_OPERATORS = ("Conv", "ConvTranspose", "Gemm")


def after_sums(architecture: Architecture, order: Sequence[LayerStep]) -> dict[str, tuple[str, ...]]:
    """The names of the tensors that come after a sum, by the weight of the layer before them. They are transported by
    the stream's average of plans instead of the last layer's (`alignment`). `order` are the model's `layer_steps`."""
    rows, followers = _rows_between_weights(architecture, {s.name for s in order})
    summed_groups: set[int] = set()
    names_after: dict[str, tuple[str, ...]] = {}
    for step in order:
        # What a layer writes by a plan of its own is no sum; a depthwise layer passes on a sum that it reads.
        summed_groups -= set(step.planned_groups)
        if not step.planned_groups:
            summed_groups |= set(step.output_groups)
        names_after[step.name], summed_groups = _summed_tensors(rows[step.name], followers[step.name], summed_groups)
    return names_after


def _summed_tensors(
    rows: Sequence[LayerRow], specs: Sequence[TensorSpec], summed_groups: set[int]
) -> tuple[tuple[str, ...], set[int]]:
    """Of the tensors from one weight to the next, the names of those that come after a sum; and the groups whose
    channels are sums from there on. Additions are matched to biases first, and only the remaining ones are sums. If the
    numbers of norms in rows and tensors differ, no norm is taken to follow a sum."""
    first, *rest = rows
    after_sum = [s.name for s in specs if s.kind is TensorKind.BIAS and set(s.axes[-1].groups) & summed_groups]
    norms = _tensors_by_norm(specs, sum(r.op in _NORM_OPERATORS for r in rest))
    adds_own_bias = first.op in _BIAS_OPERATORS and bool(specs) and specs[0].kind is TensorKind.BIAS
    biases = [s for s in specs[adds_own_bias:] if s.kind is TensorKind.BIAS]
    for row in rest:
        biases_before_norm = [b for b in biases if not norms or specs.index(b) < specs.index(norms[0][0])]
        # A MatMul's bias is an Add in the graph: it comes before a norm, and is no residual sum.
        if row.op in _SUM_OPERATORS and biases_before_norm:
            biases.remove(biases_before_norm[0])
        elif row.op in _SUM_OPERATORS:
            summed_groups = summed_groups | groups_on(row.output_volume.axes)
        elif row.op in _NORM_OPERATORS and norms:
            after_sum += [s.name for s in norms.pop(0) if groups_on(s.axes) & summed_groups]
    return tuple(after_sum), summed_groups


def _rows_between_weights(
    architecture: Architecture, weights: set[str]
) -> tuple[dict[str, list[LayerRow]], dict[str, list[TensorSpec]]]:
    """The table's rows and the tensors from each layer's weight to the next; the layer's own row comes first."""
    rows: dict[str, list[LayerRow]] = {}
    current_weight = ""
    for layer in architecture.layers:
        current_weight = layer.weight if layer.weight and layer.weight not in rows else current_weight
        if current_weight:
            rows.setdefault(current_weight, []).append(layer)
    specs: dict[str, list[TensorSpec]] = {w: [] for w in weights}
    current_weight = ""
    for spec in architecture.tensors:
        if spec.name in weights:
            current_weight = spec.name
        elif current_weight:
            specs[current_weight].append(spec)
    return rows, specs


def _tensors_by_norm(specs: Sequence[TensorSpec], rows: int) -> list[list[TensorSpec]]:
    """The tensors of each norm; empty if the table has another number of norms (`rows`). A scale without a bias may be
    a norm's, or a learnt factor (LayerScale): the number of rows tells which."""
    norms: list[list[TensorSpec]] = []
    for spec in specs:
        if spec.kind in (TensorKind.WEIGHT, TensorKind.BIAS):
            continue
        previous = norms[-1][-1] if norms else None
        if previous is None or spec.kind is TensorKind.NORM_SCALE or _module(previous) != _module(spec):
            norms.append([])
        norms[-1].append(spec)
    with_bias = [n for n in norms if any(s.kind is not TensorKind.NORM_SCALE for s in n)]
    return norms if len(norms) == rows else with_bias if len(with_bias) == rows else []


def _module(spec: TensorSpec) -> str:
    return spec.name.rpartition(".")[0]
