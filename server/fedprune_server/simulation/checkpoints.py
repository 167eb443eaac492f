"""Global models that a run leaves behind: each in a folder of its own, as any ONNX runtime loads it."""

from __future__ import annotations

from pathlib import Path

from fedprune.core.disk import storage_errors, write_whole
from fedprune_export.bundles.inference import WEIGHTS_FILE, inference_model
from fedprune_export.pruning.model import Model

FOLDER = "checkpoints"
MODEL_FILE = "model.onnx"


def write_checkpoint(folder: Path, model: Model, number: int, weights: bytes) -> Path:
    """Write a global model as `checkpoints/round-000010/model.onnx`, with its weights in a file beside it.

    Args:
        folder: The run's folder.
        model: The imported model.
        number: The round that has ended.
        weights: The global model's tensor file.

    Returns:
        The ONNX file. The weights are `weights.safetensors`, which it refers to.

    Raises:
        StorageFullError: There is no room.
        StorageError: The disk fails.
    """
    place = folder / FOLDER / f"round-{number:06d}"
    with storage_errors(f"can't make {place}"):
        place.mkdir(parents=True, exist_ok=True)
    write_whole(place / WEIGHTS_FILE, weights)
    write_whole(place / MODEL_FILE, inference_model(model, model.architecture.sizes))
    return place / MODEL_FILE
