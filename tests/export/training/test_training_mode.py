"""Every layer of torch whose training mode differs from its evaluation is trained as torch trains it, or named."""

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from fedprune.core.errors import ModelError
from fedprune.model import step_contract
from fedprune.model.features import Features
from fedprune.model.random_inputs import Draw, RandomInputs
from fedprune.model.recipe import Recipe
from fedprune.model.step_feeds import first_step_feeds
from fedprune.runtime.session import OnnxSession
from fedprune_export.bundles.conversion import onnx_file
from fedprune_export.importing import export_torch, import_onnx
from fedprune_export.training.step_graph import training_graph
from support.oracles.cutting import outputs

pytestmark = pytest.mark.torch

CLASSES, SAMPLES, DRAWS = 3, 4, 60
ROWS, MAPS, VOLUMES = (4, 6), (4, 6, 6), (4, 3, 3, 3)

Case = tuple[Callable[[], nn.Module], tuple[int, ...]]


class Depth(nn.Module):
    """Stochastic depth as a function of a user's own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.new_empty(len(x), 1, 1).bernoulli_(0.7) / 0.7 if self.training else x


class Doubled(nn.Module):
    """A layer that does something else in training mode, and draws nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if self.training else x


class Shifted(nn.Module):
    """Noise that isn't the only effect of training mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 + torch.rand_like(x[:, :1]) if self.training else x


class Average(nn.Module):
    """A buffer that training mode changes, and what it computes with it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean.add_(x.mean())
        return x - self.mean


def recurrent(kind: type[nn.Module], *, ways: int = 1) -> Case:
    return partial(kind, 6, 5, 2, dropout=0.3, batch_first=True, bidirectional=ways == 2), (2, 6)


TRAINED: dict[str, Case] = {
    "AlphaDropout": (partial(nn.AlphaDropout, 0.3), ROWS),
    "Dropout": (partial(nn.Dropout, 0.3), ROWS),
    "Dropout1d": (partial(nn.Dropout1d, 0.3), ROWS),
    "Dropout2d": (partial(nn.Dropout2d, 0.3), MAPS),
    "Dropout3d": (partial(nn.Dropout3d, 0.3), VOLUMES),
    "FeatureAlphaDropout": (partial(nn.FeatureAlphaDropout, 0.3), MAPS),
    "BatchNorm2d": (partial(nn.BatchNorm2d, 4), MAPS),
    "InstanceNorm2d": (partial(nn.InstanceNorm2d, 4, track_running_stats=True), MAPS),
    "GRU": recurrent(nn.GRU),
    "LSTM": recurrent(nn.LSTM),
    "RNN": recurrent(nn.RNN, ways=2),
    "RReLU": (nn.RReLU, ROWS),
    "TransformerEncoderLayer": (partial(nn.TransformerEncoderLayer, 6, 2, 8, dropout=0.2, batch_first=True), ROWS),
    "a user's own": (Depth, ROWS),
    "SyncBatchNorm": (partial(nn.SyncBatchNorm, 4), ROWS),
    "BatchNorm1d without statistics": (partial(nn.BatchNorm1d, 4, track_running_stats=False), ROWS),
}
# What a step draws where several numbers decide it; the ratio of a recurrent layer lies between its two.
RATIOS = {"GRU": [0.3], "LSTM": [0.3], "RNN": [0.3], "TransformerEncoderLayer": [0.2] * 4}
# With what the note or the refusal says.
NAMED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "BatchNorm1d by cumulative means": (partial(nn.BatchNorm1d, 4, momentum=None), ROWS, "are never updated.* None"),
    "FractionalMaxPool2d": (partial(nn.FractionalMaxPool2d, 2, output_size=3), MAPS, "fractional_max_pool2d"),
    "spectral norm": (
        lambda: parametrizations.spectral_norm(nn.Linear(6, 6)),
        ROWS,
        "Buffers that torch's training mode changes .*SpectralNorm",
    ),
    "a user's own buffer": (
        lambda: nn.Sequential(nn.Linear(6, 6), Average(), nn.ReLU()),
        ROWS,
        r"^Buffers that torch's training mode changes \(mean\) in layer\.1 \(Average\): [^:]*$",
    ),
    "a user's own and noise": (Shifted, ROWS, "rand_like"),
    "a user's own beside a norm": (
        lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.3), Doubled()),
        ROWS,
        r"layer\.2 \(Doubled\): torch's training mode computes something else",
    ),
}


class Net(nn.Module):
    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layer, self.input_shape = layer, shape
        self.head = nn.Linear(self._rows(torch.zeros(2, *shape)).shape[1], CLASSES)

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        y: Any = self.layer(x)
        return (y[0] if isinstance(y, tuple) else y).flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self._rows(x))


def net_of(case: Case) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(case[0](), case[1])


def layers_with_a_training_mode() -> set[str]:
    """The names of torch's layers whose code reads `training`."""

    def reads_training(kind: type[nn.Module]) -> bool:
        functions = [f for base in kind.__mro__ if base is not nn.Module for f in vars(base).values()]
        return any("training" in f.__code__.co_names for f in functions if inspect.isfunction(f))

    kinds = {n: k for n, k in vars(nn).items() if inspect.isclass(k) and issubclass(k, nn.Module)}
    return {name for name, kind in kinds.items() if reads_training(kind)}


def test_every_layer_of_torch_with_a_training_mode_has_a_case() -> None:
    kinds = {name.removeprefix("Lazy") for name in layers_with_a_training_mode()}
    # The encoder layer has the attention, and the encoder has nothing besides; norms of all ranks are the same code.
    shared = {
        "MultiheadAttention",
        "TransformerEncoder",
        *(f"{n}Norm{d}d" for n in ("Batch", "Instance") for d in (1, 3)),
    }
    assert kinds - shared == {k for k in TRAINED if hasattr(nn, k)}


@pytest.mark.parametrize("kind", TRAINED)
def test_losses_and_gradients_of_steps_are_distributed_as_torchs(kind: str) -> None:
    net = net_of(TRAINED[kind])
    model = import_onnx(export_torch(net), kind)
    assert "training mode" not in "".join(model.notes)
    model = import_onnx(onnx_file(model.graph, model.tensors, kind), kind)
    session = OnnxSession(training_graph(model, Features(gradients=True)).to_bytes(), training=True)
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((SAMPLES, *TRAINED[kind][1]), np.float32), rng.integers(0, CLASSES, SAMPLES)
    recipe = Recipe(report_squares=True)
    feeds = {**first_step_feeds(recipe, model.tensors, session.inputs, y, CLASSES), step_contract.X: x, "y": y}
    random = RandomInputs.of(session.inputs, session.metadata)
    names = [step_contract.LOSS, *(step_contract.gradient_name(n) for n, _ in net.named_parameters())]
    assert kind not in RATIOS or [*random.draws.values()] == [Draw.dropout(ratio) for ratio in RATIOS[kind]]
    draws = DRAWS if random.draws else 1
    ours, torchs = list[list[float]](), list[list[float]]()
    net.train()
    torch.manual_seed(0)
    for draw in range(draws):
        results = session.run({**feeds, **random.draw(feeds, SAMPLES, draw, "key")}, names)
        ours.append([float(np.linalg.norm(results[name])) for name in names])
        net.zero_grad()
        loss = nn.functional.cross_entropy(net(torch.tensor(x)), torch.tensor(y))
        loss.backward()
        torchs.append([loss.item(), *(float(p.grad.norm()) for p in net.parameters() if p.grad is not None)])
    # Means may differ by five standard errors; where nothing is drawn, by rounding.
    means, spreads = np.mean(torchs, 0), np.std(torchs, 0)
    assert (np.abs(np.mean(ours, 0) - means) <= 1e-4 * means + 1e-5 + 5 * spreads * np.sqrt(2 / draws)).all()
    np.testing.assert_allclose(np.std(ours, 0), spreads, rtol=0.6, atol=1e-4)


@pytest.mark.parametrize("kind", NAMED)
def test_what_is_not_trained_as_torch_trains_it_is_named(kind: str) -> None:
    make, shape, text = NAMED[kind]
    net = net_of((make, shape)).train()
    before, state = {n: v.clone() for n, v in net.state_dict().items()}, torch.get_rng_state()
    try:
        model = import_onnx(export_torch(net), kind)
    except ModelError as error:
        notes = f"{error}"
    else:
        notes, x = "\n".join(model.notes), np.random.default_rng(0).standard_normal((SAMPLES, *shape), np.float32)
        evaluated = net_of((make, shape)).eval()
        evaluated.load_state_dict(net.state_dict())
        with torch.no_grad():
            np.testing.assert_allclose(outputs(model.graph, x), evaluated(torch.tensor(x)), rtol=1e-4, atol=1e-5)
    assert re.search(text, notes)
    assert net.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())
