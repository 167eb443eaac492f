"""Peak memory of training by losses of many outputs per sample: what plans count, and what a process takes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from examples.own_losses import focal
from torch import nn

import fedprune_export as fx
from fedprune.core import tensorfile
from fedprune.model.recipe import Recipe
from fedprune.planning.cost_prediction import memory_use
from fedprune.planning.costs import AGENT_PROCESS_BYTES, costs_at
from fedprune_export.training.step_graph import training_graph

pytestmark = pytest.mark.torch

CLASSES, BATCH = 40, 8

PROCESS = """
import sys
from pathlib import Path
import numpy as np
from fedprune.core import tensorfile
from fedprune.model.recipe import Recipe
from fedprune_device.data.dataset import LocalData
from fedprune_device.hardware.readings import peak_memory
from fedprune_device.training.trainer import Trainer, TrainingTask
folder, loss, classes, batch = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
x = np.zeros((batch, 3, 64, 96), np.float32)
y = np.zeros((batch, 64, 96), np.uint8) if loss == "cross_entropy" else np.zeros((batch, classes, 64, 96), np.float32)
task = TrainingTask(Recipe(loss=loss, batch_size=batch, epochs=3), classes, 0, "a", 1)
weights = tensorfile.load_tensors(folder / "weights.safetensors")
Trainer(folder / "training.onnx").train(weights, LocalData(x, y, x[:0], y[:0]), task)
print(peak_memory())
"""


class Labelling(nn.Module):
    """A small body, and many classes at each place."""

    input_shape = (3, 64, 96)

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.out = nn.Conv2d(16, CLASSES, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.body(x))


@pytest.mark.parametrize("loss", ["cross_entropy", "bce", "distill", "custom"])
def test_what_a_process_takes_is_what_a_plan_counts(loss: str, tmp_path: Path) -> None:
    model, recipe = fx.load(Labelling(), loss=focal if loss == "custom" else None), Recipe(loss=loss, batch_size=BATCH)
    (tmp_path / "training.onnx").write_bytes(training_graph(model, recipe.features).to_bytes())
    (tmp_path / "weights.safetensors").write_bytes(tensorfile.encode(model.tensors))
    words = [sys.executable, "-c", PROCESS, tmp_path, loss, str(CLASSES), str(BATCH)]
    peak = float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    architecture = model.architecture
    costs = costs_at(architecture, architecture.sizes)
    counted = memory_use(architecture, architecture.sizes, costs, recipe, BATCH).total - AGENT_PROCESS_BYTES
    assert 0.9 * peak <= counted <= 1.25 * peak
