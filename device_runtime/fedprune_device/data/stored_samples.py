"""Encodes samples for the sample store (`data.sample_store`), and reads stored samples as the arrays of a model.

A stored sample is a head (kind of numbers, number of dimensions, shape) and its numbers, little-endian.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import DataError, shape_text
from fedprune.model.input_type import InputType
from fedprune.model.lengths import Shape, fits_shape, free_axis, pad_to_bound, padded_type, upper_shape
from fedprune.planning.costs import MAX_SAMPLES_IN_MEMORY
from fedprune_device.data.dataset import LocalData
from fedprune_device.data.labels import Targets
from fedprune_device.data.spooled_arrays import gather_chunks
from fedprune_device.data.stored_array import Array, OpenFiles, StoredArray

# The types of samples in files, by the first byte of a stored sample. Other whole numbers are stored as int64.
_TYPES = ("<f4", "<i8", "|u1", "|i1", "<i2", "|b1")
_MAX_RANK = 8  # the most dimensions of a sample


@dataclass(frozen=True, eq=False)
class StoredSample:
    """A sample on the disk.

    Attributes:
        outline: An array of the sample's type and shape, which takes no memory (see `sample_outline`).
        position: Where its numbers begin: bytes, plus `FILE_STRIDE` times the index of the file.
    """

    name: str
    label: int
    outline: Array
    position: int


def encode_sample(x: Array) -> bytes:
    """Type, shape and numbers of a sample as bytes; equal samples have equal bytes. Raises `DataError` if invalid."""
    if (x.dtype != np.float32 and x.dtype.kind not in "iub") or not 1 <= x.ndim <= _MAX_RANK:
        kind = f"{x.dtype} {shape_text(*x.shape)}"
        raise DataError("a sample", expected="float32 or whole numbers of 1 to 8 dimensions", got=kind)
    if x.dtype == np.float32 and not np.isfinite(x).all():
        raise DataError("a sample holds numbers that are not finite")
    kind = x.dtype.newbyteorder("<").str
    code = _TYPES.index(kind if kind in _TYPES else "<i8")
    if code == _TYPES.index("<i8"):
        InputType(np.dtype(np.int64)).check_range(x)
    return struct.pack(f"<BB{x.ndim}I", code, x.ndim, *x.shape) + x.astype(_TYPES[code]).tobytes()


def sample_outline(payload: bytes) -> Array:
    """An array of a sample's type and shape that takes no memory; its numbers are the last bytes of the payload."""
    rank = payload[1]
    return np.broadcast_to(np.zeros((), _TYPES[payload[0]]), struct.unpack_from(f"<{rank}I", payload, 2))


def select_one_kind(samples: list[StoredSample], shape: Shape | None) -> list[StoredSample]:
    """The samples that a model of this input shape can train on together: those of the most frequent type and shape.

    If the length of samples may vary, all shapes that fit the model count as one.
    """
    samples = [sample for sample in samples if shape is None or fits_shape(sample.outline.shape, shape)]
    varies = shape is not None and free_axis(shape) is not None

    def kind(x: Array) -> tuple[str, tuple[int, ...]]:
        return x.dtype.str, () if varies else x.shape

    kinds = Counter(kind(sample.outline) for sample in samples)
    if not kinds:
        return []
    # Sorted, so that of two equally frequent kinds it is always the same one.
    frequent_kind = max(sorted(kinds, key=repr), key=lambda k: kinds[k])
    return [sample for sample in samples if kind(sample.outline) == frequent_kind]


def reproduces_inputs(targets: Targets, shape: Shape) -> bool:
    """Whether a model is trained to reproduce its inputs, so that its samples need no labels."""
    return not targets.takes_whole_numbers and tuple(targets.shape) == tuple(shape)


def local_data(
    samples_by_split: Sequence[Sequence[StoredSample]],
    files: OpenFiles,
    shape: Shape | None,
    *,
    inputs_are_labels: bool,
    spool: Path,
) -> LocalData:
    """Samples of one kind for training, testing and validation; a model may reproduce its inputs instead of labels.

    Large samples stay in `files`. Samples of different lengths are padded, in a file in `spool` if they are large.
    """
    example = samples_by_split[0][0].outline
    fits_memory = example.size * 4 * sum(map(len, samples_by_split)) <= MAX_SAMPLES_IN_MEMORY
    arrays: list[Any] = []
    for samples in samples_by_split:
        positions = np.array([sample.position for sample in samples], np.int64)
        labels = np.array([sample.label for sample in samples], np.int64)
        if shape is not None and free_axis(shape) is not None:
            padded_shape = tuple(int(size) for size in upper_shape(shape) if isinstance(size, int))
            raw = (_stored_array(files, sample.outline, positions[n : n + 1]) for n, sample in enumerate(samples))
            rows = (pad_to_bound(array[:], shape) for array in raw)
            arrays += [gather_chunks(rows, (len(samples), *padded_shape), padded_type(example.dtype), spool), labels]
        else:
            stored = _stored_array(files, example, positions)
            inputs = stored[:] if fits_memory else stored
            arrays += [inputs, inputs if inputs_are_labels else labels]
    return LocalData(*arrays)


def _stored_array(files: OpenFiles, outline: Array, positions: npt.NDArray[np.int64]) -> StoredArray:
    return StoredArray.at_positions(files, positions, outline.dtype, outline.shape)
