"""`to-onnx` and `to-torch`: what comes out computes what went in, and torch takes it."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from fedprune.core import tensorfile
from fedprune.core.disk import file_digest
from fedprune.core.errors import ExitCode
from fedprune.runtime.bundle import open_bundle
from fedprune.runtime.session import OnnxSession
from fedprune_device.serving.model_slots import ModelSlots, ServingRecord
from fedprune_export.bundles import conversion
from fedprune_export.cli.main import main
from fedprune_export.importing import import_onnx
from fedprune_export.ir.graph import Graph, Port
from support.oracles.cutting import distance


@pytest.fixture(scope="module")
def bundle(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(digits, tmp_path_factory.mktemp("bundles") / "b", "--density", "0.4")


def export(model: object, out: Path, *words: str) -> Path:
    assert main([str(model), "--target", "raspberry-pi-5", "--out", str(out), *words]) == ExitCode.OK
    return out


def logits(model: Path, x: np.ndarray) -> np.ndarray:
    return OnnxSession(model).run({"x": x})["logits"]


X = np.random.default_rng(4).standard_normal((5, 1, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("opset", [None, 13, 23])
def test_a_bundle_as_one_file_computes_the_same(bundle: Path, tmp_path: Path, opset: int | None) -> None:
    opset_option = [] if opset is None else ["--opset", str(opset)]
    assert main(["to-onnx", str(bundle), str(tmp_path / "out.onnx"), *opset_option]) == ExitCode.OK
    exported = onnx.load(tmp_path / "out.onnx")
    assert next(o.version for o in exported.opset_import if not o.domain) == (opset or 17)
    assert not [t for t in exported.graph.initializer if t.external_data]
    assert distance(logits(tmp_path / "out.onnx", X), logits(bundle / "inference.onnx", X)) < 1e-6


def test_what_was_written_can_be_imported_again(bundle: Path, tmp_path: Path) -> None:
    main(["to-onnx", str(bundle), str(tmp_path / "out.onnx")])
    reimported = import_onnx((tmp_path / "out.onnx").read_bytes(), "digits")
    selection = open_bundle(bundle).selection
    assert reimported.architecture.sizes == selection.widths
    assert {n: v.shape for n, v in reimported.tensors.items()} == selection.shapes()
    for name, value in tensorfile.load_tensors(bundle / "weights.safetensors").items():
        np.testing.assert_array_equal(reimported.tensors[name], value)


def test_a_file_says_if_it_lacks_the_dropouts_of_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = Graph(inputs=[Port("image", np.dtype(np.float32), ("N", 6))], initializers={"w": np.eye(6, 3, dtype="f")})
    value = graph.emit("MatMul", graph.emit("Dropout", "image", graph.scalar(0.25)), "w")
    graph.outputs = [Port(value, np.dtype(np.float32), ("N", 3))]
    (tmp_path / "net.onnx").write_bytes(graph.to_bytes())
    export(tmp_path / "net.onnx", tmp_path / "b")
    for source, is_lacking in ((tmp_path / "b", True), (tmp_path / "net.onnx", False)):
        capsys.readouterr()
        main(["to-onnx", str(source), str(tmp_path / "out.onnx")])
        assert ("note: The file lacks 1 random draw" in capsys.readouterr().out) == is_lacking
        again = import_onnx((tmp_path / "out.onnx").read_bytes(), "net")
        assert any(node.op == "Dropout" for node in again.graph.nodes) != is_lacking


def test_a_global_model_takes_the_weights_of_a_file(digits: Path, tmp_path: Path) -> None:
    model = import_onnx(digits.read_bytes(), "digits")
    scaled = {n: v * np.float32(1.1) for n, v in model.tensors.items()}
    (tmp_path / "w.safetensors").write_bytes(tensorfile.encode(scaled))
    graph = model.graph.copy()
    graph.initializers.update(scaled)
    code = main(["to-onnx", str(digits), str(tmp_path / "o.onnx"), "--weights", str(tmp_path / "w.safetensors")])
    assert code == ExitCode.OK
    expected = OnnxSession(graph.to_bytes()).run({"x": X})["logits"]
    assert distance(logits(tmp_path / "o.onnx", X), expected) < 1e-6
    assert distance(logits(tmp_path / "o.onnx", X), logits(digits, X)) > 1e-2


def test_weights_of_another_model_are_refused(
    digits: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = str(bundle / "weights.safetensors")
    assert main(["to-onnx", str(digits), str(tmp_path / "o.onnx"), "--weights", weights]) == ExitCode.BUNDLE
    assert "tensor conv1.weight: expected float32 (32, 1, 3, 3), got float32 (13, 1, 3, 3)" in capsys.readouterr().err
    assert not (tmp_path / "o.onnx").exists()


def test_a_state_dict_has_the_shapes_of_the_submodel(bundle: Path, tmp_path: Path) -> None:
    assert main(["to-torch", str(bundle), str(tmp_path / "s.safetensors")]) == ExitCode.OK
    state, tensors = (
        tensorfile.load_tensors(tmp_path / "s.safetensors"),
        tensorfile.load_tensors(bundle / "weights.safetensors"),
    )
    for name, value in tensors.items():
        np.testing.assert_array_equal(state[name], value)
    assert {n for n in state if n not in tensors} == {f"bn{i}.num_batches_tracked" for i in (1, 2, 3)}


@pytest.mark.parametrize("others", ["zero", "keep"])
def test_the_other_channels_are_zeroed_or_kept(digits: Path, bundle: Path, tmp_path: Path, others: str) -> None:
    full_model, out = import_onnx(digits.read_bytes(), "digits"), tmp_path / "s.safetensors"
    assert main(["to-torch", str(bundle), str(out), "--into", str(digits), "--others", others]) == ExitCode.OK
    selection, state = open_bundle(bundle).selection, tensorfile.load_tensors(out)
    for name, value in full_model.tensors.items():
        is_kept = others == "keep" or "running" in name
        np.testing.assert_array_equal(
            state[name], np.where(selection.coverage_mask(name), value, value if is_kept else np.float32(0))
        )
    graph = full_model.graph.copy()
    graph.initializers.update({n: state[n] for n in full_model.tensors})
    full_logits = OnnxSession(graph.to_bytes()).run({"x": X})["logits"]
    assert (distance(full_logits, logits(bundle / "inference.onnx", X)) < 1e-5) == (others == "zero")


def test_what_a_board_serves_goes_out(
    bundle: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    board = tmp_path / "board"  # whose model, of other weights than the bundle's, serves
    slots = ModelSlots(board / "serving")
    slots.prepare()
    scaled = {n: v * np.float32(1.1) for n, v in tensorfile.load_tensors(bundle / "weights.safetensors").items()}
    stage = slots.stage(bundle / "inference.onnx", tensorfile.encode(scaled))
    files = {name: file_digest(stage / name) for name in ("inference.onnx", "weights.safetensors")}
    slots.install(ServingRecord("job", 7, 10, files))
    folder = slots.folder(slots.current() or pytest.fail("nothing serves"))
    assert main(["to-onnx", str(board), str(tmp_path / "o.onnx")]) == ExitCode.OK
    assert main(["to-torch", str(board), str(tmp_path / "s.safetensors")]) == ExitCode.OK
    assert distance(logits(tmp_path / "o.onnx", X), logits(folder / "inference.onnx", X)) < 1e-6
    state = tensorfile.load_tensors(tmp_path / "s.safetensors")
    for name, value in tensorfile.load_tensors(folder / "weights.safetensors").items():
        np.testing.assert_array_equal(state[name], value)
    line = "the board's model after round 7 of job job; its outputs equal the source's "
    assert capsys.readouterr().out.count(line) == 2
    assert main(["to-torch", str(board), str(tmp_path / "w.pt"), "--into", str(digits)]) == ExitCode.USAGE
    assert "A board doesn't know which channels" in capsys.readouterr().err
    (folder / "weights.safetensors").write_bytes(b"damaged")
    assert main(["to-onnx", str(board), str(tmp_path / "p.onnx")]) == ExitCode.STORAGE
    assert "no model that is intact" in capsys.readouterr().err


def test_a_file_that_computes_something_else_is_not_written(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = conversion.state_dict
    name = list(tensorfile.load_tensors(bundle / "weights.safetensors"))[-1]
    monkeypatch.setattr(conversion, "state_dict", lambda *a: plain(*a) | {name: plain(*a)[name] + np.float32(1)})
    assert main(["to-torch", str(bundle), str(tmp_path / "s.safetensors")]) == ExitCode.MODEL
    assert "computes something else" in capsys.readouterr().err
    assert not (tmp_path / "s.safetensors").exists()


@pytest.mark.torch
@pytest.mark.parametrize("name", ["lenet", "concat_net"])
def test_a_whole_module_computes_what_the_submodel_computes(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from support.nets import small_nets as nets

    source = f"support.nets.small_nets:{name}"
    folder = export(source, tmp_path / "b", "--density", "0.5")
    capsys.readouterr()
    assert main(["to-torch", str(folder), str(tmp_path / "s.pt"), "--into", source]) == ExitCode.OK
    assert "in torch" in capsys.readouterr().out
    module = getattr(nets, name)().eval()
    module.load_state_dict(torch.load(tmp_path / "s.pt", weights_only=True), strict=True)
    x = torch.randn(3, *module.input_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs = module(x).numpy()
    assert distance(outputs, logits(folder / "inference.onnx", x.numpy())) < 1e-5


@pytest.mark.torch
def test_numbers_that_a_factory_draws_and_no_state_dict_has_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "drawing.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Linear):\n"
        "    input_shape = (4,)\n"
        "    def __init__(self):\n"
        "        super().__init__(4, 3)\n"
        "        self.register_buffer('scale', torch.rand(3) + 0.5, persistent=False)\n"
        "    def forward(self, x):\n"
        "        return super().forward(x) * self.scale\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["to-torch", "drawing:Net", str(tmp_path / "s.pt")]) == ExitCode.MODEL
    assert "persistent" in capsys.readouterr().err
    assert not (tmp_path / "s.pt").exists()


@pytest.mark.torch
def test_tied_tensors_have_all_their_names(tmp_path: Path) -> None:
    import torch
    from torch import nn

    from fedprune_export.importing import export_torch

    class Tied(nn.Module):
        input_shape = (6,)

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.two.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.two(torch.relu(self.one(x)))))

    torch.manual_seed(0)
    module = Tied().eval()
    (tmp_path / "m.onnx").write_bytes(export_torch(module))
    folder = export(tmp_path / "m.onnx", tmp_path / "b", "--density", "1")
    assert main(["to-torch", str(folder), str(tmp_path / "b.pt"), "--into", str(tmp_path / "m.onnx")]) == ExitCode.OK
    assert main(["to-torch", str(tmp_path / "m.onnx"), str(tmp_path / "m.pt")]) == ExitCode.OK
    for name in ("b.pt", "m.pt"):
        state = torch.load(tmp_path / name, weights_only=True)
        Tied().load_state_dict(state, strict=True)
        for key, value in module.state_dict().items():
            assert torch.equal(state[key], value)


def test_nothing_that_is_read_is_written_over(
    digits: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, link = tmp_path / "digits.onnx", tmp_path / "link.onnx"
    model.write_bytes(digits.read_bytes())
    link.symlink_to(model)
    weights = tmp_path / "global.safetensors"
    weights.write_bytes(tensorfile.encode(import_onnx(digits.read_bytes(), "digits").tensors))
    before = {p: p.read_bytes() for p in (model, weights, bundle / "inference.onnx", bundle / "weights.safetensors")}
    for words in (
        ("to-onnx", str(model), str(model)),
        ("to-onnx", str(model), str(link)),
        ("to-torch", str(model), str(weights), "--weights", str(weights)),
        ("to-onnx", str(bundle), str(bundle / "inference.onnx")),
        ("to-torch", str(bundle), str(bundle / "weights.safetensors")),
    ):
        assert main(list(words)) == ExitCode.USAGE
        assert "is read and would be written over" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in before} == before
