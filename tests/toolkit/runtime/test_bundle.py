"""Bundles: one changed bit, one missing byte or one missing file is one clear error."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedprune.core import tensorfile
from fedprune.core.errors import BundleError, ExitCode
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.runtime.bundle import COMPLETE_FOLDER, FILES, MANIFEST, WEIGHTS, manifest_text, open_bundle
from fedprune.runtime.tensorrt_config import EnginePlan
from support.nets.written_nets import written_net

pytestmark = pytest.mark.board

ARCHITECTURE = written_net({"g0": 4}, {"w": ("g0", 3)}, (3,), (1,))


def write(folder: Path) -> Path:
    selection = Selection.of(ARCHITECTURE, [2], [[3, 1, 0, 2]])
    weights = selection.gather({"w": np.arange(12, dtype=np.float32).reshape(4, 3)})
    files = {
        "inference.onnx": b"inference",
        "weights.safetensors": tensorfile.encode(weights),
        "training.onnx": b"training",
        "architecture.json": ARCHITECTURE.to_json().encode(),
        "submodel.json": selection.to_json().encode(),
    }
    folder.mkdir(exist_ok=True)
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    (folder / MANIFEST).write_text(manifest_text(files, selection, Recipe(lr=0.5), "raspberry-pi-5", ("a", "b")))
    return folder


def with_plan(folder: Path, plan: bytes, **extra_files: bytes) -> Path:
    """A bundle that says how an engine is built."""
    write(folder)
    body = json.loads((folder / MANIFEST).read_text())
    for name, raw in {"engine.json": plan, **extra_files}.items():
        (folder / name).write_bytes(raw)
        body["files"][name] = {"size": len(raw), "sha256": tensorfile.sha256_hex(raw)}
    (folder / MANIFEST).write_text(json.dumps(body))
    return folder


def test_a_bundle_may_say_how_an_engine_is_built(tmp_path: Path) -> None:
    plan = EnginePlan(level=1)
    assert open_bundle(with_plan(tmp_path / "b", plan.to_json().encode())).engine == plan
    assert open_bundle(write(tmp_path / "c")).engine is None


def test_a_plan_of_an_engine_is_checked(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="level"):
        open_bundle(with_plan(tmp_path / "a", b'{"format": "fedprune.engine/1", "level": 9}'))
    plan = EnginePlan(graph="inference-float16.onnx").to_json().encode()
    with pytest.raises(BundleError, match=r"inference-float16\.onnx"):
        open_bundle(with_plan(tmp_path / "b", plan))
    open_bundle(with_plan(tmp_path / "c", plan, **{"inference-float16.onnx": b"graph"}))
    changed = with_plan(tmp_path / "d", EnginePlan().to_json().encode())
    (changed / "engine.json").write_bytes(EnginePlan(level=1).to_json().encode())
    with pytest.raises(BundleError, match=r"engine\.json has changed"):
        open_bundle(changed)


def test_a_bundle_reads_back(tmp_path: Path) -> None:
    bundle = open_bundle(write(tmp_path / "b"))

    assert bundle.architecture == ARCHITECTURE
    assert bundle.selection.widths == (2,)
    assert bundle.recipe == Recipe(lr=0.5)
    assert bundle.class_names == ("a", "b")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), where=st.floats(0, 0.999), bit=st.integers(0, 7))
def test_a_flipped_bit_names_its_file(tmp_path: Path, name: str, where: float, bit: int) -> None:
    folder = write(tmp_path / "b")
    raw = bytearray((folder / name).read_bytes())
    raw[int(where * len(raw))] ^= 1 << bit
    (folder / name).write_bytes(raw)

    with pytest.raises(BundleError, match=name) as caught:
        open_bundle(folder)
    assert caught.value.exit_code is ExitCode.BUNDLE


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_missing_file_names_itself(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "b")
    (folder / name).unlink()

    with pytest.raises(BundleError, match=name):
        open_bundle(folder)


@pytest.mark.parametrize(("key", "value"), [("widths", [3]), ("classes", 7), ("architecture", "0" * 64)])
def test_a_manifest_that_says_another_width_than_its_files_is_refused(tmp_path: Path, key: str, value: object) -> None:
    folder = write(tmp_path / "b")
    body = json.loads((folder / MANIFEST).read_text())
    expected = body[key]
    body[key] = value
    (folder / MANIFEST).write_text(json.dumps(body))

    with pytest.raises(BundleError, match=re.escape(f"{key} differs from that of the files: expected {expected}, got")):
        open_bundle(folder)


@pytest.mark.parametrize(
    ("tensors", "got"),
    [
        ({"w": np.zeros((3, 3), np.float32)}, "tensor 'w' .*expected F32 [2, 3], got F32 [3, 3]"),
        ({"w": np.zeros((2, 3), np.float16)}, "tensor 'w' .*expected F32 [2, 3], got F16 [2, 3]"),
        ({"w": np.zeros((2, 3), np.float32), "v": np.zeros(1, np.int8)}, "tensor 'v' .*got I8 [1]"),
        (None, "can't|cut short|empty"),
    ],
)
def test_tensors_of_another_width_or_type_are_refused(
    tmp_path: Path, tensors: dict[str, npt.NDArray[Any]] | None, got: str
) -> None:
    folder = write(tmp_path / "b")
    raw = b"" if tensors is None else tensorfile.encode(tensors)
    (folder / WEIGHTS).write_bytes(raw)
    body = json.loads((folder / MANIFEST).read_text())
    body["files"][WEIGHTS] = {"size": len(raw), "sha256": tensorfile.sha256_hex(raw)}
    (folder / MANIFEST).write_text(json.dumps(body))

    with pytest.raises(BundleError, match=got.replace("[", r"\[")):
        open_bundle(folder)


def test_a_bundle_that_is_complete_and_not_in_its_place_yet_counts(tmp_path: Path) -> None:
    folder = write(tmp_path / "b")
    new = write(folder / COMPLETE_FOLDER)
    (folder / WEIGHTS).write_bytes(b"a file of another")
    assert open_bundle(folder).path(WEIGHTS) == new / WEIGHTS
    (new / MANIFEST).unlink()
    with pytest.raises(BundleError, match=f"{WEIGHTS} is cut short"):
        open_bundle(folder)
