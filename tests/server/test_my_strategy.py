"""The strategy of the documentation runs, alone and beside the presets."""

from __future__ import annotations

import importlib
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fedprune import profile_store
from fedprune.blobs import BlobStore
from fedprune.errors import ConfigError
from fedprune.job import Job
from fedprune.recipe import Recipe
from fedprune.strategies import compose
from fedprune_export.importing import import_onnx
from fedprune_server.digits import deal, digits_model
from fedprune_server.experiment import Experiment
from fedprune_server.simulation import Simulation
from fedprune_server.virtual_device import VirtualDevice

ROOT = Path(__file__).parents[2]
JOB = Job(rounds=3, devices=3, density=0.5, strategy="my_strategy:energy", recipe=Recipe(epochs=2))


@pytest.fixture(autouse=True)
def _beside_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.delitem(sys.modules, "my_strategy", raising=False)


def test_it_learns(tmp_path: Path) -> None:
    names = ("a", "b", "c")
    federation = deal(names, seed=0)
    profile = profile_store.find("raspberry-pi-5")
    devices = [VirtualDevice(n, profile, federation.devices[n]) for n in names]
    model = import_onnx(digits_model(), "digits")
    simulation = Simulation(Experiment("x", JOB, model, devices, (federation.x, federation.y)), BlobStore(tmp_path))
    history = simulation.run()

    losses = [h["metrics"]["loss"] for h in history]
    assert losses[-1] < losses[0]
    assert set(simulation.state.memory) == {"velocity"}


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
    page = (ROOT / "docs" / "write-a-strategy.md").read_text()
    shown = re.search(r"```python\n(.*?)```", page, re.DOTALL)

    assert shown is not None
    assert shown.group(1) == (ROOT / "examples" / "my_strategy.py").read_text()


ROLES = {
    "scorer": ("rank", "learn"),
    "extractor": ("extract", "reconstruct"),
    "personaliser": ("personalise", "share"),
    "objective": ("recipe",),
    "aggregator": ("fold", "add", "close"),
    "allocator": ("admit", "open", "learn", "review", "done"),
    "schedule": ("asynchronous",),
}


@pytest.mark.parametrize("role", list(ROLES))
def test_modules_have_the_roles_that_the_page_says(role: str) -> None:
    page = (ROOT / "docs" / "write-a-strategy.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith(f"| {role} |"))
    names = re.findall(r"`([a-z_.]+)`", row.split("|")[4])
    assert names
    for name in names:
        whole = name if name.startswith("fedprune.") else f"fedprune.strategies.{name.rpartition('.')[2]}"
        module = importlib.import_module(whole)
        own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
        assert any(all(hasattr(kind, n) for n in ROLES[role]) for kind in own), name
