"""Scales a board's samples by mean and deviation, before a model takes them, and scales back what it predicts.

Sources and files keep the numbers as they were measured: `scale_samples` scales those of a round, and the record of the
serving model has the same `Scaling` for the samples that it is asked about.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import DataError, shape_text
from fedprune.model.features import labels_of
from fedprune.model.lengths import PADDING
from fedprune.model.recipe import Recipe
from fedprune.model.scaling import BOARD, ColumnScale
from fedprune_device.data.column_statistics import ColumnStatistics
from fedprune_device.data.dataset import SPLITS, Channels, LocalData
from fedprune_device.data.stored_array import Array, Inputs, StoredArray, chunks

_LOG = logging.getLogger("fedprune.device")


@dataclass(frozen=True)
class ChannelScale:
    """The mean and deviation of each channel along an axis of a sample; with one channel, of all its numbers."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    axis: int = 0

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.deviation) or not self.mean or not all(d > 0 for d in self.deviation):
            raise ValueError("a scale has a mean, and a deviation above 0, for each channel")

    def __call__(self, x: Array) -> npt.NDArray[np.float32]:
        """Samples [n, ...] scaled; padding stays as it is. Raises `DataError` for another number of channels."""
        mean, deviation = self._arrays(x)
        scaled = ((x - mean) / deviation).astype(np.float32)
        return np.where(x == np.float32(PADDING), x, scaled).astype(np.float32, copy=False)

    def invert(self, x: Array) -> npt.NDArray[np.float32]:
        """Scaled samples [n, ...] as they were measured; errors as for scaling."""
        mean, deviation = self._arrays(x)
        return (x * deviation + mean).astype(np.float32)

    def _arrays(self, x: Array) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        channels = len(self.mean)
        if channels > 1 and (x.ndim <= self.axis + 1 or x.shape[self.axis + 1] != channels):
            raise DataError("channels to scale", expected=channels, got=shape_text(*x.shape[1:]))
        shape = [1] * (x.ndim - 1)
        if channels > 1:
            shape[self.axis] = channels
        return np.array(self.mean).reshape(shape), np.array(self.deviation).reshape(shape)


@dataclass(frozen=True)
class Scaling:
    """The scale of a model's inputs, and of the numbers that it predicts; None for numbers as they are."""

    inputs: ChannelScale | None = None
    outputs: ChannelScale | None = None

    def __call__(self, x: Inputs) -> Inputs:
        """Inputs as the model takes them; those on the disk are scaled as they are read."""
        return x if self.inputs is None else _apply_scale(x, self.inputs)

    def invert(self, outputs: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Predictions in the numbers of the samples."""
        return outputs if self.outputs is None else self.outputs.invert(outputs)


def scale_samples(data: LocalData, recipe: Recipe, fitted: Scaling | None = None) -> tuple[LocalData, Scaling]:
    """A round's samples scaled as its recipe says (`Recipe.scaling`), and the scale.

    Numbers to predict are scaled where they are columns of a table, or as many as the inputs, in whose place they are.
    `fitted` is the scale that the board took of its samples before, which stays. Raises `DataError` if the samples
    aren't numbers of one input, or the recipe has no scale for one of their columns.
    """
    if not recipe.scaling:
        return data, Scaling()
    if data.x_train.dtype.kind != "f" or data.rows is not None:
        raise DataError("samples to scale", expected="numbers of one input", got="token ids, or lengths with them")
    is_fitted = fitted is not None and recipe.scaling == (BOARD,)
    scaling = fitted if is_fitted and fitted else scaling_of(data.x_train, data.y_train, recipe, data.channels)
    arrays: list[Inputs] = []
    for split in SPLITS:
        x, y = getattr(data, f"x_{split}"), getattr(data, f"y_{split}")
        scaled = scaling(x) if len(x) else x
        if data.is_unlabelled and (scaling.outputs is None or scaling.outputs == scaling.inputs):
            labels = scaled
        else:
            labels = y if scaling.outputs is None or not len(y) else _apply_scale(y, scaling.outputs)
        arrays += [scaled, labels]
    return LocalData(*arrays, spool=data.spool, channels=data.channels), scaling


def scaling_of(x: Inputs, y: Inputs, recipe: Recipe, channels: Channels | None) -> Scaling:
    """The scale of samples that a recipe gives, or takes of these training samples if it says `BOARD`.

    `y` are their labels, or predictions: without `BOARD` only the shape counts. Errors are those of `scale_samples`.
    """
    entries, has_names = recipe.scaling, channels is not None
    channels = channels or _channels_of(x, entries)
    predicts_columns = labels_of(recipe.loss) == "values" and bool(channels.outputs)
    predicts_inputs = labels_of(recipe.loss) == "values" and not predicts_columns and y.shape[1:] == x.shape[1:]
    if entries == (BOARD,):
        inputs = _fit(chunks(x), len(channels.inputs), channels.input_axis)
        outputs = replace(inputs, axis=channels.output_axis)  # what follows a window is scaled as the window is
        if predicts_columns and channels.outputs != channels.inputs:
            outputs = _fit(chunks(y), len(channels.outputs), channels.output_axis)
    else:
        scales = {scale.name: scale for scale in map(ColumnScale.parse, entries)}
        if not has_names:  # arrays name no channels: the order of the entries counts
            scales = dict(zip(channels.inputs, scales.values(), strict=True))
        inputs = outputs = _scale_of_columns(channels.inputs, scales, channels.input_axis)
        if predicts_columns:
            outputs = _scale_of_columns(channels.outputs, scales, channels.output_axis)
    return Scaling(inputs, outputs if predicts_columns else inputs if predicts_inputs else None)


def scale_entries(scaling: Scaling, data: LocalData) -> tuple[str, ...]:
    """The entries of a recipe (`Recipe.scaling`) with which other samples of these columns are scaled alike."""
    if scaling.inputs is None:
        return ()
    inputs = data.channels.inputs if data.channels else tuple(map(str, range(len(scaling.inputs.mean))))
    entries = dict(zip(inputs, zip(scaling.inputs.mean, scaling.inputs.deviation, strict=True), strict=True))
    if scaling.outputs is not None and data.channels and data.channels.outputs:
        outputs = zip(scaling.outputs.mean, scaling.outputs.deviation, strict=True)
        entries |= dict(zip(data.channels.outputs, outputs, strict=True))
    return tuple(str(ColumnScale(name, *numbers)) for name, numbers in entries.items())


def _channels_of(x: Inputs, scaling: Sequence[str]) -> Channels:
    """The channels of arrays: along the first axis of a sample, or the second one if only that has as many as the
    recipe has scales."""
    shape, count = x.shape[1:], len(scaling)
    if scaling[0] == BOARD:
        return Channels(tuple(map(str, range(shape[0]))))
    axis = next((axis for axis, size in enumerate(shape[:2]) if size == count), None)
    if axis is None and count > 1:
        expected = f"samples of {count} channels, as recipe.scaling has them"
        hint = "Of a table, `fedprune-device data check --out FILE.npz` writes the columns' names, too."
        raise DataError("samples to scale", expected=expected, got=shape_text(*shape), hint=hint)
    return Channels(tuple(map(str, range(count))), axis or 0)


def _scale_of_columns(names: Sequence[str], scales: dict[str, ColumnScale], axis: int) -> ChannelScale:
    for position, name in enumerate(names, 1):
        if name not in scales:
            expected = f"an entry for each of {len(names)} columns: {', '.join(names)}"
            raise DataError("recipe.scaling", expected=expected, got=f"none for that of number {position}")
    chosen = [scales[name] for name in names]
    return ChannelScale(tuple(s.mean for s in chosen), tuple(s.deviation for s in chosen), axis)


def _fit(parts: Iterable[Array], channels: int, axis: int) -> ChannelScale:
    """Mean and deviation of each channel; a channel that never changes keeps the deviation 1."""
    statistics = ColumnStatistics(channels)
    for part in parts:
        rows = np.moveaxis(part, axis + 1, -1) if channels > 1 else part
        rows = rows.reshape(-1, channels)
        statistics.add(np.where(rows == np.float32(PADDING), np.nan, rows))
    mean, deviation = statistics.mean.astype(np.float32), statistics.deviation.astype(np.float32)
    if constant := int((deviation == 0).sum()):
        _LOG.info(
            "%d of %d columns never change in the training samples: they keep the deviation 1", constant, channels
        )
    deviation = np.where(deviation > 0, deviation, 1)
    return ChannelScale(tuple(mean.tolist()), tuple(deviation.tolist()), axis)


def _apply_scale(x: Inputs, scale: ChannelScale) -> Inputs:
    return x.after_reading(scale) if isinstance(x, StoredArray) else scale(x)
