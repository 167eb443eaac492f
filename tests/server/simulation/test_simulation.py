"""Simulated fleets: the same every time, through drop-outs and partial participation."""

from dataclasses import replace

import onnx
import pytest

from fedprune.core import tensorfile
from fedprune.core.errors import PlanError, StorageError
from fedprune.model.recipe import Recipe
from fedprune_export.importing import import_onnx
from fedprune_server.simulation.digits import digits_model
from fedprune_server.simulation.fleet.virtual_device import StoredData
from fedprune_server.simulation.measure import ModelMeasure
from fedprune_server.simulation.network_model import Availability, DropOuts, Weather
from support.fakes.digits_simulation import boards, digits_experiment, digits_simulation, run_killed


@pytest.fixture
def build(tmp_path):
    """A simulation of three devices, three steps each, in a folder of its own."""

    def make(folder="run", **settings):
        settings = {"rounds": 3, "density": 0.25, "recipe": Recipe(max_steps=3), **settings}
        return digits_simulation(tmp_path / folder, **settings)

    return make


@pytest.mark.parametrize(
    "settings",
    [{}, pytest.param({"dropouts": DropOuts(0.4, away_s=20.0), "deadline_s": 30.0}, marks=pytest.mark.soak)],
    ids=len,
)
def test_the_seed_decides_bits_and_times(build, settings):
    first, second, other_seed = (build(str(n), seed=seed, **settings) for n, seed in enumerate((3, 3, 4)))
    assert first.run() == second.run()
    other_seed.run()
    assert first.state.model != other_seed.state.model


@pytest.mark.parametrize(
    ("name", "spent"),
    [
        ("total_bytes", lambda run: run.rounds[1].down + run.rounds[1].up),
        ("total_macs", lambda run: run.rounds[0].macs + run.rounds[1].macs),
        ("total_hours", lambda run: run.rounds[1].elapsed_s / 3600),
    ],
)
def test_a_total_ends_a_run_also_one_that_was_killed(build, name, spent):
    settings = {"fleet": boards(("a", "b"), "raspberry-pi-5"), "rounds": 4, "recipe": Recipe(max_steps=1)}
    unlimited = build("whole", **settings)
    unlimited.run()
    assert unlimited.record().ended_early == ""
    settings[name] = spent(unlimited.record())
    run_killed(build("ended", **settings), 2)
    ended = build("ended", **settings)
    ended.run()
    assert ended.record().rounds == unlimited.record().rounds[:2]
    assert name in ended.record().ended_early
    assert len(build("ended", **settings).run()) == 2


def test_a_hostile_board_counts_for_no_more_by_what_it_says_of_itself(build):
    honest, (hostile, *honest_others) = boards(), boards()
    claimed, true_data = 10**6, StoredData.of(hostile.load)

    def tamper(outcome, offer, store):
        sent, trained = (tensorfile.decode(store.read(d)) for d in (offer["weights"]["sha256"], outcome.weights.sha256))
        reversed_ = {name: 2 * sent[name] - trained[name] for name in trained if not name.endswith(("mean", "var"))}
        return replace(
            outcome, weights=store.put(tensorfile.encode(trained | reversed_)), steps=claimed * outcome.steps
        )

    hostile = replace(hostile, data=replace(true_data, samples=claimed * true_data.samples), tamper=tamper)
    settings = {"rounds": 1, "recipe": Recipe(max_steps=1), "deadline_s": 10**6}  # its tests take long
    attacked, quiet = build("a", fleet=[hostile, *honest_others], **settings), build("b", fleet=honest, **settings)
    attacked.run(), quiet.run()
    assert attacked.state.model != quiet.state.model
    weights = {name: task.weight for name, task in attacked.state.tasks.items()}
    assert weights[hostile.name] <= max(weights[board.name] for board in honest_others)
    assert attacked.state.tasks[hostile.name].steps == 1


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"scorer": "magnitude"}, marks=pytest.mark.soak),
        {"dropouts": DropOuts(0.4, away_s=10.0), "participation": 0.7, "deadline_s": 20.0},
        pytest.param({"strategy": "fedavg", "recipe": Recipe(max_steps=3, momentum=0.9)}, marks=pytest.mark.soak),
        {"strategy": "fedprune"},
        {"compression": "top-k:0.05"},
    ],
    ids=lambda settings: "-".join(settings),
)
@pytest.mark.at_push(1)
def test_a_finished_run_with_more_rounds_is_the_run_that_had_them_from_the_start(build, settings):
    unbroken = build("whole", rounds=4, **settings)
    unbroken.run()
    for rounds in (1, 3):
        build(rounds=rounds, **settings).run()
    run_killed(build(rounds=4, **settings), 1)
    extended = build(rounds=4, **settings)
    assert extended.run() == unbroken.state.history
    assert extended.state.to_json() == unbroken.state.to_json()
    assert extended.clock == unbroken.clock
    assert extended.record() == unbroken.record()
    assert set(extended.store.names()) == set(unbroken.store.names())


@pytest.mark.parametrize("strategy", ["fedbuff", "own_rounds:compose"])
def test_a_run_that_depends_on_its_rounds_is_not_extended(build, strategy, tmp_path, monkeypatch):
    (tmp_path / "own_rounds.py").write_text("from fedprune.strategies.methods.plain import plain_strategy as compose\n")
    monkeypatch.syspath_prepend(tmp_path)
    build(rounds=1, strategy=strategy).run()
    with pytest.raises(StorageError, match="other settings"):
        build(rounds=2, strategy=strategy)


def leaky(slope):
    """A net whose activation is no part of its architecture."""
    file = onnx.load_from_string(digits_model())
    for node in file.graph.node:
        if node.op_type == "Relu":
            node.op_type = "LeakyRelu"
            node.attribute.append(onnx.helper.make_attribute("alpha", slope))
    return import_onnx(file.SerializeToString(), "digits-net")


def changed_model(experiment):
    another_model = leaky(0.3)
    assert another_model.architecture.digest == experiment.model.architecture.digest
    return replace(experiment, model=another_model)


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


def test_every_circumstance_of_a_run_is_in_its_settings():
    experiment = digits_experiment()
    changed = {
        "cuda": True,
        "dropouts": DropOuts(0.5),
        "weather": Weather(draws=2),
        "availability": Availability(9.0, 0.5),
        "measure": ModelMeasure(*experiment.evaluation, every=2),
    }
    for name, value in changed.items():
        assert replace(experiment, **{name: value}).differences(experiment.settings()).startswith(name)


@pytest.mark.parametrize("change", [changed_model, changed_evaluation, changed_shape, moved_samples])
def test_whatever_decides_a_run_is_in_its_settings(change):
    experiment = digits_experiment(model=leaky(0.1))
    assert not replace(experiment, title="other", checkpoints=9).differences(experiment.settings())
    assert change(experiment).differences(experiment.settings())


def test_partial_participation_asks_the_share_of_the_devices(build):
    history = build(participation=0.5, rounds=4).run()
    assert {len(row["devices"]) for row in history} == {2}
    assert len({tuple(row["devices"]) for row in history}) > 1


def test_a_device_that_is_too_slow_misses_the_deadline_and_the_round_goes_on(build):
    alone = {}
    for device in boards():
        simulation = build(device.name, fleet=[device], rounds=1)
        simulation.run()
        alone[device.name] = simulation.clock
    *_, second, slowest = sorted(alone, key=alone.__getitem__)
    (row,) = build(deadline_s=(alone[second] + alone[slowest]) / 2, rounds=1, ignores_plans=True).run()
    assert slowest == "raspberry-pi-zero-2w"
    assert {n: d["progress"] == "folded" for n, d in row["devices"].items()} == {n: n != slowest for n in alone}


def test_a_deadline_that_nobody_makes_ends_with_an_error(build):
    with pytest.raises(PlanError, match="attempts"):
        build(deadline_s=0.001, ignores_plans=True).run()


def test_drop_outs_cost_updates_but_not_the_run(build):
    history = build(dropouts=DropOuts(probability=0.5, away_s=1000.0), deadline_s=30.0, rounds=4).run()
    counted = [sum(d["progress"] == "folded" for d in row["devices"].values()) for row in history]
    assert len(history) == 4
    assert min(counted) >= 1
    assert sum(counted) < 12


def test_bytes_are_the_blobs_that_travel(build):
    simulation = build(density=1.0, rounds=2, recipe=Recipe(max_steps=1))
    simulation.run()
    rounds = simulation.record().rounds
    weights = len(tensorfile.encode(simulation.model.tensors))
    assert [r.up for r in rounds] == [3 * weights, 6 * weights]
    # Graphs travel once, weights every time.
    assert rounds[1].down - rounds[0].down == 3 * weights
    assert rounds[0].down > 3 * weights


def test_blobs_of_past_rounds_are_deleted(build, tmp_path):
    simulation = build(rounds=3)
    simulation.run()
    stored_digests = set(simulation.store.names())
    assert simulation.state.model in stored_digests
    assert simulation.state.history[0]["model"] not in stored_digests


def test_data_that_the_model_cannot_take_is_refused_and_named(build):
    wrong, *good_boards = boards()
    mislabelled = replace(wrong, data=replace(wrong.data, y_train=wrong.data.y_train + 7))
    (row,) = build(fleet=[mislabelled, *good_boards], rounds=1, evaluation=None).run()
    assert row["devices"][wrong.name]["progress"] == "refused"
    assert "label" in row["devices"][wrong.name]["reason"]
    assert row["metrics"] == {}


def test_a_board_too_small_for_any_width_stops_the_simulation_with_its_reason(build):
    with pytest.raises(PlanError, match="breaks bytes"):
        build(rounds=1, density=0.0, byte_budget=1000).run()


def test_boards_of_different_widths_share_a_core(build):
    simulation = build(strategy="fedprune", density=0.0, options={"densities": [1.0, 0.5, 0.5]})
    simulation.run()
    device_rows = simulation.state.history[0]["devices"]
    assert [device_row["density"] for device_row in device_rows.values()] == [0.5, 0.5, 0.5]
