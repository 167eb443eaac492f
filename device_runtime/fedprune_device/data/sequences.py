"""Pads samples of different lengths to the length that a model takes, and their labels with them.

A file has samples that are padded to one shape, and an array `lengths` with the length of each. Until the model is
known, both are kept together as rows [n, numbers and length]: the numbers of a sample in C order, then its length.
`describe_rows` describes such rows (`PaddedRows`). `pad_samples` turns them into samples that are padded to the model's
upper bound, and `pad_labels` pads labels so that padded positions count for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from fedprune.core.errors import DataError
from fedprune.model.lengths import Lengths, Shape, check_lengths, free_axis, lengths_of, pad_to_bound
from fedprune_device.data.labels import Targets
from fedprune_device.data.spooled_arrays import gather_chunks
from fedprune_device.data.stored_array import Array, Inputs, StoredArray, chunks

LENGTHS = "lengths"  # the array of a file that holds the length of each sample


@dataclass(frozen=True)
class PaddedRows:
    """The content of rows [n, numbers and length]: the padded shape of one sample, and the range of the lengths."""

    shape: tuple[int, ...]
    shortest: int
    longest: int


def describe_rows(arrays: Sequence[tuple[Inputs, Inputs]]) -> PaddedRows:
    """The rows of splits of samples [n, ...] with their lengths [n]; raises `DataError` if these don't fit."""
    shapes = {x.shape[1:] for x, _ in arrays}
    length_arrays = []
    for x, lengths in arrays:
        check_lengths(lengths, len(x))
        length_arrays.append(np.asarray(lengths).astype(np.int64))
    if len(shapes) != 1:
        raise DataError("arrays with lengths", expected="samples of one padded shape in all splits", got=len(shapes))
    shape, numbers = shapes.pop(), np.concatenate(length_arrays)
    low, high = (int(numbers.min()), int(numbers.max())) if len(numbers) else (1, 1)
    if low < 1 or high > max(shape, default=0):
        bad_length = low if low < 1 else high
        raise DataError("length of a sample", expected=f"1 to {max(shape, default=0)}", got=bad_length)
    return PaddedRows(shape, low, high)


def pad_samples(x: Inputs, rows: PaddedRows | None, shape: Shape) -> Inputs:
    """Samples as a model takes them, padded to its upper bound. Samples on the disk are padded when they are read.

    `x` are rows, described by `rows`, or samples of one length (None); `shape` is the model's input. Raises `DataError`
    if the samples don't fit the model.
    """
    axis = free_axis(shape)
    bounds = None if axis is None else shape[axis]
    if axis is None or not isinstance(bounds, Lengths):
        return x
    if rows is not None and len(rows.shape) == len(shape):
        longest = min(rows.shape[axis], bounds.upper)
        if rows.shortest < bounds.lower or rows.longest > longest:
            bad_length = rows.shortest if rows.shortest < bounds.lower else rows.longest
            raise DataError("length of a sample", expected=f"{bounds.lower} to {longest}", got=bad_length)

    def convert(samples: Array) -> Array:
        if rows is None:
            return pad_to_bound(samples, shape)
        size = prod(rows.shape)
        lengths = samples[:, size].astype(np.int64)
        return pad_to_bound(samples[:, :size].reshape(len(samples), *rows.shape), shape, lengths)

    if not isinstance(x, StoredArray):
        return convert(x)
    if rows is None and x.shape[1:][axis : axis + 1] == (bounds.upper,):
        return x
    return x.after_reading(convert)


def pad_labels(y: Inputs, x: Inputs, shape: Shape, targets: Targets | None, spool: Path | None) -> Inputs:
    """Labels for each position of padded samples `x`: padded positions get the label that counts for nothing.

    Large arrays are written to a file in `spool`. Raises `DataError` if the recipe has no label for padded positions.
    """
    axis = free_axis(shape)
    bounds = None if axis is None else shape[axis]
    if axis is None or targets is None or not isinstance(bounds, Lengths):
        return y
    longest, label_length = bounds.upper, y.shape[1] if y.ndim == 2 else 0
    if targets.shape != (longest,) or not targets.takes_whole_numbers or not 0 < label_length <= longest:
        return y
    input_chunks = chunks(x) if len(y) else ()
    lengths = np.concatenate([np.zeros(0, np.int64), *(lengths_of(chunk, axis) for chunk in input_chunks)])
    if label_length == longest and (lengths == longest).all():
        return y
    if targets.ignored is None:
        raise DataError(
            "labels of padded places", expected="recipe.ignore_label", hint="Such as -1: they then count for nothing."
        )

    def parts(ignored: int) -> Iterator[Array]:
        first = 0
        for chunk in chunks(y):
            out = np.full((len(chunk), longest), ignored, np.int32)
            out[:, :label_length] = chunk
            out[np.arange(longest) >= lengths[first : first + len(chunk), None]] = ignored
            first += len(chunk)
            yield out

    return gather_chunks(parts(targets.ignored), (len(y), longest), np.dtype(np.int32), spool)
