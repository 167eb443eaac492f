"""Makes a wide model compute the same as the narrower models that are its first channels.

Channels that no device has trained yet still have their random initial weights. As long as trained channels read from
these, the wide model is the narrow one with added noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.model.architecture import Architecture, TensorKind, TensorSpec
from fedprune.model.selection import Selection

Array = npt.NDArray[Any]


def nest_widths(
    architecture: Architecture, model: Mapping[str, Array], widths_list: Iterable[Sequence[int]]
) -> dict[str, Array]:
    """A copy of the model in which no channel reads one that only wider models have: such weights are 0.

    So the whole model, and its first channels at any of the widths in `widths_list`, agree, as long as nothing but
    weights mixes channels (a softmax or a norm over channels does, too). The weights that are 0 are trained like all
    others wherever both of their channels exist. Raises `BundleError` if widths don't fit.
    """
    own_order = [np.arange(n) for n in architecture.sizes]
    model_copy = dict(model)
    for widths in widths_list:
        for weights, outputs, outside in _weights(Selection.of(architecture, widths, own_order), model_copy):
            weights[np.ix_(outputs, outside)] = 0
    return model_copy


def start_as_core(selection: Selection, model: Mapping[str, Array]) -> dict[str, Array]:
    """A copy of a new model that begins as its core does: a net of the widths of `selection`, and the others silent.

    Channels of the core read none outside it: such weights are 0. Others of theirs are multiplied by √(inputs of the
    layer / of the core): initial weights of n inputs have a variance of 1 / n (He et al. 2015, eq. 10, up to a factor).
    If not, a narrow net's outputs are too small by that root at every layer, and so are its gradients. Batch
    normalisation makes up for that, and larger weights would only move more slowly.
    """
    model_copy = dict(model)
    is_normalised = any(spec.kind is TensorKind.STAT_VAR for spec in selection.architecture.tensors)
    for weights, outputs, outside in _weights(selection, model_copy):
        weights[np.ix_(outputs, outside)] = 0
        if not is_normalised:
            weights[outputs] *= np.float32(math.sqrt(weights.shape[1] / (weights.shape[1] - len(outside))))
    return model_copy


def _weights(selection: Selection, model: dict[str, Array]) -> Iterator[tuple[Array, Array, Array]]:
    """Replaces each weight in `model` by a copy, and yields a view of it, outputs first and inputs second, with the
    selection's outputs and the inputs outside it."""
    for spec in selection.architecture.trainable:
        if (axes := _weight_axes(selection.architecture, spec)) is not None:
            model[spec.name] = copy = np.array(model[spec.name])
            outputs, inputs = (selection.maps(spec.name)[axis] for axis in axes)
            yield np.moveaxis(copy, axes, (0, 1)), outputs, np.setdiff1d(range(copy.shape[axes[1]]), inputs)


def _weight_axes(architecture: Architecture, spec: TensorSpec) -> tuple[int, int] | None:
    """The axes of a weight's output channels and of its input channels; None if they are not certain. They aren't for a
    tensor that several layers read in different ways, for several heads' weights in one tensor, and for grouped
    transposed convolutions, whose first axis is of inputs and outputs at once."""
    axis_pairs = set()
    for layer in architecture.layers:
        if layer.weight != spec.name or spec.kind is not TensorKind.WEIGHT:
            continue
        if layer.op == "Conv":
            input_axis = 1
        elif layer.op == "ConvTranspose":
            input_axis = 0 if layer.groups == 1 else layer.output_axis
        else:
            input_axis = 1 - layer.output_axis if len(spec.axes) == 2 else layer.output_axis
        axis_pairs.add((layer.output_axis, input_axis))
    output_axis, input_axis = axis_pairs.pop() if len(axis_pairs) == 1 else (0, 0)
    return None if output_axis == input_axis else (output_axis, input_axis)
