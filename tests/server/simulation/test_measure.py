"""What is measured and noted in a simulation's rounds, and what a run leaves behind."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from fedprune.core import tensorfile
from fedprune.core.errors import ConfigError
from fedprune.jobs.job import Job
from fedprune.model.architecture import widths_at
from fedprune.model.nested_widths import TensorAxes
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.planning.costs import costs_at
from fedprune_export.importing import import_onnx
from fedprune_server.executor.calibration import Calibration
from fedprune_server.simulation.fleet import virtual_device
from fedprune_server.simulation.fleet.virtual_device import StoredData
from fedprune_server.simulation.measure import Measure
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
    held, read = build("held"), build("read", fleet=stored)
    assert held.run() == read.run()
    assert sorted(loads) == sorted(list(KINDS) * 2)


def test_where_samples_lie_does_not_matter_to_a_saved_run(build):
    build().run()
    stored = [replace(d, data=StoredData.of(lambda d=d: d.data)) for d in boards()]
    again = build(fleet=stored)
    again.run(lambda _: pytest.fail("something was trained again"))


def test_other_samples_are_noticed():
    data = DATA.devices[KINDS[0]]
    changed = replace(data, y_test=(data.y_test + 1) % 10)
    assert virtual_device.fingerprint(changed) != virtual_device.fingerprint(data)


def test_the_global_model_is_measured_as_the_server_does(build):
    measure = Measure(DATA.x, DATA.y, densities=(1.0,), sets={"few": (DATA.x[:9], DATA.y[:9])})
    simulation = build(measure=measure)
    for row in simulation.run():
        found = simulation.measured[row["round"]]
        assert found["global"] == pytest.approx(row["metrics"]["accuracy"])
        assert found["global_loss"] == pytest.approx(row["metrics"]["loss"], rel=1e-5)
        assert found["sub@1"] == found["global"]
        assert {"global/few", "sub@1/few_loss"} <= set(found)
        assert not set(found) & set(row["metrics"])  # nobody decides by what is measured


def test_submodels_are_those_that_devices_get(build, tmp_path):
    """At the devices' own density: what the next round's offer holds, in onnxruntime on its own."""
    sent = []
    simulation = build(measure=Measure(DATA.x, DATA.y, densities=(0.25,)))
    simulation.run(lambda s: sent.append({n: t.offer for n, t in s.state.tasks.items() if t.offer}))
    offer = next(iter(sent[-2].values()))  # of the second round, cut from the first one's model
    folder = tmp_path / "model"
    folder.mkdir()
    build2 = build("again", measure=Measure(DATA.x, DATA.y, densities=(0.25,)))

    def stop(s):
        if len(s.state.history) == 1 and any(t.offer for t in s.state.tasks.values()):
            for kind, name in (("weights", "weights.safetensors"), ("inference", "model.onnx")):
                (folder / name).write_bytes(s.store.read(offer[kind]["sha256"]))
            raise KillError

    with pytest.raises(KillError):
        build2.run(stop)
    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    logits = session.run(None, {"x": DATA.x})[0]
    assert simulation.measured[1]["sub@0.25"] == pytest.approx(float(np.mean(logits.argmax(1) == DATA.y)))


def test_statistics_are_measured_anew_at_a_submodel_s_widths():
    """Statistics of the given samples, computed by numpy, whatever the submodel had."""
    model = digits_net()
    part = Selection.of(model.architecture, widths_at(model.architecture, 0.5)).gather(model.tensors)
    calibrate = Calibration(model, DATA.calibration)
    found = calibrate(part)
    weight = part["conv1.weight"].astype(np.float64)
    x = np.pad(DATA.calibration.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3))
    values = np.einsum("nchwij,ocij->nohw", windows, weight)
    if "conv1.bias" in part:
        values += part["conv1.bias"][None, :, None, None]
    mean = next(n for n in found if n.endswith("running_mean") and found[n].shape == (len(weight),))
    np.testing.assert_allclose(found[mean], values.mean((0, 2, 3)), atol=1e-5)
    spoilt = {n: v + 1 if "running" in n else v for n, v in part.items()}
    again = calibrate(spoilt)
    assert all(np.array_equal(found[n], again[n]) for n in found)


def test_one_measure_serves_models_of_the_same_widths():
    """Each is measured with its own graph, and with statistics of its own."""
    rng = np.random.default_rng(0)
    models = [import_onnx(dense(kind, rng), "net") for kind in ("Relu", "Tanh")]
    samples = DATA.x.reshape(len(DATA.x), -1)[:, :8]
    moments = [
        SimpleNamespace(round=1, job=Job(rounds=1), imported=m, architecture=m.architecture, model=models[0].tensors)
        for m in models
    ]
    shared = Measure(samples, DATA.y)
    found = [shared(m) for m in moments]
    assert found == [Measure(samples, DATA.y)(m) for m in moments]
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
def test_nothing_is_measured_on_no_samples(sets):
    with pytest.raises(ConfigError, match="measure"):
        Measure(DATA.x[: len(sets) * 9], DATA.y[: len(sets) * 9], sets=sets)


def test_measurements_may_be_any_function(build):
    seen = []

    def watch(moment):
        seen.append((moment.round, moment.ranking.whole, sorted(moment.model) == sorted(simulation.model.tensors)))
        return {"parts": len(moment.parts)}

    simulation = build(measure=watch)
    simulation.run()
    assert seen == [(1, True, True), (2, True, True)]
    assert simulation.measured == {1: {"parts": 3.0}, 2: {"parts": 3.0}}


def test_rounds_between_are_not_measured(build):
    simulation = build(rounds=5, measure=Measure(DATA.x, DATA.y, every=2))
    simulation.run()
    assert [bool(simulation.measured[r]) for r in range(1, 6)] == [False, True, False, True, True]


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
    for way, total in ((0, rounds[-1].down), (1, rounds[-1].up)):
        assert sum(v[way] for r in rounds for v in r.spent.values()) == total
    for device in boards():
        widths = simulation.state.devices[device.name].widths
        macs = costs_at(simulation.model.architecture, widths).training_macs
        assert rounds[0].spent[device.name][2:] == [2 * device.samples * macs] * 2


def test_steps_of_ordered_dropout_count_at_the_widths_that_they_trained(build, monkeypatch):
    """Widths are watched where the trainer narrows its tensors."""
    seen = []
    narrowed = TensorAxes.narrowed
    monkeypatch.setattr(TensorAxes, "narrowed", lambda *a: seen.append(a[3]) or narrowed(*a))
    device = boards()[0]
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


def test_weights_of_a_checkpoint_are_canonical(build, tmp_path):
    simulation = build(rounds=1, checkpoints=1)
    simulation.run()
    (file,) = (tmp_path / "run" / "checkpoints").glob("*/weights.safetensors")
    assert set(tensorfile.decode(file.read_bytes())) == set(simulation.model.tensors)
