"""The server's own samples: what the global model is measured with, and what batch-norm statistics are measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import DataError
from fedprune_device.data.dataset import LocalData, load_data, load_inputs
from fedprune_export.pruning.model import Model
from fedprune_server.executor.evaluator import Evaluation


def load_evaluation(source: str, model: Model, loss: str) -> Evaluation:
    """The server's own samples: `x_test` and `y_test` where a file has them, else all samples.

    Args:
        source: A `.npz` file or `package.module:function`, as devices' data.
        model: The model that will be measured.
        loss: What it is trained with.

    Raises:
        DataError: The data can't be read or doesn't fit the model.
    """
    data = load_data(source)
    try:
        check_data(data, model, loss)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    if len(data.y_test) and _has_test_split(Path(source)):
        return np.asarray(data.x_test), data.y_test
    if not len(data.y_test):
        return np.asarray(data.x_train), data.y_train
    return np.concatenate([data.x_train, data.x_test]), np.concatenate([data.y_train, data.y_test])


def check_data(data: LocalData, model: Model, loss: str) -> None:
    """Check samples and labels against a model.

    Args:
        data: The samples.
        model: The model.
        loss: What it is trained with.

    Raises:
        DataError: Labels don't fit the loss or the number of classes, or samples have another shape or type.
    """
    shape = model.architecture.input_shape
    data.check(model.architecture.classes, shape, loss=loss, token_ids=_takes_token_ids(model))


def load_calibration(source: str, model: Model) -> npt.NDArray[Any]:
    """Samples for batch-norm statistics: `x_test` where the source has it, else all of `x`; labels are not needed.

    Args:
        source: A `.npz` file or `package.module:function`, as devices' data.
        model: The model whose statistics will be measured.

    Raises:
        DataError: The samples can't be read or don't fit the model.
    """
    return np.asarray(load_inputs(source, tuple(model.architecture.input_shape), token_ids=_takes_token_ids(model)))


def _takes_token_ids(model: Model) -> bool:
    return model.graph.inputs[0].dtype.kind == "i"


def _has_test_split(path: Path) -> bool:
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return "x_test" in file.files
    except Exception:  # noqa: BLE001 - what is damaged raises anything; whoever reads the samples says what it is
        return False
