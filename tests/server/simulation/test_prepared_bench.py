"""Work that is done ahead and then cancelled leaves nothing behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from fedprune.blobs.blob_store import BlobStore
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune.planning.profile_store import find
from fedprune_export.importing import import_onnx
from fedprune_server.simulation import simulation as simulations
from fedprune_server.simulation.digits import deal, digits_model
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.fleet.prepared_runner import Done, PreparedBench
from fedprune_server.simulation.fleet.virtual_device import Bench, VirtualDevice, Work
from fedprune_server.simulation.simulation import Simulation

pytestmark = [pytest.mark.slow, pytest.mark.slow]

PROFILES = ("raspberry-pi-5", "raspberry-pi-zero-2w")


class Ahead(PreparedBench):
    """Does ahead what a board would do."""

    def __init__(self, store: BlobStore, folder: Path) -> None:
        super().__init__(store, folder, 64)
        self._alone = Bench(store, folder / "alone")

    def ahead(self, work: Sequence[Work]) -> list[Done | Exception]:
        """See `PreparedBench.ahead`."""
        return [(self._alone.carry_out(*item), self._alone.boards.get(item[0].name)) for item in work]


def test_what_was_prepared_for_late_devices_is_dropped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In every round half of the fleet is late: its work was done ahead and is never asked for."""
    benches: list[Ahead] = []

    def bench(workers: int, store: BlobStore, folder: Path, **_: bool) -> Bench:
        benches.append(Ahead(store, folder))
        return benches[0]

    monkeypatch.setattr(simulations, "PooledBench", bench)
    names = [f"d{i}" for i in range(4)]
    hand = deal(names, seed=0)
    devices = [VirtualDevice(n, find(PROFILES[i % 2]), hand.devices[n]) for i, n in enumerate(names)]
    job = Job(rounds=5, devices=2, density=0.5, deadline_s=0.15, recipe=Recipe(max_steps=4))
    model, held = import_onnx(digits_model(), "digits"), list[int]()
    simulation = Simulation(
        Experiment("x", job, model, devices, workers=2), BlobStore(tmp_path / "blobs", durable=False)
    )

    def watch(_: Simulation) -> None:
        held.append(max(len(benches[0]._ready), len(benches[0]._held.names())))

    history = simulation.run(watch)
    late = [sum(d["progress"] != "folded" for d in row["devices"].values()) for row in history]
    assert min(late) >= 1
    assert 0 < max(held) <= len(names)
