"""What is measured and noted in a simulation's rounds, and what a run leaves behind."""

import math
from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest

from fedprune.model.architecture import widths_at
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.planning.costs import costs_at
from fedprune_server.executor.calibration import Calibration
from fedprune_server.simulation.fleet.virtual_device import StoredData
from fedprune_server.simulation.measure import ModelMeasure
from support.fakes.digits_simulation import KINDS, KillError, boards, digits, digits_net, digits_simulation

DATA = digits()
SMALL = {"density": 0.25, "recipe": Recipe(max_steps=1), "scorer": "ordered"}


@pytest.fixture
def build(tmp_path):
    return lambda folder="run", **settings: digits_simulation(tmp_path / folder, **{**SMALL, **settings})


def test_samples_are_read_when_a_device_trains_and_give_the_same_bits(build):
    loads = []
    stored = [
        replace(d, data=StoredData(d.samples, d.fingerprint, lambda d=d: loads.append(d.name) or d.data))
        for d in boards()
    ]
    in_memory, on_demand = build("held"), build("read", fleet=stored)
    assert in_memory.run() == on_demand.run()
    assert sorted(loads) == sorted(list(KINDS) * 2)


def test_the_global_model_is_measured_as_the_server_does(build):
    measure = ModelMeasure(DATA.x, DATA.y, densities=(1.0,), sets={"few": (DATA.x[:9], DATA.y[:9])})
    simulation = build(measure=measure)
    for row in simulation.run():
        scores = simulation.notes[row["round"]].measured
        assert scores["global"] == pytest.approx(row["metrics"]["accuracy"])
        assert scores["global_loss"] == pytest.approx(row["metrics"]["loss"], rel=1e-5)
        assert scores["sub@1"] == scores["global"]
        assert {"global/few", "sub@1/few_loss"} <= set(scores)
        assert not set(scores) & set(row["metrics"])  # nobody decides by what is measured


def test_submodels_are_those_that_devices_get(build, tmp_path):
    """At the devices' own density: what the next round's offer holds, in onnxruntime on its own."""
    offers = []
    simulation = build(measure=ModelMeasure(DATA.x, DATA.y, densities=(0.25,)))
    simulation.run(lambda s: offers.append({n: t.offer for n, t in s.state.tasks.items() if t.offer}))
    offer = next(iter(offers[-2].values()))  # of the second round, cut from the first one's model
    folder = tmp_path / "model"
    folder.mkdir()
    interrupted = build("again", measure=ModelMeasure(DATA.x, DATA.y, densities=(0.25,)))

    def stop(s):
        if len(s.state.history) == 1 and any(t.offer for t in s.state.tasks.values()):
            for kind, name in (("weights", "weights.safetensors"), ("inference", "model.onnx")):
                (folder / name).write_bytes(s.store.read(offer[kind]["sha256"]))
            raise KillError

    with pytest.raises(KillError):
        interrupted.run(stop)
    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    logits = session.run(None, {"x": DATA.x})[0]
    assert simulation.notes[1].measured["sub@0.25"] == pytest.approx(float(np.mean(logits.argmax(1) == DATA.y)))


def test_statistics_are_measured_anew_at_a_submodel_s_widths():
    """Statistics of the given samples, computed by numpy, whatever the submodel had."""
    model = digits_net()
    submodel = Selection.of(model.architecture, widths_at(model.architecture, 0.5)).gather(model.tensors)
    calibrate = Calibration(model, DATA.calibration, Recipe().features)
    calibrated = calibrate(submodel)
    weight = submodel["conv1.weight"].astype(np.float64)
    x = np.pad(DATA.calibration.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    values = np.einsum("nchwij,ocij->nohw", np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3)), weight)
    if "conv1.bias" in submodel:
        values += submodel["conv1.bias"][None, :, None, None]
    mean = next(n for n in calibrated if n.endswith("running_mean") and calibrated[n].shape == (len(weight),))
    np.testing.assert_allclose(calibrated[mean], values.mean((0, 2, 3)), atol=1e-5)
    calibrated_anew = calibrate({n: v + 1 if "running" in n else v for n, v in submodel.items()})
    assert all(np.array_equal(calibrated[n], calibrated_anew[n]) for n in calibrated)


def test_measurements_may_be_any_function(build):
    moments = []

    def watch(moment):
        moments.append((moment.round, moment.ranking.is_full, sorted(moment.model) == sorted(simulation.model.tensors)))
        return {"parts": len(moment.parts)}

    simulation = build(measure=watch)
    simulation.run()
    assert moments == [(1, True, True), (2, True, True)]
    assert [simulation.notes[n].measured for n in (1, 2)] == [{"parts": 3.0}] * 2


def test_a_checkpoint_is_the_global_model_of_its_round(build, tmp_path):
    simulation = build(rounds=3, checkpoints=3)
    history = simulation.run()
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    logits = session.run(None, {"x": DATA.x})[0]
    assert float(np.mean(logits.argmax(1) == DATA.y)) == pytest.approx(history[-1]["metrics"]["accuracy"])
    assert (folder / "weights.safetensors").read_bytes() == simulation.store.read(simulation.state.model)


def test_what_a_round_cost_is_noted_per_device(build):
    simulation = build(rounds=2, recipe=Recipe(epochs=2, batch_size=16))
    simulation.run()
    rounds = simulation.record().rounds
    for direction, total in ((0, rounds[-1].down), (1, rounds[-1].up)):
        assert sum(v[direction] for r in rounds for v in r.spent.values()) == total
    for device in boards():
        widths = simulation.state.devices[device.name].widths
        cost = device.predict(simulation.model.architecture, widths, simulation.job.recipe)
        macs = 2 * device.samples * cost.training_macs
        assert rounds[0].spent[device.name][2:] == [macs, macs, round(1e6 * cost.train_j)]
    unknown = replace(rounds[0], spent={"zero": [0, 0, 9, 9, 0], "one": [0, 0, 9, 9, 9]})
    assert math.isnan(unknown.joules), "a sum without a board's part would be too small"


def test_steps_of_ordered_dropout_count_at_the_widths_that_they_trained(build):
    device = boards()[0]
    recipe = Recipe(epochs=9, batch_size=device.samples, ordered_dropout=(0.25,))  # a step an epoch
    simulation = build(fleet=[device], rounds=1, density=1.0, recipe=recipe)
    simulation.run()
    architecture = simulation.model.architecture
    narrow_macs, full_macs = (costs_at(architecture, widths_at(architecture, d)).training_macs for d in (0.25, 1.0))
    possible = {device.samples * (narrow_macs * steps + full_macs * (9 - steps)) for steps in range(1, 9)}
    assert simulation.record().rounds[0].spent[device.name][2] in possible


def test_coverage_counts_the_updates_that_held_a_channel(build):
    simulation = build(rounds=2, density=0.25)
    simulation.run()
    for row in simulation.record().rounds:
        assert row.updates == 3
        for (_, size), counts in zip(simulation.record().groups, row.coverage, strict=True):
            kept_channels = -(-size // 4)
            assert counts == [3] * kept_channels + [0] * (
                size - kept_channels
            )  # ordered: the first channels, on every device
