"""A private job of real processes: noise in what arrives, a budget that outlives kills, a board that asks for more."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedprune.blobs.blob_store import BlobStore
from fedprune.core import tensorfile
from fedprune.updates.privacy_cost import epsilon_for
from fedprune_device.privacy.budget import BoardPrivacyBudget
from fedprune_server.cli.status import job_status, status_text
from support.processes.real_site import Site, write_material

pytestmark = [pytest.mark.system, pytest.mark.soak]

ROUNDS = 3
"""What the budget is enough for."""

CONFIG = f"""
[job]
rounds = 20
devices = 3
deadline_s = 120
strategy = "fedavg"

[job.privacy]
clip = 1.0
noise_multiplier = 1.0
epsilon_budget = {epsilon_for(float(ROUNDS), 1e-5) + 0.01:.4f}
"""


class Owned(Site):
    """The owner of `strict` asks for more noise than the job has."""

    def command(self, name: str) -> list[str]:
        return super().command(name) + ["--privacy", str(self.folder / "owner.toml")] * (name == "strict")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    names = ("north", "south", "strict")
    write_material(tmp_path, dict.fromkeys(names, 300))
    (tmp_path / "owner.toml").write_text("[privacy]\nleast_noise = 5.0\n")
    with Owned(tmp_path, tmp_path, CONFIG, names, 90, mosquitto=True, may_hold=True) as made:
        yield made


def test_a_private_job_ends_when_its_budget_is_spent_whoever_is_killed(site: Site) -> None:
    site.hold(2)
    site.start_all()

    def rounds() -> int:
        state = site.saved_state()
        return 0 if state is None else len(state.history)

    site.wait_for(lambda: rounds() >= 1, "a round")
    site.wait_until_held(2, "north", "south")
    site.kill("server")
    site.kill("south")
    site.let_go(2)
    site.finish()

    state = site.saved_state()
    assert state is not None
    assert len(state.history) == ROUNDS
    shown = status_text(job_status(site.state))
    assert f"budget {epsilon_for(float(ROUNDS), 1e-5) + 0.01:g}"[:9] in shown
    assert f"ε {epsilon_for(float(ROUNDS), 1e-5):.3g}" in shown
    said = [row["devices"]["strict"]["reason"] for row in state.history if "strict" in row["devices"]]
    assert all("in units of the clip: expected at least 5, got 1" in reason for reason in said)
    assert said
    assert "expected at least 5, got 1" in shown

    for name, device in state.devices.items():
        assert device.releases == {"1.0": ROUNDS}, name
        own = BoardPrivacyBudget(site.folder / name)
        # A board that is killed between drawing and keeping has drawn once more than it sent.
        assert own.draws in ((0,) if name == "strict" else (ROUNDS, ROUNDS + 1)), name
        measured = [row["devices"].get(name, {}).get("metrics", {}) for row in state.history]
        assert not any("accuracy" in key or "loss" in key for metrics in measured for key in metrics)

    store = BlobStore(site.state / "blobs")
    models = [tensorfile.decode(store.read(row["model"])) for row in state.history[-2:]]
    moved = np.concatenate([(models[1][n] - models[0][n]).ravel() for n in models[0]])
    # The mean of two updates whose every element has noise of 1, and whose training can't move it by more than 1.
    assert moved.std() == pytest.approx(np.sqrt(0.5), rel=0.2)
    assert json.loads((site.folder / "north" / "privacy.json").read_text())
