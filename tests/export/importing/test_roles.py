"""Every trainable tensor stays trainable, and is known by what it is for; nothing becomes a constant in silence."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from fedprune.core.errors import ModelError
from fedprune.model.features import Features
from fedprune_export.importing import PARAMETERS_KEY, export_torch, import_onnx
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph
from support.nets import small_nets as nets
from support.nets.exporter import users_file
from support.oracles.cutting import cut_error, random_selection

pytestmark = pytest.mark.torch

F32 = np.dtype(np.float32)


class Gated(nn.Module):
    """A convolution that is scaled by squashed parameters, and shifted by some of a longer row."""

    input_shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
        self.gate, self.shift = nn.Parameter(torch.randn(8, 1, 1)), nn.Parameter(torch.randn(1, 12, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc((self.conv(x) * torch.sigmoid(self.gate) + self.shift[:, :8]).relu().mean((2, 3)))


class Functional(nn.Module):
    """A convolution with a computed kernel."""

    input_shape = (3, 8, 8)

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.w, self.fc = how, nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "scaled":
            kernel = self.w * 0.3
        elif self.how == "squashed":
            kernel = torch.tanh(self.w)
        else:
            kernel = self.w - self.w.mean((1, 2, 3), keepdim=True)
        return self.fc(torch.conv2d(x, kernel).relu().mean((2, 3)))


class Odd(nn.Module):
    """One parameter at an operator where weights are seldom."""

    input_shape = (6,)

    def __init__(self, use: Any) -> None:
        super().__init__()
        self.use, self.odd, self.fc = use, nn.Parameter(torch.rand(1, 6) + 1), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.use(x, self.odd)[:, :6])


def import_module(module: nn.Module) -> Model:
    torch.manual_seed(0)
    return import_onnx(export_torch(module), "net")


def kinds(model: Model) -> dict[str, str]:
    return {t.name: t.kind.value for t in model.architecture.tensors}


def test_parameters_behind_other_operators_are_trained() -> None:
    model = import_module(Gated())
    assert {"gate": "norm_scale", "shift": "bias"}.items() <= kinds(model).items()
    assert {"gate", "shift"} <= {p.name for p in training_graph(model, Features()).inputs}


@pytest.mark.parametrize("how", ["scaled", "squashed", "centred"])
def test_a_computed_kernel_is_a_weight_and_a_layer(how: str) -> None:
    model = import_module(Functional(how))
    assert kinds(model)["w"] == "weight"
    assert [(n.weight, n.output_axis) for n in model.architecture.layers if n.weight] == [("w", 0), ("fc.weight", 0)]
    for i in range(len(model.architecture.groups)):
        assert cut_error(model, random_selection(model, 0.5, seed=i)) < 1e-5


@pytest.mark.parametrize(
    "use",
    [lambda x, p: torch.cat([x, p.expand(x.shape[0], 6)], 1), lambda x, p: x.abs() ** p, lambda x, p: torch.exp(p) * x],
    ids=["concat", "pow", "exp"],
)
def test_a_listed_parameter_is_never_lost(use: Any) -> None:
    assert {"odd", "fc.weight", "fc.bias"} == set(kinds(import_module(Odd(use))))


def graph_of(odd: np.ndarray[Any, Any]) -> Graph:
    """A graph that doesn't say which initialisers are weights."""
    graph = Graph(inputs=[Port("image", F32, ("N", 6))])
    graph.initializers = {"odd": odd, "w": np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)}
    graph.outputs = [Port(graph.emit("Gemm", graph.emit("Max", "image", "odd"), "w"), F32, ("N", 4))]
    return graph


def test_without_a_list_a_tensor_of_unknown_use_is_a_constant_and_named() -> None:
    model = import_onnx(graph_of(np.arange(6, dtype=np.float32)).to_bytes(), "net")
    assert set(model.tensors) == {"w"}
    assert any("Tensor odd is taken for a constant" in note for note in model.notes)


def test_one_number_is_a_constant_without_a_note() -> None:
    assert import_onnx(graph_of(np.ones(1, np.float32)).to_bytes(), "net").notes == ()


class Shifting(nn.Module):
    """Pictures are normalised by buffers; a scale of channels is a buffer too, a mixing number a parameter."""

    input_shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.mix = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), nn.Parameter(torch.tensor(0.3))
        for name, shape in (("mean", (3, 1, 1)), ("deviation", (3, 1, 1)), ("scale", (8, 1, 1))):
            self.register_buffer(name, torch.rand(shape) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv((x - self.mean) / self.deviation).relu() * self.scale
        return self.fc((h + self.mix * h.tanh()).mean((2, 3)))


def bare(module: nn.Module) -> bytes:
    """A module as torch writes it, which doesn't say what is trained."""
    proto = onnx.load_model_from_string(export_torch(module))
    del proto.metadata_props[:]
    raw: bytes = proto.SerializeToString()
    return raw


def test_without_a_list_what_normalises_the_input_is_a_constant_and_guesses_are_named() -> None:
    model = import_onnx(bare(Shifting()), "net")
    assert set(model.tensors) == {"conv.weight", "conv.bias", "scale", "fc.weight", "fc.bias"}
    notes = [n for n in model.notes if "--parameters" in n]
    assert [n.partition(". --")[0] for n in notes] == [
        "Taken for constants, as they apply straight to the input: mean, deviation",
        "Trained because they are added, multiplied or concatenated, as constants may be too: scale",
        "Single numbers that are taken for constants: mix",
    ]


def test_without_a_list_grids_of_boxes_are_constants_and_named() -> None:
    def build(g: Graph) -> str:
        boxes = g.emit("Add", g.emit("MatMul", "image", "weight"), "grid")
        return g.emit("Flatten", g.emit("Conv", g.emit("Mul", boxes, "strides"), "bins"))

    rng = np.random.default_rng(0)
    graph = Graph(inputs=[Port("image", F32, ("n", 3, 3))])
    graph.initializers["bins"] = np.arange(3, dtype=np.float32).reshape(1, 3, 1)
    graph.initializers["weight"] = rng.standard_normal((3, 4)).astype(np.float32)
    graph.initializers["grid"] = np.array([[0.5, 0.5, 1.5, 0.5], [2.5, 0.5, 3.5, 0.5], [0.5] * 4], np.float32)
    graph.initializers["strides"] = np.array([[8], [16], [32]], np.float32)
    graph.outputs = [Port(build(graph), F32, ("n", 4))]
    model = import_onnx(graph.to_bytes(), "net")
    assert [t.name for t in model.architecture.trainable] == ["weight"]
    (note,) = [note for note in model.notes if "positions, strides, anchors" in note]
    assert all(name in note for name in ("grid", "strides", "bins"))


def test_with_a_list_nothing_is_guessed() -> None:
    model = import_onnx(export_torch(Shifting()), "net")
    assert set(model.tensors) == {"conv.weight", "conv.bias", "mix", "fc.weight", "fc.bias"}
    assert not any("--parameters" in n for n in model.notes)


@pytest.mark.parametrize("make", [nets.lenet, nets.resnet20_bn])
def test_biases_of_layers_are_no_guesses(make: Callable[[], nn.Module]) -> None:
    assert not any("--parameters" in n for n in import_onnx(bare(make()), "net").notes)


def test_a_listed_tensor_of_another_type_is_refused() -> None:
    graph = graph_of(np.zeros(6, np.float32))
    graph.initializers["odd"] = np.arange(6)
    graph.nodes.insert(0, type(graph.nodes[0])("Cast", ["odd"], ["cast"], {"to": 1}))
    graph.nodes[1].inputs[1] = "cast"
    proto = graph.to_proto()
    proto.metadata_props.add(key=PARAMETERS_KEY, value='["odd", "w"]')
    with pytest.raises(ModelError, match=r"odd: .*int64"):
        import_onnx(proto.SerializeToString(), "net")


@pytest.mark.parametrize(
    ("build", "weight", "kind"),
    [
        (lambda g, x: g.emit("Conv", "image", "last", "one"), (1, 3, 2, 2), "bias"),
        (lambda g, x: g.emit("ConvTranspose", "image", "last", "one"), (3, 1, 2, 2), "bias"),
        (lambda g, x: g.emit("Gemm", x, "last", "one"), (12, 1), "bias"),
        (lambda g, x: g.emit("Add", g.emit("MatMul", x, "last"), "one"), (12, 1), "bias"),
        (lambda g, x: g.emit("PRelu", g.emit("MatMul", x, "last"), "one"), (12, 5), "weight"),
    ],
)
def test_a_parameter_of_one_number_is_trained(
    build: Callable[[Graph, str], str], weight: tuple[int, ...], kind: str
) -> None:
    tensors = {"last": np.random.default_rng(0).standard_normal(weight).astype(np.float32), "one": np.full(1, 0.3, F32)}
    graph = Graph(inputs=[Port("image", F32, ("batch", 3, 2, 2))], initializers=tensors)
    graph.outputs = [Port(build(graph, graph.emit("Flatten", "image")), F32, ("batch", *([None] * (len(weight) - 1))))]
    model = import_onnx(graph.to_bytes(), "net")
    assert model.architecture.by_name["one"].kind == kind
    assert not model.notes
    assert "one::next" in {p.name for p in training_graph(model, Features(loss="mse")).outputs}


class Tokens(nn.Module):
    """Patches behind a class token that is repeated for each image, learnt positions, a layer."""

    input_shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 12, 4, 4), nn.Parameter(torch.zeros(1, 1, 12))
        self.places, self.fc = nn.Parameter(torch.randn(1, 5, 12)), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        return self.fc(torch.tanh(torch.cat([self.token.expand(x.shape[0], -1, -1), patches], 1) + self.places)[:, 0])


@pytest.mark.parametrize("opset", [14, 20])
def test_a_class_token_of_a_file_is_trained_and_cut_as_the_modules_is(opset: int) -> None:
    torch.manual_seed(0)
    module = Tokens()
    model, of_module = import_onnx(users_file(module, opset), "net"), import_module(module)
    assert [g.size for g in model.architecture.groups] == [g.size for g in of_module.architecture.groups] == [12]
    assert kinds(model) == kinds(of_module)
    assert {"token::next", "places::next"} <= {p.name for p in training_graph(model, Features()).outputs}
    assert cut_error(model, random_selection(model, 0.5, seed=0)) < 1e-5
    assert any("token, places. --parameters" in note for note in model.notes)


def test_coordinates_beside_the_input_and_single_numbers_are_constants() -> None:
    graph = Graph(inputs=[Port("image", F32, ("N", 6))])
    batch = graph.emit("Shape", "image", attrs={"end": 1})
    sizes = {"odd": (1, 4), "one": (1, 1), "w": (11, 4)}
    graph.initializers = {name: np.random.default_rng(0).random(size, F32) for name, size in sizes.items()}
    pieces = ["image"]
    for name in ("odd", "one"):
        size = graph.emit("Concat", batch, graph.ints(sizes[name][1]), attrs={"axis": 0})
        pieces.append(graph.emit("Expand", name, size))
    graph.outputs = [Port(graph.emit("Gemm", graph.emit("Concat", *pieces, attrs={"axis": 1}), "w"), F32, ("N", 4))]
    model = import_onnx(graph.to_bytes(), "net")
    assert set(model.tensors) == {"w"}
    assert any("straight to the input: odd. --parameters" in note for note in model.notes)
