"""Private jobs from board to summary: what leaves boards, what is counted, and what stays as it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedprune.model.recipe import Recipe
from fedprune.updates.privacy import Privacy
from fedprune_device.training.evaluation import MACHINE_METRICS
from fedprune_server.simulation.results.rows import round_rows
from fedprune_server.simulation.results.tables import final_figures
from fedprune_server.simulation.simulation import Simulation
from support.fakes.digits_simulation import boards, digits, digits_simulation, final_weights

PRIVACY = ("epsilon", "epsilon_next")
STATISTICS = ("running_mean", "running_var")
Build = Callable[..., Simulation]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def make(folder: str, privacy: Privacy, **settings: Any) -> Simulation:
        job = {"strategy": "fedavg", "options": {"densities": [0.25, 0.5]}, "recipe": Recipe(max_steps=2)}
        samples = (digits().x[:50], digits().y[:50])
        fleet = boards(("a", "b"), "raspberry-pi-4b")
        settings = {"fleet": fleet, "evaluation": samples, "privacy": privacy, **job, **settings}
        return digits_simulation(tmp_path / folder, keeps_state=False, **settings)

    return make


def test_nothing_clipped_and_no_noise_is_the_job_without_privacy(build: Build) -> None:
    frozen = Recipe(max_steps=2, frozen=("*running_mean", "*running_var"))
    plain = build("plain", Privacy(), options={"densities": [0.25, 0.5], "weighting": "uniform"}, recipe=frozen)
    bare = build("bare", Privacy(clip=1e6), recipe=frozen)
    plain.run(), bare.run()
    assert bare.state.model == plain.state.model


@pytest.mark.parametrize("noise", [{"noise": "local"}, {"noise": "shared", "boards": 1}])
def test_a_private_job_tells_updates_alone(build: Build, noise: dict[str, Any]) -> None:
    simulation = build("run", Privacy(clip=0.5, noise_multiplier=0.01, **noise))
    history = simulation.run()
    for row in history:
        assert set(row["metrics"]) == {"accuracy", "loss", "samples", "epsilon", "epsilon_next"}
        for device_row in row["devices"].values():
            assert device_row["progress"] == "folded"
            assert set(device_row["metrics"]) <= MACHINE_METRICS
    rows = round_rows(simulation.record())
    assert [[row[name] for row in rows] for name in PRIVACY] == [
        [row["metrics"][name] for row in history] for name in PRIVACY
    ]
    assert history[0]["metrics"]["epsilon"] < history[1]["metrics"]["epsilon"] == history[0]["metrics"]["epsilon_next"]
    after = final_weights(simulation)
    for name, value in after.items():
        if name.endswith(STATISTICS):
            assert value.tobytes() == simulation.model.tensors[name].tobytes(), name
    figures = final_figures(simulation.record())
    assert (figures["epsilon"], figures["delta"]) == (history[-1]["metrics"]["epsilon"], 1e-5)
    repeated = build("again", Privacy(clip=0.5, noise_multiplier=0.01, **noise))
    repeated.run()
    assert repeated.state.model == simulation.state.model  # simulations are the same every time


def test_the_budget_ends_a_simulated_job(build: Build) -> None:
    simulation = build("run", Privacy(clip=0.5, noise_multiplier=1.0, epsilon_budget=7.0), rounds=9)
    history = simulation.run()
    assert len(history) < 9
    assert history[-1]["metrics"]["epsilon"] <= 7.0 < history[-1]["metrics"]["epsilon_next"]
    assert simulation.record().ended_early.startswith(f"ended after round {len(history)} of 9: another round would")
