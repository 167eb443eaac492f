"""Models of pictures as bytes, and of token ids of 32 bits, trained and served by a board's program on files."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from onnx import TensorProto, helper, numpy_helper

from fedprune.core import tensorfile
from fedprune.core.errors import ExitCode
from fedprune.runtime.bundle import WEIGHTS, open_bundle
from fedprune.runtime.session import OnnxSession
from fedprune_device.cli.main import main as device
from fedprune_export.cli.main import main as export

pytestmark = pytest.mark.system

COUNT, CLASSES = 40, 4
Capture = pytest.CaptureFixture[str]


def write_model(path: Path, kind: int, sample: tuple[int, ...], nodes: list[Any], **shapes: tuple[int, ...]) -> bytes:
    rng = np.random.default_rng(0)
    tensors = [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in shapes.items()]
    x = helper.make_tensor_value_info("x", kind, ("n", *sample))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ("n", CLASSES))
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], tensors), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    path.write_bytes(raw := model.SerializeToString())
    assert export([str(path), "--target", "raspberry-pi-5", "--density", "1", "--out", str(path.parent / "b")]) == 0
    return bytes(raw)


def train(folder: Path, source: str, out: str = "out") -> int:
    arguments = ["--bundle", str(folder / "b"), "--data", str(folder / source), "--out", str(folder / out)]
    return device(["train", *arguments, "--epochs", "2", "--threads", "1"])


def predictions(folder: Path, source: str) -> npt.NDArray[np.float32]:
    out = folder / "outputs.npy"
    arguments = ["--bundle", str(folder / "b"), "--input", str(folder / source), "--output", str(out)]
    assert device(["predict", *arguments]) == 0
    logits: npt.NDArray[np.float32] = np.load(out)
    return logits


@pytest.mark.parametrize("colours_last", [True, False])
def test_pictures_are_given_as_their_pixels(tmp_path: Path, colours_last: bool, capsys: Capture) -> None:
    image = pytest.importorskip("PIL.Image")
    nodes = [
        helper.make_node("Cast", ["x"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Constant", [], ["255"], value_float=255.0),
        helper.make_node("Div", ["pixels", "255"], ["shares"]),
        helper.make_node("Transpose", ["shares"], ["planes"], perm=[0, 3, 1, 2] if colours_last else [0, 1, 2, 3]),
        helper.make_node("Conv", ["planes", "k"], ["maps"]),
        helper.make_node("Relu", ["maps"], ["active"]),
        helper.make_node("GlobalAveragePool", ["active"], ["means"]),
        helper.make_node("Flatten", ["means"], ["features"]),
        helper.make_node("Gemm", ["features", "w"], ["y"]),
    ]
    sample = (8, 9, 3) if colours_last else (3, 8, 9)
    raw = write_model(tmp_path / "m.onnx", TensorProto.UINT8, sample, nodes, k=(6, 3, 3, 3), w=(6, CLASSES))
    pixels = np.random.default_rng(1).integers(0, 256, (COUNT, 8, 9, 3), np.uint8)
    x, y = pixels if colours_last else pixels.transpose(0, 3, 1, 2), np.arange(COUNT) % CLASSES
    for number, picture in enumerate(pixels):
        path = tmp_path / "pictures" / str(y[number]) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(picture).save(path)
    arrays = {"bytes": x, "wide": x.astype(np.int64), "shares": (x / 255).astype(np.float32), "over": x.astype(int) + 9}
    for name, array in arrays.items():
        np.savez(tmp_path / f"{name}.npz", x=array, y=y)

    expected = OnnxSession(raw).run({"x": x})["y"]
    np.testing.assert_allclose(predictions(tmp_path, "bytes.npz"), expected, atol=1e-5)
    for row in predictions(tmp_path, "pictures"):
        assert np.abs(expected - row).max(1).min() < 1e-5
    assert train(tmp_path, "pictures") == ExitCode.OK
    assert train(tmp_path, "bytes.npz", "a") == train(tmp_path, "wide.npz", "b2") == ExitCode.OK
    first, second = (tensorfile.load_tensors(open_bundle(tmp_path / n).path(WEIGHTS)) for n in ("a", "b2"))
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name])
    capsys.readouterr()
    for source in ("shares.npz", "over.npz"):
        assert train(tmp_path, source, "refused") == ExitCode.DATA
        assert "255" in capsys.readouterr().err
    check = ["data", "check", "--bundle", str(tmp_path / "b"), "--data", str(tmp_path / "pictures")]
    assert device([*check, "--out", str(tmp_path / "page.html")]) == ExitCode.OK
    assert "uint8" in capsys.readouterr().out
    assert (tmp_path / "page.html").read_text().count("data:image/png") == 3


def test_token_ids_of_32_bits_are_read_from_any_whole_numbers(tmp_path: Path, capsys: Capture) -> None:
    nodes = [
        helper.make_node("Gather", ["table", "x"], ["words"]),
        helper.make_node("ReduceMean", ["words"], ["text"], axes=[1], keepdims=0),
        helper.make_node("Gemm", ["text", "w"], ["y"]),
    ]
    raw = write_model(tmp_path / "m.onnx", TensorProto.INT32, (5,), nodes, table=(30, 8), w=(8, CLASSES))
    x = np.random.default_rng(1).integers(0, 30, (COUNT, 5))
    for name, array in {"ids": x, "fractions": x / 2, "huge": x + 2**33}.items():
        np.savez(tmp_path / f"{name}.npz", x=array, y=np.arange(COUNT) % CLASSES)
    expected = OnnxSession(raw).run({"x": x.astype(np.int32)})["y"]
    np.testing.assert_allclose(predictions(tmp_path, "ids.npz"), expected, atol=1e-5)
    assert train(tmp_path, "ids.npz") == ExitCode.OK
    capsys.readouterr()
    for source in ("fractions.npz", "huge.npz"):
        assert train(tmp_path, source, "refused") == ExitCode.DATA
        assert "expected" in capsys.readouterr().err
