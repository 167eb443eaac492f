"""The board: trains, predicts and reports, without torch or onnx."""

from typing import TYPE_CHECKING

from fedprune.core.imports import lazy_attributes

if TYPE_CHECKING:  # a command that only parses its options doesn't load numpy
    from fedprune_device.data.array_source import load_data
    from fedprune_device.data.data_source import ArrayType, DataSource, Schema
    from fedprune_device.data.dataset import LocalData
    from fedprune_device.data.labels import log_prior
    from fedprune_device.data.scaling import Scaling, scale_samples
    from fedprune_device.serving.predictor import Predictor
    from fedprune_device.training.trainer import Trainer
    from fedprune_device.training.training_task import TrainingControl, TrainingResult, TrainingTask

__all__ = [
    "ArrayType",
    "DataSource",
    "LocalData",
    "Predictor",
    "Scaling",
    "Schema",
    "Trainer",
    "TrainingControl",
    "TrainingResult",
    "TrainingTask",
    "load_data",
    "log_prior",
    "scale_samples",
]

_MODULES = {
    "ArrayType": "fedprune_device.data.data_source",
    "DataSource": "fedprune_device.data.data_source",
    "Schema": "fedprune_device.data.data_source",
    "LocalData": "fedprune_device.data.dataset",
    "Predictor": "fedprune_device.serving.predictor",
    "Trainer": "fedprune_device.training.trainer",
    "TrainingControl": "fedprune_device.training.trainer",
    "TrainingResult": "fedprune_device.training.trainer",
    "TrainingTask": "fedprune_device.training.trainer",
    "load_data": "fedprune_device.data.array_source",
    "log_prior": "fedprune_device.data.labels",
    "Scaling": "fedprune_device.data.scaling",
    "scale_samples": "fedprune_device.data.scaling",
}

__getattr__ = lazy_attributes(__name__, _MODULES)
