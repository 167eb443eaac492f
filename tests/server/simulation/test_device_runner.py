"""A virtual device's work is a board's work, in this process or in others: the same bits, the same refusals."""

import json
import multiprocessing
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import fedprune_export as fx
from fedprune.blobs.blob_store import BlobStore
from fedprune.core import tensorfile
from fedprune.core.errors import DataError
from fedprune.model.architecture import widths_at
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.planning.profile_store import find_profile
from fedprune.wire.messages import Offer
from fedprune_device.data.array_source import load_data
from fedprune_device.data.dataset import LocalData
from fedprune_device.data.sequences import PaddedRows
from fedprune_device.serving.model_slots import ModelSlots
from fedprune_device.storage.state_directory import DeviceStore
from fedprune_device.training.evaluation import MACHINE_METRICS
from fedprune_device.training.round_runner import RoundRunner
from fedprune_export.bundles.inference import inference_model
from fedprune_export.training.step_graph import training_graph
from fedprune_server.simulation.fleet.device_runner import DeviceRunner, SampleFile, TrainingWork, WorkerKilledError
from fedprune_server.simulation.fleet.virtual_device import Outcome, StoredData, VirtualDevice
from fedprune_server.simulation.results.run_folder import simulate_in_folder
from fedprune_server.simulation.simulation import Simulation
from fedprune_server.simulation.transfers import download_sizes
from support.fakes.digits_simulation import boards, boards_that_validate, digits_experiment, digits_net
from support.fakes.hidden_board import HiddenBoard, hidden_weights
from support.paths import GRAPHS

RNG = np.random.default_rng(5)
X, Y = RNG.standard_normal((30, 6)).astype(np.float32), RNG.integers(0, 3, 30)
WEIGHTS = {"w": 0.1 * RNG.standard_normal((3, 6)).astype(np.float32), "b": np.zeros(3, np.float32)}
DEVICE = VirtualDevice("d", find_profile("raspberry-pi-4b"), LocalData(X[:20], Y[:20], X[20:], Y[20:]))


@pytest.fixture
def store(tmp_path):
    return BlobStore(tmp_path / "blobs", durable=False)


@pytest.fixture
def offer(store):
    return {
        "seed": 7,
        "architecture": "a" * 64,
        "selection": "b" * 64,
        "widths": (3,),
        "classes": 3,
        "weights": store.put(tensorfile.encode(WEIGHTS)).to_dict(),
        "training": store.put((GRAPHS / "plain.onnx").read_bytes()).to_dict(),
        "inference": store.put((GRAPHS / "inference.onnx").read_bytes()).to_dict(),
        "recipe": Recipe(epochs=2).to_dict(),
    }


@pytest.mark.torch
def test_samples_of_different_lengths_train_to_the_same_bits(store, offer, tmp_path):
    from support.nets.pooled import Pooled

    model, lengths = fx.load(Pooled()), RNG.integers(3, 9, 24)
    np.savez(tmp_path / "d.npz", x=RNG.standard_normal((24, 2, 8)).astype(np.float32), lengths=lengths, y=Y[:24])
    data, widths = load_data(str(tmp_path / "d.npz")), model.architecture.sizes
    graphs = {
        "weights": tensorfile.encode(model.tensors),
        "training": training_graph(model, Recipe().features).to_bytes(),
        "inference": inference_model(model, widths),
    }
    offer |= {"widths": widths, **{name: store.put(raw).to_dict() for name, raw in graphs.items()}}
    device = VirtualDevice("d", find_profile("raspberry-pi-4b"), data)
    virtual = DeviceRunner(store, tmp_path / "scratch").train(device, offer, 4)
    slots = ModelSlots(tmp_path / "serving")
    slots.prepare()
    order = Offer.from_dict({"job": "job", "round": 4, "attempt": 1, **offer})
    real = RoundRunner("d", store, slots, data).carry_out(order).update
    assert (virtual.weights, virtual.samples, virtual.steps) == (real.weights, real.samples, real.steps)
    assert virtual.metrics == {k: v for k, v in real.metrics.items() if k not in MACHINE_METRICS}
    assert virtual.samples == data.samples


KEEPING = {
    "calibrated": Recipe(batch_size=16, average=0.8, calibrate=True, patience=2, epochs=3),
    "validated blend": Recipe(batch_size=16, average=0.8, blend=0.9, validate_blend=True),
    "personal": Recipe(batch_size=16, personal=("w2", "b2", "mean", "var")),
    "masked": Recipe(batch_size=16, average=0.8, mask="hard", report_squares=True),
    "optimizer's state": Recipe(batch_size=16, keep_optimizer_state=True),
}


@pytest.mark.parametrize("name", list(KEEPING))
def test_what_a_board_keeps_is_kept_for_a_virtual_device_too(store, tmp_path, name):
    """Round for round the same bits as on a board's disk; also after a kill that takes the simulation back."""
    recipe = KEEPING[name]
    x, y = RNG.standard_normal((60, 6)).astype(np.float32), RNG.integers(0, 3, 60)
    data = LocalData(x[:30], y[:30], x[30:45], y[30:45], x[45:], y[45:])
    board = HiddenBoard(tmp_path / "board", GRAPHS, data)
    device = VirtualDevice("d", find_profile("raspberry-pi-4b"), data)
    runner, saved = DeviceRunner(store, tmp_path / "scratch"), {}
    for number, width in ((1, 8), (2, 8), (3, 4), (5, 8), (5, 8)):
        weights = hidden_weights(width, number)
        mask = {"w1": weights["w1"] > 0} if recipe.mask != "none" else {}
        offer = board.offer(number, recipe, weights, graph="masked" if mask else "kept", mask=mask)
        real, sent, _ = board.carry_out(offer)
        with DeviceStore(board.root) as board_store:
            for ref in offer.blobs():
                store.put(board_store.blobs.read(ref.sha256))
        head = ("v", "type", "job", "round", "attempt")
        body = {k: v for k, v in json.loads(offer.to_bytes()).items() if k not in head}
        before = dict(runner.state_digests)
        virtual = runner.train(device, body, number)
        assert (virtual.weights, virtual.samples, virtual.steps) == (real.weights, real.samples, real.steps)
        assert virtual.metrics == {k: v for k, v in real.metrics.items() if k not in MACHINE_METRICS}
        assert all(np.isfinite(v).all() for v in sent.values())
        saved[number] = runner.state_digests["d"]
        runner = DeviceRunner(store, tmp_path / f"scratch-{number}")  # another process
        runner.state_digests |= before
        assert runner.train(device, body, number) == virtual
        assert runner.state_digests["d"] == saved[number]
    assert ("accuracy_average" in virtual.metrics) == (recipe.average > 0)
    assert {"accuracy_validation", "loss_validation_before"} <= set(virtual.metrics)


def test_weights_that_a_board_can_decode_come_encoded():
    def ref(letter, size):
        return {"sha256": 64 * letter, "size": size}

    offer = {"weights": ref("a", 100), "training": ref("b", 10), "inference": ref("c", 1), "mask": None}
    plain_sizes = {64 * "a": 100, 64 * "b": 10, 64 * "c": 1}
    coded = {**offer, "coded": ref("d", 7), "held": 64 * "e"}
    assert download_sizes(offer, ()) == download_sizes(coded, ()) == plain_sizes
    assert download_sizes(coded, [64 * "e"]) == {**plain_sizes, 64 * "a": 7}
    assert download_sizes({**offer, "coded": ref("d", 7)}, ()) == {**plain_sizes, 64 * "a": 7}  # the difference to 0
    assert download_sizes({**offer, "moved": ref("f", 3)}, ()) == {**plain_sizes, 64 * "f": 3}


# Several processes.

RECIPE = Recipe(
    epochs=2,
    batch_size=64,
    logit_adjustment=True,
    ordered_dropout=(0.5,),
    average=0.8,
    blend=0.2,
    calibrate=True,
    personal=("fc.*",),
    patience=1,
)


def training_work(store: BlobStore, recipe: Recipe, fleet: list[VirtualDevice], number: int = 1) -> list[TrainingWork]:
    """Every other device has half of the channels."""
    model = digits_net()
    architecture, work = model.architecture, list[TrainingWork]()
    training = store.put(training_graph(model, recipe.features).to_bytes()).to_dict()
    for i, device in enumerate(fleet):
        widths = widths_at(architecture, 0.5 if i % 2 else 1.0)
        weights = Selection.of(architecture, widths).gather(model.tensors)
        offer = {
            "seed": 7,
            "architecture": architecture.digest,
            "selection": "b" * 64,
            "widths": widths,
            "classes": architecture.classes,
            "weights": store.put(tensorfile.encode(weights)).to_dict(),
            "training": training,
            "inference": store.put(inference_model(model, widths)).to_dict(),
            "recipe": recipe.to_dict(),
        }
        work.append((device, offer, number))
    return work


def train_all(runner: DeviceRunner, work: list[TrainingWork]) -> list[Outcome]:
    for item in work:
        runner.begin_ahead(*item)
    return [runner.train(*item) for item in work]


def test_other_processes_give_the_same_bits(store: BlobStore, tmp_path: Path) -> None:
    alone, pooled = DeviceRunner(store, tmp_path / "1"), DeviceRunner(store, tmp_path / "2", workers=2)
    fleet = boards_that_validate()
    try:
        for number in (1, 2):
            work = training_work(store, RECIPE, fleet, number)
            assert train_all(pooled, work) == train_all(alone, work)
            assert pooled.state_digests == alone.state_digests
        work[0][1]["classes"] = 3
        with pytest.raises(Exception, match="range") as own_error:
            alone.train(*work[0])
        with pytest.raises(type(own_error.value), match="range") as pool_error:
            pooled.train(*work[0])
        assert str(pool_error.value) == str(own_error.value)
    finally:
        pooled.close()


def test_samples_reach_another_process_as_they_are(tmp_path: Path) -> None:
    x = np.asfortranarray(RNG.standard_normal((6, 9)).astype(np.float32))
    rows = PaddedRows((2, 4), 1, 4)
    data = LocalData(x, x, x[::2], x[::2], rows=rows)
    file = SampleFile.write(tmp_path / "samples", data)
    loaded = file.load()
    file.path.unlink()

    assert loaded.is_unlabelled
    assert loaded.rows == rows
    for name in ("x_train", "x_test", "y_test", "x_val", "y_val"):
        array, expected = getattr(loaded, name), getattr(data, name)
        assert (array.dtype, array.shape, array.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())


@pytest.mark.parametrize("stored", [False, True])
def test_samples_that_are_in_memory_are_written_once_and_others_deleted(
    store: BlobStore, tmp_path: Path, stored: bool
) -> None:
    fleet, folder = boards(), tmp_path / "scratch"
    if stored:
        fleet = [replace(device, data=StoredData.of(device.load)) for device in fleet]
    with closing(DeviceRunner(store, folder, workers=2)) as runner:
        for number in (1, 2):
            train_all(runner, training_work(store, Recipe(), fleet, number))
    assert len([path for path in folder.iterdir() if path.is_file()]) == (0 if stored else len(fleet))


def test_a_killed_process_ends_a_simulation_and_is_no_boards_refusal() -> None:
    def kill(_: Simulation) -> None:
        for child in multiprocessing.active_children():
            child.kill()

    with pytest.raises(WorkerKilledError):
        simulate_in_folder(digits_experiment(rounds=3, workers=2), progress=kill)


def test_cancelled_trainings_are_dropped(store: BlobStore, tmp_path: Path) -> None:
    work = training_work(store, Recipe(), boards())
    cancelled, of_another_round, _ = work
    with closing(DeviceRunner(store, tmp_path / "scratch", workers=2)) as runner:
        for item in work:
            runner.begin_ahead(*item)
        runner.cancel(cancelled[0].name)
        runner.cancel(of_another_round[0].name, round_number=7)  # of another round
        trained_digests = trained_ahead(runner, 2)
        assert runner.train(*of_another_round).weights.sha256 in trained_digests
        assert runner.train(*cancelled).weights.sha256 not in trained_digests


def trained_ahead(runner: DeviceRunner, count: int) -> set[str]:
    """The digests of what processes have trained, when there are so many: of updates and of boards' states."""
    deadline = time.monotonic() + 60
    while len(digests := runner.trained_ahead()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return digests


def test_what_was_trained_ahead_and_deleted_is_trained_again(store: BlobStore, tmp_path: Path) -> None:
    """It may equal blobs of earlier rounds, which are deleted while processes train."""
    [work] = training_work(store, RECIPE, boards()[:1])
    with closing(DeviceRunner(store, tmp_path / "scratch", workers=2)) as runner:
        runner.begin_ahead(*work)
        digests = trained_ahead(runner, 2)
        for digest in digests:
            store.delete(digest)
        weights = runner.train(*work).weights.sha256
    assert digests == {weights, *runner.state_digests.values()}
    assert all(map(store.has, digests))


def test_samples_that_cannot_be_read_are_the_boards_refusal(store: BlobStore, tmp_path: Path) -> None:
    def missing() -> LocalData:
        raise DataError("the samples are gone")

    [(device, offer, number)] = training_work(store, Recipe(), boards()[:1])
    broken = replace(device, data=StoredData(20, "f" * 64, missing))
    with closing(DeviceRunner(store, tmp_path / "scratch", workers=2)) as runner:
        runner.begin_ahead(broken, offer, number)
        with pytest.raises(DataError, match="gone"):
            runner.train(broken, offer, number)
