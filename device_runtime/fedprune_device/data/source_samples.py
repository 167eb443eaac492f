"""Makes a board's samples of a source of one's own (`data_source.DataSource`): splits, checks and spools them."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from fedprune.core.errors import DataError, shape_text
from fedprune.model.input_type import FLOATS, InputType
from fedprune.model.lengths import Shape
from fedprune_device.data.array_assembly import assemble
from fedprune_device.data.data_source import LABELS, ArrayType, DataSource, Schema
from fedprune_device.data.dataset import SPLITS, LocalData, ReadSource
from fedprune_device.data.labels import Targets
from fedprune_device.data.splits import SplitShares
from fedprune_device.data.spooled_arrays import ArrayWriter
from fedprune_device.data.stored_array import Array, Inputs, Rows

_CHUNK_BYTES = 2**20  # bytes of samples that are read at once
MAX_SAMPLES = 2**31  # of a source: a length beyond it is nonsense


class SourceSamples(ReadSource):
    """A board's samples as a `DataSource` has them; each round reads those that exist when it begins.

    A sample's index decides whether it is for training, testing or validation. A round takes at most `max_samples`
    samples, evenly over all. Large arrays are written to a file without a name in `spool`. Raises `DataError` if the
    source fails, or its arrays aren't what its schema says.
    """

    def __init__(
        self,
        source: DataSource,
        name: str,
        shares: SplitShares,
        max_samples: int,
        class_names: tuple[str, ...] = (),
        spool: Path | None = None,
    ) -> None:
        super().__init__(name)
        self._source, self._name, self._shares, self._max_samples = source, name, shares, max_samples
        self._spool = spool
        self.schema = _checked_schema(_call(name, "schema", source.schema), name)
        self._labels_of_classes = _labels_of_classes(self.schema.class_names, class_names, name)
        self._training_count = len(self._choose()["train"])

    def snapshot(
        self, shape: Shape | None = None, targets: Targets | None = None, input_type: InputType = FLOATS
    ) -> LocalData:
        """The samples that exist now."""
        chosen = self._choose()
        arrays: dict[str, Inputs] = {}
        for split in SPLITS:
            arrays |= {f"{name}_{split}": array for name, array in self._read(chosen[split]).items()}
        try:
            data = assemble(arrays, self._spool)
            self._training_count = data.samples
            return data.snapshot(shape, targets, input_type)
        except DataError as error:
            raise DataError(f"{self._name}: {error}") from error

    def _choose(self) -> dict[str, Rows]:
        """The indices of the samples of each split."""
        count = _call(self._name, "__len__", self._source.__len__)
        if not isinstance(count, int) or not 0 <= count < MAX_SAMPLES:
            raise DataError(f"{self._name}.__len__", expected="the number of samples", got=type(count).__name__)
        chosen = np.arange(0, count, max(1, -(-count // self._max_samples)), dtype=np.int64)
        self._notes.replace(
            [f"of {count} samples {len(chosen)} are used (--samples-most)"] if len(chosen) < count else []
        )
        splits = np.array([self._shares.split_of(str(index)) for index in chosen.tolist()], "U5")
        return {split: chosen[splits == split] for split in SPLITS}

    def _read(self, indices: Rows) -> dict[str, Inputs]:
        """The arrays of some samples. Each is read once: a source may have changed at a second time."""
        kinds = self.schema.arrays
        writers = {
            name: ArrayWriter((len(indices), *kind.shape), np.dtype(kind.dtype), self._spool)
            for name, kind in kinds.items()
        }
        bytes_each = sum(np.dtype(kind.dtype).itemsize * prod(kind.shape) for kind in kinds.values())
        step = max(1, _CHUNK_BYTES // bytes_each)
        for first in range(0, len(indices), step):
            rows = indices[first : first + step]
            returned = _call(self._name, "read", self._source.read, rows)
            for name, writer in writers.items():
                writer.append(self._check(name, kinds[name], rows, returned))
        return {name: writer.array() for name, writer in writers.items()}

    def _check(self, name: str, kind: ArrayType, rows: Rows, returned: Any) -> Array:
        """An array that `read` returned, in the type of the schema."""
        what = f"{self._name}.read"
        if not isinstance(returned, Mapping) or name not in returned:
            got = ", ".join(map(str, returned)) if isinstance(returned, Mapping) else type(returned).__name__
            raise DataError(what, expected=f"a dict with {', '.join(self.schema.arrays)}", got=got or "nothing")
        array, dtype = np.asarray(returned[name]), np.dtype(kind.dtype)
        if array.shape != (len(rows), *kind.shape) or not np.can_cast(array.dtype, dtype, "same_kind"):
            raise DataError(
                f"array {name!r} of {what}",
                expected=f"{dtype} {shape_text(len(rows), *kind.shape)}, as the schema says",
                got=f"{array.dtype} {shape_text(*array.shape)}",
            )
        if name != LABELS or self._labels_of_classes is None:
            return array.astype(dtype, copy=False)
        if len(array) and not 0 <= int(array.min()) <= int(array.max()) < len(self._labels_of_classes):
            raise DataError(
                f"a label of {what}",
                expected=f"0 to {len(self._labels_of_classes) - 1}, as the schema names",
                got="another",
            )
        return np.asarray(self._labels_of_classes[array])


def _call(name: str, method: str, function: Any, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except DataError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise DataError(f"{name}.{method} failed ({type(error).__name__}: {error})") from error


def _checked_schema(schema: object, name: str) -> Schema:
    what = f"{name}.schema"
    if not isinstance(schema, Schema):
        raise DataError(what, expected="a fedprune_device.Schema", got=type(schema).__name__)
    inputs = [array for array in schema.arrays if array not in (LABELS, "lengths")]
    if not inputs or any(array.partition("_")[0] in ("x", LABELS) for array in inputs if array != "x"):
        raise DataError(
            f"names of {what}",
            expected="x, or the name of each input (not x_... or y_...), and y for labels",
            got=", ".join(schema.arrays) or "none",
        )
    for array, kind in schema.arrays.items():
        try:
            is_number = np.dtype(kind.dtype).kind in "fiub"
        except TypeError:
            is_number = False
        if not is_number or not all(isinstance(size, int) and size > 0 for size in kind.shape):
            expected = "a type of numbers such as float32 or int64, and the sizes of one sample"
            raise DataError(f"array {array!r} of {what}", expected=expected, got=f"{kind.dtype} {list(kind.shape)}")
    return schema


def _labels_of_classes(own: tuple[str, ...], fleet: tuple[str, ...], name: str) -> Array | None:
    """The fleet's label for each of a source's own classes; None if labels stay as they are."""
    if not own or not fleet or own == fleet:
        return None
    if missing := [one for one in own if one not in fleet]:
        raise DataError(f"classes of {name}", expected=", ".join(fleet), got=missing[0])
    return np.array([fleet.index(one) for one in own], np.int64)
