"""The strategy of the documentation runs, alone and beside the presets."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fedprune
from fedprune.coordination.limits import MEMORY
from fedprune.core import tensorfile
from fedprune.core.errors import ConfigError
from fedprune.jobs.job import Job
from fedprune.jobs.schedule import Schedule
from fedprune.model.recipe import Recipe
from fedprune.strategies import compose
from fedprune.strategies.aggregators import Aggregator
from fedprune.strategies.allocation import Allocator
from fedprune.strategies.answers import CHECKS
from fedprune_server.simulation.simulation import Simulation
from support.fakes.digits_simulation import boards, digits_simulation
from support.paths import ROOT

PAGE = ROOT / "docs" / "write-a-strategy.md"
ASSETS = ROOT / "server" / "fedprune_server" / "assets"
METHODS = CHECKS[fedprune.Strategy]
RECIPE = Recipe(epochs=2)
JOB = Job(rounds=3, devices=3, density=0.5, strategy="my_strategy:energy", recipe=RECIPE)


def blocks() -> list[str]:
    """The page's Python, block by block."""
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture(autouse=True)
def _found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ASSETS))
    monkeypatch.delitem(sys.modules, "my_strategy", raising=False)


def simulated(folder: Path, strategy: str = "my_strategy:energy") -> Simulation:
    fleet = boards(("a", "b", "c"), "raspberry-pi-5")
    simulation = digits_simulation(
        folder, kept=False, fleet=fleet, rounds=3, density=0.5, strategy=strategy, recipe=RECIPE
    )
    simulation.run()
    losses = [h["metrics"]["loss"] for h in simulation.state.history]
    assert losses[-1] < losses[0]
    return simulation


def test_it_learns_and_remembers(tmp_path: Path) -> None:
    run = simulated(tmp_path)
    state = run.state
    assert set(state.memory) == {"velocity", "energy", MEMORY}
    remembered = tensorfile.decode(run.store.read(state.memory["energy"]))
    architecture = run.model.architecture
    sizes = {f"{architecture.digest}/{g.name}": g.size for g in architecture.groups}
    assert {name: len(v) for name, v in remembered.items()} == sizes


def test_the_second_strategy_of_the_page_learns_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "halfway.py").write_text(blocks()[1])
    monkeypatch.syspath_prepend(str(tmp_path))
    state = simulated(tmp_path / "blobs", "halfway:halfway").state
    assert all(device.past is not None for device in state.devices.values())
    bare = simulated(tmp_path / "plain", "plain").state
    assert state.model != bare.model


def test_helpers_take_what_the_page_says() -> None:
    rows = re.findall(r"^\| `([\w.]+)\(([\w, ]*)\)` \|", PAGE.read_text(), re.MULTILINE)
    assert len(rows) > 10
    for name, names in rows:
        if name in METHODS:
            continue
        found: Any = fedprune
        for part in name.split("."):
            found = (
                found.__dict__.get(part)
                or getattr(found, part, None)
                or importlib.import_module(f"{found.__name__}.{part}")
            )
        assert set(filter(None, names.split(", "))) <= set(inspect.signature(found).parameters), name


def test_its_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="no option 'boldness'"):
        compose(replace(JOB, options={"boldness": 1}))
    with pytest.raises(ConfigError, match="option momentum"):
        compose(replace(JOB, options={"momentum": "high"}))


@pytest.mark.parametrize(
    ("name", "what"), [("nowhere:f", "No module named"), ("my_strategy:f", "has no attribute"), ("fedfoo", "plain")]
)
def test_what_is_no_strategy_is_said(name: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        compose(replace(JOB, strategy=name))


def test_the_page_shows_the_very_file() -> None:
    assert blocks()[0] == (ASSETS / "my_strategy.py").read_text()


def test_the_page_lists_the_methods_that_can_be_overridden() -> None:
    rows = re.findall(r"^\| `(\w+)\(([\w, ]*)\)` \|", PAGE.read_text(), re.MULTILINE)
    listed = {name: arguments.split(", ") for name, arguments in rows if name in METHODS}
    assert listed == {
        name: list(inspect.signature(getattr(fedprune.Strategy, name)).parameters)[1:] for name in METHODS
    }


PARTS = {"aggregator": Aggregator, "allocator": Allocator, "schedule": Schedule}


@pytest.mark.parametrize("part", list(PARTS))
def test_modules_have_the_parts_that_the_page_says(part: str) -> None:
    page = PAGE.read_text()
    row = next(line for line in page.splitlines() if line.startswith(f"| `{part}` |"))
    names = re.findall(r"`([a-z_.]+)`", row.split("|")[4])
    assert names
    for name in names:
        whole = name if name.startswith("fedprune.") else f"fedprune.{name}"
        module = importlib.import_module(whole)
        own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
        assert any(issubclass(kind, PARTS[part]) for kind in own), name
