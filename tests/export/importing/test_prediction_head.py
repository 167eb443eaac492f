"""Files that end in decisions are trained from the values before them, and written with their own end."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from fedprune.core.errors import ModelError
from fedprune.model.step_contract import LOGITS, X
from fedprune.runtime.session import OnnxSession
from fedprune_export.bundles.conversion import onnx_file
from fedprune_export.importing import ImportChoices, import_onnx
from fedprune_export.importing.metadata import FILE_END_KEY
from fedprune_export.importing.prediction_head import own_outputs
from fedprune_export.pruning.model import Model

INT64, FLOAT = TensorProto.INT64, TensorProto.FLOAT
PROBABILITIES = helper.make_node("Softmax", ["scores"], ["p"], axis=1)
LABEL = helper.make_node("ArgMax", ["scores"], ["label"], axis=1, keepdims=0)
ENDS: dict[str, tuple[list[onnx.NodeProto], dict[str, tuple[int, list[int | str]]]]] = {
    "argmax": ([LABEL], {"label": (INT64, ["N"])}),
    "probabilities and their argmax": (
        [PROBABILITIES, helper.make_node("ArgMax", ["p"], ["label"], axis=-1, keepdims=0)],
        {"label": (INT64, ["N"]), "p": (FLOAT, ["N", 3])},
    ),
    "scores and argmax": ([LABEL], {"scores": (FLOAT, ["N", 3]), "label": (INT64, ["N"])}),
    "the best two": (
        [helper.make_node("TopK", ["scores", "two"], ["best", "which"], axis=1)],
        {"best": (FLOAT, ["N", 2]), "which": (INT64, ["N", 2])},
    ),
    "names of classes": (
        [
            PROBABILITIES,
            helper.make_node("ArgMax", ["p"], ["number"], axis=1, keepdims=0),
            helper.make_node("ArrayFeatureExtractor", ["classes", "number"], ["name"], domain="ai.onnx.ml"),
        ],
        {"name": (INT64, [1, "N"]), "p": (FLOAT, ["N", 3])},
    ),
    "an operator of opset 18": (
        [PROBABILITIES, LABEL, helper.make_node("ReduceMax", ["p", "one"], ["surety"], keepdims=0)],
        {"label": (INT64, ["N"]), "surety": (FLOAT, ["N"])},
    ),
}
SAMPLES = np.random.default_rng(1).standard_normal((7, 5)).astype(np.float32)


def file_of(
    nodes: list[onnx.NodeProto],
    outputs: dict[str, tuple[int, list[int | str]]],
    batch: int | str = "N",
    opset: int = 17,
) -> bytes:
    """A model of two layers whose 3 `scores` go through an end."""
    rng = np.random.default_rng(0)
    values = {
        "v": rng.standard_normal((5, 8)).astype(np.float32),
        "w": rng.standard_normal((8, 3)).astype(np.float32),
        "one": np.array([1]),
        "two": np.array([2]),
        "classes": np.array([[10, 20, 30]]),
    }
    used = {"v", "w", *(i for n in nodes for i in n.input)}
    layers = [
        helper.make_node("MatMul", ["image", "v"], ["a"]),
        helper.make_node("Relu", ["a"], ["h"]),
        helper.make_node("MatMul", ["h", "w"], ["scores"]),
    ]
    graph = helper.make_graph(
        [*layers, *nodes],
        "model",
        [helper.make_tensor_value_info("image", FLOAT, [batch, 5])],
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in values.items() if name in used],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("ai.onnx.ml", 3)]
    raw: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    return raw


def check_end(raw: bytes) -> Model:
    """The import, which is written with the end of its file: it computes what the file does, and is read again."""
    model = import_onnx(raw, "model")
    written = onnx_file(model.graph, model.tensors, "model")
    before, after = OnnxSession(raw).run({"image": SAMPLES}), OnnxSession(written).run({X: SAMPLES})
    assert after.keys() == {LOGITS, *before}
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, rtol=1e-5, atol=1e-6)
    again = import_onnx(written, "model")
    assert again.architecture.digest == model.architecture.digest
    assert onnx_file(again.graph, again.tensors, "model") == written
    return model


@pytest.mark.parametrize("end", ENDS)
def test_a_file_is_written_with_its_own_end(end: str) -> None:
    model = check_end(file_of(*ENDS[end], opset=18 if end == "an operator of opset 18" else 17))
    assert model.architecture.output_shape == (3,)
    assert any("'scores'" in note for note in model.notes)


def test_maps_of_probabilities_become_their_tensor() -> None:
    """scikit-learn's exporter ends classifiers in ZipMap: a dictionary of probabilities for each sample."""
    zip_map = helper.make_node("ZipMap", ["p"], ["maps"], domain="ai.onnx.ml", classlabels_int64s=[10, 20, 30])
    proto = onnx.load_model_from_string(file_of([PROBABILITIES, LABEL, zip_map], ENDS["argmax"][1]))
    kind = helper.make_sequence_type_proto(helper.make_map_type_proto(INT64, helper.make_tensor_type_proto(FLOAT, [])))
    proto.graph.output.append(helper.make_value_info("maps", kind))
    raw = proto.SerializeToString()
    model = import_onnx(raw, "model")
    assert any("ZipMap" in note for note in model.notes)
    written = onnx_file(model.graph, model.tensors, "model")
    label, maps = onnxruntime.InferenceSession(raw).run(["label", "maps"], {"image": SAMPLES})
    after = OnnxSession(written).run({X: SAMPLES})
    np.testing.assert_array_equal(after["label"], label)
    np.testing.assert_allclose(after["maps"], [list(sample.values()) for sample in maps], rtol=1e-5, atol=1e-6)


def test_ends_along_different_axes_are_left_to_the_user() -> None:
    nodes = [
        helper.make_node("Unsqueeze", ["scores", "one"], ["rows"]),
        helper.make_node("ArgMax", ["rows"], ["label"], axis=2, keepdims=0),
        helper.make_node("ArgMax", ["rows"], ["place"], axis=1, keepdims=0),
    ]
    with pytest.raises(ModelError, match="--output"):
        import_onnx(file_of(nodes, {"label": (INT64, ["N", 1]), "place": (INT64, ["N", 3])}), "model")


def inner_model(kind: str) -> bytes:
    """A model whose scores, probabilities and label are computed in a function, or in a branch on a constant."""
    proto = onnx.load_model_from_string(file_of([PROBABILITIES, LABEL], ENDS["probabilities and their argmax"][1]))
    graph, inner = proto.graph, list(proto.graph.node[2:])
    outputs = [o.name for o in graph.output]
    del graph.node[2:]
    if kind == "function":
        function = helper.make_function("own", "Decide", ["h", "w"], outputs, inner, [helper.make_opsetid("", 17)])
        proto.functions.append(function)
        proto.opset_import.append(helper.make_opsetid("own", 1))
        graph.node.append(helper.make_node("Decide", ["h", "w"], outputs, domain="own"))
    else:
        branch = helper.make_graph(inner, "branch", [], list(graph.output))
        graph.initializer.append(numpy_helper.from_array(np.array(True), "always"))
        graph.node.append(helper.make_node("If", ["always"], outputs, then_branch=branch, else_branch=branch))
    raw: bytes = proto.SerializeToString()
    return raw


@pytest.mark.parametrize("kind", ["function", "branch"])
def test_an_end_inside_a_function_or_branch_is_found(kind: str) -> None:
    assert "Softmax, ArgMax" in " ".join(check_end(inner_model(kind)).notes)


def test_an_end_for_one_sample_at_a_time_takes_several() -> None:
    """Files with a fixed batch reshape to a batch of 1."""
    nodes = [
        helper.make_node("Softmax", ["scores"], ["wide"], axis=1),
        helper.make_node("Constant", [], ["row"], value=numpy_helper.from_array(np.array([1, 3, 1]))),
        helper.make_node("Reshape", ["wide", "row"], ["p"]),
        helper.make_node("ArgMax", ["p"], ["label"], axis=1, keepdims=0),
    ]
    raw = file_of(nodes, {"p": (FLOAT, [1, 3, 1]), "label": (INT64, [1, 1])}, batch=1)
    model = import_onnx(raw, "model")
    written = onnx_file(model.graph, model.tensors, "model")
    declared = {o.name: o.type.tensor_type.shape.dim for o in onnx.load_model_from_string(written).graph.output}
    assert [declared[name][0].dim_param for name in ("p", "label")] == ["N", "N"]
    assert declared["p"][1].dim_value == 3
    after = OnnxSession(written).run({X: SAMPLES})
    single = [OnnxSession(raw).run({"image": row[None]}) for row in SAMPLES]
    for name in ("p", "label"):
        np.testing.assert_allclose(after[name], np.concatenate([s[name] for s in single]), rtol=1e-5, atol=1e-6)


def test_logits_whose_classes_are_last_stay_an_output_beside_those_that_are_trained() -> None:
    """As of token classifiers: the logits of each position, and their probabilities."""
    nodes = [
        helper.make_node("Unsqueeze", ["scores", "one"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["p"], axis=2),
    ]
    raw = file_of(nodes, {"logits": (FLOAT, ["N", 1, 3]), "p": (FLOAT, ["N", 1, 3])})
    model = import_onnx(raw, "model", ImportChoices(loss="cross_entropy"))
    after, before = OnnxSession(onnx_file(model.graph, model.tensors, "model")).run({X: SAMPLES}), OnnxSession(raw)
    assert after[LOGITS].shape == (7, 3, 1)
    for name, value in before.run({"image": SAMPLES}).items():
        np.testing.assert_allclose(after["logits_" if name == LOGITS else name], value, rtol=1e-5, atol=1e-6)


def test_an_activation_at_the_end_is_no_decision() -> None:
    nodes = [
        helper.make_node("Sigmoid", ["scores"], ["gate"]),
        helper.make_node("Mul", ["scores", "gate"], ["swish"]),
        helper.make_node("Neg", ["swish"], ["negative"]),
    ]
    outputs: dict[str, tuple[int, list[int | str]]] = {"swish": (FLOAT, ["N", 3]), "negative": (FLOAT, ["N", 3])}
    with pytest.raises(ModelError, match="which output gives the logits"):
        import_onnx(file_of(nodes, outputs), "model")


@pytest.mark.parametrize("op", ["Tile", "Add"])
def test_an_end_that_would_fill_the_memory_is_left_out(op: str) -> None:
    count = np.array([1, 2**40]) if op == "Tile" else np.zeros((2**10, 2**10, 2**4, 1, 1), np.int8)
    nodes = [
        LABEL,
        helper.make_node("Constant", [], ["count"], value=numpy_helper.from_array(count)),
        helper.make_node("Tile", ["scores", "count"], ["wide"])
        if op == "Tile"
        else helper.make_node("Add", ["scores", "many"], ["wide"]),
    ]
    if op == "Add":
        nodes.insert(2, helper.make_node("Cast", ["count"], ["many"], to=FLOAT))
    raw = file_of(nodes, {"label": (INT64, ["N"]), "wide": (FLOAT, [None] * (2 if op == "Tile" else 5))})
    assert any("Predictions lack the file's own end" in note for note in import_onnx(raw, "model").notes)


def test_a_damaged_end_is_refused() -> None:
    with pytest.raises(ModelError, match="in base64"):
        own_outputs({FILE_END_KEY: "7"})
