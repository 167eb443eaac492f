"""Converts samples as files have them into a model's inputs: images to floats, shrunk and scaled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import DataError, shape_text
from fedprune_server.simulation.datasets.samples import CHUNK_SAMPLES, Samples

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]

_CHANNEL_COUNTS = (1, 3, 4)


@dataclass(frozen=True)
class Preparation:
    """Conversion of inputs for a model, applied only to the samples in use.

    Images (uint8 with 1, 3 or 4 channels last, first or omitted) become float32 [n, channels, height, width] from 0 to
    1. Floats become float32, integers int64 (token ids). Raises `DataError` if a number is out of range.

    Attributes:
        pool: Factor by which images shrink, by averages over squares.
        mean: Subtracted afterwards, one number per channel (the first axis of a sample); empty for none.
        deviation: Divisors after that, one number per channel.
    """

    pool: int = 1
    mean: tuple[float, ...] = field(default=())
    deviation: tuple[float, ...] = field(default=())

    def __post_init__(self) -> None:
        if isinstance(self.pool, bool) or not isinstance(self.pool, int) or not 1 <= self.pool <= 1024:
            raise DataError("pool", expected="a whole number from 1 to 1024", got=self.pool)
        if len(self.mean) != len(self.deviation) or not all(d > 0 for d in self.deviation):
            raise DataError(
                "mean and deviation", expected="as many of both, deviations above 0", got=(self.mean, self.deviation)
            )

    def __call__(self, raw: Array) -> Array:
        """Convert inputs as the files have them, [n, ...]. Raises `DataError` if they are not images where images are
        needed, can't be divided into squares, or have another number of channels than `mean`."""
        if raw.dtype.kind in "iu" and raw.dtype != np.uint8:
            return raw.astype(np.int64)
        x = _image_floats(raw) if raw.dtype == np.uint8 else np.ascontiguousarray(raw, np.float32)
        if self.pool > 1:
            x = _shrink_images(x, self.pool)
        if self.mean:
            if len(self.mean) != x.shape[1]:
                raise DataError("mean and deviation", expected=f"one number per channel, {x.shape[1]}", got=self.mean)
            per_channel = (1, -1) + (1,) * (x.ndim - 2)
            mean, deviation = (np.array(v, np.float32).reshape(per_channel) for v in (self.mean, self.deviation))
            x = (x - mean) / deviation
        return np.ascontiguousarray(x)

    def with_scaling(self, samples: Samples, rows: Sequence[int] | Rows | None = None) -> Preparation:
        """This preparation with mean and deviation per channel, by default measured on all but the data set's test
        samples. Raises `DataError` if inputs are token ids, or a channel is constant."""
        # In float64 and in chunks: a data set may not fit in memory, and squares of a million pixels lose float32's
        # digits.
        without_scaling = replace(self, mean=(), deviation=())
        measured_rows = np.flatnonzero(~samples.is_test) if rows is None else np.asarray(rows, np.int64)
        count, total, squares = 0, np.zeros(0), np.zeros(0)
        for start in range(0, len(measured_rows), CHUNK_SAMPLES):
            x = without_scaling(samples.take(measured_rows[start : start + CHUNK_SAMPLES]))
            if x.dtype != np.float32:
                raise DataError("token ids have no mean", got=str(samples.dtype))
            flat = np.moveaxis(x, 1, 0).reshape(x.shape[1], -1).astype(np.float64)
            if not count:
                total, squares = np.zeros(len(flat)), np.zeros(len(flat))
            count += flat.shape[1]
            total += flat.sum(1)
            squares += np.square(flat).sum(1)
        if not count:
            raise DataError("no samples to measure mean and deviation on")
        mean = total / count
        deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
        if not (np.isfinite(deviation).all() and (deviation > 0).all()):
            raise DataError("deviation of a channel", expected="above 0", got=deviation.tolist())
        return replace(self, mean=tuple(map(float, mean)), deviation=tuple(map(float, deviation)))


def _image_floats(raw: Array) -> Array:
    if raw.ndim == 3:
        raw = raw[:, None]
    elif raw.ndim == 4 and raw.shape[3] in _CHANNEL_COUNTS:
        raw = raw.transpose(0, 3, 1, 2)
    elif raw.ndim != 4 or raw.shape[1] not in _CHANNEL_COUNTS:
        raise DataError(
            "images",
            expected="bytes [n, height, width], [n, height, width, colours] or [n, colours, height, width]",
            got=shape_text(*raw.shape),
            hint="Save other data as float32.",
        )
    return np.divide(raw, 255, dtype=np.float32)


def _shrink_images(x: Array, factor: int) -> Array:
    if x.ndim != 4 or x.shape[2] % factor or x.shape[3] % factor:
        raise DataError(
            "images to shrink", expected=f"[n, colours, height, width], divisible by {factor}", got=shape_text(*x.shape)
        )
    n, c, h, w = x.shape
    # Slices are added, which is many times faster than a mean over axes of two or three.
    total: Array = np.zeros((n, c, h // factor, w // factor), np.float32)
    for i in range(factor):
        for j in range(factor):
            total += x[:, :, i::factor, j::factor]
    total /= factor * factor
    return total
