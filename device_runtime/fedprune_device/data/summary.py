"""Summarises a board's samples: how many there are, their ranges and labels, and what a model can't learn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import shape_text
from fedprune.core.text import first_few, quantity
from fedprune.model.features import MULTI_LABELS, labels_of
from fedprune.model.lengths import padding_value
from fedprune_device.data.box_layouts import takes_boxes
from fedprune_device.data.column_statistics import ColumnStatistics
from fedprune_device.data.dataset import SPLITS, Channels, LocalData
from fedprune_device.data.image_decoding import has_colours_last
from fedprune_device.data.labels import Targets, class_counts
from fedprune_device.data.stored_array import Inputs, chunks

# A row of numbers, such as that of a table, has a range for each up to this length; longer ones are a signal.
_MAX_COLUMNS = 64

_PIXEL_RANGE = (1.5, 255.0)  # the highest number of images that nobody has scaled

# Numbers that are further from 0 make a step of the usual learning rates overshoot.
_MAX_MAGNITUDE = 100.0


_NO_TEST_NOTE = (
    "no samples are for testing: nobody sees how good this model is. Add samples (a table needs rows for seven windows "
    "end to end) or raise --test-share"
)


@dataclass(frozen=True)
class ChannelRange:
    """The numbers of one channel, over all training samples, without padding. It is called as the table's column, or by
    its number from 0."""

    name: str
    lowest: float
    highest: float
    mean: float
    deviation: float
    is_whole: bool


@dataclass(frozen=True)
class DataSummary:
    """What a board would train on.

    Attributes:
        samples: The number of samples by split.
        inputs: Type and shape of one sample.
        channels: Ranges of the inputs.
        classes: By the name of each class and split, the number of samples, pixels or boxes; None for numbers.
        values: Ranges of labels that are numbers.
    """

    samples: Mapping[str, int]
    inputs: str
    channels: tuple[ChannelRange, ...]
    classes: Mapping[str, Mapping[str, int]] | None
    values: tuple[ChannelRange, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarise(data: LocalData, targets: Targets, class_names: Sequence[str]) -> DataSummary:
    """Summarise the samples of a model with these labels. Everything is read once, in chunks."""
    splits = {split: (getattr(data, f"x_{split}"), getattr(data, f"y_{split}")) for split in SPLITS}
    counts = {} if data.is_unlabelled else {s: _class_counts(y, targets) for s, (_, y) in splits.items() if len(y)}
    classes: dict[str, dict[str, int]] | None = None
    if counts and all(each is not None for each in counts.values()):
        length = max(len(each) for each in counts.values() if each is not None)
        classes = {
            class_names[i] if i < len(class_names) else str(i): {
                s: int(each[i]) if each is not None and i < len(each) else 0 for s, each in counts.items()
            }
            for i in range(length)
        }
    x, y = splits["train"]
    channels = data.channels or Channels(())
    return DataSummary(
        {split: len(labels) for split, (_, labels) in splits.items()},
        f"{x.dtype} {shape_text(*x.shape[1:])}",
        channel_ranges(x, channels.inputs, channels.input_axis),
        classes,
        channel_ranges(y[:, None] if y.ndim == 1 else y, channels.outputs, channels.output_axis)
        if classes is None and not data.is_unlabelled
        else (),
    )


def channel_axis(shape: Sequence[int], names: Sequence[str] = (), axis: int = 0) -> int | None:
    """The axis of a sample's channels: that of a table's columns (`names`, along `axis`), the first of images, the
    shorter one of a series; None for one signal."""
    if names:
        return axis if shape[axis] == len(names) else None  # a single column may have no axis
    if len(shape) >= 3:
        return 0
    if len(shape) == 2:
        return int(shape[1] < shape[0])
    return 0 if shape and shape[0] <= _MAX_COLUMNS else None


def channel_ranges(x: Inputs, names: Sequence[str] = (), axis: int = 0) -> tuple[ChannelRange, ...]:
    """The range of each channel of samples [n, ...]; those of a table's columns have `names` and are along `axis`."""
    is_picture = x.dtype == np.uint8 and x.ndim == 4 and has_colours_last(x.shape[1:])
    sample_axis = 2 if is_picture else channel_axis(x.shape[1:], names, axis)
    channels = 1 if sample_axis is None else x.shape[sample_axis + 1]
    low, high = np.full(channels, np.inf), np.full(channels, -np.inf)
    statistics, is_whole = ColumnStatistics(channels), np.ones(channels, bool)
    for chunk in (chunk for chunk in chunks(x) if chunk.size):
        rows = (chunk if sample_axis is None else np.moveaxis(chunk, sample_axis + 1, -1)).reshape(-1, channels)
        rows = np.where(rows == padding_value(rows.dtype), np.nan, rows.astype(np.float64))
        statistics.add(rows)
        low, high = np.fmin(low, np.fmin.reduce(rows)), np.fmax(high, np.fmax.reduce(rows))
        is_whole &= (np.isnan(rows) | (rows % 1 == 0)).all(0)
    if not statistics.counts.any():
        return ()
    ranges = zip(low, high, statistics.mean, statistics.deviation, is_whole, strict=True)
    return tuple(
        ChannelRange(names[i] if names else str(i), float(a), float(b), float(m), float(d), bool(w))
        for i, (a, b, m, d, w) in enumerate(ranges)
    )


def _class_counts(y: Inputs, targets: Targets) -> npt.NDArray[np.int64] | None:
    if labels_of(targets.loss) == "classes":
        return class_counts(y, targets.classes, targets.ignored)
    if takes_boxes(targets):
        boxes = np.concatenate([chunk[:, :, 0].reshape(-1) for chunk in chunks(y)])
        return np.bincount(boxes[boxes >= 0].astype(np.int64), minlength=1)
    if labels_of(targets.loss) == MULTI_LABELS and y.ndim > 1:
        axes = (0, *range(2, y.ndim))
        return np.asarray(sum(np.count_nonzero(chunk > 0.5, axis=axes) for chunk in chunks(y)), np.int64)
    return None


def find_problems(summary: DataSummary, *, is_scaled: bool = False) -> list[str]:
    """What a model hardly learns from, although it can be trained on: a sentence for each. `is_scaled`: boards scale
    the inputs before they train."""
    problems = []
    ranges = summary.channels
    if summary.inputs.startswith("float") and ranges:
        low, high = min(c.lowest for c in ranges), max(c.highest for c in ranges)
        if not is_scaled and low >= 0 and _PIXEL_RANGE[0] < high <= _PIXEL_RANGE[1] and all(c.is_whole for c in ranges):
            problems.append(
                f"the inputs are whole numbers from {low:g} to {high:g}, as of pixels that nobody has scaled: divide "
                "them by 255, unless the model does it itself"
            )
        elif wide := [c for c in ranges if not is_scaled and max(-c.lowest, c.highest) > _MAX_MAGNITUDE]:
            c = wide[0]
            problems.append(
                f"channel {c.name} has numbers from {c.lowest:g} to {c.highest:g}{_others_text(wide)}: scale them to "
                "mean 0 and deviation 1, with the same two numbers on all boards, as the recipe's `scaling` does"
            )
        if constant := [c for c in ranges if c.lowest == c.highest]:
            problems.append(
                f"channel {constant[0].name} has the number {constant[0].lowest:g} in all "
                f"samples{_others_text(constant)}: it tells the model nothing"
            )
    if summary.classes is not None and len(summary.classes) > 1:
        present = [name for name, counts in summary.classes.items() if counts.get("train")]
        if len(present) < 2:
            problems.append(f"all training samples are of one class: {''.join(present) or 'none'}")
    return problems


def find_notes(summary: DataSummary) -> list[str]:
    """What is usual on some boards of a fleet, and worth knowing: a sentence for each."""
    notes = [] if summary.samples["test"] else [_NO_TEST_NOTE]
    absent = [name for name, counts in (summary.classes or {}).items() if not counts.get("train")]
    if absent and summary.classes is not None and len(absent) < len(summary.classes) - 1:
        notes.append(f"no training samples are of: {first_few(absent)}")
    return notes


def _others_text(ranges: Sequence[ChannelRange]) -> str:
    return f" (and {quantity(len(ranges) - 1, 'other')} like it)" if len(ranges) > 1 else ""
