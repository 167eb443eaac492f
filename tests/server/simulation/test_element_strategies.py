"""FedOBP, AutoFLIP and FIARSE from one end to the other: coordinator, worker, wire formats, boards' own code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.blobs.blob_store import BlobStore
from fedprune.core import tensorfile
from fedprune.jobs.job import Job
from fedprune.model.element_mask import ElementMask
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.planning.profile_store import find
from fedprune.strategies.values import Submodel
from fedprune_export.importing import import_onnx
from fedprune_export.pruning.model import Model
from fedprune_server.simulation.digits import deal, digits_model
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.fleet.virtual_device import VirtualDevice
from fedprune_server.simulation.measure import Hook, Moment
from fedprune_server.simulation.simulation import Simulation

NAMES = ("raspberry-pi-4b", "jetson-orin-nano")
SHORT = {"exploration_epochs": 2, "patience": 0}


@pytest.fixture(scope="module")
def model() -> Model:
    return import_onnx(digits_model(), "digits-net")


def simulation(model: Model, folder: Path, strategy: str, *, measure: Hook | None = None, **options: Any) -> Simulation:
    data = deal(NAMES, seed=1)
    devices = [VirtualDevice(name, find(name), data.devices[name]) for name in NAMES]
    recipe = Recipe(max_steps=4, lr=0.03)
    job = Job(seed=3, rounds=3, devices=2, strategy=strategy, options=options, recipe=recipe, deadline_s=1e6)
    store = BlobStore(folder / "blobs", durable=False)
    experiment = Experiment("x", job, model, devices, (data.x, data.y), measure=measure)
    return Simulation(experiment, store, folder=folder)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("fedobp", {"q": 0.9}),
    ("fiarse", {"densities": [1.0, 0.2]}),
    ("fiarse", {"densities": [0.2], "mask": "hard"}),
    ("autoflip", SHORT),
    ("autoflip", {**SHORT, "structured": True, "pruned_share": 0.8}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "options"), CASES, ids=[f"{s}-{len(o)}" for s, o in CASES])
def test_every_update_counts_and_a_resumed_run_is_the_same(
    model: Model, tmp_path: Path, strategy: str, options: dict[str, Any]
) -> None:
    whole = simulation(model, tmp_path / "whole", strategy, **options)
    rows = whole.run()
    assert [t["progress"] for row in rows for t in row["devices"].values()] == ["folded"] * 6
    trained = 0

    def stop(_: object) -> None:
        nonlocal trained
        trained += 1
        if trained == 5:  # in the third round, with memories and devices' last updates behind it
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulation(model, tmp_path / "killed", strategy, **options).run(stop)
    resumed = simulation(model, tmp_path / "killed", strategy, **options)
    resumed.run()
    assert resumed.state.model == whole.state.model


@pytest.mark.parametrize("densities", [[1.0], [1.0, 0.2]])
def test_what_is_measured_is_masked_as_what_is_sent_whoever_takes_part(
    model: Model, tmp_path: Path, densities: list[float]
) -> None:
    """Also in a round in which everybody holds the whole model."""
    found: list[Submodel] = []

    def look(moment: Moment) -> dict[str, float]:
        found.append(moment.submodel(0.2))
        return {}

    run = simulation(model, tmp_path, "fiarse", densities=densities, measure=look)
    run.run()
    assert len(found) == 3
    for submodel in found:
        assert submodel.selection.widths == model.architecture.sizes
        assert submodel.mask is not None
        assert sum(int(a.sum()) for a in submodel.mask.active.values()) < 0.25 * sum(
            a.size for a in submodel.mask.active.values()
        )


@pytest.mark.parametrize(
    ("strategy", "factor"), [("support.fakes.picking_strategies:doubled", 2), ("fedobp", 1), ("history", 1)]
)
def test_what_is_measured_is_what_the_strategy_would_send_to_an_unseen_device(
    model: Model, tmp_path: Path, strategy: str, factor: float
) -> None:
    """Nothing of it is a device's own."""
    found: list[bool] = []

    def look(moment: Moment) -> dict[str, float]:
        submodel = moment.submodel(0.5)
        slices = submodel.selection.gather(moment.model)
        found.append(all(np.array_equal(v, factor * slices[n]) for n, v in submodel.tensors.items()))
        return {}

    simulation(model, tmp_path, strategy, measure=look).run()
    assert found == [True] * 3


def offers(run: Simulation) -> dict[str, dict[str, Any]]:
    run.run()
    found = {n: t.offer for n, t in run.state.tasks.items()}
    return {n: o for n, o in found.items() if o is not None}


def test_a_masked_submodel_travels_without_what_is_masked(model: Model, tmp_path: Path) -> None:
    run = simulation(model, tmp_path, "fiarse", densities=[1.0, 0.2])
    whole, sparse = (offers(run)[n] for n in sorted(NAMES))
    assert "mask" not in whole
    bits = tensorfile.decode(run.store.read(sparse["mask"]["sha256"]))
    mask = ElementMask.from_tensors(bits, Selection.full(model.architecture).shapes())
    assert mask.count == int(0.2 * mask.size)
    weights = tensorfile.decode(run.store.read(sparse["weights"]["sha256"]))
    active = np.concatenate([np.abs(weights[n]) for n in mask.active])
    assert active.size == mask.count
    assert sparse["recipe"]["mask_threshold"] == pytest.approx(float(active.min()))
    assert sparse["weights"]["size"] < 0.3 * whole["weights"]["size"]
    assert whole["recipe"]["mask"] == "threshold"


@pytest.mark.slow
def test_a_board_gets_a_narrower_model_where_masks_leave_no_weights(model: Model, tmp_path: Path) -> None:
    run = simulation(model, tmp_path, "autoflip", **SHORT, structured=True, pruned_share=0.8)
    for offer in offers(run).values():
        assert sum(offer["widths"]) < sum(model.architecture.sizes)
        bits = tensorfile.decode(run.store.read(offer["mask"]["sha256"]))
        shapes = model.architecture.shapes(offer["widths"])
        assert 0 < ElementMask.from_tensors(bits, shapes).density < 1
