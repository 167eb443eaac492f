"""Dropout, noise and instance norms in training steps: the same draws give torch's gradients; predictions draw none."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from fedprune.core.errors import ModelError, TrainingError
from fedprune.model import step_contract
from fedprune.model.features import Features
from fedprune.model.random_inputs import Draw, RandomInputs, shape_in_numbers, solve_sizes
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.model.step_feeds import first_step_feeds
from fedprune.runtime.session import OnnxSession
from fedprune_device.data.dataset import LocalData
from fedprune_device.training.trainer import Trainer
from fedprune_device.training.training_task import TrainingTask
from fedprune_export.bundles.conversion import onnx_file
from fedprune_export.bundles.inference import inference_model
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


def ratios_of(model: Model) -> list[float]:
    """The shares of numbers that the masks of a model's training step drop."""
    return [draw.first for draw in draws_of(model).values()]


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
        self.fc, self.mean, self.log_variance = nn.Linear(5, width), nn.Linear(width, width), nn.Linear(width, width)
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
    """Stochastic depth by a function, as it is written without a module of its own: two branches share a mask."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        if mask is None:
            mask = x.new_empty((len(x), 1)).bernoulli_(0.75) / 0.75 if self.training else torch.ones(1)
        return torch.tanh(x) * mask + torch.relu(self.fc(x)) * mask


class Training(nn.Module):
    """Random numbers of training mode alone: noise, and the depth of a branch."""

    input_shape = (5,)
    draws = (Draw("normal", 0.0, 1.0), Draw.dropout(0.25))

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        # A name that torch.fx.GraphModule has, too.
        self.fc, self.noise, self.graph = nn.Linear(5, width), Noise(0.3), Path(width)
        self.out = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor, drawn: Drawn = ()) -> torch.Tensor:
        h = self.fc(x)
        h = h + drawn[0] * 0.3 if drawn else self.noise(h)
        return self.out(self.graph(h, drawn[1] if drawn else None))


class DropPath(nn.Module):
    """Stochastic depth, as timm writes it."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty((len(x),) + (1,) * (x.ndim - 1)).bernoulli_(keep) / keep


class Spatial(nn.Module):
    """Dropout of pixels, of channels, of whole samples and of a vector; masks, where they are given, in this order."""

    input_shape = (2, 6, 6)
    draws = (Draw.dropout(0.1), Draw.dropout(0.25), Draw.dropout(0.5), Draw.dropout(0.4))

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, width, 3), nn.Conv2d(width, width, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(width * 16, width), nn.Linear(width, CLASSES)
        self.pixels, self.channels, self.path = nn.Dropout(0.1), nn.Dropout2d(0.25), DropPath(0.5)

    def forward(self, x: torch.Tensor, masks: Drawn = ()) -> torch.Tensor:
        x = torch.relu(self.conv1(x))
        x = self.pixels(x) if not masks else x * masks[0]
        y = torch.relu(self.conv2(x))
        y = self.channels(y) if not masks else y * masks[1]
        x = x + (self.path(y) if not masks else y * masks[2])
        x = torch.relu(self.fc1(x.flatten(1)))
        return self.fc2(nn.functional.dropout(x, 0.4, self.training) if not masks else x * masks[3])


class Rows(nn.Module):
    """Attention whose weights are dropped, and a vector that is dropped whether the module trains or not."""

    input_shape = (4, 6)
    draws = (Draw.dropout(0.3), Draw.dropout(0.2))

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, width) for _ in range(3))
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor, masks: Drawn = ()) -> torch.Tensor:
        q, k, v = (layer(x)[:, None] for layer in (self.q, self.k, self.v))
        if not masks:
            y = nn.functional.scaled_dot_product_attention(q, k, v, None, 0.3 if self.training else 0.0, scale=0.4)
        else:
            y = ((q @ k.transpose(-2, -1) * 0.4).softmax(-1) * masks[0]) @ v
        y = y[:, 0].mean(1)
        return self.fc(nn.functional.dropout(y, 0.2) if not masks else y * masks[1])


class Instances(nn.Module):
    """An instance norm, whose statistics aren't those that it begins with."""

    input_shape = (2, 5, 5)
    draws = ()

    def __init__(self, affine: bool, width: int = 8) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, width, 3), nn.Linear(width * 9, CLASSES)
        self.norm = nn.InstanceNorm2d(width, affine=affine, track_running_stats=True, momentum=0.3)
        nn.init.constant_(self.norm.running_mean, 0.5)
        nn.init.constant_(self.norm.running_var, 2.0)

    def forward(self, x: torch.Tensor, drawn: Drawn = ()) -> torch.Tensor:
        return self.fc(torch.relu(self.norm(self.conv(x))).flatten(1))


NETS: dict[str, Callable[..., Any]] = {
    "spatial": Spatial,
    "rows": Rows,
    "coder": Coder,
    "training": Training,
    "instances": partial(Instances, True),
    "plain instances": partial(Instances, False),
}


@cache
def model_of(kind: str) -> Model:
    """As a file says it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = import_onnx(export_torch(NETS[kind]()), kind)
    return import_onnx(onnx_file(model.graph, model.tensors, kind), kind)


def module_of(kind: str, tensors: Mapping[str, Array], width: int = 8) -> Any:
    module = NETS[kind](width=width)
    module.load_state_dict({n: torch.tensor(v) for n, v in tensors.items()}, strict=False)
    return module


@pytest.mark.parametrize("width", [8, 3])
@pytest.mark.parametrize("kind", NETS)
def test_a_step_is_torchs_with_the_same_draws_at_every_width(kind: str, width: int) -> None:
    model = model_of(kind)
    tensors = Selection.of(model.architecture, [width] * len(model.architecture.groups)).gather(model.tensors)
    module, session, (x, y) = module_of(kind, tensors, width), step_of(model, gradients=True), samples_of(model)
    feeds = first_step_feeds(Recipe(report_squares=True), tensors, session.inputs, y, CLASSES)
    random = RandomInputs.of(session.inputs, session.metadata)
    drawn = random.draw(feeds, SAMPLES, 7, "key")
    assert list(random.draws.values()) == [*module.draws]
    out = session.run({**feeds, **drawn, step_contract.X: x, step_contract.Y: y})
    loss = nn.functional.cross_entropy(module(torch.tensor(x), [*map(torch.tensor, drawn.values())]), torch.tensor(y))
    loss.backward()
    np.testing.assert_allclose(out[step_contract.LOSS], loss.item(), rtol=1e-5)
    for name, value in module.named_parameters():
        np.testing.assert_allclose(out[step_contract.gradient_name(name)], value.grad.numpy(), atol=1e-5)
    for name in tensors.keys() - dict(module.named_parameters()).keys():
        expected = module.get_buffer(name)
        np.testing.assert_allclose(out[step_contract.next_name(name)], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", NETS)
def test_predictions_take_means_and_are_those_of_evaluation(kind: str) -> None:
    model = model_of(kind)
    module, (x, y) = module_of(kind, model.tensors).eval(), samples_of(model)
    written = onnx.load_from_string(inference_model(model, Selection.full(model.architecture).widths))
    assert "Dropout" not in {n.op_type for n in written.graph.node}
    with torch.no_grad():
        expected = module(torch.tensor(x), [torch.tensor(draw.mean) for draw in module.draws])
    logits = predict(model, x)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    np.testing.assert_array_equal(logits, predict(model, x))
    features = Features(frozen=("norm.running_*",)) if "instances" in kind else Features()
    loss = Trainer(training_graph(model, features).to_bytes()).loss(
        model.tensors, LocalData(x, y, x[:0], y[:0]), Recipe(), CLASSES, SAMPLES
    )
    assert loss == pytest.approx(nn.functional.cross_entropy(expected, torch.tensor(y)).item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["coder", "spatial"])
def test_a_board_and_its_simulation_draw_the_same_bits(kind: str) -> None:
    model = model_of(kind)
    x, y = samples_of(model, 12)
    recipe, data = Recipe(epochs=2, batch_size=4, lr=0.05, accumulate=2), LocalData(x, y, x[:0], y[:0])

    def train_round(round_: int) -> dict[str, Array]:
        trainer = Trainer(training_graph(model, recipe.features).to_bytes())
        return dict(trainer.train(model.tensors, data, TrainingTask(recipe, CLASSES, 3, "a", round_)).tensors)

    first, repeated, later = train_round(1), train_round(1), train_round(2)
    assert all(np.array_equal(first[n], repeated[n]) for n in first)
    assert any(not np.array_equal(first[n], later[n]) for n in first)


def test_masks_have_one_number_for_what_is_dropped_together() -> None:
    model = model_of("spatial")
    session = step_of(model)
    random = RandomInputs.of(session.inputs, session.metadata)
    drawn, others = ([*random.draw(model.tensors, 500, 0, key).values()] for key in ("key", "another"))
    assert not any(np.array_equal(mask, other) for mask, other in zip(drawn, others, strict=True))
    assert [m.shape for m in drawn] == [(500, 8, 4, 4), (500, 8, 1, 1), (500, 1, 1, 1), (500, 8)]
    for mask, ratio in zip(drawn, (0.1, 0.25, 0.5, 0.4), strict=True):
        assert set(np.unique(mask)) == {np.float32(0), np.float32(1 / (1 - ratio))}
        assert (mask == 0).mean() == pytest.approx(ratio, abs=0.1)


def test_narrower_steps_have_narrower_masks() -> None:
    model = model_of("spatial")
    x, y = samples_of(model, 16)
    recipe = Recipe(epochs=3, batch_size=4, ordered_dropout=(0.25, 0.5))
    task = TrainingTask(recipe, CLASSES, 3, "a", 1, model.architecture.sizes)
    trainer = Trainer(training_graph(model, recipe.features).to_bytes())
    assert trainer.train(model.tensors, LocalData(x, y, x[:0], y[:0]), task).steps == 12


class InPlace(nn.Module):
    """Dropouts that write into what they are given, as statements."""

    input_shape = (6,)

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.drop = nn.Linear(6, 8), nn.Linear(8, CLASSES), nn.Dropout(0.25, inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.fc1(x))
        nn.functional.dropout(h, 0.5, self.training, True)
        y = h * 2
        self.drop(y)
        return self.fc2(y)


def test_a_dropout_in_place_is_exported() -> None:
    assert sorted(ratios_of(import_onnx(export_torch(InPlace()), "n"))) == [0.25, 0.5]


class Labelled(nn.Module):
    """A module that can't be run without labels in training mode."""

    input_shape = (5,)

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.drop, self.fc2 = nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, CLASSES)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        out = self.fc2(self.drop(self.fc1(x)))
        return nn.functional.cross_entropy(out, labels) if self.training else out  # type: ignore[arg-type]


def test_a_module_that_takes_more_in_training_mode_keeps_its_dropouts() -> None:
    module = Labelled()
    model = import_onnx(export_torch(module), "labelled")
    assert ratios_of(model) == [0.5]
    assert any("training mode" in note for note in model.notes)
    assert module.training


class Frozen(Labelled):
    """Dropouts that are nothing in training mode, either."""

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.drop.eval()
        return self

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return self.fc2(self.drop(nn.functional.dropout(self.fc1(x), 0.3, training=False)))


def test_a_dropout_that_is_off_in_training_mode_stays_off() -> None:
    model = import_onnx(export_torch(Frozen()), "frozen")
    assert not ratios_of(model)
    assert not model.notes


class Masked(nn.Linear):
    input_shape, mask = (5,), staticmethod(torch.ones_like)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (self.mask(x[:, :1]) if self.training else 1)


def test_draws_that_are_no_means_in_an_export_are_left_out_and_noted() -> None:
    module, x = Masked(5, CLASSES).eval(), torch.rand(2, 5)
    for module.mask in (lambda x: (x * 0 + 0.7).bernoulli() / 0.7, lambda x: 1 + bool(torch.rand([]) < 0.1)):
        model = import_onnx(export_torch(module), "masked")
        np.testing.assert_allclose(predict(model, x.numpy()), module(x).detach(), atol=1e-5)
        assert len(model.notes) == 1


class Attention(nn.Module):
    """Attention in one of torch's ways."""

    input_shape = (4, 6)

    def __init__(self, method: str) -> None:
        super().__init__()
        self.method, self.fc = method, nn.Linear(6, CLASSES)
        self.heads = nn.MultiheadAttention(6, 2, dropout=0.3, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ratio, heads = 0.3 if self.training else 0.0, x.unflatten(2, (2, 3)).transpose(1, 2)
        near = torch.ones(4, 4).tril(1)
        if self.method == "heads":
            return self.fc(self.heads(x, x, x, attn_mask=near.log())[0].mean(1))
        attend = nn.functional.scaled_dot_product_attention
        if self.method == "causal":
            y = attend(heads, heads, heads, dropout_p=ratio, is_causal=True)
        elif self.method == "shared":
            y = attend(heads, heads[:, :1], heads[:, 1:], dropout_p=ratio, enable_gqa=True)
        else:
            y = attend(heads, heads, heads, near.bool() if self.method == "truths" else near.log(), ratio)
        return self.fc(y.transpose(1, 2).flatten(2).mean(1))


@pytest.mark.parametrize("method", ["heads", "causal", "shared", "truths", "numbers"])
def test_attention_with_dropout_is_exported_as_torch_computes_it(method: str) -> None:
    module = Attention(method)
    model = import_onnx(export_torch(module), method)
    x, _ = samples_of(model)
    np.testing.assert_allclose(predict(model, x), module.eval()(torch.tensor(x)).detach().numpy(), atol=1e-5)
    assert ratios_of(model) == [0.3]


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


RATIO = onnx.helper.make_node("Constant", [], ["ratio"], value_float=0.3)
MODE = onnx.helper.make_node("Constant", [], ["mode"], value=onnx.numpy_helper.from_array(np.array(True)))
DROPOUTS = {
    9: [onnx.helper.make_node("Dropout", ["h"], ["d"], ratio=0.3)],
    17: [
        *(RATIO, MODE, onnx.helper.make_node("Dropout", ["h", "ratio", "mode"], ["e", "m"])),
        *(onnx.helper.make_node("Cast", ["m"], ["f"], to=1), onnx.helper.make_node("Mul", ["e", "f"], ["d"])),
    ],
}


@pytest.mark.parametrize("opset", DROPOUTS)
def test_the_dropout_of_a_file_keeps_its_ratio_in_every_form(opset: int) -> None:
    model = import_onnx(onnx_model(DROPOUTS[opset], opset=opset), "file")
    assert ratios_of(model) == [pytest.approx(0.3)]
    assert any("0.3" in note for note in model.notes)
    assert set(model.tensors) == {"w", "v"}


def test_a_dropout_that_drops_nothing_is_none() -> None:
    model = import_onnx(onnx_model([onnx.helper.make_node("Dropout", ["h"], ["d"], ratio=0.0)], opset=9), "file")
    assert "Dropout" not in {n.op for n in model.graph.nodes}
    assert not model.notes


BAD_DRAWS = ("3", '{"d": ["normal", 0]}', '{"d": ["normal", 0, -1]}', '{"d": ["uniform", 1, 0]}')


@pytest.mark.parametrize(
    ("key", "text"),
    [
        *(("dropout_axes", "{"), ("dropout_axes", '{"d": ["a"]}'), ("instance_norms", "{}")),
        *(("draws", text) for text in BAD_DRAWS),
    ],
)
def test_a_damaged_file_is_refused(key: str, text: str) -> None:
    proto = onnx.load_from_string(onnx_model([onnx.helper.make_node("Dropout", ["h"], ["d"])]))
    onnx.helper.set_model_props(proto, {f"fedprune.{key}": text})
    with pytest.raises(ModelError, match=rf"fedprune\.{key}"):
        import_onnx(proto.SerializeToString(), "file")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("d::keep", "[]"),
        ("d::keep", '{"d::keep": 2}'),
        *(("d::noise", text.replace("d", "d::noise", 1)) for text in BAD_DRAWS),
    ],
)
def test_a_damaged_step_is_refused(name: str, text: str) -> None:
    with pytest.raises(TrainingError):
        RandomInputs.of({name: ("tensor(float)", ("N", 3))}, {step_contract.RANDOM_METADATA: text})


def test_sizes_are_solved_from_the_shapes_of_weights() -> None:
    sizes = solve_sizes({"a": (("g0*9+16", 3), (43, 3)), "b": (("g0+g1",), (7,)), "c": (("g1*g2",), (20,))})
    assert sizes == {"g0": 3, "g1": 4, "g2": 5}
    assert shape_in_numbers(("N", "N*g0*2+-1", 7), {**sizes, "N": 2}) == (2, 11, 7)
    for unusable in ("g9", "g0*-1"):
        with pytest.raises(TrainingError):
            shape_in_numbers((unusable,), sizes)
