"""Every strategy with boards that train with channels in blocks: rounds end where standard operators would end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.blobs.blob_store import BlobStore
from fedprune.core import tensorfile
from fedprune.jobs.job import Job
from fedprune.jobs.state import Device
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Tensors
from fedprune.planning.profile_store import find
from fedprune.runtime.blocks import block_size
from fedprune_export.importing import import_onnx
from fedprune_export.pruning.model import Model
from fedprune_server.executor.offers import Offers
from fedprune_server.simulation.digits import deal, digits_model
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.fleet.virtual_device import VirtualDevice
from fedprune_server.simulation.simulation import Simulation

pytestmark = [pytest.mark.slow, pytest.mark.slow]

HERE = block_size()
NAMES = ("raspberry-pi-4b", "jetson-orin-nano")

STRATEGIES: dict[str, dict[str, Any]] = {
    "subflot": {},
    "ca-hfp": {},
    "pr-fl": {},
    "fedobp": {"q": 0.9},
    "autoflip": {"exploration_epochs": 1, "patience": 0},
    "fedprune": {},
    "fedper": {},
    "fiarse": {"densities": [1.0, 0.2]},
    "heterofl": {},
    "fedbuff": {},
}


@pytest.fixture(scope="module")
def model() -> Model:
    return import_onnx(digits_model(), "digits-net")


def result(model: Model, folder: Path, strategy: str, options: dict[str, Any]) -> tuple[Simulation, Tensors]:
    data = deal(NAMES, seed=1)
    devices = [VirtualDevice(name, find(name), data.devices[name]) for name in NAMES]
    recipe = Recipe(max_steps=2, lr=0.02, batch_size=16)
    job = Job(seed=3, rounds=2, devices=2, strategy=strategy, options=options, recipe=recipe, deadline_s=1e6)
    simulation = Simulation(
        Experiment("x", job, model, devices, (data.x, data.y)), BlobStore(folder, durable=False), folder=folder.parent
    )
    simulation.run()
    return simulation, tensorfile.decode(simulation.store.read(simulation.state.model))


@pytest.mark.skipif(not HERE, reason="onnxruntime has no blocks of channels on this processor")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_rounds_in_blocks_end_where_standard_operators_end(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    offered: list[tuple[Recipe, dict[str, dict[str, Any]]]] = []
    blocked_graph = Offers.blocked

    def noted(offers: Offers, recipe: Recipe, *given: Any) -> dict[str, dict[str, Any]]:
        offered.append((recipe, blocked_graph(offers, recipe, *given)))
        return offered[-1][1]

    monkeypatch.setattr(Offers, "blocked", noted)
    _, wanted = result(model, tmp_path / "plain" / "blobs", strategy, STRATEGIES[strategy])
    assert not any(found for _, found in offered)
    offered.clear()
    monkeypatch.setattr(Device, "block", HERE)  # simulated boards say nothing of blocks
    blocked, got = result(model, tmp_path / "blocked" / "blobs", strategy, STRATEGIES[strategy])

    assert offered
    for recipe, found in offered:
        assert list(found) == ([] if recipe.ordered_dropout else [str(HERE)])
    assert all(d["progress"] == "folded" for r in blocked.state.history for d in r["devices"].values())
    off = np.sqrt(sum(float(np.sum((got[n].astype(np.float64) - wanted[n]) ** 2)) for n in wanted))
    moved = np.sqrt(sum(float(np.sum((wanted[n].astype(np.float64) - model.tensors[n]) ** 2)) for n in wanted))
    assert moved > 0
    assert off < 1e-2 * moved
