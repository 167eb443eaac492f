"""Dropout in training steps: the same masks give what torch's autograd gives, and only training drops anything."""

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from fedprune.core.errors import ModelError, TrainingError
from fedprune.model import step_contract
from fedprune.model.features import Features
from fedprune.model.random_inputs import RandomInputs, shape_in_numbers, solve_sizes
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
Masks = list[torch.Tensor] | None
CLASSES, SAMPLES = 3, 6


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

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, width, 3), nn.Conv2d(width, width, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(width * 16, width), nn.Linear(width, CLASSES)
        self.pixels, self.channels, self.path = nn.Dropout(0.1), nn.Dropout2d(0.25), DropPath(0.5)

    def forward(self, x: torch.Tensor, masks: Masks = None) -> torch.Tensor:
        x = torch.relu(self.conv1(x))
        x = self.pixels(x) if masks is None else x * masks[0]
        y = torch.relu(self.conv2(x))
        y = self.channels(y) if masks is None else y * masks[1]
        x = x + (self.path(y) if masks is None else y * masks[2])
        x = torch.relu(self.fc1(x.flatten(1)))
        return self.fc2(nn.functional.dropout(x, 0.4, self.training) if masks is None else x * masks[3])


class Rows(nn.Module):
    """Attention whose weights are dropped, and a vector that is dropped whether the module trains or not."""

    input_shape = (4, 6)

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, width) for _ in range(3))
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor, masks: Masks = None) -> torch.Tensor:
        q, k, v = (layer(x)[:, None] for layer in (self.q, self.k, self.v))
        if masks is None:
            y = nn.functional.scaled_dot_product_attention(q, k, v, None, 0.3 if self.training else 0.0, scale=0.4)
        else:
            y = ((q @ k.transpose(-2, -1) * 0.4).softmax(-1) * masks[0]) @ v
        y = y[:, 0].mean(1)
        return self.fc(nn.functional.dropout(y, 0.2) if masks is None else y * masks[1])


NETS: dict[str, tuple[type[nn.Module], tuple[float, ...]]] = {
    "spatial": (Spatial, (0.1, 0.25, 0.5, 0.4)),
    "rows": (Rows, (0.3, 0.2)),
}
MODELS: dict[str, Model] = {}


def model_of(kind: str) -> Model:
    if kind not in MODELS:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            MODELS[kind] = import_onnx(export_torch(NETS[kind][0]()), kind)
    return MODELS[kind]


def step_of(model: Model, **features: Any) -> OnnxSession:
    return OnnxSession(training_graph(model, Features(**features)).to_bytes(), training=True)


def masks_of(session: OnnxSession) -> RandomInputs:
    return RandomInputs.of(session.inputs, session.metadata)


def ratios_of(model: Model) -> list[float]:
    """The shares of numbers that the masks of a model's training step drop."""
    return [draw.first for draw in masks_of(step_of(model)).draws.values()]


def samples_of(model: Model, count: int = SAMPLES) -> tuple[Array, Array]:
    rng = np.random.default_rng(1)
    return rng.standard_normal((count, *model.architecture.input_shape), np.float32), rng.integers(0, CLASSES, count)


@pytest.mark.parametrize("width", [8, 3])
@pytest.mark.parametrize("kind", NETS)
def test_gradients_are_torchs_with_the_same_masks_at_every_width(kind: str, width: int) -> None:
    model, (net, ratios) = model_of(kind), NETS[kind]
    tensors = Selection.of(model.architecture, [width] * len(model.architecture.groups)).gather(model.tensors)
    session = step_of(model, gradients=True)
    x, y = samples_of(model)
    feeds = first_step_feeds(Recipe(report_squares=True), tensors, session.inputs, y, CLASSES)
    masks = masks_of(session)
    drawn = masks.draw(feeds, SAMPLES, 7, "key")
    assert sorted(d.first for d in masks.draws.values()) == sorted(ratios)
    assert any((m == 0).any() for m in drawn.values())
    out = session.run({**feeds, **drawn, step_contract.X: x, step_contract.Y: y})

    module = net(width)
    module.load_state_dict({n: torch.tensor(v) for n, v in tensors.items()})
    torch_masks = [torch.tensor(m) for m in drawn.values()]
    loss = nn.functional.cross_entropy(module(torch.tensor(x), torch_masks), torch.tensor(y))
    loss.backward()
    np.testing.assert_allclose(out[step_contract.LOSS], loss.item(), rtol=1e-5)
    for name, value in module.named_parameters():
        np.testing.assert_allclose(out[step_contract.gradient_name(name)], value.grad.numpy(), atol=1e-5)


def test_masks_have_one_number_for_what_is_dropped_together() -> None:
    drawn = list(masks_of(step_of(model_of("spatial"))).draw(model_of("spatial").tensors, 500, 0, "key").values())
    assert [m.shape for m in drawn] == [(500, 8, 4, 4), (500, 8, 1, 1), (500, 1, 1, 1), (500, 8)]
    for mask, ratio in zip(drawn, NETS["spatial"][1], strict=True):
        assert set(np.unique(mask)) == {np.float32(0), np.float32(1 / (1 - ratio))}
        assert (mask == 0).mean() == pytest.approx(ratio, abs=0.1)


@pytest.mark.parametrize("kind", NETS)
def test_nothing_is_dropped_in_inference(kind: str) -> None:
    model = model_of(kind)
    selection = Selection.of(model.architecture, [5] * len(model.architecture.groups))
    written = onnx.load_from_string(inference_model(model, selection.widths))
    assert "Dropout" not in {n.op_type for n in written.graph.node}
    session, (x, y) = step_of(model), samples_of(model)
    feeds = first_step_feeds(Recipe(), model.tensors, session.inputs, y, CLASSES)
    feeds |= masks_of(session).means(feeds, SAMPLES)
    loss = session.run({**feeds, step_contract.X: x, step_contract.Y: y}, [step_contract.LOSS])[step_contract.LOSS]
    logits = OnnxSession(cut(model, Selection.full(model.architecture)).to_bytes()).run({"x": x})[step_contract.LOGITS]
    assert float(loss) == pytest.approx(
        nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(y)).item(), rel=1e-5
    )


def test_training_drops_by_seed_round_and_device_and_measures_without() -> None:
    model = model_of("spatial")
    x, y = samples_of(model, 24)
    data = LocalData(x, y, x[:0], y[:0])
    recipe = Recipe(epochs=2, batch_size=8, lr=0.05, accumulate=2)
    trainer = Trainer(training_graph(model, recipe.features).to_bytes())

    def train_round(round_: int = 1, device: str = "a") -> dict[str, Array]:
        return dict(trainer.train(model.tensors, data, TrainingTask(recipe, CLASSES, 3, device, round_)).tensors)

    first, repeated, later = train_round(), train_round(), train_round(2)
    assert all(np.array_equal(first[n], repeated[n]) for n in first)
    assert any(not np.array_equal(first[n], later[n]) for n in first)
    logits = OnnxSession(cut(model, Selection.full(model.architecture)).to_bytes()).run({"x": x})[step_contract.LOGITS]
    expected = nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(y)).item()
    assert trainer.loss(model.tensors, data, recipe, CLASSES, 24) == pytest.approx(expected, rel=1e-5)


def test_narrower_steps_have_narrower_masks() -> None:
    model = model_of("spatial")
    x, y = samples_of(model, 16)
    recipe = Recipe(epochs=3, batch_size=4, ordered_dropout=(0.25, 0.5))
    task = TrainingTask(recipe, CLASSES, 3, "a", 1, model.architecture.sizes)
    trainer = Trainer(training_graph(model, recipe.features).to_bytes())
    assert trainer.train(model.tensors, LocalData(x, y, x[:0], y[:0]), task).steps == 12


def test_dropouts_survive_a_file() -> None:
    model = model_of("spatial")
    reloaded = import_onnx(onnx_file(model.graph, model.tensors, "again"), "again")
    shapes = {n: s for n, (_, s) in step_of(model).inputs.items() if step_contract.is_random_input(n)}
    assert {n: s for n, (_, s) in step_of(reloaded).inputs.items() if step_contract.is_random_input(n)} == shapes


class Counting(nn.Module):
    """A buffer that training mode changes."""

    input_shape = (5,)

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, CLASSES)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.count += 1 + 0 * torch.rand(())
        return self.fc(x)


def test_what_training_mode_does_besides_is_noted_and_the_module_stays_as_it_was() -> None:
    module = Counting().train()
    before = {n: v.clone() for n, v in module.state_dict().items()}
    state = torch.get_rng_state()
    assert "(count) in the module (Counting)" in "\n".join(import_onnx(export_torch(module), "counting").notes)
    assert module.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[n]) for n, v in module.state_dict().items())


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


class Frozen(nn.Module):
    """Dropouts that are nothing in training mode, either."""

    input_shape = (5,)

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.drop, self.fc2 = nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, CLASSES)

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.drop.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.drop(nn.functional.dropout(self.fc1(x), 0.3, training=False)))


def test_a_dropout_that_is_off_in_training_mode_stays_off() -> None:
    model = import_onnx(export_torch(Frozen()), "frozen")
    assert not ratios_of(model)
    assert not model.notes


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


def test_attention_layers_of_torch_drop_weights_and_values() -> None:
    class Encoder(nn.Module):
        input_shape = (3, 4)

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x).mean(1)

    assert ratios_of(import_onnx(export_torch(Encoder()), "encoder")) == [0.2] * 4


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
    logits = OnnxSession(cut(model, Selection.full(model.architecture)).to_bytes()).run({"x": x})[step_contract.LOGITS]
    np.testing.assert_allclose(logits, module.eval()(torch.tensor(x)).detach().numpy(), atol=1e-5)
    assert ratios_of(model) == [0.3]


# -- ONNX files --------------------------------------------------------------------------------------------------------


def onnx_model(opset: int, ratio: float = 0.5, *, mode: bool = False, masks: bool = False) -> bytes:
    rng, node, value = np.random.default_rng(0), onnx.helper.make_node, onnx.helper.make_tensor_value_info
    tensors = {"w": rng.standard_normal((5, 6), np.float32), "v": rng.standard_normal((6, CLASSES), np.float32)}
    inputs, attrs = ["a"], {}
    if opset < 12:
        attrs = {"ratio": ratio}
    else:
        tensors |= {"ratio": np.array(ratio, np.float32), "mode": np.array(mode)}
        inputs += ["ratio", *(["mode"] if mode else [])]
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Relu", ["h"], ["a"])]
    nodes.append(node("Dropout", inputs, ["d", *(["m"] if masks else [])], **attrs))
    if masks:
        nodes += [node("Cast", ["m"], ["f"], to=1), node("Mul", ["d", "f"], ["e"])]
    nodes.append(node("MatMul", ["e" if masks else "d", "v"], ["y"]))
    used = {i for n in nodes for i in n.input}
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [value("x", 1, ["N", 5])],
        [value("y", 1, ["N", CLASSES])],
        [onnx.numpy_helper.from_array(v, k) for k, v in tensors.items() if k in used],
    )
    opsets = [onnx.helper.make_opsetid("", opset)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=7).SerializeToString()


@pytest.mark.parametrize(("opset", "options"), [(9, {}), (17, {"masks": True, "mode": True})])
def test_the_dropout_of_a_file_keeps_its_ratio_in_every_form(opset: int, options: dict[str, bool]) -> None:
    model = import_onnx(onnx_model(opset, 0.3, **options), "file")
    assert ratios_of(model) == [0.3]
    assert any("0.3" in note for note in model.notes)
    assert set(model.tensors) == {"w", "v"}


def test_a_dropout_that_drops_nothing_is_none() -> None:
    model = import_onnx(onnx_model(13, 0.0), "file")
    assert "Dropout" not in {n.op for n in model.graph.nodes}
    assert not model.notes


@pytest.mark.parametrize("text", ["3", '{"d": ["a"]}'])
def test_axes_of_a_damaged_file_are_refused(text: str) -> None:
    proto = onnx.load_from_string(onnx_model(13))
    onnx.helper.set_model_props(proto, {"fedprune.dropout_axes": text})
    with pytest.raises(ModelError, match=r"fedprune\.dropout_axes"):
        import_onnx(proto.SerializeToString(), "file")


# -- sizes -------------------------------------------------------------------------------------------------------------


def test_sizes_are_solved_from_the_shapes_of_weights() -> None:
    sizes = solve_sizes({"a": (("g0*9+16", 3), (43, 3)), "b": (("g0+g1",), (7,)), "c": (("g1*g2",), (20,))})
    assert sizes == {"g0": 3, "g1": 4, "g2": 5}
    assert shape_in_numbers(("N", "N*g0*2+-1", 7), {**sizes, "N": 2}) == (2, 11, 7)
    for unusable in ("g9", "g0*-1"):
        with pytest.raises(TrainingError):
            shape_in_numbers((unusable,), sizes)


@pytest.mark.parametrize("ratios", ["[]", '{"d::keep": 2}'])
def test_masks_without_ratios_are_refused(ratios: str) -> None:
    with pytest.raises(TrainingError):
        RandomInputs.of({"d::keep": ("tensor(float)", ("N", 3))}, {step_contract.RANDOM_METADATA: ratios})
