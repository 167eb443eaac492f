"""Networks of three kinds, compiled, sent to a real device process and trained there without any training framework."""

from __future__ import annotations

import lzma
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.model.architecture import widths_at
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.runtime.bundle import INFERENCE, TRAINING, WEIGHTS
from fedprune.wire.messages import Update
from fedprune_export.bundles.bundle import bundle_files
from fedprune_export.importing import load
from support.fakes.agent_fleet import MemoryServer
from support.marks import marked
from support.paths import GRAPHS
from support.processes.device_process import Field, loaded_packages, running

pytest.importorskip("torch")
pytestmark = [pytest.mark.system, pytest.mark.torch]

FORBIDDEN = {"torch", "onnx", "onnxscript", "scipy", "sklearn", "fedprune_export"}


def pictures(classes: int, shape: tuple[int, ...], samples: int) -> dict[str, Any]:
    """Noise around one pattern per class."""
    rng = np.random.default_rng(1)
    patterns = rng.standard_normal((classes, *shape))
    y = rng.integers(0, classes, samples)
    x = 0.7 * patterns[y] + rng.standard_normal((samples, *shape))
    return {"x": x.astype(np.float32), "y": y}


def trained(root: Path, net: str, data: dict[str, Any], recipe: Recipe, density: float) -> Update:
    """Export a network for a board, let a process train it for one round, and return its update."""
    model = load(f"support.nets.device_nets:{net}")
    architecture = model.architecture
    selection = Selection.of(architecture, widths_at(architecture, density))
    files = bundle_files(model, selection, recipe)
    np.savez(root / "data.npz", **data)
    server = MemoryServer(root / "server", GRAPHS, {"w": np.zeros(1, np.float32)}, time.monotonic)
    refs = {"weights": WEIGHTS, "training": TRAINING, "inference": INFERENCE}
    blobs: dict[str, Any] = {key: server.blobs.put(files[name]) for key, name in refs.items()}
    server.plan = [
        server.offer(
            1,
            recipe,
            widths=selection.widths,
            classes=architecture.classes,
            architecture=architecture.digest,
            selection=selection.digest,
            **blobs,
        )
    ]
    with running(root, server) as field:
        _train(field)
        shapes = {n: v.shape for n, v in server.result(1).items()}
        loaded = loaded_packages(field)
    assert shapes == selection.shapes()
    # This process is several times as large: what a device reports is its own peak, not that of who started it.
    assert server.updates[1].metrics["peak_memory_bytes"] < 250e6
    assert {"onnxruntime", "numpy", "fedprune_device"} <= loaded
    assert not loaded & FORBIDDEN
    return server.updates[1]


def _train(field: Field) -> None:
    process = field.start("-X", "importtime")
    assert process.wait(90) == 0, (field.root / "log").read_text()[-3000:]


CASES = {
    "mobilenet_v2": Recipe(epochs=6, batch_size=16, lr=0.05),
    "vision_transformer": Recipe(epochs=4, batch_size=16, optimizer="adamw", lr=2e-3, clip_norm=1.0, accumulate=2),
}


@pytest.mark.parametrize("density", [pytest.param(1.0, marks=pytest.mark.soak), 0.5])
@pytest.mark.parametrize("net", marked(CASES, soak=["vision_transformer"]))
def test_a_network_trains_on_a_device_process(tmp_path: Path, net: str, density: float) -> None:
    metrics = trained(tmp_path, net, pictures(4, (3, 16, 16), 250), CASES[net], density).metrics
    assert metrics["loss_last"] < 0.8 * metrics["loss_first"]
    assert metrics["loss_after"] < metrics["loss_before"]
    assert metrics["accuracy_after"] > 0.5  # of four classes


@pytest.mark.data
def test_a_network_for_motion_sensors_trains_on_a_device_process(tmp_path: Path, data_dir: Path) -> None:
    with np.load(data_dir / "har.npz") as file:
        x, y = _signals(file), file["y"].astype(np.int64)
        chosen = np.flatnonzero(file["subject"] <= 3)  # the first three people are one device's
    recipe = Recipe(epochs=5, batch_size=32, lr=0.05)
    metrics = trained(tmp_path, "motion_net", {"x": x[chosen], "y": y[chosen]}, recipe, 0.5).metrics
    assert metrics["loss_last"] < 0.8 * metrics["loss_first"]
    assert metrics["accuracy_after"] > max(0.5, metrics["accuracy_before"])


def _signals(file: Any) -> Any:
    """Windows [n, 9, 128] of a plain file, or of one that is packed: differences in time as whole numbers, in bytes."""
    if "x" in file.files:
        return file["x"].astype(np.float32)
    *shape, scale = file["T:x"].tolist()
    raw = np.frombuffer(lzma.decompress(file["B:x"].tobytes()), np.uint8)
    high, low = raw.reshape(2, -1).astype(np.int32)
    zigzag = (high << 8 | low).reshape(shape)
    steps = np.where(zigzag & 1, -(zigzag + 1) // 2, zigzag // 2)
    return np.cumsum(steps, axis=2).astype(np.int16).astype(np.float32) / scale
