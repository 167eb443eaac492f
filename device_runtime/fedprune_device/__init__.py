"""The board: trains, predicts and reports, without torch or onnx."""

from fedprune_device.data.dataset import LocalData, load_data
from fedprune_device.data.labels import log_prior
from fedprune_device.serving.predictor import Predictor
from fedprune_device.training.trainer import Trainer, TrainingResult

__all__ = ["LocalData", "Predictor", "Trainer", "TrainingResult", "load_data", "log_prior"]
