"""Presets in simulated fleets: FedAvg's bits where they reduce to it, and what each of them does otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.blobs.blob_store import BlobStore
from fedprune.core import tensorfile
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Tensors
from fedprune.planning.cost_prediction import predict
from fedprune.planning.profile_store import find
from fedprune_device.data.dataset import LocalData
from fedprune_export.importing import import_onnx
from fedprune_server.simulation.digits import deal, digits_model
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.fleet.virtual_device import VirtualDevice
from fedprune_server.simulation.simulation import Simulation

KINDS = ("raspberry-pi-zero-2w", "raspberry-pi-4b", "jetson-orin-nano")
TIERS = [1.0, 0.5, 0.25]
Build = Callable[..., Simulation]


@pytest.fixture(scope="module")
def model() -> Any:
    return import_onnx(digits_model(), "digits-net")


@pytest.fixture(scope="module")
def fleet() -> tuple[Any, list[VirtualDevice]]:
    data = deal(KINDS, seed=1)
    return data, [VirtualDevice(kind, find(kind), data.devices[kind]) for kind in KINDS]


@pytest.fixture
def build(model: Any, fleet: tuple[Any, list[VirtualDevice]], tmp_path: Path) -> Build:
    """A run of a preset: three devices, two rounds of two steps."""
    data, devices = fleet

    def make(strategy: str, devices: list[VirtualDevice] = devices, **settings: Any) -> Simulation:
        options = settings.pop("options", {})
        recipe = settings.pop("recipe", Recipe(max_steps=2, batch_size=16))
        name = f"{strategy}-{len(list(tmp_path.iterdir()))}"
        job = Job(
            name=name, seed=3, rounds=settings.pop("rounds", 2), devices=3, recipe=recipe, strategy=strategy,
            options=options, **settings,
        )  # fmt: skip
        simulation = Simulation(
            Experiment("x", job, model, devices, (data.x, data.y)),
            BlobStore(tmp_path / name / "blobs", durable=False),
            folder=tmp_path / name,
        )
        simulation.run()
        return simulation

    return make


def weights(simulation: Simulation) -> Tensors:
    return tensorfile.decode(simulation.store.read(simulation.state.model))


BARE = {"scaler": False, "static_norm": False, "masked": False, "clip_norm": 0.0, "weighting": "samples"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("fedavg", {}),
        ("fedavg", {"robust": {"clip": 1e6}}),
        ("fedprox", {"mu": 0.0}),
        ("heterofl", {**BARE, "densities": [1.0]}),
        ("history", {"densities": [1.0], "alpha": 1.0}),
    ],
)
def test_at_density_one_it_is_fedavg_bit_for_bit(build: Build, strategy: str, options: dict[str, Any]) -> None:
    plain = weights(build("plain", density=1.0, scorer="ordered"))
    got = weights(build(strategy, options=options))
    assert all(got[n].tobytes() == plain[n].tobytes() for n in plain)


def test_at_density_one_ca_hfp_is_the_mean_in_its_order_bit_for_bit(build: Build) -> None:
    plain = weights(build("plain", density=1.0, scorer="magnitude"))
    got = weights(build("ca-hfp", options={"densities": [1.0], "score": "l1"}))
    assert all(got[n].tobytes() == plain[n].tobytes() for n in plain)


@pytest.mark.slow
@pytest.mark.parametrize("score", ["curvature", "l1", "random"])
def test_at_density_one_ca_hfp_is_fedavg_in_another_order(build: Build, score: str) -> None:
    """Boards add up the same products in the order of the ranks: that, and nothing else, differs."""
    fedavg = weights(build("fedavg"))
    got = weights(build("ca-hfp", options={"densities": [1.0], "score": score}))
    for name, value in fedavg.items():
        np.testing.assert_allclose(got[name], value, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_a_rolling_window_of_the_whole_model_is_fedavg_in_another_order(build: Build) -> None:
    plain = weights(build("fedavg"))
    got = weights(build("fedrolex", options={**BARE, "densities": [1.0]}))
    assert all(np.allclose(got[n], plain[n], atol=1e-4) for n in plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("heterofl", {"densities": TIERS}),
        ("heterofl", {"densities": TIERS, "by": "chance", "every": 1}),
        ("fedrolex", {"densities": TIERS}),
        ("ca-hfp", {"densities": TIERS}),
        ("ca-hfp", {"densities": TIERS, "score": "delta_w", "estimator": "secant", "per_count": True}),
        ("ca-hfp", {"densities": TIERS, "reconstruction": "zero", "score": "random"}),
        ("history", {"densities": TIERS, "mu": 1.0}),
        ("fedper", {"densities": TIERS}),
        ("fedprox", {"densities": TIERS, "server_momentum": 0.5}),
        ("fedavg", {"densities": TIERS, "robust": {"centre": "median", "check": "both"}}),
        ("ca-hfp", {"densities": TIERS, "robust": {"clip": "median", "centre": "trimmed", "trim": 0.34}}),
    ],
)
def test_it_runs_and_moves_the_model_the_same_every_time(build: Build, strategy: str, options: dict[str, Any]) -> None:
    one, two = build(strategy, options=options), build(strategy, options=options)
    assert one.state.model == two.state.model
    assert one.state.model != build(strategy, options=options, rounds=1).state.model
    assert one.state.history == two.state.history
    assert all(np.isfinite(v).all() for v in weights(one).values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("fedprune", {}),
        ("subflot", {"planned": True}),
        ("heterofl", {"planned": True}),
        ("history", {"mu": 1.0}),
        ("ca-hfp", {}),
        ("fedobp", {}),
        ("autoflip", {"exploration_epochs": 1}),
    ],
)
def test_boards_are_planned_by_what_they_are_offered(build: Build, strategy: str, options: dict[str, Any]) -> None:
    run = build(strategy, options=options, byte_budget=100_000)
    for device in run.experiment.devices:
        task, planned = run.state.tasks[device.name], run.state.devices[device.name].plan
        assert task.offer, task.reason
        assert planned
        assert task.density < 1
        asked = Recipe.from_dict(task.offer["recipe"])
        foretold = predict(run.model.architecture, task.widths, device.profile, asked, device.samples)
        assert asdict(foretold) == planned["prediction"]


def test_personal_heads_never_reach_the_server(build: Build, model: Any) -> None:
    got = weights(build("fedper"))
    head = {n for n in got if n.startswith(_head(model))}
    assert head
    for name, value in got.items():
        same = value.tobytes() == model.tensors[name].tobytes()
        assert same == (name in head)


def _head(model: Any) -> str:
    return str(model.architecture.layers[-1].weight.rpartition(".")[0])


def test_alone_nothing_is_shared(build: Build, model: Any) -> None:
    simulation = build("local", rounds=3, recipe=Recipe(max_steps=8, batch_size=16))
    got = weights(simulation)
    assert all(got[n].tobytes() == model.tensors[n].tobytes() for n in got)
    rows = simulation.record().rounds
    first, last = ({d: m["loss_after"] for d, m in _metrics(r).items()} for r in (rows[0], rows[-1]))
    assert all(last[d] < first[d] for d in first)  # boards continue from their own weights


def _metrics(row: Any) -> dict[str, dict[str, float]]:
    names = {d for values in row.own.values() for d in values}
    return {d: {k: v[d] for k, v in row.own.items() if d in v} for d in names}


def test_rows_of_absent_labels_are_left_to_those_that_have_them(
    build: Build, model: Any, fleet: tuple[Any, list[VirtualDevice]]
) -> None:
    """Rows of labels that nobody has keep their bits; a row of one device's own label is what that one made of it."""
    _, devices = fleet
    own = [only(d, labels) for d, labels in zip(devices, ([0, 1, 2], [1, 2, 3], [4, 5, 6]), strict=True)]
    for decay in (0.0, 1e-2):
        recipe = Recipe(max_steps=2, batch_size=16, weight_decay=decay)
        got = weights(build("heterofl", own, options={"densities": [1.0]}, rounds=1, recipe=recipe))
        everyone = weights(
            build("heterofl", own, options={"densities": [1.0], "label_rows": False}, rounds=1, recipe=recipe)
        )
        head = [n for n in got if n.startswith(_head(model))]
        assert len(head) == 2
        for name in head:
            before = model.tensors[name]
            assert got[name][7:].tobytes() == before[7:].tobytes()
            alone, diluted = (np.abs(w[name][0] - before[0]).sum() for w in (got, everyone))
            assert alone > 2 * diluted
        body = [n for n in got if n not in head]
        assert all(got[n].tobytes() == everyone[n].tobytes() for n in body)


def test_a_device_that_stands_out_is_left_out_and_the_history_says_why(
    model: Any, fleet: tuple[Any, list[VirtualDevice]], tmp_path: Path
) -> None:
    """Five boards with data, and one that calls everything 0."""
    data, devices = fleet
    names = [f"d{i}" for i in range(6)]
    dealt, kind = deal(names, seed=1), devices[0].profile
    boards = []
    for name in names:
        own: LocalData = dealt.devices[name]
        bad = replace(own, y_train=own.y_train * 0) if name == "d3" else own
        boards.append(VirtualDevice(name, kind, bad))
    models = {}
    for label, members in (("checked", boards), ("without", [b for b in boards if b.name != "d3"])):
        job = Job(
            name="t", seed=3, rounds=1, devices=len(members), strategy="ca-hfp",
            options={"densities": [1.0], "robust": {"check": "norm"} if label == "checked" else None},
            recipe=Recipe(max_steps=2, batch_size=16), move_limit=0.0, weight_limit=0.0,
        )  # fmt: skip
        store = BlobStore(tmp_path / label / "blobs", durable=False)
        simulation = Simulation(Experiment("x", job, model, members, (data.x, data.y)), store, folder=tmp_path / label)
        simulation.run()
        models[label] = simulation
    row = models["checked"].state.history[0]["devices"]
    assert {n for n, d in row.items() if d["progress"] == "refused"} == {"d3"}
    assert "deviations above the median" in row["d3"]["reason"]
    assert models["checked"].state.devices["d3"].past is None
    assert models["checked"].state.model == models["without"].state.model
    assert models["checked"].state.memory == models["without"].state.memory  # evidence is as clean


def only(device: VirtualDevice, labels: list[int]) -> VirtualDevice:
    data: LocalData = device.load()
    kept = np.isin(data.y_train, labels)
    return VirtualDevice(
        device.name, device.profile, replace(data, x_train=data.x_train[kept], y_train=data.y_train[kept])
    )
