"""Whole rounds by every kind of recipe: the board's trainer on compiled graphs, against torch in float64."""

from typing import Any

import numpy as np
import pytest

from fedprune.core.rng import keyed_generator
from fedprune.model.architecture import widths_at
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection, Tensors
from fedprune.model.trainable import trained_tensors
from fedprune.runtime.session import OnnxSession
from fedprune_device.data.dataset import LocalData
from fedprune_device.data.labels import class_weights, positive_weights
from fedprune_device.training.trainer import Trainer
from fedprune_device.training.training_task import TrainingTask
from fedprune_export.importing import export_torch, import_onnx
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402 - torch may not be there
from torch.nn import functional  # noqa: E402

pytestmark = pytest.mark.torch

CLASSES, SAMPLES = 3, 41


class Net(nn.Module):
    """No normalisation, so that parts of a batch are the batch; smooth, so that no decision falls the other way."""

    input_shape = (2, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.fc = nn.Linear(8 * 16, CLASSES)

    def forward(self, x: Any) -> Any:
        x = torch.tanh(self.conv2(torch.tanh(self.conv1(x))))
        return self.fc(torch.flatten(x, 1))


class Slim(Net):
    """The same at other widths."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        nn.Module.__init__(self)
        first, second = widths
        self.conv1, self.conv2 = nn.Conv2d(2, first, 3, padding=1), nn.Conv2d(first, second, 3, stride=2, padding=1)
        self.fc = nn.Linear(second * 16, CLASSES)


@pytest.fixture(scope="module")
def model() -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return import_onnx(export_torch(Net()), "net")


def data(loss: str) -> LocalData:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((SAMPLES, 2, 8, 8)).astype(np.float32)
    y: Any = rng.integers(0, CLASSES, SAMPLES)
    if loss == "bce":
        y = rng.random((SAMPLES, CLASSES)) < 0.3
    if loss in ("mse", "huber"):
        y = rng.standard_normal((SAMPLES, CLASSES)).astype(np.float32)
    return LocalData(x, y, x[:0], y[:0])


def criterion(recipe: Recipe, z: Any, y: Any, weights: Any) -> Any:
    if recipe.loss == "cross_entropy":
        return functional.cross_entropy(z, y, weights, label_smoothing=recipe.label_smoothing)
    if recipe.loss == "bce":
        return functional.binary_cross_entropy_with_logits(z, y.to(z.dtype), pos_weight=weights)
    if recipe.loss == "mse":
        return functional.mse_loss(z, y.to(z.dtype))
    return functional.huber_loss(z, y.to(z.dtype), delta=recipe.huber_delta)


def mixed_loss(recipe: Recipe, net: nn.Module, x: Any, y: Any, weights: Any, rows: Any, number: int) -> Any:
    """As the authors of mixup write it: samples mixed, and the criterion's values for classes; other labels mixed."""
    if not recipe.mixup:
        return criterion(recipe, net(x[rows]), y[rows], weights)
    rng = keyed_generator(7, 1, "d", "mixup", number)
    share = float(np.float32(rng.beta(recipe.mixup, recipe.mixup)))
    parts = np.array_split(rows, -(-len(rows) // recipe.micro_batch))
    others = np.concatenate([part[rng.permutation(len(part))] for part in parts])
    z = net(share * x[rows] + (1 - share) * x[others])
    if recipe.loss == "cross_entropy":
        own, other = (criterion(recipe, z, y[r], weights) for r in (rows, others))
        return share * own + (1 - share) * other
    return criterion(recipe, z, share * y[rows].to(z.dtype) + (1 - share) * y[others].to(z.dtype), weights)


def optimizer(recipe: Recipe, parameters: list[Any]) -> Any:
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, recipe.lr, (recipe.beta1, recipe.beta2), recipe.epsilon, recipe.weight_decay)


def oracle(recipe: Recipe, model: Model, tensors: Tensors, widths: tuple[int, ...], dtype: Any) -> Tensors:
    """The same rounds with torch's own loops, on whole batches."""
    local, net = data(recipe.loss), Slim(widths).to(dtype).train()
    net.load_state_dict({n: torch.tensor(v) for n, v in tensors.items()})
    names = {t.name for t in trained_tensors(model.architecture, recipe.features)}
    leaves = [p for n, p in net.named_parameters() if n in names]
    start = [p.detach().clone() for p in leaves]
    made = optimizer(recipe, leaves)
    weights = None
    if recipe.balance_classes:
        found = positive_weights(local.y_train) if recipe.loss == "bce" else class_weights(local.y_train, CLASSES)
        weights = torch.tensor(found, dtype=dtype)
    x, y = torch.tensor(local.x_train, dtype=dtype), torch.tensor(local.y_train)
    number = 0
    for epoch in range(recipe.epochs):
        order = keyed_generator(7, 1, "d", "batches", epoch).permutation(SAMPLES)
        for at in range(0, SAMPLES, recipe.batch_size):
            rows = order[at : at + recipe.batch_size]
            number += 1
            loss = mixed_loss(recipe, net, x, y, weights, rows, number)
            pull = sum(((p - s) ** 2).sum() for p, s in zip(leaves, start, strict=True))
            made.zero_grad()
            (loss + recipe.proximal / 2 * pull).backward()
            if recipe.clip_norm:
                torch.nn.utils.clip_grad_norm_(leaves, recipe.clip_norm)
            made.step()
    return {n: v.detach().numpy() for n, v in net.state_dict().items()}


ROUNDS: dict[str, Recipe] = {
    "sgd": Recipe(weight_decay=0.01, label_smoothing=0.1, balance_classes=True),
    "sgd in parts": Recipe(weight_decay=0.01, label_smoothing=0.1, balance_classes=True, accumulate=3, clip_norm=0.2),
    "adam": Recipe(optimizer="adam", lr=0.01, weight_decay=0.05, clip_norm=0.5),
    "adam in parts": Recipe(optimizer="adam", lr=0.01, weight_decay=0.05, clip_norm=0.5, accumulate=8, proximal=0.3),
    "adamw": Recipe(optimizer="adamw", lr=0.01, weight_decay=0.1, beta2=0.95),
    "bce": Recipe(loss="bce", lr=0.1, balance_classes=True, accumulate=2),
    "mse": Recipe(loss="mse", lr=0.1, accumulate=5, proximal=0.1),
    "huber": Recipe(loss="huber", huber_delta=0.3, optimizer="adamw", lr=0.01),
    "mixup": Recipe(mixup=0.4, weight_decay=0.01, label_smoothing=0.1, clip_norm=0.5),
    "mixup in parts": Recipe(mixup=1.0, balance_classes=True, accumulate=3),
    "mixup of labels": Recipe(mixup=0.5, loss="bce", lr=0.1, balance_classes=True, accumulate=2),
    "mixup of numbers": Recipe(mixup=2.0, loss="huber", huber_delta=0.3, lr=0.05),
    "frozen": Recipe(frozen=("conv1.*",), optimizer="adam", lr=0.01, accumulate=2, clip_norm=1.0),
    "biases": Recipe(trainable=("*.bias", "fc.*"), lr=0.2),
}


@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize("name", ROUNDS)
def test_a_round_is_as_near_to_float64_as_torchs(model: Model, name: str, density: float) -> None:
    recipe = Recipe.from_dict({**ROUNDS[name].to_dict(), "epochs": 2, "batch_size": 8})
    architecture = model.architecture
    selection = Selection.of(architecture, widths_at(architecture, density))
    tensors = selection.gather(model.tensors)
    trainer = Trainer(training_graph(model, recipe.features).to_bytes())
    got = trainer.train(
        tensors, data(recipe.loss), TrainingTask(recipe, seed=7, device="d", round=1, classes=CLASSES)
    ).tensors
    exact, usual = (oracle(recipe, model, tensors, selection.widths, t) for t in (torch.float64, torch.float32))

    def error(found: Tensors) -> float:
        off = sum(float(np.sum((found[n].astype(np.float64) - exact[n]) ** 2)) for n in exact)
        return float(np.sqrt(off / sum(float(np.sum(v.astype(np.float64) ** 2)) for v in exact.values())))

    assert error(got) <= max(1e-6, 2 * error(usual))
    for spec in architecture.tensors:
        if spec.name not in trainer.trainable:
            assert got[spec.name].tobytes() == tensors[spec.name].tobytes()


def test_parts_need_the_memory_of_a_part(model: Model) -> None:
    """No run of the graph sees more samples than a part has."""
    seen: list[int] = []
    recipe = Recipe(batch_size=32, accumulate=4)
    graph = training_graph(model, recipe.features).to_bytes()
    session = OnnxSession(graph, training=True)
    run = session.run

    def watched(feeds: Any, outputs: Any, into: Any) -> Any:
        seen.append(len(feeds["x"]))
        return run(feeds, outputs, into)

    session.run = watched  # type: ignore[method-assign]
    trainer = Trainer(graph, session=session)
    trainer.train(
        model.tensors, data("cross_entropy"), TrainingTask(recipe, seed=7, device="d", round=1, classes=CLASSES)
    )
    assert seen == [8, 8, 8, 8, 5, 4]


class Reader(nn.Module):
    """Reads words; the table of words is frozen by its author."""

    input_shape, input_dtype = (6,), torch.int64

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(20, 8), nn.Linear(8, 12), nn.Linear(12, CLASSES)
        self.words.weight.requires_grad_(False)

    def forward(self, x: Any) -> Any:
        return self.head(torch.tanh(self.mix(self.words(x))).mean(1))


@pytest.mark.parametrize("thawed", [False, True])
def test_words_are_read_and_what_the_author_froze_stays(thawed: bool) -> None:
    """A recipe may train what the author froze by naming it."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = Reader()
    model = import_onnx(export_torch(net), "reader")
    recipe = Recipe(epochs=3, batch_size=8, lr=0.3, trainable=("*",) if thawed else ())
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 20, (SAMPLES, 6)), rng.integers(0, CLASSES, SAMPLES)
    trainer = Trainer(training_graph(model, recipe.features).to_bytes())
    assert (trainer.frozen, trainer.input_type.is_whole) == (() if thawed else ("words.weight",), True)
    local = LocalData(x, y, x[:0], y[:0])
    got = trainer.train(
        model.tensors, local, TrainingTask(recipe, seed=7, device="d", round=1, classes=CLASSES)
    ).tensors
    net = net.double().train()
    net.words.weight.requires_grad_(thawed)
    made = optimizer(recipe, [p for p in net.parameters() if p.requires_grad])
    for epoch in range(3):
        order = keyed_generator(7, 1, "d", "batches", epoch).permutation(SAMPLES)
        for at in range(0, SAMPLES, 8):
            rows = order[at : at + 8]
            made.zero_grad()
            functional.cross_entropy(net(torch.tensor(x[rows])), torch.tensor(y[rows])).backward()
            made.step()
    for name, value in net.state_dict().items():
        np.testing.assert_allclose(got[name], value.numpy(), rtol=1e-4, atol=2e-6, err_msg=name)
    assert (got["words.weight"].tobytes() == model.tensors["words.weight"].tobytes()) is not thawed
