"""Reads the samples and labels of an `.npz` file, and checks that they fit a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.disk import open_file
from fedprune.core.errors import DataError, ModelError, path_remedy, shape_text
from fedprune.core.zip_limits import check_members, plain_array, unreadable_reason
from fedprune.model.architecture import Architecture
from fedprune.model.features import labels_of
from fedprune.model.input_type import InputType
from fedprune.model.lengths import Shape, fits_shape, pad_to_bound, with_lengths
from fedprune.model.recipe import Recipe
from fedprune_export.checks.labelled_data import LABEL_KINDS, Array, LabelledData
from fedprune_export.importing.packing import INPUTS_KEY, Piece, read_packing
from fedprune_export.pruning.model import Model

# The reader of boards' files is not imported: an export needs neither their libraries nor their options.
_BOARD_FILES_HINT = (
    "Export once without --data and --precision. `fedprune-device data check --bundle OUT --data PATH --out FILE.npz` "
    "then writes what a board reads of images, recordings and tables: give --data FILE.npz."
)


def load_scored_data(path: Path, model: Model, recipe: Recipe) -> LabelledData:
    """Read the samples of a file, labelled for a recipe's loss, and score the whole model on them.

    Raises `DataError` if the file can't be read, or its samples don't fit the model.
    """
    if labels_of(recipe.loss) not in LABEL_KINDS:
        raise DataError(
            f"samples to measure a model of loss {recipe.loss!r} on",
            expected="none",
            hint="Its labels don't say which outputs are right; leave --data (data=) out.",
        )
    dtype = model.graph.inputs[0].dtype
    shape = with_lengths(model.architecture.input_shape, model.graph.metadata, ModelError)
    inputs = read_packing(model.graph.metadata, INPUTS_KEY)
    labels = labels_of(recipe.loss)
    data = read_labelled_data(path, model.architecture, dtype, labels, recipe.ignore_label, shape, inputs)
    return replace(data, full_score=data.score_of(model.graph))


def read_labelled_data(
    path: Path,
    architecture: Architecture,
    dtype: npt.DTypeLike,
    labels: str = "classes",
    ignored: int | None = None,
    shape: Shape | None = None,
    inputs: Sequence[Piece] = (),
) -> LabelledData:
    """Read a `.npz` file with `x_test` and `y_test`, or else `x` and `y`.

    A model with several inputs may have an array for each of them in place of `x`.

    Raises `DataError` if the file can't be read, lacks an array, or holds samples that don't fit the model.

    Args:
        labels: What the labels are, one of `LABEL_KINDS`.
        ignored: The class of labels that count for nothing.
        shape: One sample's, with the bounds of its length; by default the architecture's.
        inputs: The model's inputs, where it has several.
    """
    arrays = _load_arrays(path)
    for ending in ("_test", ""):
        row_name, names = f"x{ending}", [piece.name + ending for piece in inputs]
        is_present = [name in arrays for name in names]
        # An input may itself be called x: then the file means the row unless it has all inputs.
        if inputs and (all(is_present) if row_name in names else row_name not in arrays and any(is_present)):
            arrays[row_name] = _concatenate_inputs(path, arrays, inputs, ending, np.dtype(dtype))
    array_names = next((p for p in (("x_test", "y_test"), ("x", "y")) if all(n in arrays for n in p)), None)
    if array_names is None:
        input_names = " and ".join(piece.name for piece in inputs) or "x"
        expected = f"arrays x_test and y_test, or {input_names} and y"
        raise DataError(f"{path}", expected=expected, got=", ".join(arrays) or "none")
    x, y = (arrays[n] for n in array_names)
    lengths = arrays.get(array_names[0].replace("x", "lengths"))
    if not len(x) or not fits_shape(x.shape[1:], shape or architecture.input_shape):
        expected = shape_text("n", *(shape or architecture.input_shape))
        raise DataError(f"{path}: shape of {array_names[0]}", expected=expected, got=shape_text(*x.shape))
    model_dtype = np.dtype(dtype)
    if model_dtype.kind != "f" and x.dtype.kind not in "iu":
        raise DataError(f"{path}: type of {array_names[0]}", expected="whole numbers", got=x.dtype)
    if x.dtype.kind not in "iufb":
        raise DataError(f"{path}: {array_names[0]}", expected="numbers", got=x.dtype)
    InputType(model_dtype).check_range(x)
    _check_finite(f"{path}: {array_names[0]}", x)
    outputs = (len(x), *architecture.output_shape)
    x = pad_to_bound(x.astype(model_dtype), shape or (), lengths)
    return LabelledData(x, _check_labels(path, array_names[1], y, outputs, labels, ignored), labels, ignored)


def _concatenate_inputs(
    path: Path, arrays: Mapping[str, Array], inputs: Sequence[Piece], ending: str, dtype: np.dtype[Any]
) -> Array:
    """The arrays of several inputs as one row per sample."""
    rows = []
    for piece in inputs:
        name = piece.name + ending
        x = arrays.get(name)
        count = len(next(arrays[p.name + ending] for p in inputs if p.name + ending in arrays))
        if x is None or x.shape != (count, *piece.shape) or x.dtype.kind not in "iufb":
            raise DataError(
                f"{path}: array {name} of the model's inputs",
                expected=f"numbers {shape_text(count, *piece.shape)}",
                got="none" if x is None else _type_text(x),
            )
        if dtype.kind != "f" and x.dtype.kind not in "iu":
            raise DataError(f"{path}: type of {name}", expected="whole numbers", got=x.dtype)
        rows.append(x.reshape(count, piece.size).astype(dtype))
    return np.concatenate(rows, axis=1)


def _check_labels(path: Path, name: str, y: Array, outputs: tuple[int, ...], labels: str, ignored: int | None) -> Array:
    if y.ndim < 1 or len(y) != outputs[0]:
        raise DataError(f"{path}: {name}", expected=f"{outputs[0]} labels", got=shape_text(*y.shape))
    if labels == "classes":
        shape = (outputs[0], *outputs[2:])
        if y.shape != shape or y.dtype.kind not in "iu":
            raise DataError(f"{path}: {name}", expected=f"whole numbers {shape_text(*shape)}", got=_type_text(y))
        counted = y if ignored is None else y[y != ignored]
        if counted.size and (counted.min() < 0 or counted.max() >= outputs[1]):
            wrong = int(counted.min() if counted.min() < 0 else counted.max())
            raise DataError(f"{path}: a label is out of range", expected=f"0 to {outputs[1] - 1}", got=wrong)
        return y
    if y.ndim == 1 and outputs[1:] == (1,):
        y = y[:, None]
    if y.shape != outputs or y.dtype.kind not in "iufb":
        raise DataError(f"{path}: {name}", expected=f"numbers {shape_text(*outputs)}", got=_type_text(y))
    _check_finite(f"{path}: {name}", y)
    if labels == "multi" and not np.isin(y, (0, 1)).all():
        raise DataError(f"{path}: {name}", expected="0 or 1 for every class")
    return y.astype(np.float32)


def _check_finite(subject: str, array: Array) -> None:
    bad_samples = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))
    if len(bad_samples):
        raise DataError(f"{subject} holds numbers that are not finite", got=f"sample {bad_samples[0]}")


def _type_text(array: Array) -> str:
    return f"{array.dtype} {shape_text(*array.shape)}"


def _load_arrays(path: Path) -> dict[str, Array]:
    if path.is_dir():
        raise DataError(f"{path} is a folder", expected="an .npz file with x and y", hint=_BOARD_FILES_HINT)
    try:
        with open_file(path) as raw:
            check_members(raw, str(path), DataError)
            arrays = np.load(raw, allow_pickle=False)
            if not hasattr(arrays, "files"):
                raise DataError(f"{path} is no .npz file", hint="Write it with numpy.savez(path, x=..., y=...).")
            with arrays as file:
                return {n: plain_array(n, file[n]) for n in file.files}
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror or error}", hint=path_remedy(error)) from error
    except DataError:
        raise
    except Exception as error:  # what is damaged makes zipfile, zlib, numpy and its parser of headers raise anything
        raise DataError(
            f"{path} is not an .npz file of plain arrays{unreadable_reason(error)}",
            hint="Write it with numpy.savez(path, x=..., y=...)." if path.suffix == ".npz" else _BOARD_FILES_HINT,
        ) from error
