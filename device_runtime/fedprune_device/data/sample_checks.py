"""Checks samples and labels before they are trained on: type, shape, length, finite numbers, no negative class.

Large arrays on the disk (`StoredArray`) are checked in chunks, and only once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from fedprune.core.errors import DataError, shape_text
from fedprune.model.input_type import InputType
from fedprune.model.lengths import Shape, fits_shape, free_axis
from fedprune_device.data.stored_array import Array, Inputs, StoredArray, as_inputs, type_in_memory


def check_shape(x: Inputs, shape: Shape) -> None:
    """Check samples [n, ...] against one sample's shape (a name or None stands for any size); raises `DataError`."""
    if not fits_shape(x.shape[1:], shape):
        raise DataError(
            "shape of one sample",
            expected=shape_text(*shape) if free_axis(shape) is not None else shape,
            got=x.shape[1:],
            hint="Prepare the data as the model's input wants it (channels first).",
        )


def check_type(x: Inputs, input_type: InputType) -> None:
    """Check the samples' type against a model's input; raises `DataError`. Whole numbers on the disk are compared with
    its range as they are read."""
    if (x.dtype.kind != "f") != input_type.is_whole:
        raise DataError(
            "type of inputs",
            expected=str(input_type),
            got="int64, as which all whole numbers are read" if x.dtype == np.int64 else x.dtype,
            hint=input_type.hint,
        )
    if isinstance(x, np.ndarray):
        input_type.check_range(x)


def checked_samples(x: object, y: object, split: str = "") -> tuple[Inputs, Inputs]:
    """Samples [n, ...] and labels in the types of `LocalData`; raises `DataError`, which names the `split`."""
    if y is x:
        inputs = checked_inputs(as_inputs(x), split)
        return inputs, inputs
    labels = _checked_labels(as_inputs(y), split)
    kind = f"{split} " if split else ""
    inputs = checked_inputs(as_inputs(x), split)
    if len(inputs) != len(labels):
        raise DataError(f"number of {kind}labels", expected=len(inputs), got=len(labels))
    return inputs, labels


def _checked_labels(labels: Inputs, split: str) -> Inputs:
    kind = f"{split} " if split else ""
    if labels.dtype.kind not in "iufb" or labels.ndim < 1:
        expected = "classes as whole numbers, or numbers, [n, ...]"
        raise DataError(f"{kind}labels", expected=expected, got=f"{labels.dtype} {labels.shape}")
    if isinstance(labels, StoredArray):
        if labels.dtype.kind == "f" and not labels.checked:
            _check_chunks(labels, f"{kind}labels")
        return replace(labels, checked=True)
    if labels.ndim > 1 and labels.dtype.kind in "iu":
        return np.ascontiguousarray(labels)  # of their own width: masks are as many labels as there are pixels
    if labels.ndim == 1 and labels.dtype.kind != "f":
        if len(labels) and int(labels.min()) < 0:
            raise DataError(
                f"a {kind}label is negative",
                expected="0 or more",
                got=int(labels.min()),
                hint="Number the classes from 0; save numbers to predict as float32.",
            )
        return np.ascontiguousarray(labels, np.int64)
    labels = np.ascontiguousarray(labels, np.float32)
    _check_numbers(labels, f"{kind}labels")
    return labels


def checked_inputs(inputs: Inputs, split: str = "") -> Inputs:
    """Inputs as float32 or whole numbers; arguments and errors are those of `checked_samples`."""
    kind = f"{split} " if split else ""
    if inputs.dtype.kind not in "fiub":
        raise DataError(f"type of {kind}inputs", expected="float32", got=inputs.dtype)
    if inputs.ndim < 2:
        raise DataError(f"{kind}inputs", expected="[n, ...]", got=inputs.shape)
    if not isinstance(inputs, StoredArray):
        inputs = np.ascontiguousarray(inputs, type_in_memory(inputs.dtype))
        _check_numbers(inputs, f"{kind}inputs")
        return inputs
    if not inputs.checked:
        _check_chunks(inputs, f"{kind}inputs")
    return replace(inputs, checked=True)


def _check_chunks(array: StoredArray, what: str) -> None:
    first_sample = 0
    for chunk in array.chunks():
        _check_numbers(chunk, what, first_sample)
        first_sample += len(chunk)


def _check_numbers(numbers: Array, what: str, first_sample: int = 0) -> None:
    """Refuse negative token ids and numbers that are not finite; `first_sample` is the number of the first sample."""
    if numbers.dtype.kind != "f":
        if numbers.dtype == np.int64 and numbers.size and int(numbers.min()) < 0:
            raise DataError(
                f"{what} hold a negative token id",
                expected="0 or more",
                got=int(numbers.min()),
                hint="Save numbers that are no ids as int16, or as float32 for a model that takes floats.",
            )
    elif not np.isfinite(numbers).all():
        bad = int(np.flatnonzero(~np.isfinite(numbers.reshape(len(numbers), -1)).all(1))[0])
        raise DataError(
            f"{what} hold numbers that are not finite",
            got=f"sample {first_sample + bad}, which has {'a NaN' if np.isnan(numbers[bad]).any() else 'an infinity'}",
            hint="Leave such samples out, or fill the gaps, as numpy.nan_to_num does.",
        )


def common_type(array: Inputs) -> np.dtype[Any]:
    """An array's type; whole numbers of any width are one, as labels in memory keep their own."""
    return np.dtype(np.int64) if array.dtype.kind in "iu" else array.dtype
