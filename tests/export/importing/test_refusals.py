"""What can't be trained is refused with its reason and a way out; what only looks so is taken."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from fedprune.core.errors import ModelError
from fedprune.model.features import Features
from fedprune_export.importing import ImportChoices, import_onnx
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.training.step_graph import training_graph

F32 = np.dtype(np.float32)


def random(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def raw(
    build: Callable[[Graph], str],
    tensors: Mapping[str, np.ndarray[Any, Any]],
    shape: tuple[int, ...] = (6,),
    out: tuple[int | str | None, ...] = ("N", 4),
    kind: Any = np.float32,
) -> bytes:
    """A model of samples `image` with tensors, as bytes of a file."""
    graph = Graph(inputs=[Port("image", F32, ("N", *shape))], initializers=dict(tensors))
    graph.outputs = [Port(build(graph), np.dtype(kind), out)]
    return graph.to_bytes()


def check_refusal(file: bytes, *texts: str) -> None:
    with pytest.raises(ModelError) as caught:
        import_onnx(file, "net")
    for text in texts:
        assert text in str(caught.value)
    assert caught.value.hint
    assert "report" not in caught.value.hint


@pytest.mark.parametrize("low", [-np.inf, np.finfo(np.float32).min, -1e9])
def test_a_mask_is_a_constant(low: float) -> None:
    def build(g: Graph) -> str:
        q, k = g.emit("MatMul", "image", "q"), g.emit("MatMul", "image", "k")
        scores = g.emit("MatMul", q, g.emit("Transpose", k, attrs={"perm": [0, 2, 1]}))
        weights = g.emit("Softmax", g.emit("Add", scores, "mask"), attrs={"axis": -1})
        return g.emit("MatMul", g.emit("Flatten", g.emit("MatMul", weights, "image")), "last")

    mask = np.triu(np.full((5, 5), low, np.float32), 1)
    mask[np.tril_indices(5)] = 0
    tensors = {"q": random(6, 3), "k": random(6, 3), "mask": mask, "last": random(30, 4)}
    model = import_onnx(raw(build, tensors, (5, 6)), "net")
    assert set(model.tensors) == {"q", "k", "last"}
    assert any("mask" in note for note in model.notes)
    training_graph(model, Features())


def test_a_mask_of_weights_is_a_constant() -> None:
    def build(g: Graph) -> str:
        return g.emit("MatMul", g.emit("Tanh", g.emit("MatMul", "image", g.emit("Mul", "w", "mask"))), "last")

    tensors = {"w": random(6, 5), "mask": np.tri(6, 5, dtype=np.float32), "last": random(5, 4)}
    model = import_onnx(raw(build, tensors), "net")
    assert set(model.tensors) == {"w", "last"}
    assert any("mask" in note for note in model.notes)


@pytest.mark.parametrize("op", ["IsNaN", "Cast"])
def test_an_output_of_whole_numbers_or_truths_is_named(op: str) -> None:
    def build(g: Graph) -> str:
        return g.emit(op, g.emit("MatMul", "image", "w", out="l"), attrs={"to": 7} if op == "Cast" else None)

    file = raw(build, {"w": random(6, 4)}, out=("N", 4), kind=np.bool_ if op == "IsNaN" else np.int64)
    check_refusal(file, op, "--output l ")
    training_graph(import_onnx(file, "net", ImportChoices(output="l")), Features())


def test_random_numbers_that_no_board_draws_are_named() -> None:
    def build(g: Graph) -> str:
        h = g.emit("MatMul", "image", "w")
        return g.emit("Add", h, g.emit("Cast", g.emit("Multinomial", h), attrs={"to": 1}))

    check_refusal(raw(build, {"w": random(6, 4)}), "Multinomial")


def test_texts_are_no_input() -> None:
    proto = onnx.load_model_from_string(raw(lambda g: g.emit("MatMul", "image", "w"), {"w": random(6, 4)}))
    proto.graph.input.add(name="words").type.tensor_type.elem_type = onnx.TensorProto.STRING
    check_refusal(proto.SerializeToString(), "'words' consists of texts")


def test_a_model_without_weights_says_what_it_holds() -> None:
    check_refusal(raw(lambda g: g.emit("Softplus", "image"), {}, out=("N", 6)), "trainable")


def test_it_is_said_why_nothing_can_be_cut() -> None:
    def build(g: Graph) -> str:
        h = g.emit("MatMul", "image", "w")
        batch = g.emit("Shape", "image", attrs={"end": 1})
        token = g.emit("Expand", "token", g.emit("Concat", batch, g.ints(1, 5), attrs={"axis": 0}))
        rows = g.emit("Concat", token, g.emit("Unsqueeze", h, g.ints(1)), attrs={"axis": 1})
        return g.emit("MatMul", g.emit("ReduceMean", rows, attrs={"axes": [1], "keepdims": 0}), "last")

    file = raw(build, {"w": random(6, 5), "token": random(1, 1, 5), "last": random(5, 4)})
    model = import_onnx(file, "net", ImportChoices(parameters=["w", "last"]))
    assert not model.architecture.groups
    assert any("Concat" in note for note in model.notes)


def test_some_weights_in_constant_nodes_are_named_and_can_be_listed() -> None:
    proto = onnx.load_model_from_string(
        raw(
            lambda g: g.emit("Gemm", g.emit("Relu", g.emit("Gemm", "image", "w")), "v"),
            {"w": random(6, 5), "v": random(5, 4)},
        )
    )
    (initializer,) = [t for t in proto.graph.initializer if t.name == "w"]
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=initializer))
    proto.graph.initializer.remove(initializer)
    model = import_onnx(proto.SerializeToString(), "net")
    assert set(model.tensors) == {"v"}
    assert any(": w." in note for note in model.notes)
    assert set(import_onnx(proto.SerializeToString(), "net", ImportChoices(parameters=["w", "v"])).tensors) == {
        "w",
        "v",
    }


def test_a_file_that_onnxruntime_does_not_run_is_to_be_exported_again() -> None:
    """An initial state of more units than the layer has: onnx lets it pass, onnxruntime doesn't."""

    def build(g: Graph) -> str:
        rows = g.emit("Transpose", "image", attrs={"perm": [1, 0, 2]})
        samples = g.emit("Gather", g.emit("Shape", "image"), g.ints(0), attrs={"axis": 0})
        state = g.emit("Expand", "state", g.emit("Concat", g.ints(1), samples, g.ints(9), attrs={"axis": 0}))
        hidden = g.emit("RNN", rows, "w", "r", "", "", state, attrs={"hidden_size": 3})
        last = g.emit("Squeeze", g.emit("Gather", hidden, g.ints(4), attrs={"axis": 0}), g.ints(0, 1))
        return g.emit("MatMul", last, "last")

    tensors = {"w": random(1, 3, 6), "r": random(1, 3, 3), "state": random(1, 1, 9), "last": random(3, 4)}
    check_refusal(raw(build, tensors, (5, 6)), "the file as it is: onnxruntime", "torch's other exporter")


def test_a_custom_operator_is_named_with_its_node() -> None:
    def build(g: Graph) -> str:
        value = g.emit("MyPool", g.emit("MatMul", "image", "w"))
        g.nodes[-1].name, g.nodes[-1].domain = "pool", "acme.vision"
        return value

    proto = onnx.load_model_from_string(raw(build, {"w": random(6, 4)}))
    proto.opset_import.append(helper.make_opsetid("acme.vision", 1))
    check_refusal(
        proto.SerializeToString(), "'MyPool' 'pool' is a custom operator", "acme.vision", "standard operators"
    )


def test_an_operator_that_onnx_has_withdrawn_is_named() -> None:
    def build(g: Graph) -> str:
        return g.emit("MatMul", g.emit("ConstantFill", "image", attrs={"input_as_shape": 0}), "w")

    check_refusal(raw(build, {"w": random(6, 4)}), "ConstantFill", "is no operator of ONNX")
