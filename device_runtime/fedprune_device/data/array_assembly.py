"""Makes a board's samples of arrays by name: joins several inputs, packs lengths, and splits where no array does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fedprune.core.errors import DataError, shape_text
from fedprune.core.metrics import TEST_SHARE
from fedprune.core.rng import keyed_generator
from fedprune_device.data.dataset import SPLITS, Channels, LocalData
from fedprune_device.data.sample_checks import checked_samples
from fedprune_device.data.sequences import LENGTHS, PaddedRows, describe_rows
from fedprune_device.data.spooled_arrays import join_arrays
from fedprune_device.data.stored_array import Inputs, as_inputs, select_pairs, type_text

# Arrays of texts that name the columns of a table of which x and y were made.
_COLUMNS, _TARGET_COLUMNS = "columns", "target_columns"


def name_arrays(data: LocalData) -> dict[str, Any]:
    """The names of a table's columns as arrays, for a file of its samples: texts [C], [C, 1] or [1, C], which lie along
    the axis of a sample along which the columns are. Empty for samples without names."""
    if data.channels is None:
        return {}
    named = (
        (_COLUMNS, data.channels.inputs, data.channels.input_axis, data.x_train),
        (_TARGET_COLUMNS, data.channels.outputs, data.channels.output_axis, data.y_train),
    )
    return {
        key: np.array(names).reshape([-1 if i == axis else 1 for i in range(max(1, array.ndim - 1))])
        for key, names, axis, array in named
        if names
    }


def read_channels(arrays: dict[str, Any], x: Inputs, y: Inputs | None = None) -> Channels | None:
    """The names that `name_arrays` has written beside inputs and labels; None without any. Raises `DataError` if they
    are not as many as the samples have columns."""
    found: list[tuple[tuple[str, ...], int]] = []
    for key, samples in ((_COLUMNS, x), (_TARGET_COLUMNS, y)):
        if samples is None or key not in arrays or as_inputs(arrays[key]).dtype.kind != "U":
            found.append(((), 0))
            continue
        names, shape = np.asarray(arrays[key]), samples.shape[1:] or (1,)
        fits = [m in (1, n) for m, n in zip(names.shape, shape, strict=False)]
        if len(names.shape) != len(shape) or not all(fits) or names.size != max(names.shape):
            expected = f"names that lie along one axis of a sample, {shape_text(*shape)}"
            raise DataError(f"array {key!r}", expected=expected, got=shape_text(*names.shape))
        found.append((tuple(name.lower() for name in names.flat), int(np.argmax(names.shape))))
    (inputs, input_axis), (outputs, output_axis) = found
    return Channels(inputs, input_axis, outputs, output_axis) if inputs else None


def as_mapping(returned: object) -> dict[str, Any]:
    """Arrays by name. Raises `DataError` if it isn't a mapping, or a tuple of 2 or 4 arrays."""
    if isinstance(returned, (tuple, list)):
        names = {2: ("x", "y"), 4: ("x_train", "y_train", "x_test", "y_test")}.get(len(returned))
        if names is None:
            raise DataError("data", expected="2 or 4 arrays", got=len(returned))
        returned = dict(zip(names, returned, strict=True))
    if not isinstance(returned, dict):
        expected = "a source with schema, __len__ and read, arrays by name, or LocalData"
        raise DataError("data", expected=expected, got=type(returned).__name__)
    return returned


def pack_inputs(arrays: dict[str, Any], spool: Path | None) -> tuple[dict[str, Any], PaddedRows | None]:
    """Join the arrays of several inputs into one, in the alphabetical order of their names, as models take them.

    A row of padded samples has a sample's numbers and then its length; the second value describes such rows, and is
    None without lengths. Large arrays are written to a file in `spool`, or held in memory without one. Raises
    `DataError` if they don't belong together.
    """
    if any(name.partition("_")[0] == "x" for name in arrays):
        return _pack_lengths(arrays, spool)
    splits: dict[str, dict[str, Inputs]] = {}
    for name, array in arrays.items():
        stem, _, ending = name.rpartition("_")
        input_name, split = (stem, f"_{ending}") if stem and ending in SPLITS else (name, "")
        if input_name != "y":
            splits.setdefault(split, {})[input_name] = as_inputs(array)
    names = sorted(set().union(*splits.values()))
    if len(names) < 2:
        return arrays, None
    packed = {name: array for name, array in arrays.items() if name.partition("_")[0] == "y"}
    for split, members in splits.items():
        if sorted(members) != names or len({len(a) if a.ndim else -1 for a in members.values()}) > 1:
            raise DataError(
                f"arrays of several inputs{split and f' ({split[1:]})'}",
                expected=f"{', '.join(names)}, each with as many samples",
                got=", ".join(f"{n} {type_text(a)} of {len(a)}" if a.ndim else f"{n} []" for n, a in members.items()),
            )
        # uint8 isn't a type of token ids: models read images of whole numbers as float32.
        are_whole = all(a.dtype.kind in "iu" and a.dtype != np.uint8 for a in members.values())
        dtype = np.dtype(np.int64 if are_whole else np.float32)
        packed[f"x{split}"] = join_arrays([members[name] for name in names], dtype, spool)
    return packed, None


def _pack_lengths(arrays: dict[str, Any], spool: Path | None) -> tuple[dict[str, Any], PaddedRows | None]:
    splits = [name.removeprefix("x") for name in arrays if name.partition("_")[0] == "x"]
    length_names = [name for name in arrays if name.partition("_")[0] == LENGTHS]
    if not length_names:
        return arrays, None
    if sorted(length_names) != sorted(f"{LENGTHS}{split}" for split in splits):
        expected = ", ".join(f"{LENGTHS}{split}" for split in splits)
        raise DataError("arrays of lengths", expected=expected, got=", ".join(length_names))
    pairs = [(as_inputs(arrays[f"x{split}"]), as_inputs(arrays[f"{LENGTHS}{split}"])) for split in splits]
    rows = describe_rows(pairs)
    packed = {name: array for name, array in arrays.items() if name not in length_names}
    for split, (x, lengths) in zip(splits, pairs, strict=True):
        are_whole = x.dtype in (np.int32, np.int64)
        packed[f"x{split}"] = join_arrays([x, lengths], np.dtype(np.int64 if are_whole else np.float32), spool)
    return packed, rows


def assemble(content: object, spool: Path | None, seed: int = 0, device: str = "") -> LocalData:
    """Checked samples from arrays by name, or in a tuple (`array_source.load_data`); raises `DataError`.

    Seed and device decide the split where no array has test samples. Joined arrays are written to `spool` if large.
    """
    arrays, rows = as_mapping(content), None
    if arrays.keys() & {"y", "y_train"} or any(name.partition("_")[0] == LENGTHS for name in arrays):
        arrays, rows = pack_inputs(arrays, spool)
    suffix = "_train" if "x_train" in arrays else ""
    x: Inputs
    y: Inputs
    try:
        x = as_inputs(arrays[f"x{suffix}"])
        y = as_inputs(arrays[f"y{suffix}"]) if arrays.keys() & {"y", "y_train", "y_test", "y_val"} else x
    except KeyError as error:
        raise DataError(
            f"array {error.args[0]!r} is missing",
            expected="x and y (or x_train and y_train)",
            got=", ".join(map(str, arrays)) or "nothing",
        ) from error
    for split in () if y is x else ("test", "val"):
        if (f"x_{split}" in arrays) != (f"y_{split}" in arrays):
            raise DataError(f"{split} data", expected=f"both x_{split} and y_{split}, or neither")

    def pair(split: str) -> tuple[Inputs, Inputs]:
        inputs = as_inputs(arrays[f"x_{split}"])
        return inputs, inputs if y is x else as_inputs(arrays[f"y_{split}"])

    channels = read_channels(arrays, x, y)
    validation: Any = pair("val") if "x_val" in arrays else ()
    if "x_test" in arrays:
        return LocalData(x, y, *pair("test"), *validation, rows=rows, channels=channels)
    x, y = checked_samples(x, y, "")  # before the split, so that an error names the sample by its index in the source
    order = keyed_generator(seed, "split", device).permutation(len(y))
    test_count = int(len(y) * TEST_SHARE)
    train, test = (select_pairs(x, y, np.sort(i)) for i in (order[test_count:], order[:test_count]))
    return LocalData(*train, *test, *validation, rows=rows, channels=channels)
