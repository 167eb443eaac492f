"""What a device refuses before it pulls anything: an optimiser whose state has no room."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from fedprune.core.errors import ConfigError, PlanError
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Tensors
from fedprune_device.network.offer_checks import check_offer
from fedprune_device.storage.state_directory import DeviceStore
from support.fakes.agent_fleet import MemoryServer

pytestmark = pytest.mark.board


@pytest.mark.parametrize(
    ("recipe", "copies"),
    [
        (Recipe(), 5),
        (Recipe(optimizer="adam"), 7),
        (Recipe(drift=True), 6),
        (Recipe(optimizer="adamw"), 7),
        (Recipe(optimizer="adam", frozen=("w",)), 1),
        (Recipe(trainable=("b",)), 1),
    ],
)
def test_the_optimizers_state_and_a_drift_count(
    tmp_path: Path, graphs: Path, weights: Tensors, recipe: Recipe, copies: int
) -> None:
    offer = MemoryServer(tmp_path / "server", graphs, weights, time.monotonic).offer(1, recipe)
    offer = replace(offer, drift=offer.weights if recipe.drift else None)
    with DeviceStore(tmp_path / "state") as store:

        def check(memory: int) -> None:
            profile: Any = SimpleNamespace(storage=SimpleNamespace(budget_bytes=10**9), training_memory_bytes=memory)
            check_offer(offer, store, profile)

        check(copies * offer.weights.size)
        with pytest.raises(PlanError, match=f"got {copies * offer.weights.size} and more"):
            check(copies * offer.weights.size - 1)


def test_a_recipe_of_a_newer_kind_is_refused_by_name(tmp_path: Path, graphs: Path, weights: Tensors) -> None:
    server = MemoryServer(tmp_path / "server", graphs, weights, time.monotonic)
    with DeviceStore(tmp_path / "state") as store, pytest.raises(ConfigError, match=r"recipe\.sharpness"):
        check_offer(server.offer(1, {**Recipe().to_dict(), "sharpness": 1.0}), store, None)
