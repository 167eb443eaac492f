"""SubFLOT in a simulated fleet: the worker asks its roles with stored histories, and rounds repeat their bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.blobs.blob_store import BlobStore
from fedprune.core import tensorfile
from fedprune.jobs.job import Job
from fedprune.model.architecture import widths_at
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection, Tensors
from fedprune.planning.profile_store import find
from fedprune_export.importing import import_onnx
from fedprune_export.pruning.cut import at_widths
from fedprune_server.simulation.digits import deal, digits_model
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.fleet.virtual_device import VirtualDevice
from fedprune_server.simulation.simulation import Simulation
from support.oracles.cutting import outputs

pytest.importorskip("ot")

KINDS = ("jetson-orin-nano", "raspberry-pi-4b", "raspberry-pi-zero-2w")
DENSITIES = (1.0, 0.5, 0.25)


def run(folder: Path, rounds: int, strategy: str = "subflot", **options: Any) -> Simulation:
    data = deal(KINDS, seed=1)
    devices = [VirtualDevice(kind, find(kind), data.devices[kind]) for kind in KINDS]
    job = Job(
        seed=3,
        rounds=rounds,
        devices=3,
        recipe=Recipe(max_steps=2, batch_size=16),
        strategy=strategy,
        options={"densities": list(DENSITIES), **options},
    )
    model = import_onnx(digits_model(), "digits-net")
    store = BlobStore(folder / "blobs", durable=False)
    simulation = Simulation(Experiment("x", job, model, devices, (data.x, data.y)), store, folder=folder)
    simulation.run()
    return simulation


@pytest.mark.slow
def test_rounds_lead_histories_and_repeat_their_bits(tmp_path: Path) -> None:
    one, again, other = (run(tmp_path / str(i), 2, maps=m) for i, m in enumerate(("literal", "literal", "preserving")))
    assert one.state.model == again.state.model != other.state.model
    for name, density in zip(KINDS, DENSITIES, strict=True):
        past = one.state.devices[name].past
        at = Selection.of(one.model.architecture, past["widths"])
        assert (past["round"], at.widths) == (2, widths_at(one.model.architecture, density))
        own = tensorfile.decode(one.store.read(past["weights"]))
        assert {n: v.shape for n, v in own.items()} == at.shapes()


def handed_in(simulation: Simulation, name: str) -> Tensors:
    return tensorfile.decode(simulation.store.read(simulation.state.devices[name].past["weights"]))


def test_local_accuracy_is_of_each_device_s_own_model_on_its_own_test_data(tmp_path: Path) -> None:
    simulation = run(tmp_path, 2)
    data = deal(KINDS, seed=1)
    (row,) = [r for r in simulation.record().rounds if r.round == 2]
    for name in KINDS:
        net = at_widths(simulation.model, simulation.state.devices[name].past["widths"])
        net.initializers |= handed_in(simulation, name)
        mine = data.devices[name]
        right = float((outputs(net, mine.x_test).argmax(1) == mine.y_test).mean())
        assert row.own["accuracy_after"][name] == pytest.approx(right)


@pytest.mark.slow
def test_without_the_global_model_s_share_it_is_its_baseline_without_transport(tmp_path: Path) -> None:
    """α = 0: every device continues from its own last model, as with `history`; with a share, transport matters."""
    for alpha, same in ((0.0, True), (0.5, False)):
        moved = run(tmp_path / f"a{alpha}", 3, alpha=alpha, sar=0.0)
        remembered = run(tmp_path / f"b{alpha}", 3, "history", alpha=alpha)
        for name in KINDS:
            one, other = handed_in(moved, name), handed_in(remembered, name)
            assert all(np.allclose(one[n], other[n], atol=1e-5) for n in one) == same
