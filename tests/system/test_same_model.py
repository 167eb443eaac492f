"""The simulator and real processes over a real broker give the same global model, bit for bit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.tasks.tasks import TASKS
from fedprune.blobs.blob_store import BlobStore
from fedprune.core import tensorfile
from fedprune.jobs.job import Job
from fedprune_device.data.dataset import LocalData
from fedprune_export.importing import import_onnx
from fedprune_export.importing.torch_export import export_torch
from fedprune_server.cli.demo import DemoFolder, run_job
from fedprune_server.simulation.digits import Digits, deal, digits_model, write_hand
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.fleet.simulated_fleet import DEMO_BOARDS, demo_job
from fedprune_server.simulation.fleet.virtual_device import VirtualDevice
from fedprune_server.simulation.results.record import DeviceRow, Record
from fedprune_server.simulation.simulation import Simulation
from support.marks import marked
from support.nets import benchmark_tasks

pytestmark = pytest.mark.system

SEED = 11


def measures(own: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Accuracies, losses and scores; the rest tells of the machine."""
    return {k: v for k, v in own.items() if k.startswith(("accuracy", "loss", "score", "blend"))}


def plain_job(**recipe: Any) -> Job:
    """The demo's job as the plain strategy has it, with other settings of its recipe."""
    job = demo_job(SEED, rounds=2)
    return replace(job, strategy="plain", options={}, recipe=replace(job.recipe, **recipe))


def run_both(root: Path, job: Job, raw: bytes, data: Digits) -> tuple[Record, Simulation]:
    """Run a job on the demo's boards in both ways, and compare what came of it."""
    folder = DemoFolder.prepare(root / "demo", SEED)
    folder.model.write_bytes(raw)
    np.savez(folder.evaluation, x=data.x, y=data.y)
    np.savez(folder.calibration, x=data.calibration)
    for board in DEMO_BOARDS:
        hand = data.devices[board.name]
        write_hand(folder.data(board.name), hand)
        if len(hand.y_val):
            with np.load(folder.data(board.name)) as arrays:
                np.savez(folder.data(board.name), **arrays, x_val=hand.x_val, y_val=hand.y_val)
    record = run_job("real", job, folder)

    devices = [VirtualDevice(b.name, b.profile(), data.devices[b.name]) for b in DEMO_BOARDS]
    simulation = Simulation(
        Experiment("virtual", job, import_onnx(raw, "model"), devices, (data.x, data.y), data.calibration),
        BlobStore(root / "blobs", durable=False),
    )
    simulation.run()

    virtual = simulation.record()
    assert [r.model for r in record.rounds] == [r.model for r in virtual.rounds]
    assert [r.local for r in record.rounds] == [r.local for r in virtual.rounds]
    assert [measures(r.own) for r in record.rounds] == [measures(r.own) for r in virtual.rounds]
    assert [planned(d) for d in record.devices] == [planned(d) for d in virtual.devices]
    for found, expected in zip(record.devices, virtual.devices, strict=True):
        # Predicted with the correction of the times, and without it again: the last bits tell of that.
        assert (found.train_j or 0.0) == pytest.approx(expected.train_j or 0.0, rel=1e-9)
    assert record.channels == virtual.channels
    return record, simulation


def planned(device: DeviceRow) -> DeviceRow:
    """A device without what was measured, which tells of the machine."""
    return replace(device, compared={}, train_j=None)


@pytest.mark.parametrize("scorer", [pytest.param("magnitude", marks=pytest.mark.soak), "curvature"])
def test_daemon_with_device_processes_and_simulator_give_the_same_models(tmp_path, scorer):
    job = plain_job(epochs=1, logit_adjustment=True)
    job = replace(job, scorer=scorer, warmup_rounds=1, rule="fill", server_momentum=0.7)
    run_both(tmp_path, job, digits_model(), deal([b.name for b in DEMO_BOARDS], seed=SEED))


def frozen_by_its_author() -> bytes:
    torch.manual_seed(SEED)
    layers = [nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 40), nn.ReLU()]
    module = nn.Sequential(*layers, nn.Linear(40, 10))
    module[0].requires_grad_(False)
    module[4].bias.requires_grad_(False)
    return export_torch(module, input_shape=(1, 8, 8))


def numbers(data: Digits) -> Digits:
    """The same images; their labels are two of their own rows."""

    def of(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return x.reshape(len(x), 8, 8)[:, 1:6:4, 1:6].reshape(len(x), 10)

    hands = {name: LocalData(d.x_train, of(d.x_train), d.x_test, of(d.x_test)) for name, d in data.devices.items()}
    return Digits(data.x, of(data.x), data.calibration, hands)


# At every push `test_recipes_end_to_end.py` simulates such jobs, and `test_trainer_recipes.py` trains boards by them.
@pytest.mark.soak
@pytest.mark.parametrize(
    ("make", "recipe", "of", "still"),
    [
        (digits_model, {"loss": "mse", "frozen": ["conv2.*"]}, numbers, {"conv2.weight"}),
        (digits_model, {"loss": "huber", "frozen": ["conv1.*", "*.bias"]}, numbers, {"conv1.weight", "fc.bias"}),
        (frozen_by_its_author, {}, lambda d: d, {"0.weight", "0.bias", "4.bias"}),
        (
            digits_model,
            {
                "personal": ["fc.*"],
                "average": 0.85,
                "calibrate": True,
                "augment": ["flip", "crop:1", "brightness:0.2", "contrast:0.2", "noise:0.05", "specaugment:1:1"],
            },
            lambda d: d,
            {"fc.weight", "fc.bias"},
        ),
    ],
    ids=["squares", "recipe", "torch", "own"],
)
def test_frozen_tensors_and_numbers_give_the_same_models(
    tmp_path: Path,
    make: Callable[[], bytes],
    recipe: dict[str, Any],
    of: Callable[[Digits], Digits],
    still: set[str],
) -> None:
    raw = make()
    job = replace(plain_job(epochs=1, **recipe), scorer="ordered", rule="fill", server_momentum=0.7)
    record, simulation = run_both(tmp_path, job, raw, of(deal([b.name for b in DEMO_BOARDS], seed=SEED)))
    assert len({r.model for r in record.rounds}) == 2
    assert ("accuracy_average" in record.rounds[-1].own) == ("average" in recipe)
    begun = import_onnx(raw, "model").tensors
    ended = tensorfile.decode(simulation.store.read(record.rounds[-1].model))
    kept = {n for n in begun if ended[n].tobytes() == begun[n].tobytes()}
    assert still <= kept < set(begun)
    moved = [n for n in begun if n.endswith("weight") and n not in still]
    assert not kept.intersection(moved)


def tiny(name: str) -> Digits:
    """A few random samples of a task for each of the demo's boards, and for the server."""
    hands = {}
    for number, board in enumerate(DEMO_BOARDS):
        x, y = benchmark_tasks.samples(name, 10, number)
        hands[board.name] = LocalData(x[:6], y[:6], x[6:], y[6:])
    x, y = benchmark_tasks.samples(name, 6, 99)
    return Digits(x, y, x, hands)


# A name of no task is in the symmetric difference, too, and `marked` refuses it.
@pytest.mark.parametrize("task", marked(TASKS, soak=TASKS.keys() ^ {"adapters"}))
@pytest.mark.soak
def test_tasks_of_every_kind_give_the_same_models(tmp_path: Path, task: str) -> None:
    job = plain_job()
    job = replace(job, byte_budget=0, density=0.5, recipe=replace(TASKS[task].recipe, batch_size=3, epochs=1))
    record, simulation = run_both(tmp_path, job, benchmark_tasks.imported(task).graph.to_bytes(), tiny(task))
    assert {row.updates for row in simulation.record().rounds} == {len(DEMO_BOARDS)}
    assert record.measure == job.recipe.judged_by
    assert np.isfinite(record.last.loss or 0.0)
