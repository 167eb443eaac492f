"""Models whose input has any length between bounds: padded batches against torch on samples of their own length."""

import copy
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import fedprune_export as fx
from fedprune.core.errors import DataError, ModelError
from fedprune.model.lengths import Lengths, lengths_of, pad_to_bound
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.runtime.session import OnnxSession
from fedprune_device.data.array_source import load_data, load_inputs
from fedprune_device.data.dataset import LocalData
from fedprune_device.serving.predictor import Predictor
from fedprune_device.training.trainer import Trainer
from fedprune_device.training.training_task import TrainingTask
from fedprune_export.importing.quiet_libraries import silence_libraries
from fedprune_export.pruning.cut import cut
from fedprune_export.training.step_graph import training_graph

pytestmark = pytest.mark.torch

MIN_LENGTH, MAX_LENGTH = 4, 12
LENGTHS = np.array([12, 4, 7, 9, 5, 11])
Array = npt.NDArray[Any]


class Attention(nn.Module):
    """A layer of self-attention over the places of a sample, and the mean over them: one class per sample."""

    input_shape = (5, f"{MIN_LENGTH}:{MAX_LENGTH}")

    def __init__(self) -> None:
        super().__init__()
        self.first, self.query, self.key = nn.Conv1d(5, 8, 3, padding=1), nn.Linear(8, 8), nn.Linear(8, 8)
        self.value, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
        h = torch.tanh(self.first(x) * mask.unsqueeze(1)).transpose(1, 2)
        near = self.query(h) @ self.key(h).transpose(1, 2) + (mask.unsqueeze(1) - 1) * 1e9
        h = torch.tanh(h + near.softmax(-1) @ self.value(h)) * mask.unsqueeze(2)
        out: Tensor = self.head(h.sum(1) / lengths.unsqueeze(1))
        return out


class Tagger(nn.Module):
    """A class for every step: token ids, an embedding, and a recurrent layer."""

    input_shape = (f"{MIN_LENGTH}:{MAX_LENGTH}",)
    input_dtype = torch.int64

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gru, self.head = nn.Embedding(7, 6), nn.GRU(6, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.gru(self.embed(tokens))[0]).transpose(1, 2)
        return out


class Plain(nn.Module):
    """Reads neither mask nor lengths."""

    input_shape = (f"{MIN_LENGTH}:{MAX_LENGTH}",)

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(MAX_LENGTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x)
        return out


def floats(*shape: int) -> Array:
    return np.random.default_rng(2).normal(size=shape).astype(np.float32)


def run_step(module: nn.Module, recipe: Recipe, data: LocalData) -> tuple[float, dict[str, Array]]:
    """Loss and gradients of one step on all samples, by a board's trainer: plain SGD moves by them."""
    model = fx.load(module)
    trainer = Trainer(training_graph(model, recipe.features).to_bytes())
    widths = tuple(model.architecture.sizes)
    weights = {n: np.asarray(v) for n, v in model.tensors.items()}
    data = data.snapshot(trainer.input_shape, trainer.targets(recipe, model.architecture.classes))
    result = trainer.train(weights, data, TrainingTask(recipe, model.architecture.classes, 0, "a", 1, widths=widths))
    return result.loss_first, {n: (weights[n] - result.tensors[n]) / recipe.lr for n in trainer.trainable}


def check_gradients(module: nn.Module, loss: Tensor, gradients: dict[str, Array]) -> None:
    loss.backward()  # type: ignore[no-untyped-call]
    for name, value in module.named_parameters():
        assert value.grad is not None
        expected = value.grad.numpy()
        assert np.abs(gradients[name] - expected).max() < 2e-4 * max(1e-2, np.abs(expected).max()), name


def one(module: nn.Module, x: Array, length: int, *extra: Any) -> Tensor:
    """The double-precision output of one sample without padding."""
    piece = torch.tensor(x[None, ..., :length])
    out: Tensor = module(piece.double() if piece.is_floating_point() else piece, *extra)
    return out


def recipe(**settings: Any) -> Recipe:
    return Recipe(
        **{"epochs": 1, "batch_size": len(LENGTHS), "lr": 0.5, "momentum": 0.0, "weight_decay": 0.0, **settings}
    )


def test_attention_with_a_mask_learns_as_from_samples_of_their_own_length() -> None:
    torch.manual_seed(0)
    module, x, y = Attention(), floats(len(LENGTHS), 5, MAX_LENGTH), np.arange(len(LENGTHS)) % 3
    loss, gradients = run_step(module, recipe(), load_arrays({"x": x, "lengths": LENGTHS, "y": y}))
    exact = copy.deepcopy(module).double()
    outputs = [one(exact, x[i], n, torch.ones(1, n).double(), torch.tensor([n])) for i, n in enumerate(LENGTHS)]
    expected = functional.cross_entropy(torch.cat(outputs), torch.tensor(y))
    assert abs(loss - float(expected.detach())) < 1e-5
    check_gradients(exact, expected, gradients)


def test_labels_of_padded_steps_count_for_nothing() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(1)
    module, x, y = (
        Tagger(),
        rng.integers(0, 7, (len(LENGTHS), MAX_LENGTH)),
        rng.integers(0, 4, (len(LENGTHS), MAX_LENGTH)),
    )
    loss, gradients = run_step(module, recipe(ignore_label=-1), load_arrays({"x": x, "lengths": LENGTHS, "y": y}))
    exact = copy.deepcopy(module).double()
    outputs = [one(exact, x[i], n)[0].T for i, n in enumerate(LENGTHS)]
    labels = torch.cat([torch.tensor(y[i, :n]) for i, n in enumerate(LENGTHS)])
    expected = functional.cross_entropy(torch.cat(outputs), labels)
    assert abs(loss - float(expected.detach())) < 1e-5
    check_gradients(exact, expected, gradients)


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(MIN_LENGTH, MAX_LENGTH), min_size=1, max_size=5))
def test_what_is_in_the_padding_changes_nothing(seed: int, sample_lengths: list[int]) -> None:
    rng = np.random.default_rng(seed)
    x, lengths = rng.normal(size=(len(sample_lengths), 5, MAX_LENGTH)).astype(np.float32), np.array(sample_lengths)
    repadded = x.copy()
    for row, n in zip(repadded, sample_lengths, strict=True):
        row[:, n:] = rng.normal(scale=1e6, size=(5, MAX_LENGTH - n))
    first, second = (
        session().run({"x": pad_to_bound(some, (5, Lengths(MIN_LENGTH, MAX_LENGTH)), lengths)})["logits"]
        for some in (x, repadded)
    )
    assert np.array_equal(first, second)
    assert np.array_equal(lengths_of(pad_to_bound(x, (5, Lengths(MIN_LENGTH, MAX_LENGTH)), lengths), 1), lengths)


@cache
def session() -> OnnxSession:
    torch.manual_seed(0)
    return OnnxSession(fx.load(Attention()).graph.to_bytes())


def load_arrays(arrays: dict[str, Array], folder: Path | None = None) -> LocalData:
    """A board's data from arrays, all of it for training."""
    from fedprune_device.data.array_assembly import assemble

    empty = {"x_test": arrays["x"][:0], "y_test": arrays["y"][:0], "lengths_test": LENGTHS[:0]}
    return assemble({f"{n}_train": v for n, v in arrays.items()} | empty, folder)


def test_a_file_with_lengths_is_padded_to_the_bound(tmp_path: Path) -> None:
    x = floats(40, 5, 10)
    lengths = np.random.default_rng(3).integers(MIN_LENGTH, 11, 40)
    np.savez(tmp_path / "d.npz", x=x, lengths=lengths, y=np.zeros(40, np.int64))
    shape = (5, Lengths(MIN_LENGTH, MAX_LENGTH))
    data = load_data(str(tmp_path / "d.npz"), validation_share=0.2).snapshot(shape)
    rows = np.concatenate([data.x_train, data.x_test, data.x_val])
    assert rows.shape == (40, 5, MAX_LENGTH)
    expected = pad_to_bound(x, shape, lengths)
    assert sorted(r.tobytes() for r in rows) == sorted(r.tobytes() for r in expected)
    assert np.array_equal(load_inputs(str(tmp_path / "d.npz"), shape)[0], expected)


@pytest.mark.parametrize(
    ("lengths", "x"),
    [
        (np.full(8, MIN_LENGTH - 1), floats(8, 5, MAX_LENGTH)),
        (np.full(8, MAX_LENGTH + 1), floats(8, 5, MAX_LENGTH + 2)),
        (np.full(7, MIN_LENGTH), floats(8, 5, MAX_LENGTH)),
        (np.full(8, MIN_LENGTH), floats(8, 4, MAX_LENGTH)),
    ],
)
def test_lengths_out_of_bounds_or_of_another_shape_are_refused(lengths: Array, x: Array) -> None:
    with pytest.raises(DataError):
        load_arrays({"x": x, "lengths": lengths, "y": np.zeros(8, np.int64)}).snapshot(
            (5, Lengths(MIN_LENGTH, MAX_LENGTH))
        )


def test_padded_places_need_a_label_that_counts_for_nothing() -> None:
    x, y = np.zeros((6, MAX_LENGTH), np.int64), np.zeros((6, MAX_LENGTH), np.int64)
    with pytest.raises(DataError):
        run_step(Tagger(), recipe(), load_arrays({"x": x, "lengths": LENGTHS, "y": y}))


@pytest.mark.parametrize("bad", ["0:4", "5:4", "4:"])
def test_bounds_that_are_none_are_refused(bad: str) -> None:
    with pytest.raises(ModelError):
        fx.load(Plain(), input_shape=(bad,))


class Pair(nn.Module):
    input_shape: ClassVar[dict[str, tuple[Any, ...]]] = {"x": Plain.input_shape, "other": (2,)}

    def __init__(self) -> None:
        super().__init__()
        self.net = Plain()

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        out: Tensor = self.net(x) + other.sum(1, keepdim=True)
        return out


def test_an_input_of_bounded_length_has_only_its_mask_and_lengths_next_to_it() -> None:
    with pytest.raises(ModelError) as caught:
        fx.load(Pair())
    assert "other, x" in str(caught.value) or "x, other" in str(caught.value)


def dynamic_file(path: Path) -> Attention:
    torch.manual_seed(0)
    module, dim = Attention(), torch.export.Dim
    n, length = dim("n", min=1), dim("length", min=2)
    samples = (torch.zeros(2, 5, 9), torch.ones(2, 9), torch.full((2,), 9))
    with silence_libraries():
        torch.onnx.export(
            module.eval(), samples, path, dynamo=True, optimize=False, verbose=False,
            dynamic_shapes=({0: n, 2: length}, {0: n, 1: length}, {0: n}),
        )  # fmt: skip
    return module


def test_an_onnx_file_with_a_free_axis_computes_what_the_module_does(tmp_path: Path) -> None:
    module, x = dynamic_file(tmp_path / "net.onnx"), floats(len(LENGTHS), 5, MAX_LENGTH)
    model = fx.load(tmp_path / "net.onnx", input_shape=Attention.input_shape)
    assert model.architecture.input_shape == (5, MAX_LENGTH)
    assert model.architecture.sizes == fx.load(module).architecture.sizes
    rows = pad_to_bound(x, (5, Lengths(MIN_LENGTH, MAX_LENGTH)), LENGTHS)
    logits = OnnxSession(model.graph.to_bytes()).run({"x": rows})["logits"]
    with torch.no_grad():
        for i, n in enumerate(LENGTHS):
            expected = module(torch.tensor(x[i : i + 1, :, :n]), torch.ones(1, n), torch.tensor([n]))
            assert np.abs(logits[i] - expected.numpy()).max() < 1e-6
    for shape in ((5, MAX_LENGTH), (4, "4:12"), (5, 5, "4:12"), ("4:12", 9)):
        with pytest.raises(ModelError):
            fx.load(tmp_path / "net.onnx", input_shape=shape)


def test_a_predictor_takes_samples_of_any_length_within_the_bounds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Tagger()
    model = fx.load(module)
    assert fx.export(model, fx.plan(model, "raspberry-pi-5", density=1.0, recipe=recipe(ignore_label=-1)), tmp_path)
    predictor, x = Predictor(tmp_path), np.random.default_rng(1).integers(0, 7, (3, MAX_LENGTH))
    assert predictor.input_shape == (Lengths(MIN_LENGTH, MAX_LENGTH),)
    for n in (MIN_LENGTH, 7, MAX_LENGTH):
        with torch.no_grad():
            expected = module(torch.tensor(x[:, :n])).numpy()
        outputs = predictor.predict(x[:, :n])
        assert outputs.shape == expected.shape
        assert np.abs(outputs - expected).max() < 1e-5
    for n in (MIN_LENGTH - 1, MAX_LENGTH + 1):
        with pytest.raises(DataError) as error:
            predictor.predict(np.zeros((3, n), np.int64))
        assert f"{MIN_LENGTH}:{MAX_LENGTH}" in str(error.value.expected)


def test_a_cut_model_keeps_its_bounds() -> None:
    model = fx.load(Attention())
    some = cut(model, Selection.of(model.architecture, tuple(max(1, size // 2) for size in model.architecture.sizes)))
    x = pad_to_bound(floats(len(LENGTHS), 5, MAX_LENGTH), (5, Lengths(MIN_LENGTH, MAX_LENGTH)), LENGTHS)
    assert np.isfinite(OnnxSession(some.to_bytes()).run({"x": x})["logits"]).all()
    assert "fedprune.length" in some.metadata
