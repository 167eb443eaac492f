"""What sources say of a model: several names, frozen tensors, chosen outputs, identifiers, networks of timm."""

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from fedprune.core.errors import ModelError
from fedprune.runtime.session import OnnxSession
from fedprune_export.importing import ImportChoices, export_torch, import_onnx, load, read_source
from fedprune_export.importing.metadata import FROZEN_KEY, PARAMETERS_KEY, write_properties
from fedprune_export.importing.sources import torch_module
from fedprune_export.importing.timm_models import timm_name
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.ir.sample_inputs import sample_feeds, vocabulary_size
from fedprune_export.pruning.model import Model
from support.nets import published_nets as zoo
from support.nets import small_nets as nets
from support.oracles.cutting import distance, inputs, outputs

pytestmark = pytest.mark.torch

F32 = np.dtype(np.float32)


def _port(*shape: int | str) -> list[Port]:
    return [Port("x", F32, shape)]


class TwoNames(nn.Module):
    """Modules and tensors that are registered twice, and a frozen bias."""

    input_shape = (4,)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.second, self.again = self.first, self.norm
        self.shared, self.out = nn.Linear(4, 4, bias=False), nn.Linear(4, 2)
        self.shared.weight = self.first.weight
        self.first.bias.requires_grad = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.shared(self.again(self.second(self.norm(self.first(x))))))


@pytest.fixture(scope="module")
def two_names() -> tuple[TwoNames, Model]:
    module = TwoNames()
    return module, import_onnx(export_torch(module), "net")


def test_what_has_several_names_is_one_tensor_with_the_first(two_names: tuple[TwoNames, Model]) -> None:
    module, model = two_names
    assert set(model.tensors) == {n for n, _ in module.named_parameters()} | {"norm.running_mean", "norm.running_var"}
    assert any("first.weight is second.weight and shared.weight too" in note for note in model.notes)
    x = inputs(model, 7)
    with torch.no_grad():
        assert distance(outputs(model.graph, x), module.eval()(torch.from_numpy(x)).numpy()) < 1e-5


def test_frozen_parameters_are_known_also_after_a_round_trip(two_names: tuple[TwoNames, Model]) -> None:
    _, model = two_names
    reloaded = import_onnx(model.graph.to_bytes(), "net")
    assert model.frozen == reloaded.frozen == ("first.bias",)
    assert "first.bias" in model.tensors
    assert reloaded.architecture.digest == model.architecture.digest


def test_a_frozen_parameter_that_is_renamed() -> None:
    class Odd(nn.Module):
        input_shape = (4,)

        def __init__(self) -> None:
            super().__init__()
            self.lr, self.out = nn.Parameter(torch.ones(4, 3), requires_grad=False), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(x @ self.lr)

    assert import_onnx(export_torch(Odd()), "odd").frozen == ("lr_",)


@pytest.mark.parametrize("text", ["3", "[1]", '["nothing"]', "[" * 5000])
@pytest.mark.parametrize("key", [FROZEN_KEY, PARAMETERS_KEY])
def test_metadata_that_make_no_sense_are_refused(key: str, text: str) -> None:
    proto = onnx.load_model_from_string(export_torch(nets.lenet()))
    write_properties(proto, {key: text})
    with pytest.raises(ModelError, match=f"metadata {key}"):
        import_onnx(proto.SerializeToString(), "net")


def _two_outputs(scores: str = "scores") -> bytes:
    graph = Graph(inputs=_port("N", 3), initializers={"w": np.ones((3, 2), np.float32)})
    graph.emit("MatMul", "x", "w", out=scores)
    graph.emit("Neg", "x", out="features")
    graph.outputs = [Port("features", F32, ("N", 3)), Port(scores, F32, ("N", 2))]
    return graph.to_bytes()


def test_one_of_several_outputs_is_chosen(tmp_path: Path) -> None:
    (tmp_path / "two.onnx").write_bytes(_two_outputs())
    chosen = [
        import_onnx(_two_outputs(), "two", ImportChoices(output="scores")),
        import_onnx(read_source(tmp_path / "two.onnx", ImportChoices(output="scores")), "two"),
        load(tmp_path / "two.onnx", output="scores"),
    ]
    assert [m.architecture.classes for m in chosen] == [2, 2, 2]
    assert len({m.architecture.digest for m in chosen}) == 1


# The second is as tf2onnx joins names.
@pytest.mark.parametrize("scores", ["scores", "net/dense/BiasAdd;net/dense/MatMul/ReadVariableOp;" * 5])
def test_several_outputs_without_a_choice_or_with_another_one_are_listed(scores: str) -> None:
    with pytest.raises(ModelError, match=rf"1 and 2 \(features, {scores}\)"):
        import_onnx(_two_outputs(scores), "two")
    with pytest.raises(ModelError, match="features, scores, got 'logits'"):
        import_onnx(_two_outputs(), "two", ImportChoices(output="logits"))


@pytest.mark.parametrize("choice", [{"prefer": 3}, {"output": ["logits"]}])
def test_choices_that_no_file_can_hold_are_errors_of_the_model(choice: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        import_onnx(_two_outputs(), "two", ImportChoices(**choice))


def test_parameters_can_be_listed(tmp_path: Path) -> None:
    graph = Graph(inputs=_port("N", 3))
    graph.initializers.update(a=np.ones((3, 3), np.float32), b=np.ones((3, 2), np.float32))
    graph.outputs = [Port(graph.emit("MatMul", graph.emit("MatMul", "x", "a"), "b"), F32, ("N", 2))]
    (tmp_path / "net.onnx").write_bytes(graph.to_bytes())
    assert set(load(tmp_path / "net.onnx").tensors) == {"a", "b"}
    assert set(load(tmp_path / "net.onnx", parameters=["b"]).tensors) == {"b"}
    assert set(import_onnx(read_source(tmp_path / "net.onnx", ImportChoices(parameters=["b"])), "net").tensors) == {"b"}
    with pytest.raises(ModelError, match="got 'c'"):
        load(tmp_path / "net.onnx", parameters=["c"])


class Tokens(nn.Module):
    """The mean of embedded tokens, with positions."""

    input_shape = (6,)
    input_dtype = torch.int64

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(37, 16), nn.Embedding(6, 16)
        self.hidden, self.out = nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.hidden(self.tokens(x) + self.places(torch.arange(6)))).mean(1))


@pytest.mark.parametrize("example", [False, True])
def test_identifiers_as_input(example: bool) -> None:
    module = Tokens()
    model = import_onnx(export_torch((module, torch.zeros((1, 6), dtype=torch.int64)) if example else module), "tokens")
    x = np.random.default_rng(0).integers(0, 37, (7, 6))
    assert model.graph.inputs[0].dtype == np.int64
    assert model.architecture.input_shape == (6,)
    assert vocabulary_size(model.graph) == 37
    assert {t.name: t.kind for t in model.architecture.tensors}["tokens.weight"] == "weight"
    with torch.no_grad():
        expected = module(torch.from_numpy(x)).numpy()
    assert distance(OnnxSession(model.graph.to_bytes()).run({"x": x})["logits"], expected) < 1e-5
    drawn = sample_feeds(model.graph, 500)["x"]
    assert (drawn.min(), drawn.max()) == (0, 36)


@zoo.needs_timm
def test_a_network_of_timm_by_name() -> None:
    model = load("timm:test_resnet", input_shape=(1, 32, 32))
    assert model.architecture.name == "test_resnet"
    assert model.architecture.input_shape == (1, 32, 32)
    assert model.architecture.classes == 1000
    assert timm_name("test_resnet") == "test_resnet"
    assert timm_name("no_such_network") == timm_name("models/resnet18.onnx") == timm_name("nets:lenet") == ""


# At every push the test above loads a network of timm.
@pytest.mark.soak
@zoo.needs_timm
@pytest.mark.parametrize("broken", [pytest.param(False, id="missing"), pytest.param(True, id="broken")])
def test_networks_of_timm_load_without_torchvision(tmp_path: Path, broken: bool) -> None:
    body = "raise RuntimeError('operator torchvision::nms does not exist')" if broken else "raise ImportError"
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(body)
    code = """
import os
import subprocess
import sys
from fedprune.core.errors import MissingExtraError
from fedprune_export.importing.timm_models import timm_model

network, shape = timm_model("test_resnet")
assert shape == (3, 160, 160), shape
assert not [name for name in sys.modules if name.startswith("torchvision")]
from timm.data.transforms import ToTensor, transforms

try:
    transforms.Compose([])
except MissingExtraError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "timm needs torchvision's Compose" in done.stdout, done.stderr


class Picked(nn.Module):
    """A buffer that is called as the operator that reads it names its result."""

    input_shape = (6,)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("index", torch.tensor([2, 0, 1]))
        self.first, self.last = nn.Linear(6, 3), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x)[:, self.index])


class Scaled(nn.Module):
    """An argument that is called as a parameter."""

    input_shape = (6,)

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.last = nn.Parameter(torch.randn(6)), nn.Linear(6, 2)

    def forward(self, scale: torch.Tensor) -> torch.Tensor:
        return self.last(scale * self.scale)


@pytest.mark.parametrize("kind", [Picked, Scaled])
def test_values_of_one_name_are_told_apart(kind: type[nn.Module]) -> None:
    module = kind()
    model = import_onnx(export_torch(module), "net")
    x = inputs(model, 7)
    assert set(model.tensors) == {n for n, _ in module.named_parameters()}
    with torch.no_grad():
        assert distance(outputs(model.graph, x), module(torch.from_numpy(x)).numpy()) < 1e-5


def test_reading_a_source_thaws_nothing_that_the_process_froze() -> None:
    gc.freeze()
    assert torch_module("net.onnx") is None
    assert gc.get_freeze_count() > 0
    assert gc.isenabled()
