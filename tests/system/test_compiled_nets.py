"""The device's trainer and predictor on what the compiler really makes, with torch as the oracle."""

from pathlib import Path

import numpy as np
import pytest

from fedprune.core import tensorfile
from fedprune.core.rng import keyed_generator
from fedprune.model.architecture import widths_at
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.wire.messages import Offer, UpdateAnnouncement
from fedprune_device.data.dataset import LocalData
from fedprune_device.serving.predictor import Predictor
from fedprune_device.storage.state_directory import DeviceStore
from fedprune_device.training.round_runner import RoundRunner
from fedprune_device.training.trainer import Trainer
from fedprune_device.training.training_task import TrainingTask
from fedprune_export.bundles.inference import inference_model
from fedprune_export.importing import load
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph
from support.nets import smooth_nets

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

RECIPE = Recipe(epochs=2, batch_size=8, lr=0.02, momentum=0.9, weight_decay=0.001)


@pytest.fixture(scope="module")
def model() -> Model:
    return load("support.nets.small_nets:resnet20_bn")


@pytest.fixture(scope="module")
def data() -> LocalData:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((33, 3, 32, 32)).astype(np.float32)
    y = rng.integers(0, 10, 33)
    return LocalData(x[:25], y[:25], x[25:], y[25:])


def test_a_compiled_step_trains_as_torch_does() -> None:
    """On a network without kinks: past one, six steps carry rounding as far as a wrong gradient would."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((25, 3, 8, 8)).astype(np.float32), rng.integers(0, 5, 25)  # 25 = 3 · 8 + 1
    model = load("support.nets.smooth_nets:make")
    trainer = Trainer(training_graph(model, RECIPE.features).to_bytes())
    task = TrainingTask(RECIPE, seed=3, device="d", round=1, classes=5)
    got = trainer.train(model.tensors, LocalData(x, y, x[:0], y[:0]), task)
    assert trainer.has_batch_norm
    assert got.steps == 6
    net = smooth_nets.make().train()
    sgd = torch.optim.SGD(net.parameters(), RECIPE.lr, RECIPE.momentum, weight_decay=RECIPE.weight_decay)
    for epoch in range(RECIPE.epochs):
        order = keyed_generator(3, 1, "d", "batches", epoch).permutation(25)
        for start in (0, 8, 16):  # the leftover sample is left out
            rows = order[start : start + 8]
            loss = torch.nn.functional.cross_entropy(net(torch.from_numpy(x[rows])), torch.from_numpy(y[rows]))
            sgd.zero_grad()
            loss.backward()
            sgd.step()
    state = net.state_dict()
    for name in model.tensors:
        np.testing.assert_allclose(got.tensors[name], state[name].numpy(), rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("density", [0.25, 0.6, 1.0])
def test_a_round_of_a_submodel_ends_with_a_model_that_serves(
    tmp_path: Path, model: Model, data: LocalData, density: float
) -> None:
    architecture = model.architecture
    selection = Selection.full(architecture).with_widths(widths_at(architecture, density))
    part = selection.gather(model.tensors)
    with DeviceStore(tmp_path) as store:
        offer = Offer(
            "job",
            1,
            0,
            3,
            architecture.digest,
            selection.digest,
            selection.widths,
            10,
            store.blobs.put(tensorfile.encode(part)),
            store.blobs.put(training_graph(model, RECIPE.features).to_bytes()),
            store.blobs.put(inference_model(model, selection.widths)),
            RECIPE.to_dict(),
        )
        bench = RoundRunner("d", store.blobs, store.slots, data)
        update = bench.commit(bench.carry_out(offer))
        assert isinstance(update, UpdateAnnouncement)
        trained = tensorfile.decode(store.blobs.read(update.weights.sha256))
        predictor, record = store.slots.open()
    assert {n: v.shape for n, v in trained.items()} == selection.shapes()
    assert record.round == 1
    (tmp_path / "by-hand").mkdir()
    (tmp_path / "by-hand" / "inference.onnx").write_bytes(inference_model(model, selection.widths))
    (tmp_path / "by-hand" / "weights.safetensors").write_bytes(tensorfile.encode(trained))
    np.testing.assert_array_equal(predictor.predict(data.x_test), Predictor(tmp_path / "by-hand").predict(data.x_test))
