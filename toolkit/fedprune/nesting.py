"""A start at which wide models hold the narrow ones and nothing else: what a width adds is silent until it has learnt.

The channels of a model that was just made answer by chance, those that only a few wide devices will ever train among
them. Where a narrow width's channels listen to such channels, the wide model is the narrow one with noise on top.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.architecture import FIXED, Architecture, Axis, TensorKind, TensorSpec, widths_at

Array = npt.NDArray[Any]

_AS_MADE = {TensorKind.NORM_BIAS: 0.0, TensorKind.STAT_MEAN: 0.0, TensorKind.STAT_VAR: 1.0}
"""What every framework begins with. Scales are 1, or 0 for a block that is to begin as if it weren't there."""

_BY_CHANCE = 5.0
"""Standard deviations from the mean, beyond which the sizes of channels differ for a reason."""

_LEAST = 4
"""Weights of a channel, and channels, below which their sizes tell nothing."""


def just_made(architecture: Architecture, model: Mapping[str, Array]) -> bool:
    """Whether a model has never been trained: any of its channels is as good as another.

    Training moves the numbers of every normalisation. And in a model that was just made, the mean squares of channels'
    weights differ as those of samples do, drawn from one distribution: by (E[w⁴] − E[w²]²) / n for n weights each.
    Where somewhere they differ by far more, the model has learnt.

    Args:
        architecture: The model.
        model: All its tensors at full width.
    """
    return all(
        _by_chance(spec, np.asarray(model[spec.name], np.float64))
        if spec.kind is TensorKind.WEIGHT
        else _as_made(spec, model[spec.name])
        for spec in architecture.tensors
    )


def _as_made(spec: TensorSpec, value: Array) -> bool:
    if spec.kind is TensorKind.NORM_SCALE:
        return bool((value == 1).all() or (value == 0).all())
    return spec.kind not in _AS_MADE or bool((value == _AS_MADE[spec.kind]).all())


def _by_chance(spec: TensorSpec, weights: Array) -> bool:
    """Whether the channels of no axis differ by more than chance; silent weights (0) are left out."""
    there = weights != 0
    if not there.any():
        return True
    squares = weights**2
    mean = squares.sum() / there.sum()
    spread = ((squares - mean) ** 2)[there].mean()
    for place, axis in enumerate(spec.axes):
        others = tuple(i for i in range(weights.ndim) if i != place)
        counts = there.sum(axis=others)
        told = counts >= _LEAST
        if not axis.groups or told.sum() <= _LEAST or not spread:
            continue
        # A sum of squared deviations, each in its own standard deviations, is distributed as χ² by chance; its cube
        # root is nearly normal (Wilson and Hilferty 1931).
        sizes = squares.sum(axis=others)[told] / counts[told]
        free = int(told.sum()) - 1
        found = float((counts[told] * (sizes - mean) ** 2).sum() / spread) / free
        if np.cbrt(found) > 1 - 2 / (9 * free) + _BY_CHANCE * np.sqrt(2 / (9 * free)):
            return False
    return True


def nested(architecture: Architecture, model: Mapping[str, Array], densities: Sequence[float]) -> dict[str, Array]:
    """The model, in which no channel listens to one that only wider models have: those weights are 0.

    So the whole model, and its first channels at any of these densities, answer alike. The weights are trained as all
    others are, wherever both of their channels are there. A row that would have nothing left to listen to stays.

    Args:
        architecture: The model.
        model: All its tensors at full width; they are not changed.
        densities: Widths that hold each other, in the model's own order of channels.

    Raises:
        BundleError: A density is not above 0 and at most 1.
    """
    steps = sorted({widths_at(architecture, d) for d in densities})
    levels = [np.searchsorted([w[g] for w in steps], np.arange(n), "right") for g, n in enumerate(architecture.sizes)]
    out = dict(model)
    for spec in architecture.trainable:
        heard = _heard(architecture, spec, levels)
        if heard is not None and not heard.all():
            out[spec.name] = np.where(heard, model[spec.name], np.float32(0))
    return out


def _heard(architecture: Architecture, spec: TensorSpec, levels: Sequence[Array]) -> Array | None:
    """Which weights lead from a width's channel into one of the same or of a wider width; None for other tensors."""
    made = architecture.output_axes(spec.name)
    inputs = [i for i, a in enumerate(spec.axes) if i not in made and a.groups]
    if spec.kind is not TensorKind.WEIGHT or len(made) != 1 or not inputs:
        return None
    shape = tuple(a.length for a in spec.axes)
    into = _along(spec.axes[made[0]], levels, made[0], len(shape))
    heard = np.ones(shape, bool)
    for axis in inputs:
        heard &= _along(spec.axes[axis], levels, axis, len(shape)) <= into
    silent = ~heard.any(axis=tuple(i for i in range(len(shape)) if i != made[0]), keepdims=True)
    return np.asarray(heard | silent)


def _along(axis: Axis, levels: Sequence[Array], place: int, axes: int) -> Array:
    """The level of every index of an axis, 0 where it is of no group, shaped to meet a tensor of so many axes."""
    parts = [
        np.zeros(s.length, np.int64)
        if s.group == FIXED
        else np.repeat(levels[s.group][s.start : s.start + s.count], s.inner)
        for s in axis.segments
    ]
    return np.concatenate(parts).reshape([-1 if i == place else 1 for i in range(axes)])
