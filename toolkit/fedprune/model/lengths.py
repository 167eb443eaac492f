"""Inputs of any length between two bounds: samples are padded to the upper one, and padded places are marked.

A padded place holds a number that no sample has, so that rows of samples stay arrays of one size wherever they are
stored or sent, and a model's graph finds their lengths in them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import DataError, FedpruneError, Subject, shape_text, shown
from fedprune.core.validation import whole
from fedprune.model.axis import MAX_SIZE

# In padded places of float32.
PADDING = float(np.finfo(np.float32).max)

# In padded places of whole numbers, such as token ids.
ID_PADDING = 2**31 - 1

# Key of a graph's metadata that holds the axis of one sample whose length varies, and its least length.
LENGTH = "fedprune.length"

_RANGE = re.compile(r"([0-9]{1,10}):([0-9]{1,10})")

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Lengths:
    """The bounds of a length, as a size of a shape; written `400:16000`."""

    least: int
    most: int

    def __str__(self) -> str:
        return f"{self.least}:{self.most}"

    def __contains__(self, size: int) -> bool:
        return self.least <= size <= self.most

    @classmethod
    def parse(cls, text: str, error: type[FedpruneError], where: Subject = "the bounds of a length") -> Lengths:
        """Bounds from text such as `400:16000`; raises `error`, which names `where`, if they aren't any."""
        match = _RANGE.fullmatch(text)
        least, most = map(int, match.groups()) if match else (0, 0)
        if not 1 <= least <= most <= MAX_SIZE:
            raise error(where, expected="bounds of a length from 1 up, such as 400:16000", got=shown(text))
        return cls(least, most)


# One sample's shape; names and None stand for any size.
Shape = tuple[int | str | Lengths | None, ...]


def with_lengths(shape: Sequence[int | str | None], metadata: Mapping[str, str], error: type[FedpruneError]) -> Shape:
    """A graph's input shape, without the batch, with the bounds that its metadata has; raises `error` if they don't
    fit."""
    if LENGTH not in metadata:
        return tuple(shape)
    try:
        axis, least = json.loads(metadata[LENGTH])
    except (ValueError, TypeError, RecursionError) as reason:
        raise error(f"metadata {LENGTH}", expected="[axis, length]", got=shown(metadata[LENGTH])) from reason
    axis = whole(f"metadata {LENGTH}: axis", axis, 0, len(shape) - 1, error=error)
    most = whole("size of the input's axis whose length varies", shape[axis], 1, error=error)
    least = whole(f"metadata {LENGTH}: length", least, 1, most, error=error)
    return (*shape[:axis], Lengths(least, most), *shape[axis + 1 :])


def written(shape: Shape) -> list[int | str | None]:
    """A shape as JSON has it: bounds of a length as text."""
    return [str(size) if isinstance(size, Lengths) else size for size in shape]


def read(sizes: Sequence[object]) -> Shape:
    """The inverse of `written`. Raises `DataError` for malformed bounds."""
    return tuple(
        Lengths.parse(size, DataError) if isinstance(size, str) and ":" in size
        else size if isinstance(size, (int, str)) else None
        for size in sizes
    )  # fmt: skip


def free_axis(shape: Sequence[object]) -> int | None:
    """The axis of one sample whose length varies, if there is one."""
    return next((axis for axis, size in enumerate(shape) if isinstance(size, Lengths)), None)


def at_most(shape: Shape) -> tuple[int | str | None, ...]:
    """The same with the upper bound of a length as its size."""
    return tuple(size.most if isinstance(size, Lengths) else size for size in shape)


def fits(found: Sequence[int], shape: Sequence[int | str | Lengths | None]) -> bool:
    """Whether a sample's shape is a model's."""
    return len(found) == len(shape) and all(
        f in s if isinstance(s, Lengths) else not isinstance(s, int) or s == f
        for f, s in zip(found, shape, strict=True)
    )


def padded(x: Array, shape: Shape, lengths: Array | None = None) -> Array:
    """Samples [n, ...] at a model's upper bound: what is beyond each of the `lengths` [n], and of the array, is marked.
    Raises `DataError` if the array's shape isn't the model's, or a length is out of its bounds."""
    if lengths is not None:
        check_lengths(lengths, len(x))
    axis = free_axis(shape)
    if axis is None:
        return x
    bounds, free = shape[axis], axis + 1
    own = x.shape[free] if x.ndim == len(shape) + 1 else 0
    others = (*x.shape[1:free], *x.shape[free + 1 :])
    if not isinstance(bounds, Lengths) or own > bounds.most or not fits(others, (*shape[:axis], *shape[free:])):
        raise DataError("shape of one sample", expected=shape_text(*shape), got=shape_text(*x.shape[1:]))
    found = np.full(len(x), own) if lengths is None else lengths
    if len(found) and not bounds.least <= found.min() <= found.max() <= own:
        wrong = int(found.min() if found.min() < bounds.least else found.max())
        raise DataError("length of a sample", expected=f"{bounds.least} to {min(own, bounds.most)}", got=wrong)
    if own == bounds.most and lengths is None:
        return x
    out = np.full((*x.shape[:free], bounds.most, *x.shape[free + 1 :]), mark(x.dtype), x.dtype)
    np.moveaxis(out, free, 1)[:, :own] = np.moveaxis(x, free, 1)
    if lengths is not None:
        beyond = np.arange(bounds.most) >= found[:, None]
        np.moveaxis(out, free, 1)[beyond] = mark(x.dtype)
    return out


def check_lengths(lengths: Any, count: int) -> None:
    """Make sure that an array [n] of any kind has the length of each sample; raises `DataError`."""
    if lengths.shape != (count,) or lengths.dtype.kind not in "iu":
        got = f"{lengths.dtype} {shape_text(*lengths.shape)}"
        raise DataError("array lengths", expected=f"whole numbers [{count}]", got=got)


def lengths_of(x: Array, axis: int) -> npt.NDArray[np.int64]:
    """Lengths [n] of padded samples [n, ...] along an axis of one sample."""
    along = np.moveaxis(x, axis + 1, 1).reshape(len(x), x.shape[axis + 1], -1)[:, :, 0]
    return np.asarray((along < mark(x.dtype)).sum(1), np.int64)


def mark(dtype: npt.DTypeLike) -> float | int:
    """The value of padding of this type."""
    return ID_PADDING if np.dtype(dtype).kind in "iu" else PADDING
