"""Models of several inputs and outputs, which are parts of one row: against torch, from files of named arrays."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fedprune_export as fx
from fedprune.core.errors import DataError, ModelError
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.runtime.session import OnnxSession
from fedprune_device.data.array_source import load_data, load_inputs
from fedprune_device.training.trainer import Trainer
from fedprune_device.training.training_task import TrainingTask
from fedprune_export.bundles.conversion import check_state_parity, onnx_file, state_dict
from fedprune_export.checks.labelled_file import load_scored_data
from fedprune_export.importing import import_onnx
from fedprune_export.pruning.cut import cut
from fedprune_export.training.step_graph import training_graph

pytestmark = pytest.mark.torch

N, STEPS = 12, 10


class Fusion(nn.Module):
    """Motion, a place by its number, and a picture of bytes: two outputs, of different shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.input_shape = {"motion": (3, STEPS), "place": (), "frame": (2, 4, 4)}
        self.input_dtype = {"place": "int64", "frame": torch.uint8}
        self.moves, self.sees = nn.Conv1d(3, 8, 3, padding=1), nn.Conv2d(2, 6, 3, padding=1)
        self.places, self.joint = nn.Embedding(5, 4), nn.Linear(18, 16)
        self.kind, self.path = nn.Linear(16, 3), nn.Linear(16, 4)

    def forward(self, motion: Tensor, place: Tensor, frame: Tensor) -> tuple[Tensor, Tensor]:
        frame_features = torch.tanh(self.sees(frame.float() / 255)).mean((2, 3))
        motion_features = torch.tanh(self.moves(motion)).mean(2)
        both = torch.tanh(self.joint(torch.cat([motion_features, frame_features, self.places(place)], 1)))
        return self.kind(both), self.path(both).unflatten(1, (2, 2))


def loss(kind: Tensor, path: Tensor, labels: Tensor) -> Tensor:
    """The kind of motion by its likelihood, and the error of a path."""
    return -(kind.log_softmax(1) * labels[:, :3]).sum(1) + ((path.flatten(1) - labels[:, 3:]) ** 2).mean(1)


loss.target_shape = (7,)  # type: ignore[attr-defined]


def score(kind: Tensor, path: Tensor, labels: Tensor) -> Tensor:
    return (kind.argmax(1) == labels[:, :3].argmax(1)).float()


score.target_shape = (7,)  # type: ignore[attr-defined]


def samples(count: int = N) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(1)
    kinds = np.eye(3)[rng.integers(0, 3, count)]
    return {
        "motion": rng.normal(size=(count, 3, STEPS)).astype(np.float32),
        "place": rng.integers(0, 5, count),
        "frame": rng.integers(0, 256, (count, 2, 4, 4), np.uint8),
        "y": np.concatenate([kinds, rng.normal(size=(count, 4))], 1).astype(np.float32),
    }


def of_torch(module: nn.Module, arrays: dict[str, np.ndarray[Any, Any]]) -> list[Tensor]:
    return list(module(*(torch.tensor(arrays[n]) for n in ("motion", "place", "frame"))))


@pytest.fixture
def fusion() -> tuple[fx.Model, Fusion]:
    torch.manual_seed(0)
    module = Fusion()
    return fx.load(module, loss=loss, metric=score), module


def test_rows_hold_inputs_by_name_and_outputs_in_order(fusion: tuple[fx.Model, Fusion], tmp_path: Path) -> None:
    model, module = fusion
    assert model.architecture.input_shape == (2 * 4 * 4 + 3 * STEPS + 1,)
    assert model.architecture.output_shape == (7,)
    notes = " ".join(model.notes)
    assert "frame [n, 2, 4, 4], motion [n, 3, 10], place [n] are parts of one row of 63 numbers" in notes
    assert "[n, 3]" in notes
    assert "[n, 2, 2] are parts of one row of 7 numbers" in notes
    arrays = samples()
    np.savez(tmp_path / "own.npz", **arrays)
    x, _ = load_inputs(str(tmp_path / "own.npz"))
    expected = torch.cat([o.flatten(1) for o in of_torch(module, arrays)], 1)
    for one in (model, import_onnx(model.graph.to_bytes(), "again")):
        outputs = OnnxSession(one.graph.to_bytes()).run({"x": np.asarray(x)}, ["logits"])["logits"]
        assert np.allclose(outputs, expected.detach(), atol=1e-5)


def test_boards_train_what_torch_trains(fusion: tuple[fx.Model, Fusion], tmp_path: Path) -> None:
    model, module = fusion
    arrays = samples()
    test_arrays = {f"{n}_test": a[:2] for n, a in arrays.items()}
    np.savez(tmp_path / "own.npz", **{f"{n}_train": a for n, a in arrays.items()}, **test_arrays)
    data = load_data(str(tmp_path / "own.npz"))
    assert data.samples == N
    recipe = Recipe(loss="custom", metric="custom", batch_size=N, lr=0.1, momentum=0.0, epochs=3)
    trainer = Trainer(training_graph(model, recipe.features).to_bytes(), threads=1)
    result = trainer.train(model.tensors, data, TrainingTask(recipe, 7, 0, "a", 1))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss(*of_torch(module, arrays), torch.tensor(arrays["y"])).mean().backward()
        optimizer.step()
    for name, tensor in module.state_dict().items():
        assert np.allclose(result.tensors[name], tensor, atol=1e-5), name


def test_a_cut_model_takes_the_same_rows(fusion: tuple[fx.Model, Fusion]) -> None:
    model, _ = fusion
    graph = cut(model, Selection.full(model.architecture).with_widths([size // 2 for size in model.architecture.sizes]))
    x = np.random.default_rng(0).normal(size=(3, 63)).astype(np.float32)
    x[:, -1] = [0, 1, 4]
    assert OnnxSession(graph.to_bytes()).run({"x": x}, ["logits"])["logits"].shape == (3, 7)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"motion": np.zeros((3, 3, STEPS))}, "arrays of several inputs.*frame, motion, place, each with as many"),
        ({"motion_test": np.zeros((3, 3, STEPS))}, r"arrays of several inputs \(test\)"),
        ({"motion": np.zeros(())}, r"motion \[\]"),
    ],
)
def test_arrays_that_do_not_belong_together(change: dict[str, Any], error: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", **(samples() | change))
    with pytest.raises(DataError, match=error):
        load_data(str(tmp_path / "own.npz"))


class Two(nn.Module):
    """Two inputs and one output, which a root parameter scales whose name training graphs have, too."""

    input_shape: ClassVar = {"b": (3,), "a": (2, 2)}

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.lr, self.loss = nn.Linear(7, 5), nn.Parameter(torch.rand(5) + 0.5), nn.Linear(5, 3)

    def forward(self, b: Tensor, a: Tensor) -> Tensor:
        return self.loss(torch.relu(self.hidden(torch.cat([a.flatten(1), b], 1))) * self.lr)


def two_inputs(count: int = 40) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(count, 2, 2)).astype(np.float32), rng.normal(size=(count, 3))
    return {"a": a, "b": b, "y": rng.integers(0, 3, count)}


@pytest.mark.parametrize("ending", ["", "_test"])
def test_an_export_is_measured_on_named_arrays(tmp_path: Path, ending: str) -> None:
    module, arrays = Two(), two_inputs()
    np.savez(tmp_path / "two.npz", **{f"{n}{ending}": v for n, v in arrays.items()})
    scored = load_scored_data(tmp_path / "two.npz", fx.load(module), Recipe())
    logits = module(torch.tensor(arrays["b"], dtype=torch.float32), torch.tensor(arrays["a"]))
    assert scored.full_score == float(np.mean(logits.argmax(1).numpy() == arrays["y"]))


class NamedX(nn.Module):
    """An input that is called as the row of all inputs is."""

    def __init__(self) -> None:
        super().__init__()
        self.input_shape = {"x": (3,), "m": (2,)}
        self.fc = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.cat([x, m], 1))


def test_an_input_called_x_is_given_by_name_or_within_the_row(tmp_path: Path) -> None:
    model, rng = fx.load(NamedX()), np.random.default_rng(0)
    x, m = (rng.standard_normal((9, n)).astype(np.float32) for n in (3, 2))
    y, row = np.arange(9) % 3, np.concatenate([m, x], 1)
    np.savez(tmp_path / "named.npz", x=x, m=m, y=y)
    np.savez(tmp_path / "row.npz", x=row, y=y)
    for file in ("named", "row"):
        np.testing.assert_array_equal(load_scored_data(tmp_path / f"{file}.npz", model, Recipe()).x, row)


@pytest.mark.parametrize(("name", "value"), [("a", None), ("a", np.zeros((40, 3)))])
def test_named_arrays_that_dont_fit_are_named(tmp_path: Path, name: str, value: Any) -> None:
    np.savez(tmp_path / "two.npz", **{n: v for n, v in {**two_inputs(), name: value}.items() if v is not None})
    with pytest.raises(DataError, match=r"array [ab]"):
        load_scored_data(tmp_path / "two.npz", fx.load(Two()), Recipe())


def test_a_state_dict_has_the_authors_names() -> None:
    module = Two()
    model = fx.load(module)
    for candidate in (model, import_onnx(onnx_file(model.graph, model.tensors, "again"), "again")):
        state = state_dict(candidate.tensors, candidate.graph)
        assert set(state) == {n for n, _ in module.named_parameters()}
        assert check_state_parity(state, candidate.graph, candidate.graph) == 0
    module.load_state_dict({n: torch.tensor(v) for n, v in state.items()})
    assert torch.equal(fx.narrowed(module, {n: np.ones_like(v) for n, v in model.tensors.items()}).lr, torch.ones(5))


def test_a_metric_of_other_labels_than_the_losss_is_refused() -> None:
    def other(kind: Tensor, path: Tensor, labels: Tensor) -> Tensor:
        return (kind.argmax(1) == labels[:, 0].long()).float()

    other.target_shape = (2,)  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match="metric") as caught:
        fx.load(Fusion(), loss=loss, metric=other)
    assert "target_shape" in str(caught.value)


def test_several_outputs_need_a_loss_of_them_all() -> None:
    with pytest.raises(ModelError, match=r"got 1 and 2.*--loss.*--output"):
        fx.load(Fusion())
