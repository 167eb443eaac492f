"""The board: trains, predicts and reports, without torch or onnx."""

from fedprune_device.data import LocalData, load_data
from fedprune_device.labels import log_prior
from fedprune_device.predictor import Predictor
from fedprune_device.trainer import Trainer, TrainingResult

__all__ = ["LocalData", "Predictor", "Trainer", "TrainingResult", "load_data", "log_prior"]
