"""Detectors that end in NonMaxSuppression are trained from before it, or refused with the values that may be chosen."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from fedprune.core.errors import ModelError
from fedprune.runtime.bundle import open_bundle
from fedprune.runtime.prediction_head import PredictionHead
from fedprune.runtime.session import OnnxSession
from fedprune_export.bundles.conversion import onnx_file
from fedprune_export.cli.main import main
from fedprune_export.importing import ImportChoices, import_onnx
from fedprune_export.importing.model_building import build_model
from fedprune_export.ir.graph import Graph, Port
from support.oracles.cutting import distance, outputs

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
OUTPUTS: dict[str, tuple[int, list[int | str]]] = {
    "boxes": (FLOAT, ["N", 36, 4]),
    "scores": (FLOAT, ["N", 3, 36]),
    "chosen": (INT64, ["S", 3]),
    "raw": (FLOAT, ["N", 7, 36]),
}


def detector(*output_names: str, is_joined: bool = True) -> bytes:
    """Boxes of 36 places with scores of 3 classes: of one tensor `raw`, or of a convolution each."""
    rng = np.random.default_rng(0)
    values: dict[str, Any] = {
        "w": rng.standard_normal((8, 3, 3, 3)).astype(np.float32),
        **{
            name: rng.standard_normal((size, 8, 1, 1)).astype(np.float32)
            for name, size in (("u", 7), ("v", 4), ("t", 3))
        },
        **{name: np.array(shape) for name, shape in (("s7", [0, 7, -1]), ("s4", [0, 4, -1]), ("s3", [0, 3, -1]))},
        "sizes": np.array([4, 3]),
        "most": np.array([10]),
        "overlap": np.array([0.5], np.float32),
    }
    nodes = [helper.make_node("Conv", ["image", "w"], ["a"], pads=[1, 1, 1, 1]), helper.make_node("Relu", ["a"], ["h"])]
    if is_joined:
        nodes += [
            helper.make_node("Conv", ["h", "u"], ["map"]),
            helper.make_node("Reshape", ["map", "s7"], ["raw"]),
            helper.make_node("Split", ["raw", "sizes"], ["corners", "classes"], axis=1),
        ]
    else:
        nodes += [
            helper.make_node("Conv", ["h", "v"], ["box_map"]),
            helper.make_node("Reshape", ["box_map", "s4"], ["corners"]),
            helper.make_node("Conv", ["h", "t"], ["class_map"]),
            helper.make_node("Reshape", ["class_map", "s3"], ["classes"]),
        ]
    nodes += [
        helper.make_node("Transpose", ["corners"], ["boxes"], perm=[0, 2, 1]),
        helper.make_node("Sigmoid", ["classes"], ["scores"]),
        helper.make_node("NonMaxSuppression", ["boxes", "scores", "most", "overlap"], ["chosen"], name="suppress"),
    ]
    used = {i for n in nodes for i in n.input}
    graph = helper.make_graph(
        nodes,
        "detector",
        [helper.make_tensor_value_info("image", FLOAT, ["N", 3, 6, 6])],
        [helper.make_tensor_value_info(name, *OUTPUTS[name]) for name in output_names],
        [numpy_helper.from_array(value, name) for name, value in values.items() if name in used],
    )
    raw: bytes = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    return raw


@pytest.mark.parametrize("output_names", [("chosen",), ("boxes", "scores", "chosen")])
def test_training_ends_at_the_tensor_of_which_boxes_and_scores_are_made(output_names: tuple[str, ...]) -> None:
    model = import_onnx(detector(*output_names), "detector")
    assert "trained from 'raw'" in model.notes[0]
    assert "NonMaxSuppression" in model.notes[0]
    assert "needs a loss of its own" in model.notes[1]
    x = np.random.default_rng(1).standard_normal((3, 3, 6, 6)).astype(np.float32)
    (expected,) = OnnxSession(detector("raw")).run({"image": x}).values()
    assert distance(outputs(model.graph, x), expected) < 1e-6


def test_files_keep_the_chosen_boxes_and_boards_do_not() -> None:
    raw = detector("chosen")
    model = import_onnx(raw, "detector")
    assert PredictionHead.of(model.graph.metadata) is None
    written = onnx_file(model.graph, model.tensors, "detector")
    x = np.random.default_rng(1).standard_normal((3, 3, 6, 6)).astype(np.float32)
    after = OnnxSession(written).run({"x": x})
    np.testing.assert_array_equal(after["chosen"], OnnxSession(raw).run({"image": x})["chosen"])
    assert len(after["chosen"]) > 0
    again = import_onnx(written, "detector")
    assert again.architecture.digest == model.architecture.digest
    assert again.graph.metadata == model.graph.metadata


def test_classes_of_a_detector_with_a_loss_of_its_own_may_be_named(tmp_path: Path) -> None:
    """Outputs of such a loss belong to no classes: 7 numbers per place, of which 3 are scores."""
    loss = Graph(inputs=[Port("outputs", np.dtype(np.float32), ("N", 7, 36))])
    loss.inputs.append(Port("labels", np.dtype(np.float32), ("N", 10, 5)))
    total = loss.emit("ReduceSum", loss.emit("Mul", "outputs", "outputs"), loss.ints(1, 2), attrs={"keepdims": 0})
    rest = loss.emit("ReduceSum", "labels", loss.ints(1, 2), attrs={"keepdims": 0})
    loss.outputs = [Port(loss.emit("Add", total, rest), np.dtype(np.float32), ("N",))]
    (tmp_path / "loss.onnx").write_bytes(loss.to_bytes())
    (tmp_path / "net.onnx").write_bytes(detector("chosen"))
    words = ["--target", "raspberry-pi-5", "--out", str(tmp_path / "b"), "--class-names", "cup,pen,cat"]
    assert main([str(tmp_path / "net.onnx"), *words, "--loss", str(tmp_path / "loss.onnx")]) == 0
    assert open_bundle(tmp_path / "b").class_names == ("cup", "pen", "cat")


def test_without_such_a_tensor_the_error_names_the_node_and_the_values() -> None:
    raw = detector("chosen", is_joined=False)
    with pytest.raises(ModelError, match="'suppress'") as caught:
        import_onnx(raw, "detector")
    assert "corners, class_map" in caught.value.hint
    assert "--output" in caught.value.hint
    assert import_onnx(raw, "detector", ImportChoices(output="class_map")).architecture.output_shape == (3, 6, 6)


def test_a_loss_of_ones_own_takes_the_outputs_before_it() -> None:
    raw = detector("boxes", "scores", "chosen", is_joined=False)
    model = build_model(raw, "detector", own_loss=True)
    assert model.architecture.output_shape == (36 * 4 + 3 * 36,)
    assert any("'chosen' is left out" in note for note in model.notes)
    x = np.random.default_rng(1).standard_normal((2, 3, 6, 6)).astype(np.float32)
    expected = OnnxSession(raw).run({"image": x}, ["boxes", "scores"])
    row = np.concatenate([value.reshape(2, -1) for value in expected.values()], 1)
    assert distance(outputs(model.graph, x), row) < 1e-6
