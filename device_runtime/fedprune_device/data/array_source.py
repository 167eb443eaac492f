"""Reads samples from arrays: an `.npz` file, or the arrays that a function returns."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np

from fedprune.core.disk import path_exists
from fedprune.core.errors import DataError, StorageError, path_remedy
from fedprune.core.imports import import_user_module
from fedprune.core.rng import keyed_generator
from fedprune.core.zip_limits import check_members, unreadable_reason
from fedprune.model.lengths import Shape
from fedprune_device.data.dataset import SPLITS, LocalData
from fedprune_device.data.sample_checks import check_shape, check_type, checked_inputs, checked_samples
from fedprune_device.data.sequences import LENGTHS, PaddedRows, describe_rows, pad_samples
from fedprune_device.data.splits import TEST_SHARE
from fedprune_device.data.stored_array import (
    Inputs,
    StoredArray,
    archive_array,
    as_inputs,
    join_arrays,
    select_pairs,
    type_text,
)


def load_data(
    source: str, seed: int = 0, device: str = "", validation_share: float = 0.0, *, spool: Path | None = None
) -> LocalData:
    """Read a device's data; large arrays of an `.npz` file stay in the file and are read as batches are drawn.

    Raises `DataError` if the source can't be read or doesn't hold usable samples; the message names it.

    Args:
        source: An `.npz` file, or `package.module:function`. The file has `x` and `y` (or `x_train` and `y_train`) and
            may have `x_test`, `y_test`, `x_val`, `y_val`; without any `y...` samples have no labels. For a model of
            several inputs it has an array under the name of each in place of `x`. If samples are padded, it has
            `lengths` (`lengths_train` ...). The function may take `device` and `seed`, and returns a `LocalData`, a
            mapping with a file's names, (x, y) or (x_train, y_train, x_test, y_test).
        seed: Seed of the split where the source has no test samples.
        device: The device's name: it keys the split.
        validation_share: Share of the training samples that is set aside for validation, where the source has no
            validation samples.
        spool: A folder for copies of large arrays that a file has compressed or a function returns; without one they
            are held in memory.

    Returns:
        Checked data. The same source, seed and device always give the same split.
    """
    content = _load(source, seed, device, spool)
    try:
        data = content if isinstance(content, LocalData) else _assemble(content, seed, device, spool)
        del content  # otherwise its arrays would stay in memory beside their copies on the disk
        if spool is not None:
            data = data.with_spooled_arrays(spool)
        return data.with_validation(validation_share, seed, device)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


def load_inputs(source: str, shape: Shape | None = None, *, token_ids: bool = False) -> Inputs:
    """Read samples without labels; a source's labels are ignored, and `x_test` is preferred (`load_data`)."""
    content, rows = _load(source, 0, "", None), None
    try:
        if isinstance(content, LocalData):
            rows = content.rows
            content = {"x_train": content.x_train, **({"x_test": content.x_test} if len(content.x_test) else {})}
        elif not isinstance(content, np.ndarray):
            content, rows = _pack_inputs(_as_mapping(content), None)
        if isinstance(content, dict):
            name = next((n for n in ("x_test", "x_train", "x") if n in content), None)
            if name is None:
                raise DataError("array 'x' is missing", got=", ".join(map(str, content)) or "nothing")
            content = content[name]
        x = checked_inputs(content if isinstance(content, StoredArray) else np.asarray(content), "unlabelled")
        check_type(x, token_ids)
        if not len(x):
            raise DataError("the source holds no samples", expected="at least one", got=0)
        if shape is not None:
            x = pad_samples(x, rows, shape)
            check_shape(x, shape)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    return x


def read_arrays(path: Path, spool: Path | None = None, *, single: bool = False) -> dict[str, Inputs]:
    """The arrays of an `.npz` file by name; objects in it are refused, not unpickled. With `single` it may also be a
    `.npy` file, whose array is called x. Large uncompressed arrays stay in the file; compressed ones are copied to the
    folder `spool`, or held in memory without one. Raises `DataError` if it isn't such a file."""
    try:
        with path.open("rb") as file:
            check_members(file, str(path), DataError)
            arrays = np.load(file, allow_pickle=False)
            if not isinstance(arrays, np.ndarray):
                with arrays:
                    entries = {info.filename.removesuffix(".npy"): info for info in arrays.zip.infolist()}
                    return {
                        n: archive_array(path, arrays.zip, entries[n], spool, any_type=n.partition("_")[0] != "x")
                        for n in arrays.files
                    }
            if not single:
                raise DataError(f"{path} is a single array", expected="an .npz file with x and y")
            return {"x": arrays}
    except (DataError, StorageError):
        raise
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror or error}", hint=path_remedy(error)) from error
    except Exception as error:  # a damaged file makes zipfile, numpy and its parser of headers raise anything
        raise DataError(
            f"{path} is not {'a .npy or' if single else 'an'} .npz file of plain arrays{unreadable_reason(error)}",
            hint="Write it with numpy.savez(path, x=..., y=...).",
        ) from error


def is_function(source: str) -> bool:
    """Whether a data source names a function. A name with a colon may be a file's: an existing file is read as one."""
    return ":" in source and not source.endswith(".npz") and not path_exists(Path(source), file=True)


def _load(source: str, seed: int, device: str, spool: Path | None) -> object:
    path = Path(source)
    if is_function(source):
        return _call_function(source, seed, device)
    if source.endswith(".npz") or path_exists(path, file=True):
        return read_arrays(path, spool)
    raise DataError(
        f"data source {source!r}",
        expected="a file or folder that exists, or package.module:function",
        got="none of these",
        hint="docs/device.md#data lists what it may be.",
    )


def _call_function(source: str, seed: int, device: str) -> object:
    module_name, _, name = source.partition(":")
    try:
        function = getattr(import_user_module(module_name), name)
        arguments = {"device": device, "seed": seed}
        parameters = inspect.signature(function).parameters
        return function(**{k: v for k, v in arguments.items() if k in parameters})
    except DataError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise DataError(
            f"data source {source} failed ({type(error).__name__}: {error})",
            hint="Run the function by itself on this device.",
        ) from error


def _as_mapping(returned: object) -> dict[str, Any]:
    if isinstance(returned, (tuple, list)):
        names = {2: ("x", "y"), 4: ("x_train", "y_train", "x_test", "y_test")}.get(len(returned))
        if names is None:
            raise DataError("data", expected="2 or 4 arrays", got=len(returned))
        returned = dict(zip(names, returned, strict=True))
    if not isinstance(returned, dict):
        raise DataError("data", expected="arrays, a mapping or LocalData", got=type(returned).__name__)
    return returned


def _pack_inputs(arrays: dict[str, Any], spool: Path | None) -> tuple[dict[str, Any], PaddedRows | None]:
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
        dtypes = [a.file_dtype if isinstance(a, StoredArray) else a.dtype for a in members.values()]
        are_whole = all(dtype.kind in "iu" and dtype != np.uint8 for dtype in dtypes)
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


def _assemble(content: object, seed: int, device: str, spool: Path | None) -> LocalData:
    arrays, rows = _as_mapping(content), None
    if arrays.keys() & {"y", "y_train"} or any(name.partition("_")[0] == LENGTHS for name in arrays):
        arrays, rows = _pack_inputs(arrays, spool)
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

    validation: Any = pair("val") if "x_val" in arrays else ()
    if "x_test" in arrays:
        return LocalData(x, y, *pair("test"), *validation, rows=rows)
    x, y = checked_samples(x, y, "")  # before the split, so that an error names the sample by its index in the source
    order = keyed_generator(seed, "split", device).permutation(len(y))
    test_count = int(len(y) * TEST_SHARE)
    train, test = (select_pairs(x, y, np.sort(i)) for i in (order[test_count:], order[:test_count]))
    return LocalData(*train, *test, *validation, rows=rows)
