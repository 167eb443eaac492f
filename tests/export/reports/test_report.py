"""Reports of an export count what is on disk, measure what the graphs give, and are pages that need no other file."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from fedprune.core import tensorfile
from fedprune.core.errors import DataError, ExitCode
from fedprune.runtime.session import OnnxSession
from fedprune_export.checks import labelled_file
from fedprune_export.cli.main import main
from fedprune_export.importing import import_onnx
from fedprune_server.simulation.digits import load_digits
from support.nets.token_net import token_net


def export(model: Path, out: Path, *words: str) -> int:
    return main([str(model), "--target", "raspberry-pi-5", "--density", "0.5", "--out", str(out), *words])


@pytest.fixture(scope="module")
def bundle(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "b"
    assert export(digits, out) == ExitCode.OK
    return out


def test_the_layers_are_those_of_the_files(bundle: Path, digits: Path) -> None:
    layers = [r for r in json.loads((bundle / "report.json").read_text())["layers"] if r["weight"]]
    small = tensorfile.load_tensors(bundle / "weights.safetensors")
    full_shapes = {t.name: tuple(t.dims) for t in onnx.load(digits).graph.initializer}
    assert [r["weight"] for r in layers] == ["conv1.weight", "conv2.weight", "conv3.weight", "fc.weight"]
    for row in layers:
        assert tuple(row["after"]["shape"]) == small[row["weight"]].shape
        assert tuple(row["before"]["shape"]) == full_shapes[row["weight"]]
        assert row["after"]["parameters"] == small[row["weight"]].size


def test_activations_are_what_the_graph_makes(bundle: Path) -> None:
    """Every row's bytes are those of the value that its node makes of one sample, as onnxruntime makes it."""
    proto = onnx.load(bundle / "inference.onnx")
    output_names = {n.name: n.output[0] for n in proto.graph.node}
    proto.graph.output.extend(onnx.ValueInfoProto(name=v) for v in output_names.values() if v != "logits")
    out = OnnxSession(proto.SerializeToString()).run({"x": np.zeros((1, 1, 8, 8), np.float32)})
    rows = json.loads((bundle / "report.json").read_text())["layers"]
    assert len(rows) > 4
    for row in rows:
        assert row["after"]["activation_bytes"] == out[output_names[row["name"]]].nbytes


def test_figures_add_up_and_predictions_are_the_plans(bundle: Path) -> None:
    body = json.loads((bundle / "report.json").read_text())
    before, after, predicted = body["before"], body["after"], body["plan"]["prediction"]
    for side in ("before", "after"):
        assert sum(r[side]["macs"] for r in body["layers"]) == body[side]["forward_macs"]
    for figure in ("memory_bytes", "step_s"):
        assert after[figure] == predicted[figure] < before[figure]


def test_the_page_needs_nothing_else(bundle: Path) -> None:
    text = (bundle / "report.html").read_text()
    assert not [word for word in ("@import", "url(", "src=", "href=") if word in text]
    assert text.count("<li") >= len(json.loads((bundle / "report.json").read_text())["groups"])


def test_names_of_a_model_are_text_on_the_page(digits: Path, tmp_path: Path) -> None:
    proto = onnx.load(digits)
    evil = "</pre><script>alert(1)</script>"
    for node in proto.graph.node:
        node.input[:] = [evil if n == "conv1.weight" else n for n in node.input]
    next(t for t in proto.graph.initializer if t.name == "conv1.weight").name = evil
    onnx.save(proto, tmp_path / "evil.onnx")
    assert export(tmp_path / "evil.onnx", tmp_path / "b", "--name", "<b>&") == ExitCode.OK
    text = (tmp_path / "b" / "report.html").read_text()
    assert text.count("<script") == 1
    assert evil not in text
    assert "<b>" not in text
    assert "&lt;b&gt;&amp; for raspberry-pi-5" in text


def test_accuracies_are_those_of_the_graphs(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the whole model's own answers as labels it is right always; the bundle is right where they agree."""
    x, _ = load_digits()
    answers = OnnxSession(digits).run({"x": x})["logits"].argmax(axis=1)
    np.savez(tmp_path / "data.npz", x=x, y=answers)
    assert export(digits, tmp_path / "b", "--data", str(tmp_path / "data.npz")) == ExitCode.OK
    mine = OnnxSession(tmp_path / "b" / "inference.onnx").run({"x": x})["logits"].argmax(axis=1)
    accuracy = json.loads((tmp_path / "b" / "report.json").read_text())["accuracy"]
    assert accuracy == {
        "measure": "accuracy",
        "samples": len(x),
        "before": 1.0,
        "after": pytest.approx(np.mean(mine == answers), abs=1e-9),
    }
    line = f"accuracy on 1,797 samples, before local training: 100.0% -> {accuracy['after']:.1%}"
    assert line in capsys.readouterr().out
    for name in ("report.md", "report.html"):
        assert f"{accuracy['after']:.1%}" in (tmp_path / "b" / name).read_text()


def test_a_test_split_is_taken_first(digits: Path, tmp_path: Path) -> None:
    x, y = load_digits()
    np.savez(tmp_path / "data.npz", x=x, y=y, x_test=x[:50], y_test=y[:50])
    data = labelled_file.read_labelled_data(
        tmp_path / "data.npz", import_onnx(digits.read_bytes(), "d").architecture, np.float32
    )
    assert len(data.x) == len(data.y) == 50


X = np.zeros((4, 1, 8, 8), np.float32)
Y = np.zeros(4, np.int64)
HOLED = X.copy()
HOLED[2, 0, 1, 5] = np.inf


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X}, "expected arrays x_test and y_test, or x and y, got x"),
        ({"x": X[:, :, :7], "y": Y}, r"shape of x: expected \[n, 1, 8, 8\], got \[4, 1, 7, 8\]"),
        ({"x": HOLED, "y": Y}, "x holds numbers that are not finite: got sample 2"),
        ({"x": X.astype(complex), "y": Y}, "x: expected numbers, got complex128"),
        ({"x": X, "y": Y + 10}, "a label is out of range: expected 0 to 9, got 10"),
        ({"x": X, "y": np.array([{}] * 4, object)}, r"not an \.npz file of plain arrays \(it holds objects"),
    ],
)
def test_data_that_does_not_fit_is_refused(
    digits: Path, tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    np.savez(tmp_path / "data.npz", **arrays)  # type: ignore[arg-type]
    architecture = import_onnx(digits.read_bytes(), "d").architecture
    with pytest.raises(DataError, match=message):
        labelled_file.read_labelled_data(tmp_path / "data.npz", architecture, np.float32)


@pytest.mark.parametrize("raw", [b"", b"\x93NUMPY"])
def test_a_file_that_is_no_data_ends_with_the_code_of_data(
    digits: Path, tmp_path: Path, raw: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.npz").write_bytes(raw)
    assert export(digits, tmp_path / "b", "--data", str(tmp_path / "data.npz")) == ExitCode.DATA
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "b").exists()


def test_identifiers_are_whole_numbers_that_the_model_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tokens.onnx").write_bytes(token_net(20))
    random = np.random.default_rng(0)
    x, y = random.integers(0, 20, (9, 3)), random.integers(0, 5, 9)
    np.savez(tmp_path / "good.npz", x=x.astype(np.int32), y=y)
    np.savez(tmp_path / "float.npz", x=x.astype(np.float32), y=y)
    np.savez(tmp_path / "far.npz", x=x + 20, y=y)
    codes = [
        export(tmp_path / "tokens.onnx", tmp_path / f"b-{name}", "--data", str(tmp_path / f"{name}.npz"))
        for name in ("good", "float", "far")
    ]
    assert codes == [ExitCode.OK, ExitCode.DATA, ExitCode.DATA]
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "type of x: expected whole numbers" in errors[0]
    assert "the model doesn't take the samples of --data" in errors[1]


def test_labels_of_every_kind_are_scored(digits: Path, tmp_path: Path) -> None:
    architecture = import_onnx(digits.read_bytes(), "d").architecture
    out = np.random.default_rng(0).standard_normal((4, 10)).astype(np.float32)
    wrong = (out > 0).astype(np.float32)
    wrong[0, :5] = 1 - wrong[0, :5]
    np.savez(tmp_path / "multi.npz", x=X, y=wrong)
    np.savez(tmp_path / "values.npz", x=X, y=out + 0.5)
    multi = labelled_file.read_labelled_data(tmp_path / "multi.npz", architecture, np.float32, "multi")
    values = labelled_file.read_labelled_data(tmp_path / "values.npz", architecture, np.float32, "values")
    assert multi.score(lambda x: out[: len(x)]) == pytest.approx(1 - 5 / 40)
    assert values.score(lambda x: out[: len(x)]) == pytest.approx(0.5, rel=1e-6)
