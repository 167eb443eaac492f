"""Reads samples from an `.npz` file, from a class (`data_source`), or from the arrays that a function returns."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedprune.core.disk import open_file, path_exists
from fedprune.core.errors import DataError, StorageError, path_remedy
from fedprune.core.imports import import_user_module, is_function
from fedprune.core.text import first_few
from fedprune.core.zip_limits import check_members, unreadable_reason
from fedprune.model.input_type import FLOATS, InputType
from fedprune.model.lengths import Shape
from fedprune_device.data.array_assembly import as_mapping, assemble, pack_inputs, read_channels
from fedprune_device.data.data_source import DataSource
from fedprune_device.data.dataset import Channels, LocalData
from fedprune_device.data.other_files import OTHER_FORMS
from fedprune_device.data.sample_checks import check_shape, check_type, checked_inputs
from fedprune_device.data.sequences import PaddedRows, pad_samples
from fedprune_device.data.source_samples import MAX_SAMPLES, SourceSamples
from fedprune_device.data.splits import SplitShares
from fedprune_device.data.spooled_arrays import archive_array
from fedprune_device.data.stored_array import Inputs, StoredArray, as_inputs

_SOURCES = "arrays (.npz), a table (.csv, .tsv, .parquet), or a folder of files"


def load_data(
    source: str,
    seed: int = 0,
    device: str = "",
    validation_share: float = 0.0,
    *,
    class_names: tuple[str, ...] = (),
    spool: Path | None = None,
) -> LocalData:
    """Read a device's data as it is now; large arrays of an `.npz` file are read as batches are drawn.

    Raises `DataError` if the source can't be read or doesn't hold usable samples; the message names it.

    Args:
        source: An `.npz` file, or `package.module:Class` of a source of one's own (`data_source.DataSource`). The file
            has `x` and `y` (or `x_train` and `y_train`) and may have `x_test`, `y_test`, `x_val`, `y_val`; without any
            `y...` samples have no labels. For a model of several inputs it has an array under the name of each in
            place of `x`. If samples are padded, it has `lengths` (`lengths_train` ...). In place of the class may
            stand a function that returns a `LocalData` or such arrays: a mapping with a file's names, (x, y) or
            (x_train, y_train, x_test, y_test). Class and function may take `device` and `seed`.
        seed: Seed of the split where the source has no test samples.
        device: The device's name: it keys the split.
        validation_share: Share of the training samples that is set aside for validation, where the source has no
            validation samples.
        class_names: The names of the classes in the fleet's order, for labels that are texts.
        spool: A folder for copies of large arrays that a file has compressed or a function returns; without one they
            are held in memory.

    Returns:
        Checked data. The same source, seed and device always give the same split.
    """
    shares = SplitShares(validation=validation_share, seed=seed, device=device)
    data = open_arrays(source, shares, class_names=class_names, spool=spool)
    return data if isinstance(data, LocalData) else data.snapshot()


def open_arrays(
    source: str,
    shares: SplitShares,
    max_samples: int = MAX_SAMPLES,
    class_names: tuple[str, ...] = (),
    spool: Path | None = None,
) -> LocalData | SourceSamples:
    """The samples of a source as for `load_data`: those of a class may change, at most `max_samples` are taken.

    `class_names` are the names of the classes in the fleet's order.
    """
    content = _load(source, shares.seed, shares.device, spool)
    if isinstance(content, dict):
        content = number_classes(content, class_names, source)
    if isinstance(content, DataSource) and not isinstance(content, LocalData):
        return SourceSamples(content, source, shares, max_samples, class_names, spool)
    try:
        data = content if isinstance(content, LocalData) else assemble(content, spool, shares.seed, shares.device)
        del content  # otherwise its arrays would stay in memory beside their copies on the disk
        if spool is not None:
            data = data.with_spooled_arrays(spool)
        return data.with_validation(shares.validation, shares.seed, shares.device)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


def number_classes(arrays: Mapping[str, Any], class_names: tuple[str, ...], source: str) -> dict[str, Any]:
    """Arrays by name, with the numbers of classes in place of labels that are texts. Raises `DataError` if a text is
    none of `class_names`."""
    return {name: _class_numbers(name, array, class_names, source) for name, array in arrays.items()}


def _class_numbers(name: str, array: Any, class_names: tuple[str, ...], source: str) -> Any:
    if name.partition("_")[0] != "y" or not isinstance(array, np.ndarray) or array.dtype.kind != "U":
        return array
    names, indices = np.unique(array, return_inverse=True)
    missing = [str(n) for n in names if n not in class_names]
    if missing:
        raise DataError(
            f"{source}: labels",
            expected=", ".join(class_names) or "whole numbers, or names of classes",
            got=first_few(missing),
            hint="Give the classes' names in the order that all boards share: --class-names A,B,C.",
        )
    return np.array([class_names.index(str(n)) for n in names])[indices].reshape(array.shape)


def load_inputs(
    source: str, shape: Shape | None = None, *, input_type: InputType = FLOATS
) -> tuple[Inputs, Channels | None]:
    """Read samples without labels, and the names of their columns; a source's labels are ignored, and `x_test` is
    preferred (`load_data`)."""
    content = _load(source, 0, "", None)
    try:
        if isinstance(content, DataSource) and not isinstance(content, LocalData):
            content = SourceSamples(content, source, SplitShares(test=0), MAX_SAMPLES).snapshot()
        array, rows, channels = _inputs_and_rows(content)
        x = checked_inputs(array if isinstance(array, StoredArray) else np.asarray(array), "unlabelled")
        check_type(x, input_type)
        if not len(x):
            raise DataError("the source holds no samples", expected="at least one", got=0)
        if shape is not None:
            x = pad_samples(x, rows, shape)
            check_shape(x, shape)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    return x, channels


def _inputs_and_rows(content: Any) -> tuple[Any, PaddedRows | None, Channels | None]:
    """A source's array of inputs, the layout of its rows where these are padded samples, and its columns' names."""
    if isinstance(content, np.ndarray):
        return content, None, None
    if isinstance(content, LocalData):
        return content.x_test if len(content.x_test) else content.x_train, content.rows, content.channels
    arrays, rows = pack_inputs(as_mapping(content), None)
    name = next((n for n in ("x_test", "x_train", "x") if n in arrays), None)
    if name is None:
        raise DataError("array 'x' is missing", got=", ".join(map(str, arrays)) or "nothing")
    x = as_inputs(arrays[name])
    return x, rows, read_channels(arrays, x)


def read_arrays(path: Path, spool: Path | None = None, *, single: bool = False) -> dict[str, Inputs]:
    """The arrays of an `.npz` file by name; objects in it are refused, not unpickled. With `single` it may also be a
    `.npy` file, whose array is called x. Large uncompressed arrays stay in the file; compressed ones are copied to the
    folder `spool`, or held in memory without one. Raises `DataError` if it isn't such a file."""
    try:
        with open_file(path) as file:
            check_members(file, str(path), DataError)
            arrays = np.load(file, allow_pickle=False)
            if not isinstance(arrays, np.ndarray):
                with arrays:
                    entries = {info.filename.removesuffix(".npy"): info for info in arrays.zip.infolist()}
                    return {n: archive_array(path, arrays.zip, entries[n], spool) for n in arrays.files}
            if not single:
                raise DataError(f"{path} is a single array", expected="an .npz file with x and y")
            return {"x": arrays}
    except (DataError, StorageError):
        raise
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror or error}", hint=path_remedy(error)) from error
    except Exception as error:  # a damaged file makes zipfile, numpy and its parser of headers raise anything
        kind = OTHER_FORMS.get(path.suffix.lower())
        if kind is not None:
            raise DataError(f"{path} is {kind[0]}", expected=_SOURCES, hint=kind[1]) from error
        raise DataError(
            f"{path} is not {'a .npy or' if single else 'an'} .npz file of plain arrays{unreadable_reason(error)}",
            hint="Write it with numpy.savez(path, x=..., y=...).",
        ) from error


def _load(source: str, seed: int, device: str, spool: Path | None) -> object:
    path = Path(source)
    if is_function(source):
        return _call_user_code(source, seed, device)
    if source.endswith(".npz") or path_exists(path, file=True):
        return read_arrays(path, spool)
    raise DataError(
        f"data source {source!r}",
        expected="a file or folder that exists, or package.module:Class",
        got="none of these",
        hint="docs/device.md#data lists what it may be.",
    )


def _call_user_code(source: str, seed: int, device: str) -> object:
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
            f"data source {source} failed ({type(error).__name__}: {error})", hint="Run it by itself on this device."
        ) from error
