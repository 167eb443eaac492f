"""Asynchronous jobs on simulated fleets: several rounds are under way at a time, and a kill loses nothing of them."""

import pytest

from fedprune.blobs.blob_store import BlobStore
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune.planning.profile_store import find
from fedprune_export.importing import import_onnx
from fedprune_server.simulation.digits import deal, digits_model
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.fleet.device_runner import DeviceRunner
from fedprune_server.simulation.fleet.virtual_device import VirtualDevice
from fedprune_server.simulation.measure import Measure
from fedprune_server.simulation.network_model import Availability, DropOuts, Weather
from fedprune_server.simulation.simulation import Simulation
from fedprune_server.simulation.state import Trained

KINDS = ("raspberry-pi-zero-2w", "raspberry-pi-4b", "raspberry-pi-5", "jetson-nano", "jetson-orin-nano")
SCHEDULES = {
    "one at a time": {"arrivals": 1, "mixing": "damped", "rate": 0.5, "staleness": {"decay": "polynomial", "a": 0.5}},
    "buffered": {"arrivals": 3},
    "windows, all kept": {"window_s": 0.2, "least": 2, "keep": True, "staleness": {"decay": "hinge", "a": 0.6, "b": 2}},
    "none too stale": {"arrivals": 2, "max_staleness": 1},
}
HARSH = {
    "weather": Weather(0.5, 0.5, 1.0, 1.0, server_up_bytes_s=1e6),
    "dropouts": DropOuts(0.2, 2.0),
    "availability": Availability(5.0, 0.6, 0.9),
}


@pytest.fixture(scope="module")
def model():
    return import_onnx(digits_model(), "digits-net")


@pytest.fixture(scope="module")
def hand():
    return deal(KINDS, seed=1)


@pytest.fixture
def build(model, hand, tmp_path):
    fleet = [VirtualDevice(kind, find(kind), hand.devices[kind]) for kind in KINDS]

    def make(folder, schedule, rounds=9, **more):
        options = {"schedule": {"kind": "asynchronous", **schedule}}
        job = Job(
            seed=3,
            rounds=rounds,
            devices=2,
            density=0.25,
            deadline_s=20.0,
            strategy="support.fakes.tiny_job:scheduled",
            options=options,
            recipe=Recipe(max_steps=2),
        )
        store = BlobStore(tmp_path / folder / "blobs", durable=False)
        return Simulation(Experiment("x", job, model, fleet, (hand.x, hand.y), **more), store, folder=tmp_path / folder)

    return make


class KillError(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_killed_run_goes_on_to_the_same_model(build, monkeypatch, schedule):
    monkeypatch.setattr("fedprune_server.simulation.state._INTERVAL_S", 0.0)
    whole = build("whole", schedule, **HARSH)
    history = whole.run()
    assert [row["round"] for row in history] == list(range(1, 10))
    for trainings in (2, 7):  # killed again and again
        left = [trainings]

        def kill(_, left=left):
            left[0] -= 1
            if not left[0]:
                raise KillError

        with pytest.raises(KillError):
            build("killed", schedule, **HARSH).run(kill)
    resumed = build("killed", schedule, **HARSH)
    assert resumed.run() == history
    assert resumed.record() == whole.record()
    assert set(resumed.store.names()) == set(whole.store.names())


def test_devices_work_on_several_rounds_at_a_time(build, monkeypatch):
    rounds = []
    pushed = []
    carry_out = DeviceRunner.carry_out

    def watched(bench, device, offer, number):
        run = simulation._run
        rounds.append({item.round for _, item in run.queue.values() if isinstance(item, Trained)} | {number})
        pushed.append((device.name, number))
        return carry_out(bench, device, offer, number)

    monkeypatch.setattr(DeviceRunner, "carry_out", watched)
    simulation = build("run", SCHEDULES["one at a time"], weather=Weather(compute_spread=1.0), rounds=12)
    history = simulation.run()
    assert max(map(len, rounds)) > 1
    assert len(set(pushed)) == len(pushed)  # nobody trains a model twice
    stale = [d["staleness"] for row in history for d in row["devices"].values()]
    assert max(stale) > 1
    assert len({row["model"] for row in history}) == 12


def test_fast_devices_do_not_wait_for_slow_ones(build):
    calm = {"weather": Weather(compute_spread=1.0)}
    simulation = build("run", SCHEDULES["one at a time"], rounds=15, **calm)
    counts: dict[str, int] = {}
    for row in simulation.run():
        for name, part in row["devices"].items():
            counts[name] = counts.get(name, 0) + (part["progress"] == "folded")
    assert max(counts.values()) > 2 * min(counts.get(k, 0) for k in KINDS)


@pytest.mark.slow
def test_notes_are_of_what_entered_the_model(build, hand):
    schedule = {"window_s": 0.2, "least": 2, "keep": True}
    simulation = build("run", schedule, measure=Measure(hand.x, hand.y, densities=(0.25,), every=3))
    history = simulation.run()
    rounds = simulation.record().rounds
    assert [bool(r.measured) for r in rounds] == [r.round % 3 == 0 for r in rounds]
    assert all(
        r.updates >= sum(d["progress"] == "folded" for d in h["devices"].values())
        for r, h in zip(rounds, history, strict=True)
    )
    assert rounds[-1].updates == len(KINDS)  # kept ones count, too
    last = simulation.measured[9]
    assert last["global"] == pytest.approx(history[-1]["metrics"]["accuracy"])
