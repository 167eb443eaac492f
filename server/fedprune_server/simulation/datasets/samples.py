"""The samples of a data set: arrays that may be memory-mapped, from which the rows in use are copied."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import DataError, shape_text

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]

CHUNK_SAMPLES = 4096  # samples per chunk when all are read


@dataclass(frozen=True, eq=False)
class Samples:
    """All samples of a data set. Rows are numbered through all parts, one after the other.

    Raises `DataError` if lengths, types or shapes don't fit each other, or a number is out of range.

    Attributes:
        arrays: Inputs [n_i, ...], of one type and shape: uint8 images, floats, or integers (token ids).
        labels: Classes, int64 [n].
        is_test: Marks of the data set's own test samples, bool [n].
        owners: Index of each sample's owner (a person, a writer, a domain) in `owner_names`, int64 [n]; None without
            owners.
        class_names: Names of the classes; numbers as text if the files have no names.
    """

    arrays: tuple[Array, ...]
    labels: npt.NDArray[np.int64]
    is_test: npt.NDArray[np.bool_]
    owners: npt.NDArray[np.int64] | None = None
    owner_names: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.arrays or not len(self.labels):
            raise DataError("a data set is empty", expected="at least one sample")
        first_part = self.arrays[0]
        for array in self.arrays:
            if array.ndim < 2 or array.dtype.kind not in "fiu":
                raise DataError("inputs", expected="numbers [n, ...]", got=f"{array.dtype} {shape_text(*array.shape)}")
            if array.dtype != first_part.dtype or array.shape[1:] != first_part.shape[1:]:
                raise DataError(
                    "inputs of the parts of a data set",
                    expected=f"{first_part.dtype} {shape_text('n', *first_part.shape[1:])}",
                    got=f"{array.dtype} {shape_text('n', *array.shape[1:])}",
                )
        total = sum(map(len, self.arrays))
        object.__setattr__(self, "labels", _checked_labels(self.labels, total))
        if self.is_test.dtype != bool or self.is_test.shape != (total,):
            raise DataError("marks of test samples", expected=f"bool [{total}]", got=_array_text(self.is_test))
        if self.owners is not None:
            owner_count = len(self.owner_names)
            if self.owners.dtype != np.int64 or self.owners.shape != (total,):
                raise DataError("owners", expected=f"int64 [{total}]", got=_array_text(self.owners))
            if int(self.owners.min()) < 0 or int(self.owners.max()) >= owner_count:
                raise DataError("an owner", expected=f"0 to {owner_count - 1}", got=int(self.owners.max()))
        if not self.class_names:
            object.__setattr__(self, "class_names", tuple(map(str, range(int(self.labels.max()) + 1))))
        elif int(self.labels.max()) >= len(self.class_names):
            raise DataError("a label", expected=f"below {len(self.class_names)}", got=int(self.labels.max()))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample in the files."""
        return self.arrays[0].shape[1:]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the inputs in the files."""
        return self.arrays[0].dtype

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all inputs, labels, owners and marks. Reads everything once."""
        digest = hashlib.sha256(f"{self.dtype.str} {self.shape} {len(self)}".encode())
        for part in self.arrays:
            for at in range(0, len(part), CHUNK_SAMPLES):
                digest.update(np.ascontiguousarray(part[at : at + CHUNK_SAMPLES]).tobytes())
        for array in (self.labels, self.is_test, self.owners):
            digest.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def take(self, rows: npt.ArrayLike) -> Array:
        """Copy inputs as the files have them. Raises `DataError` if a row does not exist."""
        row_numbers = np.asarray(rows, np.int64)
        if len(row_numbers) and not (int(row_numbers.min()) >= 0 and int(row_numbers.max()) < len(self)):
            raise DataError(
                "rows", expected=f"0 to {len(self) - 1}", got=(int(row_numbers.min()), int(row_numbers.max()))
            )
        inputs = np.empty((len(row_numbers), *self.shape), self.dtype)
        part_start = 0
        for array in self.arrays:
            is_in_part = (row_numbers >= part_start) & (row_numbers < part_start + len(array))
            if is_in_part.any():
                inputs[is_in_part] = array[row_numbers[is_in_part] - part_start]
            part_start += len(array)
        return inputs


def assemble_samples(
    splits: Sequence[tuple[Array, Array, bool | npt.NDArray[np.bool_]]],
    *,
    owners: Sequence[Array] | None = None,
    class_names: Sequence[str] = (),
) -> Samples:
    """Make a data set of its splits.

    `splits`: inputs, labels and whether all, or each, are test samples; `owners`: owners per split, as whole numbers or
    texts. Raises `DataError`: as `Samples`; or a split has another number of labels than inputs.
    """
    filled_splits = [(x, y, is_test) for x, y, is_test in splits if len(y) or len(x)]
    for x, y, _ in filled_splits:
        if len(x) != len(y):
            raise DataError("number of labels", expected=len(x), got=len(y))
    if not filled_splits:
        raise DataError("a data set is empty", expected="at least one sample")
    labels = np.concatenate([np.asarray(y) for _, y, _ in filled_splits])
    testing = np.concatenate([np.full(len(y), is_test) for _, y, is_test in filled_splits])
    names, indices = tuple[str, ...](), None
    if owners is not None:
        owner_values = np.concatenate([np.asarray(o) for o in owners])
        if owner_values.shape != labels.shape:
            raise DataError("number of owners", expected=len(labels), got=shape_text(*owner_values.shape))
        if owner_values.dtype.kind not in "iuUS":
            raise DataError("owners", expected="whole numbers or texts", got=str(owner_values.dtype))
        distinct_owners, indices = np.unique(owner_values, return_inverse=True)
        names, indices = tuple(map(str, distinct_owners.tolist())), indices.astype(np.int64)
    return Samples(tuple(x for x, _, _ in filled_splits), labels, testing, indices, names, tuple(class_names))


def _checked_labels(labels: Array, total: int) -> npt.NDArray[np.int64]:
    if labels.dtype.kind not in "iub" or labels.shape != (total,):
        raise DataError("labels", expected=f"whole numbers [{total}]", got=_array_text(labels))
    if int(labels.min()) < 0:
        raise DataError("a label is negative", expected="0 or more", got=int(labels.min()))
    # Counts per class are arrays as long as the largest label: an id taken for a label would fill memory.
    if int(labels.max()) >= 2**20:
        raise DataError("a label", expected="below 1,048,576 classes", got=int(labels.max()))
    return np.ascontiguousarray(labels, np.int64)


def _array_text(array: Array) -> str:
    return f"{array.dtype} {shape_text(*array.shape)}"
