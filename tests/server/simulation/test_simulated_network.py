"""Simulated fleets under weather, in windows of time, measured, in bulk, and killed for good."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from fedprune.blobs.blob_store import BlobStore
from fedprune.core import tensorfile
from fedprune.core.errors import ConfigError, PlanError
from fedprune.jobs.job import Job
from fedprune.model.architecture import widths_at
from fedprune.model.nested_widths import TensorAxes
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.planning.costs import costs_at
from fedprune.planning.profile_store import find
from fedprune_export.importing import import_onnx
from fedprune_server.executor.calibration import Calibration
from fedprune_server.simulation.digits import deal, digits_model
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.fleet import virtual_device
from fedprune_server.simulation.fleet.device_runner import DeviceRunner
from fedprune_server.simulation.fleet.virtual_device import StoredData, VirtualDevice, with_link
from fedprune_server.simulation.measure import Measure
from fedprune_server.simulation.network_model import Availability, DropOuts, Weather
from fedprune_server.simulation.results.run_folder import simulate
from fedprune_server.simulation.simulation import Simulation
from support.paths import TESTS

KINDS = ("raspberry-pi-zero-2w", "raspberry-pi-4b", "jetson-orin-nano")
SMALL = {"density": 0.25, "recipe": Recipe(max_steps=1), "scorer": "ordered"}


@pytest.fixture(scope="module")
def model():
    return import_onnx(digits_model(), "digits-net")


@pytest.fixture(scope="module")
def hand():
    return deal(KINDS, seed=1)


@pytest.fixture(scope="module")
def devices(hand):
    return [VirtualDevice(kind, find(kind), hand.devices[kind]) for kind in KINDS]


@pytest.fixture
def build(model, hand, devices, tmp_path):
    def make(folder="run", fleet=devices, simulation=None, **settings):
        job = Job(**{"seed": 3, "rounds": 2, "devices": len(fleet), **SMALL, **settings})
        store = BlobStore(tmp_path / folder / "blobs", durable=False)
        experiment = Experiment("x", job, model, fleet, (hand.x, hand.y), **(simulation or {}))
        return Simulation(experiment, store, folder=tmp_path / folder)

    return make


def on_link(device, **link):
    return replace(device, profile=with_link(device.profile, link))


# Weather.


def test_weather_changes_times_and_not_the_model(build):
    calm, stormy = build("calm"), build("stormy", simulation={"weather": Weather(0.5, 0.5, 0.2, 0.2, 3)})
    calm.run(), stormy.run()
    assert [r["model"] for r in calm.state.history] == [r["model"] for r in stormy.state.history]
    assert stormy.clock != calm.clock
    again = build("again", simulation={"weather": Weather(0.5, 0.5, 0.2, 0.2, 3)})
    assert again.run() == stormy.state.history


def test_the_virtual_clock_follows_the_weather(build, devices):
    """One device: a round takes what the arithmetic of its profile and the round's factors says."""
    zero, weather = devices[0], Weather(links_sigma=0.3, compute_sigma=0.3, draws=20)
    simulation = build(fleet=[zero], rounds=1, simulation={"weather": weather})
    (row,) = simulation.run()
    link, sent = zero.profile.link, simulation.record().last
    trained = zero.train_s(
        simulation.model.architecture, tuple(row["devices"][zero.name]["widths"]), simulation.job.recipe
    )
    down, up = (weather.link(3, 1, zero.name, way) for way in ("down", "up"))
    expected = sent.down / (link.down_bytes_s * down) + sent.up / (link.up_bytes_s * up) + 2 * link.latency_s
    assert simulation.clock == pytest.approx(expected + trained / weather.compute(3, 1, zero.name))


def test_a_server_s_link_is_shared(build, devices):
    """On links that are no limit, a round takes as long as the server needs for all that it sends and receives."""
    rate, fast = 20_000.0, [on_link(d, down_mb_s=1e5, up_mb_s=1e5, latency_s=0) for d in devices]
    weather = Weather(server_up_bytes_s=rate, server_down_bytes_s=2 * rate)
    shared = build("shared", fleet=fast, rounds=1, simulation={"weather": weather})
    alone = build("alone", fleet=fast, rounds=1)
    shared.run(), alone.run()
    last = shared.record().last
    slowest = max(
        d.train_s(shared.model.architecture, tuple(shared.state.devices[d.name].widths), shared.job.recipe)
        for d in devices
    )
    assert alone.clock == pytest.approx(slowest, rel=1e-3)
    assert shared.clock >= last.down / rate + last.up / 3 / (2 * rate)
    assert shared.clock <= (last.down / rate + last.up / (2 * rate) + slowest) * 1.001


def test_a_device_s_own_link_takes_the_profile_s_place(build, devices):
    slow = [on_link(d, up_mb_s=0.001) for d in devices]
    simulation = build(fleet=slow, rounds=1)
    simulation.run()
    assert simulation.clock > simulation.record().last.up / 3 / 1000


# Windows of time.


def test_devices_train_in_their_windows_only(build, devices, monkeypatch):
    availability, seen = Availability(40.0, 0.3, 0.6), []
    carry_out = DeviceRunner.carry_out

    def watched(bench, device, offer, number):
        seen.append((device.name, simulation.clock))
        return carry_out(bench, device, offer, number)

    monkeypatch.setattr(DeviceRunner, "carry_out", watched)
    far = [on_link(d, latency_s=4) for d in devices]
    simulation = build(fleet=far, rounds=6, devices=1, deadline_s=90.0, simulation={"availability": availability})
    history = simulation.run()
    assert len(history) == 6
    for name, at in seen:
        begin, end = availability.window(3, name, at)
        assert begin <= at < end
    assert simulation.clock > 40


def test_an_update_that_a_window_cut_off_is_sent_when_the_device_is_back(build, devices, monkeypatch):
    trained = []
    carry_out = DeviceRunner.carry_out
    monkeypatch.setattr(DeviceRunner, "carry_out", lambda *a: trained.append(a[1].name) or carry_out(*a))
    device = on_link(devices[2], down_mb_s=1e3, up_mb_s=1e3, latency_s=0)
    quick = build("quick", fleet=[device], rounds=1)
    quick.run()
    size = quick.record().last.up
    begin, end = Availability(100.0, 0.5, 0.5).window(3, device.name, 0.0)
    opens = max(0.0, begin)
    slow = on_link(device, up_mb_s=size / 1e6 / ((end - opens) * 0.9))  # the upload takes most of a window
    late = build(
        "late", fleet=[slow], rounds=3, deadline_s=1e5, simulation={"availability": Availability(100.0, 0.5, 0.5)}
    )
    history = late.run()
    assert [h["devices"][device.name]["progress"] for h in history] == ["folded"] * 3
    assert len(trained) == 1 + 3  # never again only because an upload was cut off
    assert late.record().last.up > 3 * size  # what was cut off was sent twice


def test_windows_in_which_nothing_can_be_done_end_with_an_error(build, devices):
    slow = [on_link(d, down_mb_s=1e-4, up_mb_s=1e-4) for d in devices]
    short = {"availability": Availability(5.0, 0.1, 0.1)}
    with pytest.raises(PlanError, match="none of them ever trains"):
        build(fleet=slow, deadline_s=1e6, simulation=short).run()


# Kills.

SCRIPT = """
import os, signal, sys
sys.path[:0] = {tests!r}
from test_simulated_network import harsh
left = int(sys.argv[2])
def progress(simulation):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
harsh(sys.argv[1], progress)
"""


def harsh(folder, progress=None):
    """A run with everything in it that a kill could spoil."""
    hand = deal(KINDS, seed=1)
    fleet = tuple(VirtualDevice(k, find(k), StoredData.of(lambda k=k: hand.devices[k])) for k in KINDS)
    experiment = Experiment(
        "harsh",
        Job(seed=3, rounds=4, devices=2, participation=0.7, deadline_s=30.0, **SMALL),
        import_onnx(digits_model(), "digits-net"),
        fleet,
        (hand.x, hand.y),
        dropouts=DropOuts(0.3, 20.0),
        weather=Weather(0.3, 0.3, draws=5, server_up_bytes_s=1e6),
        availability=Availability(100.0, 0.6, 0.9),
        measure=Measure(hand.x, hand.y, densities=(0.25,)),
        checkpoints=2,
    )
    return simulate(experiment, Path(folder), progress)


@pytest.mark.slow
def test_a_run_that_is_killed_outright_ends_as_one_that_is_not(tmp_path):
    whole = harsh(tmp_path / "whole")
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(tests=[str(TESTS), str(TESTS / "server/simulation")]))
    for trainings in (2, 3):  # the second start is killed, too
        words = [sys.executable, str(script), str(tmp_path / "killed"), str(trainings)]
        done = subprocess.run(words, timeout=120, check=False)
        assert done.returncode == -signal.SIGKILL
    assert harsh(tmp_path / "killed") == whole
    for name in ("metrics.json", "metrics.parquet", "rounds.parquet", "config.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    places = [tmp_path / run / "run" / "checkpoints" for run in ("killed", "whole")]
    files = [sorted((str(f.relative_to(p)), f.read_bytes()) for f in p.rglob("*.*") if f.is_file()) for p in places]
    assert files[0] == files[1]
    assert len(files[0]) == 4


class KillError(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("deadline_s", [1e6, 0.15], ids=["all in time", "some late"])
def test_trainings_in_other_processes_give_the_same_run_also_after_a_kill(build, monkeypatch, deadline_s):
    monkeypatch.setattr("fedprune_server.simulation.state._INTERVAL_S", 0.0)  # in the middle of a round, too
    monkeypatch.setattr("fedprune_server.simulation.state._SHARE", 0.0)
    asked = {"recipe": Recipe(max_steps=1), "deadline_s": deadline_s, "devices": 2}
    whole = build("whole", **asked)
    history = whole.run()
    left = [2]

    def kill(_):
        left[0] -= 1
        if not left[0]:
            raise KillError

    several = {"simulation": {"workers": 2}, **asked}
    with pytest.raises(KillError):
        build("killed", **several).run(kill)
    resumed = build("killed", **several)
    assert resumed.run() == history
    assert set(resumed.store.names()) == set(whole.store.names())


@pytest.mark.slow
@pytest.mark.parametrize("trainings", [1, 4, 5, 8])
def test_what_boards_keep_is_as_old_as_the_state_that_a_killed_run_goes_back_to(build, trainings):
    """Averages and personal tensors of trainings that a kill has undone must not be the start of the same trainings."""
    keeping = Recipe(max_steps=1, average=0.5, calibrate=True, personal=("fc.*", "*bias"))
    whole = build("whole", recipe=keeping, rounds=3)
    whole.run()
    assert any("accuracy_average" in d["metrics"] for d in whole.state.history[-1]["devices"].values())
    left = [trainings]

    def kill(_):
        left[0] -= 1
        if not left[0]:
            raise KillError

    with pytest.raises(KillError):
        build("killed", recipe=keeping, rounds=3).run(kill)
    resumed = build("killed", recipe=keeping, rounds=3)
    assert resumed.run() == whole.state.history
    rounds = resumed.record().rounds
    assert rounds == whole.record().rounds
    assert all(row.local == row.own["accuracy_average"] for row in rounds)  # what serves
    assert set(resumed.store.names()) == set(whole.store.names())


@pytest.mark.slow
def test_a_finished_round_is_written_once(build, tmp_path):
    """What a save writes does not grow with the rounds behind it."""
    sizes = {}
    for rounds in (2, 8):
        build(str(rounds), rounds=rounds).run()
        sizes[rounds] = [(tmp_path / str(rounds) / n).stat().st_size for n in ("simulation.json", "rounds.jsonl")]
    assert sizes[8][0] < sizes[2][0] * 1.05
    assert sizes[8][1] > 3 * sizes[2][1]
    lines = (tmp_path / "8" / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)[0]["round"] for line in lines] == list(range(1, 9))


# Samples on the disk.


def test_samples_are_read_when_a_device_trains_and_give_the_same_bits(build, devices):
    loads = []
    stored = [
        replace(d, data=StoredData(d.samples, d.fingerprint, lambda d=d: loads.append(d.name) or d.data))
        for d in devices
    ]
    held, read = build("held"), build("read", fleet=stored)
    assert held.run() == read.run()
    assert sorted(loads) == sorted(list(KINDS) * 2)


def test_where_samples_lie_does_not_matter_to_a_saved_run(build, devices):
    build().run()
    stored = [replace(d, data=StoredData.of(lambda d=d: d.data)) for d in devices]
    again = build(fleet=stored)
    again.run(lambda _: pytest.fail("something was trained again"))


def test_other_samples_are_noticed(hand):
    data = hand.devices[KINDS[0]]
    changed = replace(data, y_test=(data.y_test + 1) % 10)
    assert virtual_device.fingerprint(changed) != virtual_device.fingerprint(data)


# Measurements.


def test_the_global_model_is_measured_as_the_server_does(build, hand):
    simulation = build(
        simulation={"measure": Measure(hand.x, hand.y, densities=(1.0,), sets={"few": (hand.x[:9], hand.y[:9])})}
    )
    for row in simulation.run():
        found = simulation.measured[row["round"]]
        assert found["global"] == pytest.approx(row["metrics"]["accuracy"])
        assert found["global_loss"] == pytest.approx(row["metrics"]["loss"], rel=1e-5)
        assert found["sub@1"] == found["global"]
        assert {"global/few", "sub@1/few_loss"} <= set(found)
        assert not set(found) & set(row["metrics"])  # nobody decides by what is measured


def test_submodels_are_those_that_devices_get(build, hand, tmp_path):
    """At the devices' own density: what the next round's offer holds, in onnxruntime on its own."""
    sent = []
    simulation = build(simulation={"measure": Measure(hand.x, hand.y, densities=(0.25,))}, rounds=2)
    simulation.run(lambda s: sent.append({n: t.offer for n, t in s.state.tasks.items() if t.offer}))
    offer = next(iter(sent[-2].values()))  # of the second round, cut from the first one's model
    folder = tmp_path / "model"
    folder.mkdir()
    build2 = build("again", simulation={"measure": Measure(hand.x, hand.y, densities=(0.25,))}, rounds=2)

    class StopError(Exception):
        pass

    def stop(s):
        if len(s.state.history) == 1 and any(t.offer for t in s.state.tasks.values()):
            for kind, name in (("weights", "weights.safetensors"), ("inference", "model.onnx")):
                (folder / name).write_bytes(s.store.read(offer[kind]["sha256"]))
            raise StopError

    with pytest.raises(StopError):
        build2.run(stop)
    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    logits = session.run(None, {"x": hand.x})[0]
    assert simulation.measured[1]["sub@0.25"] == pytest.approx(float(np.mean(logits.argmax(1) == hand.y)))


def test_statistics_are_measured_anew_at_a_submodel_s_widths(model, hand):
    """Statistics of the samples at hand, computed by numpy, whatever the submodel had."""
    part = Selection.of(model.architecture, widths_at(model.architecture, 0.5)).gather(model.tensors)
    calibrate = Calibration(model, hand.calibration)
    found = calibrate(part)
    weight = part["conv1.weight"].astype(np.float64)
    x = np.pad(hand.calibration.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3))
    values = np.einsum("nchwij,ocij->nohw", windows, weight)
    if "conv1.bias" in part:
        values += part["conv1.bias"][None, :, None, None]
    mean = next(n for n in found if n.endswith("running_mean") and found[n].shape == (len(weight),))
    np.testing.assert_allclose(found[mean], values.mean((0, 2, 3)), atol=1e-5)
    spoilt = {n: v + 1 if "running" in n else v for n, v in part.items()}
    again = calibrate(spoilt)
    assert all(np.array_equal(found[n], again[n]) for n in found)


def test_one_measure_serves_models_of_the_same_widths(hand):
    """Each is measured with its own graph, and with statistics of its own."""
    rng = np.random.default_rng(0)
    models = [import_onnx(dense(kind, rng), "net") for kind in ("Relu", "Tanh")]
    samples = hand.x.reshape(len(hand.x), -1)[:, :8]
    moments = [
        SimpleNamespace(round=1, job=Job(rounds=1), imported=m, architecture=m.architecture, model=models[0].tensors)
        for m in models
    ]
    shared = Measure(samples, hand.y)
    found = [shared(m) for m in moments]
    assert found == [Measure(samples, hand.y)(m) for m in moments]
    assert found[0] != found[1]


def dense(kind, rng):
    """Two layers with an activation between."""
    weights = {"a.weight": (6, 8), "b.weight": (10, 6)}
    nodes = [
        helper.make_node("Gemm", ["x", "a.weight"], ["h"], transB=1),
        helper.make_node(kind, ["h"], ["g"]),
        helper.make_node("Gemm", ["g", "b.weight"], ["logits"], transB=1),
    ]
    tensors = [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in weights.items()]
    values = [helper.make_tensor_value_info(n, 1, ["N", s]) for n, s in (("x", 8), ("logits", 10))]
    graph = helper.make_graph(nodes, "net", values[:1], values[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()


@pytest.mark.parametrize("sets", [{}, {"few": (np.zeros((0, 1, 8, 8), np.float32), np.zeros(0, np.int64))}])
def test_nothing_is_measured_on_no_samples(hand, sets):
    with pytest.raises(ConfigError, match="measure"):
        Measure(hand.x[: len(sets) * 9], hand.y[: len(sets) * 9], sets=sets)


def test_measurements_may_be_any_function(build):
    seen = []

    def watch(moment):
        seen.append((moment.round, moment.ranking.whole, sorted(moment.model) == sorted(simulation.model.tensors)))
        return {"parts": len(moment.parts)}

    simulation = build(simulation={"measure": watch})
    simulation.run()
    assert seen == [(1, True, True), (2, True, True)]
    assert simulation.measured == {1: {"parts": 3.0}, 2: {"parts": 3.0}}


def test_rounds_between_are_not_measured(build, hand):
    simulation = build(rounds=5, simulation={"measure": Measure(hand.x, hand.y, every=2)})
    simulation.run()
    assert [bool(simulation.measured[r]) for r in range(1, 6)] == [False, True, False, True, True]


# What a run leaves behind.


def test_a_checkpoint_is_the_global_model_of_its_round(build, hand, tmp_path):
    simulation = build(rounds=3, simulation={"checkpoints": 3})
    history = simulation.run()
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    logits = session.run(None, {"x": hand.x})[0]
    assert float(np.mean(logits.argmax(1) == hand.y)) == pytest.approx(history[-1]["metrics"]["accuracy"])
    assert (folder / "weights.safetensors").read_bytes() == simulation.store.read(simulation.state.model)


def test_what_a_round_cost_is_noted_per_device(build, devices):
    simulation = build(rounds=2, recipe=Recipe(epochs=2, batch_size=16))
    simulation.run()
    rounds = simulation.record().rounds
    for way, total in ((0, rounds[-1].down), (1, rounds[-1].up)):
        assert sum(v[way] for r in rounds for v in r.spent.values()) == total
    for device in devices:
        widths = simulation.state.devices[device.name].widths
        macs = costs_at(simulation.model.architecture, widths).training_macs
        assert rounds[0].spent[device.name][2] == 2 * device.samples * macs


@pytest.mark.slow
def test_steps_of_ordered_dropout_count_at_the_widths_that_they_trained(build, devices, monkeypatch):
    """Widths are watched where the trainer narrows its tensors."""
    seen = []
    narrowed = TensorAxes.narrowed
    monkeypatch.setattr(TensorAxes, "narrowed", lambda *a: seen.append(a[3]) or narrowed(*a))
    device = devices[0]
    recipe = Recipe(epochs=9, batch_size=device.samples, ordered_dropout=(0.25,))  # a step an epoch
    simulation = build(fleet=[device], rounds=1, density=1.0, recipe=recipe)
    simulation.run()
    architecture = simulation.model.architecture
    narrow, whole = (costs_at(architecture, widths_at(architecture, d)).training_macs for d in (0.25, 1.0))
    assert set(seen) == {widths_at(architecture, 0.25)}
    assert 0 < len(seen) < 9
    expected = device.samples * (narrow * len(seen) + whole * (9 - len(seen)))
    assert simulation.record().rounds[0].spent[device.name][2] == expected


def test_coverage_counts_the_updates_that_held_a_channel(build):
    simulation = build(rounds=2, density=0.25)
    simulation.run()
    for row in simulation.record().rounds:
        assert row.updates == 3
        for (_, size), counts in zip(simulation.record().groups, row.coverage, strict=True):
            kept = -(-size // 4)
            assert counts == [3] * kept + [0] * (size - kept)  # ordered: the first channels, on every device


def test_weights_of_a_checkpoint_are_canonical(build, tmp_path, model):
    simulation = build(rounds=1, simulation={"checkpoints": 1})
    simulation.run()
    (file,) = (tmp_path / "run" / "checkpoints").glob("*/weights.safetensors")
    assert set(tensorfile.decode(file.read_bytes())) == set(model.tensors)
