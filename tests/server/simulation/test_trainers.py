"""Whatever a simulation trains with, devices get what a board would: to the bit from onnxruntime in other processes,
but for rounding from torch, one by one or many at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.blobs.blob_store import BlobStore
from fedprune.core import tensorfile
from fedprune.core.errors import ConfigError, ModelError, RuntimeUnavailableError, TrainingError
from fedprune.hardware.profile_store import find
from fedprune.model.architecture import widths_at
from fedprune.model.selection import Selection
from fedprune.training.recipe import Recipe
from fedprune_device.data.dataset import LocalData
from fedprune_export.bundles.inference import inference_model
from fedprune_export.importing import export_torch, import_onnx
from fedprune_export.pruning.model import Model
from fedprune_export.training.step_graph import training_graph
from fedprune_server.simulation.fleet.ensemble import Ensemble
from fedprune_server.simulation.fleet.pooled_runner import PooledBench
from fedprune_server.simulation.fleet.torch_runner import TorchBench
from fedprune_server.simulation.fleet.trainers import bench, choice
from fedprune_server.simulation.fleet.virtual_device import Bench, Outcome, VirtualDevice, Work

pytest.importorskip("torch")
import smooth_nets

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
    "heterofl": Recipe(batch_size=8, scale=2.0, mask_absent_classes=True, clip_norm=1.0, calibrate=True),
    "parts": Recipe(batch_size=8, accumulate=2, optimizer="adamw", lr=0.01, mixup=0.4),
}


@pytest.fixture(scope="module")
def model() -> Model:
    return import_onnx(export_torch(smooth_nets.make("SmoothResNet")), "smooth")


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


def carried_out(tested: Bench, work: list[Work]) -> list[Outcome]:
    tested.prepare(work)
    return [tested.carry_out(*item) for item in work]


def weights(store: BlobStore, outcome: Outcome) -> dict[str, Any]:
    return tensorfile.decode(store.read(outcome.weights.sha256))


def assert_near(store: BlobStore, got: Outcome, expected: Outcome) -> None:
    assert (got.samples, got.steps, set(got.metrics)) == (expected.samples, expected.steps, set(expected.metrics))
    for name, value in expected.metrics.items():
        # One test sample of eight may lie between two classes.
        assert got.metrics[name] == pytest.approx(value, rel=1e-3, abs=0.13 if "accuracy" in name else 1e-4), name
    mine, theirs = weights(store, got), weights(store, expected)
    assert list(mine) == list(theirs)
    for name, value in theirs.items():
        scale = float(np.abs(value).max()) + 1e-3
        np.testing.assert_allclose(mine[name], value, rtol=2e-4, atol=5e-5 * scale, err_msg=name)


@pytest.mark.parametrize(
    ("option", "trainer"), [(o, t) for o in RECIPES for t in ("torch", "torch/3" if o == "ours" else "torch/16")]
)
def test_torch_trains_what_boards_train(option: str, trainer: str, model: Model, tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs", durable=False)
    fleet, recipe = devices(model), RECIPES[option]
    board, tested = (bench(t, 1, model, store, tmp_path / t[:3]) for t in ("onnxruntime", trainer))
    for number in (1, 2):  # in the second round boards have something of their own
        work = offers(model, store, recipe, fleet, number)
        for got, expected in zip(carried_out(tested, work), carried_out(board, work), strict=True):
            assert_near(store, got, expected)
    assert set(tested.boards) == set(board.boards) == ({d.name for d in fleet} if option == "ours" else set())


def test_devices_that_stay_on_the_gpu_are_no_different(model: Model, tmp_path: Path) -> None:
    """What a GPU does, on the CPU: arrays of many devices stay in one tensor from step to step."""
    store = BlobStore(tmp_path / "blobs", durable=False)
    tested, together = (bench("torch/16", 1, model, store, tmp_path / name) for name in ("a", "b"))
    assert isinstance(together, TorchBench)
    together._resident = True
    work = offers(model, store, RECIPES["parts"], devices(model))
    for got, expected in zip(carried_out(together, work), carried_out(tested, work), strict=True):
        assert_near(store, got, expected)


@pytest.mark.parametrize("trainer", ["onnxruntime", "torch"])
def test_other_processes_give_the_same_bits(trainer: str, model: Model, tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs", durable=False)
    alone, pooled = (bench(trainer, n, model, store, tmp_path / str(n)) for n in (1, 2))
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


def test_a_killed_process_is_said(model: Model, tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs", durable=False)
    pooled = bench("onnxruntime", 2, model, store, tmp_path / "scratch")
    assert isinstance(pooled, PooledBench)
    work = offers(model, store, RECIPES["plain"], devices(model, 1))
    try:
        carried_out(pooled, work)
        for process in pooled._pool._processes.values():
            os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(TrainingError, match="killed"):
            pooled.prepare(work)
    finally:
        pooled.close()


def test_few_samples_wait_for_a_process(model: Model, tmp_path: Path) -> None:
    """Those of devices that no process will work on soon are not read yet."""
    store = BlobStore(tmp_path / "blobs", durable=False)
    pooled = bench("onnxruntime", 2, model, store, tmp_path / "scratch")
    assert isinstance(pooled, PooledBench)
    read: list[str] = []
    found: list[int] = []

    class Answer:
        def result(self) -> Any:
            found.append(len(read))
            return "outcome", None

    class Slow:
        def submit(self, _: object, device: VirtualDevice, *more: object) -> Answer:
            read.append(device.name)
            return Answer()

    pooled.close()
    pooled._pool = Slow()  # type: ignore[assignment]
    work = offers(model, store, RECIPES["plain"], devices(model, 12))
    assert len(pooled.ahead(work)) == 12
    assert read == [d.name for d, _, _ in work]
    assert found[:3] == [4, 5, 6]


def test_what_is_prepared_happens_when_it_is_asked_for(model: Model, tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs", durable=False)
    tested = bench("torch/16", 1, model, store, tmp_path / "scratch")
    work = offers(model, store, RECIPES["ours"], devices(model, 2))
    before = set(store.names())
    tested.prepare(work)
    assert tested.boards == {}
    for name in set(store.names()) - before:  # as a simulation does at a round's end
        store.delete(name)
    for item in work:
        outcome = tested.carry_out(*item)
        assert store.has(outcome.weights.sha256)
        assert store.has(tested.boards[item[0].name])


def test_one_devices_error_is_its_own(model: Model, tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs", durable=False)
    tested = bench("torch/16", 1, model, store, tmp_path / "scratch")
    fleet = devices(model, 4)
    wild = fleet[2].data
    x = np.full_like(wild.x_train, 1e38)
    fleet[2] = VirtualDevice(fleet[2].name, fleet[2].profile, LocalData(x, wild.y_train, wild.x_test, wild.y_test))
    work = offers(model, store, RECIPES["plain"], fleet)
    tested.prepare(work)
    with pytest.raises(TrainingError, match="not finite"):
        tested.carry_out(*work[2])
    for item in (work[0], work[1], work[3]):
        alone = bench("torch/16", 1, model, store, tmp_path / "alone")
        assert_near(store, tested.carry_out(*item), alone.carry_out(*item))


def test_names_of_trainers() -> None:
    assert not choice("onnxruntime").torch
    assert (choice("torch").device, choice("torch").together) == ("cpu", 1)
    assert (choice("torch:cuda:1/64").device, choice("torch:cuda:1/64").together) == ("cuda:1", 64)
    assert choice("torch:cuda").together > 1
    for name in ("", "torch:tpu", "torch/0", "onnx", "torch:cuda/", 3):
        with pytest.raises(ConfigError, match="trainer"):
            choice(name)  # type: ignore[arg-type]


def test_what_cannot_be_is_refused(model: Model, tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs", durable=False)
    with pytest.raises(ConfigError, match="in 2 processes"):
        bench("torch/4", 2, model, store, tmp_path)
    with pytest.raises(RuntimeUnavailableError, match="cuda:77"):
        bench("torch:cuda:77", 1, model, store, tmp_path)


def test_pieces_meet_whatever_their_pace() -> None:
    met: list[list[tuple[int, int]]] = []

    def answer(requests: list[Any]) -> list[Any]:
        met.append(list(requests))
        return [ModelError("no") if r == (1, 1) else r[0] * 10 + r[1] for r in requests]

    ensemble: Ensemble[list[int]] = Ensemble(answer)

    def piece(place: int) -> list[int]:
        out = []
        for turn in range(place + 1):
            time.sleep(0.002 * ((place * 7 + turn * 3) % 4))
            out.append(ensemble.ask((place, turn)))
        return out

    before = threading.active_count()
    results = ensemble.run([lambda i=i: piece(i) for i in range(4)])
    assert met == [[(i, turn) for i in range(turn, 4) if i >= turn and not (i == 1 and turn > 1)] for turn in range(4)]
    assert isinstance(results[1], ModelError)
    assert [results[i] for i in (0, 2, 3)] == [[0], [20, 21, 22], [30, 31, 32, 33]]
    assert threading.active_count() == before


def test_an_answer_that_fails_ends_every_piece() -> None:
    def answer(requests: list[Any]) -> list[Any]:
        raise MemoryError("too many")

    ensemble: Ensemble[Any] = Ensemble(answer)
    assert all(isinstance(r, MemoryError) for r in ensemble.run([lambda: ensemble.ask(1), lambda: ensemble.ask(2)]))
