"""Presets in simulated fleets: FedAvg's bits where they reduce to it, and what each of them does otherwise."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.blobs.blob_ref import BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import State
from fedprune.core import tensorfile
from fedprune.model.element_mask import mask_from_bits
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.planning.cost_prediction import predict_costs
from fedprune.strategies.values import Submodel
from fedprune_device.data.dataset import LocalData
from fedprune_server.simulation.fleet.virtual_device import Outcome, VirtualDevice
from fedprune_server.simulation.measure import MeasuredRound, MeasurementHook
from fedprune_server.simulation.simulation import Simulation
from support.fakes.digits_simulation import KINDS, boards, digits_net, digits_simulation, final_weights

TIERS = [1.0, 0.5, 0.25]
Build = Callable[..., Simulation]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """A finished run of a preset: three devices, two rounds of two steps."""

    def make(strategy: str, **settings: Any) -> Simulation:
        settings = {"recipe": Recipe(max_steps=2, batch_size=16), "strategy": strategy, **settings}
        simulation = digits_simulation(tmp_path / f"{strategy}-{len(list(tmp_path.iterdir()))}", **settings)
        simulation.run()
        return simulation

    return make


def test_at_density_one_it_is_the_mean_in_its_order_bit_for_bit(build: Build) -> None:
    mean_weights = final_weights(build("plain", density=1.0, scorer="ordered"))
    fedavg_weights = final_weights(build("fedavg"))
    assert all(fedavg_weights[n].tobytes() == mean_weights[n].tobytes() for n in mean_weights)


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("heterofl", {"densities": TIERS}),
        pytest.param("fedrolex", {"densities": TIERS}, marks=pytest.mark.soak),
        pytest.param("ca-hfp", {"densities": TIERS}, marks=pytest.mark.soak),
        ("ca-hfp", {"densities": TIERS, "score": "delta_w"}),
        ("ca-hfp", {"densities": TIERS, "reconstruction": "zero", "score": "random"}),
        pytest.param("history", {"densities": TIERS, "mu": 1.0}, marks=pytest.mark.soak),
        ("fedper", {"densities": TIERS}),
        ("fedprox", {"densities": TIERS, "server_momentum": 0.5}),
        ("fedavg", {"densities": TIERS, "robust": {"centre": "median"}}),
        ("ca-hfp", {"densities": TIERS, "robust": {"centre": "trimmed", "trim": 0.34}}),
    ],
)
@pytest.mark.at_push(2)
def test_it_runs_and_moves_the_model_the_same_every_time(build: Build, strategy: str, options: dict[str, Any]) -> None:
    first, second = build(strategy, options=options), build(strategy, options=options)
    assert first.state.model == second.state.model
    assert first.state.model != build(strategy, options=options, rounds=1).state.model
    assert first.state.history == second.state.history
    assert all(np.isfinite(v).all() for v in final_weights(first).values())


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("fedprune", {"core": 0}),  # with a core steps are of another width than plans think
        ("subflot", {"densities": [1.0]}),
        ("heterofl", {"densities": [1.0]}),
        ("history", {"mu": 1.0}),
        ("ca-hfp", {}),
        ("fedobp", {}),
        ("autoflip", {"exploration_epochs": 1}),
    ],
)
@pytest.mark.at_push(2)
def test_boards_are_planned_by_what_they_are_offered(build: Build, strategy: str, options: dict[str, Any]) -> None:
    run = build(strategy, options=options, byte_budget=100_000)
    for device in run.experiment.devices:
        task, plan = run.state.tasks[device.name], run.state.devices[device.name].plan
        assert task.offer, task.reason
        assert plan
        assert task.density < 1
        recipe = Recipe.from_dict(task.offer["recipe"])
        codecs = ("int8", "int8") if strategy == "fedprune" else (None, None)
        prediction = predict_costs(
            run.model.architecture, task.widths, device.profile, recipe, device.samples, codecs=codecs
        )
        assert asdict(prediction) == plan["prediction"]


def test_personal_heads_never_reach_the_server(build: Build) -> None:
    weights = final_weights(build("fedper"))
    head = {n for n in weights if n.startswith(_head())}
    assert head
    for name, value in weights.items():
        assert (value.tobytes() == digits_net().tensors[name].tobytes()) == (name in head)


def _head() -> str:
    return str(digits_net().architecture.layers[-1].weight.rpartition(".")[0])


def test_alone_nothing_is_shared(build: Build) -> None:
    simulation = build("local", rounds=3, recipe=Recipe(max_steps=8, batch_size=16))
    weights = final_weights(simulation)
    assert all(weights[n].tobytes() == digits_net().tensors[n].tobytes() for n in weights)
    rows = simulation.record().rounds
    first, last = ({d: m["loss_after"] for d, m in _metrics(r).items()} for r in (rows[0], rows[-1]))
    assert all(last[d] < first[d] for d in first)  # boards continue from their own weights


def _metrics(row: Any) -> dict[str, dict[str, float]]:
    names = {d for values in row.device_metrics.values() for d in values}
    return {d: {k: v[d] for k, v in row.device_metrics.items() if d in v} for d in names}


def test_rows_of_absent_labels_are_left_to_those_that_have_them(build: Build) -> None:
    """Rows of labels that nobody has keep their bits; a row of one device's own label is what that one made of it."""
    fleet = [with_labels(d, labels) for d, labels in zip(boards(), ([0, 1, 2], [1, 2, 3], [4, 5, 6]), strict=True)]
    for decay in (0.0, 1e-2):
        recipe = Recipe(max_steps=2, batch_size=16, weight_decay=decay)
        by_label_rows = final_weights(
            build("heterofl", fleet=fleet, options={"densities": [1.0]}, rounds=1, recipe=recipe)
        )
        by_all = final_weights(
            build("heterofl", fleet=fleet, options={"densities": [1.0], "label_rows": False}, rounds=1, recipe=recipe)
        )
        head = [n for n in by_label_rows if n.startswith(_head())]
        assert len(head) == 2
        for name in head:
            before = digits_net().tensors[name]
            assert by_label_rows[name][7:].tobytes() == before[7:].tobytes()
            alone, diluted = (np.abs(w[name][0] - before[0]).sum() for w in (by_label_rows, by_all))
            assert alone > 2 * diluted
        body = [n for n in by_label_rows if n not in head]
        assert all(by_label_rows[n].tobytes() == by_all[n].tobytes() for n in body)


def with_labels(device: VirtualDevice, labels: list[int]) -> VirtualDevice:
    data: LocalData = device.load()
    has_label = np.isin(data.y_train, labels)
    return VirtualDevice(
        device.name, device.profile, replace(data, x_train=data.x_train[has_label], y_train=data.y_train[has_label])
    )


# Strategies of single elements.


@pytest.fixture
def elements(tmp_path: Path) -> Build:
    """Two devices, three rounds of four steps."""

    def make(strategy: str, measure: MeasurementHook | None = None, **options: Any) -> Simulation:
        job = {"rounds": 3, "recipe": Recipe(max_steps=4, lr=0.03), "deadline_s": 1e6, "options": options}
        return digits_simulation(tmp_path, fleet=boards(KINDS[1:]), strategy=strategy, measure=measure, **job)

    return make


@pytest.mark.parametrize("densities", [[1.0], [1.0, 0.2]])
def test_what_is_measured_is_masked_as_what_is_sent_whoever_takes_part(elements: Build, densities: list[float]) -> None:
    """Also in a round in which everybody holds the whole model."""
    submodels: list[Submodel] = []

    def measure(moment: MeasuredRound) -> dict[str, float]:
        submodels.append(moment.submodel(0.2))
        return {}

    run = elements("fiarse", densities=densities, measure=measure)
    run.run()
    assert len(submodels) == 3
    for submodel in submodels:
        assert submodel.selection.widths == run.model.architecture.sizes
        assert submodel.mask
        assert sum(int(a.sum()) for a in submodel.mask.values()) < 0.25 * sum(a.size for a in submodel.mask.values())


@pytest.mark.parametrize(
    ("strategy", "factor"), [("support.fakes.picking_strategies:doubled", 2), ("fedobp", 1), ("history", 1)]
)
def test_what_is_measured_is_what_the_strategy_would_send_to_an_unseen_device(
    elements: Build, strategy: str, factor: float
) -> None:
    """Nothing of it is a device's own."""
    matches: list[bool] = []

    def measure(moment: MeasuredRound) -> dict[str, float]:
        submodel = moment.submodel(0.5)
        slices = submodel.selection.gather(moment.model)
        matches.append(all(np.array_equal(v, factor * slices[n]) for n, v in submodel.tensors.items()))
        return {}

    elements(strategy, measure=measure).run()
    assert matches == [True] * 3


def latest_offers(run: Simulation) -> dict[str, dict[str, Any]]:
    run.run()
    return {n: o for n, o in {n: t.offer for n, t in run.state.tasks.items()}.items() if o is not None}


def test_a_masked_submodel_travels_without_what_is_masked(elements: Build) -> None:
    run = elements("fiarse", densities=[1.0, 0.2])
    full_offer, sparse_offer = (latest_offers(run)[n] for n in sorted(KINDS[1:]))
    assert "mask" not in full_offer
    bits = tensorfile.decode(run.store.read(sparse_offer["mask"]["sha256"]))
    mask = mask_from_bits(bits, Selection.full(run.model.architecture).shapes())
    kept_count = sum(int(bits.sum()) for bits in mask.values())
    assert kept_count == int(0.2 * sum(bits.size for bits in mask.values()))
    weights = tensorfile.decode(run.store.read(sparse_offer["weights"]["sha256"]))
    active = np.concatenate([np.abs(weights[n]) for n in mask])
    assert active.size == kept_count
    assert sparse_offer["recipe"]["mask_threshold"] == pytest.approx(float(active.min()))
    assert sparse_offer["weights"]["size"] < 0.3 * full_offer["weights"]["size"]
    assert full_offer["recipe"]["mask"] == "threshold"


@pytest.mark.parametrize("strategy", ["others", "emergent"])
def test_whichever_channels_an_extractor_chose_are_put_back_where_they_came_from(tmp_path: Path, strategy: str) -> None:
    """Boards that hand back what they were sent leave the model as it is."""

    def hand_back(outcome: Outcome, offer: Mapping[str, Any], store: BlobStore) -> Outcome:
        return replace(outcome, weights=BlobRef.from_dict(offer["weights"]), metrics={})

    fleet = [replace(board, tamper=hand_back) for board in boards(KINDS[1:])]
    strategy = f"support.fakes.picking_strategies:{strategy}"
    run = digits_simulation(tmp_path, fleet=fleet, strategy=strategy, rounds=3, density=0.4)
    before = final_weights(run)
    assert [d["progress"] for row in run.run() for d in row["devices"].values()] == ["folded"] * 6
    for name, value in final_weights(run).items():
        np.testing.assert_allclose(value, before[name], atol=1e-4, err_msg=name)
    state = run.state
    for name, device in state.devices.items():
        offer = state.tasks[name].offer
        assert device.past is not None
        assert offer is not None
        assert (device.past["widths"], device.past["ranking"]) == (offer["widths"], offer["ranking"])
        assert offer["ranking"] != state.ranking
        assert State.from_json(state.to_json()).references() >= {offer["ranking"]}


# SubFLOT.
