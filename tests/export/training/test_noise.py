"""Random numbers of models in training steps: the same numbers give torch's gradients; predictions can be repeated."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from fedprune.core.errors import ModelError, TrainingError
from fedprune.model import step_contract
from fedprune.model.features import Features
from fedprune.model.random_inputs import Draw, RandomInputs
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.model.step_feeds import first_step_feeds
from fedprune.runtime.session import OnnxSession
from fedprune_device.data.dataset import LocalData
from fedprune_device.training.trainer import Trainer
from fedprune_device.training.training_task import TrainingTask
from fedprune_export.bundles.conversion import onnx_file
from fedprune_export.importing import export_torch, import_onnx
from fedprune_export.pruning.cut import cut
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph

pytestmark = pytest.mark.torch

Array = np.ndarray[Any, Any]
Drawn = Sequence[torch.Tensor]
CLASSES, SAMPLES = 3, 6


def step_of(model: Model, **features: Any) -> OnnxSession:
    return OnnxSession(training_graph(model, Features(**features)).to_bytes(), training=True)


def draws_of(model: Model) -> dict[str, Draw]:
    session = step_of(model)
    return dict(RandomInputs.of(session.inputs, session.metadata).draws)


def predict(model: Model, x: Array) -> Array:
    out: Array = OnnxSession(cut(model, Selection.full(model.architecture)).to_bytes()).run({"x": x})["logits"]
    return out


def samples_of(model: Model, count: int = SAMPLES) -> tuple[Array, Array]:
    rng = np.random.default_rng(1)
    return rng.standard_normal((count, *model.architecture.input_shape), np.float32), rng.integers(0, CLASSES, count)


class Coder(nn.Module):
    """A variational encoder, which samples whether it trains or not."""

    input_shape = (5,)
    draws = (Draw("normal", 0.0, 1.0),)

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.fc, self.mean, self.log_variance = nn.Linear(5, 7), nn.Linear(7, width), nn.Linear(7, width)
        self.out = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor, drawn: Drawn = ()) -> torch.Tensor:
        h = torch.relu(self.fc(x))
        mean, deviation = self.mean(h), torch.exp(0.5 * self.log_variance(h))
        return self.out(mean + deviation * (drawn[0] if drawn else torch.randn_like(deviation)))


class Noise(nn.Module):
    def __init__(self, deviation: float) -> None:
        super().__init__()
        self.deviation = deviation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn_like(x) * self.deviation if self.training else x


class Path(nn.Module):
    """Stochastic depth by a function, as it is written without a module of its own, around a layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y = torch.relu(self.fc(x))
        if mask is not None:
            return x + y * mask
        return x + y if not self.training else x + y * x.new_empty((len(x), 1)).bernoulli_(0.75) / 0.75


class Training(nn.Module):
    """Random numbers of training mode alone: noise, and the depth of a branch."""

    input_shape = (5,)
    draws = (Draw("normal", 0.0, 1.0), Draw.dropout(0.25))

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.fc, self.noise, self.path = nn.Linear(5, width), Noise(0.3), Path(width)
        self.out = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor, drawn: Drawn = ()) -> torch.Tensor:
        h = self.fc(x)
        h = h + drawn[0] * 0.3 if drawn else self.noise(h)
        return self.out(self.path(h, drawn[1] if drawn else None))


class Selu(nn.Module):
    """Alpha dropout of numbers and of channels."""

    input_shape = (2, 6)
    draws = ()

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(2, width, 3), nn.Conv1d(width, width, 3)
        self.fc = nn.Linear(width, CLASSES)
        self.channels, self.numbers = nn.FeatureAlphaDropout(0.4), nn.AlphaDropout(0.2)

    def forward(self, x: torch.Tensor, drawn: Drawn = ()) -> torch.Tensor:
        x = torch.selu(self.conv1(x))
        x = torch_alpha(x, drawn[1], 0.4) if drawn else self.channels(x)
        x = torch.selu(self.conv2(x))
        x = torch_alpha(x, drawn[3], 0.2) if drawn else self.numbers(x)
        return self.fc(x.mean(2))


def torch_alpha(x: torch.Tensor, mask: torch.Tensor, p: float) -> torch.Tensor:
    """Alpha dropout as torch computes it (aten/src/ATen/native/Dropout.cpp), from a mask with 0 for dropped numbers."""
    alpha = 1.7580993408473766
    a = 1 / math.sqrt((alpha * alpha * p + 1) * (1 - p))
    kept = (mask != 0).float()
    return x * kept * a + (kept - 1) * alpha * a + alpha * a * p


class Recurrent(nn.Module):
    """Recurrent layers with dropout between them."""

    input_shape = (2, 4)
    draws = (Draw.dropout(0.3), Draw.dropout(0.2))

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, width, 2, dropout=0.3, batch_first=True)
        self.gru = nn.GRU(width, 3, 2, dropout=0.2, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor, drawn: Drawn = ()) -> torch.Tensor:
        if not drawn:
            return self.fc(self.gru(self.lstm(x)[0])[0][:, -1])
        masks = iter(drawn)
        for rnn, call, states in ((self.lstm, torch.lstm, 2), (self.gru, torch.gru, 1)):
            ways = 2 if rnn.bidirectional else 1
            size = 4 * ways
            for layer in range(rnn.num_layers):
                x = x * next(masks) if layer else x
                zeros = [x.new_zeros(ways, len(x), rnn.hidden_size)] * states
                weights = rnn._flat_weights[layer * size : (layer + 1) * size]
                first = zeros if states == 2 else zeros[0]
                x = call(x, first, weights, True, 1, 0.0, False, ways == 2, True)[0]  # type: ignore[operator]
        return self.fc(x[:, -1])


NETS: dict[str, Callable[..., Any]] = {"coder": Coder, "training": Training, "selu": Selu, "recurrent": Recurrent}
MODELS: dict[str, tuple[Any, Model]] = {}


def model_of(kind: str) -> tuple[Any, Model]:
    if kind not in MODELS:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = NETS[kind]()
        MODELS[kind] = module, import_onnx(export_torch(module), kind)
    return MODELS[kind]


@pytest.mark.parametrize("kind", NETS)
def test_gradients_are_torchs_with_the_same_draws(kind: str) -> None:
    module, model = model_of(kind)
    session = step_of(model, gradients=True)
    x, y = samples_of(model)
    feeds = first_step_feeds(Recipe(report_squares=True), model.tensors, session.inputs, y, CLASSES)
    random = RandomInputs.of(session.inputs, session.metadata)
    drawn = random.draw(feeds, SAMPLES, 7, "key")
    if module.draws:
        assert list(random.draws.values()) == [*module.draws]
    out = session.run({**feeds, **drawn, step_contract.X: x, step_contract.Y: y})
    module.zero_grad()
    loss = nn.functional.cross_entropy(module(torch.tensor(x), [*map(torch.tensor, drawn.values())]), torch.tensor(y))
    loss.backward()
    np.testing.assert_allclose(out[step_contract.LOSS], loss.item(), rtol=1e-5)
    for name, value in module.named_parameters():
        np.testing.assert_allclose(out[step_contract.gradient_name(name)], value.grad.numpy(), atol=1e-5)


@pytest.mark.parametrize("kind", NETS)
def test_predictions_take_means_and_are_those_of_evaluation(kind: str) -> None:
    module, model = model_of(kind)
    x, y = samples_of(model)
    zeros = [torch.zeros(())] if kind == "coder" else []
    with torch.no_grad():
        expected = module.eval()(torch.tensor(x), zeros)
    logits = predict(model, x)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    np.testing.assert_array_equal(logits, predict(model, x))
    loss = Trainer(training_graph(model, Features()).to_bytes()).loss(
        model.tensors, LocalData(x, y, x[:0], y[:0]), Recipe(), CLASSES, SAMPLES
    )
    assert loss == pytest.approx(nn.functional.cross_entropy(expected, torch.tensor(y)).item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["coder", "recurrent"])
def test_a_board_and_its_simulation_draw_the_same_bits(kind: str) -> None:
    _, model = model_of(kind)
    x, y = samples_of(model, 12)
    recipe, data = Recipe(epochs=2, batch_size=4, lr=0.05), LocalData(x, y, x[:0], y[:0])

    def train_round(round_: int) -> dict[str, Array]:
        trainer = Trainer(training_graph(model, recipe.features).to_bytes())
        return dict(trainer.train(model.tensors, data, TrainingTask(recipe, CLASSES, 3, "a", round_)).tensors)

    first, repeated, later = train_round(1), train_round(1), train_round(2)
    assert all(np.array_equal(first[n], repeated[n]) for n in first)
    assert any(not np.array_equal(first[n], later[n]) for n in first)


class Both(nn.Module):
    """Alpha dropout beside noise: both are listed in the file's metadata."""

    input_shape = (5,)

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.drop, self.fc2 = nn.Linear(5, 6), nn.AlphaDropout(0.25), nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.drop(torch.selu(self.fc1(x)))
        return self.fc2(h + torch.randn_like(h))


def test_draws_survive_a_file() -> None:
    model = import_onnx(export_torch(Both()), "both")
    assert draws_of(import_onnx(onnx_file(model.graph, model.tensors, "again"), "again")) == draws_of(model)
    assert sorted(draw.kind for draw in draws_of(model).values()) == ["mask", "mask", "normal"]


class Shifted(nn.Module):
    """Noise that isn't the only effect of training mode."""

    input_shape = (5,)

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) * 2 + torch.rand_like(x[:, :1]) if self.training else self.fc(x)


def test_noise_that_isnt_the_only_effect_of_training_mode_is_left_out_with_a_note() -> None:
    module = Shifted()
    model = import_onnx(export_torch(module), "shifted")
    assert not draws_of(model)
    assert "rand_like" in "\n".join(model.notes)
    x, _ = samples_of(model)
    np.testing.assert_allclose(predict(model, x), module.eval()(torch.tensor(x)).detach(), atol=1e-5)


class Chosen(nn.Module):
    """A choice of units by straight-through Gumbel noise, and bits with computed probabilities."""

    input_shape = (5,)

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(5, 6), nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.fc1(x)
        bits = torch.bernoulli(torch.sigmoid(h)) + torch.empty_like(h).uniform_(-1, 3)
        return self.fc2(nn.functional.gumbel_softmax(h, hard=True) * bits)


def test_choices_and_bits_are_the_likelier_ones_in_predictions() -> None:
    module = Chosen()
    model = import_onnx(export_torch(module), "chosen")
    assert sorted(draw.to_json() for draw in draws_of(model).values()) == [
        ["uniform", -1, 3],
        ["uniform", 0, 1],
        ["uniform", 0, 1],
    ]
    x, _ = samples_of(model)
    h = module.fc1(torch.tensor(x))
    expected = module.fc2(nn.functional.one_hot(h.argmax(1), 6) * ((h > 0).float() + 1))
    np.testing.assert_allclose(predict(model, x), expected.detach(), atol=1e-5)


# -- ONNX files --------------------------------------------------------------------------------------------------------


def onnx_model(nodes: Sequence[onnx.NodeProto], batch: str | int = "N", opset: int = 17) -> bytes:
    """A file of x [N, 5] → h [N, 6] → (nodes) → d → y."""
    rng, node, value = np.random.default_rng(0), onnx.helper.make_node, onnx.helper.make_tensor_value_info
    tensors = {"w": rng.standard_normal((5, 6), np.float32), "v": rng.standard_normal((6, CLASSES), np.float32)}
    graph = onnx.helper.make_graph(
        [node("MatMul", ["x", "w"], ["h"]), *nodes, node("MatMul", ["d", "v"], ["y"])],
        "g",
        [value("x", 1, [batch, 5])],
        [value("y", 1, [batch, CLASSES])],
        [onnx.numpy_helper.from_array(v, k) for k, v in tensors.items()],
    )
    opsets = [onnx.helper.make_opsetid("", opset)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=7).SerializeToString()


def drawn_nodes(op: str, inputs: Sequence[str], **attributes: Any) -> list[onnx.NodeProto]:
    """d = h + what an operator draws."""
    node = onnx.helper.make_node
    return [node(op, inputs, ["r"], **attributes), node("Add", ["h", "r"], ["d"])]


DRAWS: dict[str, tuple[list[onnx.NodeProto], str | int, int, Draw, int]] = {
    "normal like": (drawn_nodes("RandomNormalLike", ["h"], mean=0.5, scale=0.1), "N", 17, Draw("normal", 0.5, 0.1), 4),
    "uniform like": (drawn_nodes("RandomUniformLike", ["h"], high=3.0), "N", 9, Draw("uniform", 0.0, 3.0), 4),
    "one for all": (drawn_nodes("RandomNormal", [], shape=[1, 6], seed=3.0), "N", 17, Draw("normal", 0.0, 1.0), 1),
    "fixed batch": (drawn_nodes("RandomUniform", [], shape=[2, 6]), 2, 17, Draw("uniform", 0.0, 1.0), 4),
}


@pytest.mark.parametrize("kind", DRAWS)
def test_draws_of_a_file_are_inputs_of_a_step_and_means_in_predictions(kind: str) -> None:
    nodes, batch, opset, draw, rows = DRAWS[kind]
    model = import_onnx(onnx_model(nodes, batch, opset), "file")
    session = step_of(model)
    random = RandomInputs.of(session.inputs, session.metadata)
    ((name, found),) = random.draws.items()
    assert found == draw
    assert random.draw(model.tensors, 4, 0)[name].shape == (rows, 6)
    x, _ = samples_of(model, 4)
    expected = (x @ model.tensors["w"] + draw.mean) @ model.tensors["v"]
    np.testing.assert_allclose(predict(model, x), expected, rtol=1e-4, atol=1e-5)
    assert any("draw" in note for note in model.notes)


def test_a_bernoulli_with_a_constant_probability_is_a_dropout_of_its_mean() -> None:
    node = onnx.helper.make_node
    share = onnx.numpy_helper.from_array(np.array([0.25], np.float32))
    nodes = [
        node("Shape", ["h"], ["s"]),
        node("ConstantOfShape", ["s"], ["p"], value=share),
        node("Bernoulli", ["p"], ["b"]),
        node("Mul", ["h", "b"], ["d"]),
    ]
    model = import_onnx(onnx_model(nodes), "file")
    assert list(draws_of(model).values()) == [Draw.dropout(0.75)]
    x, _ = samples_of(model)
    np.testing.assert_allclose(predict(model, x), 0.25 * (x @ model.tensors["w"]) @ model.tensors["v"], rtol=1e-4)


def test_numbers_are_drawn_as_onnxruntime_draws_them() -> None:
    # Both ends of the comparison are random: means and deviations of 60,000 numbers, within five standard errors.
    for op, attributes, draw in (
        ("RandomNormal", {"mean": 2.0, "scale": 0.5}, Draw("normal", 2.0, 0.5)),
        ("RandomUniform", {"low": -1.0, "high": 3.0}, Draw("uniform", -1.0, 3.0)),
    ):
        node = onnx.helper.make_node(op, [], ["r"], shape=[60_000], seed=5.0, **attributes)
        graph = onnx.helper.make_graph([node], "g", [], [onnx.helper.make_tensor_value_info("r", 1, [60_000])])
        file = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=7)
        expected = OnnxSession(file.SerializeToString()).run({})["r"]
        numbers = draw.sample(np.random.default_rng(0), (60_000,))
        error = 5 * float(expected.std()) * math.sqrt(2 / 60_000)
        assert numbers.dtype == np.float32
        assert numbers.mean() == pytest.approx(float(expected.mean()), abs=error)
        assert numbers.std() == pytest.approx(float(expected.std()), abs=error)


def test_numbers_that_only_few_categories_draw_are_refused() -> None:
    nodes = [
        onnx.helper.make_node("Multinomial", ["h"], ["m"]),
        onnx.helper.make_node("Cast", ["m"], ["f"], to=1),
        onnx.helper.make_node("Add", ["h", "f"], ["d"]),
    ]
    with pytest.raises(ModelError, match="Multinomial"):
        import_onnx(onnx_model(nodes), "file")


@pytest.mark.parametrize("text", ["3", '{"d": ["normal", 0]}', '{"d": ["normal", 0, -1]}', '{"d": ["uniform", 1, 0]}'])
def test_draws_of_a_damaged_file_are_refused(text: str) -> None:
    proto = onnx.load_from_string(onnx_model([onnx.helper.make_node("Dropout", ["h"], ["d"])]))
    onnx.helper.set_model_props(proto, {"fedprune.draws": text})
    with pytest.raises(ModelError, match=r"fedprune\.draws"):
        import_onnx(proto.SerializeToString(), "file")
    inputs, text = {"d::noise": ("tensor(float)", ("N", 3))}, text.replace('"d"', '"d::noise"')
    with pytest.raises(TrainingError):
        RandomInputs.of(inputs, {step_contract.RANDOM_METADATA: text})
