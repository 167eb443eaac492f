"""Loads the server's own samples, for evaluation and calibration, and checks that they fit the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.disk import open_file
from fedprune.core.errors import ConfigError, DataError, ModelError
from fedprune.core.imports import is_function
from fedprune.model import step_contract
from fedprune.model.input_type import InputType
from fedprune.model.lengths import Shape, with_lengths
from fedprune.model.recipe import Recipe
from fedprune_device.data.array_source import load_data, load_inputs
from fedprune_device.data.dataset import Channels, LocalData
from fedprune_device.data.labels import Targets
from fedprune_device.data.scaling import scale_samples
from fedprune_device.data.sources import is_sample_folder
from fedprune_device.data.table_windows import is_table
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_step

# Inputs and labels, as `LocalData` has them.
LabelledSamples = tuple[npt.NDArray[Any], npt.NDArray[Any]]


def check_samples(samples: LabelledSamples) -> None:
    """Check that there are samples to measure on. Raises `ConfigError` if there are none, or too few labels."""
    x, y = samples
    if not 0 < len(x) == len(y):
        raise ConfigError(
            "samples to measure on", expected="one or more, each with a label", got=f"{len(x)}, and {len(y)} labels"
        )


def load_evaluation(source: str, model: Model, recipe: Recipe) -> LabelledSamples:
    """The server's own samples: `x_test` and `y_test` where a file has them, else all samples.

    The source is a `.npz` file or `package.module:function`, as devices' data. Raises `DataError` if the data can't be
    read or doesn't fit the model.
    """
    _check_kind(source)
    data = load_data(source)
    try:
        data = fit_data(data, model, recipe)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    if len(data.y_test) and _has_test_split(Path(source)):
        return np.asarray(data.x_test), np.asarray(data.y_test)
    if not len(data.y_test):
        return np.asarray(data.x_train), np.asarray(data.y_train)
    return np.concatenate([data.x_train, data.x_test]), np.concatenate([data.y_train, data.y_test])


def fit_data(data: LocalData, model: Model, recipe: Recipe) -> LocalData:
    """Check samples and labels against a model; returns them in the form that the model takes. Raises `DataError` if
    labels don't fit the loss or the number of classes, or samples have another shape or type."""
    shape, targets = form_of(model, recipe)
    data = data.snapshot(shape, targets)
    data.check(targets, shape, input_type=_input_type(model))
    return scale_samples(data, recipe)[0]


def form_of(model: Model, recipe: Recipe) -> tuple[Shape, Targets]:
    """The shape of a model's input, and the labels that its training takes."""
    label_port = next(p for p in training_step(model, recipe.features).inputs if p.name == step_contract.Y)
    shape = tuple(d if isinstance(d, int) else None for d in label_port.shape[1:])
    whole_numbers = label_port.dtype.kind == "i"
    return _shape(model), Targets.of(recipe, model.architecture.classes, shape, whole_numbers=whole_numbers)


def load_calibration(source: str, model: Model, recipe: Recipe) -> npt.NDArray[Any]:
    """Samples for batch-norm statistics: `x_test` where the source has it, else all of `x`; labels are not needed.

    The source is one as for `load_evaluation`. Raises `DataError` if the samples can't be read or don't fit the model.
    """
    _check_kind(source)
    x, channels = load_inputs(source, _shape(model), input_type=_input_type(model))
    return scale_arrays((_input_type(model).convert(np.asarray(x)), np.asarray(x)), recipe, channels)[0]


def scale_arrays(samples: LabelledSamples, recipe: Recipe, channels: Channels | None = None) -> LabelledSamples:
    """The server's samples, made of these columns, scaled as a recipe says: with `board` by their own mean and
    deviation. Raises `DataError` as `scale_samples` does."""
    if not recipe.scaling:
        return samples
    x, y = samples
    data, _ = scale_samples(LocalData(x, y, x[:0], y[:0], channels=channels), recipe)
    return np.asarray(data.x_train), np.asarray(data.y_train)


def _check_kind(source: str) -> None:
    """Raises `DataError` for tables and folders: how they are read, only a board's options say."""
    path = Path(source)
    if not is_function(source) and (is_table(path) or is_sample_folder(path)):
        raise DataError(
            f"samples of the server {source!r}",
            expected="an .npz file, or package.module:Class",
            got="a table" if is_table(path) else "a folder of files",
            hint="Write them as a board reads them: fedprune-device data check --data SOURCE --bundle DIR "
            "--out FILE.npz, with the boards' options.",
        )


def _shape(model: Model) -> Shape:
    return with_lengths(model.architecture.input_shape, model.graph.metadata, ModelError)


def _input_type(model: Model) -> InputType:
    return InputType(model.graph.inputs[0].dtype)


def _has_test_split(path: Path) -> bool:
    try:
        with open_file(path) as raw, np.load(raw, allow_pickle=False) as file:
            return "x_test" in file.files
    except Exception:  # noqa: BLE001 - a damaged file raises anything; the reader of the samples reports it
        return False
