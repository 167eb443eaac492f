"""A model that ends in probabilities isn't trained as if they were logits."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from fedprune.core.errors import ModelError
from fedprune.model.features import Features
from fedprune.runtime.session import OnnxSession
from fedprune_export.bundles.conversion import onnx_file
from fedprune_export.importing import ImportChoices, import_onnx
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph
from support.oracles.cutting import distance, outputs

F32 = np.dtype(np.float32)
Build = Callable[[Graph, str], str]


def raw(build: Build, shape: tuple[int | None, ...] = (4,), length: int = 0) -> bytes:
    """A model whose logits `l`, of 4 classes, go through what is built."""
    rng = np.random.default_rng(0)
    inputs = (10, length) if length else (10,)
    weight = rng.standard_normal((4, 10, 1) if length else (10, 4)).astype(np.float32)
    graph = Graph(inputs=[Port("image", F32, ("batch", *inputs))], initializers={"w": weight})
    logits = graph.emit("Conv" if length else "MatMul", "image", "w", out="l")
    graph.outputs = [Port(build(graph, logits), F32, ("batch", *shape))]
    return graph.to_bytes()


def softmax(g: Graph, logits: str, axis: int = 1) -> str:
    return g.emit("Softmax", logits, attrs={"axis": axis})


def clip(g: Graph, logits: str) -> str:
    return g.emit("Clip", softmax(g, logits), g.scalar(1e-7), g.scalar(1 - 1e-7))


def transpose(g: Graph, logits: str) -> str:
    last = softmax(g, g.emit("Transpose", logits, attrs={"perm": [0, 2, 1]}), -1)
    return g.emit("Transpose", last, attrs={"perm": [0, 2, 1]})


REMOVED: dict[str, tuple[Build, tuple[int | None, ...], int]] = {
    "reshape": (lambda g, x: g.emit("Reshape", softmax(g, x), g.ints(-1, 4)), (4,), 0),
    "cast": (lambda g, x: g.emit("Cast", softmax(g, x), attrs={"to": 1}), (4,), 0),
    "unsqueeze": (lambda g, x: g.emit("Unsqueeze", softmax(g, x), g.ints(2)), (4, 1), 0),
    "clip": (clip, (4,), 0),
    "places": (softmax, (4, 6), 6),
    "turned": (transpose, (4, 6), 6),
    "coarse clip": (lambda g, x: g.emit("Clip", softmax(g, x), g.scalar(1e-4), g.scalar(1 - 1e-4)), (4,), 0),
    "log": (lambda g, x: g.emit("Identity", g.emit("LogSoftmax", x, attrs={"axis": 1})), (4,), 0),
}


@pytest.mark.parametrize("name", REMOVED)
def test_a_softmax_before_what_passes_it_on_is_removed_and_said(name: str) -> None:
    build, shape, length = REMOVED[name]
    model = import_onnx(raw(build, shape, length), "net")
    assert len(model.notes) == 1
    x = np.random.default_rng(1).standard_normal((3, 10, length) if length else (3, 10)).astype(np.float32)
    plain = OnnxSession(raw(lambda g, logits: logits, (4,), length)).run({"image": x})["l"]
    assert distance(outputs(model.graph, x).reshape(plain.shape), plain) < 1e-6
    check_written(model, raw(build, shape, length), x)


def check_written(model: Model, file: bytes, x: npt.NDArray[np.float32]) -> None:
    """The written model gives the file's own output behind its logits."""
    (expected,) = OnnxSession(file).run({"image": x}).values()
    written = OnnxSession(onnx_file(model.graph, model.tensors, "net")).run({"x": x})
    assert distance(next(v for n, v in written.items() if n != "logits"), expected) < 1e-6


LAST_AXIS: dict[str, Build] = {
    "probabilities": lambda g, x: softmax(g, g.emit("Transpose", x, attrs={"perm": [0, 2, 1]}), -1),
    "decisions": lambda g, x: g.emit(
        "Cast", g.emit("ArgMax", g.emit("Transpose", x, attrs={"perm": [0, 2, 1]}), attrs={"axis": 2}), attrs={"to": 1}
    ),
}


@pytest.mark.parametrize("name", LAST_AXIS)
def test_classes_on_the_last_axis_are_moved_to_axis_1_if_the_loss_compares_with_classes(name: str) -> None:
    file = raw(LAST_AXIS[name], (6, 4 if name == "probabilities" else 1), 6)
    model = import_onnx(file, "net", ImportChoices(loss="cross_entropy"))
    assert model.architecture.output_shape == (4, 6)
    assert "on axis 2, moved to axis 1" in model.notes[0]
    x = np.random.default_rng(1).standard_normal((3, 10, 6)).astype(np.float32)
    plain = OnnxSession(raw(lambda g, logits: logits, (4,), 6)).run({"image": x})["l"]
    assert distance(outputs(model.graph, x), plain) < 1e-6
    check_written(model, file, x)


@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_a_sigmoid_is_part_of_a_loss_of_several_labels(shape: tuple[int, ...]) -> None:
    def build(g: Graph, logits: str) -> str:
        shares = g.emit("Sigmoid", logits)
        return shares if shape == (4,) else g.emit("Reshape", shares, g.ints(-1, *shape))

    model = import_onnx(raw(build, shape), "net", ImportChoices(loss="bce"))
    assert "Sigmoid" not in [n.op for n in model.graph.nodes]
    assert model.architecture.output_shape == shape
    training_graph(model, Features(loss="bce"))
    check_written(model, raw(build, shape), np.random.default_rng(1).standard_normal((3, 10)).astype(np.float32))
    for loss in ("mse", "cross_entropy", None):
        model = import_onnx(raw(build, shape), "net", ImportChoices(loss=loss))
        assert "Sigmoid" in [n.op for n in model.graph.nodes]


def shares(g: Graph, logits: str) -> str:
    powers = g.emit("Exp", logits)
    return g.emit("Div", powers, g.emit("ReduceSum", powers, g.ints(1), attrs={"keepdims": 1}))


REFUSED: dict[str, tuple[Build, tuple[int | None, ...], int]] = {
    "sigmoid": (lambda g, x: g.emit("Sigmoid", x), (4,), 0),
    "hard sigmoid": (lambda g, x: g.emit("HardSigmoid", x), (4,), 0),
    "another axis": (lambda g, x: softmax(g, x, 2), (4, 6), 6),
    "one class": (lambda g, x: g.emit("Slice", softmax(g, x), g.ints(1), g.ints(2), g.ints(1)), (1,), 0),
    "an ensemble": (lambda g, x: g.emit("Mul", g.emit("Add", softmax(g, x), softmax(g, x)), g.scalar(0.5)), (4,), 0),
    "shares": (shares, (4,), 0),
    "a fraction": (
        lambda g, x: g.emit("Div", g.scalar(1), g.emit("Add", g.scalar(1), g.emit("Exp", g.emit("Neg", x)))),
        (4,),
        0,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("loss", ["cross_entropy"])
def test_other_probabilities_are_no_logits(name: str, loss: str) -> None:
    model = import_onnx(raw(*REFUSED[name]), "net")
    with pytest.raises(ModelError, match="probabilities") as caught:
        training_graph(model, Features(loss=loss))
    assert caught.value.hint
    training_graph(model, Features(loss="mse"))


def test_what_only_resembles_probabilities_is_trained() -> None:
    for build in (
        lambda g, x: g.emit("Mul", x, g.emit("Sigmoid", x)),
        lambda g, x: g.emit("Mul", g.emit("Sigmoid", x), g.scalar(10)),
    ):
        training_graph(import_onnx(raw(build), "net"), Features(loss="bce"))


def test_the_value_before_a_sigmoid_can_be_the_output() -> None:
    file = raw(REFUSED["sigmoid"][0])
    model = import_onnx(file, "net", ImportChoices(output="l"))
    assert [n.op for n in model.graph.nodes] == ["MatMul"]
    training_graph(model, Features(loss="bce"))
    check_written(model, file, np.random.default_rng(1).standard_normal((3, 10)).astype(np.float32))
