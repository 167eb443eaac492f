"""Plans the alignment of a model: its layers in order, and the tensors that come after a residual sum."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from fedprune.model.architecture import Architecture, Axis, LayerRow, TensorKind, TensorSpec

_SUM_OPERATORS = ("Add", "Sub", "Sum")
_NORM_OPERATORS = tuple(f"{kind}Normalization" for kind in ("Batch", "Layer", "Group", "Instance", "RMS"))
# Operators that add their bias themselves; a MatMul's bias is an addition of its own.
_BIAS_OPERATORS = ("Conv", "ConvTranspose", "Gemm")


@dataclass(frozen=True)
class LayerStep:
    """A step of the alignment: the weight of one layer.

    Attributes:
        name: The tensor.
        axes: Its axes.
        outputs: Positions of the axes along which channels are made.
        inputs: Positions of the other axes with channels.
        planned_groups: The channel groups for which a transport plan is solved at this layer.
    """

    name: str
    axes: tuple[Axis, ...]
    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    planned_groups: tuple[int, ...]

    @cached_property
    def output_groups(self) -> tuple[int, ...]:
        """The groups on its output axes."""
        return tuple(sorted({g for i in self.outputs for g in self.axes[i].groups}))


def layer_steps(architecture: Architecture) -> list[LayerStep]:
    """The layers' weights in the order of the graph."""
    weight_steps: list[LayerStep] = []
    visited: set[str] = set()
    for layer in architecture.layers:
        # A weight that two layers share is aligned where it comes first.
        if not layer.weight or layer.weight in visited:
            continue
        visited.add(layer.weight)
        axes = architecture.by_name[layer.weight].axes
        outputs = architecture.output_axes(layer.weight)
        inputs = tuple(i for i, a in enumerate(axes) if i not in outputs and a.groups)
        written_groups = axes[outputs[0]].groups if len(outputs) == 1 else ()
        weight_steps.append(
            LayerStep(layer.weight, axes, outputs, inputs, () if _is_depthwise(layer, inputs) else written_groups)
        )
    return weight_steps


def _is_depthwise(layer: LayerRow, inputs: Sequence[int]) -> bool:
    """Whether a layer works on each channel by itself, so that its output channels are its input channels."""
    shared_groups = _groups_on(layer.input_volume.axes) & _groups_on(layer.output_volume.axes)
    return layer.groups > 1 and not inputs and bool(shared_groups)


def after_sums(architecture: Architecture, order: Sequence[LayerStep]) -> dict[str, tuple[str, ...]]:
    """Find the tensors whose channels are a sum, and not the output of the layer that wrote to their group last.

    Those are norms after an addition of streams (pre-activation residual networks, transformers), and biases and norms
    of a depthwise layer that reads such a sum. The table of layers has rows of additions and norms, but doesn't say
    whose they are: tensors and rows between two layers' weights are in the same order, that of the graph. Additions are
    those of biases first. Where there are more or fewer norms among the rows than among the tensors, none is taken to
    follow a sum.

    Args:
        order: Its `layer_steps`.

    Returns:
        The tensors' names, by the layer's weight that they come after.
    """
    rows, followers = _rows_between_weights(architecture, {s.name for s in order})
    summed: set[int] = set()
    names_after: dict[str, tuple[str, ...]] = {}
    for step in order:
        summed = (summed - set(step.planned_groups)) | (set() if step.planned_groups else set(step.output_groups))
        first, *rest = rows[step.name]
        specs = followers[step.name]
        after_sum = [s for s in specs if s.kind is TensorKind.BIAS and set(s.axes[-1].groups) & summed]
        norms = _norm_families(specs, sum(r.op in _NORM_OPERATORS for r in rest))
        adds_own_bias = first.op in _BIAS_OPERATORS and bool(specs) and specs[0].kind is TensorKind.BIAS
        biases = [s for s in specs[adds_own_bias:] if s.kind is TensorKind.BIAS]
        for row in rest:
            biases_before_norm = [b for b in biases if not norms or specs.index(b) < specs.index(norms[0][0])]
            # A MatMul's bias is an Add in the graph: it comes before a norm, and is no sum of streams.
            if row.op in _SUM_OPERATORS and biases_before_norm:
                biases.remove(biases_before_norm[0])
            elif row.op in _SUM_OPERATORS:
                summed |= _groups_on(row.output_volume.axes)
            elif row.op in _NORM_OPERATORS and norms:
                after_sum += [s for s in norms.pop(0) if _groups_on(s.axes) & summed]
        names_after[step.name] = tuple(s.name for s in after_sum)
    return names_after


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


def _norm_families(specs: Sequence[TensorSpec], rows: int) -> list[list[TensorSpec]]:
    """The tensors of each norm; none where their number isn't that of the rows.

    A scale alone may be a norm without bias or a learnt factor (LayerScale): the number of rows tells which.
    """
    families: list[list[TensorSpec]] = []
    for spec in specs:
        if spec.kind in (TensorKind.WEIGHT, TensorKind.BIAS):
            continue
        previous = families[-1][-1] if families else None
        if previous is None or spec.kind is TensorKind.NORM_SCALE or _module(previous) != _module(spec):
            families.append([])
        families[-1].append(spec)
    with_bias = [f for f in families if any(s.kind is not TensorKind.NORM_SCALE for s in f)]
    return families if len(families) == rows else with_bias if len(with_bias) == rows else []


def _module(spec: TensorSpec) -> str:
    return spec.name.rpartition(".")[0]


def _groups_on(axes: Iterable[Axis]) -> set[int]:
    return {g for a in axes for g in a.groups}
