"""A model that ends in probabilities isn't trained as if they were logits."""

import re
from collections.abc import Callable
from functools import partial

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
    inputs = (10, length) if length else (10,)
    weight = np.random.default_rng(0).standard_normal((4, 10, 1) if length else (10, 4)).astype(np.float32)
    graph = Graph(inputs=[Port("image", F32, ("batch", *inputs))], initializers={"w": weight})
    logits = graph.emit("Conv" if length else "MatMul", "image", "w", out="l")
    graph.outputs = [Port(build(graph, logits), F32, ("batch", *shape))]
    return graph.to_bytes()


def softmax(g: Graph, logits: str, axis: int = 1) -> str:
    return g.emit("Softmax", logits, attrs={"axis": axis})


def transpose(g: Graph, logits: str) -> str:
    last = softmax(g, g.emit("Transpose", logits, attrs={"perm": [0, 2, 1]}), -1)
    return g.emit("Transpose", last, attrs={"perm": [0, 2, 1]})


REMOVED: dict[str, tuple[Build, tuple[int | None, ...], int]] = {
    "reshape": (lambda g, x: g.emit("Reshape", softmax(g, x), g.ints(-1, 4)), (4,), 0),
    "cast": (lambda g, x: g.emit("Cast", softmax(g, x), attrs={"to": 1}), (4,), 0),
    "unsqueeze": (lambda g, x: g.emit("Unsqueeze", softmax(g, x), g.ints(2)), (4, 1), 0),
    "clip": (lambda g, x: g.emit("Clip", softmax(g, x), g.scalar(1e-7), g.scalar(1 - 1e-7)), (4,), 0),
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
    check_written(model, raw(build, shape, length), check_logits(model, length))


def check_logits(model: Model, length: int = 0) -> npt.NDArray[np.float32]:
    """The model's outputs are the logits; returns the samples on which this was seen."""
    x = np.random.default_rng(1).standard_normal((3, 10, length) if length else (3, 10)).astype(np.float32)
    plain = OnnxSession(raw(lambda g, logits: logits, (4,), length)).run({"image": x})["l"]
    assert distance(outputs(model.graph, x).reshape(plain.shape), plain) < 1e-6
    return x


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
    assert any("on axis 2" in note for note in model.notes)
    check_written(model, file, check_logits(model, 6))


@pytest.mark.parametrize("shape", [(4,), (2, 2), ()])
def test_a_sigmoid_is_part_of_a_loss_of_several_labels(shape: tuple[int, ...]) -> None:
    def build(g: Graph, logits: str) -> str:
        if not shape:
            return g.emit("Squeeze", g.emit("Sigmoid", g.emit("ReduceSum", logits, g.ints(1))), g.ints(1))
        shares = g.emit("Sigmoid", logits)
        return shares if shape == (4,) else g.emit("Reshape", shares, g.ints(-1, *shape))

    model = import_onnx(raw(build, shape), "net", ImportChoices(loss="bce"))
    assert "Sigmoid" not in [n.op for n in model.graph.nodes]
    assert model.architecture.output_shape == (shape or (1,))
    training_graph(model, Features(loss="bce"))
    check_written(model, raw(build, shape), np.random.default_rng(1).standard_normal((3, 10)).astype(np.float32))
    for loss in ("mse", "cross_entropy", None) if shape else ():
        model = import_onnx(raw(build, shape), "net", ImportChoices(loss=loss))
        assert "Sigmoid" in [n.op for n in model.graph.nodes]


def shares(g: Graph, logits: str, *, inverse: bool = False) -> str:
    powers = g.emit("Exp", logits)
    total = g.emit("ReduceSum", powers, g.ints(1), attrs={"keepdims": 1})
    return g.emit("Mul", powers, g.emit("Reciprocal", total)) if inverse else g.emit("Div", powers, total)


REFUSED: dict[str, tuple[Build, tuple[int | None, ...], int]] = {
    "an inverse sum": (partial(shares, inverse=True), (4,), 0),
    "smoothed": (lambda g, x: g.emit("Mul", g.emit("Add", softmax(g, x), g.scalar(0.25)), g.scalar(0.5)), (4,), 0),
    "sigmoid": (lambda g, x: g.emit("Sigmoid", x), (4,), 0),
    "hard sigmoid": (lambda g, x: g.emit("HardSigmoid", x), (4,), 0),
    "another axis": (lambda g, x: softmax(g, x, 2), (4, 6), 6),
    "one class": (lambda g, x: g.emit("Slice", softmax(g, x), g.ints(1), g.ints(2), g.ints(1)), (1,), 0),
    "an ensemble": (lambda g, x: g.emit("Mul", g.emit("Add", softmax(g, x), softmax(g, x)), g.scalar(0.5)), (4,), 0),
    "shares": (shares, (4,), 0),
    "a fraction": (lambda g, x: g.emit("Div", (e := g.emit("Exp", x)), g.emit("Add", e, g.scalar(1))), (4,), 0),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_probabilities_are_no_logits_and_the_hint_names_those_that_there_are(name: str) -> None:
    file, length = raw(*REFUSED[name]), REFUSED[name][2]
    model = import_onnx(file, "net")
    with pytest.raises(ModelError, match="probabilities") as caught:
        training_graph(model, Features(loss="cross_entropy"))
    training_graph(model, Features(loss="mse"))
    named = re.search(r'output="(.+?)"', caught.value.hint)
    assert bool(named) is (name not in ("one class", "smoothed", "hard sigmoid"))
    if named:
        model = import_onnx(file, "net", ImportChoices(output=named[1]))
        training_graph(model, Features(loss="cross_entropy"))
        x = check_logits(model, length)
        if name == "sigmoid":
            check_written(model, file, x)


def test_what_only_resembles_probabilities_is_trained() -> None:
    for factor in (lambda g, x: x, lambda g, x: g.scalar(10)):
        file = raw(lambda g, x, factor=factor: g.emit("Mul", factor(g, x), g.emit("Sigmoid", x)))
        training_graph(import_onnx(file, "net"), Features(loss="bce"))


def test_sigmoids_that_are_all_small_are_as_exact_as_onnxruntime_s() -> None:
    """Those of a detector of rare things, behind a norm in primitives: it becomes one operator, which rounds another
    way, and a sigmoid of -14 by a tenth."""

    def rare(g: Graph, x: str) -> str:
        centred = g.emit("Sub", x, g.emit("ReduceMean", x, attrs={"axes": [1]}))
        variance = g.emit("ReduceMean", g.emit("Mul", centred, centred), attrs={"axes": [1]})
        normed = g.emit("Div", centred, g.emit("Sqrt", g.emit("Add", variance, g.scalar(1e-5))))
        return g.emit("Sigmoid", g.emit("Add", normed, g.scalar(-14)))

    assert "primitives" in import_onnx(raw(rare), "net").notes[0]


def test_small_outputs_of_a_relu_are_no_probabilities() -> None:
    file = raw(lambda g, x: g.initializers.update(w=g.initializers["w"] / 1000) or g.emit("Relu", x))
    training_graph(import_onnx(file, "net"), Features(loss="cross_entropy"))
