"""Simulated fleets: the same every time, through kills, drop-outs and partial participation."""

import errno
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from fedprune.blobs.blob_store import BlobStore
from fedprune.core import tensorfile
from fedprune.core.errors import ConfigError, FedpruneError, PlanError, StorageError, StorageFullError
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune.planning.profile_store import find
from fedprune_export.importing import import_onnx
from fedprune_server.simulation import state as simulation_state
from fedprune_server.simulation.digits import deal, digits_model
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.fleet.virtual_device import VirtualDevice
from fedprune_server.simulation.network_model import DropOuts
from fedprune_server.simulation.simulation import Simulation
from fedprune_server.simulation.state import FILE

KINDS = ("raspberry-pi-zero-2w", "raspberry-pi-4b", "jetson-orin-nano")


@pytest.fixture(scope="module")
def model():
    return import_onnx(digits_model(), "digits-net")


@pytest.fixture(scope="module")
def fleet():
    data = deal(KINDS, seed=1)
    return data, [VirtualDevice(kind, find(kind), data.devices[kind]) for kind in KINDS]


@pytest.fixture
def build(model, fleet, tmp_path):
    """A simulation of three devices, 16 steps each, in a folder of its own."""
    data, devices = fleet

    def make(folder="run", fleet=devices, dropouts=None, **settings):
        job = Job(**{"seed": 3, "rounds": 3, "devices": 3, "density": 0.25, "recipe": Recipe(max_steps=3), **settings})
        path = tmp_path / folder
        store = BlobStore(path / "blobs", durable=False)
        return Simulation(
            Experiment("x", job, model, fleet, (data.x, data.y), dropouts=dropouts or DropOuts()), store, folder=path
        )

    return make


class KillError(Exception):
    """Ends a simulation as a kill does: between two events, without a word."""


def killed_after(trainings):
    left = [trainings]

    def progress(_):
        left[0] -= 1
        if left[0] == 0:
            raise KillError

    return progress


@pytest.mark.slow
def test_same_seed_gives_the_same_bits_and_times(build):
    first, second = build("first"), build("second")
    assert first.run() == second.run()


@pytest.mark.slow
def test_another_seed_gives_another_model(build):
    first, second = build("first"), build("second", seed=4)
    first.run(), second.run()
    assert first.state.model != second.state.model


@pytest.mark.slow
def test_training_improves_the_global_model(build):
    simulation = build(density=0.5, rounds=3, recipe=Recipe(epochs=3, lr=0.03))
    losses = [row["metrics"]["loss"] for row in simulation.run()]
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("trainings", [2, 5])
def test_a_killed_run_goes_on_to_the_same_model(build, trainings):
    whole = build("whole")
    whole.run()
    with pytest.raises(KillError):
        build("killed").run(killed_after(trainings))
    resumed = build("killed")
    resumed.run()
    assert resumed.state.model == whole.state.model
    assert resumed.state.history == whole.state.history
    assert resumed.record().rounds == whole.record().rounds


@pytest.fixture
def kill_at(monkeypatch):
    """Ends a run just before it touches its folder for the n-th time; gives how often it did."""
    save, delete = simulation_state.write_whole, BlobStore.delete
    left, count = [-1], [0]

    def step():
        count[0] += 1
        left[0] -= 1
        if left[0] == -1:
            raise KillError

    def saving(path, data):
        step()
        save(path, data)

    def deleting(store, name):
        step()
        delete(store, name)

    # Saved at the end of every round and never within one, however slow the disk is: the number of steps is the same.
    monkeypatch.setattr(simulation_state, "_EXPENSIVE_S", math.inf)
    monkeypatch.setattr(simulation_state, "_INTERVAL_S", math.inf)
    monkeypatch.setattr(simulation_state, "write_whole", saving)
    monkeypatch.setattr(BlobStore, "delete", deleting)

    def after(number):
        left[0], count[0] = number, 0
        return count

    return after


@pytest.mark.slow
def test_a_run_killed_at_any_save_or_deletion_goes_on_to_the_same_model(build, kill_at):
    small = {"rounds": 3, "recipe": Recipe(max_steps=1), "scorer": "ordered"}
    touched = kill_at(10**6)
    whole = build("whole", **small)
    whole.run()
    left = set(whole.store.names())
    for number in range(times := touched[0]):
        kill_at(number)
        with pytest.raises(KillError):
            build(f"killed-{number}", **small).run()
        kill_at(10**6)
        resumed = build(f"killed-{number}", **small)
        resumed.run()
        assert resumed.state.history == whole.state.history
        assert {resumed.state.model} <= set(resumed.store.names()) <= left
    assert times > 10


@pytest.mark.slow
def test_a_state_that_finds_no_room_leaves_the_one_before(build, monkeypatch, tmp_path):
    with pytest.raises(KillError):
        build().run(killed_after(2))
    before = (tmp_path / "run" / FILE).read_bytes()

    rename = Path.replace

    def full(path, target):
        if target.name == FILE:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(StorageFullError, match=FILE):
            build().run()
    assert (tmp_path / "run" / FILE).read_bytes() == before
    whole = build("whole")
    assert build().run() == whole.run()


@pytest.mark.slow
def test_a_finished_run_is_not_repeated(build):
    build().run()
    again = build()
    again.run(lambda _: pytest.fail("something was trained again"))
    assert len(again.state.history) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"scorer": "magnitude"},
        {"dropouts": DropOuts(0.4, away_s=10.0), "participation": 0.7, "deadline_s": 20.0},
        {"strategy": "fedavg", "recipe": Recipe(max_steps=3, momentum=0.9)},
        {"strategy": "fedprune"},
        {"compression": "top-k:0.05"},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_a_finished_run_with_more_rounds_is_the_run_that_had_them_from_the_start(build, settings):
    whole = build("whole", rounds=4, **settings)
    whole.run()
    for rounds in (1, 3):
        build(rounds=rounds, **settings).run()
    with pytest.raises(KillError):
        build(rounds=4, **settings).run(killed_after(1))
    extended = build(rounds=4, **settings)
    assert extended.run() == whole.state.history
    assert extended.state.to_json() == whole.state.to_json()
    assert extended.clock == whole.clock
    assert extended.record() == whole.record()
    assert set(extended.store.names()) == set(whole.store.names())


def test_a_run_is_not_cut_to_fewer_rounds_than_it_has_come_to(build):
    with pytest.raises(KillError):
        build().run(killed_after(4))  # in the second round
    with pytest.raises(StorageError, match="has come to round 2"):
        build(rounds=1)
    build(rounds=2).run()
    with pytest.raises(StorageError, match="has come to round 2"):
        build(rounds=1)


@pytest.mark.parametrize("strategy", ["fedbuff", "own_rounds:compose"])
def test_a_run_that_depends_on_its_rounds_is_not_extended(build, strategy, tmp_path, monkeypatch):
    (tmp_path / "own_rounds.py").write_text("from fedprune.strategies.methods.plain import plain as compose\n")
    monkeypatch.syspath_prepend(tmp_path)
    build(rounds=1, strategy=strategy).run()
    with pytest.raises(StorageError, match="other settings"):
        build(rounds=2, strategy=strategy)


def test_other_settings_do_not_go_on_with_a_saved_run(build):
    build().run()
    with pytest.raises(StorageError, match="other settings"):
        build(seed=99)


def leaky(slope):
    """A net whose activation is no part of its architecture."""
    file = onnx.load_from_string(digits_model())
    for node in file.graph.node:
        if node.op_type == "Relu":
            node.op_type = "LeakyRelu"
            node.attribute.append(onnx.helper.make_attribute("alpha", slope))
    return import_onnx(file.SerializeToString(), "digits-net")


def changed_model(experiment):
    other = leaky(0.3)
    assert other.architecture.digest == experiment.model.architecture.digest
    return replace(experiment, model=other)


def changed_evaluation(experiment):
    x, y = experiment.evaluation
    return replace(experiment, evaluation=(x, (y + 1) % 10))


def changed_shape(experiment):
    """The same bytes of training data as other samples."""
    first, *rest = experiment.devices
    x = first.data.x_train
    data = replace(first.data, x_train=x.reshape(len(x), 1, 4, 16), x_test=first.data.x_test.reshape(-1, 1, 4, 16))
    return replace(experiment, devices=[replace(first, data=data), *rest])


def moved_samples(experiment):
    """Evaluation samples that have become calibration samples."""
    return replace(experiment, calibration=experiment.evaluation[0], evaluation=None)


@pytest.mark.parametrize("change", [changed_model, changed_evaluation, changed_shape, moved_samples])
def test_whatever_decides_a_run_is_in_its_fingerprint(fleet, change):
    data, devices = fleet
    experiment = Experiment("x", Job(), leaky(0.1), devices, (data.x, data.y))
    assert replace(experiment).fingerprint == experiment.fingerprint
    assert change(experiment).fingerprint != experiment.fingerprint


def test_a_fingerprint_is_worked_out_once(fleet, model, monkeypatch):
    data, devices = fleet
    experiment = Experiment("x", Job(), model, devices, (data.x, data.y))
    found = experiment.fingerprint
    monkeypatch.setattr(type(model.graph), "to_bytes", None)
    assert experiment.settings()["fingerprint"] == experiment.fingerprint == found
    with pytest.raises(TypeError):
        replace(experiment).settings()  # another experiment has another one


def test_another_evaluation_set_does_not_go_on_with_a_saved_run(build, model, fleet, tmp_path):
    simulation = build()
    simulation.run()
    data, _ = fleet
    store = BlobStore(tmp_path / "run" / "blobs", durable=False)
    with pytest.raises(StorageError, match="other settings"):
        Simulation(replace(simulation.experiment, evaluation=(data.x[1:], data.y[1:])), store, folder=tmp_path / "run")


def test_damaged_state_is_refused(build, tmp_path):
    build().run()
    path = tmp_path / "run" / FILE
    path.write_text(path.read_text()[:-20])
    with pytest.raises(StorageError, match=r"simulation\.json"):
        build()


def test_partial_participation_asks_the_share_of_the_devices(build):
    history = build(participation=0.5, rounds=4).run()
    assert {len(row["devices"]) for row in history} == {2}
    assert len({tuple(row["devices"]) for row in history}) > 1


def test_a_device_that_is_too_slow_misses_the_deadline_and_the_round_goes_on(build, fleet):
    alone = {}
    for device in fleet[1]:
        simulation = build(device.name, fleet=[device], devices=1, rounds=1)
        simulation.run()
        alone[device.name] = simulation.clock
    *_, second, slowest = sorted(alone, key=alone.__getitem__)
    (row,) = build(deadline_s=(alone[second] + alone[slowest]) / 2, rounds=1).run()
    assert slowest == "raspberry-pi-zero-2w"
    assert {n: d["progress"] == "folded" for n, d in row["devices"].items()} == {n: n != slowest for n in alone}


def test_a_deadline_that_nobody_makes_ends_with_an_error(build):
    with pytest.raises(PlanError, match="attempts"):
        build(deadline_s=0.001).run()


def test_drop_outs_cost_updates_but_not_the_run(build):
    dropouts = DropOuts(probability=0.5, away_s=1000.0)
    history = build(dropouts=dropouts, deadline_s=30.0, rounds=4).run()
    counted = [sum(d["progress"] == "folded" for d in row["devices"].values()) for row in history]
    assert len(history) == 4
    assert min(counted) >= 1
    assert sum(counted) < 12


def test_drop_outs_are_the_same_every_time(build):
    dropouts = DropOuts(probability=0.4, away_s=20.0)
    first, second = (build(name, dropouts=dropouts, deadline_s=30.0) for name in ("first", "second"))
    assert first.run() == second.run()


def test_the_virtual_clock_follows_link_and_board(build, fleet):
    """One device: a round takes what the arithmetic of its profile says."""
    zero = fleet[1][0]
    simulation = build(fleet=[zero], devices=1, rounds=1)
    (row,) = simulation.run()
    link, record = zero.profile.link, simulation.record().last
    trained = zero.train_s(
        simulation.model.architecture, tuple(row["devices"][zero.name]["widths"]), simulation.job.recipe
    )
    expected = record.down / link.down_bytes_s + trained + record.up / link.up_bytes_s + 2 * link.latency_s
    assert simulation.clock == pytest.approx(expected)


def test_bytes_are_the_blobs_that_travel(build, model):
    simulation = build(density=1.0, rounds=2, recipe=Recipe(max_steps=1))
    simulation.run()
    rounds = simulation.record().rounds
    weights = len(tensorfile.encode(model.tensors))
    assert [r.up for r in rounds] == [3 * weights, 6 * weights]
    # Graphs travel once, weights every time.
    assert rounds[1].down - rounds[0].down == 3 * weights
    assert rounds[0].down > 3 * weights


def test_blobs_of_past_rounds_are_deleted(build, tmp_path):
    simulation = build(rounds=3)
    simulation.run()
    kept = set(simulation.store.names())
    assert simulation.state.model in kept
    assert simulation.state.history[0]["model"] not in kept


def test_data_that_the_model_cannot_take_is_refused_and_named(model, fleet, tmp_path):
    _, devices = fleet
    wrong = replace(devices[0], data=replace(devices[0].data, y_train=devices[0].data.y_train + 7))
    job = Job(rounds=1, devices=3, density=0.25, recipe=Recipe(max_steps=1))
    simulation = Simulation(Experiment("x", job, model, [wrong, *devices[1:]]), BlobStore(tmp_path, durable=False))
    (row,) = simulation.run()
    assert row["devices"][wrong.name]["progress"] == "refused"
    assert "label" in row["devices"][wrong.name]["reason"]
    assert row["metrics"] == {}


def test_what_all_devices_refuse_ends_with_their_reason(model, fleet, tmp_path):
    wrong = replace(fleet[1][0], data=replace(fleet[1][0].data, y_train=fleet[1][0].data.y_train + 7))
    job = Job(rounds=1, devices=1, density=0.25, recipe=Recipe(max_steps=1))
    with pytest.raises(PlanError, match="label"):
        Simulation(Experiment("x", job, model, [wrong]), BlobStore(tmp_path, durable=False)).run()


def test_a_board_too_small_for_any_width_stops_the_simulation_with_its_reason(model, fleet, tmp_path):
    _, devices = fleet
    job = Job(rounds=1, devices=3, byte_budget=1000)
    with pytest.raises(PlanError, match="even the narrowest breaks bytes"):
        Simulation(Experiment("x", job, model, devices), BlobStore(tmp_path, durable=False)).run()


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_wrong_devices_are_refused(model, fleet, tmp_path, names):
    devices = [replace(fleet[1][0], name=n) for n in names]
    with pytest.raises(ConfigError, match="devices"):
        Simulation(Experiment("x", Job(), model, devices), BlobStore(tmp_path, durable=False))


def test_more_devices_than_there_are_cannot_be_waited_for(build):
    with pytest.raises(ConfigError, match="at most the 3"):
        build(devices=4)


@pytest.mark.parametrize(("probability", "away"), [(1.0, 1.0), (-0.1, 1.0), (0.5, 0.0), (np.nan, 1.0)])
def test_wrong_drop_outs_are_refused(probability, away):
    with pytest.raises(FedpruneError):
        DropOuts(probability, away)


def test_saved_state_is_plain_json(build, tmp_path):
    build().run()
    assert json.loads((tmp_path / "run" / FILE).read_text())["format"] == "fedprune.simulation/2"
