"""Samples from arrays: an `.npz` file, or what a function returns."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np

from fedprune.core.disk import is_there
from fedprune.core.errors import DataError, StorageError, remedy
from fedprune.core.imports import own_module
from fedprune.core.rng import keyed
from fedprune.core.zip_limits import check_members, why_unreadable
from fedprune.model.lengths import Shape
from fedprune_device.data.dataset import SPLITS, LocalData, check_shape, check_type, checked_inputs, checked_samples
from fedprune_device.data.sequences import LENGTHS, Rows, fitted, rows_of
from fedprune_device.data.splits import TEST_SHARE
from fedprune_device.data.stored_array import Inputs, StoredArray, as_inputs, described, joined, member, select_pairs


def load_data(
    source: str, seed: int = 0, device: str = "", validation_share: float = 0.0, *, spool: Path | None = None
) -> LocalData:
    """Read a device's data; large arrays of an `.npz` file stay there and are read as batches are drawn.

    Raises `DataError` if the source can't be read or doesn't hold usable samples; the message names it.

    Args:
        source: A `.npz` file with `x`, `y` (or `x_train`, `y_train`) and, if there are such, `x_test`, `y_test`,
            `x_val`, `y_val`, or without any `y...`; for a model of several inputs an array under the name of each in
            place of `x`; with `lengths` (`lengths_train` ...) where samples are padded; or
            `package.module:function`. The function may take `device` and
            `seed` and returns a `LocalData`, a mapping with a file's names, (x, y) or (x_train, y_train, x_test,
            y_test).
        seed: Seed of the split where the source has no test samples.
        device: The device's name: it keys the split.
        validation_share: Share of the training samples that is set aside for validation, where the source has no
            validation samples.
        spool: A folder for copies of large arrays that a file has compressed or a function returns; without one they
            are held in memory.

    Returns:
        Checked data. The same source, seed and device always give the same split.
    """
    found = _found(source, seed, device, spool)
    try:
        data = found if isinstance(found, LocalData) else _assemble(found, seed, device, spool)
        del found
        if spool is not None:
            data = data.moved_out(spool)
        return data.with_validation(validation_share, seed, device)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


def load_inputs(source: str, shape: Shape | None = None, *, token_ids: bool = False) -> Inputs:
    """Read samples without labels; a source's labels are ignored, and `x_test` is preferred (`load_data`)."""
    found, rows = _found(source, 0, "", None), None
    try:
        if isinstance(found, LocalData):
            rows = found.rows
            found = {"x_train": found.x_train, **({"x_test": found.x_test} if len(found.x_test) else {})}
        elif not isinstance(found, np.ndarray):
            found, rows = _packed(_named(found), None)
        if isinstance(found, dict):
            name = next((n for n in ("x_test", "x_train", "x") if n in found), None)
            if name is None:
                raise DataError("array 'x' is missing", got=", ".join(map(str, found)) or "nothing")
            found = found[name]
        x = checked_inputs(found if isinstance(found, StoredArray) else np.asarray(found), "unlabelled")
        check_type(x, token_ids)
        if not len(x):
            raise DataError("the source holds no samples", expected="at least one", got=0)
        if shape is not None:
            x = fitted(x, rows, shape)
            check_shape(x, shape)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    return x


def read_arrays(path: Path, spool: Path | None = None, *, single: bool = False) -> dict[str, Inputs]:
    """The arrays of an `.npz` file by name; objects in it are refused, not unpickled.

    With `single` it may also be a `.npy` file, whose array is called x. Large uncompressed arrays stay in the file;
    compressed ones are copied to the folder `spool`, or held in memory without one. Raises `DataError` if it isn't such
    a file.
    """
    try:
        with path.open("rb") as raw:
            check_members(raw, str(path), DataError)
            found = np.load(raw, allow_pickle=False)
            if not isinstance(found, np.ndarray):
                with found:
                    return _members(path, found, spool)
            if not single:
                raise DataError(f"{path} is a single array", expected="an .npz file with x and y")
            return {"x": found}
    except (DataError, StorageError):
        raise
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror or error}", hint=remedy(error)) from error
    except Exception as error:  # what is damaged makes zipfile, numpy and its parser of headers raise anything
        raise DataError(
            f"{path} is not {'a .npy or' if single else 'an'} .npz file of plain arrays{why_unreadable(error)}",
            hint="Write it with numpy.savez(path, x=..., y=...).",
        ) from error


def _members(path: Path, file: Any, spool: Path | None = None) -> dict[str, Inputs]:
    entries = {info.filename.removesuffix(".npy"): info for info in file.zip.infolist()}
    return {
        name: member(path, file.zip, entries[name], spool, any_type=name.partition("_")[0] != "x")
        for name in file.files
    }


def is_function(source: str) -> bool:
    """Whether a data source names a function: what is there as a file is read as one."""
    return ":" in source and not source.endswith(".npz") and not is_there(Path(source), file=True)


def _found(source: str, seed: int, device: str, spool: Path | None) -> object:
    path = Path(source)
    if is_function(source):
        return _call(source, seed, device)
    if source.endswith(".npz") or is_there(path, file=True):
        return read_arrays(path, spool)
    raise DataError(
        f"data source {source!r}",
        expected="a file or folder that exists, or package.module:function",
        got="none of these",
        hint="docs/device.md#data lists what it may be.",
    )


def _call(source: str, seed: int, device: str) -> object:
    module_name, _, name = source.partition(":")
    try:
        function = getattr(own_module(module_name), name)
        known = {"device": device, "seed": seed}
        takes = inspect.signature(function).parameters
        return function(**{k: v for k, v in known.items() if k in takes})
    except DataError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise DataError(
            f"data source {source} failed ({type(error).__name__}: {error})",
            hint="Run the function by itself on this device.",
        ) from error


def _named(found: object) -> dict[str, Any]:
    if isinstance(found, (tuple, list)):
        names = {2: ("x", "y"), 4: ("x_train", "y_train", "x_test", "y_test")}.get(len(found))
        if names is None:
            raise DataError("data", expected="2 or 4 arrays", got=len(found))
        found = dict(zip(names, found, strict=True))
    if not isinstance(found, dict):
        raise DataError("data", expected="arrays, a mapping or LocalData", got=type(found).__name__)
    return found


def _packed(found: dict[str, Any], spool: Path | None) -> tuple[dict[str, Any], Rows | None]:
    """Arrays of several inputs, by name, as parts of one: in the alphabetical order of the names, as models take them.

    Lengths of padded samples follow the numbers of each, and what these rows hold is returned, too. What is large is
    written to a file in `spool`, or held in memory without one. Raises `DataError` if they don't belong together.
    """
    if any(name.partition("_")[0] == "x" for name in found):
        return _with_lengths(found, spool)
    splits: dict[str, dict[str, Inputs]] = {}
    for name, array in found.items():
        base, _, end = name.rpartition("_")
        own, split = (base, f"_{end}") if base and end in SPLITS else (name, "")
        if own != "y":
            splits.setdefault(split, {})[own] = as_inputs(array)
    names = sorted(set().union(*splits.values()))
    if len(names) < 2:
        return found, None
    out = {name: array for name, array in found.items() if name.partition("_")[0] == "y"}
    for split, arrays in splits.items():
        if sorted(arrays) != names or len({len(a) if a.ndim else -1 for a in arrays.values()}) > 1:
            raise DataError(
                f"arrays of several inputs{split and f' ({split[1:]})'}",
                expected=f"{', '.join(names)}, each with as many samples",
                got=", ".join(f"{n} {described(a)} of {len(a)}" if a.ndim else f"{n} []" for n, a in arrays.items()),
            )
        types = [array.stored if isinstance(array, StoredArray) else array.dtype for array in arrays.values()]
        whole = all(found.kind in "iu" and found != np.uint8 for found in types)
        dtype = np.dtype(np.int64 if whole else np.float32)
        out[f"x{split}"] = joined([arrays[name] for name in names], dtype, spool)
    return out, None


def _with_lengths(found: dict[str, Any], spool: Path | None) -> tuple[dict[str, Any], Rows | None]:
    splits = [name.removeprefix("x") for name in found if name.partition("_")[0] == "x"]
    own = [name for name in found if name.partition("_")[0] == LENGTHS]
    if not own:
        return found, None
    if sorted(own) != sorted(f"{LENGTHS}{split}" for split in splits):
        expected = ", ".join(f"{LENGTHS}{split}" for split in splits)
        raise DataError("arrays of lengths", expected=expected, got=", ".join(own))
    pairs = [(as_inputs(found[f"x{split}"]), as_inputs(found[f"{LENGTHS}{split}"])) for split in splits]
    rows = rows_of(pairs)
    out = {name: array for name, array in found.items() if name not in own}
    for split, (x, lengths) in zip(splits, pairs, strict=True):
        whole = x.dtype in (np.int32, np.int64)
        out[f"x{split}"] = joined([x, lengths], np.dtype(np.int64 if whole else np.float32), spool)
    return out, rows


def _assemble(arrays: object, seed: int, device: str, spool: Path | None) -> LocalData:
    found, rows = _named(arrays), None
    if found.keys() & {"y", "y_train"} or any(name.partition("_")[0] == LENGTHS for name in found):
        found, rows = _packed(found, spool)
    suffix = "_train" if "x_train" in found else ""
    x: Inputs
    y: Inputs
    try:
        x = as_inputs(found[f"x{suffix}"])
        y = as_inputs(found[f"y{suffix}"]) if found.keys() & {"y", "y_train", "y_test", "y_val"} else x
    except KeyError as error:
        raise DataError(
            f"array {error.args[0]!r} is missing",
            expected="x and y (or x_train and y_train)",
            got=", ".join(map(str, found)) or "nothing",
        ) from error
    for split in () if y is x else ("test", "val"):
        if (f"x_{split}" in found) != (f"y_{split}" in found):
            raise DataError(f"{split} data", expected=f"both x_{split} and y_{split}, or neither")

    def pair(split: str) -> tuple[Inputs, Inputs]:
        inputs = as_inputs(found[f"x_{split}"])
        return inputs, inputs if y is x else as_inputs(found[f"y_{split}"])

    own: Any = pair("val") if "x_val" in found else ()
    if "x_test" in found:
        return LocalData(x, y, *pair("test"), *own, rows=rows)
    x, y = checked_samples(x, y, "")  # before the split, so that an error names the sample by its place in the source
    order = keyed(seed, "split", device).permutation(len(y))
    aside = int(len(y) * TEST_SHARE)
    train, test = np.sort(order[aside:]), np.sort(order[:aside])
    return LocalData(*select_pairs(x, y, train), *select_pairs(x, y, test), *own, rows=rows)
