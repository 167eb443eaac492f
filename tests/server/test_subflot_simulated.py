"""SubFLOT in a simulated fleet: the worker asks its roles with stored histories, and rounds repeat their bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedprune import tensorfile
from fedprune.architecture import widths_at
from fedprune.blobs import BlobStore
from fedprune.job import Job
from fedprune.profile_store import find
from fedprune.recipe import Recipe
from fedprune.selection import Selection
from fedprune_export.importing import import_onnx
from fedprune_server.digits import deal, digits_model
from fedprune_server.simulation import Simulation
from fedprune_server.virtual_device import VirtualDevice

pytest.importorskip("ot")

KINDS = ("jetson-orin-nano", "raspberry-pi-4b", "raspberry-pi-zero-2w")
DENSITIES = (1.0, 0.5, 0.25)


def run(folder: Path, rounds: int, **options: Any) -> Simulation:
    data = deal(KINDS, seed=1)
    devices = [VirtualDevice(kind, find(kind), data.devices[kind]) for kind in KINDS]
    job = Job(
        seed=3,
        rounds=rounds,
        devices=3,
        recipe=Recipe(max_steps=2, batch_size=16),
        strategy="subflot",
        options={"densities": list(DENSITIES), **options},
    )
    model = import_onnx(digits_model(), "digits-net")
    store = BlobStore(folder / "blobs", durable=False)
    simulation = Simulation(job, model, devices, (data.x, data.y), store, folder=folder)
    simulation.run()
    return simulation


def test_rounds_lead_histories_and_repeat_their_bits(tmp_path: Path) -> None:
    one, again, other = (run(tmp_path / str(i), 2, maps=m) for i, m in enumerate(("literal", "literal", "preserving")))
    assert one.state.model == again.state.model != other.state.model
    for name, density in zip(KINDS, DENSITIES, strict=True):
        past = one.state.devices[name].past
        at = Selection.of(one.model.architecture, past["widths"])
        assert (past["round"], at.widths) == (2, widths_at(one.model.architecture, density))
        own = tensorfile.decode(one.store.read(past["weights"]))
        assert {n: v.shape for n, v in own.items()} == at.shapes()
