"""Random augmentation of the samples of a step, by the plan in a training graph's metadata."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ModelError, TrainingError
from fedprune.core.rng import keyed_generator
from fedprune.model.augmentation import AugmentPlan, AugmentStep
from fedprune.model.step_contract import AUGMENT_METADATA
from fedprune_device.data.batches import MicroBatch

Array = npt.NDArray[Any]


class SampleAugmentation:
    """A recipe's augmentations. Raises `TrainingError` if the metadata has none, or they can't be read."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        if AUGMENT_METADATA not in metadata:
            raise TrainingError(
                "training graph and recipe don't fit each other",
                expected="a plan of the recipe's augmentations",
                got="none",
            )
        try:
            self.plan = AugmentPlan.from_json(metadata[AUGMENT_METADATA])
        except ModelError as error:
            raise TrainingError(f"the training graph's augmentation: {error}") from error

    def __call__(self, micro_batch: MicroBatch, seed: int, *key: object) -> MicroBatch:
        """The same samples, augmented when they are requested, by random numbers that `seed` and `key` decide. Labels
        of places move along with their sample."""

        def numbers() -> Array:
            return keyed_generator(seed, *key).random((len(micro_batch.y), self.plan.random_count), np.float32)

        y = micro_batch.y if self.plan.fill is None else augment_labels(self.plan, micro_batch.y, numbers())
        return replace(micro_batch, make=lambda: augment_samples(self.plan, micro_batch.x, numbers()), y=y)


def augment_samples(plan: AugmentPlan, x: Array, numbers: Array) -> Array:
    """Samples [N, ...] after all steps in their order; `numbers` [N, k] are random, from 0 to below 1. Raises
    `TrainingError` if a step is of other samples than these."""
    out = np.array(x, order="C")
    row = out.reshape(len(out), -1)
    for step in plan.steps:
        if step.begin + step.size > row.shape[1]:
            raise TrainingError(
                f"augmentation {step.name}", expected=f"{step.begin + step.size} numbers a sample", got=row.shape[1]
            )
        values = row[:, step.begin : step.begin + step.size].reshape(len(row), *step.shape)
        step_numbers = numbers[:, step.first : step.first + step.random_count]
        values = (
            _move(values, step, step.axes, step_numbers, 0)
            if step.is_geometric
            else _AUGMENTATIONS[step.name](values, step, step_numbers)
        )
        row[:, step.begin : step.begin + step.size] = values.reshape(len(row), -1)
    return out


def augment_labels(plan: AugmentPlan, y: Array, numbers: Array) -> Array:
    """Labels of places [N, ...], moved as the samples are."""
    for step in plan.steps:
        if step.is_geometric:
            axes = step.axes if len(step.shape) == 3 else (-1,)
            y = _move(y, step, axes, numbers[:, step.first : step.first + step.random_count], plan.fill or 0)
    return y


def _move(values: Array, step: AugmentStep, axes: tuple[int, ...], numbers: Array, fill: int) -> Array:
    """Values [N, ...], each sample moved along these axes; what comes in from outside is `fill`."""
    if step.name == "flip":
        return np.where(_per_sample(numbers[:, 0] < 0.5, values), values, np.flip(values, axes[0]))
    out = np.full_like(values, fill)
    rank = values.ndim - 1
    for sample, sample_numbers in enumerate(numbers):
        target: list[slice] = [slice(None)] * rank
        source = target.copy()
        for axis, u in zip(axes, sample_numbers, strict=True):
            length = values.shape[axis]
            max_offset = int(step.values[0]) if step.name == "crop" else max(1, round(step.values[0] * length))
            offset = int(_whole_numbers(u, 2 * max_offset + 1)) - max_offset
            target[axis] = slice(max(0, -offset), max(0, length - max(0, offset)))
            source[axis] = slice(max(0, offset), max(0, length + min(0, offset)))
        out[sample][tuple(target)] = values[sample][tuple(source)]
    return out


def _whole_numbers(u: Any, bound: Any) -> Any:
    """Map random numbers from 0 to below 1 to whole numbers from 0 to below a bound."""
    return np.floor(u * np.float32(1) * bound).astype(np.int64)


def _per_sample(numbers: Array, values: Array) -> Array:
    """One number a sample [N], along samples of these values' rank."""
    spread: Array = numbers.reshape(-1, *[1] * (values.ndim - 1))
    return spread


def _sample_means(values: Array) -> Array:
    means: Array = values.mean(tuple(range(1, values.ndim)), keepdims=True, dtype=np.float32)
    return means


def _random_factors(values: Array, step: AugmentStep, numbers: Array) -> Array:
    """A random number from -SHARE to SHARE for every sample."""
    return _per_sample((numbers[:, 0] - np.float32(0.5)) * np.float32(2 * step.values[0]), values)


def _brighten(values: Array, step: AugmentStep, numbers: Array) -> Array:
    """x + a·σ, with the deviation σ of the sample: the same whatever values are normalised by."""
    deviation = np.sqrt(_sample_means(np.square(values - _sample_means(values))))
    changed: Array = values + _random_factors(values, step, numbers) * deviation
    return changed


def _change_contrast(values: Array, step: AugmentStep, numbers: Array) -> Array:
    """µ + (1 + a)·(x − µ), with the mean µ of the sample."""
    changed: Array = values + _random_factors(values, step, numbers) * (values - _sample_means(values))
    return changed


def _add_noise(values: Array, step: AugmentStep, numbers: Array) -> Array:
    """x + DEVIATION · normal numbers, two from two uniform ones (Box and Muller 1958, eq. 1)."""
    first, second = np.split(numbers, 2, axis=1)
    radius = np.sqrt(np.log(1 - first) * np.float32(-2)) * np.float32(step.values[0])
    angle = second * np.float32(2 * math.pi)
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, : step.size]
    changed: Array = values + normal.reshape(values.shape)
    return changed


def _mask_bands(values: Array, step: AugmentStep, numbers: Array) -> Array:
    """One band of frequencies and one of steps, each of a limited width, filled with the sample's mean (Park et al.,
    "SpecAugment", Interspeech 2019, Sec. 2: masks of width f ~ U[0, F] from f0 ~ U[0, ν − f) on)."""
    out: Array = values.copy()
    means = _sample_means(values)
    for number, (axis, max_width) in enumerate(zip(step.axes, step.values, strict=True)):
        widths = _whole_numbers(numbers[:, 2 * number], int(max_width) + 1)
        begins = _whole_numbers(numbers[:, 2 * number + 1], values.shape[axis] - widths)
        for sample, (width, begin) in enumerate(zip(widths, begins, strict=True)):
            np.moveaxis(out[sample], axis, 0)[begin : begin + width] = means[sample].reshape(())
    return out


_AUGMENTATIONS: dict[str, Callable[[Array, AugmentStep, Array], Array]] = {
    "brightness": _brighten,
    "contrast": _change_contrast,
    "noise": _add_noise,
    "specaugment": _mask_bands,
}
