"""Bringing models in: torch modules keep all their weights, damaged files are one clear error."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedprune.core.errors import ModelError
from fedprune_export.importing import export_torch, import_onnx, load, torch_export
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.pruning.model import Model
from support.nets import small_nets as nets
from support.oracles.cutting import distance, inputs, outputs

pytestmark = pytest.mark.torch

Imported = Callable[[str], Model]
F32 = np.dtype(np.float32)


@pytest.fixture(scope="module")
def lenet_bytes() -> bytes:
    return export_torch(nets.lenet())


@pytest.mark.parametrize("name", ["lenet", "vgg11_bn", "concat_net"])
def test_a_normalised_graph_imports_as_itself(imported: Imported, name: str) -> None:
    model = imported(name)
    assert import_onnx(model.graph.to_bytes(), name).architecture.digest == model.architecture.digest


def test_a_factory_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_net.py").write_text(
        "from torch import nn\n\n\n"
        "def small():\n    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 2))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert [g.size for g in load("my_own_net:small", input_shape=(3, 2, 2)).architecture.groups] == [5]


def test_a_file_is_loaded_by_path(tmp_path: Path, lenet_bytes: bytes) -> None:
    (tmp_path / "mine.onnx").write_bytes(lenet_bytes)
    assert load(tmp_path / "mine.onnx").architecture.name == "mine"


@pytest.mark.parametrize("content", [None, b"short"], ids=["missing", "cut short"])
def test_external_weights_that_are_not_there_name_the_file(
    tmp_path: Path, lenet_bytes: bytes, content: bytes | None
) -> None:
    proto = onnx.load_model_from_string(lenet_bytes)
    onnx.save_model(proto, str(tmp_path / "m.onnx"), save_as_external_data=True, location="m.data", size_threshold=0)
    (tmp_path / "m.data").unlink()
    if content is not None:
        (tmp_path / "m.data").write_bytes(content)
    with pytest.raises(ModelError, match=r"m\.onnx.*m\.data"):
        load(tmp_path / "m.onnx")


def test_training_mode_is_left_and_restored_of_every_layer() -> None:
    module = nets.concat_net().train()
    module.last.eval()
    model = import_onnx(export_torch(module), "net")
    assert (module.training, module.last.training, module.stem.training) == (True, False, True)
    assert {n.op for n in model.graph.nodes} >= {"BatchNormalization"}


def test_an_example_input_gives_the_shape() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    assert import_onnx(export_torch((module, torch.zeros(1, 4))), "net").architecture.input_shape == (4,)


class Spare(nn.Module):
    input_shape = (4,)

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def test_a_parameter_that_the_forward_pass_never_uses_is_left_out_with_a_note() -> None:
    module = Spare()
    model = import_onnx(export_torch(module), "spare")
    assert set(model.tensors) == {"used.weight", "used.bias"}
    note = next(n for n in model.notes if "unused" in n)
    assert note == "The forward pass doesn't use unused.weight, unused.bias: left as they are, and in no bundle."
    assert all(p.requires_grad for p in module.parameters())
    assert note in import_onnx(model.graph.to_bytes(), "spare").notes


def test_a_parameter_that_the_export_loses_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(graph: Any) -> None:
        value = graph.initializers.pop("used.bias")
        value.name = "fused"
        graph.initializers["fused"] = value

    monkeypatch.setattr(torch_export, "_separate_names", lose)
    with pytest.raises(ModelError, match=r"used\.bias"):
        export_torch(Spare())


@pytest.mark.parametrize(
    "convolution",
    [nn.Conv3d(2, 6, 3, bias=False), nn.Conv3d(2, 6, 3, 2, 1, 1, 2, bias=False), nn.Conv3d(2, 6, 2, padding="same")],
    ids=["plain", "grouped", "same"],
)
def test_convolutions_of_three_axes(convolution: nn.Conv3d) -> None:
    module = nn.Sequential(convolution, nn.BatchNorm3d(6), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(6, 3))
    model = import_onnx(export_torch(module, input_shape=(2, 4, 6, 6)), "video")
    x = inputs(model, 3)
    with torch.no_grad():
        expected = module.eval()(torch.from_numpy(x)).numpy()
    assert distance(outputs(model.graph, x), expected) < 1e-5
    assert {n for n in model.tensors if n.startswith("0.")} == {f"0.{n}" for n, _ in convolution.named_parameters()}


@pytest.mark.parametrize("source", ["no_such_module:net", "support.nets.small_nets:no_such_net"])
def test_a_factory_that_is_not_there(source: str) -> None:
    with pytest.raises(ModelError, match=source.rpartition(":")[2] if "module" not in source else "no_such_module"):
        load(source)


@pytest.mark.parametrize("raw", [b"", b"hello", b"\x80\x02}q\x00."])
def test_something_else_than_onnx(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(raw)
    with pytest.raises(ModelError, match=r"model\.onnx"):
        load(tmp_path / "model.onnx")


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0, 0.9999))
def test_a_truncated_file_is_one_clear_error(lenet_bytes: bytes, share: float) -> None:
    with pytest.raises(ModelError):
        import_onnx(lenet_bytes[: int(share * len(lenet_bytes))], "net")


def _port(*shape: int | str) -> list[Port]:
    return [Port("x", F32, shape)]


def _single_node_model(inputs: list[Port], op: str, shape: tuple[int, ...] = ()) -> bytes:
    graph = Graph(inputs=inputs, initializers={"w": np.ones(shape, np.float32)} if shape else {})
    reads = [p.name for p in inputs] + (["w"] if shape else [])
    graph.outputs = [Port(graph.emit(op, *reads), inputs[0].dtype, ("N", 2))]
    return graph.to_bytes()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (_single_node_model(_port(), "MatMul", (3, 2)), "input 'x' has no axis for the batch"),
        (
            _single_node_model(_port("N", 3, "H", "W"), "Conv", (2, 3, 1, 1)),
            r"axis 2 \('H'\), axis 3 .*--input-shape 3,H,W",
        ),
        (_single_node_model([Port("a", F32, (2, 3)), Port("b", F32, (1, 4))], "Add"), "batch of the inputs"),
    ],
)
def test_inputs_and_outputs_of_another_form_are_refused(raw: bytes, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        import_onnx(raw, "net")


@pytest.mark.system
def test_another_process_finds_the_same_architecture(tmp_path: Path) -> None:
    """A server imports the stored file again after a restart."""
    (tmp_path / "net.onnx").write_bytes(export_torch(nets.concat_net()))
    code = (
        "import sys, hashlib\n"
        "from fedprune_export.importing import load\n"
        "model = load(sys.argv[1])\n"
        "print(model.architecture.digest, hashlib.sha256(model.graph.to_bytes()).hexdigest())\n"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "net.onnx")],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(digests) == 1
