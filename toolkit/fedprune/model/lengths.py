"""Inputs of any length between two bounds: samples are padded to the upper one with a number that no sample has.

So samples stay arrays of one shape wherever they are stored or sent, and a model's graph finds their lengths in them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import DataError, FedpruneError, Subject, shape_text, value_text
from fedprune.core.validation import check_whole
from fedprune.model.axis import MAX_SIZE

# The padding of float32: its largest finite number, since NaN and infinity would spread through sums and checks.
PADDING = float(np.finfo(np.float32).max)

# The padding of integers, such as token ids.
ID_PADDING = 2**31 - 1

# Key of a graph's metadata that holds the axis of one sample whose length varies, and its least length.
LENGTH_METADATA = "fedprune.length"

_RANGE = re.compile(r"([0-9]{1,10}):([0-9]{1,10})")

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Lengths:
    """The bounds of a length, as a size of a shape; written `400:16000`."""

    lower: int
    upper: int

    def __str__(self) -> str:
        return f"{self.lower}:{self.upper}"

    def __contains__(self, size: int) -> bool:
        return self.lower <= size <= self.upper

    @classmethod
    def parse(cls, text: str, error: type[FedpruneError], where: Subject = "the bounds of a length") -> Lengths:
        """Bounds from text such as `400:16000`; raises `error`, which names `where`, if they aren't any."""
        match = _RANGE.fullmatch(text)
        lower, upper = map(int, match.groups()) if match else (0, 0)
        if not 1 <= lower <= upper <= MAX_SIZE:
            raise error(where, expected="bounds of a length from 1 up, such as 400:16000", got=value_text(text))
        return cls(lower, upper)


# One sample's shape; names and None stand for any size.
Shape = tuple[int | str | Lengths | None, ...]


def with_lengths(shape: Sequence[int | str | None], metadata: Mapping[str, str], error: type[FedpruneError]) -> Shape:
    """A graph's input shape, without the batch, with the bounds from its metadata; raises `error` if they don't fit."""
    if LENGTH_METADATA not in metadata:
        return tuple(shape)
    try:
        axis, lower = json.loads(metadata[LENGTH_METADATA])
    except (ValueError, TypeError, RecursionError) as cause:
        raise error(
            f"metadata {LENGTH_METADATA}", expected="[axis, length]", got=value_text(metadata[LENGTH_METADATA])
        ) from cause
    axis = check_whole(f"metadata {LENGTH_METADATA}: axis", axis, 0, len(shape) - 1, error=error)
    upper = check_whole("size of the input's axis whose length varies", shape[axis], 1, error=error)
    lower = check_whole(f"metadata {LENGTH_METADATA}: length", lower, 1, upper, error=error)
    return (*shape[:axis], Lengths(lower, upper), *shape[axis + 1 :])


def shape_to_json(shape: Shape) -> list[int | str | None]:
    """A shape as plain JSON types, with bounds of a length as text."""
    return [str(size) if isinstance(size, Lengths) else size for size in shape]


def shape_from_json(sizes: Sequence[object]) -> Shape:
    """The inverse of `shape_to_json`. Raises `DataError` for malformed bounds."""
    return tuple(
        Lengths.parse(size, DataError) if isinstance(size, str) and ":" in size
        else size if isinstance(size, (int, str)) else None
        for size in sizes
    )  # fmt: skip


def free_axis(shape: Sequence[object]) -> int | None:
    """The axis of one sample whose length varies, if there is one."""
    return next((axis for axis, size in enumerate(shape) if isinstance(size, Lengths)), None)


def upper_shape(shape: Shape) -> tuple[int | str | None, ...]:
    """A shape with the upper bound of a length as its size."""
    return tuple(size.upper if isinstance(size, Lengths) else size for size in shape)


def fits_shape(sample_shape: Sequence[int], shape: Sequence[int | str | Lengths | None]) -> bool:
    """Whether a sample of shape `sample_shape` fits a model's input shape."""
    return len(sample_shape) == len(shape) and all(
        length in size if isinstance(size, Lengths) else not isinstance(size, int) or size == length
        for length, size in zip(sample_shape, shape, strict=True)
    )


def pad_to_bound(x: Array, shape: Shape, lengths: Array | None = None) -> Array:
    """Pad samples [n, ...] to a model's upper bound, beyond the array and beyond each of the `lengths` [n]. Raises
    `DataError` if the array's shape doesn't fit the model, or a length is out of bounds."""
    if lengths is not None:
        check_lengths(lengths, len(x))
    axis = free_axis(shape)
    if axis is None:
        return x
    bounds, x_axis = shape[axis], axis + 1
    own_length = x.shape[x_axis] if x.ndim == len(shape) + 1 else 0
    other_sizes = (*x.shape[1:x_axis], *x.shape[x_axis + 1 :])
    if (
        not isinstance(bounds, Lengths)
        or own_length > bounds.upper
        or not fits_shape(other_sizes, (*shape[:axis], *shape[x_axis:]))
    ):
        raise DataError("shape of one sample", expected=shape_text(*shape), got=shape_text(*x.shape[1:]))
    sample_lengths = np.full(len(x), own_length) if lengths is None else lengths
    if len(sample_lengths) and not bounds.lower <= sample_lengths.min() <= sample_lengths.max() <= own_length:
        wrong_length = int(sample_lengths.min() if sample_lengths.min() < bounds.lower else sample_lengths.max())
        raise DataError(
            "length of a sample", expected=f"{bounds.lower} to {min(own_length, bounds.upper)}", got=wrong_length
        )
    if own_length == bounds.upper and lengths is None:
        return x
    x = x.astype(padded_type(x.dtype), copy=False)
    padded_x = np.full((*x.shape[:x_axis], bounds.upper, *x.shape[x_axis + 1 :]), padding_value(x.dtype), x.dtype)
    np.moveaxis(padded_x, x_axis, 1)[:, :own_length] = np.moveaxis(x, x_axis, 1)
    if lengths is not None:
        is_padding = np.arange(bounds.upper) >= sample_lengths[:, None]
        np.moveaxis(padded_x, x_axis, 1)[is_padding] = padding_value(x.dtype)
    return padded_x


def check_lengths(lengths: Any, count: int) -> None:
    """Raise `DataError` unless an array has the form of samples' lengths: integers [n]."""
    if lengths.shape != (count,) or lengths.dtype.kind not in "iu":
        got = f"{lengths.dtype} {shape_text(*lengths.shape)}"
        raise DataError("array lengths", expected=f"whole numbers [{count}]", got=got)


def lengths_of(x: Array, axis: int) -> npt.NDArray[np.int64]:
    """Lengths [n] of padded samples [n, ...] along an axis of one sample."""
    # One number per position is enough: a position is padded in all of its numbers, or in none.
    numbers = np.moveaxis(x, axis + 1, 1).reshape(len(x), x.shape[axis + 1], -1)[:, :, 0]
    return np.asarray((numbers < padding_value(x.dtype)).sum(1), np.int64)


def padded_type(dtype: npt.DTypeLike) -> np.dtype[Any]:
    """The type of samples once they are padded: short whole numbers have no room for the padding."""
    kind = np.dtype(dtype)
    return np.dtype(np.int64) if kind.kind in "iub" and kind != np.int32 else kind


def padding_value(dtype: npt.DTypeLike) -> float | int:
    return ID_PADDING if np.dtype(dtype).kind in "iu" else PADDING
