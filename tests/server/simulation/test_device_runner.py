"""Devices that train in other processes get the bits that a board would."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.blobs.blob_store import BlobStore
from fedprune.core import tensorfile
from fedprune.core.errors import TrainingError
from fedprune.model.architecture import widths_at
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.planning.profile_store import find
from fedprune_device.data.dataset import LocalData
from fedprune_export.bundles.inference import inference_model
from fedprune_export.importing import export_torch, import_onnx
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph
from fedprune_server.simulation.fleet.device_runner import DeviceRunner, Outcome, Work
from fedprune_server.simulation.fleet.virtual_device import VirtualDevice

pytest.importorskip("torch")
from support.nets import smooth_nets

pytestmark = pytest.mark.torch

RECIPES = {
    "plain": Recipe(epochs=2, batch_size=8),
    "ours": Recipe(
        epochs=2,
        batch_size=8,
        logit_adjustment=True,
        ordered_dropout=(0.5,),
        average=0.8,
        blend=0.2,
        calibrate=True,
        personal=("fc.*",),
        patience=1,
    ),
}


@pytest.fixture(scope="module")
def model() -> Model:
    return import_onnx(export_torch(smooth_nets.make()), "smooth")


def devices(model: Model, count: int = 5) -> list[VirtualDevice]:
    out = []
    for i in range(count):
        rng = np.random.default_rng(i)
        size = 23 + 3 * i
        x = rng.standard_normal((size + 14, *model.architecture.input_shape)).astype(np.float32)
        y = rng.integers(0, 4, size + 14)
        data = LocalData(x[14:], y[14:], x[6:14], y[6:14], x[:6], y[:6])
        out.append(VirtualDevice(f"board-{i}", find("raspberry-pi-4b"), data))
    return out


def offers(model: Model, store: BlobStore, recipe: Recipe, fleet: list[VirtualDevice], number: int = 1) -> list[Work]:
    """Every other device has half of the channels."""
    arch, out = model.architecture, list[Work]()
    training = store.put(training_graph(model, recipe.features).to_bytes()).to_dict()
    for i, device in enumerate(fleet):
        widths = widths_at(arch, 0.5 if i % 2 else 1.0)
        weights = Selection.of(arch, widths).gather(model.tensors)
        offer = {
            "seed": 7,
            "architecture": arch.digest,
            "selection": "b" * 64,
            "widths": widths,
            "classes": arch.classes,
            "weights": store.put(tensorfile.encode(weights)).to_dict(),
            "training": training,
            "inference": store.put(inference_model(model, widths)).to_dict(),
            "recipe": recipe.to_dict(),
        }
        out.append((device, offer, number))
    return out


def carried_out(tested: DeviceRunner, work: list[Work]) -> list[Outcome]:
    tested.prepare(work)
    return [tested.carry_out(*item) for item in work]


@pytest.mark.slow
def test_other_processes_give_the_same_bits(model: Model, tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs", durable=False)
    alone, pooled = DeviceRunner(store, tmp_path / "1"), DeviceRunner(store, tmp_path / "2", workers=2)
    fleet = devices(model, 3)
    try:
        for number in (1, 2):
            work = offers(model, store, RECIPES["ours"], fleet, number)
            assert carried_out(pooled, work) == carried_out(alone, work)
            assert pooled.boards == alone.boards
        work[0][1]["classes"] = 3
        with pytest.raises(Exception, match="out of range") as mine:
            alone.carry_out(*work[0])
        with pytest.raises(type(mine.value), match="out of range") as theirs:
            pooled.carry_out(*work[0])
        assert str(theirs.value) == str(mine.value)
    finally:
        pooled.close()


@pytest.mark.slow
def test_a_killed_process_is_said(model: Model, tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs", durable=False)
    pooled = DeviceRunner(store, tmp_path / "scratch", workers=2)
    work = offers(model, store, RECIPES["plain"], devices(model, 1))
    try:
        carried_out(pooled, work)
        for process in pooled._pool._processes._processes.values():
            os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(TrainingError, match="killed"):
            pooled.prepare(offers(model, store, RECIPES["plain"], devices(model, 1), 2))
    finally:
        pooled.close()


def test_few_samples_wait_for_a_process(model: Model, tmp_path: Path) -> None:
    """Those of devices that no process will work on soon are not read yet."""
    store = BlobStore(tmp_path / "blobs", durable=False)
    pooled = DeviceRunner(store, tmp_path / "scratch", workers=2)
    read: list[str] = []
    found: list[int] = []

    class Answer:
        def exception(self) -> None:
            found.append(len(read))

        def result(self) -> Any:
            return None, None

    class Slow:
        def submit(self, _: object, device: VirtualDevice, *more: object) -> Answer:
            read.append(device.name)
            return Answer()

    pooled.close()
    pooled._pool = Slow()  # type: ignore[assignment]
    work = offers(model, store, RECIPES["plain"], devices(model, 12))
    pooled.prepare(work)
    assert read == [d.name for d, _, _ in work]
    assert found[:3] == [4, 5, 6]
