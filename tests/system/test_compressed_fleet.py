"""Real processes on a real Mosquitto: updates in every codec arrive, count, and are as small as they should be."""

from pathlib import Path

import pytest

from fedprune.output.tables import ignore_progress
from fedprune_server.maintenance.state_check import check_state
from fedprune_server.storage.storage import Storage
from support.processes.real_site import Site, write_material

pytestmark = pytest.mark.system

DEVICES = ("north", "south")
CONFIG = """
[job]
name = "compressed"
rounds = 2
devices = 2
density = 0.9
deadline_s = 300
compression = "{}"
compression_down = "{}"

[job.recipe]
epochs = 2
"""


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_material(tmp_path_factory.mktemp("material"), dict.fromkeys(DEVICES, 200))


@pytest.mark.parametrize(
    ("setting", "down"), [("top-k:0.1", "int4"), pytest.param("int8", "int8", marks=pytest.mark.soak)]
)
def test_a_fleet_trains_with_what_travels_in_a_codec(material: Path, tmp_path: Path, setting: str, down: str) -> None:
    with Site(material, tmp_path, CONFIG.format(setting, down), DEVICES, 120, mosquitto=True) as site:
        site.start_all()
        state = site.finish_complete()
    for task in state.tasks.values():
        assert task.offer is not None
        assert task.update is not None
        assert task.offer.get("codec") == (None if setting == "none" else setting)
        size, plain = task.update["size"], task.offer["weights"]["size"]
        assert size == plain if setting == "none" else size < plain
        if down != "none":
            assert task.offer["coded"]["size"] < plain
            assert task.offer["held"]
    for device in state.devices.values():
        assert device.codecs
        assert (device.held is None) == (setting == "none")
    with Storage.open_existing(site.state) as storage:
        assert all(up > 0 for _, up in storage.traffic().values())
    assert [f for f in check_state(site.state, ignore_progress, running=False) if "log" in f.message] == []
