"""A start at which wide models hold the narrow ones and nothing else: what a width adds is silent until it has learnt.

The channels of a model that was just made answer by chance, those that only a few wide devices will ever train among
them. Where a narrow width's channels listen to such channels, the wide model is the narrow one with noise on top.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.model.architecture import Architecture, TensorKind, TensorSpec, widths_at
from fedprune.model.selection import Selection

Array = npt.NDArray[Any]

_AS_MADE = {
    TensorKind.NORM_SCALE: (1.0, 0.0),
    TensorKind.NORM_BIAS: (0.0,),
    TensorKind.STAT_MEAN: (0.0,),
    TensorKind.STAT_VAR: (1.0,),
}
"""What every framework begins with; scales are 0 in a block that is to begin as if it weren't there."""


def just_made(architecture: Architecture, model: Mapping[str, Array]) -> bool:
    """Whether a model has never been trained, as its normalisations tell: training moves every number of theirs.

    A model without any doesn't tell, and doesn't count as just made: nothing of a trained model may be lost.
    """
    told = [s for s in architecture.tensors if s.kind in _AS_MADE]
    return bool(told) and all(np.isin(model[s.name], _AS_MADE[s.kind]).all() for s in told)


def nested(architecture: Architecture, model: Mapping[str, Array], densities: Sequence[float]) -> dict[str, Array]:
    """The model, in which no channel listens to one that only wider models have: those weights are 0.

    So the whole model, and its first channels at any of these densities, answer alike, as long as nothing but weights
    mixes channels (a softmax or a norm over channels does, too). Silent weights are trained as all others are, wherever
    both of their channels are there. Raises `BundleError` if a density is not above 0 and at most 1.
    """
    own = [np.arange(n) for n in architecture.sizes]
    narrow = [Selection.of(architecture, widths_at(architecture, d), own) for d in densities]
    out = dict(model)
    for spec in architecture.trainable:
        axes = _into_and_from(architecture, spec)
        if axes is None:
            continue
        out[spec.name] = np.array(model[spec.name])
        weights = np.moveaxis(out[spec.name], axes, (0, 1))
        for held in narrow:
            into, heard = (held.maps(spec.name)[axis] for axis in axes)
            weights[np.ix_(into, np.setdiff1d(np.arange(weights.shape[1]), heard))] = 0
    return out


def _into_and_from(architecture: Architecture, spec: TensorSpec) -> tuple[int, int] | None:
    """The axis of the channels that a weight makes and that of those over which it sums; None where that isn't sure.

    A tensor that several layers read in different ways, heads' weights in one tensor and grouped transposed
    convolutions, whose first axis is of inputs and outputs at once, are left as they are.
    """
    found = set()
    for layer in architecture.layers:
        if layer.weight != spec.name or spec.kind is not TensorKind.WEIGHT:
            continue
        if layer.op == "Conv":
            summed = 1
        elif layer.op == "ConvTranspose":
            summed = 0 if layer.groups == 1 else layer.output_axis
        else:
            summed = 1 - layer.output_axis if len(spec.axes) == 2 else layer.output_axis
        found.add((layer.output_axis, summed))
    into, summed = found.pop() if len(found) == 1 else (0, 0)
    return None if into == summed else (into, summed)
