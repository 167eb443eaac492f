"""Losses of a user's own: exported with the model, differentiated by the compiler, trained without torch."""

import base64
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import fedprune_export as fx
from fedprune.core.errors import ConfigError, DataError, ModelError
from fedprune.model.recipe import Recipe
from fedprune_device.data.dataset import LocalData
from fedprune_device.training.trainer import Trainer
from fedprune_device.training.training_task import TrainingTask
from fedprune_export.importing import ImportChoices, export_torch, import_onnx, read_source
from fedprune_export.importing.user_graphs import LOSS_KEY, embed_user_graph
from fedprune_export.training.step_graph import training_graph
from support.oracles.cutting import outputs
from support.oracles.torch_losses import focal

pytestmark = pytest.mark.torch

K, SIDE = 4, 6
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
CUSTOM = Recipe(loss="custom", batch_size=8, lr=0.5, momentum=0.0)


class Pixels(nn.Module):
    """One row of outputs per pixel, of a net whose hidden channels can be cut."""

    input_shape = (2, SIDE, SIDE)

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Conv2d(2, 8, 3, padding=1)
        self.out = nn.Conv2d(8, K, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.hidden(x)))


def with_labels(shape: tuple[int, ...], dtype: str = "float32") -> Callable[[Loss], Loss]:
    def note(loss: Loss) -> Loss:
        loss.target_shape, loss.target_dtype = shape, dtype  # type: ignore[attr-defined]
        return loss

    return note


@with_labels((SIDE, SIDE), "int64")
def likelihood(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(outputs, labels, reduction="none", ignore_index=0).flatten(1).mean(1)


@with_labels((SIDE, SIDE), "int64")
def weighted(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=outputs.dtype)
    return functional.nll_loss(outputs.log_softmax(1), labels, weight, reduction="none").flatten(1).sum(1)


@with_labels((2,))
def of_means(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Labels of another shape than the outputs."""
    means = outputs.mean((2, 3))
    return ((means[:, :2] - labels) ** 2).sum(1) + (means[:, 2:] - 1).abs().mean(1)


def detached_loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Weights that follow the outputs and aren't learnt."""
    far = (outputs > labels).detach()
    return ((outputs - labels).abs().detach() * (outputs - labels) ** 2 + far * outputs).flatten(1).mean(1)


class Scaled(nn.Module):
    """A module with numbers of its own, which are not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))

    def forward(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return ((self.scale[:, None, None] * (outputs - labels)) ** 2).flatten(1).mean(1)


LOSSES: dict[str, Any] = {
    **{f.__name__: f for f in (likelihood, weighted, of_means, detached_loss)},
    "module": Scaled(),
}


@pytest.fixture
def net() -> Pixels:
    torch.manual_seed(3)
    return Pixels()


def samples(loss: Any, count: int = 8) -> LocalData:
    rng = np.random.default_rng(7)
    x = rng.standard_normal((count, *Pixels.input_shape)).astype(np.float32)
    shape = (count, *getattr(loss, "target_shape", (K, SIDE, SIDE)))
    if getattr(loss, "target_dtype", "") == "int64":
        return LocalData(x, rng.integers(0, K, shape).astype(np.uint8), x[:0], np.zeros((0, *shape[1:]), np.uint8))
    y = rng.random(shape).astype(np.float32)
    return LocalData(x, y, x[:0], y[:0])


def by_torch(
    net: Pixels, loss: Any, data: LocalData, dtype: torch.dtype
) -> tuple[float, dict[str, np.ndarray[Any, Any]]]:
    """The mean loss of all samples, and its gradients."""
    net = net.to(dtype)
    net.zero_grad()
    kind = torch.int64 if data.y_train.dtype.kind in "iu" else dtype
    mean = loss(net(torch.tensor(data.x_train, dtype=dtype)), torch.tensor(np.asarray(data.y_train), dtype=kind)).mean()
    mean.backward()
    return float(mean.detach()), {n: p.grad.numpy().copy() for n, p in net.named_parameters() if p.grad is not None}


class Likely(Pixels):
    """One distribution per picture, as torch's losses of log-probabilities take it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).mean((2, 3)).log_softmax(1)


def test_a_softmax_at_the_end_stays_if_a_loss_of_ones_own_takes_its_outputs() -> None:
    torch.manual_seed(3)
    net, x = Likely(), torch.randn(5, *Pixels.input_shape)
    custom, usual = fx.load(net, loss=lambda outputs, labels: -(outputs * labels).sum(1)), fx.load(net)
    with torch.no_grad():
        probabilities, logits = net(x).numpy(), Pixels.forward(net, x).mean((2, 3)).numpy()
    np.testing.assert_allclose(outputs(custom.graph, x.numpy()), probabilities, atol=1e-6)
    np.testing.assert_allclose(outputs(usual.graph, x.numpy()), logits, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "micro_batches"),
    [
        pytest.param(
            name,
            micro_batches,
            marks=() if name != "likelihood" and micro_batches == 1 + 2 * (row % 2) else pytest.mark.soak,
        )
        for row, name in enumerate(LOSSES)
        for micro_batches in (1, 3)
    ],
)
@pytest.mark.at_push(3)
def test_a_loss_that_is_a_graph_and_its_gradients_are_torchs(net: Pixels, name: str, micro_batches: int) -> None:
    loss = LOSSES[name]
    data, recipe = samples(loss), replace(CUSTOM, accumulate=micro_batches)
    model = fx.load(net, loss=loss)
    weights = {n: v.copy() for n, v in model.tensors.items()}
    graph = training_graph(model, recipe.features).to_bytes()

    result = Trainer(graph).train(weights, data, TrainingTask(recipe, K, 0, "a", 1))

    usual, exact = (by_torch(net, loss, data, dtype) for dtype in (torch.float32, torch.float64))
    assert result.loss_first == pytest.approx(exact[0], rel=1e-5)
    for tensor, gradient in exact[1].items():
        ours = (weights[tensor].astype(np.float64) - result.tensors[tensor]) / recipe.lr
        size = np.linalg.norm(gradient)
        far = np.linalg.norm(usual[1][tensor] - gradient) / size
        # The step itself is rounded to float32: a weight of 1 loses 6e-8 of it.
        rounding = 1e-7 * np.linalg.norm(weights[tensor]) / (recipe.lr * size)
        assert np.linalg.norm(ours - gradient) / size <= max(1e-6, 2 * far) + rounding, tensor
    measured = Trainer(graph).objective(recipe, K)
    outputs = net.float()(torch.tensor(data.x_train)).detach().numpy()
    assert measured(outputs, data.y_train).loss == pytest.approx(exact[0], rel=1e-5)
    assert measured(outputs, data.y_train).accuracy is None


def test_a_model_keeps_its_loss_in_its_file(net: Pixels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.onnx").write_bytes(export_torch(net))
    (tmp_path / "losses_of_this_test.py").write_text(
        "def error(outputs, labels):\n    return (outputs - labels).abs().flatten(1).mean(1)\n"
    )
    (tmp_path / "error.onnx").write_bytes(base64.b64decode(embed_user_graph(LOSS_KEY, focal, (K, SIDE, SIDE))))
    monkeypatch.syspath_prepend(tmp_path)
    for source, operator in (("losses_of_this_test:error", "Abs"), (str(tmp_path / "error.onnx"), "Softplus")):
        model = import_onnx(read_source(tmp_path / "net.onnx", ImportChoices(loss=source)), "net")
        assert model.loss is not None
        assert operator in {n.op for n in model.loss.graph.nodes}
        reloaded = import_onnx(model.graph.to_bytes(), "net")
        assert reloaded.loss is not None
        assert reloaded.loss.graph.to_bytes() == model.loss.graph.to_bytes()
    assert import_onnx(read_source(tmp_path / "net.onnx"), "net").loss is None


def scalar(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.mse_loss(outputs, labels)


def blind(outputs: torch.Tensor) -> torch.Tensor:
    return outputs.flatten(1).mean(1)


def flat(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (outputs.argmax(1).float() - labels[:, 0]).abs().flatten(1).mean(1)


def ruleless(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.linalg.det(outputs[:, :, :4, 0]) + labels.flatten(1).mean(1)


@with_labels((SIDE, SIDE), "int64")
def mean_loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(outputs, labels) + outputs.mean((1, 2, 3))


def count_loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(outputs, labels, reduction="none").flatten(1).mean(1)


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (count_loss, r"own loss: .*Its labels are float32 \[n, 4, 6, 6\].*target_dtype"),
        (
            scalar,
            r"what a loss returns: expected one number per sample \[n\], got one number for the.*flatten\(1\)\.mean",
        ),
        (blind, r"blind: torch can't export this loss .*takes outputs \[n, 4, 6, 6\] and labels"),
        (flat, "doesn't depend on its outputs .*argmax"),
        (ruleless, r"own loss: .*\(Det\) has no gradient rule"),
        (mean_loss, r"makes one number of the whole batch: expected reduction 'none'"),
        ("nowhere_at_all:loss", "can't import nowhere_at_all"),
        ("missing.onnx", r"can't read missing\.onnx"),
    ],
)
@pytest.mark.at_push(4)
def test_a_wrong_loss_is_one_clear_error(net: Pixels, loss: Any, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        training_graph(fx.load(net, loss=loss), CUSTOM.features)


def test_a_recipe_asks_for_what_the_model_has(net: Pixels) -> None:
    with pytest.raises(ConfigError, match=r"recipe\.loss: 'custom'.*--loss"):
        training_graph(fx.load(net), CUSTOM.features)
    for wrong in ({"mixup": 0.2}, {"ignore_label": 3}, {"label_smoothing": 0.1}, {"balance_classes": True}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Recipe.from_dict({"loss": "custom", **wrong})


@pytest.mark.parametrize(
    ("name", "y", "text"),
    [
        ("likelihood", np.zeros((8, SIDE, SIDE), np.float32), r"whole numbers \[n, 6, 6\], got numbers"),
        ("of_means", np.zeros((8, 3), np.float32), r"numbers \[n, 2\], got numbers \[n, 3\]"),
    ],
)
@pytest.mark.at_push(1)
def test_labels_that_a_loss_does_not_take_are_refused(net: Pixels, name: str, y: Any, text: str) -> None:
    loss = LOSSES[name]
    model = fx.load(net, loss=loss)
    trainer = Trainer(training_graph(model, CUSTOM.features).to_bytes())
    data = LocalData(samples(loss).x_train, y, samples(loss).x_train[:0], y[:0])
    with pytest.raises(DataError, match=f"labels for loss custom: expected {text}"):
        trainer.train(model.tensors, data, TrainingTask(CUSTOM, K, 0, "a", 1))
