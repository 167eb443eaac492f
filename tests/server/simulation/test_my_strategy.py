"""The strategy of the documentation runs, alone and beside the presets."""

import re
import sys
from pathlib import Path

import pytest

from fedprune.coordination.limits import REFERENCES_MEMORY
from fedprune.core import tensorfile
from fedprune.model.recipe import Recipe
from fedprune_server.simulation.simulation import Simulation
from support.fakes.digits_simulation import boards, digits_simulation
from support.paths import ROOT

PAGE = ROOT / "docs" / "write-a-strategy.md"
ASSETS = ROOT / "server" / "fedprune_server" / "assets"
RECIPE = Recipe(epochs=2)


@pytest.fixture(autouse=True)
def _strategy_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ASSETS))
    monkeypatch.delitem(sys.modules, "my_strategy", raising=False)


def run_strategy(folder: Path, strategy: str = "my_strategy:energy") -> Simulation:
    fleet = boards(("a", "b", "c"), "raspberry-pi-5")
    simulation = digits_simulation(
        folder, keeps_state=False, fleet=fleet, rounds=3, density=0.5, strategy=strategy, recipe=RECIPE
    )
    simulation.run()
    losses = [h["metrics"]["loss"] for h in simulation.state.history]
    assert losses[-1] < losses[0]
    return simulation


def test_it_learns_and_remembers(tmp_path: Path) -> None:
    run = run_strategy(tmp_path)
    state = run.state
    assert set(state.memory) == {"velocity", "energy", REFERENCES_MEMORY}
    remembered = tensorfile.decode(run.store.read(state.memory["energy"]))
    architecture = run.model.architecture
    sizes = {f"{architecture.digest}/{g.name}": g.size for g in architecture.groups}
    assert {name: len(v) for name, v in remembered.items()} == sizes


def test_the_further_strategies_of_the_page_learn_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for name, block in zip(("halfway", "tiered", "halved"), blocks[1:], strict=True):
        (tmp_path / f"{name}.py").write_text(block)
    monkeypatch.syspath_prepend(str(tmp_path))
    halved = run_strategy(tmp_path / "halved", "halved:halved").state
    assert {device.density for device in halved.devices.values()} == {0.5}
    tiered = run_strategy(tmp_path / "tiered", "tiered:tiered").state
    assert sorted(device.density for device in tiered.devices.values()) == [0.5, 0.5, 1.0]
    state = run_strategy(tmp_path / "blobs", "halfway:halfway").state
    assert all(device.past is not None for device in state.devices.values())
    assert state.model != run_strategy(tmp_path / "plain", "plain").state.model
