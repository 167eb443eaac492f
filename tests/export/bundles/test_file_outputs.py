"""A board tells the outputs of the user's own file besides its predictions, from the whole model as from a cut one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fedprune.core.errors import ModelError
from fedprune.runtime.bundle import INFERENCE
from fedprune.runtime.precision_files import graph_file
from fedprune.runtime.prediction_head import HEAD_KEY, PredictionHead
from fedprune.runtime.session import OnnxSession
from fedprune_device.cli.main import main as device
from fedprune_device.serving.predictor import Predictor
from fedprune_export.cli.main import main
from support.fakes.local_board import LocalBoard

FLOAT, INT64, BOOL, STRING = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL, TensorProto.STRING
X = np.random.default_rng(1).standard_normal((7, 2, 6, 6)).astype(np.float32)
# An end for each kind of decision, and its outputs. `scores` have 4 classes for every pixel, `means` for the picture.
NODES = [
    helper.make_node("ArgMax", ["scores"], ["map"], axis=1, keepdims=0),
    helper.make_node("Softmax", ["means"], ["p"], axis=-1),
    helper.make_node("TopK", ["p", "two"], ["best", "which"], axis=1),
    helper.make_node("Gather", ["names", "which"], ["words"], axis=0),
    helper.make_node("Sigmoid", ["means"], ["q"]),
    helper.make_node("Greater", ["q", "half"], ["alarm"]),
]
PIXELS, PICTURE = ["map"], ["p", "best", "which", "words", "q", "alarm"]
TYPES = {"map": INT64, "which": INT64, "words": STRING, "alarm": BOOL}
SHAPES = {"map": (6, 6), "p": (4,), "best": (2,), "which": (2,), "words": (2,), "q": (4,), "alarm": (4,)}


def model_file(path: Path, outputs: list[str]) -> Path:
    rng = np.random.default_rng(0)
    values = {
        "v": rng.standard_normal((8, 2, 3, 3)).astype(np.float32),
        "w": rng.standard_normal((4, 8, 1, 1)).astype(np.float32),
        "two": np.array([2]),
        "half": np.array(0.5, np.float32),
        "names": np.array(["ant", "bee", "cat", "dog"], object),
    }
    layers = [
        helper.make_node("Conv", ["image", "v"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["h"]),
        helper.make_node("Conv", ["h", "w"], ["scores"]),
    ]
    if outputs != PIXELS:
        layers.append(helper.make_node("GlobalAveragePool", ["scores"], ["pool"]))
        layers.append(helper.make_node("Flatten", ["pool"], ["means"]))
    nodes = NODES[:1] if outputs == PIXELS else NODES[1:]
    used = {i for n in (*layers, *nodes) for i in n.input}
    graph = helper.make_graph(
        [*layers, *nodes],
        "model",
        [helper.make_tensor_value_info("image", FLOAT, ["N", 2, 6, 6])],
        [helper.make_tensor_value_info(name, TYPES.get(name, FLOAT), ["N", *SHAPES[name]]) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in values.items() if name in used],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def export(root: Path, outputs: list[str], density: float, *words: str) -> tuple[bytes, Path]:
    path, bundle = model_file(root / "model.onnx", outputs), root / f"bundle-{density}"
    options = ("--target", "raspberry-pi-5", "--density", str(density), "--out", str(bundle))
    assert main([str(path), *options, *words]) == 0
    return path.read_bytes(), bundle


@pytest.mark.parametrize("outputs", [PIXELS, PICTURE])
def test_a_board_tells_the_outputs_of_the_file_and_of_what_it_was_cut_to(tmp_path: Path, outputs: list[str]) -> None:
    raw, whole = export(tmp_path, outputs, 1)
    _, cut = export(tmp_path, outputs, 0.5)
    assert main(["to-onnx", str(cut), str(tmp_path / "cut.onnx")]) == 0
    for folder, file, feed in ((whole, raw, "image"), (cut, (tmp_path / "cut.onnx").read_bytes(), "x")):
        predictor = Predictor(folder)
        logits = predictor.predict(X, batch=3)
        told, expected = predictor.file_outputs(logits), OnnxSession(file).run({feed: X}, outputs)
        assert told.keys() == expected.keys()
        for name, value in expected.items():
            if value.dtype.kind == "f":
                np.testing.assert_allclose(told[name], value, rtol=1e-4, atol=1e-6)
            else:
                np.testing.assert_array_equal(told[name], value.astype(told[name].dtype))
        # What the board itself predicts is what the file decides.
        np.testing.assert_array_equal(told["map"] if outputs == PIXELS else told["which"][:, 0], logits.argmax(1))


def test_lower_precisions_tell_them_too(tmp_path: Path) -> None:
    np.savez(tmp_path / "eval.npz", x=X, y=np.zeros(len(X), int))
    _, bundle = export(tmp_path, PICTURE, 0.5, "--precision", "float16,int8", "--data", str(tmp_path / "eval.npz"))
    for precision in ("float16", "int8"):
        predictor = Predictor(bundle / graph_file(precision))
        logits = predictor.predict(X)
        told = predictor.file_outputs(logits)
        np.testing.assert_array_equal(told["which"][:, 0], logits.argmax(1))
        np.testing.assert_array_equal(told["alarm"], logits > 0)


def predict_command(
    root: Path, outputs: list[str], capsys: pytest.CaptureFixture[str]
) -> tuple[list[str], dict[str, Any]]:
    """The words of a command that predicts samples by a file's bundle, and what the file itself tells of them."""
    raw, bundle = export(root, outputs, 1)
    np.save(root / "x.npy", X)
    capsys.readouterr()
    return ["predict", "--bundle", str(bundle), "--input", str(root / "x.npy")], OnnxSession(raw).run({"image": X})


def test_the_command_prints_and_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, expected = predict_command(tmp_path, PICTURE, capsys)
    assert device(words) == 0
    for line, row in zip(capsys.readouterr().out.splitlines(), expected["words"].tolist(), strict=True):
        assert f'words ["{row[0]}", "{row[1]}"]' in line
    assert device([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["file_outputs"]["alarm"] for row in rows] == expected["alarm"].tolist()
    assert device([*words, "--output", str(tmp_path / "out.npz")]) == 0
    written = np.load(tmp_path / "out.npz")
    assert set(written) == {"logits", *PICTURE}
    np.testing.assert_array_equal(written["words"], expected["words"].astype(str))


def test_the_command_sums_maps_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, expected = predict_command(tmp_path, PIXELS, capsys)
    assert device(words) == 0
    assert all("map 6 x 6 (--output" in line for line in capsys.readouterr().out.splitlines())
    assert device([*words, "--json", "--top", "9"]) == 0
    for row, labels in zip(json.loads(capsys.readouterr().out), expected["map"], strict=True):
        counts = dict(zip(*(a.tolist() for a in np.unique(labels, return_counts=True)), strict=True))
        assert row["positions"] == [*labels.shape]
        assert {output["class"]: output["count"] for output in row["outputs"]} == counts
        summary = {"shape": [*labels.shape], "counts": {str(c): n for c, n in counts.items()}}
        assert row["file_outputs"]["map"] == summary


def test_the_local_interface_answers_with_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["image", "w", "b"], ["scores"], transB=1),
            helper.make_node("ArgMax", ["scores"], ["label"], axis=1, keepdims=0),
        ],
        "model",
        [helper.make_tensor_value_info("image", FLOAT, ["N", 6])],
        [helper.make_tensor_value_info("label", INT64, ["N"])],
        [
            numpy_helper.from_array(rng.standard_normal((3, 6)).astype(np.float32), "w"),
            numpy_helper.from_array(np.zeros(3, np.float32), "b"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    target = ("--target", "raspberry-pi-5", "--out", str(tmp_path / "bundle"))
    assert main([str(tmp_path / "m.onnx"), *target]) == 0
    board = LocalBoard(tmp_path, tmp_path / "bundle")
    # The labels follow the board's own label shares, as its predictions do.
    board.install(1, offset=(0.0, 3.0, 0.0))
    with board.serving():
        answer = board.board.predict(X.reshape(-1, 6)[:20])
    assert answer.file_outputs == {"label": answer.classes}


def test_a_damaged_end_is_refused(tmp_path: Path) -> None:
    _, bundle = export(tmp_path, PIXELS, 1)
    proto = onnx.load(bundle / INFERENCE, load_external_data=False)
    entry = next(p for p in proto.metadata_props if p.key == HEAD_KEY)
    entry.value = entry.value[:101]
    (bundle / INFERENCE).write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=HEAD_KEY):
        Predictor(bundle)
    with pytest.raises(ModelError):
        PredictionHead("AAAA")
