"""Plans the alignment of a model: the weights of its layers in the order of the graph."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from fedprune.model.architecture import Architecture, Axis


@dataclass(frozen=True)
class LayerStep:
    """A step of the alignment: the weight of one layer.

    Attributes:
        name: The weight tensor.
        axes: The weight's axes.
        outputs: Positions of the axes of output channels.
        inputs: Positions of the other axes with channels.
        planned_groups: The channel groups for which a transport plan is solved at this layer; none if it is depthwise.
    """

    name: str
    axes: tuple[Axis, ...]
    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    planned_groups: tuple[int, ...]

    @cached_property
    def output_groups(self) -> tuple[int, ...]:
        return tuple(sorted(groups_on(self.axes[i] for i in self.outputs)))


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
        shared_groups = groups_on(layer.input_volume.axes) & groups_on(layer.output_volume.axes)
        # A layer that works on each channel by itself passes on its inputs' plan, and has none of its own.
        is_depthwise = layer.groups > 1 and not inputs and bool(shared_groups)
        planned_groups = axes[outputs[0]].groups if len(outputs) == 1 and not is_depthwise else ()
        weight_steps.append(LayerStep(layer.weight, axes, outputs, inputs, planned_groups))
    return weight_steps


def groups_on(axes: Iterable[Axis]) -> set[int]:
    return {g for a in axes for g in a.groups}
