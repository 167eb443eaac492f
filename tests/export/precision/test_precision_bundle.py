"""Bundles with lower precisions: written by the command, checked, timed, predicted with, and refused where damaged."""

import json
from pathlib import Path

import numpy as np
import pytest

from fedprune.core import tensorfile
from fedprune.core.errors import BundleError, ExitCode, ModelError
from fedprune.runtime.bundle import MANIFEST, open_bundle
from fedprune.runtime.precision_files import PRECISIONS, files_of, graph_file, weights_file
from fedprune.runtime.session import OnnxSession
from fedprune_device.cli.main import main as device
from fedprune_export.cli.main import main
from fedprune_server.simulation.digits import digits_model
from support.nets.wide_sum import saturates


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, samples of which it decides every one clearly, and its bundle."""
    root = tmp_path_factory.mktemp("precision")
    (root / "digits.onnx").write_bytes(digits_model())
    rng = np.random.default_rng(0)
    np.savez(root / "eval.npz", x=rng.uniform(0, 1, (300, 1, 8, 8)).astype(np.float32), y=rng.integers(0, 10, 300))
    assert export(root, "bundle", "folded,float16,int8") == ExitCode.OK
    return root


def export(root: Path, out: str, precision: str, *words: str) -> int:
    options = ("--target", "raspberry-pi-5", "--density", "0.5", "--precision", precision)
    data = () if "--no-data" in words else ("--data", str(root / "eval.npz"))
    return main([str(root / "digits.onnx"), *options, *data, "--out", str(root / out)])


def test_the_manifest_lists_what_was_asked_for(folder: Path) -> None:
    bundle = open_bundle(folder / "bundle")
    listed = json.loads((folder / "bundle" / MANIFEST).read_text())["files"]
    assert bundle.precisions == PRECISIONS
    assert {n for p in PRECISIONS for n in files_of(p)} <= listed.keys()
    report = json.loads((folder / "bundle" / "report.json").read_text())["precisions"]
    assert [r["precision"] for r in report] == list(PRECISIONS)
    assert all(r["agreement"]["samples"] == 300 and r["agreement"]["same"] >= 0.95 for r in report)
    assert "## Lower precision" in (folder / "bundle" / "report.md").read_text()
    assert "<h2>Lower precision</h2>" in (folder / "bundle" / "report.html").read_text()
    sizes = [listed[weights_file(p)]["size"] for p in PRECISIONS]
    assert sizes[0] > 1.9 * sizes[1] > 3 * sizes[2]


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of int8 as boards' processors compute them, also on an x86 processor without VNNI."""
    if saturates():
        monkeypatch.setitem(OnnxSession.__init__.__kwdefaults__, "exact", True)


def test_a_bundle_without_any_has_none(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = tmp_path / "plain"
    assert main([str(folder / "digits.onnx"), "--target", "raspberry-pi-5", "--out", str(plain)]) == 0
    assert open_bundle(plain).precisions == ()
    assert json.loads((plain / "report.json").read_text())["precisions"] == []
    words = ("--bundle", str(plain), "--precision", "int8", "--input", str(folder / "eval.npz"))
    assert device(["predict", *words]) == ExitCode.BUNDLE
    assert "has no int8" in capsys.readouterr().err


def test_verify_looks_at_every_precision(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(folder / "bundle"), "--json"]) == ExitCode.OK
    passed = {c["check"]: c["found"] for c in json.loads(capsys.readouterr().out)["passed"]}
    assert set(PRECISIONS) <= passed.keys()
    assert passed["files"].startswith("15 files")
    assert passed["int8"].endswith(" tensors are those of the weights; logits of random samples are finite")


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_board_predicts_with_a_precision(folder: Path, precision: str, tmp_path: Path) -> None:
    outputs = {}
    for name, words in (("float32", ()), (precision, ("--precision", precision))):
        out = tmp_path / f"{name}.npy"
        options = ("--bundle", str(folder / "bundle"), "--input", str(folder / "eval.npz"), "--output", str(out))
        assert device(["predict", *options, *words]) == ExitCode.OK
        outputs[name] = np.load(out)
    far = np.abs(outputs[precision] - outputs["float32"]).max() / np.abs(outputs["float32"]).max()
    assert far < {"folded": 1e-5, "float16": 5e-3, "int8": 5e-2}[precision]


@pytest.mark.parametrize("name", [n for p in PRECISIONS for n in files_of(p)])
@pytest.mark.parametrize("how", ["changed", "unlisted"])
def test_a_file_of_a_precision_is_checked(folder: Path, tmp_path: Path, name: str, how: str) -> None:
    for path in (folder / "bundle").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    raw = (tmp_path / name).read_bytes()
    if how == "changed":
        (tmp_path / name).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    else:
        body = json.loads((tmp_path / MANIFEST).read_text())
        del body["files"][name]
        (tmp_path / MANIFEST).write_text(json.dumps(body))
    if how == "unlisted" and name in map(graph_file, PRECISIONS):
        assert name.removesuffix(".onnx") not in open_bundle(tmp_path).precisions
    else:
        with pytest.raises(BundleError, match=name):
            open_bundle(tmp_path)


def test_verify_finds_weights_of_another_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever has written the manifest anew has made digests right; the numbers are not."""
    for path in (folder / "bundle").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = dict(tensorfile.load_tensors(tmp_path / "int8.safetensors"))
    name = next(n for n in tensors if n.endswith("~weight"))
    tensors[name] = -tensors[name]
    raw = tensorfile.encode(tensors)
    (tmp_path / "int8.safetensors").write_bytes(raw)
    body = json.loads((tmp_path / MANIFEST).read_text())
    body["files"]["int8.safetensors"] = {"size": len(raw), "sha256": tensorfile.sha256_hex(raw)}
    (tmp_path / MANIFEST).write_text(json.dumps(body))
    assert main(["verify", str(tmp_path)]) == ExitCode.BUNDLE
    assert "was not made from these weights" in capsys.readouterr().err


def test_int8_wants_samples(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(folder, "nothing", "int8", "--no-data") == ModelError.exit_code
    assert "Give some with --data" in capsys.readouterr().err
    assert not (folder / "nothing").exists()
    with pytest.raises(SystemExit):
        export(folder, "nothing", "int4")
    assert "expected some of folded, float16, int8, got 'int4'" in capsys.readouterr().err
    assert export(folder, "float16", "float16", "--no-data") == ExitCode.OK
    assert "random ones: --data" in capsys.readouterr().out


def test_frozen_weights_in_low_precision_are_named_before_anything_is_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter_words = ("--lora", "2:*", "--base", "int8")
    out = tmp_path / "bundle"
    command = [str(folder / "digits.onnx"), "--target", "raspberry-pi-5", *adapter_words, "--precision", "float16"]
    assert main([*command, "--out", str(out)]) == ModelError.exit_code
    message = capsys.readouterr().err
    assert "--base" in message
    assert "fedprune-" not in message.replace("fedprune-export", "")
    assert not out.exists()
