"""Holds a board's own samples: those for training, for tests and for validation.

They never leave the board. Its server learns only how many there are, and how evenly their labels are spread.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from fedprune.core.errors import DataError, shape_text
from fedprune.core.rng import keyed_generator
from fedprune.model.input_type import FLOATS, InputType
from fedprune.model.lengths import Shape, fits_shape, free_axis
from fedprune_device.data.data_source import LABELS, ArrayType, Schema
from fedprune_device.data.labels import Targets
from fedprune_device.data.sample_checks import check_shape, check_type, checked_samples, common_type
from fedprune_device.data.sequences import PaddedRows, pad_labels, pad_samples
from fedprune_device.data.spooled_arrays import spool_large
from fedprune_device.data.stored_array import Array, Inputs, Rows, select_pairs, type_text

SPLITS = ("train", "test", "val")  # the suffixes of the arrays in a file, and in `LocalData`
_NO_SAMPLES = np.zeros((0, 0), np.float32)


_LOG = logging.getLogger("fedprune.device")


@dataclass(frozen=True)
class Channels:
    """The names of a table's columns in samples, and the axis of one sample along which they are.

    `outputs` are those of numbers to predict; empty without any. A single column has no axis of its own.
    """

    inputs: tuple[str, ...]
    input_axis: int = 0
    outputs: tuple[str, ...] = ()
    output_axis: int = 0


@dataclass(frozen=True, eq=False)
class LocalData:
    """Training, test and validation samples of one device.

    Attributes:
        x_train: Inputs [n, ...]: float32, or whole numbers; large ones may be stored on the disk.
        y_train: Their labels. Classes are whole numbers: one per sample [n], or one per position, such as a pixel
            [n, ...]. Other labels are float32 [n] or [n, ...]: 0 or 1 per class, or numbers to predict. Samples
            without labels have their inputs as labels: then this is the same object as `x_train`.
        x_test: Inputs that are never trained on; may be empty. Their results are reported, and decide nothing.
        x_val: Inputs that are never trained on; training and fleet decide by their results. May be empty.
        channels: The columns of a table that the samples are made of; None for arrays that name none.
        rows: How samples of different lengths are packed, if each input is a row of numbers with its length.
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
    channels: Channels | None = field(default=None, kw_only=True)
    spool: Path | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for split in SPLITS:
            x, y = self._samples_of(split)
            if split == "val" and not len(y) and not len(x):
                x, y = self.x_train[:0], self.y_train[:0]
            else:
                x, y = checked_samples(x, y, split)
            # Nobody else may set the fields of a frozen class.
            object.__setattr__(self, f"x_{split}", x)
            object.__setattr__(self, f"y_{split}", y)
        if not len(self.y_train):
            raise DataError("training data is empty", expected="at least one sample", got=0)
        for split in SPLITS[1:]:
            x, y = self._samples_of(split)
            if len(y) and x.shape[1:] != self.x_train.shape[1:]:
                raise DataError(f"shape of one {split} sample", expected=self.x_train.shape[1:], got=x.shape[1:])
            for trained, held_out, what in ((self.x_train, x, "inputs"), (self.y_train, y, "labels")):
                same = (common_type(trained), trained.shape[1:]) == (common_type(held_out), held_out.shape[1:])
                if len(y) and not same:
                    raise DataError(f"type of {split} {what}", expected=type_text(trained), got=type_text(held_out))

    def schema(self) -> Schema:
        """The types of the training samples `x` and of their labels `y`; without labels only the former."""
        arrays = {"x": self.x_train} | ({} if self.is_unlabelled else {LABELS: self.y_train})
        return Schema({name: ArrayType(array.shape[1:], str(array.dtype)) for name, array in arrays.items()})

    def __len__(self) -> int:
        """Number of training samples."""
        return self.samples

    def read(self, indices: Rows) -> dict[str, Array]:
        """Training samples and labels by the names of `schema`: with these methods the samples of every source, as a
        model takes them, are a `DataSource`. Raises `DataError` if a file has changed."""
        x = self.x_train[indices]
        return {"x": x} if self.is_unlabelled else {"x": x, LABELS: self.y_train[indices]}

    def _samples_of(self, split: str) -> tuple[Inputs, Inputs]:
        return getattr(self, f"x_{split}"), getattr(self, f"y_{split}")

    @property
    def samples(self) -> int:
        return len(self.y_train)

    def snapshot(
        self, shape: Shape | None = None, targets: Targets | None = None, input_type: InputType = FLOATS
    ) -> LocalData:
        """The samples as a model of this input shape takes them: padded to the upper bound if their length varies.

        For other models this object, which never changes.
        """
        if shape is None or free_axis(shape) is None:
            return self
        arrays: list[Inputs] = []
        for split in SPLITS:
            x, y = self._samples_of(split)
            padded = pad_samples(x, self.rows, shape) if len(x) else _NO_SAMPLES
            arrays += [padded, padded if y is x else pad_labels(y, padded, shape, targets, self.spool)]
        return LocalData(*arrays, channels=self.channels)

    @property
    def notes(self) -> tuple[str, ...]:
        """See `SampleSource`: arrays are read in one way."""
        return ()

    @property
    def is_unlabelled(self) -> bool:
        """Whether the samples have no labels: a model is trained to reproduce its inputs."""
        return self.y_train is self.x_train

    @property
    def memory_bytes(self) -> int:
        """Memory that all samples and labels take."""
        counted = 1 if self.is_unlabelled else 2  # without labels both are one array
        return sum(array.nbytes for split in SPLITS for array in self._samples_of(split)[:counted])

    def with_validation(self, share: float, seed: int = 0, device: str = "") -> LocalData:
        """These samples with a share of the training samples (below 1) as validation samples, unless there are some.

        Seed and device name decide which samples are taken.
        """
        if not 0 <= share < 1:
            raise DataError("share of the training samples for validation", expected="0 to below 1", got=share)
        count = int(self.samples * share)
        if not count or len(self.y_val):
            return self
        order = keyed_generator(seed, "validation", device).permutation(self.samples)
        train, val = (select_pairs(self.x_train, self.y_train, np.sort(i)) for i in (order[count:], order[:count]))
        return LocalData(
            *train, self.x_test, self.y_test, *val, rows=self.rows, channels=self.channels, spool=self.spool
        )

    def with_spooled_arrays(self, spool: Path) -> LocalData:
        """These samples with large arrays in temporary files in `spool`, which are deleted with this process."""
        arrays: list[Inputs] = []
        for split in SPLITS:
            x, y = self._samples_of(split)
            spooled = spool_large(x, spool)
            arrays += [spooled, spooled if self.is_unlabelled else spool_large(y, spool)]
        return LocalData(*arrays, rows=self.rows, channels=self.channels, spool=spool)

    def check(self, targets: Targets, shape: Shape | None = None, *, input_type: InputType | None = None) -> None:
        """Check labels and inputs against a model; raises `DataError`. In `shape`, names and None are any size."""
        can_reproduce = (
            free_axis(shape or ()) is None
            and targets.loss != "cross_entropy"
            and targets.takes_whole_numbers == (self.x_train.dtype.kind != "f")
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
        # Inputs first: labels mean nothing to a model that the samples aren't for.
        if shape is not None:
            check_shape(self.x_train, shape)
        if input_type is not None:
            for x in filter(len, (self.x_train, self.x_test, self.x_val)):
                check_type(x, input_type)
        for y in filter(len, (self.y_train, self.y_test, self.y_val)):
            targets(y)


class SampleSource(Protocol):
    """A source whose samples may change: each round takes the samples that exist when it begins."""

    @property
    def samples(self) -> int:
        """Number of training samples now. The agent's loop reads it, so that it must not wait for a disk."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was chosen where the samples can be read in several ways: a sentence each, without any of their numbers.
        Complete after a snapshot. The board's log has each of them once."""

    def snapshot(
        self, shape: Shape | None = None, targets: Targets | None = None, input_type: InputType = FLOATS
    ) -> LocalData:
        """A round's samples; raises `DataError` if there are none.

        In `shape`, that of a model's input, names and None stand for any size. `targets` are the labels that its loss
        takes; without them, as for predictions, a source may leave the labels out. For a model that takes whole
        numbers (`input_type`), pictures are their pixels.
        """


class ReadSource:
    """What the sources that read files or a user's class say of themselves (`SampleSource`): of the last round, and
    before the first one of what there is to read."""

    def __init__(self, origin: object) -> None:
        self._training_count = 0
        self._notes = Notes(origin)

    @property
    def samples(self) -> int:
        return self._training_count

    @property
    def notes(self) -> tuple[str, ...]:
        return self._notes.texts


class Notes:
    """Sentences about a source, such as what it chose where its samples can be read in several ways, without any of its
    numbers or names. Each is logged when it is new."""

    def __init__(self, source: object) -> None:
        self._source = source
        self.texts: tuple[str, ...] = ()
        self._warnings: tuple[str, ...] = ()

    def replace(self, texts: Iterable[str], warnings: Iterable[str] = ()) -> None:
        """State what holds now, in place of all earlier notes. Warnings are problems of the samples, and no notes."""
        old_warnings, self._warnings = self._warnings, tuple(warnings)
        for text in self._warnings:
            if text not in old_warnings:
                _LOG.warning("%s: %s", self._source, text)
        old, self.texts = self.texts, tuple(texts)
        for text in self.texts:
            if text not in old:
                _LOG.info("%s: %s", self._source, text)
