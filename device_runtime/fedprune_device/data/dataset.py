"""A board's own samples, checked and split. They never leave the board; only counts do, and how even labels are."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import DataError, shape_text
from fedprune.core.rng import keyed_generator
from fedprune.model.lengths import Shape, fits_shape, free_axis
from fedprune_device.data.labels import Targets, effective_classes
from fedprune_device.data.sequences import PaddedRows, pad_labels, pad_samples
from fedprune_device.data.stored_array import Inputs, StoredArray, as_inputs, select_pairs, spool_large, type_text

Array = npt.NDArray[Any]

SPLITS = ("train", "test", "val")  # the suffixes of the arrays in a file, and in `LocalData`
_NO_SAMPLES = np.zeros((0, 0), np.float32)

_SCALE_HINT = "Scale images yourself as the model expects them, such as x.astype('float32') / 255."


@dataclass(frozen=True, eq=False)
class LocalData:
    """Training, test and validation samples of one device.

    Attributes:
        x_train: Inputs [n, ...]: float32, or int64 for token ids; large ones may be stored on the disk.
        y_train: Labels: classes as whole numbers, one per sample [n] or one per place, such as a pixel [n, ...], which
            may be stored on the disk; or float32 [n] or [n, ...]: 0 or 1 per class, or numbers to predict.
            Without labels the same object as `x_train`.
        x_test: Inputs that are never trained on; may be empty. What is measured on them is reported alone.
        y_test: Their labels.
        x_val: Inputs that are never trained on, by which training and fleet decide; may be empty.
        y_val: Their labels.
        rows: Where the inputs are rows [n, numbers and length]: what the rows hold.
        spool: A folder for copies of large arrays, which are otherwise held in memory.

    Raises:
        DataError: Types, lengths or shapes don't fit, a number is not finite, or a class or token id is negative.
    """

    x_train: Inputs
    y_train: Inputs
    x_test: Inputs
    y_test: Inputs
    x_val: Inputs = field(default_factory=lambda: _NO_SAMPLES)
    y_val: Inputs = field(default_factory=lambda: np.zeros(0, np.int64))
    rows: PaddedRows | None = field(default=None, kw_only=True)
    spool: Path | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        x: Inputs
        y: Inputs
        for split in SPLITS:
            if split == "val" and not len(self.y_val) and not len(self.x_val):
                x, y = self.x_train[:0], self.y_train[:0]
            else:
                x, y = checked_samples(getattr(self, f"x_{split}"), getattr(self, f"y_{split}"), split)
            object.__setattr__(self, f"x_{split}", x)
            object.__setattr__(self, f"y_{split}", y)
        if not len(self.y_train):
            raise DataError("training data is empty", expected="at least one sample", got=0)
        for split in filter(lambda s: len(getattr(self, f"y_{s}")), SPLITS[1:]):
            x, y = getattr(self, f"x_{split}"), getattr(self, f"y_{split}")
            if x.shape[1:] != self.x_train.shape[1:]:
                raise DataError(f"shape of one {split} sample", expected=self.x_train.shape[1:], got=x.shape[1:])
            for first, held_out, what in ((self.x_train, x, "inputs"), (self.y_train, y, "labels")):
                if (_common_type(first), first.shape[1:]) != (_common_type(held_out), held_out.shape[1:]):
                    raise DataError(f"type of {split} {what}", expected=type_text(first), got=type_text(held_out))

    @property
    def samples(self) -> int:
        return len(self.y_train)

    @cached_property
    def effective_classes(self) -> int | None:
        y = self.y_train
        if isinstance(y, StoredArray) or y.ndim != 1 or y.dtype.kind not in "iu":
            return None
        return effective_classes(np.unique(y, return_counts=True)[1])

    def snapshot(self, shape: Shape | None = None, targets: Targets | None = None) -> LocalData:
        """The samples as a model takes them, padded if its lengths vary; else this object, which never changes."""
        if shape is None or free_axis(shape) is None:
            return self
        arrays: list[Inputs] = []
        for split in SPLITS:
            x, y = getattr(self, f"x_{split}"), getattr(self, f"y_{split}")
            padded_inputs = pad_samples(x, self.rows, shape) if len(x) else _NO_SAMPLES
            arrays += [
                padded_inputs,
                padded_inputs if y is x else pad_labels(y, padded_inputs, shape, targets, self.spool),
            ]
        return LocalData(*arrays)

    @property
    def is_unlabelled(self) -> bool:
        """Whether the samples have no labels but themselves, which a model is to reproduce."""
        return self.y_train is self.x_train

    @property
    def memory_bytes(self) -> int:
        """Memory that all samples and labels take."""
        kinds = "x" if self.is_unlabelled else "xy"
        return sum(getattr(self, f"{kind}_{split}").nbytes for kind in kinds for split in SPLITS)

    def with_validation(self, share: float, seed: int = 0, device: str = "") -> LocalData:
        """These samples with a share of the training samples (below 1) as validation samples, unless there are some.

        Seed and device name decide which ones.
        """
        if not 0 <= share < 1:
            raise DataError("share of the training samples for validation", expected="0 to below 1", got=share)
        count = int(self.samples * share)
        if not count or len(self.y_val):
            return self
        order = keyed_generator(seed, "validation", device).permutation(self.samples)
        train, val = np.sort(order[count:]), np.sort(order[:count])
        kept_pairs, validation_pairs = (select_pairs(self.x_train, self.y_train, rows) for rows in (train, val))
        return LocalData(*kept_pairs, self.x_test, self.y_test, *validation_pairs, rows=self.rows, spool=self.spool)

    def with_spooled_arrays(self, spool: Path) -> LocalData:
        """These samples with large arrays in temporary files in `spool`, which are deleted with this process."""
        x = {split: spool_large(getattr(self, f"x_{split}"), spool) for split in SPLITS}
        y = {split: spool_large(getattr(self, f"y_{split}"), spool, any_type=True) for split in SPLITS}
        y = x if self.is_unlabelled else y
        arrays = x["train"], y["train"], x["test"], y["test"], x["val"], y["val"]
        return LocalData(*arrays, rows=self.rows, spool=spool)

    def check(self, targets: Targets, shape: Shape | None = None, *, token_ids: bool | None = None) -> None:
        """Check labels and inputs against a model; raises `DataError`. In `shape`, names and None are any size."""
        can_reproduce = (
            free_axis(shape or ()) is None
            and targets.loss != "cross_entropy"
            and targets.takes_whole_numbers == (self.x_train.dtype.kind == "i")
        )
        if self.is_unlabelled and not (can_reproduce and fits_shape(self.x_train.shape[1:], targets.shape)):
            raise DataError(
                "the samples have no labels",
                expected=f"labels {shape_text('n', *targets.shape)} for loss {targets.loss}",
                got=f"inputs {shape_text('n', *self.x_train.shape[1:])} alone",
                hint="Files of a class lie in a folder of its name, masks in masks/, boxes in labels/; a table has "
                "them in its column class. Without labels a model learns to reproduce its inputs, which its outputs "
                "must be as large as.",
            )
        for y in filter(len, (self.y_train, self.y_test, self.y_val)):
            targets(y)
        if shape is not None:
            check_shape(self.x_train, shape)
        if token_ids is not None:
            check_type(self.x_train, token_ids)


def check_shape(x: Inputs, shape: Shape) -> None:
    """Check samples [n, ...] against one sample's shape (names and None: any size); raises `DataError`."""
    if not fits_shape(x.shape[1:], shape):
        raise DataError(
            "shape of one sample",
            expected=shape_text(*shape) if free_axis(shape) is not None else shape,
            got=x.shape[1:],
            hint="Prepare the data as the model's input wants it (channels first).",
        )


def check_type(x: Inputs, token_ids: bool) -> None:
    """Check the samples' type against a model's input; raises `DataError`."""
    if (x.dtype.kind == "i") != token_ids:
        raise DataError(
            "type of inputs",
            expected="whole numbers (token ids)" if token_ids else "float32",
            got="int64, as which all whole numbers are read" if x.dtype.kind == "i" else x.dtype,
            hint="Save token ids as int64." if token_ids else _SCALE_HINT,
        )


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
        raise DataError(
            f"{kind}labels",
            expected="classes as whole numbers, or numbers, [n, ...]",
            got=f"{labels.dtype} {labels.shape}",
        )
    if isinstance(labels, StoredArray):
        first = 0
        for chunk in labels.chunks() if labels.dtype.kind == "f" and not labels.checked else ():
            _check_finite(chunk, f"{kind}labels", first)
            first += len(chunk)
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
    _check_finite(labels, f"{kind}labels", 0)
    return labels


def checked_inputs(inputs: Inputs, split: str = "") -> Inputs:
    """Inputs as float32 or int64; arguments and errors are those of `checked_samples`."""
    kind = f"{split} " if split else ""
    if inputs.dtype.kind != "f" and inputs.dtype not in (np.int32, np.int64):
        raise DataError(f"type of {kind}inputs", expected="float32", got=inputs.dtype, hint=_SCALE_HINT)
    if inputs.ndim < 2:
        raise DataError(f"{kind}inputs", expected="[n, ...]", got=inputs.shape)
    if not isinstance(inputs, StoredArray):
        inputs = np.ascontiguousarray(inputs, np.int64 if inputs.dtype.kind == "i" else np.float32)
        _check_numbers(inputs, kind, 0)
        return inputs
    if inputs.checked:
        return inputs
    first = 0
    for chunk in inputs.chunks():
        _check_numbers(chunk, kind, first)
        first += len(chunk)
    return replace(inputs, checked=True)


def _check_numbers(inputs: Array, kind: str, first: int) -> None:
    """Refuse negative token ids and numbers that are not finite; `first` is the number of the first sample."""
    if inputs.dtype.kind == "i":
        if inputs.size and int(inputs.min()) < 0:
            raise DataError(f"{kind}inputs hold a negative token id", expected="0 or more", got=int(inputs.min()))
    else:
        _check_finite(inputs, f"{kind}inputs", first)


def _check_finite(numbers: Array, what: str, first: int) -> None:
    if not np.isfinite(numbers).all():
        first_bad = int(np.flatnonzero(~np.isfinite(numbers.reshape(len(numbers), -1)).all(1))[0])
        problem = "a NaN" if np.isnan(numbers[first_bad]).any() else "an infinity"
        raise DataError(
            f"{what} hold numbers that are not finite",
            got=f"sample {first + first_bad}, which has {problem}",
            hint="Leave such samples out, or fill the gaps, as numpy.nan_to_num does.",
        )


def _common_type(array: Inputs) -> np.dtype[Any]:
    """An array's type; whole numbers of any width are one, as labels in memory keep their own."""
    return np.dtype(np.int64) if array.dtype.kind in "iu" else array.dtype


class SampleSource(Protocol):
    """A source whose samples may change: each round takes the samples that exist when it begins."""

    @property
    def samples(self) -> int:
        """Number of training samples now. The agent's loop reads it, so that it must not wait for a disk."""

    @property
    def effective_classes(self) -> int | None:
        """The labels' effective number of classes (`fedprune_device.data.labels.effective_classes`), without waiting;
        None if it isn't known, or samples have no class."""

    def snapshot(self, shape: Shape | None = None, targets: Targets | None = None) -> LocalData:
        """A round's samples; raises `DataError` if there are none.

        In `shape`, that of a model's input, names and None stand for any size. `targets` are the labels that its loss
        takes; without them, as for predictions, a source may leave the labels out.
        """
