"""The simulator and real processes over a real broker give the same global model, bit for bit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fedprune_export as fx
from benchmarks.tasks.tasks import TASKS
from fedprune.blobs.blob_store import BlobStore
from fedprune.core import tensorfile
from fedprune.jobs.job import Job
from fedprune.wire.chunk import Chunk
from fedprune.wire.messages import BlobNotFound
from fedprune_device.data.dataset import LocalData
from fedprune_export.importing import import_onnx
from fedprune_export.importing.torch_export import export_torch
from fedprune_server.cli.demo import DemoFolder, run_job
from fedprune_server.simulation.digits import Digits, deal_digits, digits_model, write_device_data
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.fleet.demo_fleet import DEMO_BOARDS, demo_job
from fedprune_server.simulation.fleet.virtual_device import VirtualDevice
from fedprune_server.simulation.results.record import DeviceRow, Record
from fedprune_server.simulation.simulation import Simulation
from fedprune_server.transfer.downloads import Downloads
from support.marks import mark_soak
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
        write_device_data(folder.data(board.name), hand)
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
    assert [measures(r.device_metrics) for r in record.rounds] == [measures(r.device_metrics) for r in virtual.rounds]
    assert [without_measurements(d) for d in record.devices] == [without_measurements(d) for d in virtual.devices]
    for found, expected in zip(record.devices, virtual.devices, strict=True):
        # Predicted with the correction of the times, and without it again: the last bits tell of that.
        assert (found.train_j or 0.0) == pytest.approx(expected.train_j or 0.0, rel=1e-9)
    assert record.channels == virtual.channels
    return record, simulation


def without_measurements(device: DeviceRow) -> DeviceRow:
    """A device without what was measured, which tells of the machine."""
    return replace(device, compared={}, train_j=None)


@pytest.mark.parametrize("scorer", [pytest.param("magnitude", marks=pytest.mark.soak), "curvature"])
def test_daemon_with_device_processes_and_simulator_give_the_same_models(tmp_path, scorer):
    job = plain_job(epochs=1, logit_adjustment=True)
    job = replace(job, scorer=scorer, warmup_rounds=1, rule="fill", server_momentum=0.7)
    run_both(tmp_path, job, digits_model(), deal_digits([b.name for b in DEMO_BOARDS], seed=SEED))


def test_a_drift_of_the_servers_gives_the_same_models(tmp_path: Path) -> None:
    job = replace(plain_job(epochs=1, momentum=0.0), strategy="scaffold", options={"densities": [1.0, 0.5]})
    _, simulation = run_both(tmp_path, job, digits_model(), deal_digits([b.name for b in DEMO_BOARDS], seed=SEED))
    assert all(task.offer and task.offer["drift"] for task in simulation.state.tasks.values())


# At every push `test_offered_increments.py` has what a board pulls, `test_residual_split.py` what is simulated.
@pytest.mark.soak
def test_boards_that_put_increments_together_give_the_same_models(tmp_path):
    """With the residual split and without it, in processes and simulated."""
    data, models = deal_digits([b.name for b in DEMO_BOARDS], seed=SEED), []
    for split in (False, True):
        options = {"densities": [0.6, 0.3, 0.1], "stage1": False, "synchronous": True, "split": split}
        job = replace(plain_job(epochs=1), strategy="pr-fl", options=options)
        record, _ = run_both(tmp_path / str(split), job, digits_model(), data)
        models.append([r.model for r in record.rounds])
    assert models[0] == models[1]


# At every push `test_resumed_runs.py` has what a simulation judges, and `test_served_average.py` what a board serves.
@pytest.mark.soak
def test_the_demo_and_its_simulation_judge_what_boards_serve(tmp_path):
    job = demo_job(SEED, rounds=2)
    record, _ = run_both(tmp_path, job, digits_model(), deal_digits([b.name for b in DEMO_BOARDS], seed=SEED))
    last = record.rounds[-1]
    assert last.local == last.device_metrics["accuracy_average"] != last.device_metrics["accuracy_after"]


# At every push `tests/device/training/test_served_average.py` chooses between average and blend.
@pytest.mark.soak
def test_a_validated_blend_gives_the_same_models(tmp_path):
    """Its choice is measured alike, and reported by both."""
    data = deal_digits([b.name for b in DEMO_BOARDS], seed=SEED)
    hands = {name: d.with_validation(0.3, SEED, name) for name, d in data.devices.items()}
    record, _ = run_both(tmp_path, demo_job(SEED, rounds=3), digits_model(), replace(data, devices=hands))
    assert {share for row in record.rounds for share in row.device_metrics["blend"].values()} <= {0.0, 0.5}


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
    tmp_path: Path, make: Callable[[], bytes], recipe: dict[str, Any], of: Callable[[Digits], Digits], still: set[str]
) -> None:
    raw = make()
    job = replace(plain_job(epochs=1, **recipe), scorer="ordered", rule="fill", server_momentum=0.7)
    record, simulation = run_both(tmp_path, job, raw, of(deal_digits([b.name for b in DEMO_BOARDS], seed=SEED)))
    assert len({r.model for r in record.rounds}) == 2
    assert ("accuracy_average" in record.rounds[-1].device_metrics) == ("average" in recipe)
    begun = import_onnx(raw, "model").tensors
    ended = tensorfile.decode(simulation.store.read(record.rounds[-1].model))
    kept = {n for n in begun if ended[n].tobytes() == begun[n].tobytes()}
    assert still <= kept < set(begun)
    assert not kept.intersection(n for n in begun if n.endswith("weight") and n not in still)


class Wide(nn.Module):
    """Linear layers, of which adapters are a small part."""

    input_shape = (1, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Flatten(), nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.fixture
def resent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of what a device is sent once more: one that hears nothing for five seconds asks again, on a slow machine
    for what is on its way."""
    found, seen = list[int](), set[tuple[str, str, str, int]]()
    answer = Downloads.next_chunk

    def answered(downloads: Downloads) -> tuple[str, bytes | BlobNotFound] | None:
        item = answer(downloads)
        if item is not None and not isinstance(item[1], BlobNotFound):
            chunk = Chunk.parse(item[1])
            for leaf, payload in chunk.leaves():
                key = item[0], chunk.sha256, chunk.part, leaf
                found.append(len(payload) if key in seen else 0)
                seen.add(key)
        return item

    monkeypatch.setattr(Downloads, "next_chunk", answered)
    return found


@pytest.mark.parametrize("base", ["float16", *(pytest.param(b, marks=pytest.mark.soak) for b in ("int8", None))])
@pytest.mark.soak
def test_the_simulator_counts_as_many_bytes_as_the_daemon_sends(
    tmp_path: Path, resent: list[int], base: str | None
) -> None:
    torch.manual_seed(SEED)
    model = fx.load(Wide(), lora="8", base=base)
    job = replace(plain_job(epochs=1), byte_budget=0, density=0.5)
    record, simulation = run_both(
        tmp_path, job, model.graph.to_bytes(), deal_digits([b.name for b in DEMO_BOARDS], seed=SEED)
    )
    sent, counted = (
        [run.rounds[0].down, run.rounds[1].down - run.rounds[0].down] for run in (record, simulation.record())
    )
    frozen = len(model.base_file or b"") or sum(v.nbytes for n, v in model.tensors.items() if ".lora_" not in n)
    assert counted[0] > len(DEMO_BOARDS) * frozen
    assert counted[1] < len(DEMO_BOARDS) * frozen / 3, "the base is sent once"
    assert len(resent) > len(DEMO_BOARDS), "the server's answers were seen"
    assert counted[0] <= sent[0]
    assert sent[0] - sum(resent) < counted[0] + frozen / 2, (sent, counted, sum(resent))
    # The base is not among what travels in the second round, asked for again or not.
    assert counted[1] <= sent[1] < counted[1] + frozen / 2, (sent, counted)


class Halves(nn.Module):
    """The halves of an image as two inputs; its class, and its rows' means, as two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.input_shape = {"lower": (4, 8), "upper": (4, 8)}
        self.near, self.far = nn.Linear(32, 20), nn.Linear(32, 20)
        self.kind, self.means = nn.Linear(40, 10), nn.Linear(40, 8)

    def forward(self, lower: torch.Tensor, upper: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.cat([torch.relu(self.near(lower.flatten(1))), torch.relu(self.far(upper.flatten(1)))], 1)
        return self.kind(both), self.means(both)


def of_both(kind: torch.Tensor, means: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return -(kind.log_softmax(1) * labels[:, :10]).sum(1) + ((means - labels[:, 10:]) ** 2).mean(1)


def right(kind: torch.Tensor, means: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (kind.argmax(1) == labels[:, :10].argmax(1)).float()


of_both.target_shape = right.target_shape = (18,)  # type: ignore[attr-defined]


def swap_halves(data: Digits) -> Digits:
    """Lower half before upper half, as boards lay out named arrays; classes and means as labels."""

    def x_of(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.roll(x.reshape(len(x), 64), 32, axis=1)

    def y_of(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.concatenate([np.eye(10)[y], x.reshape(len(x), 8, 8).mean(2)], 1).astype(np.float32)

    hands = {
        name: LocalData(x_of(d.x_train), y_of(d.x_train, d.y_train), x_of(d.x_test), y_of(d.x_test, d.y_test))
        for name, d in data.devices.items()
    }
    return Digits(x_of(data.x), y_of(data.x, data.y), x_of(data.calibration), hands)


# At every push `test_presets_on_tasks.py` simulates several inputs, and `test_metrics.py` has a metric of one's own.
@pytest.mark.soak
def test_several_inputs_and_outputs_a_loss_and_a_metric_of_ones_own_give_the_same_models(tmp_path: Path) -> None:
    torch.manual_seed(SEED)
    raw = fx.load(Halves(), loss=of_both, metric=right).graph.to_bytes()
    job = plain_job(epochs=5, loss="custom", metric="custom", lr=0.05)
    record, _ = run_both(tmp_path, job, raw, swap_halves(deal_digits([b.name for b in DEMO_BOARDS], seed=SEED)))
    assert record.measure == "score"
    assert record.last.metrics["score"] > 0.3
    assert set(record.last.local) == {b.name for b in DEMO_BOARDS}


def tiny(name: str) -> Digits:
    """A few random samples of a task for each of the demo's boards, and for the server."""
    hands = {}
    for number, board in enumerate(DEMO_BOARDS):
        x, y = benchmark_tasks.samples(name, 10, number)
        hands[board.name] = LocalData(x[:6], y[:6], x[6:], y[6:])
    x, y = benchmark_tasks.samples(name, 6, 99)
    return Digits(x, y, x, hands)


# A name of no task is in the symmetric difference, too, and `marked` refuses it.
@pytest.mark.parametrize("task", mark_soak(TASKS, soak=TASKS.keys() ^ {"adapters"}))
@pytest.mark.soak
def test_tasks_of_every_kind_give_the_same_models(tmp_path: Path, task: str) -> None:
    job = plain_job()
    job = replace(job, byte_budget=0, density=0.5, recipe=replace(TASKS[task].recipe, batch_size=3, epochs=1))
    record, simulation = run_both(tmp_path, job, benchmark_tasks.task_model(task).graph.to_bytes(), tiny(task))
    assert {row.updates for row in simulation.record().rounds} == {len(DEMO_BOARDS)}
    assert record.measure == job.recipe.judged_by
    assert np.isfinite(record.last.metrics.get("loss") or 0.0)
