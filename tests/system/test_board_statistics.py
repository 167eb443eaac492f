"""Batch-norm statistics that a board measures again are those of torch's BatchNorm with momentum=None."""

import numpy as np
import pytest
import torch
from torch import nn

from fedprune.core.rng import keyed_generator
from fedprune.model.recipe import Recipe
from fedprune_device.data.dataset import LocalData
from fedprune_device.training.trainer import Trainer
from fedprune_export.importing import export_torch, import_onnx
from fedprune_export.training.step_graph import training_graph
from support.nets.small_nets import randomise_norms


class Net(nn.Module):
    """Norms of two momenta, one of them behind a residual sum; the last is over single numbers."""

    input_shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(6), nn.BatchNorm2d(6, momentum=0.03)
        self.head, self.norm3, self.out = nn.Linear(6, 5), nn.BatchNorm1d(5, momentum=0.5), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm1(self.one(x)))
        x = torch.relu(x + self.norm2(self.two(x)))
        return self.out(torch.relu(self.norm3(self.head(x.mean((2, 3))))))


@pytest.mark.parametrize("batch", [8, 13, 50])
def test_one_pass_gives_torchs_cumulative_mean(batch: int) -> None:
    net = randomise_norms(Net())
    rng = np.random.default_rng(2)
    x = (3 + 2 * rng.standard_normal((50, 3, 8, 8))).astype(np.float32)
    data = LocalData(x, rng.integers(0, 4, 50), x[:0], np.zeros(0, np.int64))
    model = import_onnx(export_torch(net.eval()), "net")
    recipe = Recipe(batch_size=batch)
    trainer = Trainer(training_graph(model, recipe.features).to_bytes())
    got = trainer.calibrate(model.tensors, data, recipe, seed=9, device="attic")
    norms = {n: m for n, m in net.named_modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))}
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None
    net.train()
    order = keyed_generator(9, "calibration", "attic").permutation(50)
    with torch.no_grad():
        for rows in np.array_split(order, -(-50 // batch)):
            net(torch.from_numpy(x[rows]))
    for name, norm in norms.items():
        np.testing.assert_allclose(got[f"{name}.running_mean"], norm.running_mean, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(got[f"{name}.running_var"], norm.running_var, rtol=2e-5, atol=2e-6)
    moved = {f"{n}.running_{kind}" for n in norms for kind in ("mean", "var")}
    assert all(np.array_equal(got[n], v) for n, v in model.tensors.items() if n not in moved)
    assert set(got) == set(model.tensors)
