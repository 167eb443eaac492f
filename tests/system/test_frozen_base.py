"""Real processes on a real Mosquitto: a frozen base travels once, is checked, and outlives a board's restart."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import fedprune_export as fx
from fedprune.coordination import State
from fedprune_server.storage.storage import Storage
from support.fakes.fleet import models
from support.processes.real_site import Site, job_config, write_material

pytestmark = [pytest.mark.system, pytest.mark.mosquitto]

DEVICES = ("north", "south")
CONFIG = job_config("frozen-base", rounds=3, recipe={"epochs": 4, "lr": 0.01})


class Classifier(nn.Module):
    """A base of which adapters are a small part."""

    input_shape = (8,)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 500), nn.ReLU(), nn.Linear(500, 500), nn.ReLU(), nn.Linear(500, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    write_material(folder, dict.fromkeys(DEVICES, 200))
    torch.manual_seed(0)
    (folder / "model.onnx").write_bytes(fx.load(Classifier(), lora="4", base="float16").graph.to_bytes())
    return folder


def run(material: Path, folder: Path, disturb: Callable[[Site, Path], None]) -> tuple[State, dict[str, int], int, str]:
    """The end of a job that is disturbed in its second round: state, bytes to each board, size of the base, logs."""
    with Site(material, folder, CONFIG, DEVICES, 120, mosquitto=True, may_hold=True) as site:
        site.hold(2)
        site.start_all()
        site.wait_until_held(2)
        state = site.saved_state()
        assert state is not None
        base = next(task.offer["base"] for task in state.tasks.values() if task.offer is not None)
        digest = base["sha256"]
        disturb(site, folder / "north" / "blobs" / digest[:2] / digest)
        site.let_go(2)
        state = site.finish_complete()
        with Storage.open_existing(site.state) as storage:
            return state, {n: down for n, (down, _) in storage.traffic().items()}, base["size"], site.logs_in_full()


def restart(site: Site, base: Path) -> None:
    site.kill("north")


def damage(site: Site, base: Path) -> None:
    """Change a byte of a board's base while its process is down."""
    site.processes["north"].kill()
    site.processes["north"].wait()
    raw = bytearray(base.read_bytes())
    raw[-1] ^= 1
    base.write_bytes(raw)
    site.start("north")


# At every push `test_tasks.py` counts a base's bytes, and `test_agent_restarts.py` damages what a board has pulled.
@pytest.mark.soak
def test_a_base_travels_once_and_is_fetched_again_only_if_damaged(material: Path, tmp_path: Path) -> None:
    ends = []
    for number, disturb in enumerate((restart, damage)):
        folder = tmp_path / str(number)
        folder.mkdir()
        state, down, base, logs = run(material, folder, disturb)
        ends.append(models(state))
        weights = max(task.offer["weights"]["size"] for task in state.tasks.values() if task.offer is not None)
        assert base > 10 * weights
        for name, count in down.items():
            times = 2 if (disturb, name) == (damage, "north") else 1
            assert times * base < count < (times + 0.6) * base, (name, down, base, weights)
        assert ("is damaged" in logs) == (disturb is damage)
    assert ends[0] == ends[1]
    assert len(set(ends[0])) == 3
